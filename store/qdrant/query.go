package qdrant

import (
	"context"
	"math"
	"time"

	qc "github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// oversampling of quantised candidates before they are rescored with full vectors (unmeasured).
const oversampling = 2.0

// Query returns the candidates of one query, best first.
func (c *Client) Query(ctx context.Context, ix corpus.Index, q corpus.IndexQuery) ([]corpus.Candidate, error) {
	out, err := c.QueryBatch(ctx, ix, []corpus.IndexQuery{q})
	if err != nil {
		return nil, err
	}
	return out[0], nil
}

// QueryBatch answers several queries in one round trip, in their order, each best first. A
// query that is wrong ([corpus.Invalid]) fails the batch. A sparse query without terms has no
// candidates. Answers are shorter than asked where the server's strict mode bounds them.
func (c *Client) QueryBatch(ctx context.Context, ix corpus.Index, queries []corpus.IndexQuery) ([][]corpus.Candidate, error) {
	out := make([][]corpus.Candidate, len(queries))
	l, err := c.limitsOf(ctx, ix)
	if err != nil {
		return nil, err
	}
	req := &qc.QueryBatchPoints{CollectionName: ix.QdrantName}
	var places []int
	for i := range queries {
		p, err := buildQuery(ix, l, &queries[i])
		if err != nil {
			return nil, err
		}
		if p != nil {
			req.QueryPoints, places = append(req.QueryPoints, p), append(places, i)
		}
	}
	if len(places) == 0 {
		return out, nil
	}
	var results []*qc.BatchResult
	err = c.call(ctx, "query", func(ctx context.Context) (err error) {
		if deadline, ok := ctx.Deadline(); ok {
			// So that the server stops working when nobody waits any more.
			req.Timeout = qc.PtrOf(uint64(max(math.Ceil(time.Until(deadline).Seconds()), 1)))
		}
		results, err = c.api.QueryBatch(ctx, req)
		return err
	})
	if err != nil {
		return nil, err
	}
	if len(results) != len(places) {
		return nil, corpus.Errorf(corpus.Unavailable, "index_failed", "the index answered %d of %d queries", len(results), len(places))
	}
	for i, r := range results {
		list := make([]corpus.Candidate, 0, len(r.GetResult()))
		for _, p := range r.GetResult() {
			if id, ok := parseID(p.GetId()); ok {
				list = append(list, corpus.Candidate{ID: id, Score: float64(p.GetScore())})
			}
		}
		out[places[i]] = list
	}
	return out, nil
}

// buildQuery returns nil for a query that cannot have candidates.
func buildQuery(ix corpus.Index, l limits, q *corpus.IndexQuery) (*qc.QueryPoints, error) {
	if q.Limit < 1 {
		return nil, corpus.Errorf(corpus.Invalid, "limit", "a query asks for at least one candidate, not %d", q.Limit)
	}
	vector, name, err := queryVector(ix, q.Vectors, q.Head)
	if err != nil || vector == nil {
		return nil, err
	}
	filter, err := translate(q.Filter, ix.Layout.Fields, q.Exclude)
	if err != nil {
		return nil, err
	}
	p := &qc.QueryPoints{
		CollectionName: ix.QdrantName, Query: vector, Using: &name,
		Limit:       qc.PtrOf(uint64(capped(q.Limit, l.queryLimit))),
		Params:      searchParams(ix, q.Head, q.Exact),
		WithPayload: qc.NewWithPayloadEnable(false), WithVectors: qc.NewWithVectorsEnable(false),
	}
	if q.Threshold != nil {
		p.ScoreThreshold = qc.PtrOf(float32(*q.Threshold))
	}
	if len(q.Among) == 0 {
		p.Filter = filter
		return p, nil
	}
	for _, a := range q.Among {
		vector, name, err := queryVector(ix, q.Vectors, a.Head)
		if err != nil {
			return nil, err
		}
		if vector == nil {
			continue
		}
		p.Prefetch = append(p.Prefetch, &qc.PrefetchQuery{
			Query: vector, Using: &name, Filter: filter, Params: searchParams(ix, a.Head, q.Exact),
			Limit: qc.PtrOf(uint64(capped(max(a.Limit, 1), l.queryLimit))),
		})
	}
	if len(p.Prefetch) == 0 {
		return nil, nil // the prefetches find nothing; without them the query would search everything
	}
	return p, nil
}

func searchParams(ix corpus.Index, head corpus.Heads, exact bool) *qc.SearchParams {
	var p qc.SearchParams
	if exact {
		p.Exact = qc.PtrOf(true)
	}
	if head == corpus.Dense && ix.Layout.Quantization != "" {
		p.Quantization = &qc.QuantizationSearchParams{Rescore: qc.PtrOf(true), Oversampling: qc.PtrOf(oversampling)}
	}
	if p.Exact == nil && p.Quantization == nil {
		return nil
	}
	return &p
}

// queryVector encodes one head of the query. It is nil for a sparse query without terms.
func queryVector(ix corpus.Index, v *corpus.Vectors, head corpus.Heads) (*qc.Query, string, error) {
	refuse := func(format string, args ...any) (*qc.Query, string, error) {
		return nil, "", corpus.Errorf(corpus.Invalid, "query_vector", format, args...)
	}
	l := ix.Layout
	if !l.Vectors.Has(head) {
		return refuse("the index holds %s vectors and cannot be searched by %s", l.Vectors, head)
	}
	if v == nil || !v.Heads().Has(head) {
		return refuse("the query has no %s vector", head)
	}
	if !v.Finite() {
		return refuse("the query's vector holds a value that is not a finite number")
	}
	switch head {
	case corpus.Dense:
		if len(v.Dense) != l.Dim {
			return refuse("the query's dense vector has %d values, the index takes %d", len(v.Dense), l.Dim)
		}
		return qc.NewQueryDense(v.Dense), denseName, nil
	case corpus.SparseHead:
		if len(v.Sparse.Indices) != len(v.Sparse.Values) {
			return refuse("the query's sparse vector has %d indices and %d values", len(v.Sparse.Indices), len(v.Sparse.Values))
		}
		if len(v.Sparse.Indices) == 0 {
			return nil, sparseName, nil
		}
		return qc.NewQuerySparse(v.Sparse.Indices, v.Sparse.Values), sparseName, nil
	case corpus.ColBERT:
		if len(v.ColBERT) == 0 {
			return refuse("the query's ColBERT vector has no rows")
		}
		for _, row := range v.ColBERT {
			if len(row) != l.ColBERTDim {
				return refuse("a row of the query's ColBERT vector has %d values, the index takes %d", len(row), l.ColBERTDim)
			}
		}
		return qc.NewQueryMulti(v.ColBERT), colbertName, nil
	}
	return refuse("a query searches by exactly one head, not %q", head)
}
