package storetest

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// RunQdrant runs every call that Lockstep makes of a Qdrant server, against what connect
// returns clients of. It tests the facts that Lockstep's protocol rests on, the awkward
// ones before all: what insert_only leaves alone, what an update filter does not hold back,
// the order and the offsets of a scroll, the codes of errors.
func RunQdrant(t *testing.T, connect func(t *testing.T) *qdrant.Client) {
	for _, test := range []struct {
		name string
		run  func(*suite)
	}{
		{"health", (*suite).health},
		{"collections", (*suite).collections},
		{"missing collection", (*suite).missingCollection},
		{"aliases", (*suite).aliases},
		{"vectors", (*suite).vectors},
		{"float16", (*suite).float16},
		{"upsert replaces", (*suite).upsertReplaces},
		{"update modes", (*suite).updateModes},
		{"update filter", (*suite).updateFilter},
		{"guarded payload", (*suite).guardedPayload},
		{"duplicates", (*suite).duplicates},
		{"delete", (*suite).deletes},
		{"scroll order", (*suite).scrollOrder},
		{"scroll filter", (*suite).scrollFilter},
		{"payload selectors", (*suite).payloadSelectors},
		{"get", (*suite).get},
		{"big page", (*suite).bigPage},
		{"facet", (*suite).facet},
		{"payload operations", (*suite).payloadOperations},
		{"vector operations", (*suite).vectorOperations},
		{"update batch", (*suite).updateBatch},
		{"filters", (*suite).filters},
		{"random filters", (*suite).randomFilters},
		{"text index", (*suite).textIndex},
		{"distances", (*suite).distances},
		{"nearest", (*suite).nearest},
		{"sparse", (*suite).sparse},
		{"multivector", (*suite).multivector},
		{"query by id", (*suite).queryByID},
		{"fusion", (*suite).fusion},
		{"nested prefetch", (*suite).nestedPrefetch},
		{"query batch", (*suite).queryBatch},
		{"validation", (*suite).validation},
		{"strict mode", (*suite).strictMode},
		{"payload index", (*suite).payloadIndex},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := &suite{T: t, c: connect(t)}
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
			t.Cleanup(cancel)
			s.ctx = ctx
			test.run(s)
		})
	}
}

// suite is what one test of the suite works with.
type suite struct {
	*testing.T
	ctx context.Context
	c   *qdrant.Client
}

// tolerance is how far a score may be from the one computed here, relative to its size.
// Servers add up in other orders.
const tolerance = 1e-4

func (s *suite) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

func (s *suite) wantCode(err error, want codes.Code, what string) {
	s.Helper()
	if got := status.Code(err); got != want {
		s.Errorf("%s: got %v (%v), want code %v", what, got, err, want)
	}
}

// create makes a collection that the test's end removes, and returns its name.
func (s *suite) create(req *qdrant.CreateCollection) string {
	s.Helper()
	req.CollectionName = "test_" + uuid.NewString()
	s.must(s.c.CreateCollection(s.ctx, req))
	s.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := s.c.DeleteCollection(ctx, req.CollectionName); err != nil {
			s.Errorf("removing %s: %v", req.CollectionName, err)
		}
	})
	return req.CollectionName
}

// plain makes a collection with one unnamed vector.
func (s *suite) plain(size uint64, d qdrant.Distance) string {
	s.Helper()
	return s.create(&qdrant.CreateCollection{
		VectorsConfig: qdrant.NewVectorsConfig(&qdrant.VectorParams{Size: size, Distance: d}),
	})
}

// hybrid makes a collection as Lockstep does: dense, sparse and colbert by name.
func (s *suite) hybrid() string {
	s.Helper()
	return s.create(&qdrant.CreateCollection{
		VectorsConfig: qdrant.NewVectorsConfigMap(map[string]*qdrant.VectorParams{
			"dense": {Size: 4, Distance: qdrant.Distance_Dot},
			"colbert": {
				Size: 2, Distance: qdrant.Distance_Dot,
				MultivectorConfig: &qdrant.MultiVectorConfig{Comparator: qdrant.MultiVectorComparator_MaxSim},
				HnswConfig:        &qdrant.HnswConfigDiff{M: qdrant.PtrOf(uint64(0))},
			},
		}),
		SparseVectorsConfig: qdrant.NewSparseVectorsConfig(map[string]*qdrant.SparseVectorParams{"sparse": {}}),
	})
}

func (s *suite) upsert(name string, points ...*qdrant.PointStruct) {
	s.Helper()
	s.upsertAs(&qdrant.UpsertPoints{CollectionName: name, Points: points})
}

func (s *suite) upsertAs(req *qdrant.UpsertPoints) {
	s.Helper()
	req.Wait = qdrant.PtrOf(true)
	r, err := s.c.Upsert(s.ctx, req)
	s.must(err)
	s.completed(r)
}

func (s *suite) completed(r *qdrant.UpdateResult) {
	s.Helper()
	if r.GetStatus() != qdrant.UpdateStatus_Completed {
		s.Fatalf("status %v, want Completed", r.GetStatus())
	}
}

// done checks the result of a write that waited.
func (s *suite) done(r *qdrant.UpdateResult, err error) {
	s.Helper()
	s.must(err)
	s.completed(r)
}

func (s *suite) index(name, field string, t qdrant.FieldType) {
	s.Helper()
	s.done(s.c.CreateFieldIndex(s.ctx, &qdrant.CreateFieldIndexCollection{
		CollectionName: name, Wait: qdrant.PtrOf(true), FieldName: field, FieldType: t.Enum(),
	}))
}

func (s *suite) count(name string, f *qdrant.Filter) uint64 {
	s.Helper()
	n, err := s.c.Count(s.ctx, &qdrant.CountPoints{CollectionName: name, Filter: f, Exact: qdrant.PtrOf(true)})
	s.must(err)
	return n
}

// read returns the payloads and vectors of points by id, as text.
func (s *suite) read(name string, ids ...*qdrant.PointId) map[string]*qdrant.RetrievedPoint {
	s.Helper()
	ps, err := s.c.Get(s.ctx, &qdrant.GetPoints{
		CollectionName: name, Ids: ids,
		WithPayload: qdrant.NewWithPayload(true), WithVectors: qdrant.NewWithVectors(true),
	})
	s.must(err)
	out := map[string]*qdrant.RetrievedPoint{}
	for _, p := range ps {
		out[idText(p.GetId())] = p
	}
	return out
}

// payload is the payload of one point as JSON, "" if there is no such point.
func (s *suite) payload(name string, id *qdrant.PointId) string {
	s.Helper()
	p := s.read(name, id)[idText(id)]
	if p == nil {
		return ""
	}
	return payloadText(s.T, p.GetPayload())
}

func (s *suite) wantPayload(name string, id *qdrant.PointId, want string) {
	s.Helper()
	if got := s.payload(name, id); got != want {
		s.Errorf("payload of %s: got %s, want %s", idText(id), got, want)
	}
}

func idText(id *qdrant.PointId) string {
	if u := id.GetUuid(); u != "" {
		return strings.ToLower(u)
	}
	return fmt.Sprint(id.GetNum())
}

func num(n uint64) *qdrant.PointId { return qdrant.NewIDNum(n) }

func nums(ns ...uint64) []*qdrant.PointId {
	out := make([]*qdrant.PointId, len(ns))
	for i, n := range ns {
		out[i] = num(n)
	}
	return out
}

