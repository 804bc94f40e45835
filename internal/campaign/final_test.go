package campaign

import (
	"context"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// conclude ends the faults and asks for what must then hold: one repairing reconcile leaves the
// stores equal to each other and to the model (P3, P5), and late requests change nothing (P4).
func (h *history) conclude() {
	h.mu.Lock()
	old := h.instances
	h.instances = nil
	h.mu.Unlock()
	for _, i := range old {
		if h.p.mortal && h.d.chance(50) {
			i.kill()
		}
		i.host.valve.mu.Lock()
		h.stats.faults += i.host.valve.chosen
		i.host.valve.chosen = 0
		i.host.valve.mu.Unlock()
		h.ended.Go(i.stop)
	}
	// What is held at the ledger is part of operations whose outcome nobody knows, and holds
	// locks: it happens now. Requests to the index may come later still.
	h.drain(false)
	if h.d.chance(50) {
		h.r.release(h.d, true, false, true)
	}

	t := h.tempo(false)
	t.lease, t.poll, t.quick, t.stamp = 5*time.Second, 2*time.Millisecond, 0, time.Hour
	i := h.r.start(h.r.borrow(h.t), t, h.d)
	defer i.stop()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if _, _, err := h.r.store.ResolveCollection(ctx, h.name); corpus.KindOf(err) == corpus.NotFound {
		h.nothing()
		return
	}
	if !h.converge(ctx, i) {
		return
	}
	h.compare(ctx)
	if index, _ := h.r.held(); index > 0 && !h.t.Failed() {
		h.stats.late += index
		live := h.livePoints(ctx)
		h.r.release(h.d, true, false, true)
		h.unharmed(ctx, live)
		if h.converge(ctx, i) {
			h.compare(ctx)
		}
	}
}

// drain waits until the instances that were stopped have ended, and delivers meanwhile what they
// wait for. Then nothing is on its way to the ledger, nor, if index is set, held before the index.
func (h *history) drain(index bool) {
	stopped, still := make(chan struct{}), make(chan struct{})
	go func() { h.ended.Wait(); close(stopped) }()
	go func() {
		// Who waits for a late answer has waited long enough.
		h.every(stopped, time.Millisecond, func() { h.r.clock.Advance(time.Second) })
		close(still)
	}()
	h.every(still, time.Millisecond, func() { h.r.release(h.d, index, true, true) })
	h.r.release(h.d, index, true, true)
	h.r.delivering.Wait()
}

// nothing is what must be where no collection ever came to be.
func (h *history) nothing() {
	for _, doc := range h.docs {
		if bad := h.m.final(doc, nil, 0, 0); bad != "" {
			h.fail("%s", bad)
		}
	}
}

// converge runs one repairing reconcile and one that must find nothing (P5).
func (h *history) converge(ctx context.Context, i *instance) bool {
	// What is queued is no difference, so the queue ends first; where the index is gone, the
	// workers cannot end before reconcile has built another.
	if h.p.loss != "collection" {
		h.settled(ctx)
	}
	if rep, ok := h.reconcileNow(ctx, i, true); !ok {
		return false
	} else if h.judge(rep); rep.State != corpus.RunDone {
		h.fail("P5: the repairing reconcile ended as %s: %s", rep.State, rep.Error)
		return false
	}
	h.settled(ctx)
	rep, ok := h.reconcileNow(ctx, i, false)
	if !ok {
		return false
	}
	for _, c := range rep.Collections {
		if c.Findings.Total() != 0 {
			h.fail("P5: the reconcile after the repairing one finds %v: %+v", c.Findings, c.Sample)
		}
	}
	return !h.t.Failed()
}

// reconcileNow runs a deep reconcile to its end. A run that a killed instance left is in the
// way until its lease has run out.
func (h *history) reconcileNow(ctx context.Context, i *instance, repair bool) (corpus.RunReport, bool) {
	var id corpus.ID
	var err error
	for {
		id, err = i.rec.Start(ctx, corpus.ReconcileRequest{Collection: h.name, Depth: corpus.Deep, Repair: repair})
		if corpus.KindOf(err) != corpus.Conflict || ctx.Err() != nil {
			break
		}
		pause(ctx, 5*time.Millisecond)
	}
	if err != nil {
		h.fail("P5: starting the reconcile: %v", err)
		return corpus.RunReport{}, false
	}
	rep, err := i.rec.Wait(ctx, id, nil)
	if err != nil {
		h.fail("P5: the reconcile (repair %v) does not end: %v; state %s", repair, err, rep.State)
		return rep, false
	}
	h.count(func(s *stats) { s.reconciles++ })
	return rep, true
}

// settled waits until the ledger has nothing left to do.
func (h *history) settled(ctx context.Context) {
	const unsettled = `SELECT
		(SELECT count(*) FROM lockstep.index_entries e JOIN lockstep.indexes i ON i.id = e.index_id JOIN lockstep.collections c ON c.id = i.collection_id
			WHERE c.name = $1 AND c.deleted_at IS NULL AND i.state <> 'retired'
				AND (e.state IN ('pending', 'failed') OR e.state = 'indexed' AND e.meta_version <> e.want_meta OR e.state = 'dead' AND e.absent_at IS NULL)),
		(SELECT count(*) FROM lockstep.documents d JOIN lockstep.collections c ON c.id = d.collection_id
			WHERE c.name = $1 AND c.deleted_at IS NULL AND d.deleted_at IS NULL AND d.serving_version IS DISTINCT FROM d.target_version)`
	deadline := time.Now().Add(20 * time.Second)
	var entries, unswitched int
	for time.Now().Before(deadline) {
		if err := h.r.pool.QueryRow(ctx, unsettled, h.name).Scan(&entries, &unswitched); err != nil {
			h.fail("reading what is unsettled: %v", err)
			return
		}
		if entries == 0 && unswitched == 0 {
			return
		}
		pause(ctx, 2*time.Millisecond)
	}
	h.fail("P5: after faults stopped, %d entries and %d documents do not settle:%s", entries, unswitched, h.describeUnsettled(ctx))
}

// describeUnsettled lists entries with work left, for the one who reads a failure.
func (h *history) describeUnsettled(ctx context.Context) string {
	rows, err := h.r.pool.Query(ctx, `SELECT e.state || ' need ' || e.need || ' want ' || e.want_meta || ' has ' || e.meta_version || ' claims ' || e.claims || ' attempts ' || e.attempts
			|| ' due in ' || (e.not_before - now()) || ' leased ' || coalesce((e.lease_until - now())::text, 'no') || ' stopped ' || coalesce(c.stop_reason, 'no')
			|| ' index ' || i.state || coalesce(' error ' || e.last_error, '')
		FROM lockstep.index_entries e JOIN lockstep.indexes i ON i.id = e.index_id JOIN lockstep.collections c ON c.id = i.collection_id
		WHERE c.name = $1 AND (e.state IN ('pending', 'failed') OR e.state = 'indexed' AND e.meta_version <> e.want_meta OR e.state = 'dead' AND e.absent_at IS NULL)`, h.name)
	if err != nil {
		return err.Error()
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err.Error()
	}
	return "\n  " + strings.Join(lines, "\n  ")
}

// expected is what the ledger says a point must be.
type expected struct {
	doc   string
	point corpus.Point
}

// ledger reads all documents through the read path of GET /documents, holds them against the
// model and recomputes their ids, and returns the points they need.
func (h *history) ledger(ctx context.Context, c corpus.Collection, ix corpus.Index) map[corpus.ID]expected {
	out := map[corpus.ID]expected{}
	for _, doc := range h.docs {
		view, err := h.r.store.Document(ctx, c.ID, doc)
		if corpus.KindOf(err) == corpus.NotFound {
			if bad := h.m.final(doc, nil, 0, 0); bad != "" {
				h.fail("%s", bad)
			}
			continue
		}
		if err != nil {
			h.fail("reading %s: %v", doc, err)
			continue
		}
		var texts []string
		for _, k := range view.Chunks {
			texts = append(texts, k.Text)
		}
		if bad := h.m.final(doc, texts, valueOf(view.Metadata), view.TargetVersion); bad != "" {
			h.fail("%s", bad)
		}
		if view.ServingVersion != view.TargetVersion {
			h.fail("P5: %s serves version %d of %d", doc, view.ServingVersion, view.TargetVersion)
		}
		var meta int64
		if err := h.r.pool.QueryRow(ctx, "SELECT meta_version FROM lockstep.document_versions WHERE document_id = $1 AND version = $2",
			[16]byte(view.DocumentID), view.TargetVersion).Scan(&meta); err != nil {
			h.fail("reading the version of %s: %v", doc, err)
		}
		for _, k := range view.Chunks {
			var brought *corpus.Vectors
			if k.Text == bringsVector {
				brought = &corpus.Vectors{Dense: broughtVector}
			}
			id := corpus.PointID(c.ID, corpus.ChunkKey{ExternalID: doc, Content: corpus.HashChunk(k.Text, brought), Occurrence: k.Occurrence, Incarnation: k.Incarnation})
			if id != k.ID {
				h.fail("the id of %s at %d is %s; recomputed from what GET shows it is %s", doc, k.Ordinal, k.ID, id)
			}
			if k.Incarnation < view.IncarnationFloor && h.p.purge {
				// A chunk that lived before the floor was raised keeps its id.
				_ = k
			}
			e := expected{doc, corpus.Point{ID: k.ID, Payload: corpus.Payload{
				Owner: h.r.owner, Document: view.DocumentID, MetaVersion: meta, Bucket: corpus.Bucket(ix.Salt, k.ID), Metadata: view.Metadata,
			}}}
			if err := h.r.pool.QueryRow(ctx, "SELECT gen FROM lockstep.chunks WHERE id = $1", [16]byte(k.ID)).Scan(&e.point.Payload.Gen); err != nil {
				h.fail("reading chunk %s: %v", k.ID, err)
			}
			e.point.Vectors = h.vectors(ctx, k.Text)
			out[k.ID] = e
		}
	}
	return out
}

// vectors are those that a text must have in the index.
func (h *history) vectors(ctx context.Context, text string) corpus.Vectors {
	emb, err := h.r.model.Embed(ctx, corpus.EmbedRequest{Inputs: []corpus.EmbedInput{{Text: text}}, Heads: heads})
	if err != nil {
		h.fail("embedding: %v", err)
		return corpus.Vectors{}
	}
	v := emb[0].Vectors
	if text == bringsVector {
		length := 0.0
		for _, x := range broughtVector {
			length += float64(x) * float64(x)
		}
		v.Dense = slices.Clone(broughtVector)
		for i := range v.Dense {
			v.Dense[i] = float32(float64(v.Dense[i]) / math.Sqrt(length))
		}
	}
	return v
}

// compare holds both stores against the model: exactly the points the ledger needs, each whole.
func (h *history) compare(ctx context.Context) {
	c, ix, err := h.r.store.ResolveCollection(ctx, h.name)
	if err != nil {
		h.fail("resolving the collection: %v", err)
		return
	}
	want := h.ledger(ctx, c, ix)
	points, err := scrollAll(ctx, h.r, ix)
	if err != nil {
		h.fail("reading the index: %v", err)
		return
	}
	held := map[corpus.ID]bool{}
	for i := range points {
		p := &points[i]
		held[p.ID] = true
		e, ok := want[p.ID]
		if !ok {
			h.fail("P5: the index holds %s (gen %d), which no document needs", p.ID, p.Payload.Gen)
			continue
		}
		h.same(p, e)
	}
	for id, e := range want {
		if !held[id] {
			h.fail("P3: the index lacks %s of %s", id, e.doc)
		}
	}
}

// same compares a point with what it must be.
func (h *history) same(p *corpus.PointState, e expected) {
	w := e.point.Payload
	g := p.Payload
	switch {
	case len(p.Unreadable) > 0 || !p.HasOwner:
		h.fail("P5: point %s of %s is unreadable at %v", p.ID, e.doc, p.Unreadable)
	case g.Owner != w.Owner || g.Document != w.Document || g.Gen != w.Gen || g.MetaVersion != w.MetaVersion || g.Bucket != w.Bucket:
		h.fail("P5: point %s of %s carries %+v; the ledger says %+v", p.ID, e.doc, g, w)
	case string(g.Metadata.JSON()) != string(w.Metadata.JSON()):
		h.fail("P5: point %s of %s carries metadata %s; the document has %s", p.ID, e.doc, g.Metadata.JSON(), w.Metadata.JSON())
	case p.Vectors == nil || g.Checksum != corpus.ChecksumVectors(p.Vectors, ""):
		h.fail("P5: point %s of %s does not fit its checksum", p.ID, e.doc)
	case !near(p.Vectors, &e.point.Vectors):
		h.fail("P5: point %s of %s has vectors %v; its text has %v", p.ID, e.doc, p.Vectors, e.point.Vectors)
	}
}

func near(a, b *corpus.Vectors) bool {
	if len(a.Dense) != len(b.Dense) || a.Sparse == nil || b.Sparse == nil || !slices.Equal(a.Sparse.Indices, b.Sparse.Indices) {
		return false
	}
	close := func(x, y float32) bool { return math.Abs(float64(x-y)) < 1e-5 }
	return slices.EqualFunc(a.Dense, b.Dense, close) && slices.EqualFunc(a.Sparse.Values, b.Sparse.Values, close)
}

// livePoints are the points that documents need, as the index holds them.
func (h *history) livePoints(ctx context.Context) map[corpus.ID]expected {
	c, ix, err := h.r.store.ResolveCollection(ctx, h.name)
	if err != nil {
		h.fail("resolving the collection: %v", err)
		return nil
	}
	return h.ledger(ctx, c, ix)
}

// unharmed asserts that late requests left live points as they were and brought back nothing
// but the dead (P4).
func (h *history) unharmed(ctx context.Context, live map[corpus.ID]expected) {
	_, ix, err := h.r.store.ResolveCollection(ctx, h.name)
	if err != nil {
		h.fail("resolving the collection: %v", err)
		return
	}
	points, err := scrollAll(ctx, h.r, ix)
	if err != nil {
		h.fail("reading the index: %v", err)
		return
	}
	left := len(live)
	for i := range points {
		if e, ok := live[points[i].ID]; ok {
			left--
			h.same(&points[i], e)
		}
	}
	if left != 0 {
		h.fail("P4: late requests removed %d live points", left)
	}
	h.search(nil)
}

// clean removes what the history left in the stores.
func (h *history) clean() {
	h.mu.Lock()
	for _, i := range h.instances {
		h.ended.Go(i.stop)
	}
	h.instances = nil
	h.mu.Unlock()
	h.drain(true)
	ctx := context.Background()
	if err := h.r.store.DeleteCollection(ctx, h.name); err != nil && corpus.KindOf(err) != corpus.NotFound {
		h.fail("deleting the collection: %v", err)
	}
	h.r.sweepUp(ctx, h.fail)
}

// sweepUp clears deleted collections and reconcile's history.
func (r *rig) sweepUp(ctx context.Context, fail func(string, ...any)) {
	retired, err := r.store.RetiredIndexes(ctx)
	if err != nil {
		fail("listing retired indexes: %v", err)
	}
	for _, ix := range retired {
		if err := r.index.DropIndex(ctx, ix); err != nil {
			fail("dropping %s: %v", ix.QdrantName, err)
		}
		if err := r.store.ForgetIndex(ctx, ix.ID); err != nil {
			fail("forgetting %s: %v", ix.QdrantName, err)
		}
	}
	if err := r.store.ClearCollections(ctx); err != nil {
		fail("clearing: %v", err)
	}
	if err := r.store.ForgetRuns(ctx); err != nil {
		fail("forgetting runs: %v", err)
	}
	for _, table := range []string{"reconcile_findings", "reconcile_suspects", "reconcile_ranges", "reconcile_targets", "reconcile_runs", "reconcile_scrub", "reconcile_deletes", "index_stamps", "incarnation_floors"} {
		if _, err := r.pool.Exec(ctx, "DELETE FROM lockstep."+table); err != nil {
			fail("clearing %s: %v", table, err)
		}
	}
}
