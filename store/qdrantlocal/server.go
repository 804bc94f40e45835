package qdrantlocal

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/qdrant/go-client/qdrant"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Version is the Qdrant version whose API is served. go-client compares it with its own.
const Version = "1.17.1"

// Title is what the health check answers instead of Qdrant's own title.
const Title = "Lockstep embedded vector index (not a Qdrant server)"

const (
	// defaultMaxRequest bounds one request. The real server has no bound; a batch of 256
	// points of 1,024 floats is 1 MiB, one of 64 multivectors of the largest size 256 MiB.
	defaultMaxRequest = 320 << 20
	// maxResponse bounds what a scroll, get or query may collect before it is refused.
	maxResponse = 1 << 30
	// defaultLogLimit is the size of a log below which a collection is not compacted.
	defaultLogLimit = 64 << 20
	// syncInterval is how long a write that nobody waits for may stay in memory only.
	syncInterval = 200 * time.Millisecond
	// gracePeriod is how long Close lets calls finish.
	gracePeriod = 5 * time.Second
)

// Options configure a server. The zero value is usable.
type Options struct {
	// Logger receives what an operator should know; nil discards it.
	Logger *slog.Logger
	// APIKey, if set, must be presented with every call but the health check.
	APIKey string
	// MaxRequestBytes bounds one request; 0 means 320 MiB.
	MaxRequestBytes int
	// LogLimitBytes is the least size of a collection's log at which it is compacted; 0
	// means 64 MiB. Disk use stays below five times the larger of this and the
	// collection's snapshot, plus two snapshots.
	LogLimitBytes int64
	// Workers is how many goroutines one search uses; 0 means one per CPU.
	Workers int

	// fsync replaces File.Sync in tests.
	fsync func(*os.File) error
}

// LockedError reports that another process has the directory open.
type LockedError struct {
	// Dir is the directory.
	Dir string
}

// Error names the directory and what to do.
func (e *LockedError) Error() string {
	return "the vector index in " + e.Dir + " is open in another process: stop that process, or use another data directory"
}

// Server is an open index. Its methods may be called from any goroutine.
type Server struct {
	opts   Options
	dir    string
	lock   *os.File
	logger *slog.Logger
	grpc   *grpc.Server
	stop   context.CancelFunc
	// background counts the goroutines Close waits for.
	background sync.WaitGroup
	ctx        context.Context

	// metaMu serialises changes of the catalogue: collections, aliases, payload indexes.
	metaMu sync.Mutex

	mu          sync.RWMutex
	collections map[string]*collection
	aliases     map[string]string
	listener    net.Listener
	closed      bool
	closeErr    error
	closeOnce   sync.Once
}

// Open opens the index in dir, making it if there is none, and reads everything that was
// acknowledged. It returns a *LockedError if another process has it open and a
// *CorruptionError if acknowledged data is damaged.
func Open(dir string, opts Options) (*Server, error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.MaxRequestBytes <= 0 {
		opts.MaxRequestBytes = defaultMaxRequest
	}
	if opts.LogLimitBytes <= 0 {
		opts.LogLimitBytes = defaultLogLimit
	}
	if opts.Workers <= 0 {
		opts.Workers = runtime.GOMAXPROCS(0)
	}
	if opts.fsync == nil {
		opts.fsync = (*os.File).Sync
	}
	if err := os.MkdirAll(filepath.Join(dir, collectionsDir), 0o700); err != nil {
		return nil, fmt.Errorf("opening the vector index: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	s := &Server{
		opts: opts, dir: dir, lock: lock, ctx: ctx, stop: stop,
		logger:      opts.Logger.With(slog.String("component", "qdrantlocal")),
		collections: map[string]*collection{},
		aliases:     map[string]string{},
	}
	start := time.Now()
	if err := s.load(); err != nil {
		stop()
		return nil, errors.Join(fmt.Errorf("opening the vector index in %s: %w", dir, err), s.closeFiles())
	}
	points := 0
	for _, c := range s.collections {
		points += c.ids.Len()
	}
	s.logger.Info("embedded vector index open", slog.String("dir", dir), slog.Int("collections", len(s.collections)),
		slog.Int("points", points), slog.Duration("duration", time.Since(start)))

	s.grpc = grpc.NewServer(
		grpc.MaxRecvMsgSize(opts.MaxRequestBytes),
		grpc.MaxSendMsgSize(2*maxResponse-1),
		// go-client pings every ten seconds, also without calls; grpc-go's default policy
		// would close such connections.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(s.authorize, s.guard),
		grpc.WaitForHandlers(true),
	)
	qdrant.RegisterQdrantServer(s.grpc, health{})
	qdrant.RegisterCollectionsServer(s.grpc, &collectionsService{s: s})
	qdrant.RegisterPointsServer(s.grpc, &pointsService{s: s})
	qdrant.RegisterSnapshotsServer(s.grpc, snapshots{})

	s.background.Add(1)
	go s.flusher()
	for _, c := range s.collections {
		s.maintain(c)
	}
	return s, nil
}

// lockDir takes the directory for this process. The kernel frees it when the process ends,
// however it ends.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the vector index: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		cerr := f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, &LockedError{Dir: dir}
		}
		return nil, errors.Join(fmt.Errorf("locking %s: %w", dir, err), cerr)
	}
	return f, nil
}

// Serve answers calls on l until Close, then returns nil. It takes l over and closes it.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return errors.Join(errClosed, l.Close())
	}
	s.listener = l
	s.mu.Unlock()
	if err := s.grpc.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serving the vector index: %w", err)
	}
	return nil
}

var errClosed = errors.New("the vector index is closed")