// payloadText spells a payload as JSON with sorted keys.
func payloadText(t *testing.T, m map[string]*qdrant.Value) string {
	t.Helper()
	b, err := json.Marshal(plainMap(m))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func plainMap(m map[string]*qdrant.Value) map[string]any {
	out := map[string]any{}
	for k, v := range m {
		out[k] = plainValue(v)
	}
	return out
}

func plainValue(v *qdrant.Value) any {
	switch k := v.GetKind().(type) {
	case *qdrant.Value_BoolValue:
		return k.BoolValue
	case *qdrant.Value_IntegerValue:
		return k.IntegerValue
	case *qdrant.Value_DoubleValue:
		return k.DoubleValue
	case *qdrant.Value_StringValue:
		return k.StringValue
	case *qdrant.Value_StructValue:
		return plainMap(k.StructValue.GetFields())
	case *qdrant.Value_ListValue:
		out := []any{}
		for _, c := range k.ListValue.GetValues() {
			out = append(out, plainValue(c))
		}
		return out
	default:
		return nil
	}
}

// fromJSON makes a payload; numbers without a fraction or exponent are integers.
func fromJSON(t *testing.T, text string) map[string]*qdrant.Value {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	var m map[string]any
	if err := d.Decode(&m); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return qdrant.NewValueMap(fixNumbers(m).(map[string]any))
}

func fixNumbers(v any) any {
	switch x := v.(type) {
	case map[string]any:
		for k, c := range x {
			x[k] = fixNumbers(c)
		}
	case []any:
		for i, c := range x {
			x[i] = fixNumbers(c)
		}
	case json.Number:
		if i, err := x.Int64(); err == nil {
			return i
		}
		f, err := x.Float64()
		if err != nil {
			panic(err)
		}
		return f
	}
	return v
}

func (s *suite) health() {
	r, err := s.c.HealthCheck(s.ctx)
	s.must(err)
	if r.GetTitle() == "" || !strings.HasPrefix(r.GetVersion(), "1.") {
		s.Errorf("got title %q, version %q", r.GetTitle(), r.GetVersion())
	}
}

func (s *suite) collections() {
	name := s.create(&qdrant.CreateCollection{
		VectorsConfig: qdrant.NewVectorsConfigMap(map[string]*qdrant.VectorParams{
			"a": {Size: 3, Distance: qdrant.Distance_Cosine},
			"m": {
				Size: 5, Distance: qdrant.Distance_Dot,
				MultivectorConfig: &qdrant.MultiVectorConfig{Comparator: qdrant.MultiVectorComparator_MaxSim},
			},
		}),
		SparseVectorsConfig: qdrant.NewSparseVectorsConfig(map[string]*qdrant.SparseVectorParams{"s": {}}),
		HnswConfig:          &qdrant.HnswConfigDiff{M: qdrant.PtrOf(uint64(8))},
		OnDiskPayload:       qdrant.PtrOf(false),
	})
	exists, err := s.c.CollectionExists(s.ctx, name)
	s.must(err)
	if !exists {
		s.Error("a collection just made does not exist")
	}
	exists, err = s.c.CollectionExists(s.ctx, name+"x")
	s.must(err)
	if exists {
		s.Error("a collection never made exists")
	}
	names, err := s.c.ListCollections(s.ctx)
	s.must(err)
	if !slices.Contains(names, name) {
		s.Errorf("%s is not listed", name)
	}
	s.wantCode(s.c.CreateCollection(s.ctx, &qdrant.CreateCollection{
		CollectionName: name,
		VectorsConfig:  qdrant.NewVectorsConfig(&qdrant.VectorParams{Size: 4, Distance: qdrant.Distance_Dot}),
	}), codes.AlreadyExists, "creating again")

	s.index(name, "k", qdrant.FieldType_FieldTypeKeyword)
	s.upsert(name,
		&qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{"a": qdrant.NewVector(1, 2, 3)}), Payload: qdrant.NewValueMap(map[string]any{"k": "x"})},
		&qdrant.PointStruct{Id: num(2), Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{}), Payload: qdrant.NewValueMap(map[string]any{"l": "x"})})
	info, err := s.c.GetCollectionInfo(s.ctx, name)
	s.must(err)
	if info.GetStatus() != qdrant.CollectionStatus_Green && info.GetStatus() != qdrant.CollectionStatus_Yellow {
		s.Errorf("status %v", info.GetStatus())
	}
	if info.GetPointsCount() != 2 {
		s.Errorf("%d points, want 2", info.GetPointsCount())
	}
	params := info.GetConfig().GetParams()
	m := params.GetVectorsConfig().GetParamsMap().GetMap()
	if m["a"].GetSize() != 3 || m["a"].GetDistance() != qdrant.Distance_Cosine || m["a"].GetMultivectorConfig() != nil ||
		m["m"].GetSize() != 5 || m["m"].GetMultivectorConfig() == nil {
		s.Errorf("vectors in the info: %v", m)
	}
	if _, ok := params.GetSparseVectorsConfig().GetMap()["s"]; !ok {
		s.Errorf("sparse vectors in the info: %v", params.GetSparseVectorsConfig())
	}
	if params.GetShardNumber() != 1 || params.GetReplicationFactor() != 1 || params.GetWriteConsistencyFactor() != 1 {
		s.Errorf("shards and replicas in the info: %v", params)
	}
	if info.GetConfig().GetHnswConfig().GetM() != 8 || info.GetConfig().GetHnswConfig().GetEfConstruct() != 100 {
		s.Errorf("HNSW in the info: %v", info.GetConfig().GetHnswConfig())
	}
	k := info.GetPayloadSchema()["k"]
	if len(info.GetPayloadSchema()) != 1 || k.GetDataType() != qdrant.PayloadSchemaType_Keyword || k.GetPoints() != 1 {
		s.Errorf("payload schema: %v", info.GetPayloadSchema())
	}

	other := "test_" + uuid.NewString()
	s.must(s.c.CreateCollection(s.ctx, &qdrant.CreateCollection{
		CollectionName: other,
		VectorsConfig:  qdrant.NewVectorsConfig(&qdrant.VectorParams{Size: 4, Distance: qdrant.Distance_Dot}),
	}))
	s.upsert(other, &qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectors(1, 2, 3, 4)})
	s.must(s.c.DeleteCollection(s.ctx, other))
	_, err = s.c.GetCollectionInfo(s.ctx, other)
	s.wantCode(err, codes.NotFound, "info of a deleted collection")
	r, err := s.c.GetCollectionsClient().Delete(s.ctx, &qdrant.DeleteCollection{CollectionName: other})
	s.must(err)
	if r.GetResult() {
		s.Error("deleting a collection twice succeeds twice")
	}
	s.must(s.c.CreateCollection(s.ctx, &qdrant.CreateCollection{
		CollectionName: other,
		VectorsConfig:  qdrant.NewVectorsConfig(&qdrant.VectorParams{Size: 4, Distance: qdrant.Distance_Dot}),
	}))
	if n := s.count(other, nil); n != 0 {
		s.Errorf("a collection made again holds %d points", n)
	}
	s.must(s.c.DeleteCollection(s.ctx, other))
}

func (s *suite) missingCollection() {
	const name = "test_that_never_was"
	_, err := s.c.GetCollectionInfo(s.ctx, name)
	s.wantCode(err, codes.NotFound, "info")
	_, err = s.c.Upsert(s.ctx, &qdrant.UpsertPoints{CollectionName: name, Wait: qdrant.PtrOf(true), Points: []*qdrant.PointStruct{{Id: num(1), Vectors: qdrant.NewVectors(1)}}})
	s.wantCode(err, codes.NotFound, "upsert")
	_, err = s.c.Delete(s.ctx, &qdrant.DeletePoints{CollectionName: name, Points: qdrant.NewPointsSelector(num(1))})
	s.wantCode(err, codes.NotFound, "delete")
	_, err = s.c.Get(s.ctx, &qdrant.GetPoints{CollectionName: name, Ids: nums(1)})
	s.wantCode(err, codes.NotFound, "get")
	_, err = s.c.Scroll(s.ctx, &qdrant.ScrollPoints{CollectionName: name})
	s.wantCode(err, codes.NotFound, "scroll")
	_, err = s.c.Count(s.ctx, &qdrant.CountPoints{CollectionName: name})
	s.wantCode(err, codes.NotFound, "count")
	_, err = s.c.Facet(s.ctx, &qdrant.FacetCounts{CollectionName: name, Key: "k"})
	s.wantCode(err, codes.NotFound, "facet")
	_, err = s.c.Query(s.ctx, &qdrant.QueryPoints{CollectionName: name, Query: qdrant.NewQuery(1)})
	s.wantCode(err, codes.NotFound, "query")
	_, err = s.c.SetPayload(s.ctx, &qdrant.SetPayloadPoints{CollectionName: name, PointsSelector: qdrant.NewPointsSelector(num(1)), Payload: qdrant.NewValueMap(map[string]any{"a": 1})})
	s.wantCode(err, codes.NotFound, "set payload")
	_, err = s.c.CreateFieldIndex(s.ctx, &qdrant.CreateFieldIndexCollection{CollectionName: name, FieldName: "k", FieldType: qdrant.FieldType_FieldTypeKeyword.Enum()})
	s.wantCode(err, codes.NotFound, "index")
}

func (s *suite) aliases() {
	a, b := s.plain(2, qdrant.Distance_Dot), s.plain(2, qdrant.Distance_Dot)
	alias := "alias_" + uuid.NewString()
	s.wantCode(s.c.CreateAlias(s.ctx, alias, "test_that_never_was"), codes.NotFound, "alias of nothing")
	s.wantCode(s.c.CreateAlias(s.ctx, b, a), codes.AlreadyExists, "alias named as a collection")
	s.must(s.c.CreateAlias(s.ctx, alias, a))
	s.upsert(alias, &qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectors(1, 0)})
	if s.count(a, nil) != 1 || s.count(alias, nil) != 1 || s.count(b, nil) != 0 {
		s.Error("an upsert through an alias went astray")
	}
	if names, err := s.c.ListCollectionAliases(s.ctx, a); err != nil || !slices.Equal(names, []string{alias}) {
		s.Errorf("aliases of the collection: %v, %v", names, err)
	}
	// Deleting and creating in one call switches without a gap.
	s.must(s.c.UpdateAliases(s.ctx, []*qdrant.AliasOperations{qdrant.NewAliasDelete(alias), qdrant.NewAliasCreate(alias, b)}))
	if s.count(alias, nil) != 0 {
		s.Error("the alias was not switched")
	}
	s.must(s.c.RenameAlias(s.ctx, alias, alias+"x"))
	_, err := s.c.Scroll(s.ctx, &qdrant.ScrollPoints{CollectionName: alias})
	s.wantCode(err, codes.NotFound, "renamed alias")
	all, err := s.c.ListAliases(s.ctx)
	s.must(err)
	if !slices.ContainsFunc(all, func(d *qdrant.AliasDescription) bool {
		return d.GetAliasName() == alias+"x" && d.GetCollectionName() == b
	}) {
		s.Errorf("aliases: %v", all)
	}
	s.must(s.c.DeleteAlias(s.ctx, alias+"x"))
}

func (s *suite) vectors() {
	name := s.create(&qdrant.CreateCollection{
		VectorsConfig: qdrant.NewVectorsConfigMap(map[string]*qdrant.VectorParams{
			"cos": {Size: 2, Distance: qdrant.Distance_Cosine},
			"dot": {Size: 2, Distance: qdrant.Distance_Dot},
			"multi": {
				Size: 2, Distance: qdrant.Distance_Cosine,
				MultivectorConfig: &qdrant.MultiVectorConfig{Comparator: qdrant.MultiVectorComparator_MaxSim},
			},
		}),
		SparseVectorsConfig: qdrant.NewSparseVectorsConfig(map[string]*qdrant.SparseVectorParams{"sparse": {}}),
	})
	s.upsert(name, &qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{
		"cos":    qdrant.NewVector(3, 4),
		"dot":    qdrant.NewVector(3, 4),
		"multi":  qdrant.NewVectorMulti([][]float32{{3, 4}, {0, -2}}),
		"sparse": qdrant.NewVectorSparse([]uint32{9, 2, 5}, []float32{0.9, 0.2, 0.5}),
	})}, &qdrant.PointStruct{Id: num(2), Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{"cos": qdrant.NewVector(0, 0)})})
	vs := s.read(name, num(1))["1"].GetVectors().GetVectors().GetVectors()
	if got := vs["cos"].GetDenseVector().GetData(); !near(got, 0.6, 0.8) {
		s.Errorf("cosine vector stored as %v", got)
	}
	if got := vs["dot"].GetDenseVector().GetData(); !slices.Equal(got, []float32{3, 4}) {
		s.Errorf("dot vector stored as %v", got)
	}
	if rows := vs["multi"].GetMultiVector().GetVectors(); len(rows) != 2 || !near(rows[0].GetData(), 0.6, 0.8) || !near(rows[1].GetData(), 0, -1) {
		s.Errorf("multivector stored as %v", rows)
	}
	sp := vs["sparse"].GetSparseVector()
	got := map[uint32]float32{}
	for i, t := range sp.GetIndices() {
		got[t] = sp.GetValues()[i]
	}
	if len(got) != 3 || got[2] != 0.2 || got[5] != 0.5 || got[9] != 0.9 {
		s.Errorf("sparse vector stored as %v", sp)
	}
	if vs := s.read(name, num(2))["2"].GetVectors().GetVectors().GetVectors(); len(vs) != 1 || !near(vs["cos"].GetDenseVector().GetData(), 0, 0) {
		s.Errorf("vectors of a point with one: %v", vs)
	}
	ps, err := s.c.Get(s.ctx, &qdrant.GetPoints{CollectionName: name, Ids: nums(1), WithVectors: qdrant.NewWithVectorsInclude("dot")})
	s.must(err)
	if vs := ps[0].GetVectors().GetVectors().GetVectors(); len(vs) != 1 || vs["dot"] == nil {
		s.Errorf("selected vectors: %v", vs)
	}
	ps, err = s.c.Get(s.ctx, &qdrant.GetPoints{CollectionName: name, Ids: nums(1)})
	s.must(err)
	if ps[0].GetVectors() != nil || len(ps[0].GetPayload()) != 0 {
		s.Errorf("a get without selectors returned %v", ps[0])
	}
	one := s.plain(2, qdrant.Distance_Dot)
	s.upsert(one, &qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectors(1, 2)})
	if got := s.read(one, num(1))["1"].GetVectors().GetVector().GetDenseVector().GetData(); !near(got, 1, 2) {
		s.Errorf("unnamed vector: %v", got)
	}
}

