package qdrantlocal

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/protobuf/proto"
)

const (
	defaultLimit = 10
	// scrollHold is how many points a scroll visits under one hold of the read lock.
	scrollHold = 1024
)

// deadline applies a request's own timeout.
func deadline(ctx context.Context, timeout *uint64) (context.Context, context.CancelFunc) {
	if timeout == nil || *timeout > 24*3600 {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, time.Duration(*timeout)*time.Second)
}

// open finds the collection of a read.
func (ps *pointsService) open(name string, keys *qdrant.ShardKeySelector) (*collection, error) {
	if err := checkCollectionName(name, false); err != nil {
		return nil, err
	}
	if err := checkShardKeys(keys); err != nil {
		return nil, err
	}
	return ps.s.find(name)
}

// readFilter compiles the filter of a read and applies strict mode to it and to the limit;
// exact says that the caller asked for an exact answer.
func (c *collection) readFilter(f *qdrant.Filter, limit uint64, exact bool) (*filter, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if err := c.spec.strict.checkLimit(limit); err != nil {
		return nil, err
	}
	if err := c.spec.strict.checkExact(exact); err != nil {
		return nil, err
	}
	out, err := compileFilter(c, f)
	if err != nil {
		return nil, err
	}
	return out, c.checkFilter(out, false)
}

// selector says what of a point to return.
type selector struct {
	payload payloadSelector
	vectors vectorSelector
	// bytes is what the answer holds so far.
	bytes int
}

type payloadSelector struct {
	enable  bool
	include []jsonPath
	exclude []jsonPath
	partial bool
}

type vectorSelector struct {
	enable bool
	names  []string
}

func newSelector(p *qdrant.WithPayloadSelector, payloadDefault bool, v *qdrant.WithVectorsSelector) (*selector, error) {
	s := &selector{}
	paths := func(in []string) ([]jsonPath, error) {
		out := make([]jsonPath, len(in))
		for i, t := range in {
			var err error
			if out[i], err = parsePath(t); err != nil {
				return nil, err
			}
		}
		return out, nil
	}
	var err error
	switch k := p.GetSelectorOptions().(type) {
	case nil:
		if p != nil {
			return nil, invalid("No PayloadSelector")
		}
		s.payload.enable = payloadDefault
	case *qdrant.WithPayloadSelector_Enable:
		s.payload.enable = k.Enable
	case *qdrant.WithPayloadSelector_Include:
		s.payload.enable, s.payload.partial = true, true
		s.payload.include, err = paths(k.Include.GetFields())
	case *qdrant.WithPayloadSelector_Exclude:
		s.payload.enable, s.payload.partial = true, true
		s.payload.exclude, err = paths(k.Exclude.GetFields())
		if s.payload.exclude == nil {
			s.payload.partial = false
		}
	}
	if err != nil {
		return nil, err
	}
	switch k := v.GetSelectorOptions().(type) {
	case *qdrant.WithVectorsSelector_Enable:
		s.vectors.enable = k.Enable
	case *qdrant.WithVectorsSelector_Include:
		s.vectors.enable, s.vectors.names = true, k.Include.GetNames()
		if s.vectors.names == nil {
			s.vectors.names = []string{}
		}
	}
	return s, nil
}

// payloadOf returns the selected part of a stored payload, nil if none was asked for.
func (s *selector) payloadOf(enc []byte) (map[string]*qdrant.Value, error) {
	p := &s.payload
	if !p.enable {
		return nil, nil
	}
	s.bytes += len(enc)
	if s.bytes > maxResponse {
		return nil, tooLarge()
	}
	if !p.partial {
		return decodePayload(enc)
	}
	out := map[string]*qdrant.Value{}
	var err error
	eachEntry(enc, func(key, raw []byte) bool {
		path := []pathItem{{kind: itemKey, key: string(key)}}
		if !p.keeps(path) {
			return true
		}
		var v qdrant.Value
		if err = proto.Unmarshal(raw, &v); err != nil {
			return false
		}
		out[path[0].key] = p.cut(&path, plainValue(&v))
		return true
	})
	return out, err
}

