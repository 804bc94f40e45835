package qdrantlocal

import (
	"context"
	"time"

	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// pointsService answers Qdrant's Points service.
type pointsService struct {
	qdrant.UnimplementedPointsServer
	s *Server
}

// splitRecord is the size at which a change of many payloads goes on in a new record, so
// that a filter that matches everything does not need the collection's size in memory.
const splitRecord = 4 << 20

// maxMultivector is the real server's bound on the floats of one multivector.
const maxMultivector = 1 << 20

// writeResult is what one update did.
type writeResult struct {
	seq    uint64
	ticket ticket
}

// operation validates an update and does what needs no lock; the change it returns then
// runs under the collection's writer lock.
type operation func(c *collection) (change, error)

// change resolves an update against the present state and commits it.
type change func() (writeResult, error)

// locked is an operation that does everything under the lock.
func locked(f func(c *collection) (writeResult, error)) operation {
	return func(c *collection) (change, error) {
		return func() (writeResult, error) { return f(c) }, nil
	}
}

// write runs an operation and answers as the API does: with wait, once the change is on
// disk; without, once it is applied and with the system.
func (ps *pointsService) write(name string, wait bool, keys *qdrant.ShardKeySelector, op operation) (*qdrant.PointsOperationResponse, error) {
	start := time.Now()
	rs, err := ps.writeAll(name, wait, keys, []operation{op})
	if err != nil {
		return nil, err
	}
	return &qdrant.PointsOperationResponse{Result: rs[0], Time: seconds(start)}, nil
}

// writeAll runs operations one after another; the first change that fails ends it, with
// those before it applied.
func (ps *pointsService) writeAll(name string, wait bool, keys *qdrant.ShardKeySelector, ops []operation) ([]*qdrant.UpdateResult, error) {
	if err := checkCollectionName(name, false); err != nil {
		return nil, err
	}
	if err := checkShardKeys(keys); err != nil {
		return nil, err
	}
	c, err := ps.s.find(name)
	if err != nil {
		return nil, err
	}
	changes := make([]change, len(ops))
	for i, op := range ops {
		if changes[i], err = op(c); err != nil {
			return nil, err
		}
	}
	ps.s.maintain(c)
	st := qdrant.UpdateStatus_Acknowledged
	if wait {
		st = qdrant.UpdateStatus_Completed
	}
	var out []*qdrant.UpdateResult
	var last ticket
	c.writer.Lock()
	for _, change := range changes {
		if c.dropped {
			err = status.Errorf(codes.NotFound, "Not found: Collection `%s` doesn't exist!", name)
			break
		}
		var r writeResult
		if r, err = change(); err != nil {
			break
		}
		if r.ticket.log != nil {
			last = r.ticket
		}
		out = append(out, &qdrant.UpdateResult{OperationId: proto.Uint64(r.seq), Status: st})
	}
	c.writer.Unlock()
	if err != nil {
		return nil, err
	}
	if wait {
		if err := last.wait(); err != nil {
			c.mu.RLock()
			defer c.mu.RUnlock()
			if c.dropped {
				return nil, status.Errorf(codes.NotFound, "Not found: Collection `%s` doesn't exist!", name)
			}
			return nil, err
		}
	}
	return out, nil
}

func checkShardKeys(k *qdrant.ShardKeySelector) error {
	if len(k.GetShardKeys()) > 0 || k.GetFallback() != nil {
		return unimplemented("shard keys")
	}
	return nil
}

// done ends the record that was begun, of n items, and commits it.
func (c *collection) done(n int) (writeResult, error) {
	if n == 0 {
		// Nothing to log. What is waited for is that everything before is on disk: the
		// answer may rest on it.
		return writeResult{seq: c.seq, ticket: c.log.ticket()}, nil
	}
	putCount(c.scratch[recordHeader+1:], n)
	t, err := c.commit()
	return writeResult{seq: c.seq, ticket: t}, err
}

// Upsert writes whole points. See [pointsService] for what its modes mean.
func (ps *pointsService) Upsert(_ context.Context, req *qdrant.UpsertPoints) (*qdrant.PointsOperationResponse, error) {
	return ps.write(req.GetCollectionName(), req.GetWait(), req.GetShardKeySelector(),
		upsert(req.GetPoints(), req.GetUpdateMode(), req.GetUpdateFilter()))
}

// upsert replaces or inserts points. Of points with one id the last counts; the mode and the
// filter are resolved against the state before the request.
func upsert(in []*qdrant.PointStruct, mode qdrant.UpdateMode, uf *qdrant.Filter) operation {
	return func(c *collection) (change, error) {
		if len(in) == 0 {
			return nil, invalid("Bad request: Empty update request")
		}
		points := make([]point, 0, len(in))
		index := make(map[pointID]int, len(in))
		for _, p := range in {
			pt, err := c.point(p)
			if err != nil {
				return nil, err
			}
			if i, dup := index[pt.id]; dup {
				points[i] = pt
				continue
			}
			index[pt.id] = len(points)
			points = append(points, pt)
		}
		return func() (writeResult, error) {
			if m := c.spec.strict.upsertMaxBatch; m != 0 && uint64(len(in)) > m {
				return writeResult{}, strictError("Upsert limit exceeded: "+uitoa(uint64(len(in)))+" > "+uitoa(m)+" for \"upsert\"", "Reduce the batch to or below "+uitoa(m)+" points")
			}
			f, err := c.updateFilter(uf)
			if err != nil {
				return writeResult{}, err
			}
			return c.writePoints(points, mode, f)
		}, nil
	}
}

func (c *collection) writePoints(points []point, mode qdrant.UpdateMode, f *filter) (writeResult, error) {
	c.begin(recordPoints)
	n := 0
	for i := range points {
		slot, exists := c.slotOf(points[i].id)
		switch {
		case !exists:
			if mode == qdrant.UpdateMode_UpdateOnly {
				continue
			}
		case mode == qdrant.UpdateMode_InsertOnly:
			continue
		default:
			if d := c.document(slot); !f.match(&d) {
				continue
			}
		}
		c.scratch = appendPoint(c.scratch, c.vectors, &points[i])
		n++
	}
	return c.done(n)
}

func (c *collection) updateFilter(uf *qdrant.Filter) (*filter, error) {
	f, err := compileFilter(c, uf)
	if err != nil {
		return nil, err
	}
	return f, c.checkFilter(f, true)
}

// point validates a point of a request and brings it into stored form.
func (c *collection) point(p *qdrant.PointStruct) (point, error) {
	id, err := parseID(p.GetId())
	if err != nil {
		return point{}, err
	}
	payload, err := encodePayload(p.GetPayload())
	if err != nil {
		return point{}, err
	}
	vectors, err := c.requestVectors(p.GetVectors(), false)
	return point{id: id, payload: payload, vectors: vectors}, err
}

// requestVectors validates the vectors of a point.
func (c *collection) requestVectors(v *qdrant.Vectors, need bool) ([]numberedVector, error) {
	var named map[string]*qdrant.Vector
	switch k := v.GetVectorsOptions().(type) {
	case *qdrant.Vectors_Vector:
		named = map[string]*qdrant.Vector{"": k.Vector}
	case *qdrant.Vectors_Vectors:
		named = k.Vectors.GetVectors()
	default:
		if v != nil || need {
			return nil, invalid("No Vector Provided")
		}
	}
	out := make([]numberedVector, 0, len(named))
	for name, vec := range named {
		n := c.vectorNumber(name)
		if n < 0 {
			return nil, unknownVector(name)
		}
		raw, err := requestVector(vec)
		if err != nil {
			return nil, err
		}
		data, err := c.vectors[n].accept(raw)
		if err != nil {
			return nil, err
		}
		out = append(out, numberedVector{number: n, data: data})
	}
	return out, nil
}

func unknownVector(name string) error {
	return invalidf("Wrong input: Not existing vector name error: %s", name)
}

// rawVector is a vector of a request before anything is known of its place.
type rawVector struct {
	shape vectorShape
	rows  [][]float32
	flat  []float32
	terms []uint32
}

func requestVector(v *qdrant.Vector) (rawVector, error) {
	switch k := v.GetVector().(type) {
	case *qdrant.Vector_Dense:
		return rawVector{shape: shapeDense, flat: k.Dense.GetData()}, nil
	case *qdrant.Vector_Sparse:
		return rawVector{shape: shapeSparse, flat: k.Sparse.GetValues(), terms: k.Sparse.GetIndices()}, nil
	case *qdrant.Vector_MultiDense:
		return rawMulti(k.MultiDense), nil
	case nil:
	default:
		return rawVector{}, unimplemented("inference (documents, images and objects in the place of vectors)")
	}
	// The deprecated flat form, which older clients send.
	data := v.GetData()                    //nolint:staticcheck // part of the API served
	if idx := v.GetIndices(); idx != nil { //nolint:staticcheck // part of the API served
		if v.VectorsCount != nil { //nolint:staticcheck // part of the API served
			return rawVector{}, invalid("Validation error in body: [indices: `indices` and `vectors_count` cannot be both specified]")
		}
		return rawVector{shape: shapeSparse, flat: data, terms: idx.GetData()}, nil
	}
	if v.VectorsCount == nil { //nolint:staticcheck // part of the API served
		return rawVector{shape: shapeDense, flat: data}, nil
	}
	n := int(v.GetVectorsCount()) //nolint:staticcheck // part of the API served
	if n == 0 || len(data) == 0 || len(data)%n != 0 {
		return rawVector{}, invalid("Validation error in body: [vectors_count: does not divide the data]")
	}
	r := rawVector{shape: shapeMulti}
	for i := 0; i < len(data); i += len(data) / n {
		r.rows = append(r.rows, data[i:i+len(data)/n])
	}
	return r, nil
}

func rawMulti(m *qdrant.MultiDenseVector) rawVector {
	r := rawVector{shape: shapeMulti}
	for _, row := range m.GetVectors() {
		r.rows = append(r.rows, row.GetData())
	}
	return r
}

// accept checks a vector against its place and brings it into stored form. The result does
// not share memory with the request where it had to change.
func (s *vectorSpec) accept(r rawVector) (vectorData, error) {
	if (r.shape == shapeSparse) != (s.shape == shapeSparse) {
		return vectorData{}, invalid("Wrong input: Wrong usage of sparse vectors")
	}
	var d vectorData
	switch {
	case r.shape == shapeSparse:
		if len(r.flat) != len(r.terms) {
			return d, invalid("Validation error in body: [sparse vector: indices and values must have the same length]")
		}
		seen := make(map[uint32]struct{}, len(r.terms))
		for _, t := range r.terms {
			if _, dup := seen[t]; dup {
				return d, invalid("Validation error in body: [indices: must be unique]")
			}
			seen[t] = struct{}{}
		}
		d = vectorData{flat: append([]float32(nil), r.flat...), indices: append([]uint32(nil), r.terms...)}
	case r.shape == shapeMulti:
		if s.shape != shapeMulti {
			return d, invalid("Wrong input: Wrong usage of multi vectors")
		}
		if len(r.rows) == 0 {
			return d, invalid("Validation error in body: [data: multi vector must not be empty]")
		}
		n := 0
		for _, row := range r.rows {
			if len(row) == 0 {
				return d, invalid("Validation error in body: [data: all vectors must be non-empty]")
			}
			if len(row) != len(r.rows[0]) {
				return d, invalidf("Validation error in body: [data: all vectors must have the same dimension, found vector with dimension %d]", len(row))
			}
			n += len(row)
		}
		if n >= maxMultivector {
			return d, invalidf("Validation error in body: [data: Total size of all vectors (%d) must be less than %d]", n, maxMultivector)
		}
		if len(r.rows[0]) != s.dim {
			return d, wrongDimension(s.dim, len(r.rows[0]))
		}
		d.flat = make([]float32, 0, n)
		for _, row := range r.rows {
			d.flat = append(d.flat, row...)
		}
	default:
		// A plain vector given for a multivector is one row of it.
		if len(r.flat) != s.dim {
			return d, wrongDimension(s.dim, len(r.flat))
		}
		d.flat = r.flat
		if s.distance == qdrant.Distance_Cosine || s.half {
			d.flat = append([]float32(nil), r.flat...)
		}
	}
	s.prepare(d)
	return d, nil
}

func wrongDimension(want, got int) error {
	return invalidf("Wrong input: Vector dimension error: expected dim: %d, got %d", want, got)
}

// selected resolves a selector to the slots of points that exist. missing is an id named
// in a list that does not exist. The caller holds writer.
func (c *collection) selected(sel *qdrant.PointsSelector) (slots []uint32, missing *pointID, err error) {
	switch k := sel.GetPointsSelectorOneOf().(type) {
	case *qdrant.PointsSelector_Points:
		ids, err := parseIDs(k.Points.GetIds())
		if err != nil {
			return nil, nil, err
		}
		seen := make(map[pointID]struct{}, len(ids))
		for _, id := range ids {
			if _, dup := seen[id]; dup {
				continue
			}
			seen[id] = struct{}{}
			if slot, ok := c.slotOf(id); ok {
				slots = append(slots, slot)
			} else if missing == nil {
				missing = &id
			}
		}
		return slots, missing, nil
	case *qdrant.PointsSelector_Filter:
		f, err := c.updateFilter(k.Filter)
		if err != nil {
			return nil, nil, err
		}
		return c.matching(f), nil, nil
	default:
		return nil, nil, invalid("Malformed PointsSelector type")
	}
}

// matching lists the slots that f selects. The caller holds writer or the read lock.
func (c *collection) matching(f *filter) []uint32 {
	var out []uint32
	if ids, ok := f.ids(); ok {
		for id := range ids {
			if slot, ok := c.slotOf(id); ok {
				if d := c.document(slot); f.match(&d) {
					out = append(out, slot)
				}
			}
		}
		return out
	}
	for slot := range c.slots {
		if !c.live.at(slot) {
			continue
		}
		if d := c.document(slot); f.match(&d) {
			out = append(out, slot)
		}
	}
	return out
}

// Delete removes points; ids that do not exist are no error.
func (ps *pointsService) Delete(_ context.Context, req *qdrant.DeletePoints) (*qdrant.PointsOperationResponse, error) {
	return ps.write(req.GetCollectionName(), req.GetWait(), req.GetShardKeySelector(), locked(func(c *collection) (writeResult, error) {
		return c.deletePoints(req.GetPoints())
	}))
}

func (c *collection) deletePoints(sel *qdrant.PointsSelector) (writeResult, error) {
	if sel == nil {
		return writeResult{}, invalid("PointSelector is missing")
	}
	slots, _, err := c.selected(sel)
	if err != nil {
		return writeResult{}, err
	}
	c.begin(recordDelete)
	for _, s := range slots {
		c.scratch = appendID(c.scratch, c.slotIDs.at(s))
	}
	return c.done(len(slots))
}

// payloadChange makes the new payload of a point from its old one.
type payloadChange func(old map[string]*qdrant.Value) map[string]*qdrant.Value

// changePayloads rewrites the payloads of the selected points. As in the real server, an id
// that does not exist is an error, which comes after the existing ones were changed.
func (c *collection) changePayloads(sel *qdrant.PointsSelector, whole *[]byte, change payloadChange) (writeResult, error) {
	if sel == nil {
		return writeResult{}, invalid("Bad request: No filter or points provided")
	}
	slots, missing, err := c.selected(sel)
	if err != nil {
		return writeResult{}, err
	}
	c.begin(recordPayloads)
	n := 0
	var r writeResult
	for _, s := range slots {
		var enc []byte
		if whole != nil {
			enc = *whole
		} else {
			old, err := decodePayload(c.payloads.at(s))
			if err != nil {
				return r, err
			}
			if enc, err = encodePayload(change(old)); err != nil {
				return r, err
			}
		}
		c.scratch = appendID(c.scratch, c.slotIDs.at(s))
		c.scratch = appendCount(c.scratch, len(enc))
		c.scratch = append(c.scratch, enc...)
		if n++; len(c.scratch) < splitRecord {
			continue
		}
		if r, err = c.done(n); err != nil {
			return r, err
		}
		c.begin(recordPayloads)
		n = 0
	}
	if r, err = c.done(n); err == nil && missing != nil {
		err = noPoint(*missing)
	}
	return r, err
}

func noPoint(id pointID) error {
	return status.Errorf(codes.NotFound, "Not found: No point with id %s found", id)
}

// SetPayload merges keys into payloads; a null removes its key.
func (ps *pointsService) SetPayload(_ context.Context, req *qdrant.SetPayloadPoints) (*qdrant.PointsOperationResponse, error) {
	return ps.write(req.GetCollectionName(), req.GetWait(), req.GetShardKeySelector(), locked(func(c *collection) (writeResult, error) {
		return c.setPayloadPoints(req.GetPointsSelector(), req.GetPayload(), req.Key)
	}))
}

func (c *collection) setPayloadPoints(sel *qdrant.PointsSelector, payload map[string]*qdrant.Value, key *string) (writeResult, error) {
	if _, err := encodePayload(payload); err != nil {
		return writeResult{}, err
	}
	if key == nil {
		return c.changePayloads(sel, nil, func(old map[string]*qdrant.Value) map[string]*qdrant.Value {
			mergeInto(old, payload)
			return old
		})
	}
	p, err := parsePath(*key)
	if err != nil {
		return writeResult{}, err
	}
	return c.changePayloads(sel, nil, func(old map[string]*qdrant.Value) map[string]*qdrant.Value {
		setAt(old, &p, payload)
		return old
	})
}

// OverwritePayload replaces payloads.
func (ps *pointsService) OverwritePayload(_ context.Context, req *qdrant.SetPayloadPoints) (*qdrant.PointsOperationResponse, error) {
	return ps.write(req.GetCollectionName(), req.GetWait(), req.GetShardKeySelector(), locked(func(c *collection) (writeResult, error) {
		return c.overwritePayload(req.GetPointsSelector(), req.GetPayload())
	}))
}

func (c *collection) overwritePayload(sel *qdrant.PointsSelector, payload map[string]*qdrant.Value) (writeResult, error) {
	enc, err := encodePayload(payload)
	if err != nil {
		return writeResult{}, err
	}
	return c.changePayloads(sel, &enc, nil)
}

// DeletePayload removes keys from payloads.
func (ps *pointsService) DeletePayload(_ context.Context, req *qdrant.DeletePayloadPoints) (*qdrant.PointsOperationResponse, error) {
	return ps.write(req.GetCollectionName(), req.GetWait(), req.GetShardKeySelector(), locked(func(c *collection) (writeResult, error) {
		return c.deletePayload(req.GetPointsSelector(), req.GetKeys())
	}))
}

func (c *collection) deletePayload(sel *qdrant.PointsSelector, keys []string) (writeResult, error) {
	paths := make([]jsonPath, len(keys))
	for i, k := range keys {
		var err error
		if paths[i], err = parsePath(k); err != nil {
			return writeResult{}, err
		}
	}
	return c.changePayloads(sel, nil, func(old map[string]*qdrant.Value) map[string]*qdrant.Value {
		for i := range paths {
			removeAt(old, &paths[i])
		}
		return old
	})
}

// ClearPayload empties payloads.
func (ps *pointsService) ClearPayload(_ context.Context, req *qdrant.ClearPayloadPoints) (*qdrant.PointsOperationResponse, error) {
	return ps.write(req.GetCollectionName(), req.GetWait(), req.GetShardKeySelector(), locked(func(c *collection) (writeResult, error) {
		return c.clearPayload(req.GetPoints())
	}))
}

func (c *collection) clearPayload(sel *qdrant.PointsSelector) (writeResult, error) {
	var none []byte
	return c.changePayloads(sel, &none, nil)
}

// UpdateVectors replaces the named vectors of points that exist; others stay.
func (ps *pointsService) UpdateVectors(_ context.Context, req *qdrant.UpdatePointVectors) (*qdrant.PointsOperationResponse, error) {
	return ps.write(req.GetCollectionName(), req.GetWait(), req.GetShardKeySelector(), locked(func(c *collection) (writeResult, error) {
		return c.updateVectors(req.GetPoints(), req.GetUpdateFilter())
	}))
}

func (c *collection) updateVectors(in []*qdrant.PointVectors, uf *qdrant.Filter) (writeResult, error) {
	if len(in) == 0 {
		return writeResult{}, invalid("Bad request: Empty update request")
	}
	f, err := c.updateFilter(uf)
	if err != nil {
		return writeResult{}, err
	}
	var missing *pointID
	var points []point
	for _, p := range in {
		id, err := parseID(p.GetId())
		if err != nil {
			return writeResult{}, err
		}
		vectors, err := c.requestVectors(p.GetVectors(), true)
		if err != nil {
			return writeResult{}, err
		}
		slot, ok := c.slotOf(id)
		if !ok {
			if missing == nil {
				missing = &id
			}
			continue
		}
		if d := c.document(slot); f.match(&d) {
			points = append(points, point{id: id, vectors: vectors})
		}
	}
	r, err := c.writeVectors(points)
	if err == nil && missing != nil {
		err = noPoint(*missing)
	}
	return r, err
}

func (c *collection) writeVectors(points []point) (writeResult, error) {
	c.begin(recordVectors)
	for _, p := range points {
		c.scratch = appendID(c.scratch, p.id)
		c.scratch = appendCount(c.scratch, len(p.vectors))
		for _, v := range p.vectors {
			c.scratch = appendVector(c.scratch, &c.vectors[v.number].vectorSpec, v)
		}
	}
	return c.done(len(points))
}

// DeleteVectors removes named vectors from points.
func (ps *pointsService) DeleteVectors(_ context.Context, req *qdrant.DeletePointVectors) (*qdrant.PointsOperationResponse, error) {
	return ps.write(req.GetCollectionName(), req.GetWait(), req.GetShardKeySelector(), locked(func(c *collection) (writeResult, error) {
		return c.deleteVectors(req.GetPointsSelector(), req.GetVectors())
	}))
}

func (c *collection) deleteVectors(sel *qdrant.PointsSelector, names *qdrant.VectorsSelector) (writeResult, error) {
	if len(names.GetNames()) == 0 {
		return writeResult{}, invalid("Validation error in body: [vector_names: must specify vector names to delete]")
	}
	var removed []numberedVector
	for _, name := range names.GetNames() {
		n := c.vectorNumber(name)
		if n < 0 {
			return writeResult{}, unknownVector(name)
		}
		removed = append(removed, numberedVector{number: n, removed: true})
	}
	slots, missing, err := c.selected(sel)
	if err != nil {
		return writeResult{}, err
	}
	points := make([]point, len(slots))
	for i, s := range slots {
		points[i] = point{id: c.slotIDs.at(s), vectors: removed}
	}
	r, err := c.writeVectors(points)
	if err == nil && missing != nil {
		err = noPoint(*missing)
	}
	return r, err
}

// UpdateBatch applies operations in order. It is not a transaction: an error leaves those
// before it applied.
func (ps *pointsService) UpdateBatch(_ context.Context, req *qdrant.UpdateBatchPoints) (*qdrant.UpdateBatchResponse, error) {
	start := time.Now()
	if len(req.GetOperations()) == 0 {
		return nil, invalid("Validation error in body: [operations: must not be empty]")
	}
	ops := make([]operation, len(req.GetOperations()))
	for i, in := range req.GetOperations() {
		keys, op, err := batchOperation(in)
		if err == nil {
			err = checkShardKeys(keys)
		}
		if err != nil {
			return nil, err
		}
		ops[i] = op
	}
	rs, err := ps.writeAll(req.GetCollectionName(), req.GetWait(), nil, ops)
	if err != nil {
		return nil, err
	}
	return &qdrant.UpdateBatchResponse{Result: rs, Time: seconds(start)}, nil
}

// batchOperation reads one operation of a batch.
func batchOperation(in *qdrant.PointsUpdateOperation) (*qdrant.ShardKeySelector, operation, error) {
	switch k := in.GetOperation().(type) {
	case *qdrant.PointsUpdateOperation_Upsert:
		o := k.Upsert
		return o.GetShardKeySelector(), upsert(o.GetPoints(), o.GetUpdateMode(), o.GetUpdateFilter()), nil
	case *qdrant.PointsUpdateOperation_DeletePoints_:
		o := k.DeletePoints
		return o.GetShardKeySelector(), locked(func(c *collection) (writeResult, error) { return c.deletePoints(o.GetPoints()) }), nil
	case *qdrant.PointsUpdateOperation_DeleteDeprecated:
		return nil, locked(func(c *collection) (writeResult, error) { return c.deletePoints(k.DeleteDeprecated) }), nil
	case *qdrant.PointsUpdateOperation_SetPayload_:
		o := k.SetPayload
		return o.GetShardKeySelector(), locked(func(c *collection) (writeResult, error) {
			return c.setPayloadPoints(o.GetPointsSelector(), o.GetPayload(), o.Key)
		}), nil
	case *qdrant.PointsUpdateOperation_OverwritePayload_:
		o := k.OverwritePayload
		return o.GetShardKeySelector(), locked(func(c *collection) (writeResult, error) {
			return c.overwritePayload(o.GetPointsSelector(), o.GetPayload())
		}), nil
	case *qdrant.PointsUpdateOperation_DeletePayload_:
		o := k.DeletePayload
		return o.GetShardKeySelector(), locked(func(c *collection) (writeResult, error) {
			return c.deletePayload(o.GetPointsSelector(), o.GetKeys())
		}), nil
	case *qdrant.PointsUpdateOperation_ClearPayload_:
		o := k.ClearPayload
		return o.GetShardKeySelector(), locked(func(c *collection) (writeResult, error) { return c.clearPayload(o.GetPoints()) }), nil
	case *qdrant.PointsUpdateOperation_ClearPayloadDeprecated:
		return nil, locked(func(c *collection) (writeResult, error) { return c.clearPayload(k.ClearPayloadDeprecated) }), nil
	case *qdrant.PointsUpdateOperation_UpdateVectors_:
		o := k.UpdateVectors
		return o.GetShardKeySelector(), locked(func(c *collection) (writeResult, error) {
			return c.updateVectors(o.GetPoints(), o.GetUpdateFilter())
		}), nil
	case *qdrant.PointsUpdateOperation_DeleteVectors_:
		o := k.DeleteVectors
		return o.GetShardKeySelector(), locked(func(c *collection) (writeResult, error) {
			return c.deleteVectors(o.GetPointsSelector(), o.GetVectors())
		}), nil
	default:
		return nil, nil, invalid("Operation is missing")
	}
}

// CreateFieldIndex builds a payload index over the stored points. Creating the same one
// again changes nothing; another type replaces it.
func (ps *pointsService) CreateFieldIndex(_ context.Context, req *qdrant.CreateFieldIndexCollection) (*qdrant.PointsOperationResponse, error) {
	col, err := columnOf(req)
	if err != nil {
		return nil, err
	}
	return ps.changeIndex(req.GetCollectionName(), req.GetWait(), req.GetFieldName(), req, col)
}

// DeleteFieldIndex drops a payload index; one that does not exist is no error.
func (ps *pointsService) DeleteFieldIndex(_ context.Context, req *qdrant.DeleteFieldIndexCollection) (*qdrant.PointsOperationResponse, error) {
	if _, err := parsePath(req.GetFieldName()); err != nil {
		return nil, err
	}
	return ps.changeIndex(req.GetCollectionName(), req.GetWait(), req.GetFieldName(), nil, nil)
}

func (ps *pointsService) changeIndex(name string, wait bool, field string, req *qdrant.CreateFieldIndexCollection, col *column) (*qdrant.PointsOperationResponse, error) {
	ps.s.metaMu.Lock()
	defer ps.s.metaMu.Unlock()
	return ps.write(name, wait, nil, locked(func(c *collection) (writeResult, error) {
		var enc []byte
		if req != nil {
			if old := c.spec.indexes[field]; old != nil && proto.Equal(old, req) {
				return c.done(0)
			}
			var err error
			if enc, err = proto.Marshal(req); err != nil {
				return writeResult{}, err
			}
		}
		err := ps.s.saveCatalogue(func(cat *catalogue) {
			for i := range cat.Collections {
				if e := &cat.Collections[i]; e.Name == c.name {
					if req == nil {
						delete(e.Indexes, field)
					} else {
						e.Indexes[field] = enc
					}
				}
			}
		})
		if err != nil {
			return writeResult{}, err
		}
		ps.s.mu.Lock()
		if req == nil {
			delete(c.spec.indexes, field)
		} else {
			c.spec.indexes[field] = req
		}
		ps.s.mu.Unlock()
		if req == nil {
			c.dropColumn(field)
		} else {
			c.addColumn(field, col)
		}
		return c.done(0)
	}))
}