func near(got []float32, want ...float32) bool {
	if len(got) != len(want) {
		return false
	}
	for i, w := range want {
		if math.Abs(float64(got[i]-w)) > 1e-5 {
			return false
		}
	}
	return true
}

func (s *suite) float16() {
	name := s.create(&qdrant.CreateCollection{VectorsConfig: qdrant.NewVectorsConfig(&qdrant.VectorParams{
		Size: 4, Distance: qdrant.Distance_Dot, Datatype: qdrant.Datatype_Float16.Enum(),
	})})
	s.upsert(name, &qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectors(0.1, 1.0/3, 1000.3, 0.00001)})
	got := s.read(name, num(1))["1"].GetVectors().GetVector().GetDenseVector().GetData()
	want := []float32{0.09997559, 0.33325195, 1000.5, 0.000010013580}
	for i := range want {
		if math.Abs(float64(got[i]-want[i])) > 1e-7*math.Max(1, float64(want[i])) {
			s.Errorf("component %d stored as %v, want %v", i, got[i], want[i])
		}
	}
}

func (s *suite) upsertReplaces() {
	name := s.hybrid()
	p := &qdrant.PointStruct{Id: num(1), Payload: fromJSON(s.T, `{"a":1,"b":2}`), Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{
		"dense": qdrant.NewVector(1, 2, 3, 4), "sparse": qdrant.NewVectorSparse([]uint32{1}, []float32{1}),
	})}
	s.upsert(name, p)
	s.upsert(name, &qdrant.PointStruct{Id: num(1), Payload: fromJSON(s.T, `{"b":3}`), Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{
		"dense": qdrant.NewVector(4, 3, 2, 1),
	})})
	s.wantPayload(name, num(1), `{"b":3}`)
	vs := s.read(name, num(1))["1"].GetVectors().GetVectors().GetVectors()
	if len(vs) != 1 || !near(vs["dense"].GetDenseVector().GetData(), 4, 3, 2, 1) {
		s.Errorf("vectors after the second upsert: %v", vs)
	}
	if s.count(name, nil) != 1 {
		s.Error("two upserts of one id made two points")
	}
	s.upsert(name, &qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{"dense": qdrant.NewVector(1, 1, 1, 1)})})
	s.wantPayload(name, num(1), `{}`)
	// Without wait the write is accepted and becomes visible some time.
	r, err := s.c.Upsert(s.ctx, &qdrant.UpsertPoints{CollectionName: name, Points: []*qdrant.PointStruct{{Id: num(2), Vectors: qdrant.NewVectorsMap(nil)}}})
	s.must(err)
	if r.GetStatus() != qdrant.UpdateStatus_Acknowledged {
		s.Errorf("status without wait: %v", r.GetStatus())
	}
	s.upsert(name, &qdrant.PointStruct{Id: num(3), Vectors: qdrant.NewVectorsMap(nil)})
	if s.count(name, nil) != 3 {
		s.Error("a write without wait that precedes one with wait is not visible after it")
	}
}

func (s *suite) updateModes() {
	name := s.plain(2, qdrant.Distance_Dot)
	put := func(mode qdrant.UpdateMode, text string, ids ...uint64) {
		s.Helper()
		req := &qdrant.UpsertPoints{CollectionName: name, UpdateMode: mode.Enum()}
		for _, id := range ids {
			req.Points = append(req.Points, &qdrant.PointStruct{Id: num(id), Vectors: qdrant.NewVectors(1, 2), Payload: fromJSON(s.T, text)})
		}
		s.upsertAs(req)
	}
	put(qdrant.UpdateMode_InsertOnly, `{"v":1}`, 1)
	s.wantPayload(name, num(1), `{"v":1}`)
	put(qdrant.UpdateMode_InsertOnly, `{"v":2}`, 1, 2)
	s.wantPayload(name, num(1), `{"v":1}`)
	s.wantPayload(name, num(2), `{"v":2}`)
	put(qdrant.UpdateMode_UpdateOnly, `{"v":3}`, 2, 3)
	s.wantPayload(name, num(2), `{"v":3}`)
	s.wantPayload(name, num(3), "")
	put(qdrant.UpdateMode_Upsert, `{"v":4}`, 1, 3)
	s.wantPayload(name, num(1), `{"v":4}`)
	s.wantPayload(name, num(3), `{"v":4}`)
	// The filter does not matter to insert_only; update_only asks for both.
	f := &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewMatchInt("v", 4)}}
	s.upsertAs(&qdrant.UpsertPoints{
		CollectionName: name, UpdateMode: qdrant.UpdateMode_InsertOnly.Enum(), UpdateFilter: f,
		Points: []*qdrant.PointStruct{{Id: num(1), Vectors: qdrant.NewVectors(1, 2)}, {Id: num(4), Vectors: qdrant.NewVectors(1, 2), Payload: fromJSON(s.T, `{"v":5}`)}},
	})
	s.wantPayload(name, num(1), `{"v":4}`)
	s.wantPayload(name, num(4), `{"v":5}`)
	s.upsertAs(&qdrant.UpsertPoints{
		CollectionName: name, UpdateMode: qdrant.UpdateMode_UpdateOnly.Enum(), UpdateFilter: f,
		Points: []*qdrant.PointStruct{
			{Id: num(1), Vectors: qdrant.NewVectors(1, 2), Payload: fromJSON(s.T, `{"v":6}`)},
			{Id: num(4), Vectors: qdrant.NewVectors(1, 2), Payload: fromJSON(s.T, `{"v":6}`)},
			{Id: num(5), Vectors: qdrant.NewVectors(1, 2), Payload: fromJSON(s.T, `{"v":6}`)},
		},
	})
	s.wantPayload(name, num(1), `{"v":6}`)
	s.wantPayload(name, num(4), `{"v":5}`)
	s.wantPayload(name, num(5), "")
}

// lower is the guard of a metadata write: the stored version is lower, or there is none.
func lower(version float64) *qdrant.Filter {
	return &qdrant.Filter{Should: []*qdrant.Condition{
		qdrant.NewRange("_mv", &qdrant.Range{Lt: &version}),
		qdrant.NewIsEmpty("_mv"),
	}}
}

func (s *suite) updateFilter() {
	name := s.plain(2, qdrant.Distance_Dot)
	put := func(version int, ids ...uint64) {
		s.Helper()
		req := &qdrant.UpsertPoints{CollectionName: name, UpdateFilter: lower(float64(version))}
		for _, id := range ids {
			req.Points = append(req.Points, &qdrant.PointStruct{Id: num(id), Vectors: qdrant.NewVectors(float32(version), 0), Payload: qdrant.NewValueMap(map[string]any{"_mv": version})})
		}
		s.upsertAs(req)
	}
	s.upsert(name, &qdrant.PointStruct{Id: num(9), Vectors: qdrant.NewVectors(0, 0)})
	put(5, 1, 9)
	s.wantPayload(name, num(1), `{"_mv":5}`)
	s.wantPayload(name, num(9), `{"_mv":5}`)
	put(4, 1, 2) // 2 does not exist: it is inserted regardless of the filter
	s.wantPayload(name, num(1), `{"_mv":5}`)
	s.wantPayload(name, num(2), `{"_mv":4}`)
	put(5, 1)
	put(7, 1, 2)
	s.wantPayload(name, num(1), `{"_mv":7}`)
	s.wantPayload(name, num(2), `{"_mv":7}`)
	if got := s.read(name, num(1))["1"].GetVectors().GetVector().GetDenseVector().GetData(); !near(got, 7, 0) {
		s.Errorf("vector after guarded rewrites: %v", got)
	}
}

func (s *suite) guardedPayload() {
	name := s.plain(2, qdrant.Distance_Dot)
	s.upsert(name,
		&qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectors(1, 1), Payload: fromJSON(s.T, `{"_mv":3,"m":{"a":1,"b":2}}`)},
		&qdrant.PointStruct{Id: num(2), Vectors: qdrant.NewVectors(1, 1), Payload: fromJSON(s.T, `{"_mv":9,"m":{"a":1}}`)},
		&qdrant.PointStruct{Id: num(3), Vectors: qdrant.NewVectors(1, 1), Payload: fromJSON(s.T, `{"m":{"a":1}}`)},
		&qdrant.PointStruct{Id: num(4), Vectors: qdrant.NewVectors(1, 1), Payload: fromJSON(s.T, `{"_mv":null}`)})
	set := func(version int) {
		s.Helper()
		guard := lower(float64(version))
		s.done(s.c.SetPayload(s.ctx, &qdrant.SetPayloadPoints{
			CollectionName: name, Wait: qdrant.PtrOf(true),
			Payload: qdrant.NewValueMap(map[string]any{"_mv": version, "m": map[string]any{"c": version}}),
			PointsSelector: qdrant.NewPointsSelectorFilter(&qdrant.Filter{
				Must: []*qdrant.Condition{qdrant.NewHasID(nums(1, 2, 3, 4, 5)...), qdrant.NewFilterAsCondition(guard)},
			}),
		}))
	}
	set(6)
	s.wantPayload(name, num(1), `{"_mv":6,"m":{"c":6}}`)
	s.wantPayload(name, num(2), `{"_mv":9,"m":{"a":1}}`)
	s.wantPayload(name, num(3), `{"_mv":6,"m":{"c":6}}`)
	s.wantPayload(name, num(4), `{"_mv":6,"m":{"c":6}}`)
	s.wantPayload(name, num(5), "")
	set(6)
	set(5)
	s.wantPayload(name, num(1), `{"_mv":6,"m":{"c":6}}`)
	set(10)
	s.wantPayload(name, num(2), `{"_mv":10,"m":{"c":10}}`)
}

