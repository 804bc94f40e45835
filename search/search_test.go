package search

import (
	"context"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

func oneDocument(t *testing.T) (*world, grid) {
	w, e := newWorld(allHeads)
	w.put(t, e, "doc", corpus.Metadata{"lang": "en"}, "alpha beta", "gamma delta", "epsilon zeta")
	return w, e
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	w, e := oneDocument(t)
	dense, _ := newWorld(corpus.Dense)
	external, _ := newWorld(corpus.Dense | corpus.SparseHead)
	external.coll.Settings.Model = corpus.ExternalModel
	open, _ := oneDocument(t)
	open.coll.Settings.AllowUndeclared = true
	good := func() *corpus.Vectors {
		v := embed(t, e, "alpha beta", allHeads)
		return &v
	}
	nan := float32(math.NaN())
	for _, tc := range []struct {
		name string
		w    *world
		req  corpus.SearchRequest
		// want is "pointer code" of the first field error, "" for none.
		want string
	}{
		{"nothing", w, corpus.SearchRequest{}, " one_query"},
		{"two sources", w, corpus.SearchRequest{Query: "a", Like: "doc"}, " one_query"},
		{"mode", w, corpus.SearchRequest{Query: "a", Mode: "best"}, "/mode unknown_value"},
		{"no sparse head", dense, corpus.SearchRequest{Query: "a", Mode: corpus.ModeHybrid}, "/mode mode_unavailable"},
		{"no colbert", external, corpus.SearchRequest{Vectors: good(), Mode: corpus.ModeHybridRerank}, "/mode mode_unavailable"},
		{"text into external", external, corpus.SearchRequest{Query: "a"}, "/query vectors_required"},
		{"window", w, corpus.SearchRequest{Query: "a", Limit: 1000, Offset: 10001}, "/limit out_of_range"},
		{"negative", w, corpus.SearchRequest{Query: "a", Limit: -1}, "/limit out_of_range"},
		{"context", w, corpus.SearchRequest{Query: "a", Context: 21}, "/context out_of_range"},
		{"fusion", w, corpus.SearchRequest{Query: "a", Fusion: corpus.Fusion{Method: "sum"}}, "/fusion/method unknown_value"},
		{"k", w, corpus.SearchRequest{Query: "a", Fusion: corpus.Fusion{K: -1}}, "/fusion/k out_of_range"},
		{"weights", w, corpus.SearchRequest{Query: "a", Fusion: corpus.Fusion{Weights: []float64{1}}}, "/fusion/weights length_mismatch"},
		{"two weights of three", w, corpus.SearchRequest{Query: "a", Mode: corpus.ModeHybridRerank, Fusion: corpus.Fusion{Method: "weighted", Weights: []float64{1, 1}}}, "/fusion/weights length_mismatch"},
		{"no weight", w, corpus.SearchRequest{Query: "a", Fusion: corpus.Fusion{Weights: []float64{0, 0, 1}}}, "/fusion/weights out_of_range"},
		{"negative weight", w, corpus.SearchRequest{Query: "a", Fusion: corpus.Fusion{Weights: []float64{1, -1}}}, "/fusion/weights/1 out_of_range"},
		{"threshold", w, corpus.SearchRequest{Query: "a", ScoreThreshold: ptr(math.NaN())}, "/score_threshold not_finite"},
		{"like and rerank", w, corpus.SearchRequest{Like: "doc", Mode: corpus.ModeHybridRerank}, "/mode mode_unavailable"},
		{"highlight without sparse", dense, corpus.SearchRequest{Query: "a", Highlight: true}, "/highlight mode_unavailable"},
		{"undeclared", w, corpus.SearchRequest{Query: "a", Filter: &corpus.Filter{MustNot: []corpus.Condition{{Key: "nope", Match: "x"}}}}, "/filter/must_not/0/key field_not_declared"},
		{"undeclared and allowed", open, corpus.SearchRequest{Query: "a", Filter: &corpus.Filter{Must: []corpus.Condition{{Key: "nope", Match: "x"}}}}, ""},
		{"nested", w, corpus.SearchRequest{Query: "a", Filter: &corpus.Filter{Should: []corpus.Condition{{Key: "lang", Match: "en"}, {Filter: &corpus.Filter{Must: []corpus.Condition{{Key: "x.y", Match: "z"}}}}}}}, "/filter/should/1/filter/must/0/key field_not_declared"},
		{"range on keyword", w, corpus.SearchRequest{Query: "a", Filter: &corpus.Filter{Must: []corpus.Condition{{Key: "lang", Range: &corpus.Range{GT: int64(1)}}}}}, "/filter/must/0/range wrong_type"},
		{"text on keyword", w, corpus.SearchRequest{Query: "a", Filter: &corpus.Filter{Must: []corpus.Condition{{Key: "lang", Text: "x"}}}}, "/filter/must/0/text wrong_type"},
		{"text on undeclared", open, corpus.SearchRequest{Query: "a", Filter: &corpus.Filter{Must: []corpus.Condition{{Key: "x", Text: "x"}}}}, "/filter/must/0/key field_not_declared"},
		{"wrong length", w, corpus.SearchRequest{Vectors: &corpus.Vectors{Dense: []float32{1}}}, "/vectors/dense length_mismatch"},
		{"zero vector", w, corpus.SearchRequest{Vectors: &corpus.Vectors{Dense: make([]float32, 16)}}, "/vectors/dense not_finite"},
		{"not a number", w, corpus.SearchRequest{Vectors: &corpus.Vectors{Dense: append(make([]float32, 15), nan)}}, "/vectors/dense not_finite"},
		{"missing head", w, corpus.SearchRequest{Mode: corpus.ModeHybrid, Vectors: &corpus.Vectors{Dense: good().Dense}}, "/vectors vectors_required"},
		{"sparse twice", w, corpus.SearchRequest{Mode: corpus.ModeSparse, Vectors: &corpus.Vectors{Sparse: &corpus.Sparse{Indices: []uint32{7, 7}, Values: []float32{1, 1}}}}, "/vectors/sparse/indices/1 duplicate"},
		{"sparse lengths", w, corpus.SearchRequest{Mode: corpus.ModeSparse, Vectors: &corpus.Vectors{Sparse: &corpus.Sparse{Indices: []uint32{7}}}}, "/vectors/sparse length_mismatch"},
		{"sparse beyond the vocabulary", w, corpus.SearchRequest{Mode: corpus.ModeSparse, Vectors: &corpus.Vectors{Sparse: &corpus.Sparse{Indices: []uint32{1 << 31}, Values: []float32{1}}}}, "/vectors/sparse/indices/0 out_of_range"},
		{"sparse not a number", w, corpus.SearchRequest{Mode: corpus.ModeSparse, Vectors: &corpus.Vectors{Sparse: &corpus.Sparse{Indices: []uint32{7}, Values: []float32{nan}}}}, "/vectors/sparse/values/0 not_finite"},
		{"colbert row", w, corpus.SearchRequest{Mode: corpus.ModeHybridRerank, Vectors: &corpus.Vectors{Dense: good().Dense, Sparse: good().Sparse, ColBERT: [][]float32{good().ColBERT[0], {1}}}}, "/vectors/colbert/1 length_mismatch"},
		{"unsorted sparse, and unscaled dense, is fine", w, corpus.SearchRequest{Mode: corpus.ModeHybrid, Vectors: &corpus.Vectors{
			Dense: append(make([]float32, 15), 7), Sparse: &corpus.Sparse{Indices: []uint32{9, 7}, Values: []float32{1, 0}}}}, ""},
	} {
		tc.req.Collection = "kb"
		s := tc.w.service(e, Config{})
		_, err := s.Search(context.Background(), tc.req)
		got := ""
		var ce *corpus.Error
		if errors.As(err, &ce) && ce.Kind == corpus.Invalid && len(ce.Fields) > 0 {
			got = ce.Fields[0].Pointer + " " + ce.Fields[0].Code
		} else if err != nil {
			got = err.Error()
		}
		if got != tc.want {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
		if tc.want == "" || tc.req.Query == "" && tc.req.Vectors == nil {
			continue
		}
		_, err = s.SearchBatch(context.Background(), []corpus.SearchRequest{{Collection: "kb", Like: "nobody"}, tc.req})
		if errors.As(err, &ce) && len(ce.Fields) > 0 && ce.Fields[0].Pointer+" "+ce.Fields[0].Code != "/queries/1"+tc.want {
			t.Errorf("%s in a batch: %v", tc.name, ce.Fields[0])
		}
	}
}

func ptr[T any](v T) *T { return &v }

func TestDefaultMode(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		heads corpus.Heads
		given *corpus.Vectors
		want  corpus.SearchMode
	}{
		{corpus.Dense, nil, corpus.ModeDense},
		{corpus.Dense | corpus.SparseHead, nil, corpus.ModeHybrid},
		{allHeads, nil, corpus.ModeHybrid},
		{allHeads, &corpus.Vectors{Dense: append(make([]float32, 15), 1)}, corpus.ModeDense},
		{allHeads, &corpus.Vectors{Sparse: &corpus.Sparse{Indices: []uint32{5}, Values: []float32{1}}}, corpus.ModeSparse},
	} {
		w, e := newWorld(tc.heads)
		req := corpus.SearchRequest{Collection: "kb", Vectors: tc.given}
		if tc.given == nil {
			req.Query = "alpha"
		}
		got, err := w.service(e, Config{}).Search(context.Background(), req)
		if err != nil || got.Mode != tc.want || got.Results == nil {
			t.Errorf("%v: %v (%v), want %v", tc.heads, got.Mode, err, tc.want)
		}
	}
}

// TestReferenceFormulas: the weighted sums of the reference implementation, on its published
// example (weights 0.4, 0.2, 0.4; scores of the README, two decimals less than its own rounding).
func TestReferenceFormulas(t *testing.T) {
	t.Parallel()
	colbert := []float64{.77965, .46215, .45238, .78986}
	sparse := []float64{.19556, .0088, 0, .1803}
	dense := []float64{.62598, .34741, .34985, .67822}
	for i, want := range []struct{ two, three float64 }{{.4825, .60136}, {.23454, .32558}, {.23324, .32089}, {.51225, .62329}} {
		id := corpus.ID{1}
		q := &query{
			fusion: corpus.Fusion{Weights: []float64{.4, .2, .4}}, vecs: &corpus.Vectors{ColBERT: make([][]float32, 5)},
			lists: []*list{
				{head: corpus.Dense, scores: map[corpus.ID]float64{id: dense[i]}},
				{head: corpus.SparseHead, scores: map[corpus.ID]float64{id: sparse[i]}},
				{head: corpus.ColBERT, scores: map[corpus.ID]float64{id: 5 * colbert[i]}}, // the index sums over 5 vectors
			},
		}
		q.mode = corpus.ModeHybrid
		if got := q.weighted(id); math.Abs(got-want.two) > 1e-3 {
			t.Errorf("pair %d, sparse+dense: %.5f, want %.5f", i, got, want.two)
		}
		q.mode = corpus.ModeHybridRerank
		if got := q.weighted(id); math.Abs(got-want.three) > 1e-3 {
			t.Errorf("pair %d, all three: %.5f, want %.5f", i, got, want.three)
		}
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	w, e := oneDocument(t)
	got, err := w.service(e, Config{}).Search(context.Background(), corpus.SearchRequest{
		Collection: "kb", Query: "alpha beta", Mode: corpus.ModeHybridRerank, Explain: true, Fusion: corpus.Fusion{Method: "weighted"}})
	if err != nil {
		t.Fatal(err)
	}
	first := got.Results[0].Heads
	for _, head := range []string{"dense", "sparse", "colbert"} {
		if first[head].Rank != 1 {
			t.Errorf("%s rank %d, want 1", head, first[head].Rank)
		}
	}
	sum := (first["dense"].Score + first["sparse"].Score + first["colbert"].Score) / 3
	if math.Abs(sum-got.Results[0].Score) > 1e-9 {
		t.Errorf("the heads' scores give %v, the score is %v", sum, got.Results[0].Score)
	}
	if got.Fusion.Method != "weighted" || got.Fusion.K != 60 || len(got.Fusion.Weights) != 3 {
		t.Errorf("fusion %+v", got.Fusion)
	}
}

func TestHighlights(t *testing.T) {
	t.Parallel()
	w, e := newWorld(allHeads)
	w.put(t, e, "doc", nil, "Alpha, and an omega; internationalisation of alpha.")
	for _, mode := range []corpus.SearchMode{corpus.ModeHybrid, corpus.ModeDense} {
		got, err := w.service(e, Config{}).Search(context.Background(), corpus.SearchRequest{
			Collection: "kb", Query: "alpha internationalisation", Mode: mode, Highlight: true})
		if err != nil {
			t.Fatal(err)
		}
		have := slices.Clone(got.Results[0].Highlights)
		slices.Sort(have)
		if want := []string{"Alpha", "alpha", "internationalisation"}; !reflect.DeepEqual(have, want) {
			t.Errorf("%s: highlights %q, want %q", mode, have, want)
		}
		if got.Results[0].Text != "" {
			t.Error("text was shown without being asked for")
		}
	}
}

// TestWideningSpansDeadNeighbours: the hundred nearest points are orphans, and the answer is
// full all the same (P7; interleaving 23).
func TestWideningSpansDeadNeighbours(t *testing.T) {
	t.Parallel()
	w, e := newWorld(allHeads)
	for i := range 20 {
		w.put(t, e, fmt.Sprint("doc ", i), nil, "alpha beta "+vocabulary[i%len(vocabulary)])
	}
	v := embed(t, e, "alpha", allHeads)
	v.Sparse.Values[0] *= 2 // nearest under every head
	for range 300 {
		w.points[w.id()] = &wpoint{vectors: v}
	}
	s := w.service(e, Config{})
	for _, mode := range []corpus.SearchMode{corpus.ModeDense, corpus.ModeSparse, corpus.ModeHybrid, corpus.ModeHybridRerank} {
		w.hinted = nil
		got, err := s.Search(context.Background(), corpus.SearchRequest{Collection: "kb", Query: "alpha", Mode: mode, Limit: 10})
		if err != nil {
			t.Fatal(err)
		}
		if len(got.Results) != 10 || got.Truncated || got.Widened == 0 || got.Filtered < 300 {
			t.Errorf("%s: %d results, widened %d, filtered %d, truncated %v", mode, len(got.Results), got.Widened, got.Filtered, got.Truncated)
		}
		if len(w.hinted) != 300 {
			t.Errorf("%s: %d ids hinted, want each of 300 once", mode, len(w.hinted))
		}
		last := w.lastAsked[0]
		for i, id := range last.Exclude {
			if w.chunks[id] != nil {
				t.Errorf("%s: live %v is excluded", mode, id)
			}
			if slices.Contains(last.Exclude[i+1:], id) {
				t.Errorf("%s: %v is excluded twice", mode, id)
			}
		}
		if len(last.Exclude) == 0 {
			t.Errorf("%s: known-bad ids are fetched again", mode)
		}
	}
}

// TestEqualScoresAreOrderedByID: whichever of them the index keeps back, pages are those of one
// order. There is an end to it where half the collection is equal.
func TestEqualScoresAreOrderedByID(t *testing.T) {
	t.Parallel()
	w, e := newWorld(corpus.Dense | corpus.SparseHead)
	for i := range 200 {
		w.put(t, e, fmt.Sprint("doc ", i), nil, "alpha")
	}
	w.contrary = true
	s := w.service(e, Config{})
	var ids []corpus.ID
	for _, d := range w.docs {
		ids = append(ids, d.serving...)
	}
	slices.SortFunc(ids, corpus.ID.Compare)
	for _, mode := range []corpus.SearchMode{corpus.ModeDense, corpus.ModeSparse, corpus.ModeHybrid} {
		for offset := 0; offset < 40; offset += 5 {
			got, err := s.Search(context.Background(), corpus.SearchRequest{Collection: "kb", Query: "alpha", Mode: mode, Limit: 5, Offset: offset})
			if err != nil || len(got.Results) != 5 || got.Truncated {
				t.Fatalf("%s: %d results, truncated %v, %v", mode, len(got.Results), got.Truncated, err)
			}
			for i, r := range got.Results {
				if r.ID != ids[offset+i] {
					t.Fatalf("%s: result %d is %v, want %v", mode, offset+i, r.ID, ids[offset+i])
				}
			}
		}
	}
	for i := range 3000 {
		w.put(t, e, fmt.Sprint("more ", i), nil, "alpha")
	}
	got, err := s.Search(context.Background(), corpus.SearchRequest{Collection: "kb", Query: "alpha", Mode: corpus.ModeDense, Limit: 5})
	if err != nil || len(got.Results) != 5 || got.Truncated {
		t.Fatalf("%d results, truncated %v, %v", len(got.Results), got.Truncated, err)
	}
	if asked := w.lastAsked[0].Limit; asked > maxTied {
		t.Errorf("%d candidates were asked for to tell equal scores apart", asked)
	}
}

func TestWideningStopsAtTheCap(t *testing.T) {
	t.Parallel()
	w, e := newWorld(corpus.Dense)
	v := embed(t, e, "alpha", corpus.Dense)
	for range 6000 {
		w.points[w.id()] = &wpoint{vectors: v}
	}
	w.put(t, e, "doc", nil, "omega")
	got, err := w.service(e, Config{}).Search(context.Background(), corpus.SearchRequest{Collection: "kb", Query: "alpha", Limit: 1})
	if err != nil {
		t.Fatal(err)
	}
	if !got.Truncated || len(got.Results) != 0 {
		t.Errorf("truncated %v with %d results, want a short answer that says so", got.Truncated, len(got.Results))
	}
}

// TestRunningOutOfTimeWhileWidening: what was joined before is the answer.
func TestRunningOutOfTimeWhileWidening(t *testing.T) {
	t.Parallel()
	w, e := newWorld(corpus.Dense)
	v := embed(t, e, "alpha", corpus.Dense)
	w.put(t, e, "doc", nil, "alpha")
	for range 100 {
		w.points[w.id()] = &wpoint{vectors: v}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s := w.service(e, Config{})
	calls := 0
	index := slowIndex{w, func(ctx context.Context) error {
		if calls++; calls > 1 {
			<-ctx.Done()
		}
		return ctx.Err()
	}}
	s.index = index
	got, err := s.Search(ctx, corpus.SearchRequest{Collection: "kb", Query: "alpha", Timeout: 150 * time.Millisecond})
	if err != nil || !got.Truncated {
		t.Fatalf("truncated %v, %v", got.Truncated, err)
	}
	if calls < 2 {
		t.Error("the query was never widened")
	}
}

// A document that switches between the index's answer and the join is shown whole: what the
// index said is of the old version, or of a part of the new one.
func TestASwitchWhileTheIndexAnswers(t *testing.T) {
	t.Parallel()
	for _, always := range []bool{false, true} {
		w, e := oneDocument(t)
		w.put(t, e, "other", nil, "alpha beta") // it stays, and hides that the list is short
		w.beforeJoin = func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			if always || w.joins == 0 {
				w.put(t, e, "doc", nil, "alpha one", "alpha two").switched = time.Now()
			}
		}
		s := w.service(e, Config{})
		got, err := s.Search(context.Background(), corpus.SearchRequest{Collection: "kb", Query: "alpha", Limit: 10})
		if err != nil {
			t.Fatal(err)
		}
		seen := 0
		for _, r := range got.Results {
			if r.ExternalID == "doc" {
				seen++
			}
		}
		if !always && (seen != 2 || w.joins != 2 || got.Truncated) {
			t.Errorf("%d of 2 chunks after %d joins, truncated %v", seen, w.joins, got.Truncated)
		}
		if always && (w.joins != maxRefreshes+1 || !got.Truncated) {
			t.Errorf("switching all the time: %d joins, truncated %v", w.joins, got.Truncated)
		}
		if got.Widened != 0 {
			t.Errorf("widened %d times", got.Widened)
		}
	}
}

type slowIndex struct {
	*world
	wait func(context.Context) error
}

func (s slowIndex) QueryBatch(ctx context.Context, ix corpus.Index, q []corpus.IndexQuery) ([][]corpus.Candidate, error) {
	if err := s.wait(ctx); err != nil {
		return nil, corpus.Wrap(corpus.Unavailable, "index_timeout", "the index did not answer in time", err)
	}
	return s.world.QueryBatch(ctx, ix, q)
}

type slowLedger struct {
	*world
	wait func(context.Context) error
}

func (s slowLedger) JoinCandidates(ctx context.Context, req corpus.JoinRequest) (corpus.Joined, error) {
	if err := s.wait(ctx); err != nil {
		return corpus.Joined{}, corpus.Wrap(corpus.Unavailable, "database_unavailable", "the database did not answer in time", err)
	}
	return s.world.JoinCandidates(ctx, req)
}

func TestTimeoutNamesWhatWasLate(t *testing.T) {
	t.Parallel()
	hang := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	for _, late := range []string{"the embedder", "the index", "the ledger"} {
		w, e := oneDocument(t)
		s := w.service(e, Config{})
		switch late {
		case "the embedder":
			e.Gate = func(ctx context.Context, _ corpus.EmbedRequest) error { return hang(ctx) }
		case "the index":
			s.index = slowIndex{w, hang}
		case "the ledger":
			s.ledger = slowLedger{w, hang}
		}
		req := corpus.SearchRequest{Collection: "kb", Query: "alpha", Timeout: 20 * time.Millisecond}
		_, err := s.Search(context.Background(), req)
		var ce *corpus.Error
		if !errors.As(err, &ce) || ce.Code != "search_timeout" || ce.Kind != corpus.Unavailable || ce.RetryAfter <= 0 ||
			!errors.Is(err, context.DeadlineExceeded) || !strings.HasPrefix(ce.Detail, late+" did not answer") {
			t.Errorf("%s: %v", late, err)
		}
		// A caller who leaves is told nothing of the kind.
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(10*time.Millisecond, cancel)
		req.Timeout = 0
		if _, err = s.Search(ctx, req); err == nil || corpus.CodeOf(err) == "search_timeout" || !errors.Is(err, context.Canceled) {
			t.Errorf("%s, caller left: %v", late, err)
		}
		cancel()
	}
}

// TestIndexRetiredMeanwhile: a search starts again with the new index and its model, and
// gives up with a retryable error when that is gone as well (interleaving 15).
func TestIndexRetiredMeanwhile(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	req := corpus.SearchRequest{Collection: "kb", Query: "alpha"}
	swap := func(w *world) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.ix.ID = w.id()
	}
	t.Run("between query and join", func(t *testing.T) {
		w, e := oneDocument(t)
		s := w.service(e, Config{})
		var once sync.Once
		w.beforeJoin = func() { once.Do(func() { swap(w) }) }
		if got, err := s.Search(ctx, req); err != nil || len(got.Results) != 3 {
			t.Errorf("%d results, %v", len(got.Results), err)
		}
		if w.resolves != 2 {
			t.Errorf("resolved %d times, want 2", w.resolves)
		}
	})
	t.Run("known from an earlier search", func(t *testing.T) {
		w, e := oneDocument(t)
		s := w.service(e, Config{})
		for range 2 {
			if _, err := s.Search(ctx, req); err != nil {
				t.Fatal(err)
			}
		}
		if w.resolves != 1 {
			t.Errorf("resolved %d times for two searches, want 1", w.resolves)
		}
		swap(w)
		if got, err := s.Search(ctx, req); err != nil || len(got.Results) != 3 {
			t.Errorf("%d results, %v", len(got.Results), err)
		}
	})
	t.Run("the index is gone", func(t *testing.T) {
		w, e := oneDocument(t)
		s := w.service(e, Config{})
		w.queryErr = corpus.Errorf(corpus.NotFound, "index_not_found", "gone")
		_, err := s.Search(ctx, req)
		if corpus.CodeOf(err) != "index_unavailable" || corpus.KindOf(err) != corpus.Unavailable || w.queries != 2 {
			t.Errorf("%v after %d queries", err, w.queries)
		}
	})
	t.Run("every time", func(t *testing.T) {
		w, e := oneDocument(t)
		s := w.service(e, Config{})
		w.beforeJoin = func() { swap(w) }
		if _, err := s.Search(ctx, req); corpus.CodeOf(err) != "index_unavailable" {
			t.Error(err)
		}
	})
	t.Run("the collection is gone", func(t *testing.T) {
		w, e := oneDocument(t)
		s := w.service(e, Config{})
		if _, err := s.Search(ctx, req); err != nil {
			t.Fatal(err)
		}
		w.coll.Name = "another"
		if _, err := s.Search(ctx, req); corpus.CodeOf(err) != "collection_not_found" {
			t.Error(err)
		}
	})
	t.Run("another model", func(t *testing.T) {
		w, e := oneDocument(t)
		w.ix.Fingerprint = "other"
		if _, err := w.service(e, Config{}).Search(ctx, req); corpus.CodeOf(err) != "model_mismatch" || corpus.KindOf(err) != corpus.Conflict {
			t.Error(err)
		}
	})
	t.Run("a field declared meanwhile", func(t *testing.T) {
		w, e := oneDocument(t)
		s := w.service(e, Config{})
		req := req
		if _, err := s.Search(ctx, req); err != nil {
			t.Fatal(err)
		}
		w.coll.Settings.Fields = map[string]corpus.FieldType{"new": corpus.Keyword}
		req.Filter = &corpus.Filter{MustNot: []corpus.Condition{{Key: "new", Match: "x"}}}
		if _, err := s.Search(ctx, req); err != nil {
			t.Error(err)
		}
	})
}

func TestErrorsOfTheIndex(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		err  *corpus.Error
		want corpus.Kind
		code string
	}{
		{corpus.Errorf(corpus.Unavailable, "index_unavailable", "down"), corpus.Unavailable, "index_unavailable"},
		{corpus.Errorf(corpus.Overloaded, "index_rate_limited", "slow down"), corpus.Overloaded, "index_rate_limited"},
		{corpus.Errorf(corpus.Invalid, "index_refused", "no such vector"), corpus.Conflict, "index_refused"},
	} {
		w, e := oneDocument(t)
		w.queryErr = tc.err
		_, err := w.service(e, Config{}).Search(context.Background(), corpus.SearchRequest{Collection: "kb", Query: "alpha"})
		if corpus.KindOf(err) != tc.want || corpus.CodeOf(err) != tc.code {
			t.Errorf("%v became %v", tc.err, err)
		}
	}
}

