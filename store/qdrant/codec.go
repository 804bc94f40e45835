package qdrant

import (
	"math"

	"github.com/google/uuid"
	qc "github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Names of the vectors in a Qdrant collection.
const (
	denseName   = "dense"
	sparseName  = "sparse"
	colbertName = "colbert"
)

// systemKeys are read wherever a point is read; the metadata, which may be large, only where
// it is asked for.
var systemKeys = []string{
	corpus.KeyOwner, corpus.KeyDocument, corpus.KeyGen, corpus.KeyMetaVersion, corpus.KeyBucket, corpus.KeyChecksum,
}

func pointID(id corpus.ID) *qc.PointId { return qc.NewIDUUID(id.String()) }

func pointIDs(ids []corpus.ID) []*qc.PointId {
	out := make([]*qc.PointId, len(ids))
	for i, id := range ids {
		out[i] = pointID(id)
	}
	return out
}

// parseID reads a point's id; false for a numeric id, which is never ours.
func parseID(p *qc.PointId) (corpus.ID, bool) {
	u, err := uuid.Parse(p.GetUuid())
	return corpus.ID(u), err == nil
}

// value encodes one metadata value. A float without a fraction becomes an integer, as it does
// on its way through the ledger's JSON, so that both stores agree on what matches 3.
func value(v any) *qc.Value {
	switch x := v.(type) {
	case bool:
		return qc.NewValueBool(x)
	case string:
		return qc.NewValueString(x)
	case int64:
		return qc.NewValueInt(x)
	case float64:
		if x == math.Trunc(x) && math.Abs(x) < 1<<63 {
			return qc.NewValueInt(int64(x))
		}
		return qc.NewValueDouble(x)
	case []any:
		list := make([]*qc.Value, len(x))
		for i := range x {
			list[i] = value(x[i])
		}
		return qc.NewValueFromList(list...)
	case map[string]any:
		return qc.NewValueFromFields(fields(x))
	case corpus.Metadata:
		return qc.NewValueFromFields(fields(x))
	default: // nil; ParseMetadata leaves nothing else
		return qc.NewValueNull()
	}
}

func fields(m map[string]any) map[string]*qc.Value {
	out := make(map[string]*qc.Value, len(m))
	for k, v := range m {
		out[k] = value(v)
	}
	return out
}

func plain(v *qc.Value) any {
	switch x := v.GetKind().(type) {
	case *qc.Value_BoolValue:
		return x.BoolValue
	case *qc.Value_StringValue:
		return x.StringValue
	case *qc.Value_IntegerValue:
		return x.IntegerValue
	case *qc.Value_DoubleValue:
		return x.DoubleValue
	case *qc.Value_ListValue:
		out := make([]any, len(x.ListValue.GetValues()))
		for i, e := range x.ListValue.GetValues() {
			out[i] = plain(e)
		}
		return out
	case *qc.Value_StructValue:
		return plainMap(x.StructValue.GetFields())
	default:
		return nil
	}
}

func plainMap(m map[string]*qc.Value) map[string]any {
	out := make(map[string]any, len(m))
	for k, v := range m {
		out[k] = plain(v)
	}
	return out
}

// encodePoint checks a point against the index's layout and encodes it. A point that does not
// fit is refused here, by id, instead of failing its whole batch at the server.
func encodePoint(ix corpus.Index, p *corpus.Point) (*qc.PointStruct, error) {
	refuse := func(format string, args ...any) (*qc.PointStruct, error) {
		e := corpus.Errorf(corpus.Invalid, "vector_refused", format, args...)
		e.Fields = []corpus.FieldError{{Code: "vector_refused", Detail: "point " + p.ID.String() + ": " + e.Detail}}
		return nil, e
	}
	l := ix.Layout
	if p.ID == stampID {
		return refuse("the id %s is reserved", p.ID)
	}
	if want, have := l.Vectors, p.Vectors.Heads(); want != have {
		return refuse("the index holds %s vectors, the point has %s", want, have)
	}
	if !p.Vectors.Finite() {
		return refuse("a vector holds a value that is not a finite number")
	}
	vectors := make(map[string]*qc.Vector, 3)
	if v := p.Vectors.Dense; v != nil {
		if len(v) != l.Dim {
			return refuse("the dense vector has %d values, the index takes %d", len(v), l.Dim)
		}
		vectors[denseName] = qc.NewVectorDense(v)
	}
	if s := p.Vectors.Sparse; s != nil {
		if len(s.Indices) != len(s.Values) {
			return refuse("the sparse vector has %d indices and %d values", len(s.Indices), len(s.Values))
		}
		vectors[sparseName] = qc.NewVectorSparse(s.Indices, s.Values)
	}
	if rows := p.Vectors.ColBERT; rows != nil {
		if len(rows) == 0 {
			return refuse("the ColBERT vector has no rows")
		}
		if n := len(rows) * l.ColBERTDim; n > corpus.MaxColBERTValues {
			return refuse("the ColBERT vector has %d values, at most %d fit; use shorter chunks", n, corpus.MaxColBERTValues)
		}
		for _, row := range rows {
			if len(row) != l.ColBERTDim {
				return refuse("a ColBERT row has %d values, the index takes %d", len(row), l.ColBERTDim)
			}
		}
		vectors[colbertName] = qc.NewVectorMulti(rows)
	}
	return &qc.PointStruct{Id: pointID(p.ID), Vectors: qc.NewVectorsMap(vectors), Payload: encodePayload(&p.Payload)}, nil
}

func encodePayload(p *corpus.Payload) map[string]*qc.Value {
	return map[string]*qc.Value{
		corpus.KeyOwner:       qc.NewValueString(p.Owner.String()),
		corpus.KeyDocument:    qc.NewValueString(p.Document.String()),
		corpus.KeyGen:         qc.NewValueInt(p.Gen),
		corpus.KeyMetaVersion: qc.NewValueInt(p.MetaVersion),
		corpus.KeyBucket:      qc.NewValueInt(int64(p.Bucket)),
		corpus.KeyChecksum:    qc.NewValueString(p.Checksum),
		corpus.KeyMetadata:    value(p.Metadata),
	}
}

// decodeState reads a point as the index answered it. keys are those that were asked for.
func decodeState(id corpus.ID, payload map[string]*qc.Value, vectors *qc.VectorsOutput, keys []string, withVectors bool) corpus.PointState {
	s := corpus.PointState{ID: id}
	for _, key := range keys {
		v, ok := payload[key]
		if ok {
			ok = decodeKey(&s, key, v)
		}
		if !ok {
			s.Unreadable = append(s.Unreadable, key)
		}
	}
	if withVectors {
		s.Vectors = decodeVectors(vectors)
	}
	return s
}

func decodeKey(s *corpus.PointState, key string, v *qc.Value) bool {
	uid := func(out *corpus.ID) bool {
		text, ok := v.GetKind().(*qc.Value_StringValue)
		if !ok {
			return false
		}
		u, err := uuid.Parse(text.StringValue)
		if err != nil {
			return false
		}
		*out = corpus.ID(u)
		return true
	}
	integer := func(out *int64) bool {
		n, ok := v.GetKind().(*qc.Value_IntegerValue)
		if ok {
			*out = n.IntegerValue
		}
		return ok
	}
	switch key {
	case corpus.KeyOwner:
		s.HasOwner = uid(&s.Payload.Owner)
		return s.HasOwner
	case corpus.KeyDocument:
		return uid(&s.Payload.Document)
	case corpus.KeyGen:
		return integer(&s.Payload.Gen)
	case corpus.KeyMetaVersion:
		return integer(&s.Payload.MetaVersion)
	case corpus.KeyBucket:
		var n int64
		if !integer(&n) || n < 0 || n >= corpus.Buckets {
			return false
		}
		s.Payload.Bucket = uint32(n)
		return true
	case corpus.KeyChecksum:
		text, ok := v.GetKind().(*qc.Value_StringValue)
		if ok {
			s.Payload.Checksum = text.StringValue
		}
		return ok
	case corpus.KeyMetadata:
		m, ok := v.GetKind().(*qc.Value_StructValue)
		if ok {
			s.Payload.Metadata = plainMap(m.StructValue.GetFields())
		}
		return ok
	}
	return false
}

// decodeVectors never returns nil: a point without vectors has none of the heads.
func decodeVectors(out *qc.VectorsOutput) *corpus.Vectors {
	v := &corpus.Vectors{}
	named := out.GetVectors().GetVectors()
	if d := named[denseName].GetDenseVector(); d != nil {
		v.Dense = d.GetData()
	}
	if s := named[sparseName].GetSparseVector(); s != nil {
		v.Sparse = &corpus.Sparse{Indices: s.GetIndices(), Values: s.GetValues()}
	}
	if m := named[colbertName].GetMultiVector(); m != nil {
		v.ColBERT = make([][]float32, len(m.GetVectors()))
		for i, row := range m.GetVectors() {
			v.ColBERT[i] = row.GetData()
		}
	}
	return v
}