func (s *suite) duplicates() {
	name := s.plain(2, qdrant.Distance_Dot)
	for _, mode := range []qdrant.UpdateMode{qdrant.UpdateMode_Upsert, qdrant.UpdateMode_InsertOnly} {
		id := num(uint64(mode) + 1)
		s.upsertAs(&qdrant.UpsertPoints{CollectionName: name, UpdateMode: mode.Enum(), Points: []*qdrant.PointStruct{
			{Id: id, Vectors: qdrant.NewVectors(1, 1), Payload: fromJSON(s.T, `{"v":1,"w":1}`)},
			{Id: id, Vectors: qdrant.NewVectors(2, 2), Payload: fromJSON(s.T, `{"v":2}`)},
		}})
		s.wantPayload(name, id, `{"v":2}`)
	}
	// One UUID in several spellings is one point.
	const u = "0189abcd-ef01-7234-8567-89abcdef0123"
	s.upsert(name, &qdrant.PointStruct{Id: qdrant.NewID(strings.ToUpper(u)), Vectors: qdrant.NewVectors(1, 1)})
	s.upsert(name, &qdrant.PointStruct{Id: qdrant.NewID(strings.ReplaceAll(u, "-", "")), Vectors: qdrant.NewVectors(1, 1), Payload: fromJSON(s.T, `{"v":3}`)})
	s.wantPayload(name, qdrant.NewID(u), `{"v":3}`)
	if n := s.count(name, nil); n != 3 {
		s.Errorf("%d points, want 3", n)
	}
}

func (s *suite) deletes() {
	name := s.plain(2, qdrant.Distance_Dot)
	var ps []*qdrant.PointStruct
	for i := range uint64(100) {
		ps = append(ps, &qdrant.PointStruct{Id: num(i), Vectors: qdrant.NewVectors(1, float32(i)), Payload: qdrant.NewValueMap(map[string]any{"i": i})})
	}
	s.upsert(name, ps...)
	del := func(sel *qdrant.PointsSelector) {
		s.Helper()
		s.done(s.c.Delete(s.ctx, &qdrant.DeletePoints{CollectionName: name, Wait: qdrant.PtrOf(true), Points: sel}))
	}
	del(qdrant.NewPointsSelector(num(5), num(6), num(6), num(1000)))
	if n := s.count(name, nil); n != 98 {
		s.Errorf("%d points, want 98", n)
	}
	if got := s.read(name, num(4), num(5), num(6), num(7)); len(got) != 2 {
		s.Errorf("read after delete: %v", got)
	}
	lt := 50.0
	del(qdrant.NewPointsSelectorFilter(&qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewRange("i", &qdrant.Range{Lt: &lt})}}))
	if n := s.count(name, nil); n != 50 {
		s.Errorf("%d points, want 50", n)
	}
	// A delete with a guard hits only what still matches.
	del(qdrant.NewPointsSelectorFilter(&qdrant.Filter{Must: []*qdrant.Condition{
		qdrant.NewHasID(nums(60, 61)...), qdrant.NewMatchInt("i", 60),
	}}))
	if got := s.read(name, num(60), num(61)); len(got) != 1 || got["61"] == nil {
		s.Errorf("after a guarded delete: %v", got)
	}
	hits, err := s.c.Query(s.ctx, &qdrant.QueryPoints{CollectionName: name, Query: qdrant.NewQuery(0, 1), Limit: qdrant.PtrOf(uint64(1000))})
	s.must(err)
	if len(hits) != 49 {
		s.Errorf("a query finds %d points, want 49", len(hits))
	}
	s.upsert(name, ps[5])
	s.wantPayload(name, num(5), `{"i":5}`)
	_, err = s.c.Delete(s.ctx, &qdrant.DeletePoints{CollectionName: name})
	s.wantCode(err, codes.InvalidArgument, "delete without a selector")
}

// sortedIDs makes n random UUIDs and their order.
func sortedIDs(r *rand.Rand, n int) []string {
	ids := make([]string, n)
	for i := range ids {
		var u uuid.UUID
		for j := range u {
			u[j] = byte(r.Uint32())
		}
		ids[i] = u.String()
	}
	slices.Sort(ids)
	return ids
}

func (s *suite) random() *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	s.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

func (s *suite) scrollOrder() {
	name := s.plain(2, qdrant.Distance_Dot)
	r := s.random()
	ids := sortedIDs(r, 500)
	// Bytes, not signed numbers: 80... and ff... come last.
	want := append([]string{"3", "18446744073709551615"}, ids...)
	var ps []*qdrant.PointStruct
	for _, i := range r.Perm(len(ids)) {
		ps = append(ps, &qdrant.PointStruct{Id: qdrant.NewID(ids[i]), Vectors: qdrant.NewVectors(1, 2), Payload: fromJSON(s.T, `{"a":1}`)})
	}
	ps = append(ps, &qdrant.PointStruct{Id: num(math.MaxUint64), Vectors: qdrant.NewVectors(1, 2)}, &qdrant.PointStruct{Id: num(3), Vectors: qdrant.NewVectors(1, 2)})
	s.upsert(name, ps...)

	for _, limit := range []uint32{1, 7, 100, 502, 1000} {
		var got []string
		var offset *qdrant.PointId
		pages := 0
		for {
			page, next, err := s.c.ScrollAndOffset(s.ctx, &qdrant.ScrollPoints{
				CollectionName: name, Limit: &limit, Offset: offset, WithPayload: qdrant.NewWithPayload(false),
			})
			s.must(err)
			for _, p := range page {
				got = append(got, idText(p.GetId()))
			}
			if pages++; pages > 600 {
				s.Fatal("the scroll does not end")
			}
			if next == nil {
				break
			}
			if len(page) != int(limit) {
				s.Errorf("a page of %d before the last, want %d", len(page), limit)
			}
			offset = next
		}
		if !slices.Equal(got, want) {
			s.Errorf("limit %d: %d ids in the wrong order or number, want %d", limit, len(got), len(want))
		}
		if last := (len(want) + int(limit) - 1) / int(limit); pages != last {
			s.Errorf("limit %d: %d pages, want %d", limit, pages, last)
		}
	}
	// A scroll starts at any id, present or not, itself included.
	for _, at := range []int{0, 1, 250, 499} {
		present := ids[at]
		u := uuid.MustParse(present)
		absent := u
		for i := 15; i >= 0; i-- {
			if absent[i]++; absent[i] != 0 {
				break
			}
		}
		for from, first := range map[string]int{present: at, absent.String(): at + 1} {
			if at+1 < len(ids) && absent.String() == ids[at+1] {
				continue
			}
			page, err := s.c.Scroll(s.ctx, &qdrant.ScrollPoints{CollectionName: name, Offset: qdrant.NewID(from), Limit: qdrant.PtrOf(uint32(3))})
			s.must(err)
			var got []string
			for _, p := range page {
				got = append(got, idText(p.GetId()))
			}
			if want := ids[min(first, len(ids)):min(first+3, len(ids))]; !slices.Equal(got, want) {
				s.Errorf("from %s: %v, want %v", from, got, want)
			}
		}
	}
	page, next, err := s.c.ScrollAndOffset(s.ctx, &qdrant.ScrollPoints{CollectionName: name})
	s.must(err)
	if len(page) != 10 || next == nil || page[9].GetPayload()["a"] == nil {
		s.Errorf("a scroll without a limit: %d points, next %v", len(page), next)
	}
}

func (s *suite) scrollFilter() {
	name := s.plain(2, qdrant.Distance_Dot)
	var ps []*qdrant.PointStruct
	for i := range uint64(300) {
		ps = append(ps, &qdrant.PointStruct{Id: num(i), Vectors: qdrant.NewVectors(1, 2), Payload: qdrant.NewValueMap(map[string]any{"odd": i%2 == 1})})
	}
	s.upsert(name, ps...)
	odd := &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewMatchBool("odd", true)}}
	page, next, err := s.c.ScrollAndOffset(s.ctx, &qdrant.ScrollPoints{CollectionName: name, Filter: odd, Limit: qdrant.PtrOf(uint32(100)), Offset: num(50)})
	s.must(err)
	if len(page) != 100 || page[0].GetId().GetNum() != 51 || next.GetNum() != 251 {
		s.Errorf("%d points from %v, next %v", len(page), page[0].GetId(), next)
	}
	byID := &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewHasID(nums(9, 2, 4, 5, 7, 999)...)}, MustNot: odd.GetMust()}
	page, next, err = s.c.ScrollAndOffset(s.ctx, &qdrant.ScrollPoints{CollectionName: name, Filter: byID, Limit: qdrant.PtrOf(uint32(2))})
	s.must(err)
	if len(page) != 2 || page[0].GetId().GetNum() != 2 || page[1].GetId().GetNum() != 4 || next != nil {
		s.Errorf("by id: %v, next %v", page, next)
	}
	if n := s.count(name, odd); n != 150 {
		s.Errorf("count %d, want 150", n)
	}
}

func (s *suite) payloadSelectors() {
	name := s.plain(2, qdrant.Distance_Dot)
	s.upsert(name, &qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectors(1, 2), Payload: fromJSON(s.T,
		`{"a":1,"b":{"c":2,"d":{"e":3},"f":[1,2]},"g":[{"h":1,"i":2},{"h":3}],"n":null,"t u":5}`)})
	for _, test := range []struct {
		sel  *qdrant.WithPayloadSelector
		want string
	}{
		{qdrant.NewWithPayload(true), `{"a":1,"b":{"c":2,"d":{"e":3},"f":[1,2]},"g":[{"h":1,"i":2},{"h":3}],"n":null,"t u":5}`},
		{qdrant.NewWithPayload(false), `{}`},
		{qdrant.NewWithPayloadInclude("a"), `{"a":1}`},
		{qdrant.NewWithPayloadInclude("a", "b.c", "n", "zz"), `{"a":1,"b":{"c":2},"n":null}`},
		{qdrant.NewWithPayloadInclude("b.d.e", `"t u"`), `{"b":{"d":{"e":3}},"t u":5}`},
		{qdrant.NewWithPayloadInclude("g[].h"), `{"g":[{"h":1},{"h":3}]}`},
		{qdrant.NewWithPayloadExclude("b", "g", "t u"), `{"a":1,"n":null}`},
		{qdrant.NewWithPayloadExclude("b.c", "g[].h", "n"), `{"a":1,"b":{"d":{"e":3},"f":[1,2]},"g":[{"i":2},{}],"t u":5}`},
	} {
		if ex := test.sel.GetExclude(); ex != nil {
			for i, f := range ex.Fields {
				if strings.Contains(f, " ") {
					ex.Fields[i] = `"` + f + `"`
				}
			}
		}
		page, err := s.c.Scroll(s.ctx, &qdrant.ScrollPoints{CollectionName: name, WithPayload: test.sel})
		s.must(err)
		if got := payloadText(s.T, page[0].GetPayload()); got != test.want {
			s.Errorf("%v: got %s, want %s", test.sel, got, test.want)
		}
	}
}

