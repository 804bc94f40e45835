package reconcile_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	qc "github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/reconcile"
)

// watching calls before ahead of every delete.
type watching struct {
	reconcile.Index
	before func(ids []corpus.ID)
}

func (i *watching) DeletePoints(ctx context.Context, ix corpus.Index, ids []corpus.ID) error {
	i.before(ids)
	return i.Index.DeletePoints(ctx, ix, ids)
}

// Over the whole run, not range by range: nothing is deleted before everything that was missing
// is back, and nothing that Postgres has not declared dead by then.
func TestMissingFirstDeletesLast(t *testing.T) {
	w := newWorld(t, func(c *reconcile.Config) { c.RangePoints, c.Workers, c.FreeDeletes = 20, 3, 1000 })
	live := w.fill(0, 300)
	r := source(t)
	orphans := w.orphansFrom(r, 40)
	w.must(w.index.DeletePoints(w.ctx(), w.ix(), live[:40]))
	var deletes atomic.Int64
	spy := &watching{Index: w.index, before: func(ids []corpus.ID) {
		deletes.Add(int64(len(ids)))
		pts, err := w.index.ReadPoints(w.ctx(), w.ix(), live, false)
		w.must(err)
		if len(pts) != len(live) {
			t.Errorf("a delete while %d points are still missing", len(live)-len(pts))
		}
		var early int
		w.must(w.db.QueryRow(w.ctx(), `SELECT count(*) FROM reconcile_ranges WHERE stage < $1`, int(corpus.StageDelete)).Scan(&early))
		if early != 0 {
			t.Errorf("a delete while %d ranges are not repaired yet", early)
		}
		var dead int
		w.must(w.db.QueryRow(w.ctx(), `SELECT count(*) FROM chunks c JOIN index_entries e ON e.chunk_id = c.id
			WHERE c.id = ANY ($1) AND c.died_version IS NOT NULL AND e.state = 'dead'`, ids).Scan(&dead))
		if dead != len(ids) {
			t.Errorf("%d of %d ids are deleted without being dead in Postgres", len(ids)-dead, len(ids))
		}
	}}
	cfg := w.cfg
	cfg.Wake = w.write.Wake
	s := reconcile.New(cfg, w.store, spy, logger(), prometheus.NewRegistry())
	t.Cleanup(s.Close)
	// The workers are slow: they begin only after the run has asked them.
	w.stopIngest()
	id, err := s.Start(w.ctx(), corpus.ReconcileRequest{Collection: name, Repair: true})
	w.must(err)
	w.eventually("waiting for the workers", func() bool {
		rec, err := w.store.GetRun(w.ctx(), id)
		w.must(err)
		return rec.Stage >= corpus.StageSettle || rec.State != corpus.RunRunning
	})
	w.startIngest()
	rep, err := s.Wait(w.ctx(), id, nil)
	w.must(err)
	found := w.findings(id)
	if rep.State != corpus.RunDone || remaining(found) != 0 || deletes.Load() != int64(len(orphans)) {
		t.Errorf("%s %s: %d remain, %d deletes", rep.State, rep.Error, remaining(found), deletes.Load())
	}
	only(t, found, map[corpus.FindingKind]int{corpus.Missing: 40, corpus.Orphan: 40})
}

// late calls at once, when the run has confirmed everything and is about to delete.
type late struct {
	reconcile.Ledger
	at func()
}

func (l *late) DeletesToday(ctx context.Context, c corpus.ID) (int64, error) {
	l.at()
	return l.Ledger.DeletesToday(ctx, c)
}

// An ingest takes the id of a confirmed orphan just before the orphan would be deleted: the
// primary key decides for the ingest, and the document stays.
func TestIngestTakesTheIdOfAnOrphan(t *testing.T) {
	w := newWorld(t)
	w.fill(0, 50)
	r := source(t)
	text := "a text that comes later"
	id := corpus.PointID(w.ix().Collection, corpus.ChunkKey{ExternalID: "later", Content: corpus.HashChunk(text, nil)})
	w.must(w.index.InsertPoints(w.ctx(), w.ix(), []corpus.Point{w.point(id, randomUUID(r), 1, r)}))
	ledger := &late{Ledger: w.store, at: func() {
		got := w.ingest(corpus.DocumentInput{ID: "later", Chunks: []corpus.ChunkInput{{Text: text}}})
		if len(got[0].PointIDs) != 1 || got[0].PointIDs[0] != id {
			t.Errorf("the document's point is %v, want %s", got[0].PointIDs, id)
		}
	}}
	cfg := w.cfg
	cfg.Wake = w.write.Wake
	s := reconcile.New(cfg, ledger, w.index, logger(), prometheus.NewRegistry())
	t.Cleanup(s.Close)
	rep, found := w.runOn(s, corpus.ReconcileRequest{Collection: name, Repair: true})
	if rep.State != corpus.RunDone || remaining(found) != 0 {
		t.Errorf("%s %s: %+v", rep.State, rep.Error, found)
	}
	if _, ok := w.points()[id]; !ok {
		t.Error("the point of a live document was deleted")
	}
	// The point holds the stranger's payload, which only deep reads.
	_, found = w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep, Repair: true})
	only(t, found, map[corpus.FindingKind]int{corpus.StalePayload: 1})
	rep, found = w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
	clean(t, rep, found)
}

