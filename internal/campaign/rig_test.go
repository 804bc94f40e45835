package campaign

import (
	"context"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/goleak"

	"github.com/lockstep-db/lockstep/embedder/fake"
	"github.com/lockstep-db/lockstep/ingest"
	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/internal/faults"
	"github.com/lockstep-db/lockstep/reconcile"
	"github.com/lockstep-db/lockstep/search"
	"github.com/lockstep-db/lockstep/store/postgres"
	"github.com/lockstep-db/lockstep/store/qdrant"
	"github.com/lockstep-db/lockstep/store/qdrantlocal"
)

func TestMain(m *testing.M) {
	// The server that all tests share lives as long as the process.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/lockstep-db/lockstep/store/postgres/pgtest.(*Server).spawn.func1"))
}

const (
	dim   = 8
	heads = corpus.Dense | corpus.SparseHead
)

// rig is a pair of real stores with ways to reach them: one without faults for the test itself,
// and hosts whose connections the test breaks.
type rig struct {
	// server is the embedded index, with its data in dir; nil where a real one is used.
	server *qdrantlocal.Server
	served chan error
	dir    string
	addr   string // of the index
	dsn    string
	clock  *faults.Clock

	store *postgres.Store
	pool  *pgxpool.Pool
	index *qdrant.Client
	owner corpus.ID
	model *fake.Embedder
	log   *slog.Logger

	journal journal

	mu   sync.Mutex
	free []*host
	all  []*host

	delivering sync.WaitGroup // late round trips to the ledger, see release
}

// host is a machine on which an instance of Lockstep runs: connections of its own, through
// proxies that can cut them off.
type host struct {
	ix    *faults.Index
	pg    *faults.Postgres
	valve *valve
	store *postgres.Store
	index *qdrant.Client
}

// valve is what the network of a host does at the moment.
type valve struct {
	mu     sync.Mutex
	index  faults.Plan
	ledger faults.Plan
	dead   bool
	chosen int
}

func (v *valve) set(index, ledger faults.Plan, dead bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.index, v.ledger, v.dead = index, ledger, dead
}

func (v *valve) next(side func() faults.Plan, c faults.Call) faults.Fault {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.dead {
		return faults.Fault{Kind: faults.DropRequest}
	}
	plan := side()
	if plan == nil {
		return faults.Fault{}
	}
	f := plan.Next(c)
	if f.Kind != faults.Pass {
		v.chosen++
	}
	return f
}

// indexSide and ledgerSide are the valve as the plans of the two proxies.
type (
	indexSide  struct{ v *valve }
	ledgerSide struct{ v *valve }
)

func (s indexSide) Next(c faults.Call) faults.Fault {
	return s.v.next(func() faults.Plan { return s.v.index }, c)
}

func (s ledgerSide) Next(c faults.Call) faults.Fault {
	return s.v.next(func() faults.Plan { return s.v.ledger }, c)
}

// newRig opens the database at dsn, which it migrates, and the real index at addr, or starts an
// embedded one where that is empty.
func newRig(t testing.TB, dsn, addr string) *rig {
	t.Helper()
	dir, err := os.MkdirTemp(memoryDir(), "lockstep-campaign-") //nolint:usetesting // in memory, where there is such a place
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	r := &rig{dir: dir, dsn: dsn, addr: addr, clock: faults.NewClock(time.Unix(0, 0)), model: fake.New(dim, heads), log: testLogger(t)}
	r.startIndex(t)
	t.Cleanup(func() { r.stopIndex(t) })
	r.openLedger(t, dsn)
	t.Cleanup(r.closeLedger)
	t.Cleanup(func() {
		for _, h := range r.all {
			h.close()
		}
	})
	return r
}

// memoryDir is where data may live that only has to survive the processes.
func memoryDir() string {
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		return "/dev/shm"
	}
	return ""
}