// TestDamagedVectors: a point whose score is no number is left out, and hinted (P7).
func TestDamagedVectors(t *testing.T) {
	t.Parallel()
	w, e := oneDocument(t)
	bad := w.put(t, e, "damaged", nil, "alpha").serving[0]
	w.points[bad].vectors = embed(t, e, "alpha", allHeads)
	w.points[bad].vectors.Dense[0] = float32(math.NaN())
	got, err := w.service(e, Config{}).Search(context.Background(), corpus.SearchRequest{Collection: "kb", Query: "alpha", Mode: corpus.ModeDense})
	if err != nil || len(got.Results) != 3 {
		t.Errorf("%d results, %v", len(got.Results), err)
	}
	if !slices.Contains(w.hinted, bad) {
		t.Error("the damaged point was not hinted")
	}
}

func TestVectorsOfResults(t *testing.T) {
	t.Parallel()
	w, e := oneDocument(t)
	s := w.service(e, Config{})
	req := corpus.SearchRequest{Collection: "kb", Query: "alpha", IncludeVector: true}
	got, err := s.Search(context.Background(), req)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range got.Results {
		if h.Vectors == nil || !slices.Equal(h.Vectors.Dense, w.chunks[h.ID].vectors.Dense) {
			t.Errorf("%v: wrong vectors", h.ID)
		}
	}
}

