package qdrant

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	qc "github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// CreateIndex makes the Qdrant collection of ix and its payload indexes. A collection that
// exists is accepted when its vectors are ix's own, so that a creation that was cut short can
// be finished; else [corpus.Conflict].
func (c *Client) CreateIndex(ctx context.Context, ix corpus.Index) error {
	if err := checkLayout(ix.Layout); err != nil {
		return err
	}
	c.forget(ix.QdrantName)
	err := c.call(ctx, "create", func(ctx context.Context) error {
		return c.api.CreateCollection(ctx, c.collection(ix))
	})
	if corpus.KindOf(err) == corpus.Conflict || corpus.CodeOf(err) == CodeRefused {
		// Some servers call an existing name invalid; what exists decides.
		info, derr := c.info(ctx, ix.QdrantName)
		if derr != nil {
			return err
		}
		if drift := vectorDrift(ix.Layout, info.GetConfig().GetParams()); len(drift) > 0 {
			return corpus.Errorf(corpus.Conflict, "index_exists", "the Qdrant collection %s exists with another layout: %s", ix.QdrantName, strings.Join(drift, "; "))
		}
		err = nil
	}
	if err != nil {
		return err
	}
	return c.createPayloadIndexes(ctx, ix, nil)
}

// CreatePayloadIndexes makes those payload indexes of ix that its Qdrant collection lacks. It
// never makes a collection, and leaves an index of another type alone. [corpus.NotFound] when
// there is no collection.
func (c *Client) CreatePayloadIndexes(ctx context.Context, ix corpus.Index) error {
	info, err := c.info(ctx, ix.QdrantName)
	if err != nil {
		return err
	}
	return c.createPayloadIndexes(ctx, ix, payloadSchema(info))
}

