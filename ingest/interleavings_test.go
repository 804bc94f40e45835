package ingest_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/lockstep-db/lockstep/embedder/fake"
	"github.com/lockstep-db/lockstep/ingest"
	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
)

// The tests of this file play the schedules by which a naive reading of the protocol breaks.
// Their numbers are those of the table in docs/consistency.md.

// hold makes the model stop at texts that contain word until release is called.
type hold struct {
	word    atomic.Value // string; empty holds nothing
	reached chan struct{}
	open    chan struct{}
	once    sync.Once
}

func newHold(word string) *hold {
	h := &hold{reached: make(chan struct{}, 100), open: make(chan struct{})}
	h.word.Store(word)
	return h
}

func (h *hold) release() { h.once.Do(func() { close(h.open) }) }

func (h *hold) gate(ctx context.Context, req corpus.EmbedRequest) error {
	for _, in := range req.Inputs {
		if strings.Contains(in.Text, h.word.Load().(string)) {
			select {
			case h.reached <- struct{}{}:
			default:
			}
			select {
			case <-h.open:
			case <-ctx.Done():
				return corpus.Wrap(corpus.Unavailable, "model", "stopped", ctx.Err())
			}
		}
	}
	return nil
}

// prepared is setup with a model that holds at a word.
func prepared(t *testing.T, word string, opts ...option) (*bundle, *hold) {
	t.Helper()
	b := &bundle{t: t, url: pgtest.New(t), index: newFakeIndex(), model: fake.New(8, corpus.Dense)}
	h := newHold(word)
	b.model.Gate = h.gate
	b.connect(opts...)
	b.start()
	t.Cleanup(h.release) // before the service is stopped
	return b, h
}

