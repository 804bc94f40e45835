package storetest

import (
	"context"
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
)

// TestQdrant runs the suite on a real server: the one that QDRANT_URL names (host:port of
// its gRPC port, or a URL with it), else one started from the qdrant binary on PATH. It is
// skipped where there is neither; store/qdrantlocal always runs the suite.
func TestQdrant(t *testing.T) {
	addr := realServer(t)
	t.Run("suite", func(t *testing.T) {
		RunQdrant(t, func(t *testing.T) *qdrant.Client { return Dial(t, addr) })
	})
}

func realServer(t *testing.T) (addr string) {
	t.Helper()
	if at := os.Getenv("QDRANT_URL"); at != "" {
		if u, err := url.Parse(at); err == nil && u.Host != "" {
			return u.Host
		}
		return at
	}
	binary, err := exec.LookPath("qdrant")
	if err != nil {
		t.Skip("no real server: QDRANT_URL is not set and there is no qdrant on PATH")
	}
	return startQdrant(t, binary)
}

func freePort(t *testing.T) string {
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
func startQdrant(t *testing.T, binary string) (addr string) {
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
	c := Dial(t, addr)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		r, err := c.HealthCheck(ctx)
		if err == nil {
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
