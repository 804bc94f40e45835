package search

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/lockstep-db/lockstep/embedder/fake"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/lockstep-db/lockstep/store/postgres/pgtest.(*Server).spawn.func1"))
}

// world is a ledger and an index in memory, which a test may bring out of step at will.
type world struct {
	mu     sync.Mutex
	coll   corpus.Collection
	ix     corpus.Index
	docs   map[corpus.ID]*wdoc
	chunks map[corpus.ID]*wchunk
	points map[corpus.ID]*wpoint
	next   int

	// serving is what the join says of the index.
	serving bool
	hinted  []corpus.ID
	// Hooks, called without the lock.
	beforeQuery, beforeJoin func()
	queryErr                error
	// contrary has the index cut equal scores from the wrong end.
	contrary bool
	// Counts, and the last join, for assertions.
	resolves, queries, joins int
	last                     corpus.Joined
	lastAsked                []corpus.IndexQuery
}

type wdoc struct {
	name     string
	key      corpus.ID
	version  int64
	serving  []corpus.ID // nil: nothing serves
	metadata corpus.Metadata
	switched time.Time // as a test says
}

type wchunk struct {
	doc     *wdoc
	text    string
	died    bool
	vectors corpus.Vectors
}

type wpoint struct {
	vectors  corpus.Vectors
	metadata corpus.Metadata
}

// grid is an embedder whose values are multiples of 1/32, so that dot products are exact in
// float32 and in float64: a brute force finds the very scores an index finds, ties included.
type grid struct{ *fake.Embedder }

func (g grid) Embed(ctx context.Context, req corpus.EmbedRequest) ([]corpus.Embedding, error) {
	out, err := g.Embedder.Embed(ctx, req)
	round := func(row []float32) {
		for i := range row {
			row[i] = float32(math.Round(float64(row[i])*32) / 32)
		}
	}
	for i := range out {
		v := &out[i].Vectors
		round(v.Dense)
		if v.Sparse != nil {
			round(v.Sparse.Values)
		}
		for _, row := range v.ColBERT {
			round(row)
		}
	}
	return out, err
}

const allHeads = corpus.Dense | corpus.SparseHead | corpus.ColBERT

func newWorld(heads corpus.Heads) (*world, grid) {
	model := grid{fake.New(16, heads)}
	spec := model.Spec()
	w := &world{
		coll: corpus.Collection{ID: corpus.ID{1}, Name: "kb", Settings: corpus.Settings{Vectors: heads,
			Fields: map[string]corpus.FieldType{"lang": corpus.Keyword, "n": corpus.Integer, "body": corpus.FullText}}},
		docs: map[corpus.ID]*wdoc{}, chunks: map[corpus.ID]*wchunk{}, points: map[corpus.ID]*wpoint{}, serving: true,
	}
	w.ix = corpus.Index{ID: corpus.ID{2}, Collection: w.coll.ID, QdrantName: "q", Fingerprint: spec.Fingerprint, State: corpus.IndexServing,
		Layout: corpus.Layout{Vectors: heads, Dim: spec.Dim, ColBERTDim: spec.ColBERTDim}}
	return w, model
}

func (w *world) service(e Embedder, cfg Config) *Service {
	return New(w, w, e, w, cfg, prometheus.NewRegistry())
}

func (w *world) Hint(_ corpus.Index, ids []corpus.ID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hinted = append(w.hinted, ids...)
}

func (w *world) ResolveCollection(ctx context.Context, name string) (corpus.Collection, corpus.Index, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.resolves++
	if name != w.coll.Name {
		return corpus.Collection{}, corpus.Index{}, corpus.Errorf(corpus.NotFound, "collection_not_found", "there is no collection %q", name)
	}
	return w.coll, w.ix, ctx.Err()
}