func (b *bundle) one(sql string, args []any, dest ...any) {
	b.t.Helper()
	conn, err := pgx.Connect(b.ctx(), b.url)
	if err != nil {
		b.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := conn.QueryRow(b.ctx(), sql, args...).Scan(dest...); err != nil {
		b.t.Fatalf("%s: %v", sql, err)
	}
}

func (b *bundle) exec(sql string, args ...any) {
	b.t.Helper()
	conn, err := pgx.Connect(b.ctx(), b.url)
	if err != nil {
		b.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(b.ctx(), sql, args...); err != nil {
		b.t.Fatalf("%s: %v", sql, err)
	}
}

func (b *bundle) settled() {
	b.t.Helper()
	b.eventually("everything settles", func() error {
		var open int
		b.one(`SELECT count(*) FROM lockstep.index_entries WHERE state = 'pending' OR state = 'indexed' AND meta_version <> want_meta
			OR state = 'dead' AND absent_at IS NULL`, nil, &open)
		if open > 0 {
			return fmt.Errorf("%d entries are open", open)
		}
		return nil
	})
}

func await[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(60 * time.Second):
		t.Fatalf("%s: not within a minute", what)
		panic("unreachable")
	}
}

// A1: vectors that a caller brought exist nowhere but in the request.
func TestA1BroughtVectorsSurviveTheDeathOfTheirProcess(t *testing.T) {
	t.Parallel()
	b := &bundle{t: t, url: pgtest.New(t), index: newFakeIndex(), model: fake.New(8, corpus.Dense)}
	p := &process{dieAt: ingest.StepAccepted, died: make(chan struct{})}
	p.after.Store(1)
	b.connect(func(c *ingest.Config) {
		c.Index, c.At, c.Lease = faultyIndex{b.index, p}, p.at, 50*time.Millisecond
	})
	b.cfg.Ledger = faultyLedger{b.store, p}
	b.start()
	if _, err := b.svc.CreateCollection(b.ctx(), "c", corpus.Settings{Model: corpus.ExternalModel, DenseSize: 3}); err != nil {
		t.Fatal(err)
	}
	in := corpus.DocumentInput{ID: "v", Chunks: []corpus.ChunkInput{{Text: "brought", Vectors: &corpus.Vectors{Dense: []float32{0, 3, 4}}}}}
	if _, err := b.svc.Ingest(b.ctx(), corpus.IngestRequest{Collection: "c", Documents: []corpus.DocumentInput{in}}); !errors.Is(err, errDead) {
		t.Logf("the dying process answered %v", err)
	}
	await(t, p.died, "the process dies once the document is accepted")
	b.stop()
	_, ix := b.collection()
	if n := len(b.index.points(ix)); n != 0 {
		t.Fatalf("%d points before anybody could write them", n)
	}
	b.cfg.Ledger, b.cfg.Index, b.cfg.At = b.store, b.index, nil
	b.start()
	b.settled()
	for _, pt := range b.index.points(ix) {
		if d := pt.Vectors.Dense; len(d) != 3 || d[0] != 0 || d[1] != 0.6 || d[2] != 0.8 {
			t.Errorf("vector %v; want the brought one at length 1", d)
		}
	}
	if got, _ := b.visible("v"); !same(got, []string{"brought"}) {
		t.Errorf("visible: %q", got)
	}
}

// A3: delete, then put: the deleted text is found again.
func TestA3DeletedTextStaysDeletedWhileTheNextVersionIsOnItsWay(t *testing.T) {
	t.Parallel()
	b, h := prepared(t, "slow")
	b.ingest(true, texts("a", "old text"))
	if _, err := b.svc.Delete(b.ctx(), "c", "a", false); err != nil {
		t.Fatal(err)
	}
	b.ingest(false, texts("a", "slow new text"))
	await(t, h.reached, "the new version is being embedded")
	if got, _ := b.visible("a"); len(got) != 0 {
		t.Errorf("visible between delete and switch: %q", got)
	}
	if v, err := b.svc.Document(b.ctx(), "c", "a"); err != nil || v.ServingVersion != 0 || v.TargetVersion != 3 {
		t.Errorf("between delete and switch: %+v, %v", v, err)
	}
	h.release()
	b.settled()
	if got, _ := b.visible("a"); !same(got, []string{"slow new text"}) {
		t.Errorf("visible in the end: %q", got)
	}
}

// A3, second half: a version accepted before the delete must not serve after it.
func TestA3AWorkerOfADeletedVersionDoesNotServeIt(t *testing.T) {
	t.Parallel()
	b, h := prepared(t, "slow")
	b.ingest(false, texts("a", "slow text"))
	await(t, h.reached, "the version is being embedded")
	if _, err := b.svc.Delete(b.ctx(), "c", "a", false); err != nil {
		t.Fatal(err)
	}
	h.release() // its upsert lands and its mark arrives now
	b.settled()
	if got, _ := b.visible("a"); len(got) != 0 {
		t.Errorf("visible: %q", got)
	}
	var rows, textual, vectors int
	b.one(`SELECT (SELECT count(*) FROM lockstep.document_versions), (SELECT count(*) FROM lockstep.chunks WHERE text IS NOT NULL),
		(SELECT count(*) FROM lockstep.chunk_vectors)`, nil, &rows, &textual, &vectors)
	if rows+textual+vectors != 0 {
		t.Errorf("after the delete %d versions, %d texts and %d vectors are left", rows, textual, vectors)
	}
}

// A4: between acceptance and switch a result shows the old text with the old metadata; the
// same content with other metadata is a metadata change, not a no-op.
func TestA4MetadataBelongsToItsVersion(t *testing.T) {
	t.Parallel()
	b, h := prepared(t, "slow")
	first := b.ingest(true, with(texts("a", "kept", "old"), corpus.Metadata{"v": "1"}))[0]
	b.ingest(false, with(texts("a", "slow new", "kept"), corpus.Metadata{"v": "2"}))
	await(t, h.reached, "the second version is being embedded")
	if got, md := b.visible("a"); !same(got, []string{"kept", "old"}) || md["v"] != "1" {
		t.Errorf("while version 2 is on its way: %q with %v", got, md)
	}
	_, ix := b.collection()
	if p := b.index.points(ix)[first.PointIDs[0]]; p.Payload.Metadata["v"] != "1" {
		t.Errorf("the kept chunk's point already says %v", p.Payload.Metadata)
	}
	h.release()
	b.settled()
	if got, md := b.visible("a"); !same(got, []string{"slow new", "kept"}) || md["v"] != "2" {
		t.Errorf("after the switch: %q with %v", got, md)
	}
	if p := b.index.points(ix)[first.PointIDs[0]]; p.Payload.Metadata["v"] != "2" {
		t.Errorf("the kept chunk's point still says %v", p.Payload.Metadata)
	}
	before, _ := b.model.Counts()
	r := b.ingest(true, with(texts("a", "slow new", "kept"), corpus.Metadata{"v": "3"}))[0]
	if r.Status != corpus.StatusIndexed || r.Version != 2 || r.ChunksEmbedded != 0 {
		t.Errorf("metadata change: %+v", r)
	}
	if after, _ := b.model.Counts(); after != before {
		t.Error("a metadata change was embedded")
	}
	for id, p := range b.index.points(ix) {
		if p.Payload.Metadata["v"] != "3" {
			t.Errorf("point %s says %v after a change that was waited for", id, p.Payload.Metadata)
		}
	}
}

// A5: a PATCH overtakes the insert that was built before it.
func TestA5APatchThatOvertakesTheInsertIsNotLost(t *testing.T) {
	t.Parallel()
	b, h := prepared(t, "slow")
	b.ingest(false, with(texts("a", "slow text"), corpus.Metadata{"v": "1"}))
	await(t, h.reached, "the insert was built with metadata 1")
	if _, err := b.svc.Patch(b.ctx(), "c", "a", corpus.Metadata{"v": "2"}, false); err != nil {
		t.Fatal(err)
	}
	h.release()
	b.settled()
	_, ix := b.collection()
	for id, p := range b.index.points(ix) {
		if p.Payload.Metadata["v"] != "2" {
			t.Errorf("point %s says %v", id, p.Payload.Metadata)
		}
	}
}

// A5, second half: the process dies between the PATCH's commit and its write.
func TestA5APatchSurvivesTheDeathOfItsProcess(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.ingest(true, with(texts("a", "text"), corpus.Metadata{"v": "1"}))
	b.stop()
	c, ix := b.collection()
	if _, err := b.store.PatchDocument(b.ctx(), c.ID, "a", corpus.Metadata{"v": "2"}); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.settled()
	for id, p := range b.index.points(ix) {
		if p.Payload.Metadata["v"] != "2" {
			t.Errorf("point %s says %v", id, p.Payload.Metadata)
		}
	}
}

// A6: a repair that is late must not bring back older metadata, and a point that holds a
// higher version than its document is still repaired.
func TestA6ARepairNeverBringsBackOlderMetadata(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.ingest(true, with(texts("a", "text"), corpus.Metadata{"v": "1"}))[0]
	_, ix := b.collection()
	// A repair is sent with metadata 1 and hangs in the network.
	var once sync.Once
	hung := make(chan struct{})
	b.index.set(func(op string, _ []corpus.ID) (ft fault) {
		if op == "rewrite" {
			once.Do(func() { ft = fault{lose: true, late: true}; close(hung) })
		}
		return ft
	})
	b.exec(`UPDATE lockstep.index_entries SET state = 'pending', need = 'rewrite', meta_version = 0, lease_token = NULL, not_before = now()`)
	b.svc.Wake()
	await(t, hung, "the repair is under way")
	if p, err := b.svc.Patch(b.ctx(), "c", "a", corpus.Metadata{"v": "2"}, true); err != nil || p.Status != corpus.StatusIndexed {
		t.Fatalf("patch: %+v %v", p, err)
	}
	b.settled()
	b.index.mu.Lock()
	for _, l := range b.index.late {
		l.apply()
	}
	b.index.mu.Unlock()
	if p := b.index.points(ix)[r.PointIDs[0]]; p.Payload.Metadata["v"] != "2" {
		t.Errorf("after the late repair the point says %v", p.Payload.Metadata)
	}
}

func TestA6APointWithAHigherVersionIsOvertaken(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.ingest(true, with(texts("a", "text"), corpus.Metadata{"v": "1"}))[0]
	_, ix := b.collection()
	p := b.index.points(ix)[r.PointIDs[0]]
	p.Payload.MetaVersion += 1000 // above the sequence, too
	p.Payload.Metadata = corpus.Metadata{"v": "forged"}
	b.index.put(ix, p)
	b.exec(`UPDATE lockstep.index_entries SET state = 'pending', need = 'rewrite', meta_version = 0, lease_token = NULL, not_before = now()`)
	b.svc.Wake()
	b.settled()
	got := b.index.points(ix)[r.PointIDs[0]]
	if got.Payload.Metadata["v"] != "1" || got.Payload.MetaVersion <= p.Payload.MetaVersion {
		t.Errorf("the point says %v at version %d; the forged one was %d", got.Payload.Metadata, got.Payload.MetaVersion, p.Payload.MetaVersion)
	}
}

// A6, for metadata alone: Completed of a guarded write does not say that it was let through.
func TestA6APatchOvertakesAPointWithAHigherVersion(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.ingest(true, with(texts("a", "text"), corpus.Metadata{"v": "1"}))[0]
	_, ix := b.collection()
	p := b.index.points(ix)[r.PointIDs[0]]
	p.Payload.MetaVersion += 1000
	p.Payload.Metadata = corpus.Metadata{"v": "forged"}
	b.index.put(ix, p)
	if got, err := b.svc.Patch(b.ctx(), "c", "a", corpus.Metadata{"v": "2"}, true); err != nil || got.Status != corpus.StatusIndexed {
		t.Fatalf("%+v, %v", got, err)
	}
	if got := b.index.points(ix)[r.PointIDs[0]]; got.Payload.Metadata["v"] != "2" || got.Payload.MetaVersion <= p.Payload.MetaVersion {
		t.Errorf("the point says %v at version %d; the forged one was %d", got.Payload.Metadata, got.Payload.MetaVersion, p.Payload.MetaVersion)
	}
}

// A point that vanished is noticed when its metadata is written, and written again whole.
func TestAVanishedPointIsWrittenAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.ingest(true, texts("a", "text"))[0]
	_, ix := b.collection()
	if err := b.index.DeletePoints(b.ctx(), ix, r.PointIDs); err != nil {
		t.Fatal(err)
	}
	if got, err := b.svc.Patch(b.ctx(), "c", "a", corpus.Metadata{"v": "2"}, true); err != nil || got.Status != corpus.StatusIndexed {
		t.Fatalf("%+v, %v", got, err)
	}
	if p, ok := b.index.points(ix)[r.PointIDs[0]]; !ok || p.Payload.Metadata["v"] != "2" {
		t.Errorf("the point: %v, %+v", ok, p.Payload)
	}
}

