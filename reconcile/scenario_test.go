package reconcile_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	qc "github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/reconcile"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
	"github.com/lockstep-db/lockstep/store/qdrant"
)

// only fails unless exactly the given kinds were found, that often.
func only(t testing.TB, found []corpus.Finding, want map[corpus.FindingKind]int) {
	t.Helper()
	got := map[corpus.FindingKind]int{}
	for _, f := range found {
		got[f.Kind]++
	}
	for _, k := range corpus.FindingKinds {
		if got[k] != want[k] {
			t.Errorf("%s: %d found, want %d", k, got[k], want[k])
			for _, f := range found {
				if f.Kind == k {
					t.Logf("  %s: %s", f.ID, f.Detail)
				}
			}
		}
	}
}

func remaining(found []corpus.Finding) (n int) {
	for _, f := range found {
		if !f.Repaired {
			n++
		}
	}
	return n
}

func TestStuckEntries(t *testing.T) {
	w := newWorld(t, func(c *reconcile.Config) { c.Overdue = 50 * time.Millisecond })
	ids := w.fill(0, 10)
	w.settled()
	w.stopIngest()
	// A worker died between its claim and its result, and nobody is there to claim again.
	w.exec(`UPDATE index_entries SET state = 'pending', lease_token = gen_random_uuid(), lease_until = now() - interval '1 minute', not_before = now() - interval '1 minute' WHERE chunk_id = $1`, ids[0])
	// Another is at work right now, and a third waits for its turn: neither is stuck.
	w.exec(`UPDATE index_entries SET state = 'pending', lease_token = gen_random_uuid(), lease_until = now() + interval '1 minute', not_before = now() + interval '1 minute' WHERE chunk_id = $1`, ids[1])
	w.exec(`UPDATE index_entries SET state = 'pending', not_before = now() - interval '1 hour' WHERE chunk_id = $1`, ids[2])
	// A metadata change whose worker died.
	w.exec(`UPDATE index_entries SET want_meta = want_meta + 1, lease_token = gen_random_uuid(), lease_until = now() - interval '1 minute' WHERE chunk_id = $1`, ids[3])
	rep, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Quick})
	only(t, found, map[corpus.FindingKind]int{corpus.Stuck: 2})
	if rep.Collections[0].Status != corpus.Inconsistent || rep.Collections[0].Pending != 4 {
		t.Errorf("verdict %s with %d pending", rep.Collections[0].Status, rep.Collections[0].Pending)
	}
	w.exec(`UPDATE index_entries SET want_meta = meta_version WHERE chunk_id = $1`, ids[3])

	// Without a worker a repair says that nothing moved, and why, and does not count as one.
	w.cfg.SettleTimeout = 100 * time.Millisecond
	_, found = w.runOn(w.service(), corpus.ReconcileRequest{Collection: name, Depth: corpus.Quick, Repair: true})
	only(t, found, map[corpus.FindingKind]int{corpus.Stuck: 1})
	if remaining(found) != 1 || !strings.Contains(found[0].Detail, "no worker settled it") {
		t.Errorf("without a worker: %+v", found)
	}
	w.exec(`UPDATE index_entries SET not_before = now() WHERE chunk_id = $1`, ids[1])
	w.startIngest()
	w.settled()
	rep, found = w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
	clean(t, rep, found)
}

// A repair that the workers carried out and that reads back wrong is never counted.
func TestRepairThatReadsBackWrong(t *testing.T) {
	w := newWorld(t)
	ids := w.fill(0, 5)
	w.settled()
	w.stopIngest()
	w.upsert(ids[0], []float32{1, 2, 3, 4, 5, 6, 7, 8}, w.payloadOf(ids[0]))
	w.must(w.index.DeletePoints(w.ctx(), w.ix(), ids[1:2]))
	// A worker that lies: it marks what it was given without writing it.
	ctx, cancel := context.WithCancel(context.Background())
	liar := make(chan struct{})
	go func() {
		defer close(liar)
		for ctx.Err() == nil {
			_, err := w.db.Exec(ctx, `UPDATE index_entries SET state = 'indexed', meta_version = want_meta WHERE state = 'pending'`)
			if err != nil && ctx.Err() == nil {
				t.Errorf("the liar: %v", err)
			}
		}
	}()
	rep, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep, Repair: true})
	cancel()
	<-liar
	only(t, found, map[corpus.FindingKind]int{corpus.CorruptVector: 1, corpus.Missing: 1})
	if remaining(found) != 2 || rep.Collections[0].Status != corpus.Inconsistent {
		t.Errorf("%d remain and the verdict is %s: %+v", remaining(found), rep.Collections[0].Status, found)
	}
	for _, f := range found {
		if !strings.Contains(f.Detail, "reads back wrong") {
			t.Errorf("%s: %s", f.Kind, f.Detail)
		}
	}
	w.startIngest()
}

func TestPayloadIndexesAreAddedAgain(t *testing.T) {
	w := newWorld(t)
	w.fill(0, 5)
	for _, key := range []string{corpus.KeyGen, corpus.KeyOwner} {
		_, err := w.raw.DeleteFieldIndex(w.ctx(), &qc.DeleteFieldIndexCollection{CollectionName: w.ix().QdrantName, FieldName: key, Wait: qc.PtrOf(true)})
		w.must(err)
	}
	for _, repair := range []bool{false, true} {
		_, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Full, Repair: repair})
		only(t, found, map[corpus.FindingKind]int{corpus.ConfigDrift: 1})
		if (remaining(found) == 0) != repair {
			t.Errorf("repair %v: %+v", repair, found)
		}
	}
	rep, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Full})
	clean(t, rep, found)
}

