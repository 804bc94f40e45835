package reconcile_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/reconcile"
)

var fireFor = flag.Duration("reconcile.fire", 8*time.Second, "how long clients and reconcile work against each other")

// hesitant delays the index's answers to reconcile, so that what it read grows old before it
// is used.
type hesitant struct {
	reconcile.Index
	mu   sync.Mutex
	r    *rand.Rand
	most time.Duration
}

func (h *hesitant) wait(ctx context.Context) {
	h.mu.Lock()
	d := time.Duration(h.r.Int64N(int64(h.most)))
	h.mu.Unlock()
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

func (h *hesitant) Scroll(ctx context.Context, ix corpus.Index, from corpus.ID, limit int, depth corpus.Depth) ([]corpus.PointState, *corpus.ID, error) {
	page, next, err := h.Index.Scroll(ctx, ix, from, 50, depth)
	h.wait(ctx)
	return page, next, err
}

func (h *hesitant) ReadPoints(ctx context.Context, ix corpus.Index, ids []corpus.ID, vectors bool) ([]corpus.PointState, error) {
	pts, err := h.Index.ReadPoints(ctx, ix, ids, vectors)
	h.wait(ctx)
	return pts, err
}

func (h *hesitant) FacetBuckets(ctx context.Context, ix corpus.Index) (map[uint32]int64, error) {
	out, err := h.Index.FacetBuckets(ctx, ix)
	h.wait(ctx)
	return out, err
}

func (h *hesitant) DeletePoints(ctx context.Context, ix corpus.Index, ids []corpus.ID) error {
	h.wait(ctx)
	return h.Index.DeletePoints(ctx, ix, ids)
}

// TestUnderFire is promise P6: clients ingest, update, patch and delete a small set of
// documents as fast as they can while repairing runs of every depth follow each other with
// next to no grace. No live point may be lost and no healthy one reported.
func TestUnderFire(t *testing.T) {
	w := newWorld(t, func(c *reconcile.Config) {
		c.Grace, c.FreeDeletes, c.Overdue = time.Millisecond, 1_000_000, time.Minute
		c.Workers, c.RangePoints, c.QuickBuckets = 3, 20, 4096
	})
	r := source(t)
	slow := reconcile.New(func() reconcile.Config { c := w.cfg; c.Wake = w.write.Wake; return c }(), w.store,
		&hesitant{Index: w.index, r: rand.New(rand.NewPCG(r.Uint64(), 1)), most: 20 * time.Millisecond}, logger(), prometheus.NewRegistry())
	t.Cleanup(slow.Close)
	w.fill(0, 40)

	ctx, cancel := context.WithTimeout(context.Background(), *fireFor)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	var ops, runs, looked atomic.Int64
	for client := range 8 {
		r := rand.New(rand.NewPCG(r.Uint64(), uint64(client)))
		g.Go(func() error {
			for ctx.Err() == nil {
				id := fmt.Sprintf("doc/%d", r.IntN(40))
				wait := r.IntN(3) > 0
				var err error
				switch r.IntN(10) {
				case 0, 1:
					_, err = w.write.Delete(ctx, name, id, wait)
				case 2, 3:
					_, err = w.write.Patch(ctx, name, id, corpus.Metadata{"n": r.Int64N(1000)}, wait)
				default:
					doc := corpus.DocumentInput{ID: id, Metadata: corpus.Metadata{"n": int64(1)}}
					for range 1 + r.IntN(4) { // few texts, so that chunks come back and ids take incarnations
						doc.Chunks = append(doc.Chunks, corpus.ChunkInput{Text: fmt.Sprintf("text %d", r.IntN(6))})
					}
					_, err = w.write.Ingest(ctx, corpus.IngestRequest{Collection: name, Documents: []corpus.DocumentInput{doc}, Wait: wait})
				}
				if err != nil && corpus.KindOf(err) != corpus.NotFound && ctx.Err() == nil {
					return fmt.Errorf("client: %w", err)
				}
				ops.Add(1)
			}
			return nil
		})
	}
	g.Go(func() error {
		for depth := 0; ctx.Err() == nil; depth++ {
			id, err := slow.Start(ctx, corpus.ReconcileRequest{Collection: name, Depth: []corpus.Depth{corpus.Full, corpus.Deep, corpus.Quick}[depth%3], Repair: true, MaxDeletes: 1})
			if err != nil {
				return err
			}
			rep, err := slow.Wait(context.WithoutCancel(ctx), id, nil)
			if err != nil {
				return err
			}
			if rep.State != corpus.RunDone {
				return fmt.Errorf("run ended as %s: %s", rep.State, rep.Error)
			}
			runs.Add(1)
			looked.Add(rep.Compared)
			for _, f := range w.findings(id) {
				// A write that was overtaken by a delete may land late: that is a true orphan.
				var live bool
				if err := w.db.QueryRow(context.WithoutCancel(ctx), `SELECT EXISTS (SELECT 1 FROM chunks WHERE id = $1 AND died_version IS NULL)`, f.ID).Scan(&live); err != nil {
					return err
				}
				if live || f.Kind != corpus.Orphan {
					return fmt.Errorf("false report: %s of %s: %s", f.Kind, f.ID, f.Detail)
				}
			}
		}
		return nil
	})
	if err := g.Wait(); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	t.Logf("%d operations, %d runs, %d ids compared", ops.Load(), runs.Load(), looked.Load())
	if runs.Load() < 3 || ops.Load() < 50 {
		t.Errorf("too little happened: %d operations, %d runs", ops.Load(), runs.Load())
	}
	w.settled()
	// The last late writes are swept by one repairing run, and the next finds nothing.
	w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep, Repair: true, MaxDeletes: 1})
	rep, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
	clean(t, rep, found)
	// The index holds exactly what Postgres says.
	rows, err := w.db.Query(w.ctx(), `SELECT id FROM chunks WHERE died_version IS NULL`)
	w.must(err)
	pts := w.points()
	n := 0
	for rows.Next() {
		var id corpus.ID
		w.must(rows.Scan(&id))
		n++
		if _, ok := pts[id]; !ok {
			t.Errorf("live point %s was lost", id)
		}
	}
	w.must(rows.Err())
	if n != len(pts) {
		t.Errorf("the index holds %d points, the ledger %d live chunks", len(pts), n)
	}
}