// Half of a batch takes effect: the other half is in an unknown state, and is looked at again.
func TestAHalfAppliedBatchIsCompleted(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *ingest.Config) { c.Pause = time.Millisecond })
	b.ingest(true, texts("x", "makes the collection"))
	var once sync.Once
	b.index.set(func(op string, ids []corpus.ID) (ft fault) {
		if op == "insert" && len(ids) > 1 {
			once.Do(func() { ft = fault{half: true} })
		}
		return ft
	})
	r := b.ingest(true, texts("a", "1", "2", "3", "4", "5", "6"))[0]
	_, ix := b.collection()
	held := b.index.points(ix)
	for _, id := range r.PointIDs {
		if _, ok := held[id]; !ok {
			t.Errorf("%s serves and is not in the index", id)
		}
	}
}

// A delete that was completed is believed when the point was read absent, not before.
func TestADeleteIsConfirmedByReading(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *ingest.Config) { c.Pause = time.Millisecond })
	b.ingest(true, texts("a", "one"))
	_, ix := b.collection()
	pretended := 0
	b.index.set(func(op string, _ []corpus.ID) (ft fault) {
		if op == "delete" && pretended < 3 {
			pretended++
			ft = fault{pretend: true}
		}
		return ft
	})
	if r, err := b.svc.Delete(b.ctx(), "c", "a", true); err != nil || r.Status != corpus.StatusIndexed {
		t.Fatalf("%+v, %v", r, err)
	}
	if n := len(b.index.points(ix)); n != 0 {
		t.Errorf("%d points after a delete that was waited for", n)
	}
}