// createPayloadIndexes makes those that are not in have.
func (c *Client) createPayloadIndexes(ctx context.Context, ix corpus.Index, have map[string]*qc.PayloadSchemaInfo) error {
	for key, params := range payloadIndexes(ix.Layout) {
		if have[plainKey(key)] != nil {
			continue
		}
		err := c.call(ctx, "create_payload_index", func(ctx context.Context) error {
			r, err := c.api.CreateFieldIndex(ctx, &qc.CreateFieldIndexCollection{
				CollectionName: ix.QdrantName, Wait: qc.PtrOf(true), FieldName: key,
				FieldType: &params.field, FieldIndexParams: params.params,
			})
			if err != nil {
				return err
			}
			return completed(r)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func checkLayout(l corpus.Layout) error {
	bad := func(format string, args ...any) error {
		return corpus.Errorf(corpus.Invalid, "layout", format, args...)
	}
	switch {
	case l.Vectors == 0:
		return bad("an index needs at least one vector")
	case l.Vectors.Has(corpus.Dense) && (l.Dim < 1 || l.Dim > 65536):
		return bad("a dense vector of %d values cannot be stored; 1 to 65536 can", l.Dim)
	case l.Vectors.Has(corpus.ColBERT) && (l.ColBERTDim < 1 || l.ColBERTDim > 65536):
		return bad("a ColBERT vector of %d columns cannot be stored; 1 to 65536 can", l.ColBERTDim)
	case l.Quantization != "" && l.Quantization != "scalar" && l.Quantization != "binary":
		return bad("quantization is scalar, binary or nothing, not %q", l.Quantization)
	case l.DenseType != "" && l.DenseType != "float16":
		return bad("the storage type is float16 or nothing, not %q", l.DenseType)
	}
	for key, typ := range l.Fields {
		if _, err := paths(key); err != nil {
			return err
		}
		if _, ok := fieldIndexes[typ]; !ok {
			return bad("field %q: there is no type %q", key, typ)
		}
	}
	return nil
}

func (c *Client) collection(ix corpus.Index) *qc.CreateCollection {
	dense, sparse := vectorConfig(ix.Layout)
	req := &qc.CreateCollection{CollectionName: ix.QdrantName, VectorsConfig: qc.NewVectorsConfigMap(dense)}
	if len(sparse) > 0 {
		req.SparseVectorsConfig = qc.NewSparseVectorsConfig(sparse)
	}
	for _, o := range []struct {
		n   uint32
		dst **uint32
	}{
		{c.cfg.Shards, &req.ShardNumber}, {c.cfg.Replicas, &req.ReplicationFactor}, {c.cfg.WriteConsistency, &req.WriteConsistencyFactor},
	} {
		if o.n > 0 {
			*o.dst = qc.PtrOf(o.n)
		}
	}
	return req
}

func vectorConfig(l corpus.Layout) (map[string]*qc.VectorParams, map[string]*qc.SparseVectorParams) {
	dense := map[string]*qc.VectorParams{}
	sparse := map[string]*qc.SparseVectorParams{}
	var datatype *qc.Datatype
	if l.DenseType == "float16" {
		datatype = qc.Datatype_Float16.Enum()
	}
	var onDisk *bool
	if l.OnDisk {
		onDisk = qc.PtrOf(true)
	}
	if l.Vectors.Has(corpus.Dense) {
		dense[denseName] = &qc.VectorParams{
			// Vectors arrive normalised, so the dot product is their cosine, and what is
			// stored is what was sent: the checksum stays comparable.
			Size: uint64(l.Dim), Distance: qc.Distance_Dot, Datatype: datatype, OnDisk: onDisk,
			QuantizationConfig: quantization(l.Quantization),
		}
	}
	if l.Vectors.Has(corpus.ColBERT) {
		dense[colbertName] = &qc.VectorParams{
			Size: uint64(l.ColBERTDim), Distance: qc.Distance_Dot, Datatype: datatype, OnDisk: onDisk,
			MultivectorConfig: &qc.MultiVectorConfig{Comparator: qc.MultiVectorComparator_MaxSim},
			// Only ever used to rescore candidates: a graph would cost memory for nothing.
			HnswConfig: &qc.HnswConfigDiff{M: qc.PtrOf(uint64(0))},
		}
	}
	if l.Vectors.Has(corpus.SparseHead) {
		// No modifier: the model's weights are the weights.
		sparse[sparseName] = &qc.SparseVectorParams{}
	}
	return dense, sparse
}

func quantization(kind string) *qc.QuantizationConfig {
	switch kind {
	case "scalar":
		return qc.NewQuantizationScalar(&qc.ScalarQuantization{
			// The quantile that Qdrant's documentation recommends for embeddings; unmeasured here.
			Type: qc.QuantizationType_Int8, Quantile: qc.PtrOf(float32(0.99)), AlwaysRam: qc.PtrOf(true),
		})
	case "binary":
		return qc.NewQuantizationBinary(&qc.BinaryQuantization{AlwaysRam: qc.PtrOf(true)})
	}
	return nil
}

type fieldIndex struct {
	field  qc.FieldType
	schema qc.PayloadSchemaType
	params *qc.PayloadIndexParams
}

// fieldIndexes by declared type. Integers can be looked up and compared.
var fieldIndexes = map[corpus.FieldType]fieldIndex{
	corpus.Keyword:  {qc.FieldType_FieldTypeKeyword, qc.PayloadSchemaType_Keyword, nil},
	corpus.Integer:  {qc.FieldType_FieldTypeInteger, qc.PayloadSchemaType_Integer, qc.NewPayloadIndexParamsInt(&qc.IntegerIndexParams{Lookup: qc.PtrOf(true), Range: qc.PtrOf(true)})},
	corpus.Float:    {qc.FieldType_FieldTypeFloat, qc.PayloadSchemaType_Float, nil},
	corpus.Boolean:  {qc.FieldType_FieldTypeBool, qc.PayloadSchemaType_Bool, nil},
	corpus.Datetime: {qc.FieldType_FieldTypeDatetime, qc.PayloadSchemaType_Datetime, nil},
	corpus.FullText: {qc.FieldType_FieldTypeText, qc.PayloadSchemaType_Text, qc.NewPayloadIndexParamsText(&qc.TextIndexParams{Tokenizer: qc.TokenizerType_Word, Lowercase: qc.PtrOf(true)})},
}

// payloadIndexes of a layout by payload path. Lockstep's own keys are kept out of the vector
// graph: nobody searches near a generation. The guard on meta_version needs its index only
// under strict mode, which refuses filtered updates of fields without one.
func payloadIndexes(l corpus.Layout) map[string]fieldIndex {
	own := func(lookup, rng bool) fieldIndex {
		return fieldIndex{qc.FieldType_FieldTypeInteger, qc.PayloadSchemaType_Integer, qc.NewPayloadIndexParamsInt(&qc.IntegerIndexParams{
			Lookup: &lookup, Range: &rng, EnableHnsw: qc.PtrOf(false),
		})}
	}
	out := map[string]fieldIndex{
		corpus.KeyBucket:      own(true, true), // looked up by number, and bounded to find what no bucket counts
		corpus.KeyGen:         own(false, true),
		corpus.KeyMetaVersion: own(false, true),
		corpus.KeyOwner: {qc.FieldType_FieldTypeUuid, qc.PayloadSchemaType_Uuid, qc.NewPayloadIndexParamsUUID(&qc.UuidIndexParams{
			EnableHnsw: qc.PtrOf(false),
		})},
	}
	for key, typ := range l.Fields {
		variants, err := paths(key)
		if err != nil {
			continue // checkLayout refuses such a layout before anything is made
		}
		for _, p := range variants {
			out[p] = fieldIndexes[typ]
		}
	}
	return out
}

// DropIndex removes the Qdrant collection of ix and all in it. One that is gone is fine.
func (c *Client) DropIndex(ctx context.Context, ix corpus.Index) error {
	c.forget(ix.QdrantName)
	err := c.drop(ctx, ix.QdrantName)
	if corpus.KindOf(err) == corpus.NotFound {
		return nil
	}
	return err
}

func (c *Client) drop(ctx context.Context, name string) error {
	return c.call(ctx, "drop", func(ctx context.Context) error {
		// The server answers false, not an error, when there is nothing to drop; the client
		// library calls that a failure without a status.
		r, err := c.api.GetCollectionsClient().Delete(ctx, &qc.DeleteCollection{CollectionName: name})
		if err != nil {
			return err
		}
		if !r.GetResult() {
			return corpus.Errorf(corpus.NotFound, CodeNotFound, "the index's collection does not exist")
		}
		return nil
	})
}

// DescribeIndex compares the live collection with ix's layout. drift lists what differs, in
// words for people: vectors, their sizes, types and quantisation, and payload indexes that
// are missing or of another type. Payload indexes that somebody added are no drift.
func (c *Client) DescribeIndex(ctx context.Context, ix corpus.Index) (exists bool, drift []string, err error) {
	info, err := c.info(ctx, ix.QdrantName)
	if corpus.KindOf(err) == corpus.NotFound {
		return false, nil, nil
	}
	if err != nil {
		return false, nil, err
	}
	drift = vectorDrift(ix.Layout, info.GetConfig().GetParams())
	have, want := payloadSchema(info), payloadIndexes(ix.Layout)
	for _, key := range slices.Sorted(maps.Keys(want)) {
		got, ok := have[plainKey(key)]
		switch {
		case !ok:
			drift = append(drift, fmt.Sprintf("payload index on %s: missing", key))
		case got.GetDataType() != want[key].schema:
			drift = append(drift, fmt.Sprintf("payload index on %s: %s expected, %s found", key, want[key].schema, got.GetDataType()))
		}
	}
	return true, drift, nil
}

// payloadSchema is what a collection has by plainKey.
func payloadSchema(info *qc.CollectionInfo) map[string]*qc.PayloadSchemaInfo {
	have := map[string]*qc.PayloadSchemaInfo{}
	for key, s := range info.GetPayloadSchema() {
		have[plainKey(key)] = s
	}
	return have
}

// plainKey is a payload path without the quotes that servers keep or drop.
func plainKey(path string) string { return strings.ReplaceAll(path, `"`, "") }

func vectorDrift(l corpus.Layout, p *qc.CollectionParams) []string {
	var drift []string
	differ := func(what string, want, got any) {
		if want != got {
			drift = append(drift, fmt.Sprintf("%s: %v expected, %v found", what, want, got))
		}
	}
	dense, sparse := vectorConfig(l)
	have := p.GetVectorsConfig().GetParamsMap().GetMap()
	if p.GetVectorsConfig().GetParams() != nil {
		drift = append(drift, "vectors: named ones expected, one without a name found")
	}
	for _, name := range slices.Sorted(maps.Keys(dense)) {
		want, got := dense[name], have[name]
		if got == nil {
			drift = append(drift, "vector "+name+": missing")
			continue
		}
		differ("vector "+name+": size", want.GetSize(), got.GetSize())
		differ("vector "+name+": distance", want.GetDistance(), got.GetDistance())
		differ("vector "+name+": storage type", storage(want.GetDatatype()), storage(got.GetDatatype()))
		differ("vector "+name+": on disk", want.GetOnDisk(), got.GetOnDisk())
		differ("vector "+name+": quantization", quantizationName(want.GetQuantizationConfig()), quantizationName(got.GetQuantizationConfig()))
		differ("vector "+name+": several vectors a point", want.GetMultivectorConfig() != nil, got.GetMultivectorConfig() != nil)
	}
	haveSparse := p.GetSparseVectorsConfig().GetMap()
	for name := range sparse {
		got, ok := haveSparse[name]
		if !ok {
			drift = append(drift, "sparse vector "+name+": missing")
			continue
		}
		differ("sparse vector "+name+": modifier", qc.Modifier_None, got.GetModifier())
	}
	for _, name := range slices.Sorted(maps.Keys(have)) {
		if dense[name] == nil {
			drift = append(drift, "vector "+name+": not one of ours")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(haveSparse)) {
		if sparse[name] == nil {
			drift = append(drift, "sparse vector "+name+": not one of ours")
		}
	}
	return drift
}

// storage names a datatype; unset and float32 are one.
func storage(d qc.Datatype) string {
	if d == qc.Datatype_Default {
		d = qc.Datatype_Float32
	}
	return strings.ToLower(d.String())
}

func quantizationName(q *qc.QuantizationConfig) string {
	switch q.GetQuantization().(type) {
	case *qc.QuantizationConfig_Scalar:
		return "scalar"
	case *qc.QuantizationConfig_Binary:
		return "binary"
	case *qc.QuantizationConfig_Product:
		return "product"
	case nil:
		return "none"
	}
	return "another"
}

// ListOurCollections returns the names of the server's collections that begin with prefix,
// sorted, without scratch collections. [Client.ReadStamp] tells whose they are.
func (c *Client) ListOurCollections(ctx context.Context, prefix string) ([]string, error) {
	all, err := c.list(ctx)
	if err != nil {
		return nil, err
	}
	out := slices.DeleteFunc(all, func(n string) bool {
		return !strings.HasPrefix(n, prefix) || strings.HasPrefix(n, probePrefix)
	})
	slices.Sort(out)
	return out, nil
}

func (c *Client) list(ctx context.Context) ([]string, error) {
	var names []string
	err := c.call(ctx, "list", func(ctx context.Context) (err error) {
		names, err = c.api.ListCollections(ctx)
		return err
	})
	return names, err
}
