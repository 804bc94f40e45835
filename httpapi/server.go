package httpapi

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Config bounds the API. Zero fields take the defaults of [Config.withDefaults].
type Config struct {
	// Keys are the API keys; none means that the service listens on loopback and trusts it.
	Keys []Key
	// RatePerKey is how many requests a second each key may make, with bursts of RateBurst; 0 is no limit.
	RatePerKey float64
	RateBurst  int
	// MaxBodyBytes of one request; a stream of documents has no such limit.
	MaxBodyBytes int64
	// MaxLineBytes of one line of a stream of documents.
	MaxLineBytes int
	// MaxRequests worked on at once; more are refused with 429.
	MaxRequests int
	// Timeout of a request that does not embed in bulk or wait for indexing.
	Timeout time.Duration
	// IngestTimeout of a request that writes, of each batch of a stream, and of embedding.
	IngestTimeout time.Duration
	// StreamIdle is how long a stream may stay without a new document.
	StreamIdle time.Duration
	// Version of Lockstep, shown in /info, /openapi.json and on the pages.
	Version string
	// MaxBatchTokens and TokenizerWorkers are only shown in /info.
	MaxBatchTokens, TokenizerWorkers int
	// DefaultCollection is used where a request names none.
	DefaultCollection string
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

func (c Config) withDefaults() Config {
	if c.RateBurst <= 0 {
		c.RateBurst = max(1, int(2*c.RatePerKey))
	}
	if c.MaxBodyBytes <= 0 {
		// 1,000 texts of 8,192 tokens are about as much; a JSON body is held in memory whole.
		c.MaxBodyBytes = 32 << 20
	}
	if c.MaxLineBytes <= 0 {
		c.MaxLineBytes = 8 << 20 // a document of a million words; a few are held per stream
	}
	if c.MaxRequests <= 0 {
		c.MaxRequests = 256 // unmeasured; the embedder's queue is the tighter bound
	}
	if c.Timeout <= 0 {
		c.Timeout = 30 * time.Second
	}
	if c.IngestTimeout <= 0 {
		c.IngestTimeout = 5 * time.Minute
	}
	if c.StreamIdle <= 0 {
		c.StreamIdle = time.Minute
	}
	if c.Version == "" {
		c.Version = "dev"
	}
	if c.DefaultCollection == "" {
		c.DefaultCollection = "default"
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

// Deps are the rooms behind the API. All are needed.
type Deps struct {
	Ingester   Ingester
	Searcher   Searcher
	Embedder   Embedder
	Reconciler Reconciler
	Health     Health
	// Registry takes this room's metrics and is served at /metrics.
	Registry *prometheus.Registry
	Logger   *slog.Logger
}

// Server is the HTTP side of Lockstep. All methods are safe for concurrent use.
type Server struct {
	cfg      Config
	deps     Deps
	log      *slog.Logger
	m        *metrics
	keys     *keyring
	origin   *http.CrossOriginProtection
	slots    chan struct{}
	echo     *echo.Echo
	routes   []*route
	openapi  *document
	docs     *docsView
	pages    *pages
	metrics  http.Handler
	draining atomic.Bool
}

// New builds the server; it opens nothing and starts no goroutine. It fails only on a defect
// of the embedded contract.
func New(cfg Config, deps Deps) (*Server, error) {
	cfg = cfg.withDefaults()
	s := &Server{
		cfg:    cfg,
		deps:   deps,
		log:    deps.Logger.With("component", "httpapi"),
		m:      newMetrics(deps.Registry),
		keys:   newKeyring(cfg.Keys, cfg.RatePerKey, cfg.RateBurst),
		origin: http.NewCrossOriginProtection(),
		slots:  make(chan struct{}, cfg.MaxRequests),
	}
	s.metrics = promhttp.HandlerFor(deps.Registry, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelError),
	})
	doc, err := loadDocument(cfg.Version)
	if err != nil {
		return nil, fmt.Errorf("load the OpenAPI document: %w", err)
	}
	s.openapi = doc
	s.docs = buildDocs(doc)
	if s.pages, err = loadPages(cfg.Now); err != nil {
		return nil, fmt.Errorf("load the pages: %w", err)
	}
	e := echo.New()
	e.HideBanner, e.HidePort = true, true
	e.HTTPErrorHandler = func(err error, c echo.Context) {
		// Only what fails outside of observe arrives here, which is nothing known.
		if !c.Response().Committed {
			_ = s.writeProblem(c, toProblem(err))
		}
	}
	e.Use(s.observe)
	s.routes = s.routeTable()
	for _, rt := range s.routes {
		outside := []echo.MiddlewareFunc{s.mark(rt), s.authorise(rt), s.admit(rt), s.bound(rt)}
		e.Add(rt.method, rt.path, rt.handler, outside...)
		if rt.method == http.MethodGet {
			e.Add(http.MethodHead, rt.path, rt.handler, outside...) // net/http leaves the body out
		}
	}
	s.echo = e
	return s, nil
}

// mark tells the outer middleware which route was matched.
func (s *Server) mark(rt *route) echo.MiddlewareFunc {
	return func(next echo.HandlerFunc) echo.HandlerFunc {
		return func(c echo.Context) error {
			c.Set(ctxRoute, rt)
			return next(c)
		}
	}
}

// Handler returns the API as a handler.
func (s *Server) Handler() http.Handler { return s.echo }

// Drain makes /readyz answer 503 from now on, so that load balancers look elsewhere while
// requests that are under way are finished.
func (s *Server) Drain() { s.draining.Store(true) }

// Serve answers on ln until ctx ends, then drains: readiness goes off, no new connection is
// taken, and requests under way have drainTime to finish before they are cut. It returns nil
// after a clean end. tlsConfig may be nil. ln is closed.
func (s *Server) Serve(ctx context.Context, ln net.Listener, tlsConfig *tls.Config, drainTime time.Duration) error {
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	srv := &http.Server{
		Handler:   s.echo,
		TLSConfig: tlsConfig,
		Protocols: protocols,
		// Bodies and replies have deadlines of their own, see bound.
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
		// Work under way goes on while the service drains: ctx must not cancel it.
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
	}
	failed := make(chan error, 1)
	go func() {
		if tlsConfig != nil {
			failed <- srv.ServeTLS(ln, "", "")
			return
		}
		failed <- srv.Serve(ln)
	}()
	select {
	case err := <-failed:
		return fmt.Errorf("serve HTTP: %w", err)
	case <-ctx.Done():
	}
	s.Drain()
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	err := srv.Shutdown(drain)
	if err != nil {
		s.log.Warn("requests were cut off", "err", err)
		err = srv.Close()
	}
	if serr := <-failed; !errors.Is(serr, http.ErrServerClosed) && err == nil {
		err = serr
	}
	return err
}
