package ingest_test

import (
	"fmt"
	"testing"

	"github.com/lockstep-db/lockstep/embedder/fake"
	"github.com/lockstep-db/lockstep/ingest"
	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
	"github.com/lockstep-db/lockstep/store/qdrant"
	"github.com/lockstep-db/lockstep/store/qdranttest"
)

// The whole life of a document over the real client and a server: what the index in
// memory of the other tests promises, they keep.
func TestADocumentsLifeOverTheWire(t *testing.T) {
	t.Parallel()
	b := &bundle{t: t, url: pgtest.New(t), index: newFakeIndex(), model: fake.New(16, corpus.Dense|corpus.SparseHead|corpus.ColBERT)}
	client, err := qdrant.Open(b.ctx(), qdrant.Config{URL: "http://" + qdranttest.Any(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	b.connect(func(c *ingest.Config) { c.Index = client })
	client.SetOwner(b.cfg.Owner)
	b.start()
	if _, err := b.svc.CreateCollection(b.ctx(), "c", corpus.Settings{Vectors: corpus.Dense | corpus.SparseHead | corpus.ColBERT, DenseType: "float16",
		Fields: map[string]corpus.FieldType{"lang": corpus.Keyword}}); err != nil {
		t.Fatal(err)
	}
	_, ix := b.collection()
	read := func(ids []corpus.ID) map[corpus.ID]corpus.PointState {
		t.Helper()
		states, err := client.ReadPoints(b.ctx(), ix, ids, true)
		if err != nil {
			t.Fatal(err)
		}
		out := map[corpus.ID]corpus.PointState{}
		for _, st := range states {
			out[st.ID] = st
		}
		return out
	}
	r := b.ingest(true, with(texts("a", "one fish", "two fish"), corpus.Metadata{"lang": "en", "deep": map[string]any{"n": int64(1)}}))[0]
	if r.Status != corpus.StatusIndexed {
		t.Fatalf("%+v", r)
	}
	for id, st := range read(r.PointIDs) {
		if len(st.Unreadable) > 0 || st.Payload.Owner != b.cfg.Owner || st.Payload.Document != r.DocumentID || st.Payload.Metadata["lang"] != "en" ||
			st.Payload.Checksum != corpus.ChecksumVectors(st.Vectors, ix.Layout.DenseType) {
			t.Errorf("point %s: %+v, unreadable %v", id, st.Payload, st.Unreadable)
		}
	}
	// Sent back by reconcile: rewritten whole and read back.
	b.exec("UPDATE lockstep.index_entries SET state = 'pending', need = 'rewrite', meta_version = 0")
	b.svc.Wake()
	b.settled()
	if p, err := b.svc.Patch(b.ctx(), "c", "a", corpus.Metadata{"lang": "de"}, true); err != nil || p.Status != corpus.StatusIndexed {
		t.Fatalf("%+v, %v", p, err)
	}
	for id, st := range read(r.PointIDs) {
		if st.Payload.Metadata["lang"] != "de" || st.Payload.Metadata["deep"] != nil {
			t.Errorf("point %s says %v", id, st.Payload.Metadata)
		}
	}
	changed := b.ingest(true, texts("a", "two fish", "red fish"))[0]
	b.settled()
	if got := read(append(r.PointIDs, changed.PointIDs...)); len(got) != 2 || got[r.PointIDs[0]].ID == r.PointIDs[0] {
		t.Errorf("%d points, the dropped one among them: %v", len(got), got[r.PointIDs[0]].ID == r.PointIDs[0])
	}
	if d, err := b.svc.Delete(b.ctx(), "c", "a", true); err != nil || d.Status != corpus.StatusIndexed {
		t.Fatalf("%+v, %v", d, err)
	}
	if got := read(changed.PointIDs); len(got) != 0 {
		t.Errorf("%d points after a delete that was waited for", len(got))
	}
	if err := b.svc.DeleteCollection(b.ctx(), "c"); err != nil {
		t.Fatal(err)
	}
	b.eventually("the Qdrant collection is dropped", func() error {
		if exists, _, err := client.DescribeIndex(b.ctx(), ix); err != nil || exists {
			return fmt.Errorf("exists %v, %w", exists, err)
		}
		return nil
	})
}
