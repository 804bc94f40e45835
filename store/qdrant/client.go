package qdrant

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	qc "github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Prefix of the names of all Qdrant collections that Lockstep makes.
const Prefix = "lockstep_"

// Config of the connection. The zero value of every field but URL is a default.
type Config struct {
	// URL of the gRPC port: http://host:6334, or https:// for TLS.
	URL string
	// APIKey is sent with each request. It is never logged.
	APIKey string
	// Timeout of one request; 0 means 30 seconds. A caller's earlier deadline wins.
	Timeout time.Duration
	// MaxBatchBytes bounds one write request's encoded points; 0 means 16 MiB. A single point
	// larger than that travels alone.
	MaxBatchBytes int
	// MaxBatchPoints bounds one write request; 0 means 256, the size at which a real server
	// took 10,000 points of 1,024 floats a second from one worker.
	MaxBatchPoints int
	// MaxRecvBytes bounds one answer; 0 means 256 MiB. Pages are cut to a small part of it.
	MaxRecvBytes int
	// Shards, Replicas and WriteConsistency of new collections; 0 leaves the server's default.
	Shards, Replicas, WriteConsistency uint32
	// StrongOrdering sends deletes and metadata through the permanent leader of a shard
	// rather than the highest one alive: unavailable while that node is down.
	StrongOrdering bool
	// Dial replaces the network, for tests and fault injection.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// Registerer for metrics, or nil.
	Registerer prometheus.Registerer
	// Logger, or nil for none.
	Logger *slog.Logger
	// Now replaces the clock in tests.
	Now func() time.Time
}

// Client is a connection to one Qdrant server or cluster. It is safe for concurrent use.
type Client struct {
	cfg   Config
	api   *qc.Client
	log   *slog.Logger
	calls *prometheus.HistogramVec

	mu     sync.Mutex
	owner  corpus.ID
	limits map[string]limits
}

// Open prepares a client. It does not wait for the server: call [Client.Ping] for that.
// A URL that cannot be used is [corpus.Invalid].
func Open(ctx context.Context, cfg Config) (*Client, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	host, port, useTLS, err := parseURL(cfg.URL)
	if err != nil {
		return nil, err
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 30 * time.Second
	}
	if cfg.MaxBatchBytes <= 0 {
		cfg.MaxBatchBytes = 16 << 20
	}
	if cfg.MaxBatchPoints <= 0 {
		cfg.MaxBatchPoints = 256
	}
	if cfg.MaxRecvBytes <= 0 {
		cfg.MaxRecvBytes = 256 << 20
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	log = log.With("component", "qdrant")
	c := &Client{cfg: cfg, log: log, limits: map[string]limits{}}
	if cfg.APIKey != "" && !useTLS && !loopback(host) {
		log.WarnContext(ctx, "the index's API key travels without TLS; use an https:// URL")
	}
	c.calls = promauto.With(cfg.Registerer).NewHistogramVec(prometheus.HistogramOpts{
		Name:    "lockstep_index_call_seconds",
		Help:    "Time of requests to the index by operation and result (ok, or the error's kind).",
		Buckets: prometheus.ExponentialBuckets(0.001, 2, 15),
	}, []string{"op", "result"})

	opts := []grpc.DialOption{
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(cfg.MaxRecvBytes),
			// The server's own bound decides what is too large to send; ours is MaxBatchBytes.
			grpc.MaxCallSendMsgSize(1<<31-1),
		),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			// Servers built on tonic do not punish pings; 20 s notices a dead peer well within Timeout.
			Time: 20 * time.Second, Timeout: 10 * time.Second, PermitWithoutStream: true,
		}),
	}
	if cfg.APIKey != "" {
		// The client library would do this too, but it logs through a global logger.
		key := cfg.APIKey
		opts = append(opts, grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, o ...grpc.CallOption) error {
			return invoke(metadata.AppendToOutgoingContext(ctx, "api-key", key), method, req, reply, cc, o...)
		}))
	}
	if cfg.Dial != nil {
		opts = append(opts, grpc.WithContextDialer(cfg.Dial))
	}
	conf := &qc.Config{
		Host: host, Port: port, UseTLS: useTLS, GrpcOptions: opts,
		// Its check has no context and logs globally; ProveGuards is the check that matters.
		SkipCompatibilityCheck: true,
		KeepAliveTime:          -1, // replaced by the option above
	}
	if useTLS {
		conf.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	if c.api, err = qc.NewClient(conf); err != nil {
		return nil, corpus.Wrap(corpus.Invalid, "index_url", "the index's address cannot be used", err)
	}
	return c, nil
}

