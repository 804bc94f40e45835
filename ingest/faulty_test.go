package ingest_test

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lockstep-db/lockstep/ingest"
	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/postgres"
)

// dice is a seeded source that goroutines share. Which goroutine draws which number depends on
// the scheduler, so a seed repeats a history's flavour, not its every step.
type dice struct {
	mu sync.Mutex
	r  *rand.Rand
}

func newDice(seed uint64) *dice { return &dice{r: rand.New(rand.NewPCG(seed, 0x10c5))} }

func (d *dice) n(n int) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.r.IntN(n)
}

// process is what one instance of the service shares with nobody: once it is dead, none of its
// calls has an effect any more, as after kill -9.
type process struct {
	dead    atomic.Bool
	dice    *dice
	percent int // of ledger calls that fail
	// dieAt, when set, kills the process at the nth time it comes by the step.
	dieAt ingest.Step
	after atomic.Int64
	died  chan struct{}
	once  sync.Once
}

func (p *process) at(step ingest.Step) {
	if step == p.dieAt && p.after.Add(-1) == 0 {
		p.kill()
	}
}

func (p *process) kill() {
	p.dead.Store(true)
	p.once.Do(func() { close(p.died) })
}

var errDead = corpus.Errorf(corpus.Unavailable, "dead", "the process was killed")

// gate decides about one ledger call: not at all, or done and the answer lost.
func (p *process) gate() (before, after error) {
	if p.dead.Load() {
		return errDead, nil
	}
	if p.percent > 0 && p.dice.n(100) < p.percent {
		if p.dice.n(2) == 0 {
			return corpus.Errorf(corpus.Unavailable, "database_unavailable", "the database cannot be reached"), nil
		}
		return nil, corpus.Errorf(corpus.Unavailable, "database_unavailable", "the database's answer was lost")
	}
	return nil, nil
}

func (p *process) close(after error) error {
	if p.dead.Load() {
		return errDead
	}
	return after
}

// faultyLedger is a process's way to Postgres.
type faultyLedger struct {
	*postgres.Store
	p *process
}

func guard0(p *process, do func() error) error {
	before, after := p.gate()
	if before != nil {
		return before
	}
	if err := do(); err != nil {
		return err
	}
	return p.close(after)
}

func guard1[T any](p *process, do func() (T, error)) (T, error) {
	var out T
	err := guard0(p, func() (err error) {
		out, err = do()
		return err
	})
	if err != nil {
		var zero T
		return zero, err
	}
	return out, nil
}

func (l faultyLedger) Unchanged(ctx context.Context, c corpus.ID, docs []corpus.PreparedDocument) ([]corpus.Accepted, error) {
	return guard1(l.p, func() ([]corpus.Accepted, error) { return l.Store.Unchanged(ctx, c, docs) })
}