// TestOtherDriftIsReported: what is of another kind than it was made is somebody's decision.
func TestOtherDriftIsReported(t *testing.T) {
	w := newWorld(t)
	w.fill(0, 5)
	at := w.ix().QdrantName
	_, err := w.raw.DeleteFieldIndex(w.ctx(), &qc.DeleteFieldIndexCollection{CollectionName: at, FieldName: corpus.KeyGen, Wait: qc.PtrOf(true)})
	w.must(err)
	_, err = w.raw.CreateFieldIndex(w.ctx(), &qc.CreateFieldIndexCollection{CollectionName: at, FieldName: corpus.KeyGen, FieldType: qc.FieldType_FieldTypeFloat.Enum(), Wait: qc.PtrOf(true)})
	w.must(err)
	for _, repair := range []bool{false, true, false} {
		_, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Full, Repair: repair})
		only(t, found, map[corpus.FindingKind]int{corpus.ConfigDrift: 1})
		if remaining(found) != 1 || !strings.Contains(found[0].Detail, corpus.KeyGen) {
			t.Errorf("repair %v: %+v", repair, found)
		}
	}
}

func TestLostIndexIsBuiltAgain(t *testing.T) {
	w := newWorld(t)
	w.fill(0, 200)
	w.settled()
	before := w.points()
	lost := w.ix()
	w.must(w.raw.DeleteCollection(w.ctx(), lost.QdrantName))
	_, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Quick})
	only(t, found, map[corpus.FindingKind]int{corpus.LostIndex: 1})
	rep, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Full, Repair: true})
	only(t, found, map[corpus.FindingKind]int{corpus.LostIndex: 1})
	if remaining(found) != 0 || rep.State != corpus.RunDone {
		t.Fatalf("%s %s: %+v", rep.State, rep.Error, found)
	}
	if w.ix().QdrantName == lost.QdrantName {
		t.Error("the name was used again")
	}
	after := w.points()
	if len(after) != len(before) {
		t.Errorf("%d points came back, want %d", len(after), len(before))
	}
	rep, found = w.run(corpus.ReconcileRequest{Depth: corpus.Deep})
	clean(t, rep, found)
}

func TestOrphanIndexIsReported(t *testing.T) {
	w := newWorld(t)
	w.fill(0, 3)
	ours, theirs, bare := w.ix(), w.ix(), w.ix()
	for ix, suffix := range map[*corpus.Index]string{&ours: "_ours", &theirs: "_theirs", &bare: "_bare"} {
		ix.QdrantName += suffix
		w.must(w.index.CreateIndex(w.ctx(), *ix))
	}
	w.must(w.index.WriteStamp(w.ctx(), ours, corpus.Stamp{Installation: w.owner, Nonce: corpus.ID{1}, At: time.Now()}))
	w.must(w.index.WriteStamp(w.ctx(), theirs, corpus.Stamp{Installation: corpus.ID{7}, Nonce: corpus.ID{1}, At: time.Now()}))
	_, found := w.run(corpus.ReconcileRequest{Depth: corpus.Quick, Repair: true})
	only(t, found, map[corpus.FindingKind]int{corpus.OrphanIndex: 2})
	for _, f := range found {
		if !strings.Contains(f.Detail, ours.QdrantName) && !strings.Contains(f.Detail, bare.QdrantName) || f.Repaired {
			t.Errorf("%+v", f)
		}
	}
	for _, n := range []string{ours.QdrantName, theirs.QdrantName, bare.QdrantName} {
		if ok, err := w.raw.CollectionExists(w.ctx(), n); err != nil || !ok {
			t.Errorf("%s was touched: %v %v", n, ok, err)
		}
	}
}

// TestLateCreationIsDroppedAgain: a request that first created an index arrives after the index
// was lost, built again under another name, and dropped.
func TestLateCreationIsDroppedAgain(t *testing.T) {
	w := newWorld(t)
	w.fill(0, 20)
	w.settled()
	lost := w.ix()
	w.must(w.raw.DeleteCollection(w.ctx(), lost.QdrantName))
	_, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Quick, Repair: true})
	only(t, found, map[corpus.FindingKind]int{corpus.LostIndex: 1})
	w.eventually("the lost index is forgotten", func() bool {
		known, dropped, err := w.store.KnownQdrantNames(w.ctx(), []string{lost.QdrantName})
		w.must(err)
		return len(known) == 0 && len(dropped) == 1
	})
	w.must(w.index.CreateIndex(w.ctx(), lost))
	before := w.points()
	for _, repair := range []bool{false, true} {
		_, found := w.run(corpus.ReconcileRequest{Depth: corpus.Quick, Repair: repair})
		only(t, found, map[corpus.FindingKind]int{corpus.OrphanIndex: 1})
		if (remaining(found) == 0) != repair || !strings.Contains(found[0].Detail, lost.QdrantName) && !found[0].Repaired {
			t.Errorf("repair %v: %+v", repair, found)
		}
		if ok, err := w.raw.CollectionExists(w.ctx(), lost.QdrantName); err != nil || ok == repair {
			t.Errorf("repair %v: there %v, %v", repair, ok, err)
		}
	}
	if len(w.points()) != len(before) {
		t.Error("the serving index was touched")
	}
	rep, found := w.run(corpus.ReconcileRequest{Depth: corpus.Quick})
	clean(t, rep, found)
}