// Several instances share a run: ranges are leased, each is done once, and what a dead leader
// left is taken over without anybody asking.
func TestInstancesShareRuns(t *testing.T) {
	w := newWorld(t, func(c *reconcile.Config) {
		c.RangePoints, c.Workers, c.Lease, c.Scrub.Off = 20, 2, 300*time.Millisecond, true
	})
	live := w.fill(0, 600)
	w.must(w.index.DeletePoints(w.ctx(), w.ix(), live[:25]))
	ctx, cancel := context.WithCancel(w.ctx())
	var g errgroup.Group
	for range 2 {
		s := w.service()
		g.Go(func() error { return s.Scrub(ctx) })
	}
	id, err := w.rec.Start(w.ctx(), corpus.ReconcileRequest{Collection: name, Repair: true})
	w.must(err)
	rep, err := w.rec.Wait(w.ctx(), id, nil)
	w.must(err)
	found := w.findings(id)
	only(t, found, map[corpus.FindingKind]int{corpus.Missing: 25})
	if rep.State != corpus.RunDone || remaining(found) != 0 || rep.Compared != 600 {
		t.Errorf("%s %s, %d remain, %d compared", rep.State, rep.Error, remaining(found), rep.Compared)
	}

	w.must(w.index.DeletePoints(w.ctx(), w.ix(), live[:25]))
	victim := reconcile.New(w.cfg, newMortal(w.store, 5, false), w.index, logger(), prometheus.NewRegistry())
	id, err = victim.Start(w.ctx(), corpus.ReconcileRequest{Collection: name, Repair: true})
	w.must(err)
	victim.Finished()
	rep, err = w.rec.Wait(w.ctx(), id, nil)
	w.must(err)
	found = w.findings(id)
	only(t, found, map[corpus.FindingKind]int{corpus.Missing: 25})
	if rep.State != corpus.RunDone || remaining(found) != 0 || rep.Compared != 600 {
		t.Errorf("taken over: %s %s, %d remain, %d compared", rep.State, rep.Error, remaining(found), rep.Compared)
	}
	cancel()
	w.must(g.Wait())
}

