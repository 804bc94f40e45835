package app

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/lockstep-db/lockstep/embedder"
	"github.com/lockstep-db/lockstep/httpapi"
	"github.com/lockstep-db/lockstep/ingest"
	"github.com/lockstep-db/lockstep/internal/config"
	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/internal/devstack"
	"github.com/lockstep-db/lockstep/reconcile"
	"github.com/lockstep-db/lockstep/search"
	"github.com/lockstep-db/lockstep/store/postgres"
	"github.com/lockstep-db/lockstep/store/qdrant"
)

// Each adapter answers to the interfaces of its readers; here is the one place that sees both.
var (
	_ ingest.Ledger      = (*postgres.Store)(nil)
	_ ingest.Index       = (*qdrant.Client)(nil)
	_ search.Ledger      = (*postgres.Store)(nil)
	_ search.Index       = (*qdrant.Client)(nil)
	_ search.Hinter      = (*reconcile.Service)(nil)
	_ reconcile.Ledger   = (*postgres.Store)(nil)
	_ reconcile.Index    = (*qdrant.Client)(nil)
	_ httpapi.Ingester   = (*ingest.Service)(nil)
	_ httpapi.Searcher   = (*search.Service)(nil)
	_ httpapi.Reconciler = (*reconcile.Service)(nil)
	_ httpapi.Health     = (*health)(nil)
	_ Embedder           = (*embedder.Batcher)(nil)
	_ httpapi.Embedder   = Embedder(nil)
	_ ingest.Embedder    = Embedder(nil)
	_ search.Embedder    = Embedder(nil)
)

// Embedder is what the rooms ask of a model, together.
type Embedder interface {
	Embed(ctx context.Context, req corpus.EmbedRequest) ([]corpus.Embedding, error)
	Spec() corpus.ModelSpec
	Tokens(ctx context.Context, text string) ([]corpus.TokenSpan, error)
	Tokenize(ctx context.Context, text string) ([]uint32, error)
}

// Options replace parts for benchmarks and tests.
type Options struct {
	// Embedder takes the place of the configured model.
	Embedder Embedder
	// Version of the program.
	Version string
}

// App is everything that runs, in start order. Close stops it in reverse.
type App struct {
	cfg    config.Config
	log    *slog.Logger
	ledger *postgres.Store
	index  *qdrant.Client
	ingest *ingest.Service
	recon  *reconcile.Service
	http   *httpapi.Server
	health *health
	ln     net.Listener
	warm   func(ctx context.Context) error
	stops  []func(ctx context.Context) error
	// batchTokens is the token budget of a batch, for /info; 0 with an embedder from outside.
	batchTokens int
}

// stopTimeout bounds each room's stop. The embedded Postgres writes a checkpoint, which took
// under a second on small data; a loaded one may need more.
const stopTimeout = time.Minute

// Serve runs the service until ctx ends, then stops it in reverse order.
func Serve(ctx context.Context, cfg config.Config, log *slog.Logger, opts Options) error {
	a, err := New(ctx, cfg, log, opts)
	if err != nil {
		return err
	}
	return errors.Join(a.Run(ctx), a.Close())
}

// New opens everything in order: the address, the embedded servers, the ledger, the index,
// the model, the rooms over them. If a step fails, what was opened is closed again.
func New(ctx context.Context, cfg config.Config, log *slog.Logger, opts Options) (_ *App, err error) {
	a := &App{cfg: cfg, log: log.With("component", "app")}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Close())
		}
	}()
	// First the address: a port that is taken is cheap to find out.
	if a.ln, err = net.Listen("tcp", cfg.Listen); err != nil {
		return nil, corpus.Wrap(corpus.Invalid, "listen", "cannot listen on "+cfg.Listen+" (is another Lockstep running?)", err)
	}
	a.onStop(func(context.Context) error {
		if err := a.ln.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	})
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	stack, err := a.openStores(ctx, reg, log)
	if err != nil {
		return nil, err
	}
	emb := opts.Embedder
	a.health = newHealth(a.ledger, a.index, stack)
	if emb == nil {
		batcher, err := a.openModel(ctx, reg, log)
		if err != nil {
			return nil, err
		}
		a.health.model = batcher
		a.warm = func(ctx context.Context) error {
			return batcher.Warm(ctx, warmLengths(batcher.Spec())...)
		}
		emb = batcher
	}
	if err := a.openRooms(ctx, emb, reg, log, opts.Version); err != nil {
		return nil, err
	}
	return a, nil
}

