package ingest

import (
	"context"
	"crypto/rand"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Config of a Service. Zero values of the numbers are the defaults given.
type Config struct {
	Ledger   Ledger
	Index    Index
	Embedder Embedder
	// Owner is the ledger's installation id: points of another owner are never taken for ours.
	Owner corpus.ID

	// Chunking of collections that do not say otherwise. A zero target means 256 tokens or the
	// model's maximum, whichever is less, with an eighth of it as overlap (unmeasured).
	Chunking corpus.Chunking

	// Workers settle entries side by side; default 4: one real Qdrant took 15,000 points/s from
	// four writers and 10,000 from one.
	Workers int
	// BatchPoints is the most entries one worker embeds and writes at once; default 256.
	BatchPoints int
	// QueueEntries bounds claimed entries that wait in memory for a worker; default 4,096.
	QueueEntries int
	// QueueBytes bounds the texts and vectors of these; default 64 MiB.
	QueueBytes int
	// AcceptDocuments and AcceptBytes bound one accepting transaction; default 1,000 documents
	// and 8 MiB.
	AcceptDocuments, AcceptBytes int
	// AcceptBacklog bounds the bytes of documents waiting for a transaction; beyond it callers
	// are told to try again. Default 128 MiB.
	AcceptBacklog int
	// Committers run accepting transactions side by side; default 2.
	Committers int

	// Lease is how long claimed work belongs to its worker unless renewed; default 30 s.
	Lease time.Duration
	// Poll is how often the ledger is asked for work that nobody here knows of; default 1 s.
	Poll time.Duration
	// Upkeep is how often indexes are created, switched and dropped, and unswitched documents
	// swept; default 5 s.
	Upkeep time.Duration
	// Grace is how long a tombstone is kept after its point was read absent; default 24 h.
	Grace time.Duration
	// Attempts after which an entry is given up, counting only failures that waiting does not
	// cure; default 8.
	Attempts int
	// Pause is how long an index or the embedder is left alone after a first failure; it doubles
	// with each failure in a row, up to 150 times as much; default 200 ms (unmeasured): a short
	// outage costs little, and a long one is not hammered upon.
	Pause time.Duration
	// Drain bounds how long work under way may take to finish once Run's context ended;
	// default 10 s.
	Drain time.Duration

	// Logger for per-batch lines; never sees document text. Nil discards.
	Logger *slog.Logger
	// Registerer for metrics; nil registers nowhere.
	Registerer prometheus.Registerer
	// At is called at each named step of the write path (see steps.go): a test stops or kills
	// there. Nil does nothing.
	At func(step Step)
}

func (c *Config) setDefaults() {
	def := func(p *int, v int) {
		if *p <= 0 {
			*p = v
		}
	}
	span := func(p *time.Duration, v time.Duration) {
		if *p <= 0 {
			*p = v
		}
	}
	def(&c.Workers, 4)
	def(&c.BatchPoints, 256)
	def(&c.QueueEntries, 4096)
	def(&c.QueueBytes, 64<<20)
	def(&c.AcceptDocuments, 1000)
	def(&c.AcceptBytes, 8<<20)
	def(&c.AcceptBacklog, 128<<20)
	def(&c.Committers, 2)
	def(&c.Attempts, 8)
	span(&c.Lease, 30*time.Second)
	span(&c.Poll, time.Second)
	span(&c.Upkeep, 5*time.Second)
	span(&c.Grace, 24*time.Hour)
	span(&c.Drain, 10*time.Second)
	span(&c.Pause, 200*time.Millisecond)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.At == nil {
		c.At = func(Step) {}
	}
}

// Service is the write path. Its methods may be called from any goroutine as soon as it
// exists; documents are indexed while Run runs, here or in another instance.
type Service struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	names   *names
	accept  *acceptor
	jobs    *jobQueue
	waiting *waiters
	pauses  *pauses

	// Wake-ups; each holds at most one, so signalling never blocks.
	claimNow, reapNow, upkeepNow chan struct{}

	stopping  chan struct{} // closed when Run ends
	closeOnce sync.Once
}

// New returns a service over the given stores. It starts nothing; see Run.
func New(cfg Config) *Service {
	cfg.setDefaults()
	s := &Service{
		cfg: cfg, log: cfg.Logger.With("component", "ingest"),
		names: newNames(cfg.Ledger), waiting: newWaiters(), pauses: newPauses(cfg.Pause),
		jobs:     newJobQueue(cfg.QueueEntries, cfg.QueueBytes),
		claimNow: make(chan struct{}, 1), reapNow: make(chan struct{}, 1), upkeepNow: make(chan struct{}, 1),
		stopping: make(chan struct{}),
	}
	s.metrics = newMetrics(cfg.Registerer, s.jobs)
	s.accept = newAcceptor(s)
	return s
}

// Run works until ctx ends: it claims and settles entries, deletes dead points, and keeps
// indexes. It returns nil once work under way is recorded or handed back, at most Drain after.
// It may be called once. Afterwards Ingest answers Unavailable.
func (s *Service) Run(ctx context.Context) error {
	// Work under way may finish after ctx ends, but not for ever.
	drain, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var g errgroup.Group
	for range s.cfg.Workers {
		g.Go(func() error { s.work(drain); return nil })
	}
	var loops errgroup.Group
	loops.Go(func() error { s.claimLoop(ctx); return nil })
	loops.Go(func() error { s.reapLoop(ctx, drain); return nil })
	loops.Go(func() error { s.upkeepLoop(ctx); return nil })

	<-ctx.Done()
	timer := time.AfterFunc(s.cfg.Drain, cancel)
	defer timer.Stop()
	s.closeOnce.Do(func() { close(s.stopping) })
	s.accept.close() // no more acceptances, so no more work from here
	_ = loops.Wait()
	waiting := s.jobs.close()
	_ = g.Wait()
	for _, j := range waiting {
		s.handBack(drain, j)
	}
	return nil
}

// Wake makes the loops look at the ledger at once, for whoever gave them work. It never blocks.
func (s *Service) Wake() {
	signal(s.claimNow)
	signal(s.reapNow)
	signal(s.upkeepNow)
}

func (s *Service) at(step Step) { s.cfg.At(step) }

// signal wakes a loop. A wake-up that is already on its way stands for this one too.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// sleep waits, and reports false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// recordTimeout bounds the transactions that record finished work: they are run detached from
// whoever asked for the work, because what happened must be recorded (unmeasured).
const recordTimeout = 15 * time.Second

func newToken() corpus.ID {
	var id corpus.ID
	_, _ = rand.Read(id[:]) // never fails: crypto/rand aborts the program instead
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	return id
}
