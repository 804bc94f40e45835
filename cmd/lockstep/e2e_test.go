package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// These tests run the built binary as its user would: real model, real Postgres, real HTTP.
// They need what `make setup` fetches and fail, rather than skip, without it.

// binary is built once for all tests of the package.
var binary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "lockstep-e2e-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "lockstep")
	args := []string{"build"}
	if raceEnabled {
		args = append(args, "-race")
	}
	out, err := exec.Command("go", append(args, "-o", path, ".")...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building the binary: %w\n%s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if path, err := binary(); err == nil {
		os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

type instance struct {
	t    *testing.T
	cmd  *exec.Cmd
	url  string
	dir  string
	log  *os.File
	done chan error
}

// freePort asks the kernel for one; another process may take it before we do, which fails
// the start loudly.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// dataDir is a folder below the system's temporary one that an unprivileged Postgres can reach.
func dataDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lockstep-data-") //nolint:usetesting // T.TempDir's parent is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "data")
}

// start runs `lockstep serve` on dir and waits until it is ready.
func start(t *testing.T, dir string, extra ...string) *instance {
	t.Helper()
	in := launch(t, dir, extra...)
	in.waitReady()
	return in
}

func launch(t *testing.T, dir string, extra ...string) *instance {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(filepath.Dir(dir), "lockstep.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	cmd := exec.Command(path, append([]string{"serve", "--listen", addr, "--data-dir", dir}, extra...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = cleanEnv()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	in := &instance{t: t, cmd: cmd, url: "http://" + addr, dir: dir, log: log, done: make(chan error, 1)}
	go func() { in.done <- cmd.Wait() }()
	t.Cleanup(func() {
		in.kill()
		log.Close()
		if t.Failed() {
			if raw, err := os.ReadFile(log.Name()); err == nil {
				t.Logf("the server's log, without requests:\n%s", tail(withoutRequests(raw), 8000))
			}
		}
	})
	return in
}

func withoutRequests(log []byte) []byte {
	var out []byte
	for line := range bytes.Lines(log) {
		if !bytes.Contains(line, []byte(`"msg":"request"`)) {
			out = append(out, line...)
		}
	}
	return out
}

func tail(b []byte, n int) []byte {
	if len(b) > n {
		b = b[len(b)-n:]
	}
	return b
}

// cleanEnv drops the stores a developer may have configured: the embedded default is tested.
func cleanEnv() []string {
	var out []string
	for _, e := range os.Environ() {
		name, _, _ := strings.Cut(e, "=")
		switch name {
		case "DATABASE_URL", "QDRANT_URL", "QDRANT_API_KEY", "LOCKSTEP_LISTEN", "LOCKSTEP_DATA_DIR", "LOCKSTEP_API_KEYS", "LOCKSTEP_SERVER", "LOCKSTEP_API_KEY":
		default:
			out = append(out, e)
		}
	}
	return out
}

// readyWithin bounds a start: a race build on a busy two-core machine needs most of a minute.
const readyWithin = 3 * time.Minute

func (in *instance) waitReady() {
	in.t.Helper()
	deadline := time.After(readyWithin)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		resp, err := http.Get(in.url + "/readyz")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return
			}
		}
		select {
		case err := <-in.done:
			in.done <- err
			raw, _ := os.ReadFile(in.log.Name())
			in.t.Fatalf("the server ended before it was ready: %v\n%s", err, tail(raw, 4000))
		case <-deadline:
			in.t.Fatal("the server was not ready in time")
		case <-tick.C:
		}
	}
}

// kill ends the process as a power cut would.
func (in *instance) kill() {
	_ = in.cmd.Process.Kill()
	err := <-in.done
	in.done <- err
}

// stop asks for a graceful end and returns the exit code.
func (in *instance) stop() int {
	in.t.Helper()
	if err := in.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		in.t.Fatal(err)
	}
	select {
	case err := <-in.done:
		in.done <- err
		return exitCode(err)
	case <-time.After(time.Minute):
		in.t.Fatal("the server did not stop within a minute of SIGTERM")
		return -1
	}
}

func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		return -1
	}
	return 0
}

