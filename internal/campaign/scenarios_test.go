package campaign

import (
	"context"
	"net"
	"os"
	"strconv"
	"testing"
	"time"

	qc "github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/internal/faults"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
)

// Scenarios of docs/consistency.md that no room can play alone.

// scene is a history with one instance and nothing at fault.
func scene(t *testing.T, docs ...string) (*history, func(func(*instance))) {
	r := newRig(t, pgtest.New(t), "")
	h := &history{t: t, r: r, d: newDice(1), name: "scene", docs: docs, m: newModel(docs, false), p: profile{declared: true, loss: "all"}}
	with := func(f func(*instance)) {
		tp := h.tempo(false)
		tp.quick, tp.stamp, tp.lease = 0, 5*time.Millisecond, 5*time.Second
		i := r.start(r.borrow(t), tp, h.d)
		f(i)
		i.stop()
	}
	h.declare()
	return h, with
}

// must puts a document and waits until it serves.
func (h *history) must(i *instance, doc, content string) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	o := h.m.begin(doc, put, content, false)
	out, err := i.in.Ingest(ctx, corpus.IngestRequest{Collection: h.name, Documents: []corpus.DocumentInput{input(doc, content, o.value)}, Wait: true})
	if err != nil || out[0].Status != corpus.StatusIndexed {
		h.t.Fatalf("putting %s: %v, %+v", doc, err, out)
	}
	h.answered(o, doc, out[0], nil, true)
}

// Scenario 12: both stores were restored, to different times. Where the index is the newer one,
// it shows that the ledger lost something; where it is the older one, it only lacks points.
func TestBothStoresRestoredToDifferentTimes(t *testing.T) {
	for _, indexNewer := range []bool{false, true} {
		t.Run("index newer "+strconv.FormatBool(indexNewer), func(t *testing.T) {
			h, with := scene(t, "early", "between", "late")
			r := h.r
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			with(func(i *instance) { h.must(i, "early", "A"); h.stamped(ctx) })
			var ledger, index string
			if indexNewer {
				ledger = r.backup(t)
			} else {
				index = r.copyIndex(t)
			}
			mark := h.m.mark()
			with(func(i *instance) { h.must(i, "between", "B"); h.must(i, "early", "C"); h.stamped(ctx) })
			if indexNewer {
				index = r.copyIndex(t)
			} else {
				ledger = r.backup(t)
				mark = h.m.mark()
			}
			with(func(i *instance) { h.must(i, "late", "D"); h.stamped(ctx) })

			r.putIndex(t, index)
			r.restore(t, ledger, true)
			h.m.forget(mark)
			with(func(i *instance) {
				if !indexNewer {
					if h.converge(ctx, i) {
						h.compare(ctx)
					}
					return
				}
				_, ix, err := r.store.ResolveCollection(ctx, h.name)
				if err != nil {
					t.Fatal(err)
				}
				before, err := scrollAll(ctx, r, ix)
				if err != nil {
					t.Fatal(err)
				}
				rep, ok := h.reconcileNow(ctx, i, true)
				if !ok {
					return
				}
				if rep.State != corpus.RunBraked || rep.Collections[0].Findings[corpus.RolledBack] == 0 {
					t.Errorf("the run ended as %s and found %v; it has to see the rollback", rep.State, rep.Collections[0].Findings)
				}
				after, err := scrollAll(ctx, r, ix)
				if err != nil {
					t.Fatal(err)
				}
				if len(after) < len(before) {
					t.Errorf("P8: %d of %d points were deleted before anybody decided", len(before)-len(after), len(before))
				}
				if err := i.rec.AdoptRollback(ctx, h.name); err != nil {
					t.Fatal(err)
				}
				if h.converge(ctx, i) {
					h.compare(ctx)
				}
			})
		})
	}
}