func (s *suite) get() {
	name := s.plain(2, qdrant.Distance_Dot)
	s.upsert(name, &qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectors(1, 2)}, &qdrant.PointStruct{Id: num(2), Vectors: qdrant.NewVectors(1, 2)})
	ps, err := s.c.Get(s.ctx, &qdrant.GetPoints{CollectionName: name, Ids: nums(2, 7, 1, 2)})
	s.must(err)
	if len(ps) != 2 || ps[0].GetId().GetNum() != 2 || ps[1].GetId().GetNum() != 1 {
		s.Errorf("got %v", ps)
	}
	ps, err = s.c.Get(s.ctx, &qdrant.GetPoints{CollectionName: name})
	s.must(err)
	if len(ps) != 0 {
		s.Errorf("got %v for no ids", ps)
	}
}

func (s *suite) bigPage() {
	name := s.plain(1024, qdrant.Distance_Dot)
	const n = 1500 // of 4 KiB: over grpc-go's default of 4 MiB in both directions
	v := make([]float32, 1024)
	req := &qdrant.UpsertPoints{CollectionName: name}
	for i := range uint64(n) {
		w := slices.Clone(v)
		w[0] = float32(i)
		req.Points = append(req.Points, &qdrant.PointStruct{Id: num(i), Vectors: qdrant.NewVectorsDense(w)})
	}
	s.upsertAs(req)
	page, next, err := s.c.ScrollAndOffset(s.ctx, &qdrant.ScrollPoints{CollectionName: name, Limit: qdrant.PtrOf(uint32(n)), WithVectors: qdrant.NewWithVectors(true)})
	s.must(err)
	if len(page) != n || next != nil {
		s.Fatalf("%d points, next %v", len(page), next)
	}
	for i, p := range page {
		if got := p.GetVectors().GetVector().GetDenseVector().GetData(); len(got) != 1024 || got[0] != float32(i) {
			s.Fatalf("vector %d is wrong", i)
		}
	}
}

func (s *suite) facet() {
	name := s.plain(2, qdrant.Distance_Dot)
	facet := func(key string, f *qdrant.Filter, limit uint64) string {
		s.Helper()
		req := &qdrant.FacetCounts{CollectionName: name, Key: key, Filter: f, Exact: qdrant.PtrOf(true)}
		if limit > 0 {
			req.Limit = &limit
		}
		hits, err := s.c.Facet(s.ctx, req)
		s.must(err)
		var out []string
		for _, h := range hits {
			if h.GetCount() == 0 {
				continue // a server may go on listing values that no point has any more
			}
			switch v := h.GetValue().GetVariant().(type) {
			case *qdrant.FacetValue_StringValue:
				out = append(out, fmt.Sprintf("%s=%d", v.StringValue, h.GetCount()))
			case *qdrant.FacetValue_IntegerValue:
				out = append(out, fmt.Sprintf("%d=%d", v.IntegerValue, h.GetCount()))
			case *qdrant.FacetValue_BoolValue:
				out = append(out, fmt.Sprintf("%v=%d", v.BoolValue, h.GetCount()))
			}
		}
		return strings.Join(out, " ")
	}
	_, err := s.c.Facet(s.ctx, &qdrant.FacetCounts{CollectionName: name, Key: "k", Exact: qdrant.PtrOf(true)})
	s.wantCode(err, codes.InvalidArgument, "facet without an index")
	s.index(name, "k", qdrant.FieldType_FieldTypeKeyword)
	s.index(name, "n", qdrant.FieldType_FieldTypeInteger)
	s.index(name, "b", qdrant.FieldType_FieldTypeBool)
	s.index(name, "f", qdrant.FieldType_FieldTypeFloat)
	if got := facet("n", nil, 0); got != "" {
		s.Errorf("facet of nothing: %s", got)
	}
	for i, text := range []string{
		`{"k":"x","n":1,"b":true,"f":1.5}`,
		`{"k":"y","n":1,"b":true}`,
		`{"k":["x","y","x"],"n":2,"b":false}`,
		`{"k":7,"n":"x"}`,
		`{"k":null,"n":[3,2]}`,
		`{"k":"z","n":1.5,"o":{"k":"x"}}`,
	} {
		s.upsert(name, &qdrant.PointStruct{Id: num(uint64(i)), Vectors: qdrant.NewVectors(1, 2), Payload: fromJSON(s.T, text)})
	}
	for _, test := range []struct {
		key   string
		f     *qdrant.Filter
		limit uint64
		want  string
	}{
		{"k", nil, 100, "x=2 y=2 z=1"},
		{"k", nil, 2, "x=2 y=2"},
		{"n", nil, 0, "1=2 2=2 3=1"},
		{"b", nil, 0, "true=2 false=1"},
		{"k", &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewMatchBool("b", true)}}, 0, "x=1 y=1"},
		{"k", &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewHasID(nums(2, 5)...)}}, 0, "x=1 y=1 z=1"},
		{"n", &qdrant.Filter{MustNot: []*qdrant.Condition{qdrant.NewMatch("k", "x")}}, 0, "1=1 2=1 3=1"},
	} {
		if got := facet(test.key, test.f, test.limit); got != test.want {
			s.Errorf("facet %s %v limit %d: got %q, want %q", test.key, test.f, test.limit, got, test.want)
		}
	}
	_, err = s.c.Facet(s.ctx, &qdrant.FacetCounts{CollectionName: name, Key: "f", Exact: qdrant.PtrOf(true)})
	s.wantCode(err, codes.InvalidArgument, "facet over floats")
	// Counts follow every kind of change.
	s.upsert(name, &qdrant.PointStruct{Id: num(0), Vectors: qdrant.NewVectors(1, 2), Payload: fromJSON(s.T, `{"k":"y"}`)})
	s.done(s.c.Delete(s.ctx, &qdrant.DeletePoints{CollectionName: name, Wait: qdrant.PtrOf(true), Points: qdrant.NewPointsSelector(num(5))}))
	s.done(s.c.SetPayload(s.ctx, &qdrant.SetPayloadPoints{CollectionName: name, Wait: qdrant.PtrOf(true), PointsSelector: qdrant.NewPointsSelector(num(1)), Payload: fromJSON(s.T, `{"k":"w"}`)}))
	if got := facet("k", nil, 0); got != "y=2 w=1 x=1" {
		s.Errorf("facet after changes: %q", got)
	}
	// The index of reconcile's quick check: more buckets than the default limit, all of them.
	buckets := s.plain(1, qdrant.Distance_Dot)
	s.index(buckets, "_bucket", qdrant.FieldType_FieldTypeInteger)
	var ps []*qdrant.PointStruct
	for i := range uint64(3000) {
		ps = append(ps, &qdrant.PointStruct{Id: num(i), Vectors: qdrant.NewVectors(1), Payload: qdrant.NewValueMap(map[string]any{"_bucket": i % 1000})})
	}
	s.upsert(buckets, ps...)
	hits, err := s.c.Facet(s.ctx, &qdrant.FacetCounts{CollectionName: buckets, Key: "_bucket", Exact: qdrant.PtrOf(true), Limit: qdrant.PtrOf(uint64(5000))})
	s.must(err)
	seen := map[int64]uint64{}
	for _, h := range hits {
		seen[h.GetValue().GetIntegerValue()] = h.GetCount()
	}
	if len(hits) != 1000 || len(seen) != 1000 || seen[0] != 3 || seen[999] != 3 {
		s.Errorf("%d buckets", len(hits))
	}
}