func (r *rig) startIndex(t testing.TB) {
	t.Helper()
	var err error
	if r.addr == "" || r.server != nil {
		if r.server, err = qdrantlocal.Open(r.dir, qdrantlocal.Options{Workers: 1}); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		r.addr = l.Addr().String()
		r.served = make(chan error, 1)
		go func() { r.served <- r.server.Serve(l) }()
	}
	if r.index, err = qdrant.Open(context.Background(), qdrant.Config{URL: "http://" + r.addr}); err != nil {
		t.Fatal(err)
	}
	// Until the server has taken the listener, its address is nobody's.
	if err := r.index.Ping(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) stopIndex(t testing.TB) {
	t.Helper()
	if err := r.index.Close(); err != nil {
		t.Error(err)
	}
	if r.server == nil {
		return
	}
	if err := r.server.Close(); err != nil {
		t.Error(err)
	}
	if err := <-r.served; err != nil {
		t.Error(err)
	}
}

func (r *rig) openLedger(t testing.TB, dsn string) {
	t.Helper()
	ctx := context.Background()
	var err error
	if r.store, err = postgres.Open(ctx, postgres.Config{URL: dsn, MaxConns: 4}, r.log); err != nil {
		t.Fatal(err)
	}
	if _, err = r.store.Migrate(ctx); err != nil {
		t.Fatal(err)
	}
	if r.owner, err = r.store.Installation(ctx); err != nil {
		t.Fatal(err)
	}
	r.index.SetOwner(r.owner)
	if r.pool, err = pgxpool.New(ctx, dsn); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) closeLedger() {
	r.store.Close()
	r.pool.Close()
}

// borrow returns a host without faults. What ran on it before has ended.
func (r *rig) borrow(t testing.TB) *host {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.free); n > 0 {
		h := r.free[n-1]
		r.free = r.free[:n-1]
		h.valve.set(nil, nil, false)
		h.pg.Refuse(false)
		return h
	}
	h := newHost(t, r.addr, r.dsn, r.owner, r.clock, r.log)
	r.all = append(r.all, h)
	return h
}

func (r *rig) giveBack(h *host) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.free = append(r.free, h)
}

func newHost(t testing.TB, index, dsn string, owner corpus.ID, clock *faults.Clock, log *slog.Logger) *host {
	t.Helper()
	h := &host{valve: &valve{}}
	var err error
	if h.ix, err = faults.NewIndex(index, indexSide{h.valve}, clock); err != nil {
		t.Fatal(err)
	}
	var through string
	if h.pg, through, err = faults.NewPostgresURL(dsn, ledgerSide{h.valve}, clock); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if h.store, err = postgres.Open(ctx, postgres.Config{URL: through, MaxConns: 8}, log); err != nil {
		t.Fatal(err)
	}
	if h.index, err = qdrant.Open(ctx, qdrant.Config{URL: h.ix.URL(), Timeout: 20 * time.Second}); err != nil {
		t.Fatal(err)
	}
	h.index.SetOwner(owner)
	return h
}

func (h *host) close() {
	h.valve.set(nil, nil, true)
	h.pg.Disconnect()
	h.store.Close()
	_ = h.index.Close()
	_ = h.ix.Close()
	_ = h.pg.Close()
}

// held is how many late requests wait somewhere.
func (r *rig) held() (index, ledger int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.all {
		index += h.ix.Held()
		ledger += h.pg.Held()
	}
	return index, ledger
}

// release delivers late requests: of each host one at random, or all of them. Those to the
// ledger it does not wait for, because one may need a lock that another one holds, and that one
// has still to be delivered; delivering ends when they have been answered.
func (r *rig) release(d *dice, index, ledger, all bool) {
	r.mu.Lock()
	hosts := append([]*host(nil), r.all...)
	r.mu.Unlock()
	for _, h := range hosts {
		if ledger {
			for n := h.pg.Held(); n > 0; n-- {
				if !all {
					one := d.n(n)
					r.delivering.Go(func() { h.pg.Release(one) })
					break
				}
				r.delivering.Go(func() { h.pg.Release(0) })
			}
		}
		if index {
			for n := h.ix.Held(); n > 0; n-- {
				h.ix.Release(d.n(n))
				if !all {
					break
				}
			}
		}
	}
}