// keeps reports whether what lies at path is wanted, in whole or in part.
func (p *payloadSelector) keeps(path []pathItem) bool {
	if p.exclude == nil {
		for i := range p.include {
			if commonPrefix(path, &p.include[i]) == min(len(path), 1+len(p.include[i].rest)) {
				return true
			}
		}
		return false
	}
	for i := range p.exclude {
		if n := 1 + len(p.exclude[i].rest); n <= len(path) && commonPrefix(path, &p.exclude[i]) == n {
			return false
		}
	}
	return true
}

// commonPrefix counts the items that path and pattern share from the start.
func commonPrefix(path []pathItem, pattern *jsonPath) int {
	if path[0].key != pattern.first {
		return 0
	}
	n := 1
	for n < len(path) && n <= len(pattern.rest) && path[n] == pattern.rest[n-1] {
		n++
	}
	return n
}

// cut removes from v, which lies at path, what is not wanted.
func (p *payloadSelector) cut(path *[]pathItem, v *qdrant.Value) *qdrant.Value {
	n := len(*path)
	defer func() { *path = (*path)[:n] }()
	switch k := v.GetKind().(type) {
	case *qdrant.Value_StructValue:
		for key, c := range k.StructValue.GetFields() {
			*path = append((*path)[:n], pathItem{kind: itemKey, key: key})
			if p.keeps(*path) {
				k.StructValue.Fields[key] = p.cut(path, c)
			} else {
				delete(k.StructValue.Fields, key)
			}
		}
	case *qdrant.Value_ListValue:
		*path = append((*path)[:n], pathItem{kind: itemWildcard})
		kept := k.ListValue.Values[:0]
		for _, c := range k.ListValue.GetValues() {
			if p.keeps(*path) {
				kept = append(kept, p.cut(path, c))
			}
		}
		k.ListValue.Values = kept
	}
	return v
}

func tooLarge() error {
	return invalidf("the answer would exceed %d MiB: lower the limit or ask for less of each point", maxResponse>>20)
}

// vectorsOf returns the selected vectors of a slot, nil if none were asked for. The caller
// holds the read lock.
func (s *selector) vectorsOf(c *collection, slot uint32) (*qdrant.VectorsOutput, error) {
	if !s.vectors.enable {
		return nil, nil
	}
	named := map[string]*qdrant.VectorOutput{}
	for _, v := range c.vectors {
		if s.vectors.names != nil && !slices.Contains(s.vectors.names, v.name) {
			continue
		}
		data, ok := v.get(slot)
		if !ok {
			continue
		}
		s.bytes += 4 * (len(data.flat) + len(data.indices))
		if s.bytes > maxResponse {
			return nil, tooLarge()
		}
		named[v.name] = v.output(data)
	}
	// A collection with only the unnamed vector answers with it directly.
	if v, ok := named[""]; ok && len(named) == 1 {
		return &qdrant.VectorsOutput{VectorsOptions: &qdrant.VectorsOutput_Vector{Vector: v}}, nil
	}
	return &qdrant.VectorsOutput{VectorsOptions: &qdrant.VectorsOutput_Vectors{
		Vectors: &qdrant.NamedVectorsOutput{Vectors: named},
	}}, nil
}

// output copies a stored vector into the API's form.
func (v *vectorSpec) output(d vectorData) *qdrant.VectorOutput {
	flat := slices.Clone(d.flat)
	switch v.shape {
	case shapeSparse:
		return &qdrant.VectorOutput{Vector: &qdrant.VectorOutput_Sparse{
			Sparse: &qdrant.SparseVector{Values: flat, Indices: slices.Clone(d.indices)},
		}}
	case shapeMulti:
		rows := make([]*qdrant.DenseVector, 0, len(flat)/v.dim)
		for i := 0; i < len(flat); i += v.dim {
			rows = append(rows, &qdrant.DenseVector{Data: flat[i : i+v.dim : i+v.dim]})
		}
		return &qdrant.VectorOutput{Vector: &qdrant.VectorOutput_MultiDense{MultiDense: &qdrant.MultiDenseVector{Vectors: rows}}}
	default:
		return &qdrant.VectorOutput{Vector: &qdrant.VectorOutput_Dense{Dense: &qdrant.DenseVector{Data: flat}}}
	}
}

// page collects retrieved points in few allocations.
type page struct {
	sel    *selector
	ids    *idBatch
	points []qdrant.RetrievedPoint
	out    []*qdrant.RetrievedPoint
}

