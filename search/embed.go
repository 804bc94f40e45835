package search

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

const (
	// likeChunks of a document are averaged, evenly taken where it has more.
	likeChunks = 64
	// likeTerms of the averaged sparse vector are kept, the heaviest.
	likeTerms = 256
	// likeTexts are embedded again when none of a document's points can be read.
	likeTexts = 4
)

// vectors gives every query its vectors: from its text through the cache, from its caller, or
// from the document it names.
func (b *batch) vectors(ctx context.Context, coll corpus.Collection, ix corpus.Index, queries []*query) error {
	var texts []*query
	for _, q := range queries {
		switch {
		case q.req.Query != "":
			texts = append(texts, q)
		case q.req.Like != "":
			if err := b.like(ctx, coll, ix, q); err != nil {
				return err
			}
		}
	}
	if len(texts) == 0 {
		return nil
	}
	keys := make([]cacheKey, len(texts))
	model := b.embedder.Spec()
	for i, q := range texts {
		keys[i] = cacheKey{fingerprint: model.Fingerprint, heads: q.heads, text: q.req.Query}
	}
	vectors, errs, err := b.embedAll(ctx, ix, model, keys)
	if err != nil {
		return err
	}
	var bad []corpus.FieldError
	for i, q := range texts {
		switch err := errs[i]; {
		case err == nil:
			q.vecs = vectors[i]
		case corpus.KindOf(err) == corpus.Invalid:
			fe := corpus.FieldError{Pointer: q.pointer + "/query", Code: corpus.CodeOf(err), Detail: err.Error()}
			bad = append(bad, fe)
		default:
			return fmt.Errorf("embedding a query: %w", err)
		}
	}
	if len(bad) > 0 {
		return invalid(bad...)
	}
	return nil
}

// embedAll embeds texts with the model the index was built with.
func (b *batch) embedAll(ctx context.Context, ix corpus.Index, model corpus.ModelSpec, keys []cacheKey) ([]*corpus.Vectors, []error, error) {
	if model.Fingerprint != ix.Fingerprint {
		return nil, nil, corpus.Errorf(corpus.Conflict, "model_mismatch",
			"the collection's index holds vectors of the model %s, this server runs %s (%s); serve the old model, or build a new index",
			ix.Fingerprint, model.Fingerprint, model.Name)
	}
	vectors, errs, err := b.cache.get(ctx, keys, func(ctx context.Context, missing []cacheKey) ([]corpus.Embedding, error) {
		return b.embed(ctx, missing)
	})
	if err != nil {
		return nil, nil, b.late(ctx, "the embedder", fmt.Errorf("embedding: %w", err))
	}
	return vectors, errs, nil
}

// embed calls the embedder once for each set of heads that the keys ask for.
func (b *batch) embed(ctx context.Context, keys []cacheKey) ([]corpus.Embedding, error) {
	out := make([]corpus.Embedding, len(keys))
	places := map[corpus.Heads][]int{}
	for i, k := range keys {
		places[k.heads] = append(places[k.heads], i)
	}
	for heads, at := range places {
		req := corpus.EmbedRequest{Heads: heads, Lane: corpus.Query}
		for _, i := range at {
			req.Inputs = append(req.Inputs, corpus.EmbedInput{Text: keys[i].text})
		}
		got, err := b.embedder.Embed(ctx, req)
		if err != nil {
			return nil, err
		}
		if len(got) != len(at) {
			return nil, fmt.Errorf("the embedder answered %d of %d texts", len(got), len(at))
		}
		for k, i := range at {
			out[i] = got[k]
		}
	}
	return out, nil
}