// openStores starts what was not configured, and opens ledger and index.
func (a *App) openStores(ctx context.Context, reg prometheus.Registerer, log *slog.Logger) (*devstack.Stack, error) {
	cfg := a.cfg
	stack, err := devstack.Start(ctx, devstack.Config{
		DataDir: cfg.DataDir, NeedPostgres: cfg.DatabaseURL == "", NeedQdrant: cfg.QdrantURL == "", Logger: log,
	})
	if err != nil {
		return nil, err
	}
	a.onStop(stack.Stop)
	cfg = withEmbedded(cfg, stack)
	a.ledger, err = openLedger(ctx, cfg, log)
	if err != nil {
		return nil, err
	}
	a.onStop(func(context.Context) error { a.ledger.Close(); return nil })
	applied, err := a.ledger.Migrate(ctx)
	if err != nil {
		return nil, err
	}
	if applied > 0 {
		a.log.InfoContext(ctx, "schema migrated", "applied", applied)
	}
	owner, err := a.ledger.Installation(ctx)
	if err != nil {
		return nil, err
	}
	a.index, err = openIndex(ctx, cfg, reg, log)
	if err != nil {
		return nil, err
	}
	a.onStop(func(context.Context) error { return a.index.Close() })
	a.index.SetOwner(owner)
	if err := a.index.ProveGuards(ctx); err != nil {
		return nil, fmt.Errorf("proving that the index honours guarded writes: %w", err)
	}
	return stack, nil
}

// withEmbedded fills in the addresses of the servers that were not configured.
func withEmbedded(cfg config.Config, stack *devstack.Stack) config.Config {
	if cfg.DatabaseURL == "" {
		cfg.DatabaseURL = config.Secret(stack.DatabaseURL)
	}
	if cfg.QdrantURL == "" {
		cfg.QdrantURL, cfg.QdrantAPIKey = stack.QdrantURL, config.Secret(stack.QdrantAPIKey)
	}
	return cfg
}

func openLedger(ctx context.Context, cfg config.Config, log *slog.Logger) (*postgres.Store, error) {
	return postgres.Open(ctx, postgres.Config{
		URL: string(cfg.DatabaseURL), MaxConns: cfg.Database.MaxConns, ConnectTimeout: cfg.Database.ConnectTimeout,
	}, log)
}

func openIndex(ctx context.Context, cfg config.Config, reg prometheus.Registerer, log *slog.Logger) (*qdrant.Client, error) {
	return qdrant.Open(ctx, qdrant.Config{
		URL: cfg.QdrantURL, APIKey: string(cfg.QdrantAPIKey), Timeout: cfg.Qdrant.Timeout,
		MaxBatchBytes: int(cfg.Qdrant.MaxBatchBytes), MaxBatchPoints: cfg.Qdrant.MaxBatchPoints,
		Shards: uint32(cfg.Qdrant.Shards), Replicas: uint32(cfg.Qdrant.Replicas),
		WriteConsistency: uint32(cfg.Qdrant.WriteConsistency), StrongOrdering: cfg.Qdrant.StrongOrdering,
		Registerer: reg, Logger: log,
	})
}

// openRooms builds the rooms over the stores and the embedder.
func (a *App) openRooms(ctx context.Context, emb Embedder, reg *prometheus.Registry, log *slog.Logger, version string) error {
	cfg := a.cfg
	owner, err := a.ledger.Installation(ctx)
	if err != nil {
		return err
	}
	a.ingest = ingest.New(ingest.Config{
		Ledger: a.ledger, Index: a.index, Embedder: emb, Owner: owner,
		Workers: cfg.Ingest.Workers, BatchPoints: cfg.Ingest.BatchChunks,
		Lease: cfg.Ingest.Lease, Grace: cfg.Ingest.TombstoneAge,
		Logger: log, Registerer: reg,
	})
	a.openReconcile(owner, a.ingest.Wake, reg, log)
	cacheBytes := int64(cfg.Search.CacheBytes)
	if cacheBytes == 0 {
		cacheBytes = -1 // off, which is not what search's zero value means
	}
	searcher := search.New(a.ledger, a.index, emb, a.recon, search.Config{
		Timeout: cfg.Search.Timeout, CacheBytes: cacheBytes, CacheTTL: cfg.Search.CacheTTL,
	}, reg)
	keys := make([]httpapi.Key, 0, len(cfg.APIKeys))
	for _, k := range cfg.APIKeys {
		scopes := make([]httpapi.Scope, 0, len(k.Scopes))
		for _, s := range k.Scopes {
			scopes = append(scopes, httpapi.Scope(s))
		}
		keys = append(keys, httpapi.Key{Name: k.Name, Scopes: scopes, Secret: string(k.Secret)})
	}
	a.http, err = httpapi.New(httpapi.Config{
		Keys: keys, RatePerKey: cfg.HTTP.RatePerKey, RateBurst: cfg.HTTP.RateBurst,
		MaxBodyBytes: int64(cfg.HTTP.MaxBody), MaxLineBytes: int(cfg.HTTP.MaxLine), MaxRequests: cfg.HTTP.MaxRequests,
		Timeout: cfg.HTTP.Timeout, IngestTimeout: cfg.HTTP.IngestTimeout, StreamIdle: cfg.HTTP.StreamIdle,
		Version: version, DefaultCollection: cfg.Collection, MaxBatchTokens: a.batchTokens,
	}, httpapi.Deps{
		Ingester: a.ingest, Searcher: searcher, Embedder: emb, Reconciler: a.recon,
		Health: a.health, Registry: reg, Logger: log,
	})
	return err
}

