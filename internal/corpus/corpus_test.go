package corpus_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"reflect"
	"testing"

	"github.com/google/uuid"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// idVector is one line of the published test vectors: anyone can check an implementation
// of the identity rule against them.
type idVector struct {
	Collection  string `json:"collection"`
	ExternalID  string `json:"external_id"`
	Text        string `json:"text"`
	Occurrence  uint32 `json:"occurrence"`
	Incarnation uint32 `json:"incarnation"`
	ContentHash string `json:"content_hash"`
	PointID     string `json:"point_id"`
}

func TestPublishedPointIDs(t *testing.T) {
	t.Parallel()
	const path = "testdata/point_ids.json"
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var vectors []idVector
	if err := json.Unmarshal(raw, &vectors); err != nil {
		t.Fatal(err)
	}
	if len(vectors) < 8 {
		t.Fatalf("%s has only %d vectors", path, len(vectors))
	}
	seen := map[string]bool{}
	for i := range vectors {
		v := &vectors[i]
		hash := corpus.HashChunk(v.Text, nil)
		id := corpus.PointID(corpus.ID(uuid.MustParse(v.Collection)), corpus.ChunkKey{
			ExternalID: v.ExternalID, Content: hash, Occurrence: v.Occurrence, Incarnation: v.Incarnation})
		if *update {
			v.ContentHash, v.PointID = fmt.Sprintf("%x", hash), id.String()
		}
		if got := fmt.Sprintf("%x", hash); got != v.ContentHash {
			t.Errorf("vector %d: content hash %s, want %s", i, got, v.ContentHash)
		}
		if id.String() != v.PointID {
			t.Errorf("vector %d: point id %s, want %s", i, id, v.PointID)
		}
		u := uuid.UUID(id)
		if u.Version() != 5 || u.Variant() != uuid.RFC4122 || u.String() != id.String() {
			t.Errorf("vector %d: %s is not a version 5 UUID", i, id)
		}
		if seen[v.PointID] {
			t.Errorf("vector %d repeats an id", i)
		}
		seen[v.PointID] = true
	}
	if *update {
		out, err := json.MarshalIndent(vectors, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, append(out, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestPointIDAgreesWithAnotherImplementation builds the documented name by hand and lets
// google/uuid derive the version 5 UUID.
func TestPointIDAgreesWithAnotherImplementation(t *testing.T) {
	t.Parallel()
	collection := uuid.MustParse("6ba7b810-9dad-11d1-80b4-00c04fd430c8")
	hash := corpus.HashChunk("hello", nil)
	name := append([]byte{0, 0, 0, 1, 0, 0, 0, 3}, "a/b"...)
	name = append(name, hash[:]...)
	name = append(name, 0, 0, 0, 2, 0, 0, 0, 7)
	want := uuid.NewSHA1(collection, name)
	got := corpus.PointID(corpus.ID(collection), corpus.ChunkKey{ExternalID: "a/b", Content: hash, Occurrence: 2, Incarnation: 7})
	if uuid.UUID(got) != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestIDOrder(t *testing.T) {
	t.Parallel()
	low, high := corpus.ID{0xff}, corpus.ID{0xff, 0, 1}
	if low.Compare(high) >= 0 || high.Compare(low) <= 0 || low.Compare(low) != 0 {
		t.Error("ids must order bytewise")
	}
	next, ok := corpus.ID{15: 0xff}.Next()
	if want := (corpus.ID{14: 1}); !ok || next != want {
		t.Errorf("next of ..00ff is %v", next)
	}
	var last corpus.ID
	for i := range last {
		last[i] = 0xff
	}
	if _, ok := last.Next(); ok {
		t.Error("the largest id has no next")
	}
}

func TestBucketIsEvenAndSalted(t *testing.T) {
	t.Parallel()
	counts := map[uint32]int{}
	moved := 0
	for i := range 50_000 {
		id := corpus.PointID(corpus.ID{1}, corpus.ChunkKey{Occurrence: uint32(i)})
		b := corpus.Bucket(corpus.ID{2}, id)
		counts[b]++
		if b != corpus.Bucket(corpus.ID{3}, id) {
			moved++
		}
		if b >= corpus.Buckets {
			t.Fatalf("bucket %d is out of range", b)
		}
	}
	if len(counts) != corpus.Buckets {
		t.Errorf("%d of %d buckets are used", len(counts), corpus.Buckets)
	}
	if moved < 49_000 {
		t.Errorf("another salt moved only %d of 50,000 ids", moved)
	}
}

func TestVectorsRoundTrip(t *testing.T) {
	t.Parallel()
	for name, v := range map[string]corpus.Vectors{
		"none":          {},
		"dense":         {Dense: []float32{1, -2.5, math.MaxFloat32}},
		"empty sparse":  {Sparse: &corpus.Sparse{Indices: []uint32{}, Values: []float32{}}},
		"all":           {Dense: []float32{0}, Sparse: &corpus.Sparse{Indices: []uint32{3, 250001}, Values: []float32{.5, 2}}, ColBERT: [][]float32{{1, 2}, {3, 4}}},
		"empty colbert": {ColBERT: [][]float32{}},
	} {
		b := v.AppendBinary(nil)
		got, err := corpus.DecodeVectors(b)
		if err != nil || !reflect.DeepEqual(*got, v) {
			t.Errorf("%s: got %+v, %v", name, got, err)
		}
		for cut := range b {
			if _, err := corpus.DecodeVectors(b[:cut]); err == nil {
				t.Errorf("%s: %d of %d bytes were accepted", name, cut, len(b))
			}
		}
		if _, err := corpus.DecodeVectors(append(bytes.Clone(b), 0)); err == nil {
			t.Errorf("%s: a trailing byte was accepted", name)
		}
	}
}

func FuzzDecodeVectors(f *testing.F) {
	all := corpus.Vectors{Dense: []float32{1}, Sparse: &corpus.Sparse{Indices: []uint32{1}, Values: []float32{2}}, ColBERT: [][]float32{{3}}}
	f.Add(all.AppendBinary(nil))
	f.Add([]byte{4, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := corpus.DecodeVectors(b)
		if err == nil && v.Finite() && len(b) > 0 && v.ColBERT == nil && !bytes.Equal(v.AppendBinary(nil), b) {
			t.Errorf("%x decodes to what encodes otherwise", b)
		}
	})
}

func TestHalfFloats(t *testing.T) {
	t.Parallel()
	for h := range 1 << 16 {
		f := corpus.HalfToFloat(uint16(h))
		if math.IsNaN(float64(f)) {
			if back := corpus.FloatToHalf(f); back&0x7c00 != 0x7c00 || back&0x3ff == 0 {
				t.Fatalf("%#x: NaN became %#x", h, back)
			}
			continue
		}
		if back := corpus.FloatToHalf(f); back != uint16(h) {
			t.Fatalf("%#x became %v became %#x", h, f, back)
		}
	}
	for in, want := range map[float32]float32{1 + 1.0/2048: 1, 1 + 3.0/2048: 1 + 2.0/1024, 65520: float32(math.Inf(1)), 65519: 65504, 1e-9: 0} {
		if got := corpus.HalfToFloat(corpus.FloatToHalf(in)); got != want {
			t.Errorf("%v rounds to %v, want %v", in, got, want)
		}
	}
}

func TestChecksumSeesEveryValue(t *testing.T) {
	t.Parallel()
	base := func() *corpus.Vectors {
		return &corpus.Vectors{Dense: []float32{.6, .8}, Sparse: &corpus.Sparse{Indices: []uint32{7}, Values: []float32{.25}}, ColBERT: [][]float32{{1, 0}}}
	}
	sum := corpus.ChecksumVectors(base(), "")
	if sum != corpus.ChecksumVectors(base(), "") || len(sum) != 16 {
		t.Fatalf("the checksum %q is not stable", sum)
	}
	for name, change := range map[string]func(*corpus.Vectors){
		"dense":   func(v *corpus.Vectors) { v.Dense[1] = .80001 },
		"index":   func(v *corpus.Vectors) { v.Sparse.Indices[0] = 8 },
		"weight":  func(v *corpus.Vectors) { v.Sparse.Values[0] = .26 },
		"colbert": func(v *corpus.Vectors) { v.ColBERT[0][1] = 1e-6 },
		"absent":  func(v *corpus.Vectors) { v.ColBERT = nil },
	} {
		v := base()
		change(v)
		if corpus.ChecksumVectors(v, "") == sum {
			t.Errorf("a changed %s value has the same checksum", name)
		}
	}
	half := base()
	half.Dense = []float32{corpus.HalfToFloat(corpus.FloatToHalf(.6)), corpus.HalfToFloat(corpus.FloatToHalf(.8))}
	if corpus.ChecksumVectors(base(), "float16") != corpus.ChecksumVectors(half, "float16") {
		t.Error("float16 storage must have the checksum of the rounded values")
	}
}

func TestErrorKinds(t *testing.T) {
	t.Parallel()
	overloaded := fmt.Errorf("embedding: %w", corpus.Errorf(corpus.Overloaded, "overloaded", "full"))
	for _, c := range []struct {
		err       error
		kind      corpus.Kind
		retryable bool
	}{
		{nil, "", false},
		{errors.New("x"), corpus.Internal, false},
		{overloaded, corpus.Overloaded, true},
		{context.DeadlineExceeded, corpus.Unavailable, true},
		{corpus.Wrap(corpus.NotFound, "document_not_found", "", errors.New("y")), corpus.NotFound, false},
	} {
		if corpus.KindOf(c.err) != c.kind || corpus.Retryable(c.err) != c.retryable {
			t.Errorf("%v: kind %q, retryable %v", c.err, corpus.KindOf(c.err), corpus.Retryable(c.err))
		}
	}
}

func TestParseMetadata(t *testing.T) {
	t.Parallel()
	deep := func(n int) string {
		s := "1"
		for range n {
			s = `{"a":` + s + `}`
		}
		return s
	}
	for _, c := range []struct{ name, in, code string }{
		{"object", `{"a":[1,2.5,"x",null,true],"b":{"c":9223372036854775807}}`, ""},
		{"null is empty", `null`, ""},
		{"array", `[1]`, "wrong_type"},
		{"text", `"a"`, "wrong_type"},
		{"torn", `{"a":`, "invalid_json"},
		{"NUL", `{"a":"x\u0000y"}`, "invalid_text"},
		{"NUL in a key", `{"a\u0000":1}`, "invalid_text"},
		{"overflow", `{"a":1e400}`, "number_out_of_range"},
		{"integer beyond int64 becomes a float", `{"a":9223372036854775808}`, ""},
		{"deepest", deep(corpus.MaxMetadataDepth), ""},
		{"too deep", deep(corpus.MaxMetadataDepth + 1), "too_deep"},
		{"too large", `{"a":"` + string(bytes.Repeat([]byte("x"), corpus.MaxMetadataBytes)) + `"}`, "too_large"},
	} {
		m, fe := corpus.ParseMetadata([]byte(c.in))
		code := ""
		if fe != nil {
			code = fe.Code
		}
		if code != c.code {
			t.Errorf("%s: code %q, want %q", c.name, code, c.code)
		}
		if fe == nil {
			again, fe := corpus.ParseMetadata(m.JSON())
			if fe != nil || !reflect.DeepEqual(m, again) {
				t.Errorf("%s: %v does not survive its own JSON", c.name, m)
			}
		}
	}
	_, fe := corpus.ParseMetadata([]byte(`{"a/b":[0,{"c~":"\u0000"}]}`))
	if fe == nil || fe.Pointer != "/a~1b/1/c~0" {
		t.Errorf("pointer %+v", fe)
	}
}

func TestFilterMatches(t *testing.T) {
	t.Parallel()
	m, fe := corpus.ParseMetadata([]byte(`{"lang":"en","year":2021,"score":0.5,"ok":true,"tags":["a","b"],"none":null,"empty":[],
		"when":"2024-05-01T12:00:00+02:00","title":"The quick brown fox","deep":{"list":[{"k":1},{"k":2}]}}`))
	if fe != nil {
		t.Fatal(fe.Detail)
	}
	yes, no := true, false
	cond := func(c corpus.Condition) *corpus.Filter { return &corpus.Filter{Must: []corpus.Condition{c}} }
	for _, c := range []struct {
		name string
		f    *corpus.Filter
		want bool
	}{
		{"nil", nil, true},
		{"empty", &corpus.Filter{}, true},
		{"match", cond(corpus.Condition{Key: "lang", Match: "en"}), true},
		{"match other", cond(corpus.Condition{Key: "lang", Match: "de"}), false},
		{"match in array", cond(corpus.Condition{Key: "tags", Match: "b"}), true},
		{"match integer", cond(corpus.Condition{Key: "year", Match: int64(2021)}), true},
		{"match integer against text", cond(corpus.Condition{Key: "lang", Match: int64(1)}), false},
		{"match bool", cond(corpus.Condition{Key: "ok", Match: true}), true},
		{"absent", cond(corpus.Condition{Key: "nope", Match: "x"}), false},
		{"any", cond(corpus.Condition{Key: "lang", Any: []any{"fr", "en"}}), true},
		{"except", cond(corpus.Condition{Key: "lang", Except: []any{"en"}}), false},
		{"except in array", cond(corpus.Condition{Key: "tags", Except: []any{"a"}}), true},
		{"range", cond(corpus.Condition{Key: "year", Range: &corpus.Range{GTE: int64(2020), LT: 2021.5}}), true},
		{"range excludes its open end", cond(corpus.Condition{Key: "year", Range: &corpus.Range{GT: int64(2021)}}), false},
		{"range of text", cond(corpus.Condition{Key: "lang", Range: &corpus.Range{GT: int64(0)}}), false},
		{"time range", cond(corpus.Condition{Key: "when", Range: &corpus.Range{GTE: "2024-05-01T10:00:00Z", LTE: "2024-05-01T10:00:00Z"}}), true},
		{"date", cond(corpus.Condition{Key: "when", Range: &corpus.Range{GT: "2024-05-02"}}), false},
		{"words", cond(corpus.Condition{Key: "title", Text: "FOX quick"}), true},
		{"words missing", cond(corpus.Condition{Key: "title", Text: "quick wolf"}), false},
		{"nested through an array", cond(corpus.Condition{Key: "deep.list.k", Match: int64(2)}), true},
		{"is empty: null", cond(corpus.Condition{Key: "none", IsEmpty: &yes}), true},
		{"is empty: array", cond(corpus.Condition{Key: "empty", IsEmpty: &yes}), true},
		{"is empty: absent", cond(corpus.Condition{Key: "nope", IsEmpty: &yes}), true},
		{"is not empty", cond(corpus.Condition{Key: "lang", IsEmpty: &no}), true},
		{"should", &corpus.Filter{Should: []corpus.Condition{{Key: "lang", Match: "de"}, {Key: "ok", Match: true}}}, true},
		{"should none", &corpus.Filter{Should: []corpus.Condition{{Key: "lang", Match: "de"}}}, false},
		{"must not", &corpus.Filter{MustNot: []corpus.Condition{{Key: "lang", Match: "en"}}}, false},
		{"group", cond(corpus.Condition{Filter: &corpus.Filter{MustNot: []corpus.Condition{{Key: "year", Match: int64(1)}}}}), true},
	} {
		if got := c.f.Matches(m); got != c.want {
			t.Errorf("%s: got %v", c.name, got)
		}
	}
}

func FuzzParseMetadata(f *testing.F) {
	f.Add([]byte(`{"a":[1,{"b":"c"}]}`))
	f.Add([]byte(`{"a":1e309}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, fe := corpus.ParseMetadata(raw)
		if fe != nil {
			return
		}
		b := m.JSON()
		again, fe := corpus.ParseMetadata(b)
		if fe == nil && !bytes.Equal(again.JSON(), b) {
			t.Errorf("%s is not canonical: %s", b, again.JSON())
		}
	})
}