// A7: chunks that the next version drops serve until the switch.
func TestA7WhatServesIsNotDeletedBeforeTheSwitch(t *testing.T) {
	t.Parallel()
	b, h := prepared(t, "slow")
	b.ingest(true, texts("a", "old"))
	b.ingest(false, texts("a", "slow new"))
	await(t, h.reached, "the new version is being embedded")
	// Several turns of the reaper go by.
	for range 5 {
		b.svc.Wake()
		<-time.After(20 * time.Millisecond)
	}
	if got, _ := b.visible("a"); !same(got, []string{"old"}) {
		t.Errorf("before the switch: %q", got)
	}
	if _, _, _, deletes := b.index.counts(); deletes != 0 {
		t.Errorf("%d deletes were sent before the switch", deletes)
	}
	h.release()
	b.settled()
	if got, _ := b.visible("a"); !same(got, []string{"slow new"}) {
		t.Errorf("after the switch: %q", got)
	}
}

// A8: put B, then put A again while B is on its way.
func TestA8AFlipBackIsComparedWithTheTarget(t *testing.T) {
	t.Parallel()
	b, h := prepared(t, "slow")
	b.ingest(true, texts("a", "A"))
	b.ingest(false, texts("a", "slow B"))
	await(t, h.reached, "B is being embedded")
	r := b.ingest(false, texts("a", "A"))[0]
	if r.Status != corpus.StatusAccepted || r.Version != 3 {
		t.Errorf("flip back: %+v", r)
	}
	h.release()
	b.settled()
	if got, _ := b.visible("a"); !same(got, []string{"A"}) {
		t.Errorf("visible: %q", got)
	}
}

// A9: after a purge the same text takes an id that was never used.
func TestA9APurgeRaisesTheFloorForEver(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *ingest.Config) { c.Grace = time.Millisecond })
	seen := map[corpus.ID]bool{}
	for life := range 3 {
		r := b.ingest(true, texts("a", "text"))[0]
		if seen[r.PointIDs[0]] {
			t.Fatalf("life %d has an id of an earlier one: %v", life, r.PointIDs[0])
		}
		seen[r.PointIDs[0]] = true
		v, err := b.svc.Document(b.ctx(), "c", "a")
		if err != nil || v.IncarnationFloor != uint32(life) || v.Chunks[0].Incarnation != uint32(life) {
			t.Errorf("life %d: floor %d, incarnation %+v, %v", life, v.IncarnationFloor, v.Chunks, err)
		}
		if _, err := b.svc.Delete(b.ctx(), "c", "a", true); err != nil {
			t.Fatal(err)
		}
		b.eventually("the document is purged", func() error {
			var left, floors int
			b.one(`SELECT (SELECT count(*) FROM lockstep.documents) + (SELECT count(*) FROM lockstep.chunks) + (SELECT count(*) FROM lockstep.index_entries),
				(SELECT count(*) FROM lockstep.incarnation_floors)`, nil, &left, &floors)
			if left != 0 || floors != 1 {
				return fmt.Errorf("%d rows left, %d floors", left, floors)
			}
			return nil
		})
		if _, err := b.svc.Delete(b.ctx(), "c", "a", false); corpus.CodeOf(err) != "document_not_found" {
			t.Errorf("delete after the purge: %v", err)
		}
	}
}

// A9: a late upsert lands after the point was read absent: the purge reads once more.
func TestA9ThePurgeReadsOnceMore(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *ingest.Config) { c.Grace = 300 * time.Millisecond })
	r := b.ingest(true, texts("a", "text"))[0]
	_, ix := b.collection()
	late := b.index.points(ix)[r.PointIDs[0]]
	if _, err := b.svc.Delete(b.ctx(), "c", "a", true); err != nil {
		t.Fatal(err)
	}
	b.index.put(ix, late)
	b.eventually("the point is deleted again and the tombstone purged", func() error {
		var left int
		b.one("SELECT count(*) FROM lockstep.chunks", nil, &left)
		if left != 0 {
			return fmt.Errorf("%d chunks", left)
		}
		return nil
	})
	if n := len(b.index.points(ix)); n != 0 {
		t.Errorf("the tombstone was purged while its point was there")
	}
}

// A10: Completed says nothing about what the point holds.
func TestA10AnotherLifesPointIsRewritten(t *testing.T) {
	t.Parallel()
	b, h := prepared(t, "slow")
	r := b.ingest(false, with(texts("a", "slow text"), corpus.Metadata{"v": "1"}))[0]
	await(t, h.reached, "the text is being embedded")
	_, ix := b.collection()
	stray := corpus.Point{ID: r.PointIDs[0], Vectors: corpus.Vectors{Dense: make([]float32, 8)},
		Payload: corpus.Payload{Owner: b.cfg.Owner, Document: r.DocumentID, Gen: 0, MetaVersion: 0, Metadata: corpus.Metadata{"v": "stray"}}}
	b.index.put(ix, stray)
	// The first attempt is lost on its way, so the next is no first claim.
	var once sync.Once
	b.index.set(func(op string, _ []corpus.ID) (ft fault) {
		if op == "insert" {
			once.Do(func() { ft = fault{lose: true} })
		}
		return ft
	})
	h.release()
	b.settled()
	p := b.index.points(ix)[r.PointIDs[0]]
	if p.Payload.Metadata["v"] != "1" || p.Payload.Gen == 0 || length(p.Vectors.Dense) == 0 {
		t.Errorf("the stray point was marked as ours: %+v", p.Payload)
	}
}