// orphans puts n points of ours into the index that the ledger does not know.
func (w *world) orphans(n int) (ids []corpus.ID) {
	w.t.Helper()
	r := source(w.t)
	for range n {
		p := w.point(randomUUID(r), randomUUID(r), 1, r)
		ids = append(ids, p.ID)
		w.must(w.index.InsertPoints(w.ctx(), w.ix(), []corpus.Point{p}))
	}
	return ids
}

func TestBrake(t *testing.T) {
	t.Run("share", func(t *testing.T) {
		// Many ranges, each of which stays below the share: the run as a whole does not.
		w := newWorld(t, func(c *reconcile.Config) { c.RangePoints = 30 })
		live := w.fill(0, 300)
		w.orphans(40)
		w.must(w.index.DeletePoints(w.ctx(), w.ix(), live[:5]))
		before := w.points()
		rep, found := w.run(corpus.ReconcileRequest{Collection: name, Repair: true})
		if rep.State != corpus.RunBraked || !strings.Contains(rep.Error, "40 points would be deleted") {
			t.Errorf("ended as %s: %s", rep.State, rep.Error)
		}
		// What is missing is repaired all the same, nothing is deleted.
		only(t, found, map[corpus.FindingKind]int{corpus.Orphan: 40, corpus.Missing: 5})
		if remaining(found) != 40 || len(w.points()) != len(before)+5 {
			t.Errorf("%d remain, %d points", remaining(found), len(w.points()))
		}
		rep, found = w.run(corpus.ReconcileRequest{Collection: name, Repair: true, Force: true})
		if rep.State != corpus.RunDone || remaining(found) != 0 {
			t.Errorf("forced: %s %s, %d remain", rep.State, rep.Error, remaining(found))
		}
		rep, found = w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
		clean(t, rep, found)
	})
	t.Run("a day is counted over all runs", func(t *testing.T) {
		w := newWorld(t)
		w.fill(0, 300)
		for range 3 {
			w.orphans(15) // each alone is below a tenth of the collection
			w.run(corpus.ReconcileRequest{Collection: name, Repair: true})
		}
		rep, found := w.run(corpus.ReconcileRequest{Collection: name})
		only(t, found, map[corpus.FindingKind]int{corpus.Orphan: 15})
		_ = rep
	})
	t.Run("a few are always free", func(t *testing.T) {
		w := newWorld(t)
		w.fill(0, 4)
		w.orphans(1)
		rep, found := w.run(corpus.ReconcileRequest{Collection: name, Repair: true})
		if rep.State != corpus.RunDone || remaining(found) != 0 {
			t.Errorf("ended as %s: %s", rep.State, rep.Error)
		}
	})
	t.Run("concurrent ranges share the count", func(t *testing.T) {
		// The check before the first delete is bypassed: the transaction's own count must hold.
		w := newWorld(t, func(c *reconcile.Config) { c.FreeDeletes = 1; c.RangePoints = 10; c.Workers = 4 })
		w.fill(0, 100)
		ids := w.orphans(60)
		ix := w.ix()
		total := 0
		for _, part := range [][]corpus.ID{ids[:20], ids[20:40], ids[40:]} {
			claims := make([]corpus.OrphanClaim, len(part))
			for i, id := range part {
				claims[i] = corpus.OrphanClaim{ID: id, Gen: 1}
			}
			_, err := w.store.EnterTombstones(w.ctx(), ix, claims, corpus.DeleteBudget{Limit: 45})
			if err == nil {
				total += len(part)
			} else if corpus.CodeOf(err) != "reconcile_braked" {
				t.Fatal(err)
			}
		}
		if total != 40 {
			t.Errorf("%d tombstones were entered, want 40", total)
		}
		var n int
		w.must(w.db.QueryRow(w.ctx(), `SELECT count(*) FROM chunks WHERE document_id IS NULL`).Scan(&n))
		if n != 40 {
			t.Errorf("%d rows, want 40: a refused batch left something behind", n)
		}
	})
	t.Run("empty ledger", func(t *testing.T) {
		w := newWorld(t)
		w.fill(0, 8)
		before := w.points()
		w.stopIngest()
		w.exec(`TRUNCATE documents, document_versions, chunks, chunk_vectors, index_entries`)
		rep, found := w.run(corpus.ReconcileRequest{Collection: name, Repair: true})
		only(t, found, map[corpus.FindingKind]int{corpus.Orphan: 8})
		if rep.State != corpus.RunBraked || !strings.Contains(rep.Error, "emptied database") || len(w.points()) != len(before) {
			t.Errorf("ended as %s: %s", rep.State, rep.Error)
		}
		w.startIngest()
	})
}