// TestLikeWithoutPoints: all points of the document are missing; its texts stand in (P7).
func TestLikeWithoutPoints(t *testing.T) {
	t.Parallel()
	w, e := oneDocument(t)
	d := w.put(t, e, "twin", nil, "alpha beta")
	gone := d.serving[0]
	delete(w.points, gone)
	s := w.service(e, Config{})
	got, err := s.Search(context.Background(), corpus.SearchRequest{Collection: "kb", Like: "twin", IncludeText: true, Mode: corpus.ModeDense})
	if err != nil || len(got.Results) != 3 || got.Results[0].Text != "alpha beta" {
		t.Errorf("%+v, %v", got.Results, err)
	}
	if !slices.Contains(w.hinted, gone) {
		t.Error("the missing point was not hinted")
	}
	w.put(t, e, "hollow", nil)
	if _, err := s.Search(context.Background(), corpus.SearchRequest{Collection: "kb", Like: "hollow"}); corpus.CodeOf(err) != "document_not_indexed" {
		t.Errorf("a document without chunks: %v", err)
	}
	if _, err := s.Search(context.Background(), corpus.SearchRequest{Collection: "kb", Like: "nobody"}); corpus.CodeOf(err) != "document_not_found" {
		t.Errorf("an unknown document: %v", err)
	}
}