func length(v []float32) (sum float32) {
	for _, x := range v {
		sum += x * x
	}
	return sum
}

// A10: what an earlier claim has written is not embedded again.
func TestA10AWriteThatLandedIsReadBackNotRepeated(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var once sync.Once
	b.index.set(func(op string, _ []corpus.ID) (ft fault) {
		if op == "insert" {
			once.Do(func() { ft = fault{loseReply: true} })
		}
		return ft
	})
	r := b.ingest(true, texts("a", "one", "two"))[0]
	if r.Status != corpus.StatusIndexed {
		t.Fatalf("%+v", r)
	}
	if _, n := b.model.Counts(); n != 2 {
		t.Errorf("%d texts were embedded; want 2", n)
	}
	if inserts, rewrites, _, _ := b.index.counts(); inserts != 2 || rewrites != 0 {
		t.Errorf("%d inserts and %d rewrites; want 2 and 0", inserts, rewrites)
	}
}

// A11: two workers settle the last two entries of a version at once.
func TestA11TheLastTwoMarksSwitch(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.ingest(true, texts("x", "makes the collection"))
	b.stop()
	c, ix := b.collection()
	for round := range 100 { // each meets by chance, more rarely on a busy machine
		id := fmt.Sprintf("doc %d", round)
		doc := corpus.PreparedDocument{ExternalID: id, Content: corpus.ContentHash{byte(round), 1}, Metadata: corpus.Metadata{}, Chunks: []corpus.PreparedChunk{
			{Text: "one", Content: corpus.HashChunk("one", nil)}, {Text: "two", Content: corpus.HashChunk("two", nil)}}}
		_, work, err := b.store.Accept(b.ctx(), c.ID, []corpus.PreparedDocument{doc}, corpus.Lease{Token: corpus.ID{1}, Max: 10, For: time.Minute})
		if err != nil || len(work) != 2 {
			t.Fatal(len(work), err)
		}
		var wg sync.WaitGroup
		start := make(chan struct{})
		for _, e := range work {
			wg.Go(func() {
				<-start
				if _, err := b.store.Settle(b.ctx(), ix, []corpus.EntryResult{{Chunk: e.Chunk, Document: e.Document, Token: e.Token, Outcome: corpus.EntryDone, Meta: e.WantMeta}}); err != nil {
					t.Error(err)
				}
			})
		}
		close(start)
		wg.Wait()
		v, err := b.store.Document(b.ctx(), c.ID, id)
		if err != nil || v.ServingVersion != 1 {
			t.Fatalf("round %d: serving version %d, %v: both entries are marked and nobody switched", round, v.ServingVersion, err)
		}
	}
}

// B13: the checksum is of the vectors that it travels with, whichever attempt won.
func TestB13TheChecksumTravelsWithItsVectors(t *testing.T) {
	t.Parallel()
	b := setup(t)
	n := 0
	b.index.set(func(op string, _ []corpus.ID) (ft fault) {
		if n++; op == "insert" && n%2 == 1 {
			ft = fault{lose: true, late: true}
		}
		return ft
	})
	b.ingest(true, texts("a", "one"), texts("b", "two"), texts("c", "three"))
	b.index.mu.Lock()
	for _, l := range b.index.late {
		l.apply()
	}
	b.index.mu.Unlock()
	_, ix := b.collection()
	for id, p := range b.index.points(ix) {
		if want := corpus.ChecksumVectors(&p.Vectors, ix.Layout.DenseType); p.Payload.Checksum != want {
			t.Errorf("point %s carries checksum %s of vectors that sum to %s", id, p.Payload.Checksum, want)
		}
		if want := corpus.Bucket(ix.Salt, id); p.Payload.Bucket != want {
			t.Errorf("point %s is in bucket %d; want %d", id, p.Payload.Bucket, want)
		}
	}
}

// B14: other vectors for the same text are another content.
func TestB14ChangedVectorsChangeTheID(t *testing.T) {
	t.Parallel()
	b := setup(t)
	if _, err := b.svc.CreateCollection(b.ctx(), "c", corpus.Settings{Model: corpus.ExternalModel, DenseSize: 2}); err != nil {
		t.Fatal(err)
	}
	put := func(v ...float32) corpus.DocumentResult {
		return b.ingest(true, corpus.DocumentInput{ID: "a", Chunks: []corpus.ChunkInput{{Text: "same", Vectors: &corpus.Vectors{Dense: v}}}})[0]
	}
	first, again, other := put(1, 0), put(1, 0), put(0, 1)
	if again.Status != corpus.StatusUnchanged || other.Version != 2 || other.PointIDs[0] == first.PointIDs[0] {
		t.Errorf("%+v, %+v, %+v", first, again, other)
	}
	b.settled()
	_, ix := b.collection()
	if p := b.index.points(ix); len(p) != 1 || p[other.PointIDs[0]].Vectors.Dense[1] != 1 {
		t.Errorf("points: %v", p)
	}
}

