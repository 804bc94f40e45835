package campaign

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/url"
	"path"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/internal/faults"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
	"github.com/lockstep-db/lockstep/store/qdranttest"
)

// TestRollback restores Postgres from a backup in the middle of histories and checks promise
// P8: until somebody adopts the restored ledger or discards the index, nothing is deleted that
// was live when the backup was put back, whoever asks; and afterwards the stores are equal.
func TestRollback(t *testing.T) {
	base, n := *flagSeed, *flagN
	if base == 0 {
		base = rand.Uint64()>>24 | 1
	}
	if n == 0 {
		n = 8
	}
	t.Logf("first seed %d", base)
	for i := range n {
		seed := base + uint64(i)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			if rollback(t, seed); t.Failed() {
				t.Logf("replay with: go test ./internal/campaign -run TestRollback -campaign.seed=%d -campaign.n=1", seed)
			}
		})
	}
}

// rollback is one such history. What reveals the restore depends on the seed: the marks of the
// server, which every restore with a restart changes, or the index's stamp alone, where the
// data came back into the running server.
func rollback(t *testing.T, seed uint64) {
	dsn := pgtest.New(t)
	r := newRig(t, dsn, qdranttest.Child(t))
	h := newHistory(t, r, seed)
	h.p = profile{declared: true, loss: "all", purge: h.d.chance(30)} // nothing is at fault but the restore
	h.m = newModel(h.docs, false)
	byMarks, late, adopt := h.d.chance(50), h.d.chance(50), h.d.chance(50)
	t.Logf("seed %d: purge %v, by marks %v, late requests %v, adopt %v", seed, h.p.purge, byMarks, late, adopt)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()

	stamps := 5 * time.Millisecond
	if byMarks {
		stamps = time.Hour // the only stamp is one that the backup knows
	}
	h.declare()
	live := func(f func(i *instance)) {
		tp := h.tempo(false)
		tp.stamp = stamps
		i := r.start(r.borrow(t), tp, h.d)
		f(i)
		i.stop()
	}
	writes := func(docs []string) func(*instance) {
		return func(i *instance) {
			for range 12 {
				doc := docs[h.d.n(len(docs))]
				c, done := context.WithTimeout(ctx, 5*time.Second)
				switch n := h.d.n(10); {
				case n < 6:
					h.put(c, i, doc, true)
				case n < 8:
					o := h.m.begin(doc, patch, "", false)
					out, err := i.in.Patch(c, h.name, doc, metadataOf(o.value), true)
					h.answered(o, doc, out, err, true)
				default:
					o := h.m.begin(doc, remove, "", false)
					out, err := i.in.Delete(c, h.name, doc, true)
					h.answered(o, doc, out, err, true)
				}
				done()
			}
		}
	}
	live(func(i *instance) {
		writes(h.docs)(i)
		h.stamped(ctx)
	})

	backup := r.backup(t)
	before := h.m.mark()
	live(func(i *instance) {
		writes(h.docs)(i)
		// Something of the lost time has to be in the index, whatever the dice said.
		h.put(ctx, i, h.docs[0], true)
		if !byMarks {
			h.stamped(ctx)
		}
	})
	if late { // an upsert of the lost time that lands after the restore
		host := r.borrow(t)
		host.valve.set(faults.NewScript(faults.Rule{Op: "Upsert", Times: -1, Fault: faults.Fault{Kind: faults.Hold}}), nil, false)
		tp := h.tempo(false)
		tp.stamp = stamps
		i := r.start(host, tp, h.d)
		c, done := context.WithTimeout(ctx, 200*time.Millisecond)
		h.put(c, i, h.docs[1], true)
		done()
		i.stop()
	}
	c, ix, err := r.store.ResolveCollection(ctx, h.name)
	if err != nil {
		t.Fatal(err)
	}
	points, err := scrollAll(ctx, r, ix)
	if err != nil {
		t.Fatal(err)
	}
	lost, owners := map[corpus.ID]int64{}, map[corpus.ID]corpus.ID{}
	for id := range h.chunks(ctx, c) {
		for _, p := range points {
			if p.ID == id {
				lost[id], owners[id] = p.Payload.Gen, p.Payload.Document
			}
		}
	}

	r.restore(t, backup, byMarks)
	h.m.forget(before)
	fresh := []string{"new 1", "new 2"}
	for _, doc := range fresh {
		h.m.docs[doc] = &docModel{}
	}
	h.docs = append(h.docs, fresh...)
	restored := h.m.mark()
	recognised := false
	live(func(i *instance) {
		touched := fresh
		if h.d.chance(50) {
			touched = append(touched, h.docs[2])
		}
		writes(touched)(i)
		if late {
			r.release(h.d, true, false, true)
		}
		for _, depth := range []corpus.Depth{corpus.Quick, corpus.Full, corpus.Deep, corpus.Full} {
			id, err := i.rec.Start(ctx, corpus.ReconcileRequest{Collection: h.name, Depth: depth, Repair: true, Force: true})
			for corpus.CodeOf(err) == "reconcile_running" && ctx.Err() == nil { // the background looks already
				pause(ctx, 3*time.Millisecond)
				id, err = i.rec.Start(ctx, corpus.ReconcileRequest{Collection: h.name, Depth: depth, Repair: true, Force: true})
			}
			if err != nil {
				h.fail("starting a reconcile: %v", err)
				return
			}
			rep, err := i.rec.Wait(ctx, id, nil)
			if err != nil {
				h.fail("waiting for a reconcile: %v", err)
				return
			}
			for _, cr := range rep.Collections {
				recognised = recognised || cr.Findings[corpus.RolledBack] > 0
			}
		}
	})
	if !recognised {
		h.fail("P8: no reconcile reported the rollback")
	}
	points, err = scrollAll(ctx, r, ix)
	if err != nil {
		t.Fatal(err)
	}
	gens := map[corpus.ID]int64{}
	for _, p := range points {
		gens[p.ID] = p.Payload.Gen
	}
	// What callers write into the restored ledger, neighbours in a request included, is theirs to
	// replace and to delete: the ids of equal contents are those of the lost time.
	theirs := map[corpus.ID]bool{}
	for doc, d := range h.m.docs {
		theirs[corpus.DocumentID(c.ID, doc)] = slices.ContainsFunc(d.ops, func(o *op) bool { return o.start > restored })
	}
	for id, gen := range lost {
		if theirs[owners[id]] {
			continue
		}
		if got, ok := gens[id]; !ok {
			h.fail("P8: point %s (gen %d) was live in the lost history and was deleted before anybody decided", id, gen)
		} else if got != gen {
			h.fail("P8: point %s carried gen %d in the lost history and now carries %d", id, gen, got)
		}
	}
	if t.Failed() {
		return
	}

	tp := h.tempo(false)
	tp.lease, tp.poll, tp.stamp = 5*time.Second, 2*time.Millisecond, time.Hour
	i := r.start(r.borrow(t), tp, h.d)
	defer i.stop()
	if adopt {
		err = i.rec.AdoptRollback(ctx, h.name)
	} else {
		err = i.rec.DiscardRollback(ctx, h.name)
	}
	if err != nil {
		h.fail("P8: resolving the rollback: %v", err)
		return
	}
	if h.converge(ctx, i) {
		h.compare(ctx)
	}
}

