package qdranttest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/lockstep-db/lockstep/store/qdrantlocal"
)

// EnvURL names the variable with the address of a real Qdrant server to test against: a URL,
// or host:port of its gRPC port.
const EnvURL = "QDRANT_URL"

// Any returns the address of a real server, or of an embedded one where there is none. Others may
// use it, too.
func Any(t testing.TB) (addr string) {
	t.Helper()
	if addr = Real(t); addr == "" {
		addr = Embedded(t)
	}
	return addr
}

// Own returns the address of a server that the test has to itself: of [Child], or an embedded one.
func Own(t testing.TB) (addr string) {
	t.Helper()
	if addr = Child(t); addr == "" {
		addr = Embedded(t)
	}
	return addr
}

// Embedded starts an embedded server and returns its address (host:port).
func Embedded(t testing.TB) (addr string) {
	t.Helper()
	s, err := qdrantlocal.Open(t.TempDir(), qdrantlocal.Options{})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), <-served); err != nil {
			t.Errorf("the embedded index: %v", err)
		}
	})
	return l.Addr().String()
}

// Real returns the address (host:port) of a real Qdrant server's gRPC port: of the one that
// [EnvURL] names, which others may use, too, else of [Child]. Where there is neither it returns "".
func Real(t testing.TB) (addr string) {
	t.Helper()
	if at := os.Getenv(EnvURL); at != "" {
		if u, err := url.Parse(at); err == nil && u.Host != "" {
			return u.Host
		}
		return at
	}
	return Child(t)
}

// Child returns the address of a server that it starts from the qdrant binary on PATH and that
// ends with the test; "" where there is no such binary. It blocks until the server answers, and
// fails the test if it does not.
func Child(t testing.TB) (addr string) {
	t.Helper()
	binary, err := exec.LookPath("qdrant")
	if err != nil {
		return ""
	}
	return startQdrant(t, binary)
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// startQdrant runs a server on a directory of its own until the test ends.
func startQdrant(t testing.TB, binary string) (addr string) {
	t.Helper()
	dir := t.TempDir()
	grpcPort := freePort(t)
	logPath := filepath.Join(dir, "log")
	logFile, err := os.Create(logPath)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary)
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.Env = append(os.Environ(),
		"QDRANT__SERVICE__HOST=127.0.0.1",
		"QDRANT__SERVICE__HTTP_PORT="+freePort(t),
		"QDRANT__SERVICE__GRPC_PORT="+grpcPort,
		"QDRANT__STORAGE__STORAGE_PATH="+filepath.Join(dir, "storage"),
		"QDRANT__STORAGE__SNAPSHOTS_PATH="+filepath.Join(dir, "snapshots"),
		"QDRANT__TELEMETRY_DISABLED=true",
	)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil {
			t.Logf("stopping qdrant: %v", err)
		}
		if err := <-exited; err != nil {
			t.Logf("qdrant: %v", err) // killed
		}
		if err := logFile.Close(); err != nil {
			t.Error(err)
		}
	})
	addr = net.JoinHostPort("127.0.0.1", grpcPort)
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}()
	c := qdrant.NewQdrantClient(conn)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		r, err := c.HealthCheck(ctx, &qdrant.HealthCheckRequest{})
		if err == nil {
			select {
			case err := <-exited: // another server answered at its port
				exited <- err
				t.Fatal(fmt.Errorf("qdrant ended: %w", err))
			default:
			}
			t.Logf("qdrant %s at %s", r.GetVersion(), addr)
			return addr
		}
		select {
		case err := <-exited:
			exited <- err
			out, _ := os.ReadFile(logPath)
			t.Fatal(fmt.Errorf("qdrant ended: %w\n%s", err, strings.TrimSpace(string(out))))
		case <-ctx.Done():
			t.Fatal(fmt.Errorf("qdrant does not answer: %w", err))
		case <-tick.C:
		}
	}
}