func TestQuarantine(t *testing.T) {
	w := newWorld(t, func(c *reconcile.Config) { c.Quarantine = time.Hour })
	w.fill(0, 50)
	ids := w.orphans(3)
	_, found := w.run(corpus.ReconcileRequest{Collection: name, Repair: true})
	only(t, found, map[corpus.FindingKind]int{corpus.Orphan: 3})
	if remaining(found) != 0 {
		t.Errorf("%+v", found)
	}
	pts, err := w.index.ReadPoints(w.ctx(), w.ix(), ids, false)
	w.must(err)
	if len(pts) != 3 {
		t.Fatalf("%d points left, want all 3 until the horizon", len(pts))
	}
	rep, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
	clean(t, rep, found)
	w.exec(`UPDATE index_entries SET not_before = now() WHERE state = 'dead'`)
	w.settled()
	if pts, err = w.index.ReadPoints(w.ctx(), w.ix(), ids, false); err != nil || len(pts) != 0 {
		t.Errorf("after the horizon %d points are left (%v)", len(pts), err)
	}
}

func TestOneRunPerCollection(t *testing.T) {
	w := newWorld(t, func(c *reconcile.Config) { c.Grace = time.Hour })
	live := w.fill(0, 5)
	w.must(w.index.DeletePoints(w.ctx(), w.ix(), live[:1]))
	id, err := w.rec.Start(w.ctx(), corpus.ReconcileRequest{Collection: name})
	w.must(err)
	for _, req := range []corpus.ReconcileRequest{{Collection: name}, {}} {
		if _, err := w.rec.Start(w.ctx(), req); corpus.CodeOf(err) != "reconcile_running" || !strings.Contains(err.Error(), id.String()) {
			t.Errorf("a second run: %v", err)
		}
	}
	reports, err := w.rec.Latest(w.ctx(), name)
	w.must(err)
	if reports[0].Status != corpus.Running {
		t.Errorf("the verdict is %s while a run is on", reports[0].Status)
	}
	w.must(w.rec.Cancel(w.ctx(), id))
	rep, err := w.rec.Wait(w.ctx(), id, nil)
	w.must(err)
	if rep.State != corpus.RunCancelled || rep.FinishedAt == nil {
		t.Errorf("ended as %s", rep.State)
	}
	w.must(w.rec.Cancel(w.ctx(), id)) // again: nothing
	if _, err := w.rec.Run(w.ctx(), corpus.ID{1}); corpus.KindOf(err) != corpus.NotFound {
		t.Errorf("an unknown run: %v", err)
	}
	if err := w.rec.Cancel(w.ctx(), corpus.ID{1}); corpus.KindOf(err) != corpus.NotFound {
		t.Errorf("cancelling an unknown run: %v", err)
	}
	if _, err := w.rec.Start(w.ctx(), corpus.ReconcileRequest{Collection: "nobody"}); corpus.CodeOf(err) != "collection_not_found" {
		t.Errorf("an unknown collection: %v", err)
	}
	if _, err := w.rec.Start(w.ctx(), corpus.ReconcileRequest{Depth: "bottomless"}); corpus.KindOf(err) != corpus.Invalid {
		t.Errorf("an unknown depth: %v", err)
	}
	// A cancelled run goes on where it was.
	w.cfg.Grace = time.Millisecond
	s := w.service()
	again, err := s.Start(w.ctx(), corpus.ReconcileRequest{Collection: name, Resume: true})
	w.must(err)
	if again != id {
		t.Errorf("resumed %s, want %s", again, id)
	}
	rep, err = s.Wait(w.ctx(), id, nil)
	w.must(err)
	if rep.State != corpus.RunDone {
		t.Errorf("the resumed run ended as %s: %s", rep.State, rep.Error)
	}
	only(t, w.findings(id), map[corpus.FindingKind]int{corpus.Missing: 1})
	if _, err := s.Start(w.ctx(), corpus.ReconcileRequest{Collection: name, Resume: true}); corpus.CodeOf(err) != "nothing_to_resume" {
		t.Errorf("resuming a finished run: %v", err)
	}
	runs, err := s.History(w.ctx(), name, 10)
	w.must(err)
	if len(runs) != 1 || runs[0].Collections[0].Findings[corpus.Missing] != 1 || runs[0].Compared == 0 {
		t.Errorf("history: %+v", runs)
	}
}

// A shallow run does not make the verdict forget what a deeper one found.
func TestVerdictKeepsWhatAShallowRunCannotSee(t *testing.T) {
	w := newWorld(t)
	live := w.fill(0, 20)
	w.upsert(live[0], []float32{1, 2, 3, 4, 5, 6, 7, 8}, w.payloadOf(live[0]))
	w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
	for range 2 {
		_, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Quick})
		only(t, found, map[corpus.FindingKind]int{corpus.CorruptVector: 1})
	}
	rep, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Quick, Repair: true})
	if remaining(found) != 0 || rep.Collections[0].Status != corpus.Consistent {
		t.Errorf("%+v", found)
	}
	rep, found = w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
	clean(t, rep, found)
}

