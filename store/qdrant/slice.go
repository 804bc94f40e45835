package qdrant

import (
	"context"

	qc "github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// ScrollBucket returns up to limit ids of points of ours in the given id buckets, from the id
// from on, inclusive, ascending, and where the next page starts (nil at the end). It is how a
// difference of [Client.FacetBuckets] is looked into.
func (c *Client) ScrollBucket(ctx context.Context, ix corpus.Index, buckets []uint32, from corpus.ID, limit int) (page []corpus.PointState, next *corpus.ID, err error) {
	own, err := c.ours()
	if err != nil {
		return nil, nil, err
	}
	of := make([]int64, len(buckets))
	for i, b := range buckets {
		of[i] = int64(b)
	}
	return c.scrollIDs(ctx, ix, &qc.Filter{Must: []*qc.Condition{own, qc.NewMatchInts(corpus.KeyBucket, of...)}}, from, limit)
}

// ScrollForeign is ScrollBucket over the points that no bucket of ours counts: those that are
// not ours, and ours whose bucket is unreadable. The stamp is not among them, nor are points
// with numeric ids.
func (c *Client) ScrollForeign(ctx context.Context, ix corpus.Index, from corpus.ID, limit int) (page []corpus.PointState, next *corpus.ID, err error) {
	own, err := c.ours()
	if err != nil {
		return nil, nil, err
	}
	counted := qc.NewFilterAsCondition(&qc.Filter{Must: []*qc.Condition{own,
		qc.NewRange(corpus.KeyBucket, &qc.Range{Gte: qc.PtrOf(0.0), Lt: qc.PtrOf(float64(corpus.Buckets))})}})
	return c.scrollIDs(ctx, ix, &qc.Filter{MustNot: []*qc.Condition{counted}}, from, limit)
}

// scrollIDs reads ids alone, filtered. What only some replicas hold is not told apart: whoever
// compares reads the points themselves before deciding.
func (c *Client) scrollIDs(ctx context.Context, ix corpus.Index, filter *qc.Filter, from corpus.ID, limit int) ([]corpus.PointState, *corpus.ID, error) {
	l, err := c.limitsOf(ctx, ix)
	if err != nil {
		return nil, nil, err
	}
	var (
		pts    []*qc.RetrievedPoint
		offset *qc.PointId
	)
	err = c.call(ctx, "scroll", func(ctx context.Context) (err error) {
		pts, offset, err = c.api.ScrollAndOffset(ctx, &qc.ScrollPoints{
			CollectionName: ix.QdrantName, Offset: pointID(from), Limit: qc.PtrOf(uint32(capped(max(limit, 1), l.queryLimit))), Filter: filter,
			WithPayload: qc.NewWithPayloadEnable(false), WithVectors: qc.NewWithVectorsEnable(false),
		})
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	out := states(pts, nil, false)
	if offset == nil {
		return out, nil, nil
	}
	id, ok := parseID(offset)
	if !ok {
		return nil, nil, corpus.Errorf(corpus.Unavailable, "index_failed", "the index's next page has no UUID to start at")
	}
	return out, &id, nil
}