// instance is one process of Lockstep: its services over a host. A killed one has no effect on
// anything any more, whatever its goroutines still try, because its host is cut off.
type instance struct {
	r    *rig
	host *host
	in   *ingest.Service
	rec  *reconcile.Service
	find *search.Service

	stopOnce sync.Once
	cancel   context.CancelFunc
	done     chan struct{}
}

// tempo is how fast the clocks of an instance go.
type tempo struct {
	lease, poll, grace, stamp time.Duration
	// mortal says at which step the instance dies, and when it comes by it for the how manieth time.
	dieAt                         ingest.Step
	dieNth                        int64
	workers, batch, queue, accept int
	quick                         time.Duration
	scrubRepairs                  bool
}

func (r *rig) start(h *host, tp tempo, d *dice) *instance {
	i := &instance{r: r, host: h, done: make(chan struct{})}
	var count stepCounter
	i.in = ingest.New(ingest.Config{
		Ledger: noted{h.store, &r.journal}, Index: h.index, Embedder: r.model, Owner: r.owner,
		Workers: tp.workers, BatchPoints: tp.batch, QueueEntries: tp.queue, AcceptDocuments: tp.accept,
		Lease: tp.lease, Poll: tp.poll, Upkeep: 2 * tp.poll, Grace: tp.grace, Drain: 200 * time.Millisecond,
		Pause: time.Millisecond, Attempts: 50, Logger: r.log,
		At: func(s ingest.Step) {
			if s == tp.dieAt && count.next() == tp.dieNth {
				i.kill()
			}
		},
	})
	i.rec = reconcile.New(reconcile.Config{
		Owner: r.owner, Workers: 2, Grace: time.Millisecond, Overdue: 5 * tp.lease, SettleTimeout: time.Second,
		Poll: 2 * time.Millisecond, Lease: 2 * tp.lease, FreeDeletes: 1 << 20, Wake: i.in.Wake,
		Scrub: reconcile.ScrubConfig{
			Off: tp.quick == 0, QuickEvery: tp.quick, FullWithin: 256 * time.Hour, Share: 1, HintEvery: 2 * tp.poll,
			StampEvery: tp.stamp, Tick: tp.poll, Repair: tp.scrubRepairs,
		},
	}, h.store, h.index, r.log, nil)
	i.find = search.New(h.store, h.index, r.model, i.rec, search.Config{Exact: true}, nil)
	ctx, cancel := context.WithCancel(context.Background())
	i.cancel = cancel
	var g sync.WaitGroup
	g.Go(func() { _ = i.in.Run(ctx) })    // Run returns nil
	g.Go(func() { _ = i.rec.Scrub(ctx) }) // so does Scrub
	go func() { g.Wait(); i.rec.Close(); close(i.done) }()
	return i
}

type stepCounter struct {
	mu sync.Mutex
	n  int64
}

func (c *stepCounter) next() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
	return c.n
}

// kill cuts the instance off at once, as kill -9 does: what it sent may still arrive, nothing
// else will. Its goroutines are told to end, which nobody waits for here.
func (i *instance) kill() {
	i.host.valve.set(nil, nil, true)
	i.host.pg.Refuse(true)
	i.host.pg.Disconnect()
	i.cancel()
}

func (i *instance) killed() bool {
	i.host.valve.mu.Lock()
	defer i.host.valve.mu.Unlock()
	return i.host.valve.dead
}

// stop ends the instance in order and frees its host.
func (i *instance) stop() {
	i.stopOnce.Do(func() {
		i.cancel()
		<-i.done
		i.r.giveBack(i.host)
	})
}

// dice is a seeded source that goroutines share. Which goroutine draws which number depends on
// the scheduler, so a seed repeats a history's flavour, not its every step.
type dice struct {
	mu sync.Mutex
	r  *rand.Rand
}

func newDice(seed uint64) *dice { return &dice{r: rand.New(rand.NewPCG(seed, 0xca3))} }

func (d *dice) n(n int) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.r.IntN(n)
}

func (d *dice) chance(percent int) bool { return d.n(100) < percent }

func (d *dice) seed() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.r.Uint64()
}

func testLogger(t testing.TB) *slog.Logger {
	if os.Getenv("CAMPAIGN_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	var out io.Writer = os.Stderr
	return slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelDebug}))
}