func newPage(sel *selector, n int) *page {
	return &page{sel: sel, ids: newIDBatch(n), points: make([]qdrant.RetrievedPoint, n), out: make([]*qdrant.RetrievedPoint, 0, n)}
}

// add appends the point in slot. The caller holds the read lock.
func (p *page) add(c *collection, id pointID, slot uint32) error {
	if len(p.points) == 0 {
		p.points = make([]qdrant.RetrievedPoint, 256)
	}
	rp := &p.points[0]
	p.points = p.points[1:]
	rp.Id = p.ids.add(id)
	var err error
	if rp.Payload, err = p.sel.payloadOf(c.payloads.at(slot)); err != nil {
		return err
	}
	if rp.Vectors, err = p.sel.vectorsOf(c, slot); err != nil {
		return err
	}
	p.out = append(p.out, rp)
	return nil
}

// Get returns the points that exist, in the order asked for, each once.
func (ps *pointsService) Get(ctx context.Context, req *qdrant.GetPoints) (*qdrant.GetResponse, error) {
	start := time.Now()
	c, err := ps.open(req.GetCollectionName(), req.GetShardKeySelector())
	if err != nil {
		return nil, err
	}
	ids, err := parseIDs(req.GetIds())
	if err != nil {
		return nil, err
	}
	sel, err := newSelector(req.GetWithPayload(), false, req.GetWithVectors())
	if err != nil {
		return nil, err
	}
	pg := newPage(sel, len(ids))
	seen := make(map[pointID]struct{}, len(ids))
	for len(ids) > 0 {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n := min(len(ids), scrollHold)
		c.mu.RLock()
		for _, id := range ids[:n] {
			if _, dup := seen[id]; dup {
				continue
			}
			seen[id] = struct{}{}
			if slot, ok := c.slotOf(id); ok {
				if err = pg.add(c, id, slot); err != nil {
					break
				}
			}
		}
		c.mu.RUnlock()
		if err != nil {
			return nil, err
		}
		ids = ids[n:]
	}
	return &qdrant.GetResponse{Result: pg.out, Time: seconds(start)}, nil
}

// Scroll returns points in id order: numbers, then UUIDs by their bytes.
func (ps *pointsService) Scroll(ctx context.Context, req *qdrant.ScrollPoints) (*qdrant.ScrollResponse, error) {
	start := time.Now()
	if req.GetOrderBy() != nil {
		return nil, unimplemented("scrolling in the order of a payload field")
	}
	limit := uint64(defaultLimit)
	if req.Limit != nil {
		if limit = uint64(*req.Limit); limit == 0 {
			return nil, invalid("Validation error in body: [limit: value 0 invalid, must be 1 or larger]")
		}
	}
	c, err := ps.open(req.GetCollectionName(), req.GetShardKeySelector())
	if err != nil {
		return nil, err
	}
	var from pointID
	if req.GetOffset() != nil {
		if from, err = parseID(req.GetOffset()); err != nil {
			return nil, err
		}
	}
	sel, err := newSelector(req.GetWithPayload(), true, req.GetWithVectors())
	if err != nil {
		return nil, err
	}
	f, err := c.readFilter(req.GetFilter(), limit, false)
	if err != nil {
		return nil, err
	}
	ctx, cancel := deadline(ctx, req.Timeout)
	defer cancel()
	c.mu.RLock()
	most := min(limit, uint64(c.ids.Len()))
	c.mu.RUnlock()
	// The page is not one read: the lock is released between holds, as the real server
	// reads its segments one after another.
	pg := newPage(sel, int(min(most, 1<<16)))
	next, more, err := c.scrollTo(ctx, from, f, func(id pointID, slot uint32) (bool, error) {
		if uint64(len(pg.out)) == limit {
			return false, nil
		}
		return true, pg.add(c, id, slot)
	})
	if err != nil {
		return nil, err
	}
	out := &qdrant.ScrollResponse{Result: pg.out}
	if more {
		out.NextPageOffset = apiID(next)
	}
	out.Time = seconds(start)
	return out, nil
}