func TestExplain(t *testing.T) {
	w := newWorld(t)
	live := w.fill(0, 3)
	orphan := w.orphans(1)[0]
	w.must(w.index.DeletePoints(w.ctx(), w.ix(), live[:1]))
	for _, c := range []struct {
		query    string
		chunks   int
		kind     corpus.FindingKind
		document bool
	}{
		{live[0].String(), 1, corpus.Missing, true},
		{live[1].String(), 1, "", true},
		{"doc/0", 1, corpus.Missing, true},
		{corpus.DocumentID(w.ix().Collection, "doc/1").String(), 1, "", true},
		{orphan.String(), 1, corpus.Orphan, false},
		{corpus.ID{1, 2, 3}.String(), 0, "", false},
	} {
		for _, collection := range []string{"", name} {
			e, err := w.rec.Explain(w.ctx(), c.query, collection)
			w.must(err)
			if len(e.Chunks) != c.chunks || (e.Document != nil) != c.document || e.Verdict == "" {
				t.Errorf("%s: %+v", c.query, e)
				continue
			}
			if c.kind == "" {
				if c.chunks > 0 && len(e.Chunks[0].Verdicts) > 0 {
					t.Errorf("%s: %+v", c.query, e.Chunks[0].Verdicts)
				}
			} else if v := e.Chunks[0].Verdicts; len(v) != 1 || v[0].Kind != c.kind || v[0].Repair == "" {
				t.Errorf("%s: %+v", c.query, v)
			}
		}
	}
	if _, err := w.rec.Explain(w.ctx(), "nobody", ""); corpus.CodeOf(err) != "document_not_found" {
		t.Errorf("an unknown document: %v", err)
	}
	if _, err := w.rec.Explain(w.ctx(), "doc/0", "nobody"); corpus.CodeOf(err) != "collection_not_found" {
		t.Errorf("an unknown collection: %v", err)
	}
}

// copyIndex copies the index's data while its server is down, as a snapshot of a disk does.
func (w *world) copyIndex(to string) {
	w.t.Helper()
	w.stopIndex()
	w.must(os.CopyFS(to, os.DirFS(w.indexDir)))
	w.serveIndex(w.addr)
}

// The index is restored from an old copy: what was written since is missing, what was deleted
// is back, what was changed is old. One repairing run brings back exactly what Postgres says.
func TestIndexRestoredFromAnOldCopy(t *testing.T) {
	w := newFileWorld(t, func(c *reconcile.Config) { c.FreeDeletes = 1000 })
	w.fill(0, 60)
	w.renewStamps()
	old := filepath.Join(t.TempDir(), "old")
	w.settled()
	w.copyIndex(old)

	w.fill(60, 40)
	w.renewStamps()
	for i := range 10 {
		_, err := w.write.Delete(w.ctx(), name, fmt.Sprintf("doc/%d", i), true)
		w.must(err)
	}
	for i := 10; i < 20; i++ {
		_, err := w.write.Patch(w.ctx(), name, fmt.Sprintf("doc/%d", i), corpus.Metadata{"n": int64(i), "changed": true}, true)
		w.must(err)
	}
	w.settled()
	want := w.points()

	w.stopIndex()
	w.must(os.RemoveAll(w.indexDir))
	w.must(os.CopyFS(w.indexDir, os.DirFS(old)))
	w.serveIndex(w.addr)
	_, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
	only(t, found, map[corpus.FindingKind]int{corpus.Missing: 40, corpus.Orphan: 10, corpus.StalePayload: 10})
	rep, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep, Repair: true})
	if rep.State != corpus.RunDone || remaining(found) != 0 {
		t.Fatalf("%s %s: %d remain", rep.State, rep.Error, remaining(found))
	}
	rep, found = w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
	clean(t, rep, found)
	sameExcept(t, want, w.points(), nil)
}

// renewStamps gives every index a fresh stamp, as an instance does each minute.
func (w *world) renewStamps(others ...corpus.Index) {
	w.t.Helper()
	cfg := w.cfg
	cfg.Scrub = reconcile.ScrubConfig{Off: true, StampEvery: time.Nanosecond, Tick: time.Millisecond}
	s := reconcile.New(cfg, w.store, w.index, logger(), prometheus.NewRegistry())
	defer s.Close()
	was := map[corpus.ID]corpus.ID{}
	read := func(ix corpus.Index) corpus.Stamp {
		st, _, err := w.index.ReadStamp(w.ctx(), ix)
		w.must(err)
		return st
	}
	ixs := append(others, w.ix())
	for _, ix := range ixs {
		was[ix.ID] = read(ix).Nonce
	}
	ctx, cancel := context.WithCancel(w.ctx())
	done := make(chan error, 1)
	go func() { done <- s.Scrub(ctx) }()
	w.eventually("renewing the stamps", func() bool {
		return !slices.ContainsFunc(ixs, func(ix corpus.Index) bool { return read(ix).Nonce == was[ix.ID] })
	})
	cancel()
	w.must(<-done)
}

// dump and restore use the tools that operators use.
func (w *world) dump(file string, args ...string) {
	w.t.Helper()
	w.tool("pg_dump", append(args, "--format=custom", "--file="+file, "--dbname="+w.url)...)
}

func (w *world) tool(tool string, args ...string) {
	w.t.Helper()
	path, err := exec.LookPath(tool)
	if err != nil {
		dirs, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + tool)
		if len(dirs) == 0 {
			w.t.Fatalf("%s is not installed", tool)
		}
		path = dirs[len(dirs)-1]
	}
	if out, err := exec.CommandContext(w.ctx(), path, args...).CombinedOutput(); err != nil {
		w.t.Fatalf("%s: %v\n%s", tool, err, out)
	}
}