func TestEmbedderErrors(t *testing.T) {
	t.Parallel()
	w, e := oneDocument(t)
	e.Fail = func(text string) error {
		if strings.Contains(text, "poison") {
			return corpus.Errorf(corpus.Invalid, "input_too_long", "too long")
		}
		return nil
	}
	s := w.service(e, Config{})
	_, err := s.SearchBatch(context.Background(), []corpus.SearchRequest{{Collection: "kb", Query: "alpha"}, {Collection: "kb", Query: "poison"}})
	var ce *corpus.Error
	if !errors.As(err, &ce) || ce.Kind != corpus.Invalid || len(ce.Fields) != 1 || ce.Fields[0].Pointer != "/queries/1/query" {
		t.Errorf("one bad query: %v", err)
	}
	e.Gate = func(context.Context, corpus.EmbedRequest) error {
		return &corpus.Error{Kind: corpus.Overloaded, Code: "overloaded", RetryAfter: time.Second}
	}
	if _, err := s.Search(context.Background(), corpus.SearchRequest{Collection: "kb", Query: "beta"}); corpus.KindOf(err) != corpus.Overloaded {
		t.Errorf("a full queue: %v", err)
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	w, e := oneDocument(t)
	reg := prometheus.NewRegistry()
	s := New(w, w, e, w, Config{}, reg)
	for range 3 {
		if _, err := s.Search(context.Background(), corpus.SearchRequest{Collection: "kb", Query: "alpha"}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Search(context.Background(), corpus.SearchRequest{Collection: "nope", Query: "alpha"}); err == nil {
		t.Fatal("an unknown collection was found")
	}
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
	want := `
# HELP lockstep_search_queries_total Queries answered, by mode, and failed, by error kind.
# TYPE lockstep_search_queries_total counter
lockstep_search_queries_total{mode="hybrid",result="ok"} 3
lockstep_search_queries_total{mode="none",result="not_found"} 1
# HELP lockstep_search_query_cache_total Query embeddings by where they came from: hit (cached), shared (computed for another request), miss.
# TYPE lockstep_search_query_cache_total counter
lockstep_search_query_cache_total{result="hit"} 2
lockstep_search_query_cache_total{result="miss"} 1
lockstep_search_query_cache_total{result="shared"} 0
# HELP lockstep_search_results_total Results shown.
# TYPE lockstep_search_results_total counter
lockstep_search_results_total 9
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want),
		"lockstep_search_queries_total", "lockstep_search_query_cache_total", "lockstep_search_results_total"); err != nil {
		t.Error(err)
	}
}

// TestLikeALongDocument: more chunks than are averaged, and none of them is an answer.
func TestLikeALongDocument(t *testing.T) {
	t.Parallel()
	w, e := oneDocument(t)
	texts := make([]string, likeChunks+40)
	for i := range texts {
		texts[i] = "alpha beta"
	}
	w.put(t, e, "long", nil, texts...)
	got, err := w.service(e, Config{}).Search(context.Background(), corpus.SearchRequest{Collection: "kb", Like: "long", Limit: 3, Mode: corpus.ModeDense})
	if err != nil || len(got.Results) != 3 || got.Truncated {
		t.Fatalf("%d results, truncated %v, %v", len(got.Results), got.Truncated, err)
	}
	for _, h := range got.Results {
		if h.ExternalID == "long" {
			t.Error("the document finds itself")
		}
	}
	if got.Filtered != 0 {
		t.Errorf("its own chunks count as filtered: %d", got.Filtered)
	}
}
