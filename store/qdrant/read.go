package qdrant

import (
	"context"
	"slices"

	qc "github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// stampID is the reserved point that holds the stamp. It is a UUID of version 8, which no
// chunk's id (version 5) can be, and sorts before nearly all of them.
var stampID = corpus.ID{0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x80, 0x00, 0x80, 0x00, 0x6c, 0x6f, 0x63, 0x6b, 0x73, 0x74}

// vectorPage bounds the vectors of one answer. Pages beyond it gain nothing: the server's
// time a point dominates (unmeasured).
const vectorPage = 16 << 20

// ReadPoints returns those of ids that exist, in any order. Without vectors the payload's own
// keys are read, metadata not; with vectors, everything.
//
// On a replicated index a point counts as present when all replicas hold it; one that only
// some hold comes back with Partial set, so that a caller who must prove absence sees it, and
// one who must prove presence does not rely on it.
func (c *Client) ReadPoints(ctx context.Context, ix corpus.Index, ids []corpus.ID, withVectors bool) ([]corpus.PointState, error) {
	if len(ids) == 0 {
		return nil, nil
	}
	l, err := c.limitsOf(ctx, ix)
	if err != nil {
		return nil, err
	}
	page := 1000 // ids a request (unmeasured)
	if withVectors {
		page = vectorPoints(ix.Layout)
	}
	var out []corpus.PointState
	for start := 0; start < len(ids); {
		part := ids[start:min(start+page, len(ids))]
		states, err := c.readPage(ctx, ix, l, part, withVectors)
		if corpus.CodeOf(err) == CodeStorageFull && withVectors && page > 1 {
			// Answers too large for us look like this too; the vectors are wider than thought.
			page /= 2
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, states...)
		start += len(part)
	}
	return out, nil
}

func (c *Client) readPage(ctx context.Context, ix corpus.Index, l limits, ids []corpus.ID, withVectors bool) ([]corpus.PointState, error) {
	get := func(ids []corpus.ID, rc *qc.ReadConsistency) ([]corpus.PointState, error) {
		keys, payload, vectors := selectors(withVectors)
		var pts []*qc.RetrievedPoint
		err := c.call(ctx, "get", func(ctx context.Context) (err error) {
			pts, err = c.api.Get(ctx, &qc.GetPoints{
				CollectionName: ix.QdrantName, Ids: pointIDs(ids), WithPayload: payload, WithVectors: vectors, ReadConsistency: rc,
			})
			return err
		})
		return states(pts, keys, withVectors), err
	}
	if !l.replicated {
		return get(ids, nil)
	}
	out, err := get(ids, readAll)
	if err != nil || len(out) == len(ids) {
		return out, err
	}
	held := make(map[corpus.ID]bool, len(out))
	for i := range out {
		held[out[i].ID] = true
	}
	rest := slices.DeleteFunc(slices.Clone(ids), func(id corpus.ID) bool { return held[id] })
	// One replica answers a plain read, which one is not ours to choose: several reads make a
	// point that some replica holds likely to be seen. Proof is the repetition over passes.
	for try := 0; try < replicaReads && len(rest) > 0; try++ {
		some, err := get(rest, nil)
		if err != nil {
			return nil, err
		}
		for i := range some {
			some[i].Partial = true
			held[some[i].ID] = true
		}
		out = append(out, some...)
		rest = slices.DeleteFunc(rest, func(id corpus.ID) bool { return held[id] })
	}
	return out, nil
}

// replicaReads of a point that not all replicas hold: with three replicas and random choice
// one is overlooked in 3 % of passes (unmeasured).
const replicaReads = 3

var readAll = qc.NewReadConsistencyType(qc.ReadConsistencyType_All)

func selectors(withVectors bool) (keys []string, p *qc.WithPayloadSelector, v *qc.WithVectorsSelector) {
	if withVectors {
		keys = append(slices.Clone(systemKeys), corpus.KeyMetadata)
		return keys, qc.NewWithPayloadInclude(keys...), qc.NewWithVectorsEnable(true)
	}
	return systemKeys, qc.NewWithPayloadInclude(systemKeys...), qc.NewWithVectorsEnable(false)
}

func states(pts []*qc.RetrievedPoint, keys []string, withVectors bool) []corpus.PointState {
	out := make([]corpus.PointState, 0, len(pts))
	for _, p := range pts {
		id, ok := parseID(p.GetId())
		if !ok || id == stampID {
			continue
		}
		out = append(out, decodeState(id, p.GetPayload(), p.GetVectors(), keys, withVectors))
	}
	return out
}

// vectorPoints estimates how many points fill vectorPage. Sparse vectors are taken as 200
// entries, ColBERT as 256 rows; a worse case is met by halving.
func vectorPoints(l corpus.Layout) int {
	size := 512
	if l.Vectors.Has(corpus.Dense) {
		size += 4 * l.Dim
	}
	if l.Vectors.Has(corpus.SparseHead) {
		size += 8 * 200
	}
	if l.Vectors.Has(corpus.ColBERT) {
		size += 4 * 256 * l.ColBERTDim
	}
	return max(vectorPage/size, 1)
}

// Scroll returns up to limit points from the id from on, inclusive, ascending, and where the
// next page starts (nil at the end). A page may be short, even empty, while next is not nil:
// limits of the server and of memory cut it. Points with numeric ids, never ours, are not
// seen; [Client.CountPoints] counts them.
//
// [corpus.Quick] reads ids alone (twice as fast), [corpus.Full] the payload's own keys,
// [corpus.Deep] payload and vectors. Pages are separate reads, not a snapshot. On a
// replicated index a page is read twice, from all replicas and from one, and points that only
// the one holds have Partial set.
func (c *Client) Scroll(ctx context.Context, ix corpus.Index, from corpus.ID, limit int, depth corpus.Depth) (page []corpus.PointState, next *corpus.ID, err error) {
	if limit < 1 {
		return nil, nil, corpus.Errorf(corpus.Invalid, "limit", "a page has at least one point, not %d", limit)
	}
	l, err := c.limitsOf(ctx, ix)
	if err != nil {
		return nil, nil, err
	}
	limit = capped(limit, l.queryLimit)
	if depth == corpus.Deep {
		limit = min(limit, vectorPoints(ix.Layout))
	}
	for {
		page, next, err = c.scrollOnce(ctx, ix, l, from, limit, depth)
		if corpus.CodeOf(err) == CodeStorageFull && depth == corpus.Deep && limit > 1 {
			limit /= 2 // the answer was too large for us
			continue
		}
		return page, next, err
	}
}

func (c *Client) scrollOnce(ctx context.Context, ix corpus.Index, l limits, from corpus.ID, limit int, depth corpus.Depth) ([]corpus.PointState, *corpus.ID, error) {
	req := &qc.ScrollPoints{CollectionName: ix.QdrantName, Offset: pointID(from), Limit: qc.PtrOf(uint32(limit))}
	var keys []string
	if depth == corpus.Quick {
		req.WithPayload, req.WithVectors = qc.NewWithPayloadEnable(false), qc.NewWithVectorsEnable(false)
	} else {
		keys, req.WithPayload, req.WithVectors = selectors(depth == corpus.Deep)
	}
	read := func(rc *qc.ReadConsistency) ([]corpus.PointState, *corpus.ID, error) {
		req.ReadConsistency = rc
		var (
			pts    []*qc.RetrievedPoint
			offset *qc.PointId
		)
		err := c.call(ctx, "scroll", func(ctx context.Context) (err error) {
			pts, offset, err = c.api.ScrollAndOffset(ctx, req)
			return err
		})
		if err != nil {
			return nil, nil, err
		}
		var next *corpus.ID
		if offset != nil {
			id, ok := parseID(offset)
			if !ok {
				return nil, nil, corpus.Errorf(corpus.Unavailable, "index_failed", "the index's next page has no UUID to start at")
			}
			next = &id
		}
		return states(pts, keys, depth == corpus.Deep), next, nil
	}
	if !l.replicated {
		return read(nil)
	}
	all, nextAll, err := read(readAll)
	if err != nil {
		return nil, nil, err
	}
	one, nextOne, err := read(nil)
	if err != nil {
		return nil, nil, err
	}
	page, next := mergeReplicas(all, nextAll, one, nextOne)
	return page, next, nil
}

// mergeReplicas unites two pages with the same start: what all replicas hold, and what one
// holds. The page ends where the shorter one does, so that none is skipped.
func mergeReplicas(all []corpus.PointState, nextAll *corpus.ID, one []corpus.PointState, nextOne *corpus.ID) ([]corpus.PointState, *corpus.ID) {
	next := nextAll
	if next == nil || nextOne != nil && nextOne.Compare(*next) < 0 {
		next = nextOne
	}
	inside := func(s corpus.PointState) bool { return next == nil || s.ID.Compare(*next) < 0 }
	var out []corpus.PointState
	i, j := 0, 0
	for i < len(all) || j < len(one) {
		switch {
		case j == len(one) || i < len(all) && all[i].ID.Compare(one[j].ID) <= 0:
			if j < len(one) && all[i].ID == one[j].ID {
				j++
			}
			if inside(all[i]) {
				out = append(out, all[i])
			}
			i++
		default:
			if inside(one[j]) {
				one[j].Partial = true
				out = append(out, one[j])
			}
			j++
		}
	}
	return out, next
}

// errNoExact explains why counts cannot be had.
func errNoExact(ix corpus.Index) error {
	return corpus.Errorf(corpus.Conflict, "exact_refused",
		"the collection %s has strict mode with search_allow_exact=false, which refuses exact counts: use depth full, or allow exact search", ix.QdrantName)
}

func (c *Client) ours() (*qc.Condition, error) {
	id, err := c.ownerID()
	if err != nil {
		return nil, err
	}
	return qc.NewMatchKeyword(corpus.KeyOwner, id.String()), nil
}

// FacetBuckets returns how many points of ours each id bucket holds, exactly; empty buckets
// are absent. Points whose bucket is unreadable are in none.
func (c *Client) FacetBuckets(ctx context.Context, ix corpus.Index) (map[uint32]int64, error) {
	own, err := c.ours()
	if err != nil {
		return nil, err
	}
	l, err := c.limitsOf(ctx, ix)
	if err != nil {
		return nil, err
	}
	if l.noExact {
		return nil, errNoExact(ix)
	}
	// Where nothing is foreign, as nearly always, the owner need not be looked at point by point: on
	// Qdrant 1.19 a facet of 200,000 points took 66 ms and one with the owner as its filter 155 ms.
	filter := []*qc.Condition{own}
	foreign, err := c.count(ctx, ix, &qc.Filter{MustNot: []*qc.Condition{own, qc.NewHasID(pointID(stampID))}})
	if err != nil {
		return nil, err
	}
	if foreign == 0 {
		filter = nil
	}
	// One request, unless strict mode bounds the answer: then slices of buckets by number.
	slice := capped(corpus.Buckets, l.queryLimit)
	if slice < corpus.Buckets {
		slice = capped(slice, l.conditions)
	}
	out := make(map[uint32]int64, corpus.Buckets)
	for start := 0; start < corpus.Buckets; start += slice {
		must := filter
		if slice < corpus.Buckets {
			var part []int64
			for b := start; b < min(start+slice, corpus.Buckets); b++ {
				part = append(part, int64(b))
			}
			must = append(slices.Clone(filter), qc.NewMatchInts(corpus.KeyBucket, part...))
		}
		err := c.call(ctx, "facet", func(ctx context.Context) error {
			hits, err := c.api.Facet(ctx, &qc.FacetCounts{
				CollectionName: ix.QdrantName, Key: corpus.KeyBucket, Filter: filterOf(must),
				Limit: qc.PtrOf(uint64(slice)), Exact: qc.PtrOf(true),
			})
			for _, h := range hits {
				if v, ok := h.GetValue().GetVariant().(*qc.FacetValue_IntegerValue); ok && v.IntegerValue >= 0 && v.IntegerValue < corpus.Buckets && h.GetCount() > 0 {
					out[uint32(v.IntegerValue)] = int64(h.GetCount())
				}
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// CountPoints counts all points but the stamp, exactly, foreign ones included: what exceeds
// the sum of [Client.FacetBuckets] is foreign or has an unreadable bucket.
func (c *Client) CountPoints(ctx context.Context, ix corpus.Index) (int64, error) {
	l, err := c.limitsOf(ctx, ix)
	if err != nil {
		return 0, err
	}
	if l.noExact {
		return 0, errNoExact(ix)
	}
	return c.count(ctx, ix, &qc.Filter{MustNot: []*qc.Condition{qc.NewHasID(pointID(stampID))}})
}

// count counts the points of a filter exactly.
func (c *Client) count(ctx context.Context, ix corpus.Index, f *qc.Filter) (int64, error) {
	var n uint64
	err := c.call(ctx, "count", func(ctx context.Context) (err error) {
		n, err = c.api.Count(ctx, &qc.CountPoints{CollectionName: ix.QdrantName, Exact: qc.PtrOf(true), Filter: f})
		return err
	})
	return int64(n), err
}

// filterOf is nil where there is nothing to ask for.
func filterOf(must []*qc.Condition) *qc.Filter {
	if len(must) == 0 {
		return nil
	}
	return &qc.Filter{Must: must}
}

// FindGenAbove returns up to limit points of ours whose gen is above gen or inside one of the
// gaps (both ends inclusive): evidence of a history that the ledger has lost.
func (c *Client) FindGenAbove(ctx context.Context, ix corpus.Index, gen int64, gaps [][2]int64, limit int) ([]corpus.PointState, error) {
	own, err := c.ours()
	if err != nil {
		return nil, err
	}
	l, err := c.limitsOf(ctx, ix)
	if err != nil {
		return nil, err
	}
	keys, payload, vectors := selectors(false)
	lost := []*qc.Condition{qc.NewRange(corpus.KeyGen, &qc.Range{Gt: qc.PtrOf(float64(gen))})}
	for _, g := range gaps {
		lost = append(lost, qc.NewRange(corpus.KeyGen, &qc.Range{Gte: qc.PtrOf(float64(g[0])), Lte: qc.PtrOf(float64(g[1]))}))
	}
	var pts []*qc.RetrievedPoint
	err = c.call(ctx, "find_gen", func(ctx context.Context) (err error) {
		pts, err = c.api.Scroll(ctx, &qc.ScrollPoints{
			CollectionName: ix.QdrantName, Limit: qc.PtrOf(uint32(capped(max(limit, 1), l.queryLimit))),
			Filter:      &qc.Filter{Must: []*qc.Condition{own}, Should: lost},
			WithPayload: payload, WithVectors: vectors,
		})
		return err
	})
	return states(pts, keys, false), err
}

// ReadStamp returns the index's stamp; false when it has none that can be read.
func (c *Client) ReadStamp(ctx context.Context, ix corpus.Index) (corpus.Stamp, bool, error) {
	var pts []*qc.RetrievedPoint
	err := c.call(ctx, "read_stamp", func(ctx context.Context) (err error) {
		pts, err = c.api.Get(ctx, &qc.GetPoints{
			CollectionName: ix.QdrantName, Ids: []*qc.PointId{pointID(stampID)}, WithPayload: qc.NewWithPayloadEnable(true),
		})
		return err
	})
	if err != nil || len(pts) == 0 {
		return corpus.Stamp{}, false, err
	}
	s, ok := decodeStamp(pts[0].GetPayload())
	return s, ok, nil
}

// WriteStamp replaces the index's stamp.
func (c *Client) WriteStamp(ctx context.Context, ix corpus.Index, s corpus.Stamp) error {
	return c.call(ctx, "write_stamp", func(ctx context.Context) error {
		r, err := c.api.Upsert(ctx, &qc.UpsertPoints{
			CollectionName: ix.QdrantName, Wait: qc.PtrOf(true), Ordering: c.ordering(),
			Points: []*qc.PointStruct{{
				Id: pointID(stampID), Vectors: qc.NewVectorsMap(nil), Payload: encodeStamp(s),
			}},
		})
		if err != nil {
			return err
		}
		return completed(r)
	})
}