// scrollTo visits matching points in id order, from the id on, until visit refuses one,
// which is returned. visit runs under the read lock.
func (c *collection) scrollTo(ctx context.Context, from pointID, f *filter, visit func(id pointID, slot uint32) (bool, error)) (next pointID, more bool, err error) {
	if ids, ok := f.ids(); ok {
		list := make([]pointID, 0, len(ids))
		for id := range ids {
			if id.compare(from) >= 0 {
				list = append(list, id)
			}
		}
		slices.SortFunc(list, pointID.compare)
		c.mu.RLock()
		defer c.mu.RUnlock()
		for _, id := range list {
			slot, ok := c.slotOf(id)
			if !ok {
				continue
			}
			if d := c.document(slot); !f.match(&d) {
				continue
			}
			if ok, err := visit(id, slot); err != nil || !ok {
				return id, err == nil, err
			}
		}
		return pointID{}, false, nil
	}
	for {
		if err := ctx.Err(); err != nil {
			return pointID{}, false, err
		}
		n := 0
		paused := false
		c.mu.RLock()
		c.ids.Ascend(idSlot{id: from}, func(e idSlot) bool {
			if n++; n > scrollHold {
				from, paused = e.id, true
				return false
			}
			if d := c.document(e.slot); f != nil && !f.match(&d) {
				return true
			}
			var ok bool
			if ok, err = visit(e.id, e.slot); err != nil || !ok {
				next, more = e.id, err == nil
				return false
			}
			return true
		})
		c.mu.RUnlock()
		if err != nil || !paused {
			return next, more, err
		}
	}
}

// scan calls visit for every chunk of slots from several goroutines, each call under one
// hold of the read lock. It returns the first error.
func (s *Server) scan(ctx context.Context, c *collection, visit func(worker int, first, end uint32)) error {
	c.mu.RLock()
	slots := c.slots
	c.mu.RUnlock()
	chunks := int64(slots+chunkSlots-1) / chunkSlots
	workers := int(min(int64(s.opts.Workers), chunks))
	var nextChunk atomic.Int64
	work := func(w int) {
		for ctx.Err() == nil {
			i := nextChunk.Add(1) - 1
			if i >= chunks {
				return
			}
			first := uint32(i) * chunkSlots
			c.mu.RLock()
			visit(w, first, min(first+chunkSlots, slots))
			c.mu.RUnlock()
		}
	}
	var wg sync.WaitGroup
	for w := 1; w < workers; w++ {
		wg.Go(func() { work(w) })
	}
	if workers > 0 {
		work(0)
	}
	wg.Wait()
	return ctx.Err()
}

// Count is exact whether or not that was asked for.
func (ps *pointsService) Count(ctx context.Context, req *qdrant.CountPoints) (*qdrant.CountResponse, error) {
	start := time.Now()
	c, err := ps.open(req.GetCollectionName(), req.GetShardKeySelector())
	if err != nil {
		return nil, err
	}
	f, err := c.readFilter(req.GetFilter(), 0, req.Exact == nil || *req.Exact)
	if err != nil {
		return nil, err
	}
	ctx, cancel := deadline(ctx, req.Timeout)
	defer cancel()
	var n uint64
	if ids, ok := f.ids(); ok || f == nil {
		c.mu.RLock()
		if f == nil {
			n = uint64(c.ids.Len())
		} else if len(ids) > 0 {
			n = uint64(len(c.matching(f)))
		}
		c.mu.RUnlock()
	} else {
		counts := make([]uint64, ps.s.opts.Workers)
		err := ps.s.scan(ctx, c, func(w int, first, end uint32) {
			for slot := first; slot < end; slot++ {
				if c.live.at(slot) {
					if d := c.document(slot); f.match(&d) {
						counts[w]++
					}
				}
			}
		})
		if err != nil {
			return nil, err
		}
		for _, x := range counts {
			n += x
		}
	}
	return &qdrant.CountResponse{Result: &qdrant.CountResult{Count: n}, Time: seconds(start)}, nil
}

