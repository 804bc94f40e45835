package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/lockstep-db/lockstep/internal/config/cachedir"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is the program: 0 done, 1 a step failed, 2 wrong use, 130 interrupted.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	command := ""
	if len(args) > 0 {
		command = args[0]
	}
	switch {
	case command == "", command == "env" && len(args) == 1, command == "exec" && len(args) > 1:
	default:
		fmt.Fprintln(stderr, "use: setup | setup env | setup exec CMD [ARG...]")
		return 2
	}
	s, err := newSetup(getenv, stderr)
	if err == nil {
		err = s.prepare(ctx)
	}
	if err != nil {
		if ctx.Err() != nil {
			fmt.Fprintln(stderr, "set-up: interrupted; run it again to go on")
			return 130
		}
		fmt.Fprintln(stderr, "set-up:", err)
		return 1
	}
	switch command {
	case "env":
		for _, kv := range s.environment() {
			k, v, _ := strings.Cut(kv, "=")
			fmt.Fprintf(stdout, "export %s='%s'\n", k, strings.ReplaceAll(v, "'", `'\''`))
		}
	case "exec":
		if err := become(args[1:], s.environment()); err != nil {
			fmt.Fprintln(stderr, "set-up:", err)
			return 1
		}
	}
	return 0
}

// become replaces this process by the command, so that signals and the exit status are its own.
func become(argv, extra []string) error {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return fmt.Errorf("finding %s: %w", argv[0], err)
	}
	env := os.Environ()
	for _, kv := range extra {
		name, _, _ := strings.Cut(kv, "=")
		kept := env[:0]
		for _, old := range env {
			if !strings.HasPrefix(old, name+"=") {
				kept = append(kept, old)
			}
		}
		env = append(kept, kv)
	}
	if err := syscall.Exec(path, argv, env); err != nil {
		return fmt.Errorf("starting %s: %w", path, err)
	}
	return nil
}

// setup knows the machine, the cache and what the user brought.
type setup struct {
	layout       cachedir.Layout
	goos, goarch string
	getenv       func(string) string
	out          io.Writer
	now          func() time.Time

	// What the steps found or made.
	tokenizersDir string
	runtimeLib    string
	checkpoint    string
}

func newSetup(getenv func(string) string, out io.Writer) (*setup, error) {
	layout, err := cachedir.Default(getenv)
	if err != nil {
		return nil, err
	}
	return &setup{
		layout: layout, goos: runtime.GOOS, goarch: runtime.GOARCH,
		getenv: getenv, out: out, now: time.Now,
	}, nil
}

// step is one thing to have. ready answers without side effects whether it is there; do
// brings it.
type step struct {
	name  string
	ready func() (bool, error)
	do    func(context.Context) error
}

// prepare does every step that is not done, and sets what environment reports.
func (s *setup) prepare(ctx context.Context) error {
	var steps []step
	for _, plan := range []func(context.Context) (step, error){s.planTokenizers, s.planRuntime, s.planCheckpoint} {
		st, err := plan(ctx)
		if err != nil {
			return err
		}
		steps = append(steps, st)
	}
	return s.perform(ctx, steps)
}

// perform does the steps that are not done, one set-up at a time in each cache.
func (s *setup) perform(ctx context.Context, steps []step) error {
	if missing, err := pending(steps); err != nil || len(missing) == 0 {
		return err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	// Another set-up may have done the rest while this one waited.
	missing, err := pending(steps)
	if err != nil {
		return err
	}
	for i, st := range missing {
		fmt.Fprintf(s.out, "set-up %d/%d: %s\n", i+1, len(missing), st.name)
		started := s.now()
		if err := st.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", st.name, err)
		}
		fmt.Fprintf(s.out, "set-up %d/%d: done in %.1f s\n", i+1, len(missing), s.now().Sub(started).Seconds())
	}
	return nil
}

func pending(steps []step) ([]step, error) {
	var missing []step
	for _, st := range steps {
		ok, err := st.ready()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", st.name, err)
		}
		if !ok {
			missing = append(missing, st)
		}
	}
	return missing, nil
}

// environment is what builds and tests need, as NAME=value.
func (s *setup) environment() []string {
	flag := "-L" + s.tokenizersDir
	if strings.ContainsAny(flag, " \t") {
		// The go command splits the variable at spaces and takes quotes.
		flag = `"` + flag + `"`
	}
	// What the user had stays, after ours; a second set-up in the same environment adds nothing.
	if old := s.getenv("CGO_LDFLAGS"); old != "" && old != flag && !strings.HasPrefix(old, flag+" ") {
		flag += " " + old
	} else if old != "" {
		flag = old
	}
	env := []string{"CGO_ENABLED=1", "CGO_LDFLAGS=" + flag, "ONNXRUNTIME_LIB=" + s.runtimeLib}
	if s.checkpoint != "" {
		env = append(env, "LOCKSTEP_MINILM="+s.checkpoint)
	}
	return env
}

// Prefixes of folders of unfinished work that nobody goes on with.
const (
	wheelWork   = "wheel"
	installWork = "install"
)

// workDir makes an empty folder for unfinished work, removed by the returned function.
func (s *setup) workDir(name string) (string, func(), error) {
	if err := os.MkdirAll(s.layout.Work(), 0o755); err != nil {
		return "", nil, err
	}
	dir, err := os.MkdirTemp(s.layout.Work(), name+"-")
	if err != nil {
		return "", nil, err
	}
	return dir, func() { os.RemoveAll(dir) }, nil
}

// install moves a finished folder to its place in one rename. A folder in the way can only be
// an incomplete one of an older release of this program or one a user damaged: it is replaced.
func install(finished, place string) error {
	if err := os.MkdirAll(filepath.Dir(place), 0o755); err != nil {
		return err
	}
	if err := os.RemoveAll(place); err != nil {
		return err
	}
	return os.Rename(finished, place)
}

// fileReady reports whether path is a regular file of the given size (any size if negative).
func fileReady(path string, size int64) (bool, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	}
	return info.Mode().IsRegular() && (size < 0 || info.Size() == size), nil
}