func (s *suite) payloadOperations() {
	name := s.plain(2, qdrant.Distance_Dot)
	reset := func() {
		s.Helper()
		s.upsert(name, &qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectors(1, 2), Payload: fromJSON(s.T, `{"a":1,"b":{"c":2,"d":[{"e":1},{"e":2}]}}`)})
	}
	one := qdrant.NewPointsSelector(num(1))
	set := func(text string, key *string) (*qdrant.UpdateResult, error) {
		return s.c.SetPayload(s.ctx, &qdrant.SetPayloadPoints{CollectionName: name, Wait: qdrant.PtrOf(true), Payload: fromJSON(s.T, text), PointsSelector: one, Key: key})
	}
	for _, test := range []struct {
		name string
		do   func() (*qdrant.UpdateResult, error)
		want string
	}{
		{"set merges at the top", func() (*qdrant.UpdateResult, error) { return set(`{"b":{"x":1},"z":0}`, nil) }, `{"a":1,"b":{"x":1},"z":0}`},
		{"set null removes", func() (*qdrant.UpdateResult, error) { return set(`{"a":null,"y":null}`, nil) }, `{"b":{"c":2,"d":[{"e":1},{"e":2}]}}`},
		{"set at a key", func() (*qdrant.UpdateResult, error) { return set(`{"c":3,"x":4}`, qdrant.PtrOf("b")) }, `{"a":1,"b":{"c":3,"d":[{"e":1},{"e":2}],"x":4}}`},
		{"set at a new key", func() (*qdrant.UpdateResult, error) { return set(`{"x":4}`, qdrant.PtrOf("n.o")) }, `{"a":1,"b":{"c":2,"d":[{"e":1},{"e":2}]},"n":{"o":{"x":4}}}`},
		{"set at a list item", func() (*qdrant.UpdateResult, error) { return set(`{"x":4}`, qdrant.PtrOf("b.d[1]")) }, `{"a":1,"b":{"c":2,"d":[{"e":1},{"e":2,"x":4}]}}`},
		{"set at every item", func() (*qdrant.UpdateResult, error) { return set(`{"x":4}`, qdrant.PtrOf("b.d[]")) }, `{"a":1,"b":{"c":2,"d":[{"e":1,"x":4},{"e":2,"x":4}]}}`},
		{"set over a number", func() (*qdrant.UpdateResult, error) { return set(`{"x":4}`, qdrant.PtrOf("a")) }, `{"a":{"x":4},"b":{"c":2,"d":[{"e":1},{"e":2}]}}`},
		{"overwrite", func() (*qdrant.UpdateResult, error) {
			return s.c.OverwritePayload(s.ctx, &qdrant.SetPayloadPoints{CollectionName: name, Wait: qdrant.PtrOf(true), Payload: fromJSON(s.T, `{"q":[1]}`), PointsSelector: one})
		}, `{"q":[1]}`},
		{"delete keys", func() (*qdrant.UpdateResult, error) {
			return s.c.DeletePayload(s.ctx, &qdrant.DeletePayloadPoints{CollectionName: name, Wait: qdrant.PtrOf(true), Keys: []string{"a", "b.c", "b.d[].e", "nope"}, PointsSelector: one})
		}, `{"b":{"d":[{},{}]}}`},
		{"clear", func() (*qdrant.UpdateResult, error) {
			return s.c.ClearPayload(s.ctx, &qdrant.ClearPayloadPoints{CollectionName: name, Wait: qdrant.PtrOf(true), Points: one})
		}, `{}`},
		{"overwrite by filter", func() (*qdrant.UpdateResult, error) {
			return s.c.OverwritePayload(s.ctx, &qdrant.SetPayloadPoints{
				CollectionName: name, Wait: qdrant.PtrOf(true), Payload: fromJSON(s.T, `{"r":1}`),
				PointsSelector: qdrant.NewPointsSelectorFilter(&qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewMatchInt("a", 1)}}),
			})
		}, `{"r":1}`},
		{"a filter that matches nothing", func() (*qdrant.UpdateResult, error) {
			return s.c.ClearPayload(s.ctx, &qdrant.ClearPayloadPoints{
				CollectionName: name, Wait: qdrant.PtrOf(true),
				Points: qdrant.NewPointsSelectorFilter(&qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewMatchInt("a", 2)}}),
			})
		}, `{"a":1,"b":{"c":2,"d":[{"e":1},{"e":2}]}}`},
	} {
		reset()
		r, err := test.do()
		if err != nil || r.GetStatus() != qdrant.UpdateStatus_Completed {
			s.Errorf("%s: %v, %v", test.name, r, err)
			continue
		}
		if got := s.payload(name, num(1)); got != test.want {
			s.Errorf("%s: got %s, want %s", test.name, got, test.want)
		}
	}
	if got := s.read(name, num(1))["1"].GetVectors().GetVector().GetDenseVector().GetData(); !near(got, 1, 2) {
		s.Errorf("payload operations changed the vector to %v", got)
	}
	_, err := s.c.SetPayload(s.ctx, &qdrant.SetPayloadPoints{CollectionName: name, Wait: qdrant.PtrOf(true), Payload: fromJSON(s.T, `{"a":1}`), PointsSelector: qdrant.NewPointsSelector(num(77))})
	s.wantCode(err, codes.NotFound, "payload of a point that does not exist")
	_, err = set(`{"a":1}`, qdrant.PtrOf("a["))
	s.wantCode(err, codes.InvalidArgument, "a bad path")
}

func (s *suite) vectorOperations() {
	name := s.hybrid()
	s.upsert(name, &qdrant.PointStruct{Id: num(1), Payload: fromJSON(s.T, `{"a":1}`), Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{"dense": qdrant.NewVector(1, 2, 3, 4)})})
	s.done(s.c.UpdateVectors(s.ctx, &qdrant.UpdatePointVectors{CollectionName: name, Wait: qdrant.PtrOf(true), Points: []*qdrant.PointVectors{{
		Id: num(1), Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{"sparse": qdrant.NewVectorSparse([]uint32{3}, []float32{2})}),
	}}}))
	vs := s.read(name, num(1))["1"].GetVectors().GetVectors().GetVectors()
	if len(vs) != 2 || vs["sparse"].GetSparseVector().GetValues()[0] != 2 {
		s.Errorf("after an update: %v", vs)
	}
	has := &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewHasVector("dense")}}
	if s.count(name, has) != 1 {
		s.Error("has_vector does not see the vector")
	}
	s.done(s.c.DeleteVectors(s.ctx, &qdrant.DeletePointVectors{CollectionName: name, Wait: qdrant.PtrOf(true), PointsSelector: qdrant.NewPointsSelector(num(1)), Vectors: &qdrant.VectorsSelector{Names: []string{"dense"}}}))
	vs = s.read(name, num(1))["1"].GetVectors().GetVectors().GetVectors()
	if len(vs) != 1 || vs["sparse"] == nil || s.count(name, has) != 0 {
		s.Errorf("after a delete: %v", vs)
	}
	s.wantPayload(name, num(1), `{"a":1}`)
}

func (s *suite) updateBatch() {
	name := s.plain(2, qdrant.Distance_Dot)
	put := func(id uint64, text string) *qdrant.PointStruct {
		return &qdrant.PointStruct{Id: num(id), Vectors: qdrant.NewVectors(1, 2), Payload: fromJSON(s.T, text)}
	}
	s.upsert(name, put(1, `{"_mv":5}`), put(2, `{"_mv":5}`))
	rs, err := s.c.UpdateBatch(s.ctx, &qdrant.UpdateBatchPoints{
		CollectionName: name, Wait: qdrant.PtrOf(true),
		Operations: []*qdrant.PointsUpdateOperation{
			qdrant.NewPointsUpdateUpsert(&qdrant.PointsUpdateOperation_PointStructList{Points: []*qdrant.PointStruct{put(1, `{"_mv":4}`)}, UpdateFilter: lower(4)}),
			qdrant.NewPointsUpdateUpsert(&qdrant.PointsUpdateOperation_PointStructList{Points: []*qdrant.PointStruct{put(2, `{"_mv":6}`)}, UpdateFilter: lower(6)}),
			qdrant.NewPointsUpdateUpsert(&qdrant.PointsUpdateOperation_PointStructList{Points: []*qdrant.PointStruct{put(3, `{"_mv":1}`), put(2, `{"x":1}`)}, UpdateMode: qdrant.UpdateMode_InsertOnly.Enum()}),
			qdrant.NewPointsUpdateSetPayload(&qdrant.PointsUpdateOperation_SetPayload{Payload: fromJSON(s.T, `{"s":1}`), PointsSelector: qdrant.NewPointsSelector(num(3))}),
			qdrant.NewPointsUpdateDeletePoints(&qdrant.PointsUpdateOperation_DeletePoints{Points: qdrant.NewPointsSelector(num(1))}),
		},
	})
	s.must(err)
	if len(rs) != 5 {
		s.Errorf("%d results, want 5", len(rs))
	}
	for _, r := range rs {
		s.completed(r)
	}
	s.wantPayload(name, num(1), "")
	s.wantPayload(name, num(2), `{"_mv":6}`)
	s.wantPayload(name, num(3), `{"_mv":1,"s":1}`)
}

func ts(text string) *timestamppb.Timestamp {
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		panic(err)
	}
	return timestamppb.New(t)
}

