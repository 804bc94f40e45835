package devstack

import (
	"archive/zip"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/qdrant"
	"github.com/lockstep-db/lockstep/store/qdrantlocal"
)

// helperDir makes the test binary play a Lockstep that holds a stack until it is killed.
const helperDir = "DEVSTACK_TEST_HELPER_DIR"

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "qdrant" {
		playQdrant()
	}
	if dir := os.Getenv(helperDir); dir != "" {
		s, err := Start(context.Background(), Config{DataDir: dir, NeedPostgres: true, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		fmt.Println(s.DatabaseURL)
		select {}
	}
	goleak.VerifyTestMain(m)
}

// playQdrant is what the test binary does when it is called qdrant: it serves the embedded
// index as the environment that devstack gave it says.
func playQdrant() {
	server, err := qdrantlocal.Open(os.Getenv("QDRANT__STORAGE__STORAGE_PATH"), qdrantlocal.Options{APIKey: os.Getenv("QDRANT__SERVICE__API_KEY")})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(os.Getenv("QDRANT__SERVICE__HOST"), os.Getenv("QDRANT__SERVICE__GRPC_PORT")))
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("serving", len(os.Environ()), "variables")
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	go func() {
		<-term
		if err := server.Close(); err != nil {
			fmt.Println(err)
		}
	}()
	if err := server.Serve(l); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	if err := server.Close(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

func openIndex(t *testing.T, s *Stack) *qdrant.Client {
	t.Helper()
	c, err := qdrant.Open(t.Context(), qdrant.Config{URL: s.QdrantURL, APIKey: s.QdrantAPIKey})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// The same index, whichever serves it: its data outlives the stop, its key is asked for.
func TestIndex(t *testing.T) {
	t.Parallel()
	bin := filepath.Join(tempDir(t), "qdrant")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bin, data, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, bin := range map[string]string{"in process": filepath.Join(tempDir(t), "none"), "a qdrant binary": bin} {
		t.Run(name, func(t *testing.T) {
			dir := tempDir(t)
			ix := corpus.Index{QdrantName: "lockstep_x", Layout: corpus.Layout{Vectors: corpus.Dense, Dim: 2}}
			var first string
			for round := range 2 {
				s, err := Start(t.Context(), Config{DataDir: dir, NeedQdrant: true, QdrantBin: bin, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { stop(t, s) })
				c := openIndex(t, s)
				if err := c.Ping(t.Context()); err != nil {
					t.Fatal(err)
				}
				if err := s.Health(); err != nil {
					t.Error(err)
				}
				if round == 0 {
					first = s.QdrantAPIKey
					if err := c.CreateIndex(t.Context(), ix); err != nil {
						t.Fatal(err)
					}
				}
				exists, drift, err := c.DescribeIndex(t.Context(), ix)
				if err != nil || !exists || len(drift) > 0 {
					t.Errorf("round %d: exists %v, drift %v, %v", round, exists, drift, err)
				}
				if s.QdrantAPIKey != first {
					t.Error("the key changed")
				}
				thief, err := qdrant.Open(t.Context(), qdrant.Config{URL: s.QdrantURL})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := thief.ListOurCollections(t.Context(), ""); corpus.CodeOf(err) != "index_credentials" {
					t.Errorf("without the key: %v", err)
				}
				if err := thief.Close(); err != nil {
					t.Error(err)
				}
				stop(t, s)
				if err := c.Ping(t.Context()); err == nil {
					t.Error("it still answers after the stop")
				}
			}
		})
	}
}

// tempDir is one that other users may pass, as a data directory must be when root runs this.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "devstack") //nolint:usetesting // T.TempDir's parent is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

func start(t *testing.T, dir string) *Stack {
	t.Helper()
	s, err := Start(t.Context(), Config{DataDir: dir, NeedPostgres: true, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, s) })
	return s
}

func stop(t *testing.T, s *Stack) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := s.Stop(ctx); err != nil {
		t.Error(err)
	}
}

func query(t *testing.T, dsn, sql string) string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	var out string
	if err := conn.QueryRow(t.Context(), sql).Scan(&out); err != nil && !errors.Is(err, pgx.ErrNoRows) {
		t.Fatal(err)
	}
	return out
}

// postmasters counts the processes that work in the database's directory.
func postmasters(t *testing.T, dir string) (pids []int) {
	t.Helper()
	real, err := filepath.EvalSymlinks(filepath.Join(dir, "postgres"))
	if err != nil {
		return nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Skip("needs /proc")
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if ours, err := isProcess(pid, "postgres", real); err == nil && ours {
			pids = append(pids, pid)
		}
	}
	return pids
}

func waitUntil(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(60 * time.Second)
	for !cond() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

func postmasterPID(t *testing.T, dir string) int {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(dir, "postgres", "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(raw), "\n")
	pid, err := strconv.Atoi(first)
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func TestPostgresKeepsItsDataAndLeavesNoProcess(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	s := start(t, dir)
	if got := query(t, s.DatabaseURL, "CREATE TABLE t (x text)"); got != "" {
		t.Fatal(got)
	}
	query(t, s.DatabaseURL, "INSERT INTO t VALUES ('kept') RETURNING x")
	for setting, want := range map[string]string{
		"fsync": "on", "synchronous_commit": "on", "listen_addresses": "127.0.0.1", "unix_socket_directories": "",
		"password_encryption": "scram-sha-256", "server_encoding": "UTF8",
	} {
		if got := query(t, s.DatabaseURL, "SHOW "+setting); got != want {
			t.Errorf("%s is %q, want %q", setting, got, want)
		}
	}
	if err := s.Health(); err != nil {
		t.Error(err)
	}
	if len(s.Embedded) != 1 || !strings.Contains(s.Embedded[0], dir) {
		t.Errorf("what is embedded is not said: %q", s.Embedded)
	}
	for _, e := range s.Embedded {
		if strings.Contains(e, s.dirPassword(t)) {
			t.Error("the password is told to people")
		}
	}
	stop(t, s)
	if p := postmasters(t, dir); len(p) != 0 {
		t.Fatalf("processes left: %v", p)
	}
	if _, err := os.Stat(filepath.Join(dir, "postgres", "postmaster.pid")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the stop was not clean: %v", err)
	}
	s = start(t, dir)
	if got := query(t, s.DatabaseURL, "SELECT x FROM t"); got != "kept" {
		t.Errorf("got %q", got)
	}
}

func (s *Stack) dirPassword(t *testing.T) string {
	t.Helper()
	raw, err := os.ReadFile(s.dir.join("postgres.password"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(raw))
}

func TestSecondInstanceIsRefused(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	log := slog.New(slog.DiscardHandler)
	first, err := Start(t.Context(), Config{DataDir: dir, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	_, err = Start(t.Context(), Config{DataDir: dir, Logger: log})
	if corpus.CodeOf(err) != "data_dir_in_use" || !strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) || !strings.Contains(err.Error(), "--data-dir") {
		t.Errorf("got %v", err)
	}
	stop(t, first)
	second, err := Start(t.Context(), Config{DataDir: dir, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	stop(t, second)
}

func TestDataDirOfAnotherMaker(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		files map[string]string
		code  string
	}{
		"newer Lockstep":   {map[string]string{"VERSION": "2\n"}, "data_dir_newer"},
		"not a version":    {map[string]string{"VERSION": "hello"}, "data_dir_foreign"},
		"foreign database": {map[string]string{"postgres/PG_VERSION": "15\n"}, "data_dir_foreign"},
		"no database":      {map[string]string{"VERSION": "1\n", "postgres/x": ""}, "data_dir_damaged"},
		"torn PG_VERSION":  {map[string]string{"VERSION": "1\n", "postgres/PG_VERSION": ""}, "data_dir_damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := tempDir(t)
			for f, content := range c.files {
				path := filepath.Join(dir, f)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			_, err := Start(t.Context(), Config{DataDir: dir, NeedPostgres: true, Logger: slog.New(slog.DiscardHandler)})
			if corpus.CodeOf(err) != c.code {
				t.Errorf("got code %q: %v", corpus.CodeOf(err), err)
			}
		})
	}
}

func TestDataDirOfAnotherPostgres(t *testing.T) {
	t.Parallel()
	dirs := postgresDirs(t.Context())
	if len(dirs) == 0 {
		t.Fatal("no Postgres on this machine")
	}
	dir := tempDir(t)
	for f, content := range map[string]string{"VERSION": "1\n", "postgres/PG_VERSION": "11\n"} {
		path := filepath.Join(dir, f)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, bin := range []string{"", dirs[0]} {
		_, err := Start(t.Context(), Config{DataDir: dir, NeedPostgres: true, PostgresBin: bin, Logger: slog.New(slog.DiscardHandler)})
		if corpus.CodeOf(err) != "postgres_version" || !strings.Contains(err.Error(), "Postgres 11") {
			t.Errorf("bin %q: got %v", bin, err)
		}
	}
}

func TestNoPostgresWhereAsked(t *testing.T) {
	t.Parallel()
	_, err := Start(t.Context(), Config{DataDir: tempDir(t), NeedPostgres: true, PostgresBin: t.TempDir(), Logger: slog.New(slog.DiscardHandler)})
	if corpus.CodeOf(err) != "no_postgres" {
		t.Errorf("got %v", err)
	}
}

func TestUnreachableDataDirIsExplained(t *testing.T) {
	t.Parallel()
	closed := filepath.Join(tempDir(t), "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(closed, "data")
	stranger := &identity{name: "stranger", uid: 54321, gid: 54321}
	if got, err := stranger.reaches(filepath.Join(data, "postgres")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a directory that does not exist: %q, %v", got, err)
	}
	if err := os.Mkdir(data, 0o711); err != nil {
		t.Fatal(err)
	}
	if got, err := stranger.reaches(filepath.Join(data, "postgres")); err != nil || got != closed {
		t.Errorf("stopped at %q, %v", got, err)
	}
	if err := os.Chmod(closed, 0o711); err != nil {
		t.Fatal(err)
	}
	if got, err := stranger.reaches(filepath.Join(data, "postgres")); err != nil || got != "" {
		t.Errorf("stopped at %q, %v", got, err)
	}
	if os.Geteuid() != 0 {
		return // only root runs Postgres as another user
	}
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := Start(t.Context(), Config{DataDir: data, NeedPostgres: true, Logger: slog.New(slog.DiscardHandler)})
	if corpus.CodeOf(err) != "data_dir_unreachable" || !strings.Contains(err.Error(), closed) {
		t.Errorf("got %v", err)
	}
}

// Where no Postgres is installed the library's is fetched, once. The fetched one here is
// three scripts that know their version.
func TestFetchedPostgres(t *testing.T) {
	t.Parallel()
	txz, err := os.ReadFile("testdata/fake-postgres.txz")
	if err != nil {
		t.Fatal(err)
	}
	var jar bytes.Buffer
	z := zip.NewWriter(&jar)
	w, err := z.Create("postgres.txz")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(txz); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	sum := fmt.Sprintf("%x", sha256.Sum256(jar.Bytes()))
	var fetches atomic.Int32
	damaged := atomic.Bool{}
	damaged.Store(true)
	repository := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body := []byte(sum)
		if strings.HasSuffix(r.URL.Path, ".jar") {
			fetches.Add(1)
			body = slices.Clone(jar.Bytes())
			if damaged.Load() {
				body[len(body)/2] ^= 1
			}
		}
		if _, err := w.Write(body); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(func() { repository.Close(); http.DefaultClient.CloseIdleConnections() })
	dir := &dataDir{path: tempDir(t)}
	log := slog.New(slog.DiscardHandler)
	if _, err := fetchPostgres(t.Context(), repository.URL, 17, dir, log); err == nil || !strings.Contains(err.Error(), "checksum") {
		t.Fatalf("a damaged archive: %v", err)
	}
	damaged.Store(false)
	for range 2 {
		bin, err := fetchPostgres(t.Context(), repository.URL, 17, dir, log)
		if err != nil || bin != dir.join("bin", "postgres-17", "bin") {
			t.Fatalf("%q, %v", bin, err)
		}
		if v, err := postgresMajor(t.Context(), bin); err != nil || v != 17 {
			t.Errorf("version %d, %v", v, err)
		}
	}
	if n := fetches.Load(); n != 2 {
		t.Errorf("%d fetches, want one that failed and one that did not", n)
	}
	left, err := filepath.Glob(dir.join("fetch-*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	repository.Close()
	if _, err := fetchPostgres(t.Context(), repository.URL, 16, dir, log); err == nil {
		t.Error("fetched from a server that is gone")
	}
	if _, err := fetchPostgres(t.Context(), repository.URL, 9, dir, log); err == nil {
		t.Error("fetched a version that is not offered")
	}
}

// A killed Lockstep leaves no Postgres, and the next start finds what was committed.
func TestKilledLockstep(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	for round := range 2 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), helperDir+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil || !strings.HasPrefix(line, "postgres://") {
			t.Fatalf("helper said %q, %v", line, err)
		}
		dsn := strings.TrimSpace(line)
		if round == 0 {
			query(t, dsn, "CREATE TABLE t (x text)")
		}
		query(t, dsn, fmt.Sprintf("INSERT INTO t VALUES ('round %d') RETURNING x", round))
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // killed
		if round == 0 {
			// The next round starts at once, beside the dying postmaster.
			continue
		}
		waitUntil(t, "the orphaned Postgres to end by itself", func() bool { return len(postmasters(t, dir)) == 0 })
	}
	s := start(t, dir)
	if got := query(t, s.DatabaseURL, "SELECT string_agg(x, ',' ORDER BY x) FROM t"); got != "round 0,round 1" {
		t.Errorf("got %q", got)
	}
}

// Without the kernel's help (not Linux) the postmaster lives on; the next start stops it.
func TestLiveOrphanIsStopped(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	stop(t, start(t, dir))
	d, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	p := &postgres{dir: &dataDir{path: d}, data: filepath.Join(d, "postgres")}
	if p.as, err = pickIdentity(p.data); err != nil {
		t.Fatal(err)
	}
	if p.bin, err = findPostgres(t.Context(), "", 0, p.as, p.dir, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	cmd := p.command("postgres", "-D", p.data, "-c", "port="+strconv.Itoa(port), "-c", "unix_socket_directories=")
	cmd.SysProcAttr = attributes(p.as, 0)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	waitUntil(t, "the orphan to write its pid", func() bool {
		raw, err := os.ReadFile(filepath.Join(p.data, "postmaster.pid"))
		return err == nil && strings.Count(string(raw), "\n") > 1
	})
	s := start(t, dir)
	if err := <-ended; err != nil {
		t.Errorf("the orphan did not end cleanly: %v", err)
	}
	query(t, s.DatabaseURL, "SELECT 1::text")
}

// A pid that was reused by something else neither blocks the start nor is harmed.
func TestReusedPIDIsLeftAlone(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	stop(t, start(t, dir))
	other := exec.Command("sleep", "300")
	as, err := pickIdentity(filepath.Join(dir, "postgres"))
	if err != nil {
		t.Fatal(err)
	}
	other.SysProcAttr = attributes(as, syscall.SIGKILL) // the same user, as Postgres looks at that
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = other.Process.Kill()
		_ = other.Wait() // killed
	})
	pidFile := filepath.Join(dir, "postgres", "postmaster.pid")
	if err := os.WriteFile(pidFile, fmt.Appendf(nil, "%d\n/elsewhere\n", other.Process.Pid), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, dir)
	if err := syscall.Kill(other.Process.Pid, 0); err != nil {
		t.Errorf("the innocent process is gone: %v", err)
	}
}

func TestDeadPostgresIsReportedAndStartedAgain(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	s := start(t, dir)
	query(t, s.DatabaseURL, "CREATE TABLE t (x text)")
	pid := postmasterPID(t, dir)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, "health to notice", func() bool { return s.Health() != nil })
	if err := s.Health(); err != nil && corpus.KindOf(err) != corpus.Unavailable {
		t.Errorf("kind of %v", err)
	}
	waitUntil(t, "a new postmaster", func() bool {
		conn, err := pgx.Connect(t.Context(), s.DatabaseURL)
		if err != nil {
			return false
		}
		defer conn.Close(context.Background())
		var n int
		return conn.QueryRow(t.Context(), "SELECT count(*) FROM t").Scan(&n) == nil
	})
	if err := s.Health(); err != nil {
		t.Errorf("still unhealthy: %v", err)
	}
}

func TestLostPasswordIsReplaced(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	s := start(t, dir)
	query(t, s.DatabaseURL, "CREATE TABLE t (x text)")
	old := s.dirPassword(t)
	stop(t, s)
	if err := os.Remove(filepath.Join(dir, "postgres.password")); err != nil {
		t.Fatal(err)
	}
	s = start(t, dir)
	query(t, s.DatabaseURL, "SELECT count(*)::text FROM t")
	if s.dirPassword(t) == old {
		t.Error("the password is the lost one")
	}
}

func TestStartCutShortLeavesNothing(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := Start(ctx, Config{DataDir: dir, NeedPostgres: true, Logger: slog.New(slog.DiscardHandler)})
	if err == nil {
		t.Fatal("a start of 300 ms made a database; shorten the time")
	}
	waitUntil(t, "initdb and postgres to be gone", func() bool { return len(postmasters(t, dir)) == 0 })
	query(t, start(t, dir).DatabaseURL, "SELECT 1::text")
}

func TestLogIsBounded(t *testing.T) {
	t.Parallel()
	name := filepath.Join(t.TempDir(), "log", "x.log")
	l, err := openLog(name)
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Repeat("x", 1<<20-1) + "\n"
	for range 20 {
		if _, err := l.file.WriteString(line); err != nil {
			t.Fatal(err)
		}
		if err := l.trim(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.file.WriteString("the end\n"); err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(l.tail(), "the end") {
		t.Errorf("tail: %q", l.tail())
	}
	for _, f := range []string{name, name + ".1"} {
		st, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		if st.Size() > logBound+1<<20 {
			t.Errorf("%s has %d bytes", f, st.Size())
		}
	}
	if err := l.close(); err != nil {
		t.Error(err)
	}
}
