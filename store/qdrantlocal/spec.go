package qdrantlocal

import (
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/protobuf/proto"
)

const (
	// maxDimension is the real server's bound on a vector's size.
	maxDimension = 65536
	maxName      = 255
)

// collectionSpec is what a collection was created with, and its payload indexes.
type collectionSpec struct {
	create  *qdrant.CreateCollection
	vectors []vectorSpec
	strict  strictMode
	indexes map[string]*qdrant.CreateFieldIndexCollection
}

// strictMode holds the limits of a collection's strict mode; zero means none.
type strictMode struct {
	maxQueryLimit    uint64
	upsertMaxBatch   uint64
	searchMaxHnswEf  uint64
	maxConditions    uint64
	maxConditionSize uint64
	refuseExact      bool
	refuseUnindexed  bool
	refuseUnindexedW bool
}

// newSpec validates a request to create a collection.
func newSpec(req *qdrant.CreateCollection) (*collectionSpec, error) {
	if req.GetShardingMethod() == qdrant.ShardingMethod_Custom {
		return nil, unimplemented("custom sharding")
	}
	if req.ShardNumber != nil && *req.ShardNumber < 1 ||
		req.ReplicationFactor != nil && *req.ReplicationFactor < 1 ||
		req.WriteConsistencyFactor != nil && *req.WriteConsistencyFactor < 1 {
		return nil, invalid("Validation error in body: [shard_number, replication_factor and write_consistency_factor must be at least 1]")
	}
	spec := &collectionSpec{create: proto.CloneOf(req), indexes: map[string]*qdrant.CreateFieldIndexCollection{}}
	dense := map[string]*qdrant.VectorParams{}
	switch c := req.GetVectorsConfig().GetConfig().(type) {
	case *qdrant.VectorsConfig_Params:
		dense[""] = c.Params
	case *qdrant.VectorsConfig_ParamsMap:
		dense = c.ParamsMap.GetMap()
	}
	for name, p := range dense {
		v, err := denseSpec(name, p)
		if err != nil {
			return nil, err
		}
		spec.vectors = append(spec.vectors, v)
	}
	for name, p := range req.GetSparseVectorsConfig().GetMap() {
		if _, dup := dense[name]; dup {
			return nil, invalidf("Wrong input: vector name %q is both dense and sparse", name)
		}
		if p.GetModifier() != qdrant.Modifier_None {
			return nil, unimplemented("the IDF modifier of sparse vectors")
		}
		if d := p.GetIndex().GetDatatype(); d != qdrant.Datatype_Default && d != qdrant.Datatype_Float32 {
			return nil, unimplemented("sparse vectors of type " + d.String())
		}
		if err := checkVectorName(name); err != nil {
			return nil, err
		}
		spec.vectors = append(spec.vectors, vectorSpec{name: name, shape: shapeSparse, distance: qdrant.Distance_Dot})
	}
	// The order numbers the vectors in the log: it must be the same at every start.
	slices.SortFunc(spec.vectors, func(a, b vectorSpec) int { return strings.Compare(a.name, b.name) })
	var err error
	spec.strict, err = newStrictMode(req.GetStrictModeConfig())
	return spec, err
}

func denseSpec(name string, p *qdrant.VectorParams) (vectorSpec, error) {
	v := vectorSpec{name: name, dim: int(p.GetSize()), distance: p.GetDistance()}
	if p.GetSize() < 1 || p.GetSize() > maxDimension {
		return v, invalidf("Validation error in body: [vectors_config.size: value %d invalid, must be from 1 to %d]", p.GetSize(), maxDimension)
	}
	switch v.distance {
	case qdrant.Distance_Cosine, qdrant.Distance_Dot, qdrant.Distance_Euclid, qdrant.Distance_Manhattan:
	default:
		return v, invalid("Wrong input: unknown distance")
	}
	switch p.GetDatatype() {
	case qdrant.Datatype_Default, qdrant.Datatype_Float32:
	case qdrant.Datatype_Float16:
		v.half = true
	default:
		return v, unimplemented("vectors of type " + p.GetDatatype().String())
	}
	if mv := p.GetMultivectorConfig(); mv != nil {
		if mv.GetComparator() != qdrant.MultiVectorComparator_MaxSim {
			return v, invalid("Wrong input: unknown multivector comparator")
		}
		v.shape = shapeMulti
	}
	if name == "" {
		return v, nil
	}
	return v, checkVectorName(name)
}

func checkVectorName(name string) error {
	if len(name) > 200 || strings.ContainsAny(name, "<>:\"/\\|?*\x00\x1f") {
		return invalidf("Validation error in body: [vector name %q is too long or holds a forbidden character]", name)
	}
	return nil
}

func checkCollectionName(name string, create bool) error {
	forbidden := "/\x00"
	if create {
		forbidden = "<>:\"/\\|?*\x00\x1f"
	}
	if name == "" || len(name) > maxName || strings.ContainsAny(name, forbidden) {
		return invalidf("Validation error in body: [collection_name: %q must have 1 to %d bytes and none of %q]", name, maxName, forbidden)
	}
	return nil
}

