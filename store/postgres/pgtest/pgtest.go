package pgtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// EnvURL names the variable that makes New use a server somebody else runs. The role in it
// must be allowed to create databases.
const EnvURL = "TEST_DATABASE_URL"

var shared struct {
	once   sync.Once
	server *Server
	err    error
}

// New returns the URL of an empty database that is dropped when the test ends. All tests of a
// process share one server, which the first call starts (about two seconds).
func New(t testing.TB) string {
	t.Helper()
	if base := os.Getenv(EnvURL); base != "" {
		return createDatabase(t, base)
	}
	shared.once.Do(func() { shared.server, shared.err = start() })
	if shared.err != nil {
		t.Fatalf("starting a Postgres for tests: %v", shared.err)
	}
	return createDatabase(t, shared.server.url("postgres"))
}

// Server is a Postgres of a test's own, which it may kill and start again.
type Server struct {
	dir, bin string
	cred     *syscall.Credential
	stdin    io.Closer
	ended    <-chan struct{}
}

// Start runs a server that belongs to one test and is removed with it.
func Start(t testing.TB) *Server {
	t.Helper()
	s, err := start()
	if err != nil {
		t.Fatalf("starting a Postgres for tests: %v", err)
	}
	t.Cleanup(s.stop)
	return s
}

// Database creates an empty database on s and returns its URL.
func (s *Server) Database(t testing.TB) string {
	t.Helper()
	return createDatabase(t, s.url("postgres"))
}

// Kill ends the server as a power cut would: SIGKILL, without a checkpoint.
func (s *Server) Kill(t testing.TB) {
	t.Helper()
	pid, err := s.postmaster()
	if err != nil {
		t.Fatalf("finding the postmaster: %v", err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "keep"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	children := childrenOf(pid)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatalf("killing the postmaster: %v", err)
	}
	for _, p := range children { // they would answer for a moment longer, until they notice
		_ = syscall.Kill(p, syscall.SIGKILL) // one may have ended by itself
	}
	<-s.ended
}

// childrenOf lists the processes started by pid, where /proc tells.
func childrenOf(pid int) []int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat") // the pattern is well formed
	var out []int
	for _, path := range stats {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue // ended meanwhile
		}
		// After the name in parentheses: state, parent.
		var state string
		var parent int
		if _, err := fmt.Sscan(string(raw[bytes.LastIndexByte(raw, ')')+1:]), &state, &parent); err != nil || parent != pid {
			continue
		}
		if child, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
			out = append(out, child)
		}
	}
	return out
}

// Restart starts a server again after Kill, over the same data.
func (s *Server) Restart(t testing.TB) {
	t.Helper()
	if err := s.run(); err != nil {
		t.Fatalf("restarting Postgres: %v", err)
	}
}

// Dir is the server's data directory.
func (s *Server) Dir() string { return filepath.Join(s.dir, "data") }

func (s *Server) postmaster() (int, error) {
	raw, err := os.ReadFile(filepath.Join(s.Dir(), "postmaster.pid"))
	if err != nil {
		return 0, err
	}
	line, _, _ := bytes.Cut(raw, []byte("\n"))
	return strconv.Atoi(string(bytes.TrimSpace(line)))
}

func (s *Server) url(database string) string {
	q := url.Values{"host": {s.dir}, "port": {"5432"}, "user": {"postgres"}}
	return "postgres:///" + database + "?" + q.Encode()
}

func createDatabase(t testing.TB, base string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, base)
	if err != nil {
		t.Fatalf("connecting to the Postgres for tests: %v", err)
	}
	defer conn.Close(ctx)
	var r [8]byte
	_, _ = rand.Read(r[:])
	name := "lockstep_test_" + hex.EncodeToString(r[:])
	if _, err := conn.Exec(ctx, "CREATE DATABASE "+name); err != nil {
		t.Fatalf("creating a test database: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		// Best effort: a test may have killed its server, and the data goes with the process.
		if conn, err := pgx.Connect(ctx, base); err == nil {
			_, _ = conn.Exec(ctx, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)")
			_ = conn.Close(ctx)
		}
	})
	u, err := url.Parse(base)
	if err != nil {
		t.Fatalf("reading the test database's URL: %v", err)
	}
	u.Path = "/" + name
	return u.String()
}

