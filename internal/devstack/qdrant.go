package devstack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	qc "github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// findQdrant returns the qdrant binary to run, if there is one.
func findQdrant(asked string) (string, bool) {
	if asked == "" {
		asked = "qdrant"
	}
	path, err := exec.LookPath(asked)
	if err != nil {
		return "", false
	}
	path, err = filepath.Abs(path)
	return path, err == nil
}

// startQdrant runs the binary with its storage under the data directory, on loopback ports.
func startQdrant(ctx context.Context, cfg Config, bin string, dir *dataDir, key string, log *slog.Logger) (string, *child, string, error) {
	fail := func(err error) (string, *child, string, error) { return "", nil, "", err }
	home := dir.join("qdrant")
	if _, err := os.Lstat(home); errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(dir.join("index")); err == nil {
			log.WarnContext(ctx, "a qdrant binary was found and replaces the embedded index; indexes are built again in it", "qdrant", bin, "unused", dir.join("index"))
		}
	}
	if err := os.MkdirAll(home, 0o700); err != nil {
		return fail(err)
	}
	pidFile := dir.join("qdrant.pid")
	if raw, err := os.ReadFile(pidFile); err == nil {
		if pid, err := strconv.Atoi(strings.TrimSpace(string(raw))); err == nil {
			if err := stopOrphan(ctx, pid, filepath.Base(bin), home, syscall.SIGTERM, syscall.SIGTERM, log); err != nil {
				return fail(err)
			}
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	for try := 1; ; try++ {
		url, ch, err := runQdrant(ctx, cfg, bin, home, pidFile, key, dir, log)
		if err == nil {
			return url, ch, fmt.Sprintf("Qdrant (%s), data in %s, for evaluation: set QDRANT_URL for your own", bin, home), nil
		}
		if try == 3 || ctx.Err() != nil || !strings.Contains(err.Error(), "in use") {
			return fail(err)
		}
	}
}

func runQdrant(ctx context.Context, cfg Config, bin, home, pidFile, key string, dir *dataDir, log *slog.Logger) (string, *child, error) {
	grpcPort, err := freePort()
	if err != nil {
		return "", nil, err
	}
	httpPort, err := freePort()
	if err != nil {
		return "", nil, err
	}
	logFile, err := openLog(dir.join("log", "qdrant.log"))
	if err != nil {
		return "", nil, err
	}
	ch := &child{
		name: "the embedded Qdrant", log: logFile, logger: log, polite: syscall.SIGTERM, urgent: syscall.SIGTERM, pidFile: pidFile,
		command: func() *exec.Cmd {
			cmd := exec.Command(bin)
			cmd.Dir = home
			cmd.Env = append(environment(home),
				"QDRANT__STORAGE__STORAGE_PATH="+filepath.Join(home, "storage"),
				"QDRANT__STORAGE__SNAPSHOTS_PATH="+filepath.Join(home, "snapshots"),
				"QDRANT__SERVICE__HOST=127.0.0.1",
				"QDRANT__SERVICE__API_KEY="+key,
				"QDRANT__SERVICE__GRPC_PORT="+strconv.Itoa(grpcPort),
				"QDRANT__SERVICE__HTTP_PORT="+strconv.Itoa(httpPort),
				"QDRANT__TELEMETRY_DISABLED=true",
				"QDRANT__LOG_LEVEL=WARN",
			)
			cmd.SysProcAttr = attributes(nil, syscall.SIGTERM)
			return cmd
		},
	}
	addr := "127.0.0.1:" + strconv.Itoa(grpcPort)
	ch.supervise()
	wait, cancel := context.WithTimeout(ctx, cfg.StartTimeout)
	defer cancel()
	if err := ch.waitReady(wait, func(ctx context.Context) error { return qdrantAnswers(ctx, addr) }); err != nil {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		return "", nil, errors.Join(err, ch.stop(stop))
	}
	return "http://" + addr, ch, nil
}

func qdrantAnswers(ctx context.Context, addr string) error {
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = qc.NewQdrantClient(conn).HealthCheck(ctx, &qc.HealthCheckRequest{})
	return err
}
