package devstack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Config says what to run and where.
type Config struct {
	// DataDir holds everything; it is made if it does not exist. When the process runs as
	// root, all directories above it must let other users pass.
	DataDir string
	// NeedPostgres and NeedQdrant are set for servers that were not configured.
	NeedPostgres, NeedQdrant bool
	// PostgresBin is a directory with initdb and postgres; empty means search, then fetch.
	PostgresBin string
	// QdrantBin is a qdrant binary; empty means the one on PATH, if any.
	QdrantBin string
	// StartTimeout bounds the start of one server once its binaries are there; 0 means one
	// minute (recovery after a crash reads the log of a small database in seconds).
	StartTimeout time.Duration
	// Logger must not be nil.
	Logger *slog.Logger
}

// Stack is what runs. Its addresses are empty for servers that were not needed.
type Stack struct {
	// DatabaseURL holds a password: never log it.
	DatabaseURL string
	// QdrantURL is the gRPC address, http://127.0.0.1:port, and QdrantAPIKey the key it asks
	// for: other users of this machine can reach the port.
	QdrantURL, QdrantAPIKey string
	// Embedded tells people, one sentence a server, what runs and where its data lies.
	Embedded []string

	dir      *dataDir
	children []*child
	index    *localIndex
}

// Start brings up what cfg asks for and returns when it answers. The first start makes a
// database, which takes seconds; fetching binaries takes as long as the network does. If
// anything fails, what was started is stopped again. Errors say what to do:
// [corpus.Conflict] when another instance uses the directory or its format is another
// version's, else [corpus.Unavailable].
func Start(ctx context.Context, cfg Config) (_ *Stack, err error) {
	if cfg.StartTimeout <= 0 {
		cfg.StartTimeout = time.Minute
	}
	log := cfg.Logger.With("component", "devstack")
	dir, err := openDataDir(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	s := &Stack{dir: dir}
	defer func() {
		if err != nil {
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
			defer cancel()
			err = errors.Join(err, s.Stop(stop))
		}
	}()
	if cfg.NeedPostgres {
		url, ch, where, err := startPostgres(ctx, cfg, dir, log)
		if err != nil {
			return nil, fmt.Errorf("starting the embedded Postgres: %w", err)
		}
		s.DatabaseURL, s.children = url, append(s.children, ch)
		s.Embedded = append(s.Embedded, where)
	}
	if cfg.NeedQdrant {
		if s.QdrantAPIKey, err = dir.secret("index.key"); err != nil {
			return nil, fmt.Errorf("starting the embedded index: %w", err)
		}
		if bin, ok := findQdrant(cfg.QdrantBin); ok {
			url, ch, where, err := startQdrant(ctx, cfg, bin, dir, s.QdrantAPIKey, log)
			if err != nil {
				return nil, fmt.Errorf("starting qdrant: %w", err)
			}
			s.QdrantURL, s.children = url, append(s.children, ch)
			s.Embedded = append(s.Embedded, where)
		} else {
			index, where, err := startLocalIndex(dir, s.QdrantAPIKey, log)
			if err != nil {
				return nil, fmt.Errorf("starting the embedded index: %w", err)
			}
			s.QdrantURL, s.index = index.url, index
			s.Embedded = append(s.Embedded, where)
		}
	}
	for _, e := range s.Embedded {
		log.InfoContext(ctx, "embedded server", "what", e)
	}
	return s, nil
}

// stopTimeout is what a failed start grants its own clean-up.
const stopTimeout = 20 * time.Second

// Health is nil while every child runs; else it names those that do not, and why.
func (s *Stack) Health() error {
	var down []string
	for _, ch := range s.children {
		if why := ch.down(); why != "" {
			down = append(down, ch.name+" "+why)
		}
	}
	if s.index != nil {
		if err := s.index.failed(); err != nil {
			down = append(down, "the embedded index stopped: "+err.Error())
		}
	}
	if len(down) == 0 {
		return nil
	}
	return corpus.Errorf(corpus.Unavailable, "embedded_server_down", "%s", strings.Join(down, "; "))
}

// Stop ends the servers in reverse order, cleanly as long as ctx lasts, by force after. It
// may be called again; no process is left when it returns.
func (s *Stack) Stop(ctx context.Context) error {
	var errs []error
	if s.index != nil {
		errs = append(errs, s.index.stop(ctx))
		s.index = nil
	}
	for i := len(s.children) - 1; i >= 0; i-- {
		errs = append(errs, s.children[i].stop(ctx))
	}
	s.children = nil
	if s.dir != nil {
		errs = append(errs, s.dir.close())
		s.dir = nil
	}
	return errors.Join(errs...)
}

// freePort asks the kernel for a loopback port. Another process may take it before its user
// does, so a start that finds it taken asks again.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func unavailable(format string, args ...any) error {
	return corpus.Errorf(corpus.Unavailable, "embedded_server", format, args...)
}

func (d *dataDir) join(parts ...string) string {
	return filepath.Join(append([]string{d.path}, parts...)...)
}