func (l faultyLedger) Accept(ctx context.Context, c corpus.ID, docs []corpus.PreparedDocument, lease corpus.Lease) (got []corpus.Accepted, work []corpus.Entry, err error) {
	err = guard0(l.p, func() (err error) {
		got, work, err = l.Store.Accept(ctx, c, docs, lease)
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return got, work, nil
}

func (l faultyLedger) DeleteDocument(ctx context.Context, c corpus.ID, id string) (corpus.DocumentProgress, error) {
	return guard1(l.p, func() (corpus.DocumentProgress, error) { return l.Store.DeleteDocument(ctx, c, id) })
}

func (l faultyLedger) PatchDocument(ctx context.Context, c corpus.ID, id string, md corpus.Metadata) (corpus.Accepted, error) {
	return guard1(l.p, func() (corpus.Accepted, error) { return l.Store.PatchDocument(ctx, c, id, md) })
}

func (l faultyLedger) Progress(ctx context.Context, c corpus.ID, docs []corpus.ID) ([]corpus.DocumentProgress, error) {
	return guard1(l.p, func() ([]corpus.DocumentProgress, error) { return l.Store.Progress(ctx, c, docs) })
}

func (l faultyLedger) Claim(ctx context.Context, ix corpus.ID, lease corpus.Lease) ([]corpus.Entry, error) {
	return guard1(l.p, func() ([]corpus.Entry, error) { return l.Store.Claim(ctx, ix, lease) })
}

func (l faultyLedger) Renew(ctx context.Context, ix corpus.ID, e []corpus.Entry, until time.Duration) error {
	return guard0(l.p, func() error { return l.Store.Renew(ctx, ix, e, until) })
}

func (l faultyLedger) Settle(ctx context.Context, ix corpus.Index, r []corpus.EntryResult) ([]corpus.DocumentProgress, error) {
	return guard1(l.p, func() ([]corpus.DocumentProgress, error) { return l.Store.Settle(ctx, ix, r) })
}

func (l faultyLedger) RaiseMetadata(ctx context.Context, c corpus.ID, seen map[corpus.ID]int64) error {
	return guard0(l.p, func() error { return l.Store.RaiseMetadata(ctx, c, seen) })
}

func (l faultyLedger) ClaimDead(ctx context.Context, ix corpus.ID, lease corpus.Lease) ([]corpus.ID, error) {
	return guard1(l.p, func() ([]corpus.ID, error) { return l.Store.ClaimDead(ctx, ix, lease) })
}

func (l faultyLedger) Confirm(ctx context.Context, ix, token corpus.ID, absent, again []corpus.ID, d time.Duration, why string) ([]corpus.ID, error) {
	return guard1(l.p, func() ([]corpus.ID, error) { return l.Store.Confirm(ctx, ix, token, absent, again, d, why) })
}

func (l faultyLedger) ClaimTombs(ctx context.Context, ix corpus.ID, grace time.Duration, lease corpus.Lease) ([]corpus.ID, error) {
	return guard1(l.p, func() ([]corpus.ID, error) { return l.Store.ClaimTombs(ctx, ix, grace, lease) })
}

func (l faultyLedger) Purge(ctx context.Context, ix corpus.Index, token corpus.ID, ids []corpus.ID) (int, error) {
	return guard1(l.p, func() (int, error) { return l.Store.Purge(ctx, ix, token, ids) })
}

func (l faultyLedger) IndexReady(ctx context.Context, ix corpus.ID) error {
	return guard0(l.p, func() error { return l.Store.IndexReady(ctx, ix) })
}

func (l faultyLedger) Indexes(ctx context.Context) ([]corpus.LiveIndex, error) {
	return guard1(l.p, func() ([]corpus.LiveIndex, error) { return l.Store.Indexes(ctx) })
}

func (l faultyLedger) Sweep(ctx context.Context, c, after corpus.ID, limit int) (moved []corpus.DocumentProgress, next corpus.ID, err error) {
	err = guard0(l.p, func() (err error) {
		moved, next, err = l.Store.Sweep(ctx, c, after, limit)
		return err
	})
	return moved, next, err
}

// faultyIndex is a process's way to the index; faults of the network are fakeIndex's own.
type faultyIndex struct {
	*fakeIndex
	p *process
}

func (x faultyIndex) InsertPoints(ctx context.Context, ix corpus.Index, pts []corpus.Point) error {
	return guardDead(x.p, func() error { return x.fakeIndex.InsertPoints(ctx, ix, pts) })
}

func (x faultyIndex) RewritePoints(ctx context.Context, ix corpus.Index, pts []corpus.Point) error {
	return guardDead(x.p, func() error { return x.fakeIndex.RewritePoints(ctx, ix, pts) })
}

func (x faultyIndex) SetMetadata(ctx context.Context, ix corpus.Index, w []corpus.MetadataWrite) error {
	return guardDead(x.p, func() error { return x.fakeIndex.SetMetadata(ctx, ix, w) })
}

func (x faultyIndex) DeletePoints(ctx context.Context, ix corpus.Index, ids []corpus.ID) error {
	return guardDead(x.p, func() error { return x.fakeIndex.DeletePoints(ctx, ix, ids) })
}

func (x faultyIndex) ReadPoints(ctx context.Context, ix corpus.Index, ids []corpus.ID, v bool) ([]corpus.PointState, error) {
	var out []corpus.PointState
	err := guardDead(x.p, func() (err error) {
		out, err = x.fakeIndex.ReadPoints(ctx, ix, ids, v)
		return err
	})
	return out, err
}

func (x faultyIndex) CreateIndex(ctx context.Context, ix corpus.Index) error {
	return guardDead(x.p, func() error { return x.fakeIndex.CreateIndex(ctx, ix) })
}

func (x faultyIndex) DropIndex(ctx context.Context, ix corpus.Index) error {
	return guardDead(x.p, func() error { return x.fakeIndex.DropIndex(ctx, ix) })
}

func guardDead(p *process, do func() error) error {
	if p.dead.Load() {
		return errDead
	}
	if err := do(); err != nil {
		return err
	}
	return p.close(nil)
}