// TestScrub: the background finds damage by its quick checks and by its slices, follows hints,
// deletes what is dead, repairs only when told to, and stamps the indexes.
func TestScrub(t *testing.T) {
	w := newWorld(t)
	live := w.fill(0, 50)
	dead := w.tombs(2)
	scrub := func(c reconcile.ScrubConfig, f func(s *reconcile.Service)) {
		t.Helper()
		c.Tick = 5 * time.Millisecond
		cfg := w.cfg
		cfg.Scrub, cfg.Wake = c, w.write.Wake
		s := reconcile.New(cfg, w.store, w.index, logger(), prometheus.NewRegistry())
		defer s.Close()
		ctx, cancel := context.WithCancel(w.ctx())
		done := make(chan error, 1)
		go func() { done <- s.Scrub(ctx) }()
		f(s)
		cancel()
		w.must(<-done)
	}
	verdict := func() corpus.CollectionReport {
		reports, err := w.rec.Latest(w.ctx(), name)
		w.must(err)
		return reports[0]
	}
	if v := verdict(); v.Status != corpus.Unknown {
		t.Errorf("never checked, and the verdict is %s", v.Status)
	}

	w.must(w.index.DeletePoints(w.ctx(), w.ix(), live[:2]))
	scrub(reconcile.ScrubConfig{QuickEvery: 20 * time.Millisecond, FullWithin: 1000 * time.Hour, StampEvery: 10 * time.Millisecond}, func(*reconcile.Service) {
		w.eventually("a quick check", func() bool { v := verdict(); return v.Status == corpus.Inconsistent && v.Findings[corpus.Missing] == 2 })
		w.eventually("a stamp", func() bool {
			st, ok, err := w.index.ReadStamp(w.ctx(), w.ix())
			w.must(err)
			return ok && st.Installation == w.owner
		})
	})
	if v := verdict(); v.Repaired.Total() != 0 {
		t.Errorf("scrubbing repaired without being told: %+v", v)
	}
	scrub(reconcile.ScrubConfig{QuickEvery: 20 * time.Millisecond, FullWithin: 1000 * time.Hour, Repair: true}, func(*reconcile.Service) {
		w.eventually("repair", func() bool { return verdict().Status == corpus.Consistent })
	})

	// Damage that only reading it shows: the slices come round. The rotation starts a few slices
	// ahead of the damage; a whole one takes longer than a test should.
	w.upsert(live[3], []float32{1, 2, 3, 4, 5, 6, 7, 8}, w.payloadOf(live[3]))
	w.exec(`UPDATE reconcile_scrub SET next_slice = $1`, (int(live[3][0])+256-3)%256)
	scrub(reconcile.ScrubConfig{QuickEvery: time.Hour, FullWithin: 256 * time.Millisecond, Depth: corpus.Deep}, func(*reconcile.Service) {
		w.eventually("a slice", func() bool {
			v := verdict()
			return v.Status == corpus.Inconsistent && v.Findings[corpus.CorruptVector] == 1
		})
	})
	rep, found := w.run(corpus.ReconcileRequest{Collection: name, Repair: true})
	if remaining(found) != 0 || rep.Collections[0].Findings[corpus.CorruptVector] != 1 {
		t.Errorf("the next run did not take over what the slice found: %+v", found)
	}

	// A search met a dead point: the hint is followed at once, and the point deleted, because
	// the ledger declared it dead long ago. An unknown one is only reported.
	var back []corpus.Point
	for _, p := range dead {
		back = append(back, corpus.Point{ID: p.ID, Vectors: *p.Vectors, Payload: p.Payload})
	}
	w.must(w.index.InsertPoints(w.ctx(), w.ix(), back))
	unknown := w.orphans(1)[0]
	scrub(reconcile.ScrubConfig{QuickEvery: time.Hour, FullWithin: 1000 * time.Hour, HintEvery: time.Millisecond, Off: true}, func(s *reconcile.Service) {
		s.Hint(w.ix(), []corpus.ID{dead[0].ID, unknown, live[5]})
		w.eventually("the hints", func() bool {
			pts, err := w.index.ReadPoints(w.ctx(), w.ix(), []corpus.ID{dead[0].ID, dead[1].ID, unknown, live[5]}, false)
			w.must(err)
			return len(pts) == 3 && verdict().Status == corpus.Inconsistent
		})
	})
	pts, err := w.index.ReadPoints(w.ctx(), w.ix(), []corpus.ID{dead[0].ID, dead[1].ID, unknown, live[5]}, false)
	w.must(err)
	for _, p := range pts {
		if p.ID == dead[0].ID {
			t.Error("the hinted dead point is still there")
		}
	}
	_, found = w.run(corpus.ReconcileRequest{Collection: name, Repair: true})
	only(t, found, map[corpus.FindingKind]int{corpus.Orphan: 2})
	rep, found = w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
	clean(t, rep, found)
}