// A collection that is deleted while a run reads it, and an index that is lost then, end the
// work on them, not the run.
func TestCollectionGoesAwayDuringARun(t *testing.T) {
	for what, do := range map[string]func(w *world){
		"deleted": func(w *world) { w.must(w.write.DeleteCollection(w.ctx(), name)) },
		"lost":    func(w *world) { w.must(w.raw.DeleteCollection(w.ctx(), w.ix().QdrantName)) },
	} {
		t.Run(what, func(t *testing.T) {
			w := newWorld(t, func(c *reconcile.Config) { c.RangePoints, c.Workers = 20, 1 })
			w.fill(0, 200)
			if _, err := w.write.Ingest(w.ctx(), corpus.IngestRequest{Collection: "other", Wait: true, Documents: []corpus.DocumentInput{{ID: "x", Chunks: []corpus.ChunkInput{{Text: "y"}}}}}); err != nil {
				t.Fatal(err)
			}
			n := 0
			cfg := w.cfg
			cfg.Wake = w.write.Wake
			s := reconcile.New(cfg, &onCheckpoint{Ledger: w.store, do: func() {
				if n++; n == 3 {
					do(w)
					if what == "deleted" {
						w.eventually("dropping", func() bool {
							names, err := w.index.ListOurCollections(w.ctx(), "lockstep_")
							w.must(err)
							return len(names) == 1
						})
					}
				}
			}}, w.index, logger(), prometheus.NewRegistry())
			t.Cleanup(s.Close)
			rep, found := w.runOn(s, corpus.ReconcileRequest{})
			if rep.State != corpus.RunDone {
				t.Errorf("ended as %s: %s", rep.State, rep.Error)
			}
			want := map[corpus.FindingKind]int{}
			if what == "lost" {
				want[corpus.LostIndex] = 1
			}
			only(t, found, want)
		})
	}
}

type onCheckpoint struct {
	reconcile.Ledger
	do func()
}

func (l *onCheckpoint) Checkpoint(ctx context.Context, r corpus.RunRange, p corpus.ScanProgress, lease time.Duration) error {
	l.do()
	return l.Ledger.Checkpoint(ctx, r, p, lease)
}

// idle is an index that says it deleted and did not.
type idle struct{ reconcile.Index }

func (idle) DeletePoints(context.Context, corpus.Index, []corpus.ID) error { return nil }

func TestDeleteThatReadsBackPresent(t *testing.T) {
	w := newWorld(t)
	w.fill(0, 50)
	ids := w.orphans(2)
	w.stopIngest() // its reaper would delete what is declared dead
	s := reconcile.New(w.cfg, w.store, idle{w.index}, logger(), prometheus.NewRegistry())
	t.Cleanup(s.Close)
	rep, found := w.runOn(s, corpus.ReconcileRequest{Collection: name, Repair: true})
	only(t, found, map[corpus.FindingKind]int{corpus.Orphan: 2})
	if remaining(found) != 2 || rep.Collections[0].Status != corpus.Inconsistent || !strings.Contains(found[0].Detail, "reads back present") {
		t.Errorf("%+v", found)
	}
	var absent int
	w.must(w.db.QueryRow(w.ctx(), `SELECT count(*) FROM index_entries WHERE chunk_id = ANY ($1) AND absent_at IS NOT NULL`, ids).Scan(&absent))
	if absent != 0 {
		t.Errorf("%d points were recorded as absent", absent)
	}
	w.startIngest()
}