// B15: an index is built while documents come in; none is missing after the switch, and the
// building one holds up no version.
func TestB15AnIndexIsBuiltUnderIngestion(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for i := range 20 {
		b.ingest(false, texts(fmt.Sprint(i), fmt.Sprintf("text %d", i)))
	}
	_, old := b.collection()
	// A second service with another model takes over.
	next := fake.New(6, corpus.Dense)
	var blocked atomic.Bool
	blocked.Store(true)
	next.Gate = func(context.Context, corpus.EmbedRequest) error {
		if blocked.Load() {
			return corpus.Errorf(corpus.Unavailable, "model", "not yet")
		}
		return nil
	}
	cfg := b.cfg
	cfg.Embedder, cfg.Pause = next, time.Millisecond
	second := ingest.New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- second.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) && err != nil {
			t.Error(err)
		}
	})
	building, err := second.Reembed(b.ctx(), "c")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.Reembed(b.ctx(), "c"); corpus.CodeOf(err) != "index_building" {
		t.Errorf("a second building index: %v", err)
	}
	// While it is stuck, versions switch all the same.
	r := b.ingest(true, texts("0", "text 0 changed"), texts("new", "a new text"))
	if r[0].Status != corpus.StatusIndexed || r[1].Status != corpus.StatusIndexed {
		t.Errorf("a building index held up a version: %+v", r)
	}
	if _, err := b.svc.Delete(b.ctx(), "c", "1", false); err != nil {
		t.Fatal(err)
	}
	blocked.Store(false)
	b.eventually("the new index serves", func() error {
		if _, ix := b.collection(); ix.ID != building.ID {
			return errors.New("not yet")
		}
		return nil
	})
	if got, _ := b.visible("0"); !same(got, []string{"text 0 changed"}) {
		t.Errorf("document 0: %q", got)
	}
	for i := 2; i < 20; i++ {
		if got, _ := b.visible(fmt.Sprint(i)); len(got) != 1 {
			t.Errorf("document %d after the switch: %q", i, got)
		}
	}
	if got, _ := b.visible("1"); len(got) != 0 {
		t.Errorf("deleted document 1: %q", got)
	}
	b.eventually("the old index is dropped and forgotten", func() error {
		var n int
		b.one("SELECT count(*) FROM lockstep.indexes WHERE id = $1", []any{[16]byte(old.ID)}, &n)
		if b.index.points(old) != nil || n != 0 {
			return errors.New("not yet")
		}
		return nil
	})
}

// B16: a lost index is never created by a write; it is built again under a new name.
func TestB16ALostIndexIsNotCreatedByAWrite(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *ingest.Config) { c.Pause = time.Millisecond })
	b.ingest(true, texts("a", "one"), texts("b", "two"))
	_, lost := b.collection()
	if err := b.index.DropIndex(b.ctx(), lost); err != nil {
		t.Fatal(err)
	}
	b.ingest(false, texts("c", "three"))
	b.eventually("the write met NotFound", func() error {
		var why *string
		b.one("SELECT max(last_error) FROM lockstep.index_entries WHERE state = 'pending'", nil, &why)
		if why == nil || !strings.Contains(*why, "does not exist") {
			return fmt.Errorf("last error %v", why)
		}
		return nil
	})
	b.index.mu.Lock()
	created := b.index.created[lost.QdrantName]
	b.index.mu.Unlock()
	if created != 1 {
		t.Fatalf("%s was created %d times", lost.QdrantName, created)
	}
	fresh, err := b.store.RebuildIndex(b.ctx(), lost)
	if err != nil || fresh.QdrantName == lost.QdrantName {
		t.Fatal(fresh, err)
	}
	if _, err := b.store.RebuildIndex(b.ctx(), lost); corpus.CodeOf(err) != "index_retired" {
		t.Errorf("a second rebuild: %v", err)
	}
	b.svc.Wake()
	b.settled()
	for _, id := range []string{"a", "b", "c"} {
		if got, _ := b.visible(id); len(got) != 1 {
			t.Errorf("%s after the rebuild: %q", id, got)
		}
	}
}

// B19: the primary key decides between an ingest and a tombstone for the same id.
func TestB19AnIDWithATombstoneTakesTheNextIncarnation(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.ingest(true, texts("x", "makes the collection"))
	c, ix := b.collection()
	key := corpus.ChunkKey{ExternalID: "a", Content: corpus.HashChunk("text", nil)}
	var want corpus.ID
	for key.Incarnation = range 3 { // two orphans of earlier lives that the ledger never knew
		want = corpus.PointID(c.ID, key)
		if key.Incarnation < 2 {
			fates, err := b.store.EnterTombstones(b.ctx(), ix, []corpus.OrphanClaim{{ID: want}}, corpus.DeleteBudget{Limit: 100})
			if err != nil || fates[0] != corpus.OrphanDead {
				t.Fatal(fates, err)
			}
		}
	}
	r := b.ingest(true, texts("a", "text"))[0]
	if r.Status != corpus.StatusIndexed || r.PointIDs[0] != want {
		t.Errorf("%+v; want point %v", r, want)
	}
	if got, _ := b.visible("a"); !same(got, []string{"text"}) {
		t.Errorf("visible: %q", got)
	}
}