// call sends a JSON request and decodes the answer; err is about the connection.
func (in *instance) call(method, path string, body any) (status int, answer map[string]any, err error) {
	var reader io.Reader
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			return 0, nil, err
		}
		reader = bytes.NewReader(raw)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, in.url+path, reader)
	if err != nil {
		return 0, nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, nil, err
	}
	if len(raw) > 0 {
		if err := json.Unmarshal(raw, &answer); err != nil {
			return resp.StatusCode, nil, fmt.Errorf("%s %s answered %s with %q: %w", method, path, resp.Status, tail(raw, 300), err)
		}
	}
	return resp.StatusCode, answer, nil
}

// must is call for a test that expects one status.
func (in *instance) must(want int, method, path string, body any) map[string]any {
	in.t.Helper()
	status, answer, err := in.call(method, path, body)
	if err != nil {
		in.t.Fatalf("%s %s: %v", method, path, err)
	}
	if status != want {
		in.t.Fatalf("%s %s: status %d, want %d: %v", method, path, status, want, answer)
	}
	return answer
}

func put(id, text string) map[string]any {
	return map[string]any{"wait": true, "documents": []any{map[string]any{"id": id, "text": text, "metadata": map[string]any{"k": id}}}}
}

// found returns the documents a search names, in order.
func (in *instance) found(query string, limit int) []string {
	in.t.Helper()
	answer := in.must(http.StatusOK, http.MethodPost, "/search", map[string]any{"query": query, "limit": limit, "group_by": "document"})
	var out []string
	for _, r := range answer["results"].([]any) {
		out = append(out, r.(map[string]any)["document"].(string))
	}
	return out
}

func TestIngestSearchKillAndRestart(t *testing.T) {
	dir := dataDir(t)
	in := start(t, dir)
	in.must(http.StatusOK, http.MethodPost, "/documents", put("bread", "To bake bread, mix flour, water, salt and yeast, and let the dough rise."))
	in.must(http.StatusOK, http.MethodPost, "/documents", put("cars", "The engine of the car needs new oil every fifteen thousand kilometres."))
	if got := in.found("how do I make a loaf?", 2); len(got) != 2 || got[0] != "bread" {
		t.Fatalf("search found %v, want bread first", got)
	}
	again := in.must(http.StatusOK, http.MethodPost, "/documents", put("bread", "To bake bread, mix flour, water, salt and yeast, and let the dough rise."))
	if status := again["results"].([]any)[0].(map[string]any)["status"]; status != "unchanged" {
		t.Errorf("the same document again is %v, want unchanged", status)
	}
	in.kill()

	in = start(t, dir)
	if got := in.found("how do I make a loaf?", 2); len(got) != 2 || got[0] != "bread" {
		t.Fatalf("after kill -9, search found %v", got)
	}
	in.must(http.StatusOK, http.MethodDelete, "/documents/bread?wait=true", nil)
	if got := in.found("how do I make a loaf?", 5); len(got) != 1 || got[0] != "cars" {
		t.Fatalf("after the delete, search found %v", got)
	}
	in.must(http.StatusNotFound, http.MethodGet, "/documents/bread", nil)

	second := launch(t, dir)
	select {
	case err := <-second.done:
		second.done <- err
		if exitCode(err) == 0 {
			t.Error("a second instance on the same data directory must be refused")
		}
	case <-time.After(time.Minute):
		t.Error("a second instance on the same data directory was not refused")
	}
	if code := in.stop(); code != 0 {
		t.Errorf("SIGTERM ended with exit code %d, want 0", code)
	}
	assertNoChildren(t, dir)
}

// assertNoChildren looks for processes whose command line or working directory names the data directory.
func assertNoChildren(t *testing.T, dir string) {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil || len(procs) == 0 {
		return // not Linux: there is no /proc to look at
	}
	for _, p := range procs {
		raw, err := os.ReadFile(p)
		if err == nil && bytes.Contains(raw, []byte(dir)) {
			t.Errorf("left behind: %s", bytes.ReplaceAll(raw, []byte{0}, []byte{' '}))
		}
	}
}

