package search

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lockstep-db/lockstep/embedder/fake"
	"github.com/lockstep-db/lockstep/ingest"
	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/postgres"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
	"github.com/lockstep-db/lockstep/store/qdrant"
	"github.com/lockstep-db/lockstep/store/qdranttest"
)

// stack is the whole write and read path over a real Postgres and the embedded index.
type stack struct {
	ledger *postgres.Store
	index  *qdrant.Client
	ingest *ingest.Service
	search *Service
	model  *fake.Embedder
	ix     corpus.Index
}

const stackCollection = "kb"

func newStack(t *testing.T) *stack {
	t.Helper()
	ctx := t.Context()
	log := slog.New(slog.DiscardHandler)
	ledger, err := postgres.Open(ctx, postgres.Config{URL: pgtest.New(t)}, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ledger.Close)
	if _, err := ledger.Migrate(ctx); err != nil {
		t.Fatal(err)
	}
	owner, err := ledger.Installation(ctx)
	if err != nil {
		t.Fatal(err)
	}
	index, err := qdrant.Open(ctx, qdrant.Config{URL: "http://" + qdranttest.Any(t), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = index.Close() })
	index.SetOwner(owner)
	s := &stack{ledger: ledger, index: index, model: fake.New(16, allHeads)}
	s.ingest = ingest.New(ingest.Config{Ledger: ledger, Index: index, Embedder: s.model, Owner: owner, Registerer: prometheus.NewRegistry()})
	running, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.ingest.Run(running); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { stop(); wg.Wait() })
	s.search = New(ledger, index, s.model, nil, Config{}, prometheus.NewRegistry())
	if _, err := s.ingest.CreateCollection(ctx, stackCollection, corpus.Settings{
		Vectors: allHeads, Fields: map[string]corpus.FieldType{"version": corpus.Integer, "even": corpus.Boolean}}); err != nil {
		t.Fatal(err)
	}
	_, s.ix, err = ledger.ResolveCollection(ctx, stackCollection)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// put writes a version of a document whose every chunk and metadata names that version.
func (s *stack) put(ctx context.Context, r *rand.Rand, name string, version int) error {
	doc := corpus.DocumentInput{ID: name, Metadata: corpus.Metadata{"version": int64(version), "even": version%2 == 0}}
	for i := range 1 + r.IntN(4) {
		doc.Chunks = append(doc.Chunks, corpus.ChunkInput{Text: fmt.Sprintf("%s v%d c%d %s", name, version, i, someText(r))})
	}
	results, err := s.ingest.Ingest(ctx, corpus.IngestRequest{Collection: stackCollection, Documents: []corpus.DocumentInput{doc}, Wait: r.IntN(2) == 0})
	if err == nil && results[0].Err != nil {
		err = results[0].Err
	}
	return err
}