func start() (*Server, error) {
	bin, err := binaries()
	if err != nil {
		return nil, err
	}
	// Memory-backed where there is some: the server still calls fsync, it is only cheap. What a
	// killed process had committed survives in either place.
	base := "/dev/shm"
	if info, err := os.Stat(base); err != nil || !info.IsDir() {
		base = os.TempDir()
	}
	dir, err := os.MkdirTemp(base, "lockstep-pg-")
	if err != nil {
		if dir, err = os.MkdirTemp("", "lockstep-pg-"); err != nil {
			return nil, err
		}
	}
	s := &Server{dir: dir, bin: bin}
	if os.Geteuid() == 0 {
		if s.cred, err = unprivileged(); err != nil {
			return nil, err
		}
		if err := os.Chown(dir, int(s.cred.Uid), int(s.cred.Gid)); err != nil {
			return nil, err
		}
	}
	initdb := exec.Command(filepath.Join(bin, "initdb"), "--pgdata", s.Dir(), "--username", "postgres",
		"--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync", "--no-instructions")
	initdb.Dir = dir
	initdb.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "LC_ALL=C"}
	initdb.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred}
	if out, err := initdb.CombinedOutput(); err != nil {
		_ = os.RemoveAll(dir)
		return nil, fmt.Errorf("initdb: %w: %s", err, out)
	}
	if err := s.run(); err != nil {
		s.stop()
		return nil, err
	}
	return s, nil
}

// supervisor runs Postgres until it ends or its own input closes, which happens when the test
// process ends in any way. Then it removes the directory, unless told to keep it.
const supervisor = `
exec 3<&0
"$@" >>"$LOCKSTEP_DIR/log" 2>&1 &
pg=$!
( read -r _ <&3; kill -QUIT $pg 2>/dev/null ) &
watcher=$!
wait $pg
kill $watcher 2>/dev/null
[ -e "$LOCKSTEP_DIR/keep" ] || rm -rf "$LOCKSTEP_DIR"
`

// run starts the server and waits until it answers. A start fails while processes of a killed
// server still hold its shared memory, so an early end is tried again.
func (s *Server) run() error {
	keep := filepath.Join(s.dir, "keep")
	if err := os.WriteFile(keep, nil, 0o644); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		if err := s.spawn(); err != nil {
			return err
		}
		for {
			conn, err := pgx.Connect(ctx, s.url("postgres"))
			if err == nil {
				_ = conn.Close(ctx)
				return os.Remove(keep)
			}
			again := false
			select {
			case <-ctx.Done():
				log, _ := os.ReadFile(filepath.Join(s.dir, "log"))
				return fmt.Errorf("postgres did not answer within a minute: %w: %s", err, log)
			case <-s.ended:
				again = true
			case <-time.After(20 * time.Millisecond):
			}
			if again {
				break
			}
		}
	}
}

func (s *Server) spawn() error {
	cmd := exec.Command("/bin/sh", "-c", supervisor, "sh",
		filepath.Join(s.bin, "postgres"), "-D", s.Dir(), "-k", s.dir, "-p", "5432",
		"-c", "listen_addresses=", "-c", "max_connections=200", "-c", "shared_buffers=128MB",
		// Full pages protect against torn disk pages, which a killed process does not cause.
		"-c", "full_page_writes=off", "-c", "max_wal_size=2GB", "-c", "autovacuum_naptime=10s",
		"-c", "log_min_messages=warning", "-c", "jit=off", "-c", "dynamic_shared_memory_type=mmap")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.dir, "LC_ALL=C", "LOCKSTEP_DIR=" + s.dir}
	cmd.Dir = s.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred, Setpgid: true}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting postgres: %w", err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	s.stdin, s.ended = stdin, ended
	return nil
}

func (s *Server) stop() {
	if s.stdin != nil {
		_ = s.stdin.Close()
		<-s.ended
	}
	_ = os.RemoveAll(s.dir)
}

// binaries finds the directory that holds initdb and postgres.
func binaries() (string, error) {
	var found []string
	for _, pattern := range []string{"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin", "/usr/local/opt/postgresql*/bin"} {
		dirs, _ := filepath.Glob(pattern) // the patterns are constant and well formed
		for _, d := range dirs {
			if _, err := os.Stat(filepath.Join(d, "initdb")); err == nil {
				found = append(found, d)
			}
		}
	}
	if len(found) > 0 {
		return slices.MaxFunc(found, func(a, b string) int { return version(a) - version(b) }), nil
	}
	if path, err := exec.LookPath("initdb"); err == nil {
		return filepath.Dir(path), nil
	}
	return "", fmt.Errorf("no PostgreSQL binaries found: install the postgresql package, or set %s", EnvURL)
}

// version reads the first number in a path such as /usr/lib/postgresql/15/bin.
func version(dir string) int {
	n := 0
	for _, part := range strings.FieldsFunc(dir, func(r rune) bool { return r < '0' || r > '9' }) {
		n, _ = strconv.Atoi(part)
		break
	}
	return n
}

// unprivileged returns the user that runs Postgres for root, which Postgres refuses.
func unprivileged() (*syscall.Credential, error) {
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err1 == nil && err2 == nil {
			return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
		}
	}
	return nil, fmt.Errorf("running as root, and neither user postgres nor nobody exists to run Postgres")
}