// newStrictMode reads the limits that are kept; the others are refused, not ignored.
func newStrictMode(c *qdrant.StrictModeConfig) (strictMode, error) {
	var s strictMode
	for name, set := range map[string]bool{
		"max_timeout":                       c.GetMaxTimeout() != 0,
		"search_max_oversampling":           c.GetSearchMaxOversampling() != 0,
		"max_collection_vector_size_bytes":  c.GetMaxCollectionVectorSizeBytes() != 0,
		"max_collection_payload_size_bytes": c.GetMaxCollectionPayloadSizeBytes() != 0,
		"read_rate_limit":                   c.GetReadRateLimit() != 0,
		"write_rate_limit":                  c.GetWriteRateLimit() != 0,
		"max_points_count":                  c.GetMaxPointsCount() != 0,
		"max_payload_index_count":           c.GetMaxPayloadIndexCount() != 0,
		"multivector_config":                len(c.GetMultivectorConfig().GetMultivectorConfig()) != 0,
		"sparse_config":                     len(c.GetSparseConfig().GetSparseConfig()) != 0,
	} {
		if set {
			return s, unimplemented("strict mode's " + name)
		}
	}
	if !c.GetEnabled() {
		return s, nil
	}
	return strictMode{
		maxQueryLimit:    uint64(c.GetMaxQueryLimit()),
		upsertMaxBatch:   c.GetUpsertMaxBatchsize(),
		searchMaxHnswEf:  uint64(c.GetSearchMaxHnswEf()),
		maxConditions:    c.GetFilterMaxConditions(),
		maxConditionSize: c.GetConditionMaxSize(),
		refuseExact:      c.SearchAllowExact != nil && !*c.SearchAllowExact,
		refuseUnindexed:  c.UnindexedFilteringRetrieve != nil && !*c.UnindexedFilteringRetrieve,
		refuseUnindexedW: c.UnindexedFilteringUpdate != nil && !*c.UnindexedFilteringUpdate,
	}, nil
}

func uitoa(n uint64) string { return strconv.FormatUint(n, 10) }

func strictError(what, help string) error {
	return invalidf("Bad request: Strict mode error: %s. Help: %s", what, help)
}

func (s *strictMode) checkLimit(limit uint64) error {
	if s.maxQueryLimit != 0 && limit > s.maxQueryLimit {
		return strictError("Limit exceeded: "+uitoa(limit)+" > "+uitoa(s.maxQueryLimit)+" for \"limit\"", "Reduce the \"limit\" parameter to or below "+uitoa(s.maxQueryLimit))
	}
	return nil
}

func (s *strictMode) checkExact(exact bool) error {
	if exact && s.refuseExact {
		return strictError("Exact search is not allowed", "Set \"exact\" to false")
	}
	return nil
}

// checkFilter applies the limits on filters. update says that the filter selects points to
// be changed.
func (c *collection) checkFilter(f *filter, update bool) error {
	if f == nil {
		return nil
	}
	s := &c.spec.strict
	if s.maxConditions != 0 && uint64(f.conditions) > s.maxConditions {
		return strictError("Filter condition limit exceeded", "Use at most "+uitoa(s.maxConditions)+" conditions")
	}
	if s.maxConditionSize != 0 && uint64(f.largest) > s.maxConditionSize {
		return strictError("Condition size limit exceeded", "Use at most "+uitoa(s.maxConditionSize)+" values in one condition")
	}
	if update && !s.refuseUnindexedW || !update && !s.refuseUnindexed {
		return nil
	}
	for _, k := range f.keys {
		if c.columns[k] == nil {
			return strictError("Index required but not found for \""+k+"\"", "Create a payload index for this key")
		}
	}
	return nil
}

// columnOf validates a request for a payload index.
func columnOf(req *qdrant.CreateFieldIndexCollection) (*column, error) {
	if req.GetFieldName() == "" {
		return nil, invalid("Validation error in body: [field_name: must not be empty]")
	}
	p, err := parsePath(req.GetFieldName())
	if err != nil {
		return nil, err
	}
	if req.FieldType == nil && req.GetFieldIndexParams().GetIndexParams() == nil {
		return nil, invalid("Wrong input: field type is required")
	}
	kind := columnKeyword
	switch t := req.GetFieldType(); t {
	case qdrant.FieldType_FieldTypeKeyword:
	case qdrant.FieldType_FieldTypeInteger:
		kind = columnInteger
	case qdrant.FieldType_FieldTypeFloat:
		kind = columnFloat
	case qdrant.FieldType_FieldTypeBool:
		kind = columnBool
	case qdrant.FieldType_FieldTypeDatetime:
		kind = columnDatetime
	case qdrant.FieldType_FieldTypeUuid:
		kind = columnUUID
	case qdrant.FieldType_FieldTypeText:
		kind = columnText
	default:
		return nil, unimplemented("a payload index of type " + t.String())
	}
	var text *qdrant.TextIndexParams
	switch k := req.GetFieldIndexParams().GetIndexParams().(type) {
	case nil:
	case *qdrant.PayloadIndexParams_KeywordIndexParams:
		kind = columnKeyword
	case *qdrant.PayloadIndexParams_IntegerIndexParams:
		kind = columnInteger
	case *qdrant.PayloadIndexParams_FloatIndexParams:
		kind = columnFloat
	case *qdrant.PayloadIndexParams_BoolIndexParams:
		kind = columnBool
	case *qdrant.PayloadIndexParams_DatetimeIndexParams:
		kind = columnDatetime
	case *qdrant.PayloadIndexParams_UuidIndexParams:
		kind = columnUUID
	case *qdrant.PayloadIndexParams_TextIndexParams:
		kind, text = columnText, k.TextIndexParams
	default:
		return nil, unimplemented("this type of payload index")
	}
	var tok *tokenizer
	if kind == columnText {
		if tok, err = newTokenizer(text); err != nil {
			return nil, err
		}
	}
	return newColumn(p, kind, tok), nil
}