// A request does not wait for the background: a scrub that holds the collection steps aside.
func TestRequestPreemptsScrub(t *testing.T) {
	w := newWorld(t)
	live := w.fill(0, 20)
	w.must(w.index.DeletePoints(w.ctx(), w.ix(), live[:1]))
	cfg := w.cfg
	cfg.Grace, cfg.Scrub = time.Hour, reconcile.ScrubConfig{QuickEvery: time.Hour, FullWithin: 10000 * time.Hour, Tick: time.Millisecond}
	s := reconcile.New(cfg, w.store, w.index, logger(), prometheus.NewRegistry())
	t.Cleanup(s.Close)
	ctx, cancel := context.WithCancel(w.ctx())
	done := make(chan error, 1)
	go func() { done <- s.Scrub(ctx) }()
	w.eventually("a scrub that waits for its grace", func() bool {
		runs, err := w.store.ActiveRuns(w.ctx())
		w.must(err)
		return len(runs) == 1 && runs[0].Stage == corpus.StageConfirm
	})
	rep, found := w.run(corpus.ReconcileRequest{Collection: name})
	only(t, found, map[corpus.FindingKind]int{corpus.Missing: 1})
	if rep.State != corpus.RunDone {
		t.Errorf("ended as %s: %s", rep.State, rep.Error)
	}
	cancel()
	w.must(<-done)
}

// Off means that the background reads no collection by itself.
func TestScrubOff(t *testing.T) {
	w := newWorld(t, func(c *reconcile.Config) {
		c.Scrub = reconcile.ScrubConfig{Off: true, QuickEvery: time.Millisecond, FullWithin: 256 * time.Millisecond, Tick: time.Millisecond}
	})
	w.fill(0, 5)
	ctx, cancel := context.WithTimeout(w.ctx(), 300*time.Millisecond)
	defer cancel()
	w.must(w.rec.Scrub(ctx))
	var n int
	w.must(w.db.QueryRow(w.ctx(), `SELECT count(*) FROM reconcile_runs`).Scan(&n))
	if n != 0 {
		t.Errorf("%d runs", n)
	}
}

// TestRotationLeavesNothingOut: slices that met another run, or made way for one, are read
// before those that come after them.
func TestRotationLeavesNothingOut(t *testing.T) {
	w := newWorld(t)
	w.fill(0, 50)
	cfg := w.cfg
	cfg.Scrub = reconcile.ScrubConfig{QuickEvery: time.Hour, FullWithin: 256 * time.Millisecond, Share: 1, Tick: time.Millisecond}
	s := reconcile.New(cfg, w.store, w.index, logger(), prometheus.NewRegistry())
	defer s.Close()
	ctx, cancel := context.WithCancel(w.ctx())
	done := make(chan error, 1)
	go func() { done <- s.Scrub(ctx) }()
	slices := func(state string) (n int) {
		w.must(w.db.QueryRow(w.ctx(), `SELECT count(*) FROM reconcile_runs WHERE origin = 'scrub' AND depth = 'full' AND state = $1`, state).Scan(&n))
		return n
	}
	for made := 0; slices("cancelled") < 3 && made < 60; made++ {
		more := slices("done") + 2
		w.eventually("more slices", func() bool { return slices("done") >= more })
		w.run(corpus.ReconcileRequest{Collection: name})
	}
	if slices("cancelled") < 3 {
		t.Error("no slice ever made way: the test proves nothing")
	}
	cancel()
	w.must(<-done)
	rows, err := w.db.Query(w.ctx(), `SELECT lo FROM reconcile_runs WHERE origin = 'scrub' AND depth = 'full' AND state = 'done' ORDER BY started_at`)
	w.must(err)
	var lo [16]byte
	next := 0
	_, err = pgx.ForEachRow(rows, []any{&lo}, func() error {
		if int(lo[0]) != next {
			t.Errorf("slice %d was read where %d was due", lo[0], next)
		}
		next = (int(lo[0]) + 1) % 256
		return nil
	})
	w.must(err)
}