// TestSearchBesideWriters: documents are written, replaced, patched and deleted while the index
// loses points and gains strangers, and searches of every mode go on. No search fails (P7), no
// result mixes versions (P2), and what was deleted before a search began is not found (P1, P2).
func TestSearchBesideWriters(t *testing.T) {
	const documents, writers, searchers = 24, 3, 4
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	s := newStack(t)
	deadline := time.Now().Add(4 * time.Second)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()

	// deleted[i] is even while document i may exist, and odd from the moment its delete was
	// acknowledged until its next write begins.
	var deleted [documents]atomic.Int64
	var wg sync.WaitGroup
	fail := func(format string, args ...any) {
		t.Errorf(format, args...)
		cancel()
	}
	going := func() bool { return time.Now().Before(deadline) && ctx.Err() == nil }
	for w := range writers {
		r := rand.New(rand.NewPCG(seed, uint64(w)))
		wg.Go(func() {
			for version := 1; going(); version++ {
				i := w + writers*r.IntN(documents/writers) // documents of its own
				name := fmt.Sprint("doc", i)
				var err error
				switch {
				case r.IntN(4) == 0:
					if _, err = s.ingest.Delete(ctx, stackCollection, name, r.IntN(2) == 0); err == nil && deleted[i].Load()%2 == 0 {
						deleted[i].Add(1)
					}
				default:
					if deleted[i].Load()%2 == 1 {
						deleted[i].Add(1)
					}
					err = s.put(ctx, r, name, version)
				}
				if err != nil && corpus.KindOf(err) != corpus.NotFound && ctx.Err() == nil && !corpus.Retryable(err) {
					fail("writing %s: %v", name, err)
				}
			}
		})
	}
	wg.Go(func() { // the vandal
		r := rand.New(rand.NewPCG(seed, 100))
		owner, err := s.ledger.Installation(ctx)
		if err != nil {
			fail("%v", err)
		}
		for n := 0; going(); n++ {
			page, _, err := s.index.Scroll(ctx, s.ix, corpus.ID{}, 40, corpus.Full)
			if err != nil {
				continue
			}
			if len(page) > 0 && r.IntN(2) == 0 {
				_ = s.index.DeletePoints(ctx, s.ix, []corpus.ID{page[r.IntN(len(page))].ID})
			}
			text := fmt.Sprintf("doc%d v%d %s", r.IntN(documents), n, someText(r))
			v := embed(t, s.model, text, allHeads)
			stranger := corpus.PointID(s.ix.ID, corpus.ChunkKey{ExternalID: fmt.Sprint("stranger ", n)})
			_ = s.index.InsertPoints(ctx, s.ix, []corpus.Point{{ID: stranger, Vectors: v, Payload: corpus.Payload{
				Owner: owner, Gen: 1, MetaVersion: 1, Bucket: corpus.Bucket(s.ix.Salt, stranger), Metadata: corpus.Metadata{"version": int64(n), "even": n%2 == 0}}}})
		}
	})
	var searches, hits, junk atomic.Int64
	for k := range searchers {
		r := rand.New(rand.NewPCG(seed, uint64(200+k)))
		wg.Go(func() {
			for going() {
				var reqs []corpus.SearchRequest
				for range 1 + r.IntN(3) {
					req := randomRequest(r)
					req.Query += fmt.Sprint(" doc", r.IntN(documents))
					req.Filter, req.ScoreThreshold, req.IncludeMetadata = nil, nil, true
					if r.IntN(3) == 0 {
						req.Filter = &corpus.Filter{Must: []corpus.Condition{{Key: "even", Match: r.IntN(2) == 0}}}
					}
					reqs = append(reqs, req)
				}
				var before [documents]int64
				for i := range before {
					before[i] = deleted[i].Load()
				}
				got, err := s.search.SearchBatch(ctx, reqs)
				if err != nil {
					if ctx.Err() == nil {
						fail("a search failed: %v", err)
					}
					return
				}
				for i, resp := range got {
					searches.Add(1)
					junk.Add(int64(resp.Filtered))
					if err := checkStack(&reqs[i], &resp, func(doc int) bool {
						return before[doc]%2 == 1 && deleted[doc].Load() == before[doc]
					}); err != nil {
						fail("%+v: %v", reqs[i], err)
					}
					hits.Add(int64(len(resp.Results)))
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d searches, %d results, %d candidates removed", searches.Load(), hits.Load(), junk.Load())
	if searches.Load() == 0 || hits.Load() == 0 || junk.Load() == 0 {
		t.Error("the test reached nothing")
	}
}

// checkStack judges one response by what its own texts and metadata say.
func checkStack(req *corpus.SearchRequest, resp *corpus.SearchResponse, gone func(doc int) bool) error {
	versions := map[string]int64{}
	for _, h := range resp.Results {
		var doc, version, chunk int
		if _, err := fmt.Sscanf(h.Text, "doc%d v%d c%d ", &doc, &version, &chunk); err != nil {
			return fmt.Errorf("a stranger's text is shown: %q", h.Text)
		}
		switch {
		case h.ExternalID != fmt.Sprint("doc", doc):
			return fmt.Errorf("%s shows the text of another document: %q", h.ExternalID, h.Text)
		case h.Ordinal != chunk:
			return fmt.Errorf("ordinal %d of %q", h.Ordinal, h.Text)
		case h.Metadata["version"] != int64(version):
			return fmt.Errorf("metadata of version %v beside the text %q", h.Metadata["version"], h.Text)
		case !req.Filter.Matches(h.Metadata):
			return fmt.Errorf("%s does not match the filter", h.ExternalID)
		case gone(doc):
			return fmt.Errorf("%s was deleted before the search began", h.ExternalID)
		}
		if v, seen := versions[h.ExternalID]; seen && v != h.Version {
			return fmt.Errorf("%s is shown in versions %d and %d", h.ExternalID, v, h.Version)
		}
		versions[h.ExternalID] = h.Version
		for _, n := range append(h.Before, h.After...) {
			if !strings.HasPrefix(n.Text, fmt.Sprintf("doc%d v%d c%d ", doc, version, n.Ordinal)) {
				return fmt.Errorf("%q has the neighbour %q", h.Text, n.Text)
			}
		}
	}
	return nil
}

// TestSearchOfACollectionThatIsRecreated: a search that resolved the old one does not answer
// from it, nor fail.
func TestSearchOfACollectionThatIsRecreated(t *testing.T) {
	s := newStack(t)
	r := rand.New(rand.NewPCG(1, 1))
	ctx := t.Context()
	req := corpus.SearchRequest{Collection: stackCollection, Query: "doc1", IncludeText: true}
	for round := range 3 {
		results, err := s.ingest.Ingest(ctx, corpus.IngestRequest{Collection: stackCollection, Wait: true, Documents: []corpus.DocumentInput{
			{ID: fmt.Sprint("doc", round), Chunks: []corpus.ChunkInput{{Text: fmt.Sprintf("doc%d v0 c0 %s", round, someText(r))}}}}})
		if err != nil || results[0].Err != nil {
			t.Fatal(err, results)
		}
		got, err := s.search.Search(ctx, req)
		if err != nil || len(got.Results) != 1 || got.Results[0].ExternalID != fmt.Sprint("doc", round) {
			t.Fatalf("round %d: %+v, %v", round, got.Results, err)
		}
		if err := s.ingest.DeleteCollection(ctx, stackCollection); err != nil {
			t.Fatal(err)
		}
		if _, err := s.search.Search(ctx, req); corpus.CodeOf(err) != "collection_not_found" {
			t.Fatalf("round %d, after its deletion: %v", round, err)
		}
	}
	var ce *corpus.Error
	if _, err := s.search.Search(ctx, req); !errors.As(err, &ce) || ce.Kind != corpus.NotFound {
		t.Error(err)
	}
}