// B24: poison fails alone, and is tried again when its document is sent again.
func TestB24PoisonFailsAlone(t *testing.T) {
	t.Parallel()
	b := &bundle{t: t, url: pgtest.New(t), index: newFakeIndex(), model: fake.New(8, corpus.Dense)}
	var cured atomic.Bool
	b.model.Fail = func(text string) error {
		if strings.Contains(text, "poison") && !cured.Load() {
			return corpus.Errorf(corpus.Invalid, "bad_input", "the model refuses this text")
		}
		return nil
	}
	b.connect()
	b.start()
	out, err := b.svc.Ingest(b.ctx(), corpus.IngestRequest{Collection: "c", Wait: true, Documents: []corpus.DocumentInput{
		texts("good", "fine"), texts("bad", "fine too", "poison"), texts("other", "fine as well")}})
	if err != nil {
		t.Fatal(err)
	}
	if out[0].Status != corpus.StatusIndexed || out[2].Status != corpus.StatusIndexed {
		t.Errorf("neighbours: %+v, %+v", out[0], out[2])
	}
	if out[1].Status != corpus.StatusFailed || out[1].Err == nil || !strings.Contains(out[1].Err.Detail, "refuses") {
		t.Errorf("poison: %+v", out[1])
	}
	if got, _ := b.visible("bad"); len(got) != 0 {
		t.Errorf("half a version is visible: %q", got)
	}
	v, err := b.svc.Collection(b.ctx(), "c")
	if err != nil || v.Failed != 1 {
		t.Errorf("failed entries: %d, %v", v.Failed, err)
	}
	cured.Store(true)
	again := b.ingest(true, texts("bad", "fine too", "poison"))[0]
	if again.Status != corpus.StatusUnchanged || again.Version != 1 {
		t.Errorf("sent again: %+v", again)
	}
	if got, _ := b.visible("bad"); !same(got, []string{"fine too", "poison"}) {
		t.Errorf("after the cure: %q", got)
	}
}

// B24: a version that is overtaken before it serves does not leave its caller hanging.
func TestB24AnOvertakenVersionIsSuperseded(t *testing.T) {
	t.Parallel()
	b, h := prepared(t, "slow")
	type answer struct {
		r   []corpus.DocumentResult
		err error
	}
	answers := make(chan answer, 1)
	b.ingest(true, texts("x", "makes the collection"))
	go func() {
		r, err := b.svc.Ingest(context.Background(), corpus.IngestRequest{Collection: "c", Wait: true, Documents: []corpus.DocumentInput{texts("a", "slow first")}})
		answers <- answer{r, err}
	}()
	await(t, h.reached, "the first version is being embedded")
	b.ingest(false, texts("a", "second"))
	got := await(t, answers, "the first caller is answered")
	if got.err != nil || got.r[0].Status != corpus.StatusSuperseded {
		t.Errorf("%+v", got)
	}
}

// A refused batch is halved until the point that is wrong stands alone.
func TestARefusedPointFailsAlone(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.ingest(true, texts("x", "makes the collection"))
	c, _ := b.collection()
	bad := corpus.PointID(c.ID, corpus.ChunkKey{ExternalID: "3", Content: corpus.HashChunk("text 3", nil)})
	b.index.set(func(op string, ids []corpus.ID) (ft fault) {
		if op == "insert" && slices.Contains(ids, bad) {
			ft = fault{lose: true, err: corpus.Errorf(corpus.Invalid, "index_refused", "the index refused the request")}
		}
		return ft
	})
	var docs []corpus.DocumentInput
	for i := range 8 {
		docs = append(docs, texts(fmt.Sprint(i), fmt.Sprintf("text %d", i)))
	}
	out, err := b.svc.Ingest(b.ctx(), corpus.IngestRequest{Collection: "c", Documents: docs, Wait: true})
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range out {
		want := corpus.StatusIndexed
		if i == 3 {
			want = corpus.StatusFailed
		}
		if r.Status != want {
			t.Errorf("document %d: %+v", i, r)
		}
	}
}

// An index that cannot answer is no reason to give up, however long.
func TestAnOutageFailsNothing(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *ingest.Config) { c.Pause, c.Attempts = time.Millisecond, 2 })
	b.index.set(func(string, []corpus.ID) fault { return fault{lose: true} })
	out, err := b.svc.Ingest(b.ctx(), corpus.IngestRequest{Collection: "c", Documents: []corpus.DocumentInput{texts("a", "one")}})
	if err != nil || out[0].Status != corpus.StatusAccepted {
		t.Fatal(out, err)
	}
	b.eventually("several attempts were made", func() error {
		b.index.mu.Lock()
		defer b.index.mu.Unlock()
		if n := b.index.calls["create"] + b.index.calls["insert"]; n < 5 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	b.index.set(nil)
	b.settled()
	if got, _ := b.visible("a"); !same(got, []string{"one"}) {
		t.Errorf("visible: %q", got)
	}
}

// What the index asks for is honoured.
func TestRetryAfterIsHonoured(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *ingest.Config) { c.Pause = time.Millisecond })
	b.ingest(true, texts("x", "makes the collection"))
	const asked = 400 * time.Millisecond
	var mu sync.Mutex
	var at []time.Time
	b.index.set(func(op string, _ []corpus.ID) (ft fault) {
		if op == "insert" || op == "read" {
			mu.Lock()
			defer mu.Unlock()
			if at = append(at, time.Now()); len(at) == 1 {
				ft = fault{lose: true, err: &corpus.Error{Kind: corpus.Overloaded, Code: "index_rate_limited", RetryAfter: asked}}
			}
		}
		return ft
	})
	b.ingest(true, texts("a", "one"))
	mu.Lock()
	defer mu.Unlock()
	if len(at) < 2 || at[1].Sub(at[0]) < asked {
		t.Errorf("requests at %v; the second is to be %v after the first", at, asked)
	}
}

