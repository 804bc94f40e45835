package search

import (
	"cmp"
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// expected is a hit as the brute force computes it.
type expected struct {
	id     corpus.ID
	score  float64
	chunks int
}

// truth is the brute force's answer: the page, and the whole ranking it is cut from.
type truth struct{ page, all []expected }

// bruteForce answers a request from what is true: the live chunks that the index holds, as if
// nothing else lay in it. It is written from the definitions in docs/search.md, not from the
// service's code.
func (w *world) bruteForce(req corpus.SearchRequest, v *corpus.Vectors) truth {
	type chunk struct {
		id  corpus.ID
		doc *wdoc
		p   *wpoint
	}
	var live []chunk
	for _, d := range w.docs {
		for _, id := range d.serving {
			p := w.points[id]
			if p != nil && d.name != req.Like && req.Filter.Matches(d.metadata) && req.Filter.Matches(p.metadata) {
				live = append(live, chunk{id, d, p})
			}
		}
	}
	score := func(head corpus.Heads, c chunk) (float64, bool) { return rawScore(head, v, &c.p.vectors) }
	order := func(head corpus.Heads) []chunk {
		var l []chunk
		for _, c := range live {
			if _, ok := score(head, c); ok {
				l = append(l, c)
			}
		}
		slices.SortFunc(l, func(a, b chunk) int {
			sa, _ := score(head, a)
			sb, _ := score(head, b)
			return cmp.Or(cmp.Compare(sb, sa), a.id.Compare(b.id))
		})
		return l
	}
	weights, k := req.Fusion.Weights, float64(req.Fusion.K)
	if weights == nil {
		weights = []float64{1, 1, 1}
	}
	if k == 0 {
		k = 60
	}
	window := req.Offset + req.Limit
	at := func(depth int) (hits []expected, cut bool) {
		final := map[corpus.ID]float64{}
		switch req.Mode {
		case corpus.ModeDense, corpus.ModeSparse:
			head := corpus.Dense
			if req.Mode == corpus.ModeSparse {
				head = corpus.SparseHead
			}
			for _, c := range order(head)[:min(depth, len(order(head)))] {
				final[c.id], _ = score(head, c)
			}
		default:
			dense, sparse := order(corpus.Dense), order(corpus.SparseHead)
			dense, sparse = dense[:min(depth, len(dense))], sparse[:min(depth, len(sparse))]
			for h, l := range [][]chunk{dense, sparse} {
				mean, sd := 0.0, 0.0
				head := []corpus.Heads{corpus.Dense, corpus.SparseHead}[h]
				for _, c := range l {
					s, _ := score(head, c)
					mean += s
				}
				mean /= float64(len(l))
				for _, c := range l {
					s, _ := score(head, c)
					sd += (s - mean) * (s - mean)
				}
				sd = math.Sqrt(sd / float64(len(l)-1))
				for r, c := range l {
					s, _ := score(head, c)
					d, _ := score(corpus.Dense, c)
					sp, _ := score(corpus.SparseHead, c)
					var colbert float64
					if req.Mode == corpus.ModeHybridRerank {
						colbert, _ = score(corpus.ColBERT, c)
						colbert /= float64(len(v.ColBERT))
					}
					switch {
					case req.Fusion.Method == "weighted" && req.Mode == corpus.ModeHybridRerank:
						final[c.id] = (colbert*weights[2] + sp*weights[1] + d*weights[0]) / (weights[0] + weights[1] + weights[2])
					case req.Mode == corpus.ModeHybridRerank:
						final[c.id] = colbert
					case req.Fusion.Method == "weighted":
						final[c.id] = (sp*weights[1] + d*weights[0]) / (weights[0] + weights[1])
					case req.Fusion.Method == "dbsf":
						norm := (s - (mean - 3*sd)) / (6 * sd)
						if len(l) < 2 || sd < 1e-7 {
							norm = 0.5
						}
						final[c.id] += weights[h] * norm
					default:
						final[c.id] += weights[h] / (k + float64(r) + 1)
					}
				}
			}
		}
		for id, s := range final {
			if req.ScoreThreshold != nil && s < *req.ScoreThreshold {
				cut = true
				continue
			}
			hits = append(hits, expected{id: id, score: s})
		}
		slices.SortFunc(hits, func(a, b expected) int {
			return cmp.Or(cmp.Compare(b.score, a.score), a.id.Compare(b.id))
		})
		return hits, cut
	}
	depth := window
	if req.Mode == corpus.ModeHybrid || req.Mode == corpus.ModeHybridRerank {
		depth = 64
		for depth < 2*window {
			depth *= 2
		}
	} else if req.GroupByDocument {
		depth *= 4
	}
	hits, cut := at(depth)
	if req.GroupByDocument {
		group := func() (out []expected) {
			best := map[*wdoc]int{}
			for _, h := range hits {
				d := w.chunks[h.id].doc
				i, ok := best[d]
				if !ok {
					i = len(out)
					best[d] = i
					out = append(out, h)
				}
				out[i].chunks++
			}
			return out
		}
		for len(group()) < window && !cut && depth < 2*len(live) {
			depth *= 2
			hits, cut = at(depth)
		}
		hits = group()
	}
	return truth{hits[min(req.Offset, len(hits)):min(window, len(hits))], hits}
}

func randomRequest(r *rand.Rand) corpus.SearchRequest {
	req := corpus.SearchRequest{
		Collection: "kb", Query: someText(r), Limit: 1 + r.IntN(20), IncludeText: true, IncludeMetadata: r.IntN(2) == 0,
		Mode:            []corpus.SearchMode{corpus.ModeDense, corpus.ModeSparse, corpus.ModeHybrid, corpus.ModeHybridRerank}[r.IntN(4)],
		GroupByDocument: r.IntN(3) == 0, Explain: r.IntN(4) == 0, Context: r.IntN(3),
	}
	if r.IntN(3) == 0 {
		req.Offset = r.IntN(30)
	}
	if r.IntN(3) == 0 {
		req.Filter = &corpus.Filter{Must: []corpus.Condition{{Key: "lang", Any: []any{"en", "de"}}}}
		if r.IntN(2) == 0 {
			req.Filter.MustNot = []corpus.Condition{{Key: "n", Match: int64(2)}}
		}
	}
	switch r.IntN(4) {
	case 0:
		req.Fusion = corpus.Fusion{Method: "weighted", Weights: [][]float64{nil, {0.4, 0.2, 0.4}, {1, 0.3, 1}}[r.IntN(3)]}
	case 1:
		req.Fusion = corpus.Fusion{Method: "dbsf", Weights: [][]float64{nil, {2, 1}}[r.IntN(2)]}
		if req.Mode == corpus.ModeHybridRerank {
			req.Fusion.Weights = nil
		}
	case 2:
		req.Fusion = corpus.Fusion{Method: "rrf", K: 1 + r.IntN(100), Weights: [][]float64{nil, {1, 0.5}}[r.IntN(2)]}
	}
	if r.IntN(4) == 0 {
		t := r.Float64() * 0.6
		if req.Mode == corpus.ModeHybrid && req.Fusion.Method != "weighted" {
			t *= 0.05
		}
		req.ScoreThreshold = &t
	}
	return req
}

func compare(t *testing.T, w *world, req corpus.SearchRequest, got corpus.SearchResponse, want truth) {
	t.Helper()
	if len(got.Results) != len(want.page) {
		t.Fatalf("%+v\n%d results, want %d (filtered %d, widened %d, truncated %v)", req, len(got.Results), len(want.page), got.Filtered, got.Widened, got.Truncated)
	}
	if got.Truncated {
		t.Fatalf("%+v\ntruncated without need", req)
	}
	// The last bits of a fused score depend on the order of its additions, nothing else does:
	// scores that close may stand in either order, and other results not.
	const last = 1e-9
	known := map[corpus.ID]expected{}
	for _, e := range want.all {
		known[e.id] = e
	}
	for i, r := range got.Results {
		own, ok := known[r.ID]
		switch e := want.page[i]; {
		case !ok:
			t.Fatalf("%+v\nresult %d is %v, which the brute force does not find", req, i, r.ID)
		case math.Abs(r.Score-e.score) > last, math.Abs(r.Score-own.score) > last:
			t.Fatalf("%+v\nresult %d is %v with score %v, want %v with %v", req, i, r.ID, r.Score, e.id, e.score)
		case r.ChunkCount != own.chunks:
			t.Fatalf("%+v\nresult %d counts %d chunks, want %d", req, i, r.ChunkCount, own.chunks)
		}
		delete(known, r.ID) // nothing twice
		w.checkTrue(t, req, r)
	}
}

// checkTrue asserts that a result says what the ledger says: P1 and P2.
func (w *world) checkTrue(t *testing.T, req corpus.SearchRequest, r corpus.SearchResult) {
	t.Helper()
	c := w.chunks[r.ID]
	if c == nil {
		t.Fatalf("%v is a phantom", r.ID)
	}
	d := c.doc
	at := slices.Index(d.serving, r.ID)
	switch {
	case at < 0:
		t.Fatalf("%v of %s is not in the serving version", r.ID, d.name)
	case r.DocumentID != d.key, r.ExternalID != d.name, r.Version != d.version, r.Ordinal != at:
		t.Fatalf("result says %s version %d ordinal %d, the ledger %s version %d ordinal %d", r.ExternalID, r.Version, r.Ordinal, d.name, d.version, at)
	case r.Text != c.text:
		t.Fatalf("text %q, want %q", r.Text, c.text)
	case !req.Filter.Matches(d.metadata):
		t.Fatalf("%s does not match the filter", d.name)
	case req.IncludeMetadata && string(r.Metadata.JSON()) != string(d.metadata.JSON()):
		t.Fatalf("metadata %s, want %s", r.Metadata.JSON(), d.metadata.JSON())
	case len(r.Before) != min(at, req.Context), len(r.After) != min(len(d.serving)-1-at, req.Context):
		t.Fatalf("%d chunks before and %d after, at %d of %d", len(r.Before), len(r.After), at, len(d.serving))
	}
	for i, n := range slices.Concat(r.Before, r.After) {
		k := at - len(r.Before) + i
		if i >= len(r.Before) {
			k++
		}
		if n.ID != d.serving[k] || n.Ordinal != k || n.Text != w.chunks[n.ID].text {
			t.Fatalf("neighbour %d is %+v", i, n)
		}
	}
}

// TestExactInEveryMode: whatever else lies in the index, every mode answers what a brute
// force over the live chunks answers (P1, P2, P7, and the formulas).
func TestExactInEveryMode(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	ctx := context.Background()
	widened := 0
	for range 30 {
		w, e := randomWorld(t, r, allHeads)
		s := w.service(e, Config{})
		var reqs []corpus.SearchRequest
		for range 12 {
			req := randomRequest(r)
			reqs = append(reqs, req)
			got, err := s.Search(ctx, req)
			if err != nil {
				t.Fatalf("%+v: %v", req, err)
			}
			widened += got.Widened
			v := embed(t, e, req.Query, allHeads)
			compare(t, w, req, got, w.bruteForce(req, &v))
		}
		// The same as one batch.
		queries, joins := w.queries, w.joins
		many, err := s.SearchBatch(ctx, reqs)
		if err != nil {
			t.Fatal(err)
		}
		rounds := 0
		for i, got := range many {
			v := embed(t, e, reqs[i].Query, allHeads)
			compare(t, w, reqs[i], got, w.bruteForce(reqs[i], &v))
			rounds = max(rounds, got.Widened+1)
		}
		if w.queries-queries > rounds || w.joins-joins != rounds {
			t.Fatalf("a batch of %d rounds took %d queries and %d joins", rounds, w.queries-queries, w.joins-joins)
		}
		for _, id := range w.hinted {
			if c := w.chunks[id]; c != nil && !c.died {
				t.Fatalf("%v was hinted, but is not dead", id)
			}
		}
	}
	if widened == 0 {
		t.Error("no query was ever widened: the test does not reach it")
	}
}

// TestLikeInEveryMode: a document as the query finds what its mean vector finds.
func TestLikeInEveryMode(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	ctx := context.Background()
	tried := 0
	for range 12 {
		w, e := randomWorld(t, r, allHeads)
		s := w.service(e, Config{})
		_, before := e.Counts()
		for _, d := range w.docs {
			var all []*corpus.Vectors
			for _, id := range d.serving {
				if p := w.points[id]; p != nil {
					all = append(all, &p.vectors)
				}
			}
			if len(all) == 0 || d.serving == nil {
				continue
			}
			v := &corpus.Vectors{Dense: make([]float32, 16), Sparse: &corpus.Sparse{}}
			terms := map[uint32]float64{}
			norm := 0.0
			for i := range v.Dense {
				for _, x := range all {
					v.Dense[i] += x.Dense[i]
				}
				norm += float64(v.Dense[i]) * float64(v.Dense[i])
			}
			for i := range v.Dense {
				v.Dense[i] = float32(float64(v.Dense[i]) / math.Sqrt(norm))
			}
			for _, x := range all {
				for i, term := range x.Sparse.Indices {
					terms[term] += float64(x.Sparse.Values[i]) / float64(len(all))
				}
			}
			for term := range terms {
				v.Sparse.Indices = append(v.Sparse.Indices, term)
			}
			slices.Sort(v.Sparse.Indices)
			for _, term := range v.Sparse.Indices {
				v.Sparse.Values = append(v.Sparse.Values, float32(terms[term]))
			}
			for _, mode := range []corpus.SearchMode{corpus.ModeDense, corpus.ModeSparse, corpus.ModeHybrid} {
				req := corpus.SearchRequest{Collection: "kb", Like: d.name, Limit: 7, Mode: mode, IncludeText: true,
					Fusion: corpus.Fusion{Method: "weighted"}}
				got, err := s.Search(ctx, req)
				if err != nil {
					t.Fatal(err)
				}
				want := w.bruteForce(req, v).page
				if len(got.Results) != len(want) {
					t.Fatalf("%s: %d results, want %d", mode, len(got.Results), len(want))
				}
				for i, h := range got.Results {
					if h.ExternalID == d.name {
						t.Fatalf("%s finds itself", d.name)
					}
					if math.Abs(h.Score-want[i].score) > 1e-5 {
						t.Fatalf("%s: result %d scores %v, want %v", mode, i, h.Score, want[i].score)
					}
				}
				tried++
			}
		}
		if _, after := e.Counts(); after != before {
			t.Fatalf("%d texts were embedded for documents whose points are there", after-before)
		}
	}
	if tried == 0 {
		t.Error("nothing was tried")
	}
}

// TestOneSnapshot: documents change between and during the calls of a search. What is shown
// is what the last join read, no more (P1, P2, widening without mixing joins).
func TestOneSnapshot(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	ctx := context.Background()
	for range 20 {
		w, e := randomWorld(t, r, allHeads)
		s := w.service(e, Config{})
		change := func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			for _, d := range w.docs { // map order: any documents
				switch r.IntN(12) {
				case 0:
					w.put(t, e, d.name, corpus.Metadata{"lang": "en", "n": int64(r.IntN(5))}, someText(r), someText(r))
				case 1:
					if d.serving != nil {
						w.delete(d)
					}
				case 2:
					d.metadata = corpus.Metadata{"lang": "fr", "n": int64(r.IntN(5))}
				}
			}
		}
		w.beforeQuery, w.beforeJoin = change, change
		for range 10 {
			req := randomRequest(r)
			got, err := s.Search(ctx, req)
			if err != nil {
				t.Fatalf("%+v: %v", req, err)
			}
			// Nothing changed after the last join, so the world is still what it read.
			for _, h := range got.Results {
				w.checkTrue(t, req, h)
			}
		}
	}
}