// stamped waits until the index carries a stamp.
func (h *history) stamped(ctx context.Context) {
	_, ix, err := h.r.store.ResolveCollection(ctx, h.name)
	if err != nil {
		h.fail("resolving the collection: %v", err)
		return
	}
	first, had, err := h.r.index.ReadStamp(ctx, ix)
	for begin := time.Now(); err == nil && time.Since(begin) < 10*time.Second; pause(ctx, 3*time.Millisecond) {
		st, ok, rerr := h.r.index.ReadStamp(ctx, ix)
		if err = rerr; ok && (!had || st.Nonce != first.Nonce || h.stampedOnce(ctx, ix)) {
			return
		}
	}
	h.fail("the index gets no new stamp: %v", err)
}

// stampedOnce reports whether stamps are renewed so seldom that one is all there will be.
func (h *history) stampedOnce(ctx context.Context, ix corpus.Index) bool {
	var n int
	if err := h.r.pool.QueryRow(ctx, "SELECT count(*) FROM lockstep.index_stamps WHERE index_id = $1", [16]byte(ix.ID)).Scan(&n); err != nil {
		h.fail("counting stamps: %v", err)
	}
	return n == 1
}

// chunks are the ids of all live chunks.
func (h *history) chunks(ctx context.Context, c corpus.Collection) map[corpus.ID]bool {
	rows, err := h.r.pool.Query(ctx, "SELECT id FROM lockstep.chunks WHERE collection_id = $1 AND died_version IS NULL", [16]byte(c.ID))
	if err != nil {
		h.fail("reading chunks: %v", err)
		return nil
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[[16]byte])
	if err != nil {
		h.fail("reading chunks: %v", err)
	}
	out := map[corpus.ID]bool{}
	for _, id := range ids {
		out[id] = true
	}
	return out
}

// mark and forget undo what happened in the lost time.
func (m *model) mark() int64 { return m.tick() }

func (m *model) forget(after int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, d := range m.docs {
		for _, o := range d.ops {
			if o.start > after {
				o.void = true
			}
		}
		d.shown = nil
	}
}

// backup copies the database as it is now. Nobody may be connected meanwhile.
func (r *rig) backup(t *testing.T) string {
	t.Helper()
	r.disconnect()
	name := database(t, r.dsn)
	copied := name + "_backup"
	admin(t, r.dsn, "CREATE DATABASE "+copied+" TEMPLATE "+name)
	t.Cleanup(func() { admin(t, r.dsn, "DROP DATABASE "+copied+" WITH (FORCE)") })
	r.openLedger(t, r.dsn)
	return copied
}

// restore goes on with a backup. byMarks: as after a restart of the server.
func (r *rig) restore(t *testing.T, backup string, byMarks bool) {
	t.Helper()
	r.disconnect()
	u, err := url.Parse(r.dsn)
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/" + backup
	r.dsn = u.String()
	r.openLedger(t, r.dsn)
	if byMarks {
		if _, err := r.pool.Exec(context.Background(), "UPDATE lockstep.installation SET postmaster_start = postmaster_start - interval '1 day'"); err != nil {
			t.Fatal(err)
		}
	}
}

// disconnect closes every connection to the ledger; late requests to the index stay on their way.
func (r *rig) disconnect() {
	r.closeLedger()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.all {
		h.store.Close()
		h.pg.Disconnect()
	}
	r.free = nil // hosts with the old address are not used again
}

func database(t *testing.T, dsn string) string {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	return path.Base(u.Path)
}

func admin(t *testing.T, dsn, sql string) {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/postgres"
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, u.String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(ctx) }()
	for try := 0; ; try++ {
		// Connections that were just closed may still count as users of the template.
		if _, err = conn.Exec(ctx, sql); err == nil {
			return
		}
		if try == 100 {
			t.Fatalf("%s: %v", sql, err)
		}
		pause(ctx, 50*time.Millisecond)
	}
}