// A lease is renewed as long as its work goes on: a slow model does not make the work be done
// twice.
func TestALeaseIsRenewedWhileTheModelWorks(t *testing.T) {
	t.Parallel()
	const lease = 300 * time.Millisecond
	b, h := prepared(t, "slow", func(c *ingest.Config) { c.Lease = lease })
	b.ingest(false, texts("a", "slow text"))
	await(t, h.reached, "the text is being embedded")
	<-time.After(3 * lease)
	h.release()
	b.settled()
	var claims int
	b.one("SELECT max(claims) FROM lockstep.index_entries", nil, &claims)
	if _, n := b.model.Counts(); n != 1 || claims != 1 {
		t.Errorf("%d texts were embedded, under %d claims; want 1 and 1", n, claims)
	}
}

// Small requests that come together share transactions.
func TestConcurrentRequestsShareTransactions(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewRegistry()
	b := setup(t, func(c *ingest.Config) { c.Registerer = reg })
	b.ingest(true, texts("x", "makes the collection"))
	const n = 200
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			out, err := b.svc.Ingest(context.Background(), corpus.IngestRequest{Collection: "c", Wait: true, Documents: []corpus.DocumentInput{texts(fmt.Sprint(i), fmt.Sprintf("text %d", i))}})
			if err != nil || out[0].Status != corpus.StatusIndexed {
				t.Errorf("%+v, %v", out, err)
			}
		})
	}
	close(start)
	wg.Wait()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "lockstep_ingest_accept_documents" {
			if got := f.GetMetric()[0].GetHistogram().GetSampleCount(); got > n/2 {
				t.Errorf("%d requests took %d transactions", n, got)
			}
			return
		}
	}
	t.Error("the metric is missing")
}

func TestMetricsAreWellNamed(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewPedanticRegistry()
	ingest.New(ingest.Config{Embedder: fake.New(4, corpus.Dense), Registerer: reg})
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

// P8: a ledger that the index's stamp contradicts deletes nothing.
func TestAContradictingStampStopsDeletes(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *ingest.Config) { c.Pause = time.Millisecond })
	b.ingest(true, texts("a", "one"))
	_, ix := b.collection()
	b.index.mu.Lock()
	b.index.stamps[ix.QdrantName] = corpus.Stamp{Installation: corpus.ID{9}, Nonce: corpus.ID{9}, At: time.Now()}
	b.index.mu.Unlock()
	if _, err := b.svc.Delete(b.ctx(), "c", "a", false); err != nil {
		t.Fatal(err)
	}
	b.eventually("the reaper met the stamp", func() error {
		var why *string
		b.one("SELECT max(last_error) FROM lockstep.index_entries WHERE state = 'dead'", nil, &why)
		if why == nil || !strings.Contains(*why, "stamped by installation") {
			return fmt.Errorf("last error %v", why)
		}
		return nil
	})
	if _, _, _, deletes := b.index.counts(); deletes != 0 {
		t.Errorf("%d deletes were sent", deletes)
	}
	b.index.mu.Lock()
	delete(b.index.stamps, ix.QdrantName)
	b.index.mu.Unlock()
	b.settled()
	if n := len(b.index.points(ix)); n != 0 {
		t.Errorf("%d points", n)
	}
}

// P8: deletes rest in a stopped collection until an operator adopts its ledger; then ids start
// above anything the lost time may have used, and every entry is read back.
func TestAStoppedCollectionDeletesNothingUntilAdopted(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.ingest(true, texts("a", "one"), texts("b", "two"))
	c, ix := b.collection()
	if _, err := b.store.StopCollection(b.ctx(), c.ID, 0, "evidence"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.svc.Delete(b.ctx(), "c", "a", false); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		b.svc.Wake()
		<-time.After(20 * time.Millisecond)
	}
	if _, _, _, deletes := b.index.counts(); deletes != 0 {
		t.Fatalf("%d deletes in a stopped collection", deletes)
	}
	if err := b.store.AdoptRollback(b.ctx(), c.ID); err != nil {
		t.Fatal(err)
	}
	b.svc.Wake()
	b.settled()
	if n := len(b.index.points(ix)); n != 1 {
		t.Errorf("%d points", n)
	}
	r := b.ingest(true, texts("d", "three"))[0]
	v, err := b.svc.Document(b.ctx(), "c", "d")
	if err != nil || r.Status != corpus.StatusIndexed || v.Chunks[0].Incarnation < 1<<20 {
		t.Errorf("after adoption: %+v, %v", v.Chunks, err)
	}
	if _, rewrites, _, _ := b.index.counts(); rewrites != 1 {
		t.Errorf("%d rewrites; the surviving entry is to be written again", rewrites)
	}
}
