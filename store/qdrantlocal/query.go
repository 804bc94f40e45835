package qdrantlocal

import (
	"context"
	"math"
	"time"

	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// maxPrefetchDepth is the real server's bound.
	maxPrefetchDepth = 64
	// defaultRRFK is Qdrant's k where none is given; the literature's 60 must be asked for.
	defaultRRFK = 2
	// maxBatchQueries bounds the searches of one batch. The real server has no bound.
	maxBatchQueries = 1000
)

// stage is a node of a planned query: a search of the collection, or prefetches and what is
// done with their results.
type stage struct {
	prefetch []*stage
	// search is set for a nearest query; its filter is complete only on a leaf.
	search *nearest
	// fuse is set for a fusion.
	fuse      func(lists [][]hit) []hit
	filter    *filter
	limit     int
	threshold *float32
}

// queryPart is what a query and a prefetch have in common.
type queryPart interface {
	GetPrefetch() []*qdrant.PrefetchQuery
	GetQuery() *qdrant.Query
	GetUsing() string
	GetFilter() *qdrant.Filter
	GetParams() *qdrant.SearchParams
	GetLookupFrom() *qdrant.LookupLocation
}

// planner turns one request into stages. It holds the collection's read lock.
type planner struct {
	c *collection
	// referenced are the points whose vectors the query uses; they are not in its result.
	referenced idCondition
}

// Query answers a query: nearest to a vector or a point, or a fusion of prefetches.
func (ps *pointsService) Query(ctx context.Context, req *qdrant.QueryPoints) (*qdrant.QueryResponse, error) {
	start := time.Now()
	ctx, cancel := deadline(ctx, req.Timeout)
	defer cancel()
	points, err := ps.query(ctx, req, req.GetCollectionName())
	if err != nil {
		return nil, err
	}
	return &qdrant.QueryResponse{Result: points, Time: seconds(start)}, nil
}

// QueryBatch answers several queries of one collection; an error of one fails all.
func (ps *pointsService) QueryBatch(ctx context.Context, req *qdrant.QueryBatchPoints) (*qdrant.QueryBatchResponse, error) {
	start := time.Now()
	if n := len(req.GetQueryPoints()); n > maxBatchQueries {
		return nil, invalidf("a batch of %d queries is over the limit of %d", n, maxBatchQueries)
	}
	ctx, cancel := deadline(ctx, req.Timeout)
	defer cancel()
	out := &qdrant.QueryBatchResponse{}
	for _, q := range req.GetQueryPoints() {
		points, err := ps.query(ctx, q, req.GetCollectionName())
		if err != nil {
			return nil, err
		}
		out.Result = append(out.Result, &qdrant.BatchResult{Result: points})
	}
	out.Time = seconds(start)
	return out, nil
}

func (ps *pointsService) query(ctx context.Context, req *qdrant.QueryPoints, name string) ([]*qdrant.ScoredPoint, error) {
	limit, offset := uint64(defaultLimit), req.GetOffset()
	if req.Limit != nil {
		if limit = *req.Limit; limit == 0 {
			return nil, invalid("Validation error in body: [limit: value 0 invalid, must be 1 or larger]")
		}
	}
	c, err := ps.open(name, req.GetShardKeySelector())
	if err != nil {
		return nil, err
	}
	sel, err := newSelector(req.GetWithPayload(), false, req.GetWithVectors())
	if err != nil {
		return nil, err
	}
	if req.Query == nil && len(req.GetPrefetch()) == 0 {
		return ps.queryByID(ctx, c, req, sel, limit, offset)
	}
	c.mu.RLock()
	root, err := plan(c, req, limit, offset)
	c.mu.RUnlock()
	if err != nil {
		return nil, err
	}
	hits, err := ps.s.run(ctx, c, root)
	if err != nil {
		return nil, err
	}
	hits = hits[min(offset, uint64(len(hits))):]
	return c.scoredPoints(hits, sel)
}