// restored connects a second world to a database that was restored from a dump, and to the
// same index.
func (w *world) restored(file string) *world {
	w.t.Helper()
	c := *w
	c.url = pgtest.New(w.t)
	c.tool("pg_restore", "--no-owner", "--dbname="+c.url, file)
	c.openLedger()
	c.startIngest()
	w.t.Cleanup(c.stopIngest)
	c.rec = c.service()
	return &c
}

// Postgres is restored from an old backup: documents that were acknowledged since are unknown
// to it, their points are evidence, and nothing is deleted on its word until an operator has
// decided, however often it is asked and however many numbers it hands out meanwhile.
func TestPostgresRestoredFromAnOldBackup(t *testing.T) {
	for _, step := range []string{"adopt", "discard"} {
		t.Run(step, func(t *testing.T) {
			old := newWorld(t, func(c *reconcile.Config) { c.FreeDeletes = 1000 })
			old.fill(0, 30)
			old.renewStamps()
			file := filepath.Join(t.TempDir(), "dump")
			old.dump(file)
			lost := old.fill(100, 25)
			_, err := old.write.Delete(old.ctx(), name, "doc/0", true)
			old.must(err)
			old.settled()
			old.stopIngest()
			old.stopIngest = func() {}

			w := old.restored(file)
			// The restored ledger hands out numbers again; the jump keeps them apart.
			w.fill(200, 40)
			w.settled()
			before := w.points()
			for range 2 {
				rep, found := w.run(corpus.ReconcileRequest{Collection: name, Repair: true, Force: true})
				if rep.State != corpus.RunBraked || !strings.Contains(rep.Error, "--rollback adopt") {
					t.Fatalf("ended as %s: %s", rep.State, rep.Error)
				}
				kinds := map[corpus.FindingKind]int{}
				for _, f := range found {
					kinds[f.Kind]++
				}
				if kinds[corpus.RolledBack] < len(lost) || kinds[corpus.Orphan] > 0 {
					t.Fatalf("found %v, want at least %d rolled back and no orphan", kinds, len(lost))
				}
			}
			after := w.points()
			for _, id := range lost {
				if _, ok := after[id]; !ok {
					t.Fatalf("point %s of a lost write was deleted", id)
				}
			}
			if len(after) < len(before) {
				t.Fatalf("%d points, %d before", len(after), len(before))
			}

			was := w.ix().QdrantName
			if step == "adopt" {
				w.must(w.rec.AdoptRollback(w.ctx(), name))
			} else {
				w.must(w.rec.DiscardRollback(w.ctx(), name))
			}
			w.settled()
			rep, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep, Repair: true})
			if rep.State != corpus.RunDone || remaining(found) != 0 {
				t.Fatalf("after %s: %s %s, %d remain", step, rep.State, rep.Error, remaining(found))
			}
			rep, found = w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
			clean(t, rep, found)
			if got := len(w.points()); got != 70 {
				t.Errorf("the index holds %d points, want the ledger's 70", got)
			}
			if moved := w.ix().QdrantName != was; moved != (step == "discard") {
				t.Errorf("%s: the index is %s, was %s", step, w.ix().QdrantName, was)
			}
			// The stop does not come back, and the ledger goes on working.
			w.renewStamps()
			w.fill(300, 5)
			rep, found = w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
			clean(t, rep, found)
		})
	}
}

// A data-only restore into the same tables keeps every mark of the server: the stamp tells.
func TestPostgresRestoredInPlace(t *testing.T) {
	w := newWorld(t, func(c *reconcile.Config) { c.FreeDeletes = 1000 })
	w.fill(0, 20)
	w.renewStamps()
	file := filepath.Join(t.TempDir(), "dump")
	w.dump(file, "--data-only", "--schema=lockstep")
	lost := w.fill(100, 10)
	w.renewStamps()
	w.settled()
	w.stopIngest()
	w.exec(`DO $$ DECLARE r record; BEGIN FOR r IN SELECT tablename FROM pg_tables WHERE schemaname = 'lockstep' LOOP
		EXECUTE format('TRUNCATE lockstep.%I CASCADE', r.tablename); END LOOP; END $$`)
	w.tool("pg_restore", "--data-only", "--disable-triggers", "--dbname="+w.url, file)
	w.startIngest()
	w.rec = w.service()
	// Enough new writes that the numbers of the lost ones are handed out again.
	w.fill(200, 30)
	rep, found := w.run(corpus.ReconcileRequest{Collection: name, Repair: true, Force: true})
	if rep.State != corpus.RunBraked {
		t.Fatalf("ended as %s: %s", rep.State, rep.Error)
	}
	if !slices.ContainsFunc(found, func(f corpus.Finding) bool { return f.Kind == corpus.RolledBack && strings.Contains(f.Detail, "stamp") }) {
		t.Errorf("the stamp was not noticed: %+v", found)
	}
	pts, err := w.index.ReadPoints(w.ctx(), w.ix(), lost, false)
	w.must(err)
	if len(pts) != len(lost) {
		t.Errorf("%d of %d points of lost writes are left", len(pts), len(lost))
	}
	w.must(w.rec.AdoptRollback(w.ctx(), name))
	w.settled()
	rep, found = w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep, Repair: true})
	if rep.State != corpus.RunDone || remaining(found) != 0 {
		t.Errorf("after adopting: %s %s, %d remain", rep.State, rep.Error, remaining(found))
	}
	rep, found = w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
	clean(t, rep, found)
}