// parseURL takes the address apart. The error never repeats the URL: it may hold a password.
func parseURL(raw string) (host string, port int, useTLS bool, err error) {
	bad := func(why string) (string, int, bool, error) {
		return "", 0, false, corpus.Errorf(corpus.Invalid, "index_url", "the index's URL must look like http://host:6334 or https://host:6334: %s", why)
	}
	u, perr := url.Parse(raw)
	switch {
	case perr != nil:
		return bad("it cannot be parsed")
	case u.Scheme != "http" && u.Scheme != "https":
		return bad("its scheme is neither http nor https")
	case u.Hostname() == "":
		return bad("it names no host")
	case u.User != nil:
		return bad("it holds credentials; give the API key apart")
	case u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "":
		return bad("it has a path or a query, which the gRPC address has not")
	}
	port = 6334
	if p := u.Port(); p != "" {
		if port, perr = strconv.Atoi(p); perr != nil || port < 1 || port > 65535 {
			return bad("its port is not a number from 1 to 65535")
		}
	}
	host = u.Hostname()
	if ip := net.ParseIP(host); ip != nil && ip.To4() == nil {
		host = "[" + host + "]" // the client library joins host and port with a bare colon
	}
	return host, port, u.Scheme == "https", nil
}

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// SetOwner names the installation whose points are "ours". Call it once, before serving.
func (c *Client) SetOwner(id corpus.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.owner = id
}

func (c *Client) ownerID() (corpus.ID, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.owner.IsZero() {
		return corpus.ID{}, corpus.Errorf(corpus.Internal, "owner_unset", "the index adapter does not know its installation yet")
	}
	return c.owner, nil
}

// Ping asks the server for its health and version.
func (c *Client) Ping(ctx context.Context) error {
	_, err := c.version(ctx)
	return err
}

func (c *Client) version(ctx context.Context) (string, error) {
	var v string
	err := c.call(ctx, "health", func(ctx context.Context) error {
		r, err := c.api.HealthCheck(ctx)
		v = r.GetVersion()
		return err
	})
	return v, err
}

// Close ends all connections. Requests under way fail.
func (c *Client) Close() error { return c.api.Close() }

// call runs one request under the client's timeout, measures it and classifies its error.
func (c *Client) call(ctx context.Context, op string, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	start := time.Now()
	err := classify(op, f(ctx))
	result := "ok"
	if err != nil {
		result = string(corpus.KindOf(err))
	}
	c.calls.WithLabelValues(op, result).Observe(time.Since(start).Seconds())
	return err
}

// limits is what a collection's own configuration imposes on requests.
type limits struct {
	read        time.Time
	replicated  bool
	queryLimit  int // of scroll, facet and query; 0: none
	upsertBatch int // points a write; 0: none
	conditions  int // items of one condition; 0: none
	noExact     bool
}

// limitsAge is how long a collection's limits are trusted. An operator's change is seen within
// a minute; a request that meets the new limit before fails as invalid and is retried later.
const limitsAge = time.Minute

func (c *Client) limitsOf(ctx context.Context, ix corpus.Index) (limits, error) {
	now := c.cfg.Now()
	c.mu.Lock()
	l, ok := c.limits[ix.QdrantName]
	c.mu.Unlock()
	if ok && now.Sub(l.read) < limitsAge {
		return l, nil
	}
	info, err := c.info(ctx, ix.QdrantName)
	if err != nil {
		return limits{}, err
	}
	l = limitsFrom(info.GetConfig())
	l.read = now
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.limits) > 1024 {
		clear(c.limits) // bounded: many collections come and go
	}
	c.limits[ix.QdrantName] = l
	return l, nil
}

func (c *Client) forget(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.limits, name)
}

func limitsFrom(cfg *qc.CollectionConfig) limits {
	l := limits{replicated: cfg.GetParams().GetReplicationFactor() > 1}
	s := cfg.GetStrictModeConfig()
	if s == nil || !s.GetEnabled() {
		return l
	}
	l.queryLimit = int(s.GetMaxQueryLimit())
	l.upsertBatch = int(s.GetUpsertMaxBatchsize())
	l.conditions = int(s.GetConditionMaxSize())
	l.noExact = s.SearchAllowExact != nil && !s.GetSearchAllowExact()
	return l
}

func (c *Client) info(ctx context.Context, name string) (*qc.CollectionInfo, error) {
	var info *qc.CollectionInfo
	err := c.call(ctx, "describe", func(ctx context.Context) (err error) {
		info, err = c.api.GetCollectionInfo(ctx, name)
		return err
	})
	if err == nil && info == nil {
		err = corpus.Wrap(corpus.Unavailable, "index_failed", "the index did not describe its collection", errors.New("empty answer"))
	}
	return info, err
}

// capped returns n, or max when that is set and smaller.
func capped(n, limit int) int {
	if limit > 0 && limit < n {
		return limit
	}
	return n
}