// filters checks what each condition holds for, over payloads chosen to be awkward.
func (s *suite) filters() {
	docs := []string{
		0:  `{}`,
		1:  `{"k":"red","n":10,"f":2.5,"b":true,"t":"the quick brown fox","d":"2024-05-01T12:00:00Z"}`,
		2:  `{"k":"blue","n":-3,"f":2,"b":false,"t":"quick","d":"2024-05-01T14:00:00+02:00"}`,
		3:  `{"k":["red","green"],"n":[1,10],"d":"2024-05-02"}`,
		4:  `{"k":null,"n":null}`,
		5:  `{"k":[],"n":[]}`,
		6:  `{"k":[null],"n":[null,10]}`,
		7:  `{"k":10,"n":"red"}`,
		8:  `{"k":{"x":1},"o":{"p":{"q":"deep"},"l":[{"r":1,"s":2},{"r":3,"s":4}]}}`,
		9:  `{"o":{"l":[{"r":1,"s":4},{"r":3,"s":2}]}}`,
		10: `{"n":9007199254740993,"k":"","d":"2024-05-01T12:00:00.5Z"}`,
		11: `{"k":[["red"]],"n":10.5}`,
		12: `{"b":[true,false],"k":"reddish","d":"not a date"}`,
	}
	match := func(cs ...*qdrant.Condition) *qdrant.Filter { return &qdrant.Filter{Must: cs} }
	num64 := func(f float64) *float64 { return &f }
	field := func(fc *qdrant.FieldCondition) *qdrant.Condition {
		return &qdrant.Condition{ConditionOneOf: &qdrant.Condition_Field{Field: fc}}
	}
	tests := []struct {
		name string
		f    *qdrant.Filter
		want []uint64
	}{
		{"none", nil, []uint64{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}},
		{"empty", &qdrant.Filter{}, []uint64{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}},
		{"keyword", match(qdrant.NewMatch("k", "red")), []uint64{1, 3}},
		{"empty keyword", match(qdrant.NewMatch("k", "")), []uint64{10}},
		{"integer", match(qdrant.NewMatchInt("n", 10)), []uint64{1, 3, 6}},
		{"large integer", match(qdrant.NewMatchInt("n", 9007199254740993)), []uint64{10}},
		{"integer of a keyword", match(qdrant.NewMatchInt("k", 10)), []uint64{7}},
		{"bool", match(qdrant.NewMatchBool("b", true)), []uint64{1, 12}},
		{"any keyword", match(qdrant.NewMatchKeywords("k", "blue", "green", "nope")), []uint64{2, 3}},
		{"any of none", match(qdrant.NewMatchKeywords("k")), nil},
		{"any integer", match(qdrant.NewMatchInts("n", -3, 1)), []uint64{2, 3}},
		{"except keyword", match(qdrant.NewMatchExcept("k", "red", "blue")), []uint64{3, 7, 8, 10, 11, 12}},
		{"except integer", match(qdrant.NewMatchExceptInts("n", 10)), []uint64{2, 3, 7, 10, 11}},
		{"text", match(qdrant.NewMatchText("t", "quick")), []uint64{1, 2}},
		{"range", match(qdrant.NewRange("n", &qdrant.Range{Gte: num64(10)})), []uint64{1, 3, 6, 10, 11}},
		{"open range", match(qdrant.NewRange("n", &qdrant.Range{Gt: num64(-3), Lt: num64(10)})), []uint64{3}},
		{"float range", match(qdrant.NewRange("f", &qdrant.Range{Gt: num64(2), Lte: num64(2.5)})), []uint64{1}},
		{"range of both ends", match(qdrant.NewRange("n", &qdrant.Range{Gt: num64(1), Lt: num64(10)})), nil},
		{"datetime", match(qdrant.NewDatetimeRange("d", &qdrant.DatetimeRange{Gte: ts("2024-05-01T12:00:00Z"), Lt: ts("2024-05-01T12:00:00.5Z")})), []uint64{1, 2}},
		{"datetime of a day", match(qdrant.NewDatetimeRange("d", &qdrant.DatetimeRange{Gte: ts("2024-05-02T00:00:00Z")})), []uint64{3}},
		{"id", match(qdrant.NewHasID(nums(2, 5, 99)...)), []uint64{2, 5}},
		{"no id", match(qdrant.NewHasID()), nil},
		{"not id", &qdrant.Filter{MustNot: []*qdrant.Condition{qdrant.NewHasID(nums(0, 1, 2, 3, 4, 5, 6, 7)...)}}, []uint64{8, 9, 10, 11, 12}},
		{"empty field", match(qdrant.NewIsEmpty("k")), []uint64{0, 4, 5, 9}},
		// Versions differ about a list with a null in it, which is point 6.
		{"null field", &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewIsNull("k")}, MustNot: []*qdrant.Condition{qdrant.NewHasID(num(6))}}, []uint64{4}},
		{"not empty", &qdrant.Filter{MustNot: []*qdrant.Condition{qdrant.NewIsEmpty("n")}}, []uint64{1, 2, 3, 6, 7, 10, 11}},
		{"field condition is_empty", match(field(&qdrant.FieldCondition{Key: "k", IsEmpty: qdrant.PtrOf(true)})), []uint64{0, 4, 5, 9}},
		{"values count", match(qdrant.NewValuesCount("k", &qdrant.ValuesCount{Gte: qdrant.PtrOf(uint64(2))})), []uint64{3}},
		{"values count of one", match(qdrant.NewValuesCount("n", &qdrant.ValuesCount{Gte: qdrant.PtrOf(uint64(1)), Lt: qdrant.PtrOf(uint64(2))})), []uint64{1, 2, 7, 10, 11}},
		{"nested key", match(qdrant.NewMatch("o.p.q", "deep")), []uint64{8}},
		{"key through a list", match(qdrant.NewMatchInt("o.l[].r", 3)), []uint64{8, 9}},
		{"key of a list item", match(qdrant.NewMatchInt("o.l[1].s", 4)), []uint64{8}},
		{"list without brackets", match(qdrant.NewMatchInt("o.l.r", 3)), nil},
		{"two of any items", match(qdrant.NewMatchInt("o.l[].r", 1), qdrant.NewMatchInt("o.l[].s", 4)), []uint64{8, 9}},
		{"two of one item", match(qdrant.NewNestedFilter("o.l", match(qdrant.NewMatchInt("r", 1), qdrant.NewMatchInt("s", 4)))), []uint64{9}},
		{"nested not", match(qdrant.NewNestedFilter("o.l[]", &qdrant.Filter{
			Must: []*qdrant.Condition{qdrant.NewMatchInt("r", 1)}, MustNot: []*qdrant.Condition{qdrant.NewMatchInt("s", 4)},
		})), []uint64{8}},
		{"should", &qdrant.Filter{Should: []*qdrant.Condition{qdrant.NewMatch("k", "blue"), qdrant.NewMatchBool("b", true)}}, []uint64{1, 2, 12}},
		{"must and should", &qdrant.Filter{
			Must:   []*qdrant.Condition{qdrant.NewMatchInt("n", 10)},
			Should: []*qdrant.Condition{qdrant.NewMatch("k", "green"), qdrant.NewMatchBool("b", true)},
		}, []uint64{1, 3}},
		{"min should", &qdrant.Filter{MinShould: &qdrant.MinShould{MinCount: 2, Conditions: []*qdrant.Condition{
			qdrant.NewMatch("k", "red"), qdrant.NewMatchInt("n", 10), qdrant.NewMatchBool("b", true),
		}}}, []uint64{1, 3}},
		{"nested filters", match(qdrant.NewFilterAsCondition(&qdrant.Filter{
			Should:  []*qdrant.Condition{qdrant.NewMatch("k", "red"), qdrant.NewMatch("k", "blue")},
			MustNot: []*qdrant.Condition{qdrant.NewMatchBool("b", false)},
		})), []uint64{1, 3}},
		{"vector", match(qdrant.NewHasVector("")), []uint64{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}},
	}
	for _, indexed := range []bool{false, true} {
		name := s.plain(2, qdrant.Distance_Dot)
		var ps []*qdrant.PointStruct
		for i, d := range docs {
			ps = append(ps, &qdrant.PointStruct{Id: num(uint64(i)), Vectors: qdrant.NewVectors(1, 2), Payload: fromJSON(s.T, d)})
		}
		s.upsert(name, ps...)
		if indexed {
			s.index(name, "k", qdrant.FieldType_FieldTypeKeyword)
			s.index(name, "n", qdrant.FieldType_FieldTypeInteger)
			s.index(name, "f", qdrant.FieldType_FieldTypeFloat)
			s.index(name, "b", qdrant.FieldType_FieldTypeBool)
			s.index(name, "d", qdrant.FieldType_FieldTypeDatetime)
			s.index(name, "o.p.q", qdrant.FieldType_FieldTypeKeyword)
			s.index(name, "o.l[].r", qdrant.FieldType_FieldTypeInteger)
		}
		for _, test := range tests {
			if indexed && typed[test.name] {
				continue
			}
			got := s.matching(name, test.f)
			if !slices.Equal(got, test.want) {
				s.Errorf("%s (indexed %v): got %v, want %v", test.name, indexed, got, test.want)
			}
			if n := s.count(name, test.f); n != uint64(len(test.want)) {
				s.Errorf("%s (indexed %v): count %d, want %d", test.name, indexed, n, len(test.want))
			}
		}
	}
}

// typed names the cases that a real server answers from an index of the field's type, which
// holds only values of that type; without the index it reads the payload, and answers
// otherwise. Lockstep's fields have one type, so it never depends on which.
var typed = map[string]bool{
	"except keyword": true, "except integer": true, "range": true,
}

// matching scrolls the numbers of the points that match.
func (s *suite) matching(name string, f *qdrant.Filter) []uint64 {
	s.Helper()
	page, err := s.c.Scroll(s.ctx, &qdrant.ScrollPoints{CollectionName: name, Filter: f, Limit: qdrant.PtrOf(uint32(10000)), WithPayload: qdrant.NewWithPayload(false)})
	if err != nil {
		s.Errorf("%v: %v", f, err)
		return nil
	}
	var out []uint64
	for _, p := range page {
		out = append(out, p.GetId().GetNum())
	}
	return out
}

func (s *suite) textIndex() {
	name := s.plain(1, qdrant.Distance_Dot)
	s.done(s.c.CreateFieldIndex(s.ctx, &qdrant.CreateFieldIndexCollection{
		CollectionName: name, Wait: qdrant.PtrOf(true), FieldName: "t", FieldType: qdrant.FieldType_FieldTypeText.Enum(),
		FieldIndexParams: qdrant.NewPayloadIndexParamsText(&qdrant.TextIndexParams{Tokenizer: qdrant.TokenizerType_Word, Lowercase: qdrant.PtrOf(true), PhraseMatching: qdrant.PtrOf(true)}),
	}))
	for i, text := range []string{`{"t":"The quick, brown fox"}`, `{"t":"a quicker fox"}`, `{"t":["brown","QUICK"]}`, `{"t":7}`, `{"t":["the quick","brown fox"]}`} {
		s.upsert(name, &qdrant.PointStruct{Id: num(uint64(i)), Vectors: qdrant.NewVectors(1), Payload: fromJSON(s.T, text)})
	}
	for _, test := range []struct {
		c    *qdrant.Condition
		want []uint64
	}{
		{qdrant.NewMatchText("t", "QUICK"), []uint64{0, 2, 4}},
		{qdrant.NewMatchText("t", "fox quick"), []uint64{0, 4}},
		{qdrant.NewMatchText("t", "qui"), nil},
		{qdrant.NewMatchText("t", ""), nil},
		{qdrant.NewMatchTextAny("t", "quicker brown"), []uint64{0, 1, 2, 4}},
		{qdrant.NewMatchPhrase("t", "quick brown"), []uint64{0}},
		{qdrant.NewMatchPhrase("t", "brown quick"), nil},
	} {
		if got := s.matching(name, &qdrant.Filter{Must: []*qdrant.Condition{test.c}}); !slices.Equal(got, test.want) {
			s.Errorf("%v: got %v, want %v", test.c, got, test.want)
		}
	}
}