// Another installation's database knows nothing of this index and leaves it alone.
func TestWrongDatabase(t *testing.T) {
	w := newWorld(t)
	w.fill(0, 10)
	w.renewStamps()
	before := w.points()
	other := *w
	other.url = pgtest.New(t)
	other.openLedger()
	other.cfg.Owner = other.owner
	other.rec = other.service()
	rep, found := other.run(corpus.ReconcileRequest{Repair: true, Force: true})
	if rep.State != corpus.RunDone || len(found) != 0 {
		t.Errorf("%s: %+v", rep.State, found)
	}
	w.index.SetOwner(w.owner)
	sameExcept(t, before, w.points(), nil)
}

// mortal is a ledger whose process dies after n more calls, before or after the call's effect.
type mortal struct {
	reconcile.Ledger
	left chan struct{}
	late bool
}

var errKilled = errors.New("killed")

func newMortal(l reconcile.Ledger, calls int, late bool) *mortal {
	m := &mortal{Ledger: l, left: make(chan struct{}, calls), late: late}
	for range calls {
		m.left <- struct{}{}
	}
	return m
}

func (m *mortal) call(f func() error) error {
	select {
	case <-m.left:
		return f()
	default:
	}
	if m.late {
		m.late = false
		_ = f()
	}
	return errKilled
}

func (m *mortal) Checkpoint(ctx context.Context, r corpus.RunRange, p corpus.ScanProgress, lease time.Duration) error {
	return m.call(func() error { return m.Ledger.Checkpoint(ctx, r, p, lease) })
}

func (m *mortal) Decide(ctx context.Context, run corpus.ID, ix corpus.Index, d []corpus.Decision, overdue time.Duration, at time.Time, looks int) (n int, err error) {
	err = m.call(func() error { n, err = m.Ledger.Decide(ctx, run, ix, d, overdue, at, looks); return err })
	return n, err
}

func (m *mortal) FinishStage(ctx context.Context, r corpus.RunRange) error {
	return m.call(func() error { return m.Ledger.FinishStage(ctx, r) })
}

func (m *mortal) ReleaseRange(ctx context.Context, r corpus.RunRange) error {
	return m.call(func() error { return m.Ledger.ReleaseRange(ctx, r) })
}

func (m *mortal) AdvanceRun(ctx context.Context, id, leader corpus.ID, stage corpus.RunStage) (ok bool, err error) {
	err = m.call(func() error { ok, err = m.Ledger.AdvanceRun(ctx, id, leader, stage); return err })
	return ok, err
}

func (m *mortal) PrepareTarget(ctx context.Context, run corpus.ID, t corpus.RunTarget, ranges []corpus.RunRange) error {
	return m.call(func() error { return m.Ledger.PrepareTarget(ctx, run, t, ranges) })
}

func (m *mortal) EnterTombstones(ctx context.Context, ix corpus.Index, c []corpus.OrphanClaim, b corpus.DeleteBudget) (f []corpus.OrphanFate, err error) {
	err = m.call(func() error { f, err = m.Ledger.EnterTombstones(ctx, ix, c, b); return err })
	return f, err
}

func (m *mortal) SetFindings(ctx context.Context, run, index corpus.ID, f []corpus.Finding, state string, details []string) error {
	return m.call(func() error { return m.Ledger.SetFindings(ctx, run, index, f, state, details) })
}

func (m *mortal) MarkAbsent(ctx context.Context, ix corpus.Index, ids []corpus.ID) error {
	return m.call(func() error { return m.Ledger.MarkAbsent(ctx, ix, ids) })
}

func (m *mortal) FinishRun(ctx context.Context, id, leader corpus.ID, state corpus.RunState, msg string, at time.Time) (ok bool, err error) {
	err = m.call(func() error { ok, err = m.Ledger.FinishRun(ctx, id, leader, state, msg, at); return err })
	return ok, err
}

// Killed at every step in turn, before and after the step's effect, and resumed by another
// instance: the same findings as of an uninterrupted run, and everything repaired.
func TestKilledAndResumed(t *testing.T) {
	w := newWorld(t, func(c *reconcile.Config) {
		c.Lease, c.RangePoints, c.Workers = 150*time.Millisecond, 100, 1
		c.Grace, c.FreeDeletes = time.Millisecond, 100000
	})
	live := w.fill(0, 400)
	r := source(t)
	for round, done := 0, false; !done; round++ {
		calls, late := round/2, round%2 == 1
		want := map[corpus.ID]corpus.FindingKind{}
		r.Shuffle(len(live), func(i, j int) { live[i], live[j] = live[j], live[i] })
		w.must(w.index.DeletePoints(w.ctx(), w.ix(), live[:12]))
		for _, id := range live[:12] {
			want[id] = corpus.Missing
		}
		for _, id := range w.orphansFrom(r, 12) {
			want[id] = corpus.Orphan
		}
		victim := reconcile.New(w.cfg, newMortal(w.store, calls, late), w.index, logger(), prometheus.NewRegistry())
		id, err := victim.Start(w.ctx(), corpus.ReconcileRequest{Collection: name, Repair: true})
		w.must(err)
		done = w.killed(victim, id)

		w.eventually("resuming", func() bool {
			if done {
				return true
			}
			again, err := w.rec.Start(w.ctx(), corpus.ReconcileRequest{Collection: name, Resume: true})
			if corpus.KindOf(err) == corpus.NotFound || corpus.KindOf(err) == corpus.Conflict {
				return false // the dead one's lease
			}
			w.must(err)
			return again == id
		})
		rep, err := w.rec.Wait(w.ctx(), id, nil)
		w.must(err)
		found := w.findings(id)
		if rep.State != corpus.RunDone || remaining(found) != 0 {
			t.Fatalf("killed after %d calls (late %v): %s %s, %d remain", calls, late, rep.State, rep.Error, remaining(found))
		}
		for _, f := range found {
			if want[f.ID] != f.Kind {
				t.Errorf("killed after %d calls: false finding %s of %s", calls, f.Kind, f.ID)
			}
			delete(want, f.ID)
		}
		if len(want) > 0 {
			t.Fatalf("killed after %d calls (late %v): %d findings were forgotten: %v", calls, late, len(want), want)
		}
		if done && round < 10 {
			t.Fatalf("no call was left to kill at after %d rounds: the test reaches nothing", round)
		}
	}
	rep, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
	clean(t, rep, found)
}