// Addr is the address served, nil before Serve.
func (s *Server) Addr() net.Addr {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.listener == nil {
		return nil
	}
	return s.listener.Addr()
}

// Close stops taking calls, lets those under way finish for some seconds, brings everything
// to disk and frees the directory. Later calls return what the first did.
func (s *Server) Close() error {
	s.closeOnce.Do(func() {
		s.mu.Lock()
		s.closed = true
		s.mu.Unlock()
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.grpc.GracefulStop()
		}()
		grace := time.NewTimer(gracePeriod)
		defer grace.Stop()
		select {
		case <-done:
		case <-grace.C:
			s.grpc.Stop()
			<-done
		}
		s.stop()
		s.background.Wait()
		s.closeErr = s.closeFiles()
	})
	return s.closeErr
}

// closeFiles syncs and closes every collection and frees the directory.
func (s *Server) closeFiles() error {
	var err error
	for _, c := range s.collections {
		if c.log == nil {
			continue
		}
		if cerr := c.log.close(); cerr != nil {
			err = errors.Join(err, fmt.Errorf("closing collection %s: %w", c.name, cerr))
		}
	}
	// Closing alone would not do: a child process that is being started at this moment holds
	// a copy of the descriptor, and with it the lock.
	return errors.Join(err, unix.Flock(int(s.lock.Fd()), unix.LOCK_UN), s.lock.Close())
}

// flusher brings to disk what was written without waiting.
func (s *Server) flusher() {
	defer s.background.Done()
	t := time.NewTicker(syncInterval)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-t.C:
		}
		s.mu.RLock()
		cs := make([]*collection, 0, len(s.collections))
		for _, c := range s.collections {
			cs = append(cs, c)
		}
		s.mu.RUnlock()
		for _, c := range cs {
			if err := c.log.flush(); err != nil {
				s.logger.Error("the log cannot be written; writes are refused until a restart",
					slog.String("collection", c.name), slog.Any("err", err))
			}
		}
	}
}

// maintain begins a compaction of c in the background if one is due, and makes a writer
// wait that has outrun the one under way.
func (s *Server) maintain(c *collection) {
	begin, wait := c.log.due()
	if wait != nil {
		select {
		case <-wait:
		case <-s.ctx.Done():
		}
		return
	}
	if !begin {
		return
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.ctx.Err() != nil {
		return
	}
	s.background.Add(1)
	go func() {
		defer s.background.Done()
		start := time.Now()
		err := c.log.compact(s.ctx, c)
		switch {
		case errors.Is(err, context.Canceled):
			return
		case err != nil:
			s.logger.Error("compaction failed; it is tried again with a write after half a minute",
				slog.String("collection", c.name), slog.Any("err", err))
			return
		}
		s.logger.Debug("collection compacted", slog.String("collection", c.name), slog.Duration("duration", time.Since(start)))
	}()
}

// find returns the collection that a name or an alias stands for.
func (s *Server) find(name string) (*collection, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, status.Error(codes.Unavailable, errClosed.Error())
	}
	c := s.resolve(name)
	if c == nil {
		return nil, status.Errorf(codes.NotFound, "Not found: Collection `%s` doesn't exist!", name)
	}
	return c, nil
}

// resolve is find for callers that hold mu.
func (s *Server) resolve(name string) *collection {
	if to, ok := s.aliases[name]; ok {
		name = to
	}
	return s.collections[name]
}

// authorize checks the API key.
func (s *Server) authorize(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if s.opts.APIKey == "" || info.FullMethod == qdrant.Qdrant_HealthCheck_FullMethodName {
		return next(ctx, req)
	}
	md, _ := metadata.FromIncomingContext(ctx)
	keys := md.Get("api-key")
	for _, v := range md.Get("authorization") {
		if t, ok := strings.CutPrefix(v, "Bearer "); ok {
			keys = append(keys, t)
		}
	}
	for _, k := range keys {
		if subtle.ConstantTimeCompare([]byte(k), []byte(s.opts.APIKey)) == 1 {
			return next(ctx, req)
		}
	}
	return nil, status.Error(codes.Unauthenticated, "Must provide an API key or an Authorization bearer token")
}

// guard refuses requests with fields this version does not know, where the real server of
// a newer version would act on them, and turns a panic into an error of its call.
func (s *Server) guard(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			buf := make([]byte, 16<<10)
			buf = buf[:runtime.Stack(buf, false)]
			s.logger.Error("call panicked", slog.String("method", info.FullMethod), slog.Any("panic", p), slog.String("stack", string(buf)))
			resp, err = nil, status.Error(codes.Internal, "internal error; the server's log has the details")
		}
	}()
	if err := checkUnknown(req); err != nil {
		return nil, err
	}
	resp, err = next(ctx, req)
	if err != nil && status.Code(err) == codes.Unknown {
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			err = status.Error(codes.DeadlineExceeded, "Timeout error: the call's deadline passed")
		case errors.Is(err, context.Canceled):
			err = status.Error(codes.Canceled, "the call was cancelled")
		default:
			s.logger.Error("call failed", slog.String("method", info.FullMethod), slog.Any("err", err))
			err = status.Error(codes.Internal, "Service internal error: "+err.Error())
		}
	}
	return resp, err
}

// health answers Qdrant's health check.
type health struct {
	qdrant.UnimplementedQdrantServer
}

// HealthCheck says what answers here and which API version it speaks.
func (health) HealthCheck(context.Context, *qdrant.HealthCheckRequest) (*qdrant.HealthCheckReply, error) {
	return &qdrant.HealthCheckReply{Title: Title, Version: Version}, nil
}

// snapshots answers Unimplemented to everything: a copy of the directory of a stopped
// server is its backup.
type snapshots struct {
	qdrant.UnimplementedSnapshotsServer
}