func (s *suite) validation() {
	name := s.hybrid()
	point := func(vs map[string]*qdrant.Vector) *qdrant.PointStruct {
		return &qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectorsMap(vs)}
	}
	rows := make([][]float32, 1<<19)
	for i := range rows {
		rows[i] = []float32{1, 2}
	}
	for what, p := range map[string]*qdrant.PointStruct{
		"wrong dimension":              point(map[string]*qdrant.Vector{"dense": qdrant.NewVector(1, 2, 3)}),
		"unknown vector":               point(map[string]*qdrant.Vector{"nope": qdrant.NewVector(1, 2, 3, 4)}),
		"unnamed vector":               {Id: num(1), Vectors: qdrant.NewVectors(1, 2, 3, 4)},
		"sparse in place of dense":     point(map[string]*qdrant.Vector{"dense": qdrant.NewVectorSparse([]uint32{1}, []float32{1})}),
		"dense in place of sparse":     point(map[string]*qdrant.Vector{"sparse": qdrant.NewVector(1, 2, 3, 4)}),
		"multi in place of dense":      point(map[string]*qdrant.Vector{"dense": qdrant.NewVectorMulti([][]float32{{1, 2, 3, 4}, {1, 2, 3, 4}})}),
		"duplicate sparse terms":       point(map[string]*qdrant.Vector{"sparse": qdrant.NewVectorSparse([]uint32{1, 1}, []float32{1, 2})}),
		"sparse lengths differ":        point(map[string]*qdrant.Vector{"sparse": qdrant.NewVectorSparse([]uint32{1, 2}, []float32{1})}),
		"empty multivector":            point(map[string]*qdrant.Vector{"colbert": qdrant.NewVectorMulti(nil)}),
		"uneven multivector":           point(map[string]*qdrant.Vector{"colbert": qdrant.NewVectorMulti([][]float32{{1, 2}, {1}})}),
		"multivector of wrong size":    point(map[string]*qdrant.Vector{"colbert": qdrant.NewVectorMulti([][]float32{{1, 2, 3}})}),
		"multivector of 2^20 floats":   point(map[string]*qdrant.Vector{"colbert": qdrant.NewVectorMulti(rows)}),
		"id that is no UUID":           {Id: qdrant.NewID("not-a-uuid"), Vectors: qdrant.NewVectorsMap(nil)},
		"no id":                        {Vectors: qdrant.NewVectorsMap(nil)},
		"number that JSON cannot hold": {Id: num(1), Vectors: qdrant.NewVectorsMap(nil), Payload: map[string]*qdrant.Value{"x": qdrant.NewValueDouble(math.NaN())}},
	} {
		_, err := s.c.Upsert(s.ctx, &qdrant.UpsertPoints{CollectionName: name, Wait: qdrant.PtrOf(true), Points: []*qdrant.PointStruct{
			{Id: num(2), Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{"dense": qdrant.NewVector(1, 2, 3, 4)})}, p,
		}})
		s.wantCode(err, codes.InvalidArgument, what)
	}
	if s.read(name, num(1))["1"] != nil {
		s.Error("a refused point is there")
	}
	bad := func(what string, q *qdrant.QueryPoints) {
		s.Helper()
		q.CollectionName = name
		_, err := s.c.Query(s.ctx, q)
		s.wantCode(err, codes.InvalidArgument, what)
	}
	dense := qdrant.PtrOf("dense")
	bad("query of wrong dimension", &qdrant.QueryPoints{Query: qdrant.NewQuery(1, 2, 3), Using: dense})
	bad("query of an unknown vector", &qdrant.QueryPoints{Query: qdrant.NewQuery(1, 2, 3, 4), Using: qdrant.PtrOf("nope")})
	bad("query of the unnamed vector", &qdrant.QueryPoints{Query: qdrant.NewQuery(1, 2, 3, 4)})
	bad("query with duplicate terms", &qdrant.QueryPoints{Query: qdrant.NewQuerySparse([]uint32{2, 2}, []float32{1, 1}), Using: qdrant.PtrOf("sparse")})
	bad("limit 0", &qdrant.QueryPoints{Query: qdrant.NewQuery(1, 2, 3, 4), Using: dense, Limit: qdrant.PtrOf(uint64(0))})
	bad("fusion of nothing", &qdrant.QueryPoints{Query: qdrant.NewQueryFusion(qdrant.Fusion_RRF)})
	bad("prefetch without a query", &qdrant.QueryPoints{Prefetch: []*qdrant.PrefetchQuery{{Query: qdrant.NewQuery(1, 2, 3, 4), Using: dense}}})
	bad("weights and prefetches differ", &qdrant.QueryPoints{
		Prefetch: []*qdrant.PrefetchQuery{{Query: qdrant.NewQuery(1, 2, 3, 4), Using: dense}},
		Query:    qdrant.NewQueryRRF(&qdrant.Rrf{Weights: []float32{1, 2}}),
	})
	bad("k of 0", &qdrant.QueryPoints{
		Prefetch: []*qdrant.PrefetchQuery{{Query: qdrant.NewQuery(1, 2, 3, 4), Using: dense}},
		Query:    qdrant.NewQueryRRF(&qdrant.Rrf{K: qdrant.PtrOf(uint32(0))}),
	})
	bad("filter with a bad path", &qdrant.QueryPoints{Query: qdrant.NewQuery(1, 2, 3, 4), Using: dense, Filter: &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewMatch("a..b", "x")}}})
	bad("condition without a test", &qdrant.QueryPoints{Query: qdrant.NewQuery(1, 2, 3, 4), Using: dense, Filter: &qdrant.Filter{Must: []*qdrant.Condition{
		{ConditionOneOf: &qdrant.Condition_Field{Field: &qdrant.FieldCondition{Key: "a"}}},
	}}})
	_, err := s.c.Scroll(s.ctx, &qdrant.ScrollPoints{CollectionName: name, Limit: qdrant.PtrOf(uint32(0))})
	s.wantCode(err, codes.InvalidArgument, "scroll limit 0")
	_, err = s.c.Scroll(s.ctx, &qdrant.ScrollPoints{CollectionName: name, Offset: qdrant.NewID("xyz")})
	s.wantCode(err, codes.InvalidArgument, "scroll offset that is no id")
	_, err = s.c.Upsert(s.ctx, &qdrant.UpsertPoints{CollectionName: name, Wait: qdrant.PtrOf(true)})
	s.wantCode(err, codes.InvalidArgument, "upsert of nothing")
	for what, p := range map[string]*qdrant.VectorParams{
		"size 0":      {Distance: qdrant.Distance_Dot},
		"size 65537":  {Size: 65537, Distance: qdrant.Distance_Dot},
		"no distance": {Size: 4},
	} {
		s.wantCode(s.c.CreateCollection(s.ctx, &qdrant.CreateCollection{CollectionName: "test_" + uuid.NewString(), VectorsConfig: qdrant.NewVectorsConfig(p)}), codes.InvalidArgument, what)
	}
	for _, n := range []string{"", "a/b", strings.Repeat("x", 256)} {
		s.wantCode(s.createNamed(n), codes.InvalidArgument, fmt.Sprintf("name %.10q", n))
	}
}

func (s *suite) strictMode() {
	name := s.create(&qdrant.CreateCollection{
		VectorsConfig: qdrant.NewVectorsConfig(&qdrant.VectorParams{Size: 2, Distance: qdrant.Distance_Dot}),
		StrictModeConfig: &qdrant.StrictModeConfig{
			Enabled: qdrant.PtrOf(true), MaxQueryLimit: qdrant.PtrOf(uint32(20)), UpsertMaxBatchsize: qdrant.PtrOf(uint64(3)),
			UnindexedFilteringRetrieve: qdrant.PtrOf(false), SearchAllowExact: qdrant.PtrOf(false),
		},
	})
	info, err := s.c.GetCollectionInfo(s.ctx, name)
	s.must(err)
	if sm := info.GetConfig().GetStrictModeConfig(); !sm.GetEnabled() || sm.GetMaxQueryLimit() != 20 || sm.GetUpsertMaxBatchsize() != 3 {
		s.Errorf("strict mode in the info: %v", sm)
	}
	ps := func(n uint64) []*qdrant.PointStruct {
		var out []*qdrant.PointStruct
		for i := range n {
			out = append(out, &qdrant.PointStruct{Id: num(i), Vectors: qdrant.NewVectors(1, 2)})
		}
		return out
	}
	s.upsert(name, ps(3)...)
	_, err = s.c.Upsert(s.ctx, &qdrant.UpsertPoints{CollectionName: name, Wait: qdrant.PtrOf(true), Points: ps(4)})
	s.wantCode(err, codes.InvalidArgument, "a batch over the limit")
	_, err = s.c.Scroll(s.ctx, &qdrant.ScrollPoints{CollectionName: name, Limit: qdrant.PtrOf(uint32(20))})
	s.must(err)
	_, err = s.c.Scroll(s.ctx, &qdrant.ScrollPoints{CollectionName: name, Limit: qdrant.PtrOf(uint32(21))})
	s.wantCode(err, codes.InvalidArgument, "a page over the limit")
	_, err = s.c.Query(s.ctx, &qdrant.QueryPoints{CollectionName: name, Query: qdrant.NewQuery(1, 2), Limit: qdrant.PtrOf(uint64(21))})
	s.wantCode(err, codes.InvalidArgument, "a query over the limit")
	_, err = s.c.Scroll(s.ctx, &qdrant.ScrollPoints{CollectionName: name, Filter: &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewMatch("k", "x")}}})
	s.wantCode(err, codes.InvalidArgument, "a filter without an index")
	_, err = s.c.Count(s.ctx, &qdrant.CountPoints{CollectionName: name, Exact: qdrant.PtrOf(true)})
	s.wantCode(err, codes.InvalidArgument, "an exact count")
	s.index(name, "k", qdrant.FieldType_FieldTypeKeyword)
	_, err = s.c.Scroll(s.ctx, &qdrant.ScrollPoints{CollectionName: name, Filter: &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewMatch("k", "x")}}})
	s.must(err)
	// Qdrant 1.19 lets an exact facet pass over gRPC, and refuses it over REST: nothing may rely on either.
}

func (s *suite) payloadIndex() {
	name := s.plain(1, qdrant.Distance_Dot)
	s.upsert(name, &qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectors(1), Payload: fromJSON(s.T, `{"k":"x"}`)})
	s.index(name, "k", qdrant.FieldType_FieldTypeKeyword)
	s.index(name, "k", qdrant.FieldType_FieldTypeKeyword)
	types := map[string]qdrant.FieldType{
		"i": qdrant.FieldType_FieldTypeInteger, "f": qdrant.FieldType_FieldTypeFloat, "b": qdrant.FieldType_FieldTypeBool,
		"d": qdrant.FieldType_FieldTypeDatetime, "u": qdrant.FieldType_FieldTypeUuid, "t": qdrant.FieldType_FieldTypeText,
		"m.x": qdrant.FieldType_FieldTypeKeyword,
	}
	for f, t := range types {
		s.index(name, f, t)
	}
	info, err := s.c.GetCollectionInfo(s.ctx, name)
	s.must(err)
	if len(info.GetPayloadSchema()) != 8 || info.GetPayloadSchema()["k"].GetPoints() != 1 || info.GetPayloadSchema()["m.x"].GetDataType() != qdrant.PayloadSchemaType_Keyword {
		s.Errorf("payload schema: %v", info.GetPayloadSchema())
	}
	s.done(s.c.DeleteFieldIndex(s.ctx, &qdrant.DeleteFieldIndexCollection{CollectionName: name, Wait: qdrant.PtrOf(true), FieldName: "k"}))
	info, err = s.c.GetCollectionInfo(s.ctx, name)
	s.must(err)
	if _, ok := info.GetPayloadSchema()["k"]; ok {
		s.Error("a dropped index is still there")
	}
	if got := s.matching(name, &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewMatch("k", "x")}}); len(got) != 1 {
		s.Error("a filter finds nothing after its index was dropped")
	}
}

// createNamed tries a name as it is, past the client's own checks.
func (s *suite) createNamed(name string) error {
	_, err := s.c.GetCollectionsClient().Create(s.ctx, &qdrant.CreateCollection{
		CollectionName: name,
		VectorsConfig:  qdrant.NewVectorsConfig(&qdrant.VectorParams{Size: 4, Distance: qdrant.Distance_Dot}),
	})
	return err
}