// Foreign points are deleted only if their very owner is named.
func TestForeignIsDeletedByNameOnly(t *testing.T) {
	w := newWorld(t)
	w.fill(0, 50)
	r := source(t)
	var ids, owners []corpus.ID
	for range 2 {
		p := w.point(randomUUID(r), randomUUID(r), 1, r)
		p.Payload.Owner = randomUUID(r)
		ids, owners = append(ids, p.ID), append(owners, p.Payload.Owner)
		w.must(w.index.InsertPoints(w.ctx(), w.ix(), []corpus.Point{p}))
	}
	bare := randomUUID(r)
	w.upsert(bare, []float32{1, 2, 3, 4, 5, 6, 7, 8}, nil)
	left := func(request corpus.ReconcileRequest, want ...corpus.ID) {
		t.Helper()
		request.Collection = name
		w.run(request)
		pts, err := w.index.ReadPoints(w.ctx(), w.ix(), []corpus.ID{ids[0], ids[1], bare}, false)
		w.must(err)
		got := map[corpus.ID]bool{}
		for _, p := range pts {
			got[p.ID] = true
		}
		if len(got) != len(want) {
			t.Errorf("%+v left %d points, want %d", request, len(got), len(want))
		}
		for _, id := range want {
			if !got[id] {
				t.Errorf("%+v deleted %s", request, id)
			}
		}
	}
	left(corpus.ReconcileRequest{Repair: true, Force: true}, ids[0], ids[1], bare)
	left(corpus.ReconcileRequest{Repair: true, DeleteForeign: owners[0].String()}, ids[1], bare)
	left(corpus.ReconcileRequest{Repair: true, DeleteForeign: "none"}, ids[1])
	if _, err := w.rec.Start(w.ctx(), corpus.ReconcileRequest{Collection: name, DeleteForeign: "none"}); corpus.KindOf(err) != corpus.Invalid {
		t.Errorf("deleting in a run that does not repair: %v", err)
	}
}

// A point whose gen was never handed out is evidence even under the id of a live chunk, and at
// every depth.
func TestEvidenceUnderALiveId(t *testing.T) {
	w := newWorld(t)
	live := w.fill(0, 50)
	orphan := w.orphans(1)[0]
	w.setPayload(live[0], corpus.KeyGen, qc.NewValueInt(1<<40))
	for _, depth := range []corpus.Depth{corpus.Quick, corpus.Full, corpus.Deep} {
		rep, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: depth, Repair: true, Force: true})
		if rep.State != corpus.RunBraked || !slices.ContainsFunc(found, func(f corpus.Finding) bool { return f.Kind == corpus.RolledBack && f.ID == live[0] }) {
			t.Errorf("%s: %s: %+v", depth, rep.State, found)
		}
	}
	if _, ok := w.points()[orphan]; !ok {
		t.Error("an orphan was deleted while the history is in doubt")
	}
}

// eager ingests a document each time the index is asked for points, just before it answers.
type eager struct {
	reconcile.Index
	before func()
}

func (i *eager) ReadPoints(ctx context.Context, ix corpus.Index, ids []corpus.ID, vectors bool) ([]corpus.PointState, error) {
	i.before()
	return i.Index.ReadPoints(ctx, ix, ids, vectors)
}

func (i *eager) FindGenAbove(ctx context.Context, ix corpus.Index, gen int64, gaps [][2]int64, limit int) ([]corpus.PointState, error) {
	i.before()
	return i.Index.FindGenAbove(ctx, ix, gen, gaps, limit)
}

// A number that is taken between two reads is no evidence of a rollback, and a chunk that is
// born between them no orphan.
func TestBirthBetweenTheReads(t *testing.T) {
	w := newWorld(t)
	w.fill(0, 20)
	n := 0
	text := func(n int) string { return fmt.Sprintf("born %d", n) }
	doc := func(n int) string { return fmt.Sprintf("new/%d", n) }
	point := func(n int) corpus.ID {
		return corpus.PointID(w.ix().Collection, corpus.ChunkKey{ExternalID: doc(n), Content: corpus.HashChunk(text(n), nil)})
	}
	cfg := w.cfg
	cfg.Scrub = reconcile.ScrubConfig{Off: true, HintEvery: time.Millisecond, Tick: time.Millisecond, Repair: true}
	s := reconcile.New(cfg, w.store, &eager{Index: w.index, before: func() {
		n++
		w.ingest(corpus.DocumentInput{ID: doc(n), Chunks: []corpus.ChunkInput{{Text: text(n)}}})
	}}, logger(), prometheus.NewRegistry())
	t.Cleanup(s.Close)
	for k := 1; k < 30; k++ {
		s.Hint(w.ix(), []corpus.ID{point(k)})
	}
	ctx, cancel := context.WithCancel(w.ctx())
	done := make(chan error, 1)
	go func() { done <- s.Scrub(ctx) }()
	w.eventually("the hints", func() bool {
		var runs int
		w.must(w.db.QueryRow(w.ctx(), `SELECT count(*) FROM reconcile_runs WHERE origin = 'hint' AND state = 'done'`).Scan(&runs))
		return runs > 0
	})
	cancel()
	w.must(<-done)
	for range 3 {
		rep, found := w.runOn(s, corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep, Repair: true})
		clean(t, rep, found)
	}
	rep, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
	clean(t, rep, found)
	if _, _, stopped, err := w.store.CollectionStopped(w.ctx(), w.ix().Collection); err != nil || stopped {
		t.Errorf("the collection was stopped (%v)", err)
	}
	if n < 4 {
		t.Errorf("only %d documents were born: the test reaches nothing", n)
	}
}