// like makes a query of a document: the mean of its chunks' vectors. They come from the
// ledger where their caller brought them, else from the index; nothing is embedded unless
// none of the points is there.
func (b *batch) like(ctx context.Context, coll corpus.Collection, ix corpus.Index, q *query) error {
	doc, err := b.ledger.LikeDocument(ctx, coll.ID, q.req.Like, likeChunks)
	if err != nil {
		return b.late(ctx, "the ledger", fmt.Errorf("reading the document %q: %w", q.req.Like, err))
	}
	q.self = doc.ID
	var all []*corpus.Vectors
	var ask []corpus.ID
	for i := range doc.Chunks {
		c := &doc.Chunks[i]
		q.leaveOut([]corpus.ID{c.ID})
		if c.Vectors != nil && c.Vectors.Heads().Has(q.heads) {
			all = append(all, c.Vectors)
		} else {
			ask = append(ask, c.ID)
		}
	}
	if len(ask) > 0 {
		points, err := b.index.ReadPoints(ctx, ix, ask, true)
		if err != nil {
			return b.indexError(ctx, err)
		}
		found := make(map[corpus.ID]bool, len(points))
		for i := range points {
			if v := points[i].Vectors; v != nil && v.Finite() && usable(v, q.heads, ix.Layout) {
				found[points[i].ID] = true
				all = append(all, v)
			}
		}
		b.hint(ix, slices.DeleteFunc(slices.Clone(ask), func(id corpus.ID) bool { return found[id] }))
	}
	if len(all) == 0 && coll.Settings.Model != corpus.ExternalModel {
		var keys []cacheKey
		for _, c := range doc.Chunks[:min(len(doc.Chunks), likeTexts)] {
			keys = append(keys, cacheKey{fingerprint: ix.Fingerprint, heads: q.heads, text: c.Text})
		}
		vectors, errs, err := b.embedAll(ctx, ix, b.embedder.Spec(), keys)
		if err != nil {
			return err
		}
		for i, v := range vectors {
			if errs[i] == nil {
				all = append(all, v)
			}
		}
	}
	q.vecs = mean(all, q.heads)
	if q.vecs == nil {
		return corpus.Errorf(corpus.Conflict, "document_not_indexed",
			"the document %q has no vectors in the index yet; try again once it is indexed", q.req.Like)
	}
	return nil
}

// usable reports whether a stored point has what the mode needs. A text of unknown words has
// no sparse terms, and its point no sparse vector: that is fine beside a dense one.
func usable(v *corpus.Vectors, heads corpus.Heads, layout corpus.Layout) bool {
	if heads.Has(corpus.Dense) {
		return len(v.Dense) == layout.Dim
	}
	return v.Sparse != nil
}

// mean averages vectors: the dense ones scaled to length 1 again, of the sparse ones the
// heaviest terms. It is nil when there is nothing to average, or it cancels out.
func mean(all []*corpus.Vectors, heads corpus.Heads) *corpus.Vectors {
	if len(all) == 0 {
		return nil
	}
	out := &corpus.Vectors{}
	if heads.Has(corpus.Dense) {
		sum := make([]float64, len(all[0].Dense))
		for _, v := range all {
			for i, x := range v.Dense {
				sum[i] += float64(x)
			}
		}
		norm := 0.0
		for _, x := range sum {
			norm += x * x
		}
		if norm = math.Sqrt(norm); norm < 1e-12 {
			return nil
		}
		out.Dense = make([]float32, len(sum))
		for i, x := range sum {
			out.Dense[i] = float32(x / norm)
		}
	}
	if heads.Has(corpus.SparseHead) {
		weights := map[uint32]float64{}
		for _, v := range all {
			if v.Sparse == nil {
				continue
			}
			for i, term := range v.Sparse.Indices {
				weights[term] += float64(v.Sparse.Values[i]) / float64(len(all))
			}
		}
		terms := make([]uint32, 0, len(weights))
		for term := range weights {
			terms = append(terms, term)
		}
		slices.SortFunc(terms, func(a, b uint32) int {
			switch {
			case weights[a] > weights[b]:
				return -1
			case weights[a] < weights[b]:
				return 1
			}
			return int(int64(a) - int64(b))
		})
		terms = terms[:min(len(terms), likeTerms)]
		slices.Sort(terms)
		out.Sparse = &corpus.Sparse{Indices: terms, Values: make([]float32, len(terms))}
		for i, term := range terms {
			out.Sparse.Values[i] = float32(weights[term])
		}
	}
	return out
}