// Scenario 14: under an index's name stands an alias of another collection's index. The points
// there are alive, and none of this collection's business.
func TestAnAliasInTheIndexsPlace(t *testing.T) {
	h, with := scene(t, "p")
	r := h.r
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	docs := []string{"x", "y"}
	other := &history{t: t, r: r, d: h.d, p: h.p, name: "other", docs: docs, m: newModel(docs, false)}
	other.declare()
	with(func(i *instance) {
		h.must(i, "p", "A")
		other.must(i, "x", "A")
		other.must(i, "y", "B")
		h.stamped(ctx)
		other.stamped(ctx)
	})
	_, mine, err := r.store.ResolveCollection(ctx, h.name)
	if err != nil {
		t.Fatal(err)
	}
	_, theirs, err := r.store.ResolveCollection(ctx, other.name)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.index.DropIndex(ctx, mine); err != nil {
		t.Fatal(err)
	}
	host, port, err := net.SplitHostPort(r.addr)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := qc.NewClient(&qc.Config{Host: host, Port: n, SkipCompatibilityCheck: true})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if err := raw.CreateAlias(ctx, mine.QdrantName, theirs.QdrantName); err != nil {
		t.Fatal(err)
	}
	with(func(i *instance) {
		for range 2 {
			rep, ok := h.reconcileNow(ctx, i, true)
			if !ok {
				return
			}
			if rep.State == corpus.RunDone && rep.Collections[0].Findings.Total() == 0 {
				t.Errorf("a reconcile finds nothing wrong with another collection's points: %+v", rep)
			}
		}
		points, err := scrollAll(ctx, r, theirs)
		if err != nil {
			t.Fatal(err)
		}
		held := map[corpus.ID]bool{}
		for _, p := range points {
			held[p.ID] = true
		}
		c, ix, err := r.store.ResolveCollection(ctx, other.name)
		if err != nil {
			t.Fatal(err)
		}
		for id, e := range other.ledger(ctx, c, ix) {
			if !held[id] {
				t.Errorf("P6: point %s of %s in the other collection was deleted through the alias", id, e.doc)
			}
		}
	})
}

// copyIndex keeps the index's files as they are now; putIndex goes on with such a copy. Nobody
// may be at work.
func (r *rig) copyIndex(t *testing.T) string {
	t.Helper()
	r.stopIndex(t)
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(r.dir)); err != nil {
		t.Fatal(err)
	}
	r.moved(t)
	return dir
}

func (r *rig) putIndex(t *testing.T, files string) {
	t.Helper()
	r.stopIndex(t)
	r.dir = files
	r.moved(t)
}

// moved starts the index on another port; hosts that know the old one are not used again.
func (r *rig) moved(t *testing.T) {
	t.Helper()
	r.startIndex(t)
	r.index.SetOwner(r.owner)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.free = nil
}

// A version is overtaken while its write is under way: its point is read absent, and then the
// write lands. The worker that sent it sees to its deletion, without a reconcile.
func TestAWriteThatLandsAfterItsChunkDied(t *testing.T) {
	h, _ := scene(t, "p")
	r := h.r
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tp := h.tempo(false)
	tp.quick, tp.stamp, tp.lease = 0, time.Hour, 30*time.Second
	i := r.start(r.borrow(t), tp, h.d)
	defer i.stop()
	h.stamped(ctx) // the only stamp, so that the next upsert is the document's
	func() {
		i.host.valve.set(faults.NewScript(faults.Rule{Op: "Upsert", Fault: faults.Fault{Kind: faults.Delay}}), nil, false)
		first, err := i.in.Ingest(ctx, corpus.IngestRequest{Collection: h.name, Documents: []corpus.DocumentInput{input("p", "D", 1)}})
		if err != nil {
			t.Fatal(err)
		}
		for i.host.ix.Held() == 0 && ctx.Err() == nil {
			pause(ctx, time.Millisecond)
		}
		h.must(i, "p", "B")
		confirmed := func() bool {
			var n int
			if err := r.pool.QueryRow(ctx, "SELECT count(*) FROM lockstep.index_entries WHERE chunk_id = $1 AND absent_at IS NOT NULL", [16]byte(first[0].PointIDs[0])).Scan(&n); err != nil {
				t.Fatal(err)
			}
			return n > 0
		}
		for !confirmed() {
			pause(ctx, time.Millisecond)
		}
		_, ix, err := r.store.ResolveCollection(ctx, h.name)
		if err != nil {
			t.Fatal(err)
		}
		i.host.ix.ReleaseAll()
		for {
			points, err := r.index.ReadPoints(ctx, ix, first[0].PointIDs, false)
			if err != nil {
				t.Fatalf("the point of a dead chunk stays: %v", err)
			}
			if len(points) == 0 && confirmed() {
				return
			}
			pause(ctx, time.Millisecond)
		}
	}()
}