func newTokenizer(p *qdrant.TextIndexParams) (*tokenizer, error) {
	t := &tokenizer{
		lower:   p == nil || p.Lowercase == nil || *p.Lowercase,
		maxLen:  math.MaxInt,
		phrases: p.GetPhraseMatching(),
	}
	if n := p.GetMinTokenLen(); n > 0 {
		t.minLen = int(min(n, math.MaxInt32))
	}
	if p != nil && p.MaxTokenLen != nil {
		t.maxLen = int(min(*p.MaxTokenLen, math.MaxInt32))
	}
	switch p.GetTokenizer() {
	case qdrant.TokenizerType_Unknown, qdrant.TokenizerType_Word:
	case qdrant.TokenizerType_Whitespace:
		t.whitespace = true
	case qdrant.TokenizerType_Prefix:
		t.prefix = true
	default:
		return nil, unimplemented("the tokenizer " + p.GetTokenizer().String())
	}
	if p.GetStopwords() != nil || p.GetStemmer() != nil || p.GetAsciiFolding() {
		return nil, unimplemented("stop words, stemming and folding of a text index")
	}
	return t, nil
}

// schemaType is the type a collection's info shows for a payload index.
func (c *column) schemaType() qdrant.PayloadSchemaType {
	switch c.kind {
	case columnInteger:
		return qdrant.PayloadSchemaType_Integer
	case columnFloat:
		return qdrant.PayloadSchemaType_Float
	case columnBool:
		return qdrant.PayloadSchemaType_Bool
	case columnDatetime:
		return qdrant.PayloadSchemaType_Datetime
	case columnUUID:
		return qdrant.PayloadSchemaType_Uuid
	case columnText:
		return qdrant.PayloadSchemaType_Text
	default:
		return qdrant.PayloadSchemaType_Keyword
	}
}

// config is the configuration as the API shows it: what was asked for, completed with the
// real server's defaults. Settings of indexes and storage are kept and shown but change
// nothing here: search is exact and in memory whatever they say.
func (s *collectionSpec) config() *qdrant.CollectionConfig {
	r := proto.CloneOf(s.create)
	hnsw := &qdrant.HnswConfigDiff{
		M: proto.Uint64(16), EfConstruct: proto.Uint64(100), FullScanThreshold: proto.Uint64(10000),
		MaxIndexingThreads: proto.Uint64(0), OnDisk: proto.Bool(false),
	}
	if r.HnswConfig != nil {
		proto.Merge(hnsw, r.HnswConfig)
	}
	opt := &qdrant.OptimizersConfigDiff{
		DeletedThreshold: proto.Float64(0.2), VacuumMinVectorNumber: proto.Uint64(1000),
		DefaultSegmentNumber: proto.Uint64(0), FlushIntervalSec: proto.Uint64(5),
	}
	if r.OptimizersConfig != nil {
		proto.Merge(opt, r.OptimizersConfig)
	}
	wal := &qdrant.WalConfigDiff{WalCapacityMb: proto.Uint64(32), WalSegmentsAhead: proto.Uint64(0)}
	if r.WalConfig != nil {
		proto.Merge(wal, r.WalConfig)
	}
	one := func(p *uint32) *uint32 {
		if p == nil {
			return proto.Uint32(1)
		}
		return p
	}
	return &qdrant.CollectionConfig{
		Params: &qdrant.CollectionParams{
			ShardNumber:            *one(r.ShardNumber),
			OnDiskPayload:          r.OnDiskPayload == nil || *r.OnDiskPayload,
			VectorsConfig:          r.VectorsConfig,
			ReplicationFactor:      one(r.ReplicationFactor),
			WriteConsistencyFactor: one(r.WriteConsistencyFactor),
			ShardingMethod:         r.ShardingMethod,
			SparseVectorsConfig:    r.SparseVectorsConfig,
		},
		HnswConfig:         hnsw,
		OptimizerConfig:    opt,
		WalConfig:          wal,
		QuantizationConfig: r.QuantizationConfig,
		StrictModeConfig:   r.StrictModeConfig,
		Metadata:           r.Metadata,
	}
}