// queryByID is a query without a query: points in id order, all with score 1.
func (ps *pointsService) queryByID(ctx context.Context, c *collection, req *qdrant.QueryPoints, sel *selector, limit, offset uint64) ([]*qdrant.ScoredPoint, error) {
	if req.ScoreThreshold != nil {
		return nil, invalid("Bad request: A query is needed to use the score_threshold. Can't have score_threshold without defining a query.")
	}
	f, err := c.readFilter(req.GetFilter(), limit, req.GetParams().GetExact())
	if err != nil {
		return nil, err
	}
	var hits []hit
	_, _, err = c.scrollTo(ctx, pointID{}, f, func(id pointID, slot uint32) (bool, error) {
		if offset > 0 {
			offset--
			return true, nil
		}
		if uint64(len(hits)) == limit {
			return false, nil
		}
		hits = append(hits, hit{id: id, slot: slot, score: 1, version: c.versions.at(slot)})
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	return c.scoredPoints(hits, sel)
}

// scoredPoints reads what was asked of the hits. A point that was deleted since the search
// is left out, as the real server does.
func (c *collection) scoredPoints(hits []hit, sel *selector) ([]*qdrant.ScoredPoint, error) {
	out := make([]*qdrant.ScoredPoint, 0, len(hits))
	ids := newIDBatch(len(hits))
	c.mu.RLock()
	defer c.mu.RUnlock()
	for _, h := range hits {
		if !c.live.at(h.slot) || c.slotIDs.at(h.slot) != h.id {
			slot, ok := c.slotOf(h.id)
			if !ok {
				continue
			}
			h.slot = slot
		}
		p := &qdrant.ScoredPoint{Id: ids.add(h.id), Score: h.score, Version: h.version}
		var err error
		if p.Payload, err = sel.payloadOf(c.payloads.at(h.slot)); err != nil {
			return nil, err
		}
		if p.Vectors, err = sel.vectorsOf(c, h.slot); err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// plan validates a request as a whole before anything of it runs.
func plan(c *collection, req *qdrant.QueryPoints, limit, offset uint64) (*stage, error) {
	if err := c.spec.strict.checkLimit(limit); err != nil {
		return nil, err
	}
	p := &planner{c: c, referenced: idCondition{}}
	if limit > math.MaxUint64-offset {
		offset = math.MaxUint64 - limit
	}
	root, err := p.stage(req, req.ScoreThreshold, limit+offset, 1)
	if err != nil {
		return nil, err
	}
	var exclude *filter
	if len(p.referenced) > 0 {
		exclude = &filter{mustNot: []condition{p.referenced}}
	}
	root.pushFilter(exclude)
	return root, nil
}

// pushFilter makes the filters of the leaves complete: those of the stages above apply to
// them, and only to them.
func (st *stage) pushFilter(f *filter) {
	f = and(f, st.filter)
	if st.search != nil && len(st.prefetch) == 0 {
		st.search.filter = f
	}
	for _, p := range st.prefetch {
		p.pushFilter(f)
	}
}

func (p *planner) stage(req queryPart, threshold *float32, limit uint64, depth int) (*stage, error) {
	if depth > maxPrefetchDepth {
		return nil, invalidf("Wrong input: Validation failed: prefetches depth exceeds max depth %d", maxPrefetchDepth)
	}
	if req.GetLookupFrom() != nil {
		return nil, unimplemented("lookup_from")
	}
	strict := &p.c.spec.strict
	if err := strict.checkExact(req.GetParams().GetExact()); err != nil {
		return nil, err
	}
	if ef := req.GetParams().GetHnswEf(); strict.searchMaxHnswEf != 0 && ef > strict.searchMaxHnswEf {
		return nil, strictError("Search hnsw_ef limit exceeded", "Use at most "+uitoa(strict.searchMaxHnswEf))
	}
	f, err := compileFilter(p.c, req.GetFilter())
	if err != nil {
		return nil, err
	}
	if err := p.c.checkFilter(f, false); err != nil {
		return nil, err
	}
	st := &stage{filter: f, threshold: threshold, limit: int(min(limit, math.MaxInt32))}
	if err := p.variant(st, req); err != nil {
		return nil, err
	}
	for _, pre := range req.GetPrefetch() {
		n := uint64(defaultLimit)
		if pre.Limit != nil {
			if n = *pre.Limit; n == 0 {
				return nil, invalid("Validation error in body: [prefetch.limit: value 0 invalid, must be 1 or larger]")
			}
		}
		if err := strict.checkLimit(n); err != nil {
			return nil, err
		}
		child, err := p.stage(pre, pre.ScoreThreshold, n, depth+1)
		if err != nil {
			return nil, err
		}
		st.prefetch = append(st.prefetch, child)
	}
	return st, nil
}

// variant reads what kind of query a stage is.
func (p *planner) variant(st *stage, req queryPart) error {
	fusion := func(f func([][]hit) []hit) error {
		if len(req.GetPrefetch()) == 0 {
			return invalid("Wrong input: Validation failed: cannot apply Fusion without prefetches")
		}
		if req.GetUsing() != "" {
			return invalid("Bad request: Fusion queries cannot be combined with the 'using' field.")
		}
		st.fuse = f
		return nil
	}
	switch k := req.GetQuery().GetVariant().(type) {
	case *qdrant.Query_Nearest:
		return p.nearest(st, req.GetUsing(), k.Nearest)
	case *qdrant.Query_Fusion:
		switch k.Fusion {
		case qdrant.Fusion_RRF:
			return fusion(func(l [][]hit) []hit { return fuseRRF(l, defaultRRFK, nil) })
		case qdrant.Fusion_DBSF:
			return fusion(fuseDBSF)
		default:
			return invalid("Wrong input: unknown fusion")
		}
	case *qdrant.Query_Rrf:
		rank := uint32(defaultRRFK)
		if k.Rrf.K != nil {
			rank = *k.Rrf.K
		}
		if rank < 1 {
			return invalid("Validation error in body: [rrf.k: value 0 invalid, must be 1 or larger]")
		}
		weights := k.Rrf.GetWeights()
		if len(weights) > 0 && len(weights) != len(req.GetPrefetch()) {
			return invalidf("Wrong input: Validation failed: Number of weights in RRF should match number of pre-fetches: got %d, expected %d",
				len(weights), len(req.GetPrefetch()))
		}
		return fusion(func(l [][]hit) []hit { return fuseRRF(l, rank, weights) })
	case nil:
		if len(req.GetPrefetch()) > 0 {
			return invalid("Bad request: A query is needed to merge the prefetches. Can't have prefetches without defining a query.")
		}
		return unimplemented("a prefetch without a query")
	default:
		return unimplemented("queries other than nearest, fusion and rrf")
	}
}

func (p *planner) nearest(st *stage, using string, in *qdrant.VectorInput) error {
	n := p.c.vectorNumber(using)
	if n < 0 {
		return unknownVector(using)
	}
	vec := p.c.vectors[n]
	st.search = &nearest{vec: vec}
	var raw rawVector
	switch k := in.GetVariant().(type) {
	case *qdrant.VectorInput_Dense:
		raw = rawVector{shape: shapeDense, flat: k.Dense.GetData()}
	case *qdrant.VectorInput_Sparse:
		raw = rawVector{shape: shapeSparse, flat: k.Sparse.GetValues(), terms: k.Sparse.GetIndices()}
	case *qdrant.VectorInput_MultiDense:
		raw = rawMulti(k.MultiDense)
	case *qdrant.VectorInput_Id:
		id, err := parseID(k.Id)
		if err != nil {
			return err
		}
		slot, ok := p.c.slotOf(id)
		if !ok {
			return noPoint(id)
		}
		data, ok := vec.get(slot)
		if !ok {
			return status.Errorf(codes.NotFound, "Not found: Vector with name %q for point %s not found", using, id)
		}
		p.referenced[id] = struct{}{}
		st.search.query = vectorData{
			flat:    append([]float32(nil), data.flat...),
			indices: append([]uint32(nil), data.indices...),
		}
		return nil
	case nil:
		return invalid("Bad request: no vector in the query")
	default:
		return unimplemented("inference (documents, images and objects in the place of vectors)")
	}
	var err error
	st.search.query, err = vec.accept(raw)
	return err
}

// run executes a stage and returns its hits, best first.
func (s *Server) run(ctx context.Context, c *collection, st *stage) ([]hit, error) {
	if len(st.prefetch) == 0 {
		st.search.limit, st.search.threshold = st.limit, st.threshold
		return s.search(ctx, c, st.search)
	}
	lists := make([][]hit, len(st.prefetch))
	for i, p := range st.prefetch {
		var err error
		if lists[i], err = s.run(ctx, c, p); err != nil {
			return nil, err
		}
	}
	if st.search != nil {
		seen := map[pointID]struct{}{}
		st.search.among = []pointID{}
		for _, l := range lists {
			for _, h := range l {
				if _, dup := seen[h.id]; !dup {
					seen[h.id] = struct{}{}
					st.search.among = append(st.search.among, h.id)
				}
			}
		}
		st.search.limit, st.search.threshold = st.limit, st.threshold
		return s.search(ctx, c, st.search)
	}
	hits := st.fuse(lists)
	if st.threshold != nil {
		for i, h := range hits {
			if h.score < *st.threshold {
				hits = hits[:i]
				break
			}
		}
	}
	return hits[:min(len(hits), st.limit)], nil
}