// crashRounds is how often TestKillUnderLoad kills something. CI keeps it small; the long
// run sets LOCKSTEP_CRASH_ROUNDS.
func crashRounds(t *testing.T) int {
	if s := os.Getenv("LOCKSTEP_CRASH_ROUNDS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return 4
}

// docState is what one client knows of one of its documents.
type docState struct {
	word string // unique to the last text that may be there
	// acked is the state the server acknowledged last: "present", "absent", or "" while a
	// request's answer was lost and either may hold.
	acked string
}

// TestKillUnderLoad lets clients write while the server, or its Postgres, is killed at
// random moments. What was acknowledged must hold afterwards.
func TestKillUnderLoad(t *testing.T) {
	seed := rand.Uint64()
	if s := os.Getenv("LOCKSTEP_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	dir := dataDir(t)
	const clients, perClient = 4, 6
	states := make([][]docState, clients)
	for c := range states {
		states[c] = make([]docState, perClient)
	}
	// What a killed instance had claimed is taken over when its lease ends; the default is a minute.
	flags := []string{"--ingest-lease", "5s", "--qdrant-timeout", "5s"}
	in := start(t, dir, flags...)
	rounds := crashRounds(t)
	kills := map[string]int{}
	for round := range rounds {
		begin := time.Now()
		stop := make(chan struct{})
		var writers sync.WaitGroup
		for c := range clients {
			crng := rand.New(rand.NewPCG(seed, uint64(round*clients+c+1)))
			writers.Go(func() { in.write(c, states[c], crng, round, stop) })
		}
		timer := time.NewTimer(time.Duration(100+rng.IntN(900)) * time.Millisecond)
		<-timer.C
		switch rng.IntN(4) {
		case 0:
			killPostgres(t, dir)
			kills["postgres"]++
		case 1: // a power cut: the database goes, and at once the rest
			killPostgres(t, dir)
			in.kill()
			kills["both"]++
		default: // the embedded index dies with its process
			in.kill()
			kills["lockstep"]++
		}
		close(stop)
		writers.Wait()
		if in.exited() {
			in = start(t, dir, flags...)
		} else {
			in.waitReady()
		}
		in.verify(states)
		if t.Failed() {
			t.Fatalf("promises broken in round %d of %d (seed %d)", round, rounds, seed)
		}
		if round%10 == 9 || round == rounds-1 {
			t.Logf("round %d of %d took %v; kills so far: %v", round+1, rounds, time.Since(begin).Round(time.Millisecond), kills)
		}
	}
	report := in.must(http.StatusAccepted, http.MethodPost, "/admin/reconcile", map[string]any{"depth": "deep", "repair": true})
	t.Logf("the repairing run: %v", in.waitRun(report["run_id"].(string))["collections"])
	second := in.must(http.StatusAccepted, http.MethodPost, "/admin/reconcile", map[string]any{"depth": "deep"})
	run := in.waitRun(second["run_id"].(string))
	for _, c := range run["collections"].([]any) {
		for kind, n := range c.(map[string]any)["findings"].(map[string]any) {
			if n.(float64) != 0 {
				t.Errorf("the reconcile after the repairing one still finds %v %s", n, kind)
			}
		}
	}
	in.verify(states)
}

func (in *instance) exited() bool {
	select {
	case err := <-in.done:
		in.done <- err
		return true
	default:
		return false
	}
}

func (in *instance) waitRun(id string) map[string]any {
	in.t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(2 * time.Minute)
	for {
		run := in.must(http.StatusOK, http.MethodGet, "/admin/reconcile/"+id, nil)
		if run["state"] != "running" {
			if run["state"] != "done" {
				in.t.Fatalf("the run ended as %v: %v\n%s", run["state"], run["error"], tail(fmt.Append(nil, run["collections"]), 4000))
			}
			return run
		}
		select {
		case <-tick.C:
		case <-deadline:
			in.t.Fatal("the run did not end in two minutes")
		}
	}
}

func docName(client, doc int) string { return fmt.Sprintf("client-%d/doc %d", client, doc) }

func (in *instance) write(client int, docs []docState, rng *rand.Rand, round int, stop <-chan struct{}) {
	for n := 0; ; n++ {
		select {
		case <-stop:
			return
		default:
		}
		i := rng.IntN(len(docs))
		d := &docs[i]
		if rng.IntN(4) == 0 {
			before := d.acked
			d.acked = ""
			status, _, err := in.call(http.MethodDelete, "/documents/"+url.PathEscape(docName(client, i)), nil)
			switch {
			case err == nil && (status == http.StatusOK || status == http.StatusAccepted):
				d.acked = "absent"
			case err == nil && status == http.StatusNotFound && before != "present":
				d.acked = "absent"
			case err == nil && status == http.StatusNotFound:
				in.t.Errorf("%s was acknowledged and is not there to delete", docName(client, i))
			}
			continue
		}
		word := fmt.Sprintf("zq%dx%dx%dx%d", client, i, round, n)
		d.acked, d.word = "", word
		body := put(docName(client, i), "The password of this vault is "+word+" and nothing else.")
		body["wait"] = rng.IntN(2) == 0
		status, _, err := in.call(http.MethodPost, "/documents", body)
		if err == nil && (status == http.StatusOK || status == http.StatusAccepted) {
			d.acked = "present"
		}
	}
}

// verify waits for what was accepted to serve, then holds every document against what its
// client knows: the ledger's view, and what a search returns.
func (in *instance) verify(states [][]docState) {
	in.t.Helper()
	for c := range states {
		for i, d := range states[c] {
			switch d.acked {
			case "present":
				in.waitServing(docName(c, i))
			case "absent":
				in.must(http.StatusNotFound, http.MethodGet, "/documents/"+url.PathEscape(docName(c, i)), nil)
			}
		}
	}
	texts := in.texts()
	for c := range states {
		for i, d := range states[c] {
			name := docName(c, i)
			text, found := texts[name]
			switch {
			case d.acked == "absent" && found:
				in.t.Errorf("%s was deleted and search returns %q", name, text)
			case d.acked == "present" && !strings.Contains(text, d.word+" "):
				in.t.Errorf("%s: search returns %q, want the text with %s", name, text, d.word)
			case found && !strings.Contains(text, fmt.Sprintf("zq%dx%dx", c, i)):
				in.t.Errorf("%s: search returns %q, which was never sent for it", name, text)
			}
		}
	}
}

// servesWithin bounds what is left to do after a kill: a lease, back-off, and a busy machine.
const servesWithin = 3 * time.Minute

func (in *instance) waitServing(name string) {
	in.t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(servesWithin)
	for {
		view := in.must(http.StatusOK, http.MethodGet, "/documents/"+url.PathEscape(name), nil)
		if view["serving_version"] != nil && view["serving_version"] == view["target_version"] {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			in.t.Fatalf("%s was accepted and does not serve after %v: %v", name, servesWithin, view)
		}
	}
}

// texts is what one search that sees everything returns, by document.
func (in *instance) texts() map[string]string {
	in.t.Helper()
	answer := in.must(http.StatusOK, http.MethodPost, "/search", map[string]any{
		"query": "the password of the vault", "limit": 100, "include": []string{"text"}})
	out := map[string]string{}
	for _, r := range answer["results"].([]any) {
		m := r.(map[string]any)
		name := m["document"].(string)
		if was, twice := out[name]; twice {
			in.t.Errorf("a search returns two chunks of %s, which never had more than one: %q and %q", name, was, m["text"])
		}
		out[name] = m["text"].(string)
	}
	return out
}

// killPostgres kills the embedded server's postmaster, found by its pid file.
func killPostgres(t *testing.T, dir string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*", "postmaster.pid"))
	if more, _ := filepath.Glob(filepath.Join(dir, "*", "*", "postmaster.pid")); len(more) > 0 {
		files = append(files, more...)
	}
	if err != nil || len(files) != 1 {
		t.Fatalf("postmaster.pid below %s: %v, %v", dir, files, err)
	}
	raw, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(raw), "\n")
	pid, err := strconv.Atoi(first)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		t.Fatal(err)
	}
}