// Facet counts points per value of an indexed field; the most frequent first, equals in the
// order of their values. It is exact whether or not that was asked for.
func (ps *pointsService) Facet(ctx context.Context, req *qdrant.FacetCounts) (*qdrant.FacetResponse, error) {
	start := time.Now()
	if _, err := parsePath(req.GetKey()); err != nil {
		return nil, err
	}
	limit := uint64(defaultLimit)
	if req.Limit != nil {
		limit = *req.Limit
	}
	c, err := ps.open(req.GetCollectionName(), req.GetShardKeySelector())
	if err != nil {
		return nil, err
	}
	f, err := c.readFilter(req.GetFilter(), limit, req.GetExact())
	if err != nil {
		return nil, err
	}
	if limit == 0 {
		return &qdrant.FacetResponse{Time: seconds(start)}, nil
	}
	c.mu.RLock()
	col := c.columns[req.GetKey()]
	if col == nil || !col.facetable() {
		c.mu.RUnlock()
		return nil, noFacetIndex(req.GetKey())
	}
	var hits []facetHit
	if f == nil {
		// The index keeps these counts.
		hits = make([]facetHit, 0, len(col.counts))
		for n, count := range col.counts {
			hits = append(hits, facetHit{n: n, count: count, text: col.textOf(n)})
		}
		c.mu.RUnlock()
	} else {
		c.mu.RUnlock()
		ctx, cancel := deadline(ctx, req.Timeout)
		defer cancel()
		if hits, err = ps.s.facetFiltered(ctx, c, col, f); err != nil {
			return nil, err
		}
	}
	compare := func(a, b facetHit) int {
		if x := cmp.Compare(b.count, a.count); x != 0 {
			return x
		}
		if col.isString() {
			return cmp.Compare(a.text, b.text)
		}
		return cmp.Compare(int64(a.n), int64(b.n))
	}
	slices.SortFunc(hits, compare)
	if uint64(len(hits)) > limit {
		hits = hits[:limit]
	}
	out := &qdrant.FacetResponse{Hits: make([]*qdrant.FacetHit, len(hits))}
	for i, h := range hits {
		v := &qdrant.FacetValue{}
		switch col.kind {
		case columnInteger:
			v.Variant = &qdrant.FacetValue_IntegerValue{IntegerValue: int64(h.n)}
		case columnBool:
			v.Variant = &qdrant.FacetValue_BoolValue{BoolValue: h.n != 0}
		default:
			v.Variant = &qdrant.FacetValue_StringValue{StringValue: h.text}
		}
		out.Hits[i] = &qdrant.FacetHit{Value: v, Count: uint64(h.count)}
	}
	out.Time = seconds(start)
	return out, nil
}

func noFacetIndex(key string) error {
	return invalidf("Wrong input: No appropriate index for faceting: `%s`. Please create one to facet on this field. "+
		"Keyword, uuid, integer and bool indexes support it", key)
}

type facetHit struct {
	n     uint64
	text  string
	count int
}

// textOf is the string a number stands for, empty if the column holds none.
func (c *column) textOf(n uint64) string {
	if c.isString() {
		return c.strings[n]
	}
	return ""
}

// facetFiltered counts over the points that match f. Strings are resolved while the lock is
// held: their numbers may be given to others afterwards.
func (s *Server) facetFiltered(ctx context.Context, c *collection, col *column, f *filter) ([]facetHit, error) {
	type key struct {
		n    uint64
		text string
	}
	counts := make([]map[key]int, s.opts.Workers)
	err := s.scan(ctx, c, func(w int, first, end uint32) {
		if counts[w] == nil {
			counts[w] = map[key]int{}
		}
		if col.dropped {
			return
		}
		for slot := first; slot < end; slot++ {
			if !c.live.at(slot) {
				continue
			}
			if d := c.document(slot); f.match(&d) {
				col.each(slot, d.payload, func(n uint64) {
					k := key{n: n}
					if col.isString() {
						k = key{text: col.strings[n]}
					}
					counts[w][k]++
				})
			}
		}
	})
	if err != nil {
		return nil, err
	}
	c.mu.RLock()
	dropped := col.dropped
	c.mu.RUnlock()
	if dropped {
		return nil, noFacetIndex(col.path.text)
	}
	total := map[key]int{}
	for _, m := range counts {
		for k, n := range m {
			total[k] += n
		}
	}
	hits := make([]facetHit, 0, len(total))
	for k, n := range total {
		hits = append(hits, facetHit{n: k.n, text: k.text, count: n})
	}
	return hits, nil
}