// killed waits until the victim stopped working, and reports whether it had finished its run.
func (w *world) killed(victim *reconcile.Service, id corpus.ID) bool {
	w.t.Helper()
	victim.Finished()
	rep, err := w.rec.Run(w.ctx(), id)
	w.must(err)
	return rep.State == corpus.RunDone
}

func (w *world) orphansFrom(r *rand.Rand, n int) (ids []corpus.ID) {
	w.t.Helper()
	var pts []corpus.Point
	for range n {
		p := w.point(randomUUID(r), randomUUID(r), 1, r)
		ids = append(ids, p.ID)
		pts = append(pts, p)
	}
	w.must(w.index.InsertPoints(w.ctx(), w.ix(), pts))
	return ids
}

// The name of one index becomes an alias of another's Qdrant collection. Every point there is
// live, for somebody else: nothing is deleted, whether the stamp gives the swap away or not.
func TestAliasSwapped(t *testing.T) {
	for _, stamped := range []bool{true, false} {
		t.Run(fmt.Sprintf("stamped %v", stamped), func(t *testing.T) {
			w := newWorld(t, func(c *reconcile.Config) { c.SettleTimeout = 100 * time.Millisecond; c.FreeDeletes = 1000 })
			w.fill(0, 30)
			other := func(n int) corpus.DocumentInput {
				return corpus.DocumentInput{ID: fmt.Sprint(n), Chunks: []corpus.ChunkInput{{Text: fmt.Sprintf("other %d", n)}}}
			}
			_, err := w.write.Ingest(w.ctx(), corpus.IngestRequest{Collection: "other", Wait: true, Documents: []corpus.DocumentInput{other(1), other(2), other(3)}})
			w.must(err)
			_, theirs, err := w.store.ResolveCollection(w.ctx(), "other")
			w.must(err)
			if stamped {
				w.renewStamps(theirs)
			}
			w.settled()
			w.stopIngest()
			before := w.points()
			w.must(w.raw.DeleteCollection(w.ctx(), theirs.QdrantName))
			w.must(w.raw.CreateAlias(w.ctx(), theirs.QdrantName, w.ix().QdrantName))
			rep, found := w.run(corpus.ReconcileRequest{Collection: "other", Repair: true, Force: true})
			if remaining(found) == 0 {
				t.Errorf("%s: nothing was found", rep.State)
			}
			if stamped && !slices.ContainsFunc(found, func(f corpus.Finding) bool { return strings.Contains(f.Detail, "alias") }) {
				t.Errorf("the report does not say alias: %+v", found[0])
			}
			after := w.points()
			sameExcept(t, before, after, nil)
			w.startIngest()
		})
	}
}

// A server whose strict mode refuses exact counts and bounds pages is read in its own way.
func TestStrictMode(t *testing.T) {
	w := newWorld(t)
	live := w.fill(0, 150)
	w.must(w.raw.UpdateCollection(w.ctx(), &qc.UpdateCollection{CollectionName: w.ix().QdrantName, StrictModeConfig: &qc.StrictModeConfig{
		Enabled: qc.PtrOf(true), SearchAllowExact: qc.PtrOf(false), MaxQueryLimit: qc.PtrOf(uint32(20)),
	}}))
	fresh, err := qdrant.Open(w.ctx(), qdrant.Config{URL: "http://" + w.addr})
	w.must(err)
	t.Cleanup(func() { _ = fresh.Close() })
	fresh.SetOwner(w.owner)
	s := reconcile.New(w.cfg, w.store, fresh, logger(), prometheus.NewRegistry())
	t.Cleanup(s.Close)
	w.must(w.index.DeletePoints(w.ctx(), w.ix(), live[:2]))
	for _, depth := range []corpus.Depth{corpus.Quick, corpus.Full, corpus.Deep} {
		rep, found := w.runOn(s, corpus.ReconcileRequest{Collection: name, Depth: depth})
		only(t, found, map[corpus.FindingKind]int{corpus.Missing: 2})
		if rep.State != corpus.RunDone {
			t.Errorf("%s: %s %s", depth, rep.State, rep.Error)
		}
	}
}