// openReconcile builds the room that compares the stores. wake tells the workers of repairs.
func (a *App) openReconcile(owner corpus.ID, wake func(), reg *prometheus.Registry, log *slog.Logger) {
	cfg := a.cfg
	a.recon = reconcile.New(reconcile.Config{
		Owner: owner, IndexPrefix: qdrant.Prefix, Workers: cfg.Reconcile.Workers,
		PointsPerSecond: cfg.Reconcile.PointsPerSecond, Grace: cfg.Reconcile.Grace,
		MaxDeletes: cfg.Reconcile.MaxDeletes, FreeDeletes: int64(cfg.Reconcile.FreeDeletes),
		Quarantine: cfg.Reconcile.Quarantine, Wake: wake,
		Scrub: reconcile.ScrubConfig{
			Off: !cfg.Scrub, QuickEvery: cfg.Reconcile.ScrubQuickEvery,
			FullWithin: cfg.Reconcile.ScrubFullWithin, PointsPerSecond: cfg.Reconcile.ScrubPoints,
		},
	}, a.ledger, a.index, log, reg)
	a.onStop(func(context.Context) error { a.recon.Close(); return nil })
}

// Addr is where the service listens.
func (a *App) Addr() net.Addr { return a.ln.Addr() }

// Run serves until ctx ends or a part fails. It returns nil after a clean end: requests under
// way are finished first, then the workers record what they hold.
func (a *App) Run(ctx context.Context) error {
	var tlsConfig *tls.Config
	if a.cfg.TLS.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(a.cfg.TLS.CertFile, a.cfg.TLS.KeyFile)
		if err != nil {
			return corpus.Wrap(corpus.Invalid, "tls", "the TLS certificate cannot be loaded", err)
		}
		tlsConfig = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	}
	// The workers outlive HTTP: what a request under way waits for is still indexed.
	background, stopBackground := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBackground()
	workers, workCtx := errgroup.WithContext(background)
	workers.Go(func() error { return a.ingest.Run(workCtx) })
	workers.Go(func() error { return a.recon.Scrub(workCtx) })

	serve, serveCtx := errgroup.WithContext(ctx)
	serve.Go(func() error { return a.http.Serve(serveCtx, a.ln, tlsConfig, a.cfg.ShutdownTimeout) })
	serve.Go(func() error {
		// A worker that fails takes the service down rather than leave it half alive.
		select {
		case <-serveCtx.Done():
			return nil
		case <-workCtx.Done():
			return errors.New("a background worker ended")
		}
	})
	if a.warm != nil {
		serve.Go(func() error { return a.warmUp(serveCtx) })
	} else {
		a.health.ready()
	}
	a.log.InfoContext(ctx, "listening", "addr", a.ln.Addr().String())
	err := serve.Wait()
	stopBackground()
	return errors.Join(err, ended(workers.Wait()))
}

func (a *App) warmUp(ctx context.Context) error {
	start := time.Now()
	if err := a.warm(ctx); err != nil {
		return ended(err)
	}
	a.health.ready()
	a.log.InfoContext(ctx, "ready", "addr", a.ln.Addr().String(), "warm_up", time.Since(start).Round(time.Millisecond))
	return nil
}

// ended hides the cancellation by which the workers were asked to stop.
func ended(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (a *App) onStop(f func(ctx context.Context) error) { a.stops = append(a.stops, f) }

// Close stops what New opened, in reverse order. It may be called again.
func (a *App) Close() error {
	var errs []error
	for i := len(a.stops) - 1; i >= 0; i-- {
		ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
		errs = append(errs, a.stops[i](ctx))
		cancel()
	}
	a.stops = nil
	return errors.Join(errs...)
}
