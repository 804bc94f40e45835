package ingest_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/lockstep-db/lockstep/embedder/fake"
	"github.com/lockstep-db/lockstep/ingest"
	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/postgres"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
)

func TestMain(m *testing.M) {
	// The Postgres for tests is shared and lives as long as the process.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/lockstep-db/lockstep/store/postgres/pgtest.(*Server).spawn.func1"))
}

// bundle is a service over a real Postgres, an index in memory and a fake model.
type bundle struct {
	t     testing.TB
	url   string
	store *postgres.Store
	index *fakeIndex
	model *fake.Embedder
	cfg   ingest.Config
	svc   *ingest.Service
	stop  func()
}

type option func(*ingest.Config)

// setup starts a service whose loops turn quickly.
func setup(t testing.TB, opts ...option) *bundle {
	t.Helper()
	b := &bundle{t: t, url: pgtest.New(t), index: newFakeIndex(), model: fake.New(8, corpus.Dense)}
	b.connect(opts...)
	b.start()
	return b
}

func (b *bundle) connect(opts ...option) {
	b.t.Helper()
	ctx := context.Background()
	store, err := postgres.Open(ctx, postgres.Config{URL: b.url}, slog.New(slog.DiscardHandler))
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(store.Close)
	if _, err := store.Migrate(ctx); err != nil {
		b.t.Fatal(err)
	}
	owner, err := store.Installation(ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	b.store = store
	b.cfg = ingest.Config{
		Ledger: store, Index: b.index, Embedder: b.model, Owner: owner,
		Poll: 20 * time.Millisecond, Upkeep: 30 * time.Millisecond, Lease: 2 * time.Second, Workers: 2,
	}
	if testing.Verbose() && os.Getenv("LOCKSTEP_TEST_LOG") != "" {
		b.cfg.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	for _, o := range opts {
		o(&b.cfg)
	}
}

// start runs a service; its end is awaited when the test ends or stop is called.
func (b *bundle) start() {
	b.t.Helper()
	b.svc = ingest.New(b.cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := b.svc.Run(ctx); err != nil {
			b.t.Errorf("Run: %v", err)
		}
	}()
	b.stop = func() { cancel(); <-done }
	b.t.Cleanup(func() { b.stop() })
}

func (b *bundle) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	b.t.Cleanup(cancel)
	return ctx
}

// texts makes a document of pre-cut chunks.
func texts(id string, chunks ...string) corpus.DocumentInput {
	in := corpus.DocumentInput{ID: id, Chunks: []corpus.ChunkInput{}}
	for _, c := range chunks {
		in.Chunks = append(in.Chunks, corpus.ChunkInput{Text: c})
	}
	return in
}

func with(in corpus.DocumentInput, md corpus.Metadata) corpus.DocumentInput {
	in.Metadata = md
	return in
}

// ingest sends documents to the collection "c" and fails the test on any error.
func (b *bundle) ingest(wait bool, docs ...corpus.DocumentInput) []corpus.DocumentResult {
	b.t.Helper()
	out, err := b.svc.Ingest(b.ctx(), corpus.IngestRequest{Collection: "c", Documents: docs, Wait: wait})
	if err != nil {
		b.t.Fatalf("ingest: %v", err)
	}
	for _, r := range out {
		if r.Err != nil {
			b.t.Fatalf("ingest %s: %v", r.ID, r.Err)
		}
	}
	return out
}

func (b *bundle) collection() (corpus.Collection, corpus.Index) {
	b.t.Helper()
	c, ix, err := b.store.ResolveCollection(b.ctx(), "c")
	if err != nil {
		b.t.Fatal(err)
	}
	return c, ix
}

// eventually polls until ok returns nil.
func (b *bundle) eventually(what string, ok func() error) {
	b.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	var err error
	for time.Now().Before(deadline) {
		if err = ok(); err == nil {
			return
		}
		<-time.After(5 * time.Millisecond)
	}
	b.t.Fatalf("%s: %v", what, err)
}

// visible returns the texts that a search could find of a document: what the index holds and
// the serving version has, with the metadata it is shown with.
func (b *bundle) visible(id string) ([]string, corpus.Metadata) {
	b.t.Helper()
	c, ix := b.collection()
	held := b.index.points(ix)
	ids := make([]corpus.ID, 0, len(held))
	for p := range held {
		ids = append(ids, p)
	}
	j, err := b.store.JoinCandidates(b.ctx(), corpus.JoinRequest{Collection: c.ID, Name: c.Name, Index: ix.ID, Candidates: ids, Texts: true, Metadata: true})
	if err != nil {
		b.t.Fatal(err)
	}
	var out []string
	var md corpus.Metadata
	byOrdinal := map[int]string{}
	for _, k := range j.Chunks {
		if k.State == corpus.JoinLive && j.Documents[k.Document].ExternalID == id {
			byOrdinal[k.Ordinal] = k.Text
			md = j.Documents[k.Document].Metadata
		}
	}
	for i := range len(byOrdinal) {
		out = append(out, byOrdinal[i])
	}
	return out, md
}

func same(a, b []string) bool { return fmt.Sprint(a) == fmt.Sprint(b) }

// Who waits for what was accepted before, and does not serve yet, is not told that it does when
// the wait ends early.
func TestAWaitThatEndsEarlyIsNotUnchanged(t *testing.T) {
	t.Parallel()
	b := setup(t)
	hold := make(chan struct{})
	b.model.Gate = func(ctx context.Context, _ corpus.EmbedRequest) error {
		select {
		case <-hold:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	doc := texts("a", "one")
	if r := b.ingest(false, doc)[0]; r.Status != corpus.StatusAccepted {
		t.Fatalf("first: %+v", r)
	}
	ctx, cancel := context.WithTimeout(b.ctx(), 100*time.Millisecond)
	defer cancel()
	out, err := b.svc.Ingest(ctx, corpus.IngestRequest{Collection: "c", Documents: []corpus.DocumentInput{doc}, Wait: true})
	if err != nil || out[0].Status != corpus.StatusAccepted || out[0].Version != 1 {
		t.Errorf("the same again, not serving yet: %+v, %v", out, err)
	}
	close(hold)
	if r := b.ingest(true, doc)[0]; r.Status != corpus.StatusUnchanged {
		t.Errorf("once it serves: %+v", r)
	}
}

func TestADocumentsLife(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.ingest(true, with(texts("a", "one", "two", "two"), corpus.Metadata{"lang": "en"}))[0]
	if r.Status != corpus.StatusIndexed || r.Version != 1 || r.Chunks != 3 || r.ChunksEmbedded != 3 || len(r.PointIDs) != 3 {
		t.Fatalf("first ingest: %+v", r)
	}
	if got, md := b.visible("a"); !same(got, []string{"one", "two", "two"}) || md["lang"] != "en" {
		t.Fatalf("visible: %q %v", got, md)
	}
	again := b.ingest(true, with(texts("a", "one", "two", "two"), corpus.Metadata{"lang": "en"}))[0]
	if again.Status != corpus.StatusUnchanged || again.Version != 1 || again.ChunksEmbedded != 0 {
		t.Errorf("same again: %+v", again)
	}
	changed := b.ingest(true, with(texts("a", "one", "three", "two"), corpus.Metadata{"lang": "en"}))[0]
	if changed.Status != corpus.StatusIndexed || changed.Version != 2 || changed.ChunksEmbedded != 1 {
		t.Errorf("changed: %+v", changed)
	}
	if got, _ := b.visible("a"); !same(got, []string{"one", "three", "two"}) {
		t.Errorf("visible: %q", got)
	}
	if changed.PointIDs[0] != r.PointIDs[0] || changed.PointIDs[2] != r.PointIDs[1] {
		t.Errorf("unchanged chunks changed their ids: %v, then %v", r.PointIDs, changed.PointIDs)
	}
	_, ix := b.collection()
	b.eventually("the dropped chunk's point is deleted", func() error {
		if n := len(b.index.points(ix)); n != 3 {
			return fmt.Errorf("%d points", n)
		}
		return nil
	})
	p, err := b.svc.Patch(b.ctx(), "c", "a", corpus.Metadata{"lang": "de"}, true)
	if err != nil || p.Status != corpus.StatusIndexed || p.Version != 2 {
		t.Fatalf("patch: %+v %v", p, err)
	}
	for id, pt := range b.index.points(ix) {
		if pt.Payload.Metadata["lang"] != "de" {
			t.Errorf("point %s still has %v", id, pt.Payload.Metadata)
		}
	}
	d, err := b.svc.Delete(b.ctx(), "c", "a", true)
	if err != nil || d.Status != corpus.StatusIndexed || d.Version != 3 {
		t.Fatalf("delete: %+v %v", d, err)
	}
	if n := len(b.index.points(ix)); n != 0 {
		t.Errorf("%d points after a delete that was waited for", n)
	}
	if _, err := b.svc.Document(b.ctx(), "c", "a"); corpus.CodeOf(err) != "document_not_found" {
		t.Errorf("get after delete: %v", err)
	}
	if _, err := b.svc.Delete(b.ctx(), "c", "a", false); err != nil {
		t.Errorf("second delete: %v", err)
	}
	back := b.ingest(true, texts("a", "one"))[0]
	if back.Status != corpus.StatusIndexed || back.Version != 4 || back.PointIDs[0] == r.PointIDs[0] {
		t.Errorf("re-ingest after delete: %+v; the first life's id was %v", back, r.PointIDs[0])
	}
}

func openStore(t testing.TB, url string) *postgres.Store {
	t.Helper()
	ctx := context.Background()
	store, err := postgres.Open(ctx, postgres.Config{URL: url, MaxConns: 30}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	if _, err := store.Migrate(ctx); err != nil {
		t.Fatal(err)
	}
	return store
}