func (w *world) JoinCandidates(ctx context.Context, req corpus.JoinRequest) (corpus.Joined, error) {
	if w.beforeJoin != nil {
		w.beforeJoin()
	}
	if err := ctx.Err(); err != nil {
		return corpus.Joined{}, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.joins++
	out := corpus.Joined{Serving: w.serving && req.Index == w.ix.ID && req.Name == w.coll.Name}
	places := map[*wdoc]int{}
	for _, id := range req.Candidates {
		j := corpus.JoinedChunk{ID: id}
		c := w.chunks[id]
		if c != nil && !c.doc.switched.IsZero() {
			j.SwitchedAgo = max(1, time.Since(c.doc.switched))
		}
		at := -1
		if c != nil {
			at = slices.Index(c.doc.serving, id)
		}
		switch {
		case c == nil:
			j.State = corpus.JoinUnknown
		case at >= 0:
			j.State = corpus.JoinLive
			place, seen := places[c.doc]
			if !seen {
				place = len(out.Documents)
				places[c.doc] = place
				d := corpus.JoinedDocument{ID: c.doc.key, ExternalID: c.doc.name, Version: c.doc.version}
				if req.Metadata {
					d.Metadata = c.doc.metadata
				}
				out.Documents = append(out.Documents, d)
			}
			j.Document, j.Ordinal = place, at
			if req.Texts {
				j.Text = c.text
			}
			for k := max(0, at-req.Context); k <= min(at+req.Context, len(c.doc.serving)-1); k++ {
				n := corpus.Neighbour{ID: c.doc.serving[k], Ordinal: k, Text: w.chunks[c.doc.serving[k]].text}
				if k < at {
					j.Before = append(j.Before, n)
				} else if k > at {
					j.After = append(j.After, n)
				}
			}
		case c.died:
			j.State = corpus.JoinDead
		default:
			j.State = corpus.JoinWaiting
		}
		out.Chunks = append(out.Chunks, j)
	}
	w.last = out
	return out, nil
}

func (w *world) LikeDocument(_ context.Context, _ corpus.ID, name string, limit int) (corpus.LikeDocument, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range w.docs {
		if d.name == name && d.serving != nil {
			out := corpus.LikeDocument{ID: d.key}
			for _, id := range d.serving[:min(limit, len(d.serving))] {
				out.Chunks = append(out.Chunks, corpus.LikeChunk{ID: id, Text: w.chunks[id].text})
			}
			return out, nil
		}
	}
	return corpus.LikeDocument{}, corpus.Errorf(corpus.NotFound, "document_not_found", "no document %q", name)
}

func (w *world) ReadPoints(ctx context.Context, _ corpus.Index, ids []corpus.ID, _ bool) ([]corpus.PointState, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []corpus.PointState
	for _, id := range ids {
		if p := w.points[id]; p != nil {
			out = append(out, corpus.PointState{ID: id, Vectors: &p.vectors})
		}
	}
	return out, ctx.Err()
}

func (w *world) QueryBatch(ctx context.Context, _ corpus.Index, queries []corpus.IndexQuery) ([][]corpus.Candidate, error) {
	if w.beforeQuery != nil {
		w.beforeQuery()
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.queries++
	w.lastAsked = queries
	if w.queryErr != nil {
		return nil, w.queryErr
	}
	out := make([][]corpus.Candidate, len(queries))
	for i, q := range queries {
		allowed := map[corpus.ID]bool{}
		for _, a := range q.Among {
			for _, c := range w.nearest(corpus.IndexQuery{Head: a.Head, Vectors: q.Vectors, Filter: q.Filter, Exclude: q.Exclude, Limit: a.Limit}, nil) {
				allowed[c.ID] = true
			}
		}
		if len(q.Among) == 0 {
			allowed = nil
		}
		out[i] = w.nearest(q, allowed)
	}
	return out, nil
}

func (w *world) nearest(q corpus.IndexQuery, allowed map[corpus.ID]bool) []corpus.Candidate {
	var out []corpus.Candidate
	excluded := map[corpus.ID]bool{}
	for _, id := range q.Exclude {
		excluded[id] = true
	}
	for id, p := range w.points {
		if allowed != nil && !allowed[id] || excluded[id] || !q.Filter.Matches(p.metadata) {
			continue
		}
		score, ok := rawScore(q.Head, q.Vectors, &p.vectors)
		if ok && (q.Threshold == nil || score >= *q.Threshold) {
			out = append(out, corpus.Candidate{ID: id, Score: score})
		}
	}
	slices.SortFunc(out, func(a, b corpus.Candidate) int {
		byID := a.ID.Compare(b.ID)
		if w.contrary {
			byID = -byID
		}
		return cmp.Or(cmp.Compare(b.Score, a.Score), byID)
	})
	return out[:min(len(out), q.Limit)]
}

// rawScore is the index's score of a point under a head; a sparse one needs a common term.
func rawScore(head corpus.Heads, q, p *corpus.Vectors) (float64, bool) {
	dot := func(a, b []float32) float64 {
		s := 0.0
		for i := range a {
			s += float64(a[i]) * float64(b[i])
		}
		return s
	}
	switch head {
	case corpus.Dense:
		return dot(q.Dense, p.Dense), true
	case corpus.SparseHead:
		s, common := 0.0, false
		for i, t := range q.Sparse.Indices {
			if k, ok := slices.BinarySearch(p.Sparse.Indices, t); ok {
				s += float64(q.Sparse.Values[i]) * float64(p.Sparse.Values[k])
				common = true
			}
		}
		return s, common
	default:
		s := 0.0
		for _, a := range q.ColBERT {
			best := math.Inf(-1)
			for _, b := range p.ColBERT {
				best = max(best, dot(a, b))
			}
			s += best
		}
		return s, true
	}
}

var vocabulary = strings.Fields("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon")

func someText(r *rand.Rand) string {
	n := 1 + r.IntN(6)
	out := make([]string, n)
	for i := range out {
		out[i] = vocabulary[r.IntN(len(vocabulary))]
	}
	return strings.Join(out, " ")
}

func (w *world) id() corpus.ID {
	w.next++
	return corpus.PointID(w.coll.ID, corpus.ChunkKey{ExternalID: fmt.Sprint(w.next)})
}

func embed(t testing.TB, e Embedder, text string, heads corpus.Heads) corpus.Vectors {
	t.Helper()
	got, err := e.Embed(context.Background(), corpus.EmbedRequest{Inputs: []corpus.EmbedInput{{Text: text}}, Heads: heads})
	if err != nil || got[0].Err != nil {
		t.Fatal(err, got[0].Err)
	}
	return got[0].Vectors
}

// put makes texts the next version of a document and lets it serve at once; points of chunks
// that are gone stay in the index.
func (w *world) put(t testing.TB, e Embedder, name string, md corpus.Metadata, texts ...string) *wdoc {
	var d *wdoc
	for _, have := range w.docs {
		if have.name == name {
			d = have
		}
	}
	if d == nil {
		d = &wdoc{name: name, key: w.id()}
		w.docs[d.key] = d
	}
	for _, id := range d.serving {
		w.chunks[id].died = true
	}
	d.version++
	d.metadata = md
	d.serving = []corpus.ID{}
	for _, text := range texts {
		d.serving = append(d.serving, w.addChunk(t, e, d, text, md))
	}
	return d
}

func (w *world) addChunk(t testing.TB, e Embedder, d *wdoc, text string, md corpus.Metadata) corpus.ID {
	id := w.id()
	v := embed(t, e, text, e.Spec().Heads)
	w.chunks[id] = &wchunk{doc: d, text: text, vectors: v}
	w.points[id] = &wpoint{vectors: v, metadata: md}
	return id
}

func (w *world) delete(d *wdoc) {
	for _, id := range d.serving {
		w.chunks[id].died = true
	}
	d.version++
	d.serving = nil
}

// randomWorld holds documents in all states, and an index that is out of step with them:
// orphans nobody knows, dead points, points of versions that wait, missing ones, stale metadata.
func randomWorld(t testing.TB, r *rand.Rand, heads corpus.Heads) (*world, grid) {
	w, e := newWorld(heads)
	junk := r.IntN(4) // how much of it
	langs := []string{"en", "de", "fr"}
	for i := range 5 + r.IntN(60) {
		md := corpus.Metadata{"lang": langs[r.IntN(len(langs))], "n": int64(r.IntN(5))}
		texts := make([]string, r.IntN(5))
		for k := range texts {
			texts[k] = someText(r)
		}
		d := w.put(t, e, fmt.Sprint("doc ", i), md, texts...)
		if r.IntN(4) < junk { // an update left dead points behind
			w.put(t, e, d.name, corpus.Metadata{"lang": langs[r.IntN(len(langs))], "n": int64(r.IntN(5))}, texts...)
		}
		switch {
		case r.IntN(8) < junk:
			w.delete(d)
		case r.IntN(6) < junk: // a version that waits
			w.addChunk(t, e, d, someText(r), md)
		case r.IntN(6) < junk && len(d.serving) > 0: // a missing point
			delete(w.points, d.serving[0])
		case r.IntN(6) < junk: // metadata changed, payload not yet
			d.metadata = corpus.Metadata{"lang": langs[r.IntN(len(langs))], "n": int64(r.IntN(5))}
		}
	}
	for range r.IntN(1 + 60*junk) {
		v := embed(t, e, someText(r), e.Spec().Heads)
		w.points[w.id()] = &wpoint{vectors: v, metadata: corpus.Metadata{"lang": "en", "n": int64(1)}}
	}
	return w, e
}
