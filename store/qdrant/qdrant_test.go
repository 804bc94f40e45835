package qdrant

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	qc "github.com/qdrant/go-client/qdrant"
	"go.uber.org/goleak"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/internal/faults"
	"github.com/lockstep-db/lockstep/store/qdrantlocal"
	"github.com/lockstep-db/lockstep/store/qdranttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	owner   = corpus.ID{0: 0xaa, 15: 1}
	another = corpus.ID{0: 0xbb, 15: 2}
)

func open(t *testing.T, cfg Config) *Client {
	t.Helper()
	c, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	c.SetOwner(owner)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func setup(t *testing.T) *Client {
	t.Helper()
	return open(t, Config{URL: "http://" + qdranttest.Own(t)})
}

var allHeads = corpus.Layout{
	Vectors: corpus.Dense | corpus.SparseHead | corpus.ColBERT, Dim: 4, ColBERTDim: 3,
	Fields: map[string]corpus.FieldType{"lang": corpus.Keyword, "year": corpus.Integer, "body": corpus.FullText, "a.b": corpus.Keyword, "when": corpus.Datetime, "price": corpus.Float, "ok": corpus.Boolean},
}

func makeIndex(t *testing.T, c *Client, l corpus.Layout) corpus.Index {
	t.Helper()
	ix := corpus.Index{QdrantName: fmt.Sprintf("%s%x", Prefix, rand.Uint64()), Layout: l, Salt: corpus.ID{1}}
	if err := c.CreateIndex(t.Context(), ix); err != nil {
		t.Fatal(err)
	}
	return ix
}

func pid(n int) corpus.ID { return corpus.ID{0: 0x10, 6: 0x50, 8: 0x80, 14: byte(n >> 8), 15: byte(n)} }

func vectors(rng *rand.Rand, l corpus.Layout) corpus.Vectors {
	row := func(n int) []float32 {
		out := make([]float32, n)
		for i := range out {
			out[i] = rng.Float32()*2 - 1
		}
		return out
	}
	var v corpus.Vectors
	if l.Vectors.Has(corpus.Dense) {
		v.Dense = row(l.Dim)
	}
	if l.Vectors.Has(corpus.SparseHead) {
		s := &corpus.Sparse{}
		for i := uint32(0); i < 20; i++ {
			if rng.IntN(3) == 0 {
				s.Indices, s.Values = append(s.Indices, i), append(s.Values, rng.Float32())
			}
		}
		v.Sparse = s
	}
	if l.Vectors.Has(corpus.ColBERT) {
		for range 1 + rng.IntN(3) {
			v.ColBERT = append(v.ColBERT, row(l.ColBERTDim))
		}
	}
	return v
}

func makePoint(ix corpus.Index, n int, gen, version int64, md corpus.Metadata) corpus.Point {
	v := vectors(rand.New(rand.NewPCG(uint64(n), uint64(gen))), ix.Layout)
	return corpus.Point{ID: pid(n), Vectors: v, Payload: corpus.Payload{
		Owner: owner, Document: corpus.ID{1, 15: byte(n)}, Gen: gen, MetaVersion: version,
		Bucket: corpus.Bucket(ix.Salt, pid(n)), Checksum: corpus.ChecksumVectors(&v, ix.Layout.DenseType), Metadata: md,
	}}
}

func read(t *testing.T, c *Client, ix corpus.Index, ids ...corpus.ID) map[corpus.ID]corpus.PointState {
	t.Helper()
	got, err := c.ReadPoints(t.Context(), ix, ids, true)
	if err != nil {
		t.Fatal(err)
	}
	out := map[corpus.ID]corpus.PointState{}
	for _, s := range got {
		out[s.ID] = s
	}
	if len(out) != len(got) {
		t.Error("a point was returned twice")
	}
	return out
}

func must0(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestURLs(t *testing.T) {
	t.Parallel()
	for raw, want := range map[string]string{
		"http://h:1":          "h 1 false",
		"https://h":           "h 6334 true",
		"http://[::1]:7/":     "[::1] 7 false",
		"http://10.0.0.1":     "10.0.0.1 6334 false",
		"h:6334":              "",
		"grpc://h:6334":       "",
		"http://":             "",
		"http://u:secret@h":   "",
		"http://h/path":       "",
		"http://h?x=secret":   "",
		"http://h:0":          "",
		"http://h:99999":      "",
		"http://bad host:1":   "",
		"http://h:6334#x":     "",
		"":                    "",
		"http://h:6334/?key=": "",
	} {
		host, port, tls, err := parseURL(raw)
		got := fmt.Sprintf("%s %d %v", host, port, tls)
		switch {
		case want == "" && corpus.KindOf(err) != corpus.Invalid:
			t.Errorf("%q: got %s, %v", raw, got, err)
		case want == "" && strings.Contains(err.Error(), "secret"):
			t.Errorf("the error repeats a secret: %v", err)
		case want != "" && (err != nil || got != want):
			t.Errorf("%q: got %s, %v", raw, got, err)
		}
	}
}

func TestGuardsAreProved(t *testing.T) {
	t.Parallel()
	c := setup(t)
	// Scratch collections of a killed process go, those of a living one and others stay.
	old := corpus.Index{QdrantName: probePrefix + "1000_abc", Layout: corpus.Layout{Vectors: corpus.Dense, Dim: 1}}
	young := old
	young.QdrantName = fmt.Sprintf("%s%d_abc", probePrefix, time.Now().Unix())
	must0(t, c.CreateIndex(t.Context(), old))
	must0(t, c.CreateIndex(t.Context(), young))
	mine := makeIndex(t, c, allHeads)
	must0(t, c.ProveGuards(t.Context()))
	names, err := c.list(t.Context())
	must0(t, err)
	slices.Sort(names)
	want := []string{mine.QdrantName, young.QdrantName}
	slices.Sort(want)
	if !slices.Equal(names, want) {
		t.Errorf("collections %v, want %v", names, want)
	}
	ours, err := c.ListOurCollections(t.Context(), Prefix)
	must0(t, err)
	if !slices.Equal(ours, []string{mine.QdrantName}) {
		t.Errorf("ours: %v", ours)
	}
}

func TestIndexLife(t *testing.T) {
	t.Parallel()
	c := setup(t)
	for name, l := range map[string]corpus.Layout{
		"all heads": allHeads,
		"float16":   {Vectors: corpus.Dense, Dim: 8, DenseType: "float16", OnDisk: true},
		"scalar":    {Vectors: corpus.Dense, Dim: 8, Quantization: "scalar"},
		"binary":    {Vectors: corpus.Dense | corpus.ColBERT, Dim: 8, ColBERTDim: 8, Quantization: "binary"},
		"sparse":    {Vectors: corpus.SparseHead},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ix := makeIndex(t, c, l)
			must0(t, c.CreateIndex(t.Context(), ix)) // again
			exists, drift, err := c.DescribeIndex(t.Context(), ix)
			if err != nil || !exists || len(drift) != 0 {
				t.Errorf("%v %v %v", exists, drift, err)
			}
			must0(t, c.DropIndex(t.Context(), ix))
			must0(t, c.DropIndex(t.Context(), ix)) // again
			if exists, _, err := c.DescribeIndex(t.Context(), ix); err != nil || exists {
				t.Errorf("dropped: %v %v", exists, err)
			}
			// A write never creates.
			err = c.InsertPoints(t.Context(), ix, []corpus.Point{makePoint(ix, 1, 1, 1, nil)})
			if corpus.KindOf(err) != corpus.NotFound || corpus.CodeOf(err) != CodeNotFound {
				t.Errorf("got %v", err)
			}
			if exists, _, err := c.DescribeIndex(t.Context(), ix); err != nil || exists {
				t.Errorf("a write made it: %v %v", exists, err)
			}
		})
	}
}

func TestDriftIsNamed(t *testing.T) {
	t.Parallel()
	c := setup(t)
	ix := makeIndex(t, c, allHeads)
	for what, change := range map[string]func(*corpus.Layout){
		"vector dense: size":            func(l *corpus.Layout) { l.Dim++ },
		"vector colbert: size":          func(l *corpus.Layout) { l.ColBERTDim++ },
		"vector dense: quantization":    func(l *corpus.Layout) { l.Quantization = "scalar" },
		"vector dense: storage type":    func(l *corpus.Layout) { l.DenseType = "float16" },
		"vector dense: on disk":         func(l *corpus.Layout) { l.OnDisk = true },
		"vector colbert: not one of":    func(l *corpus.Layout) { l.Vectors &^= corpus.ColBERT },
		"sparse vector sparse: not one": func(l *corpus.Layout) { l.Vectors &^= corpus.SparseHead },
		"payload index on m.lang":       func(l *corpus.Layout) { l.Fields["lang"] = corpus.Integer },
		"payload index on m.new":        func(l *corpus.Layout) { l.Fields["new"] = corpus.Integer },
	} {
		other := ix
		other.Layout.Fields = map[string]corpus.FieldType{"lang": corpus.Keyword}
		change(&other.Layout)
		exists, drift, err := c.DescribeIndex(t.Context(), other)
		if err != nil || !exists || !slices.ContainsFunc(drift, func(d string) bool { return strings.HasPrefix(d, what) }) {
			t.Errorf("%s: %v %q %v", what, exists, drift, err)
		}
		if strings.HasPrefix(what, "payload") {
			continue
		}
		if err := c.CreateIndex(t.Context(), other); corpus.KindOf(err) != corpus.Conflict || corpus.CodeOf(err) != "index_exists" {
			t.Errorf("%s: creating over it: %v", what, err)
		}
	}
}

// TestPayloadIndexesAreAdded: those that are missing, and nothing else.
func TestPayloadIndexesAreAdded(t *testing.T) {
	t.Parallel()
	c := setup(t)
	ix := makeIndex(t, c, allHeads)
	wider := ix
	wider.Layout.Fields = map[string]corpus.FieldType{"lang": corpus.Integer, "new": corpus.Integer, "a.b": corpus.Keyword}
	must0(t, c.CreatePayloadIndexes(t.Context(), wider))
	must0(t, c.CreatePayloadIndexes(t.Context(), wider)) // again
	_, drift, err := c.DescribeIndex(t.Context(), wider)
	if err != nil || len(drift) != 1 || !strings.HasPrefix(drift[0], "payload index on m.lang: Integer expected") {
		t.Errorf("%q %v", drift, err)
	}
	if _, drift, err := c.DescribeIndex(t.Context(), ix); err != nil || len(drift) != 0 {
		t.Errorf("what was there changed: %q %v", drift, err)
	}
	must0(t, c.DropIndex(t.Context(), ix))
	if err := c.CreatePayloadIndexes(t.Context(), ix); corpus.KindOf(err) != corpus.NotFound {
		t.Errorf("without a collection: %v", err)
	}
	if exists, _, err := c.DescribeIndex(t.Context(), ix); err != nil || exists {
		t.Errorf("it made a collection: %v %v", exists, err)
	}
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	c := setup(t)
	ix := makeIndex(t, c, allHeads)
	md := corpus.Metadata{"lang": "en", "n": int64(1) << 60, "f": 1.5, "whole": 3.0, "nil": nil, "list": []any{"a", int64(1), nil, true}, "deep": map[string]any{"x y": map[string]any{}}}
	var pts []corpus.Point
	for i := range 20 {
		pts = append(pts, makePoint(ix, i, int64(i+1), int64(i+100), md))
	}
	must0(t, c.InsertPoints(t.Context(), ix, pts))
	got := read(t, c, ix, append([]corpus.ID{pid(999)}, ids(pts)...)...)
	if len(got) != len(pts) {
		t.Fatalf("%d points", len(got))
	}
	for _, p := range pts {
		s := got[p.ID]
		if len(s.Unreadable) > 0 || !s.HasOwner || s.Partial {
			t.Errorf("state %+v", s)
		}
		if string(s.Payload.Metadata.JSON()) != string(p.Payload.Metadata.JSON()) {
			t.Errorf("metadata %s", s.Payload.Metadata.JSON())
		}
		a, b := s.Payload, p.Payload
		a.Metadata, b.Metadata = nil, nil
		if fmt.Sprint(a) != fmt.Sprint(b) {
			t.Errorf("payload %v, want %v", a, b)
		}
		if sum := corpus.ChecksumVectors(s.Vectors, ""); sum != s.Payload.Checksum {
			t.Errorf("vectors came back changed: %v, were %v", s.Vectors, p.Vectors)
		}
	}
	light, err := c.ReadPoints(t.Context(), ix, ids(pts), false)
	must0(t, err)
	for _, s := range light {
		if s.Vectors != nil || s.Payload.Metadata != nil || len(s.Unreadable) > 0 || s.Payload.Gen == 0 {
			t.Errorf("light read: %+v", s)
		}
	}
}

func ids(pts []corpus.Point) (out []corpus.ID) {
	for _, p := range pts {
		out = append(out, p.ID)
	}
	return out
}

func TestFloat16ChecksumMatchesWhatIsStored(t *testing.T) {
	t.Parallel()
	c := setup(t)
	ix := makeIndex(t, c, corpus.Layout{Vectors: corpus.Dense | corpus.ColBERT, Dim: 16, ColBERTDim: 8, DenseType: "float16"})
	var pts []corpus.Point
	for i := range 50 {
		pts = append(pts, makePoint(ix, i, 1, 1, nil))
	}
	must0(t, c.InsertPoints(t.Context(), ix, pts))
	for _, s := range read(t, c, ix, ids(pts)...) {
		if corpus.ChecksumVectors(s.Vectors, "float16") != s.Payload.Checksum || corpus.ChecksumVectors(s.Vectors, "") != s.Payload.Checksum {
			t.Errorf("checksum of %v", s.Vectors)
		}
	}
}

func TestGuards(t *testing.T) {
	t.Parallel()
	c := setup(t)
	ix := makeIndex(t, c, allHeads)
	ctx := t.Context()
	expect := func(n int, gen, version int64, lang string) {
		t.Helper()
		s := read(t, c, ix, pid(n))[pid(n)]
		if s.Payload.Gen != gen || s.Payload.MetaVersion != version || s.Payload.Metadata["lang"] != lang {
			t.Errorf("point %d: gen %d version %d lang %v, want %d %d %s", n, s.Payload.Gen, s.Payload.MetaVersion, s.Payload.Metadata["lang"], gen, version, lang)
		}
	}
	lang := func(l string) corpus.Metadata { return corpus.Metadata{"lang": l} }
	must0(t, c.InsertPoints(ctx, ix, []corpus.Point{makePoint(ix, 1, 1, 10, lang("a")), makePoint(ix, 2, 2, 20, lang("a"))}))
	must0(t, c.InsertPoints(ctx, ix, []corpus.Point{makePoint(ix, 1, 5, 50, lang("b")), makePoint(ix, 3, 3, 30, lang("b"))}))
	expect(1, 1, 10, "a")
	expect(3, 3, 30, "b")

	// One call, bounds per document: 1 is admitted (equal), 2 is not (lower), 4 is new.
	must0(t, c.RewritePoints(ctx, ix, []corpus.Point{makePoint(ix, 1, 6, 10, lang("c")), makePoint(ix, 2, 7, 19, lang("c")), makePoint(ix, 4, 8, 1, lang("c"))}))
	expect(1, 6, 10, "c")
	expect(2, 2, 20, "a")
	expect(4, 8, 1, "c")

	must0(t, c.SetMetadata(ctx, ix, []corpus.MetadataWrite{
		{Points: []corpus.ID{pid(1), pid(77)}, MetaVersion: 11, Metadata: corpus.Metadata{"lang": "d", "new": int64(1)}},
		{Points: []corpus.ID{pid(2)}, MetaVersion: 20, Metadata: lang("d")},
		{Points: []corpus.ID{pid(3), pid(4)}, MetaVersion: 29, Metadata: lang("d")},
	}))
	expect(1, 6, 11, "d")
	expect(2, 2, 20, "a")
	expect(3, 3, 30, "b")
	expect(4, 8, 29, "d")
	if s := read(t, c, ix, pid(77)); len(s) != 0 {
		t.Error("metadata made a point")
	}
	// Removed keys go.
	must0(t, c.SetMetadata(ctx, ix, []corpus.MetadataWrite{{Points: []corpus.ID{pid(1)}, MetaVersion: 12, Metadata: lang("e")}}))
	if s := read(t, c, ix, pid(1))[pid(1)]; len(s.Payload.Metadata) != 1 {
		t.Errorf("removed key left behind: %v", s.Payload.Metadata)
	}
	// A version nobody can read does not protect.
	for i, broken := range []*qc.Value{qc.NewValueString("x"), qc.NewValueDouble(1e300), qc.NewValueNull(), qc.NewValueBool(true)} {
		raw(t, c, ix, pid(1), map[string]*qc.Value{corpus.KeyMetaVersion: broken})
		if s := read(t, c, ix, pid(1))[pid(1)]; !slices.Contains(s.Unreadable, corpus.KeyMetaVersion) {
			t.Errorf("unreadable: %v", s.Unreadable)
		}
		v := int64(100 + 2*i)
		if i%2 == 0 {
			must0(t, c.SetMetadata(ctx, ix, []corpus.MetadataWrite{{Points: []corpus.ID{pid(1)}, MetaVersion: v, Metadata: lang("f")}}))
		} else {
			must0(t, c.RewritePoints(ctx, ix, []corpus.Point{makePoint(ix, 1, 6, v, lang("f"))}))
		}
		expect(1, 6, v, "f")
	}
	must0(t, c.DeletePoints(ctx, ix, []corpus.ID{pid(1), pid(2), pid(555)}))
	if s := read(t, c, ix, pid(1), pid(2), pid(3)); len(s) != 1 {
		t.Errorf("after the delete: %d points", len(s))
	}
}

func raw(t *testing.T, c *Client, ix corpus.Index, id corpus.ID, payload map[string]*qc.Value) {
	t.Helper()
	_, err := c.api.SetPayload(t.Context(), &qc.SetPayloadPoints{
		CollectionName: ix.QdrantName, Wait: qc.PtrOf(true), Payload: payload, PointsSelector: qc.NewPointsSelector(pointID(id)),
	})
	must0(t, err)
}

func TestScrollFacetCountStamp(t *testing.T) {
	t.Parallel()
	c := setup(t)
	ix := makeIndex(t, c, allHeads)
	ctx := t.Context()
	stamp := corpus.Stamp{Installation: owner, Nonce: another, At: time.Date(2026, 11, 23, 1, 2, 3, 4000, time.UTC)}
	if _, ok, err := c.ReadStamp(ctx, ix); err != nil || ok {
		t.Errorf("a stamp on a new index: %v %v", ok, err)
	}
	must0(t, c.WriteStamp(ctx, ix, stamp))
	if got, ok, err := c.ReadStamp(ctx, ix); err != nil || !ok || got != stamp {
		t.Errorf("stamp %+v %v %v", got, ok, err)
	}
	if n, err := c.CountPoints(ctx, ix); err != nil || n != 0 {
		t.Errorf("an empty index counts %d, %v", n, err)
	}
	var pts []corpus.Point
	for i := range 700 {
		pts = append(pts, makePoint(ix, i, int64(i+1), 1, corpus.Metadata{"i": int64(i)}))
	}
	foreign := pts[650:]
	for i := range foreign {
		foreign[i].Payload.Owner = another
	}
	must0(t, c.InsertPoints(ctx, ix, pts))
	_, err := c.api.Upsert(ctx, &qc.UpsertPoints{CollectionName: ix.QdrantName, Wait: qc.PtrOf(true), Points: []*qc.PointStruct{
		{Id: qc.NewIDNum(5), Vectors: qc.NewVectorsMap(nil)}, {Id: pointID(pid(5000)), Vectors: qc.NewVectorsMap(nil)},
	}})
	must0(t, err)

	for _, depth := range []corpus.Depth{corpus.Quick, corpus.Full, corpus.Deep} {
		for _, limit := range []int{1, 7, 100, 10000} {
			if limit == 1 && depth != corpus.Quick {
				continue
			}
			var all []corpus.PointState
			from := corpus.ID{}
			for {
				page, next, err := c.Scroll(ctx, ix, from, limit, depth)
				must0(t, err)
				if len(page) > limit {
					t.Fatalf("a page of %d, limit %d", len(page), limit)
				}
				all = append(all, page...)
				if next == nil {
					break
				}
				from = *next
			}
			if len(all) != 701 {
				t.Errorf("%s, limit %d: %d points", depth, limit, len(all))
			}
			if !slices.IsSortedFunc(all, func(a, b corpus.PointState) int { return a.ID.Compare(b.ID) }) {
				t.Error("not ascending")
			}
			last := all[len(all)-1]
			if depth != corpus.Quick && (last.HasOwner || len(last.Unreadable) == 0) {
				t.Errorf("an unsigned point reads as %+v", last)
			}
			s := all[3]
			if (s.Payload.Gen == 4) != (depth != corpus.Quick) || (s.Vectors != nil) != (depth == corpus.Deep) || (s.Payload.Metadata != nil) != (depth == corpus.Deep) {
				t.Errorf("%s reads %+v", depth, s)
			}
		}
	}
	page, next, err := c.Scroll(ctx, ix, pid(698), 10, corpus.Quick)
	if err != nil || len(page) != 3 || page[0].ID != pid(698) || next != nil {
		t.Errorf("from the middle: %v %v %v", page, next, err)
	}

	buckets, err := c.FacetBuckets(ctx, ix)
	must0(t, err)
	want := map[uint32]int64{}
	for _, p := range pts[:650] {
		want[p.Payload.Bucket]++
	}
	if fmt.Sprint(buckets) != fmt.Sprint(want) {
		t.Error("facets differ")
	}
	if n, err := c.CountPoints(ctx, ix); err != nil || n != 702 {
		t.Errorf("count %d %v", n, err)
	}
	found, err := c.FindGenAbove(ctx, ix, 640, [][2]int64{{5, 7}, {100, 100}}, 1000)
	must0(t, err)
	var gens []int64
	for _, s := range found {
		gens = append(gens, s.Payload.Gen)
	}
	slices.Sort(gens)
	if fmt.Sprint(gens) != "[5 6 7 100 641 642 643 644 645 646 647 648 649 650]" {
		t.Errorf("gens %v", gens)
	}
	if few, err := c.FindGenAbove(ctx, ix, 0, nil, 3); err != nil || len(few) != 3 {
		t.Errorf("limited: %d %v", len(few), err)
	}
	res, err := c.Query(ctx, ix, corpus.IndexQuery{Head: corpus.Dense, Vectors: &pts[0].Vectors, Limit: 2000, Exact: true})
	if err != nil || len(res) != 700 || slices.ContainsFunc(res, func(c corpus.Candidate) bool { return c.ID == stampID }) {
		t.Errorf("query: %d %v", len(res), err)
	}
}

func TestOwnerMustBeKnown(t *testing.T) {
	t.Parallel()
	c := open(t, Config{URL: "http://" + qdranttest.Own(t)})
	c.SetOwner(corpus.ID{})
	ix := makeIndex(t, c, allHeads)
	if _, err := c.FacetBuckets(t.Context(), ix); corpus.CodeOf(err) != "owner_unset" {
		t.Errorf("got %v", err)
	}
	if _, err := c.FindGenAbove(t.Context(), ix, 1, nil, 1); corpus.CodeOf(err) != "owner_unset" {
		t.Errorf("got %v", err)
	}
}

func TestQueries(t *testing.T) {
	t.Parallel()
	c := setup(t)
	ix := makeIndex(t, c, allHeads)
	rng := rand.New(rand.NewPCG(1, 2))
	var pts []corpus.Point
	for i := range 200 {
		pts = append(pts, makePoint(ix, i, 1, 1, corpus.Metadata{"lang": []any{"en", "de"}[i%2]}))
	}
	must0(t, c.InsertPoints(t.Context(), ix, pts))
	score := func(h corpus.Heads, q, v *corpus.Vectors) float64 {
		switch h {
		case corpus.Dense:
			return dot(q.Dense, v.Dense)
		case corpus.SparseHead:
			var s float64
			for i, x := range q.Sparse.Indices {
				if j, ok := slices.BinarySearch(v.Sparse.Indices, x); ok {
					s += float64(q.Sparse.Values[i]) * float64(v.Sparse.Values[j])
				}
			}
			return s
		}
		var sum float64
		for _, a := range q.ColBERT {
			best := -1e9
			for _, b := range v.ColBERT {
				best = max(best, dot(a, b))
			}
			sum += best
		}
		return sum
	}
	q := vectors(rng, ix.Layout)
	exclude := []corpus.ID{pid(0), pid(2)}
	filter := &corpus.Filter{Must: []corpus.Condition{{Key: "lang", Match: "en"}}}
	brute := func(h corpus.Heads, among map[corpus.ID]bool, limit int) []corpus.Candidate {
		var out []corpus.Candidate
		for i := range pts {
			s := score(h, &q, &pts[i].Vectors)
			if i%2 == 0 && !slices.Contains(exclude, pts[i].ID) && (among == nil || among[pts[i].ID]) && (h != corpus.SparseHead || s > 0) {
				out = append(out, corpus.Candidate{ID: pts[i].ID, Score: s})
			}
		}
		slices.SortStableFunc(out, func(a, b corpus.Candidate) int {
			if a.Score > b.Score {
				return -1
			}
			return 1
		})
		return out[:min(limit, len(out))]
	}
	same := func(name string, got, want []corpus.Candidate) {
		t.Helper()
		if len(got) != len(want) {
			t.Fatalf("%s: %d candidates, want %d", name, len(got), len(want))
		}
		for i := range got {
			if d := got[i].Score - want[i].Score; d > 1e-5 || d < -1e-5 {
				t.Errorf("%s: place %d: %v, want %v", name, i, got[i], want[i])
			}
		}
	}
	var batch []corpus.IndexQuery
	heads := []corpus.Heads{corpus.Dense, corpus.SparseHead, corpus.ColBERT}
	for _, h := range heads {
		batch = append(batch, corpus.IndexQuery{Head: h, Vectors: &q, Filter: filter, Exclude: exclude, Limit: 10, Exact: true})
	}
	batch = append(batch,
		corpus.IndexQuery{Head: corpus.SparseHead, Vectors: &corpus.Vectors{Sparse: &corpus.Sparse{}}, Limit: 10},
		corpus.IndexQuery{Head: corpus.ColBERT, Vectors: &q, Filter: filter, Exclude: exclude, Limit: 50, Exact: true,
			Among: []corpus.IndexPrefetch{{Head: corpus.Dense, Limit: 5}, {Head: corpus.SparseHead, Limit: 6}}},
	)
	got, err := c.QueryBatch(t.Context(), ix, batch)
	must0(t, err)
	union := map[corpus.ID]bool{}
	for i, h := range heads {
		same(h.String(), got[i], brute(h, nil, 10))
	}
	if len(got[3]) != 0 {
		t.Errorf("a query without terms found %d", len(got[3]))
	}
	for _, p := range []struct {
		h corpus.Heads
		n int
	}{{corpus.Dense, 5}, {corpus.SparseHead, 6}} {
		for _, x := range brute(p.h, nil, p.n) {
			union[x.ID] = true
		}
	}
	same("among", got[4], brute(corpus.ColBERT, union, 50))

	threshold := got[0][4].Score
	some, err := c.Query(t.Context(), ix, corpus.IndexQuery{Head: corpus.Dense, Vectors: &q, Filter: filter, Exclude: exclude, Limit: 10, Exact: true, Threshold: &threshold})
	if err != nil || len(some) < 4 || len(some) > 5 {
		t.Errorf("threshold: %d, %v", len(some), err)
	}
	for name, bad := range map[string]corpus.IndexQuery{
		"no limit":       {Head: corpus.Dense, Vectors: &q},
		"no vector":      {Head: corpus.Dense, Vectors: &corpus.Vectors{}, Limit: 1},
		"nil vectors":    {Head: corpus.Dense, Limit: 1},
		"wrong size":     {Head: corpus.Dense, Vectors: &corpus.Vectors{Dense: []float32{1}}, Limit: 1},
		"not finite":     {Head: corpus.Dense, Vectors: &corpus.Vectors{Dense: []float32{1, 2, 3, float32(inf())}}, Limit: 1},
		"ragged sparse":  {Head: corpus.SparseHead, Vectors: &corpus.Vectors{Sparse: &corpus.Sparse{Indices: []uint32{1}}}, Limit: 1},
		"ragged colbert": {Head: corpus.ColBERT, Vectors: &corpus.Vectors{ColBERT: [][]float32{{1}}}, Limit: 1},
		"empty colbert":  {Head: corpus.ColBERT, Vectors: &corpus.Vectors{ColBERT: [][]float32{}}, Limit: 1},
		"bad filter":     {Head: corpus.Dense, Vectors: &q, Limit: 1, Filter: &corpus.Filter{Must: []corpus.Condition{{Key: `a"b`, Match: "x"}}}},
	} {
		if _, err := c.Query(t.Context(), ix, bad); corpus.KindOf(err) != corpus.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func inf() float64 { return math.Inf(1) }

func dot(a, b []float32) (s float64) {
	for i := range a {
		s += float64(a[i]) * float64(b[i])
	}
	return s
}

// counted is an embedded server behind a proxy that counts and breaks.
func counted(t *testing.T, cfg Config) (*Client, *faults.Index, *faults.Script) {
	t.Helper()
	script := faults.NewScript()
	p, err := faults.NewIndex(qdranttest.Own(t), script, nil)
	must0(t, err)
	t.Cleanup(func() { must0(t, p.Close()) })
	cfg.URL = p.URL()
	return open(t, cfg), p, script
}

func TestBatchesAreCutAndPartlyDone(t *testing.T) {
	t.Parallel()
	for name, write := range map[string]func(*Client) func(context.Context, corpus.Index, []corpus.Point) error{
		"upsert":      func(c *Client) func(context.Context, corpus.Index, []corpus.Point) error { return c.InsertPoints },
		"updatebatch": func(c *Client) func(context.Context, corpus.Index, []corpus.Point) error { return c.RewritePoints },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, p, script := counted(t, Config{MaxBatchPoints: 10})
			ix := makeIndex(t, c, allHeads)
			var pts []corpus.Point
			for i := range 35 {
				pts = append(pts, makePoint(ix, i, 1, int64(i/3), nil))
			}
			pts[4].Vectors.Dense = pts[4].Vectors.Dense[:2] // does not fit
			pts[5].Vectors.ColBERT = make([][]float32, corpus.MaxColBERTValues)
			for i := range pts[5].Vectors.ColBERT {
				pts[5].Vectors.ColBERT[i] = []float32{1, 2, 3}
			}
			pts[6].ID = stampID
			script.Add(faults.Rule{Op: name, Skip: 2, Fault: faults.Fault{Kind: faults.DropReply}})
			err := write(c)(t.Context(), ix, pts)
			var partial *corpus.PartialError
			if !errors.As(err, &partial) || corpus.KindOf(err) != corpus.Unavailable {
				t.Fatalf("got %v", err)
			}
			// 32 fit: 10, 10, lost.
			if len(partial.Done) != 20 || len(partial.Refused) != 3 || p.Counts()[faults.DropReply] != 1 {
				t.Errorf("done %d, refused %v, %v", len(partial.Done), partial.Refused, p.Counts())
			}
			for _, n := range []corpus.ID{pid(4), pid(5), stampID} {
				if corpus.KindOf(partial.Refused[n]) != corpus.Invalid {
					t.Errorf("%s: %v", n, partial.Refused[n])
				}
			}
			for _, id := range partial.Done {
				if partial.Refused[id] != nil {
					t.Error("done and refused")
				}
			}
			if got := len(read(t, c, ix, partial.Done...)); got != 20 {
				t.Errorf("%d of 20 done points are there", got)
			}
			// Again: all that fit.
			err = write(c)(t.Context(), ix, pts)
			if !errors.As(err, &partial) || len(partial.Done) != 32 || corpus.KindOf(err) != corpus.Invalid {
				t.Errorf("again: %v", err)
			}
		})
	}
}

func TestBytesCutBatches(t *testing.T) {
	t.Parallel()
	c, _, script := counted(t, Config{MaxBatchBytes: 3000})
	ix := makeIndex(t, c, corpus.Layout{Vectors: corpus.Dense, Dim: 250})
	var pts []corpus.Point
	for i := range 9 {
		pts = append(pts, makePoint(ix, i, 1, 1, nil)) // about 1.2 kB each: two a request
	}
	pts[3].Payload.Metadata = corpus.Metadata{"big": strings.Repeat("x", 5000)} // alone
	script.Add(faults.Rule{Op: "upsert", Skip: 5, Times: -1, Fault: faults.Fault{Kind: faults.DropRequest}})
	err := c.InsertPoints(t.Context(), ix, pts)
	var partial *corpus.PartialError
	// 0,1 | 2 | 3 | 4,5 | 6,7 | 8
	if !errors.As(err, &partial) || len(partial.Done) != 8 {
		t.Errorf("got %v", err)
	}
}

// Only Completed is done; every class of error becomes the kind that its reader expects.
func TestErrors(t *testing.T) {
	t.Parallel()
	c, p, script := counted(t, Config{})
	ix := makeIndex(t, c, corpus.Layout{Vectors: corpus.Dense, Dim: 2})
	n := 0
	for _, x := range []struct {
		fault faults.Fault
		kind  corpus.Kind
		code  string
		retry time.Duration
	}{
		{faults.Fault{Kind: faults.WaitTimeout}, corpus.Unavailable, CodeUnknown, 0},
		{faults.Fault{Kind: faults.Acknowledged}, corpus.Unavailable, CodeUnknown, 0},
		{faults.Fault{Kind: faults.DropReply}, corpus.Unavailable, "index_unavailable", 0},
		{faults.Fault{Kind: faults.Hold}, corpus.Unavailable, "index_timeout", 0},
		{faults.Fault{Kind: faults.Refuse, Class: "rate_limited", RetryAfter: 7}, corpus.Overloaded, CodeRateLimited, 7 * time.Second},
		{faults.Fault{Kind: faults.Refuse, Class: "storage_full"}, corpus.Unavailable, CodeStorageFull, retryFull},
		{faults.Fault{Kind: faults.Refuse, Class: "invalid"}, corpus.Invalid, CodeRefused, 0},
		{faults.Fault{Kind: faults.Refuse, Class: "not_found"}, corpus.NotFound, CodeNotFound, 0},
		{faults.Fault{Kind: faults.Refuse, Class: "precondition"}, corpus.Unavailable, "index_locked", 0},
		{faults.Fault{Kind: faults.Refuse, Class: "timeout"}, corpus.Unavailable, "index_timeout", 0},
		{faults.Fault{Kind: faults.Refuse, Class: "unavailable"}, corpus.Unavailable, "index_unavailable", 0},
		{faults.Fault{Kind: faults.Refuse, Class: "denied"}, corpus.Unavailable, "index_credentials", 0},
		{faults.Fault{Kind: faults.Refuse, Class: "internal"}, corpus.Unavailable, "index_failed", 0},
		{faults.Fault{Kind: faults.Refuse, Class: "data_loss"}, corpus.Unavailable, "index_failed", 0},
		{faults.Fault{Kind: faults.Refuse, Class: "unimplemented"}, corpus.Conflict, "index_unsupported", 0},
	} {
		for op, call := range map[string]func() error{
			"upsert":      func() error { return c.InsertPoints(t.Context(), ix, []corpus.Point{makePoint(ix, 1, 1, 1, nil)}) },
			"delete":      func() error { return c.DeletePoints(t.Context(), ix, []corpus.ID{pid(1)}) },
			"updatebatch": func() error { return c.RewritePoints(t.Context(), ix, []corpus.Point{makePoint(ix, 1, 1, 1, nil)}) },
		} {
			script.Add(faults.Rule{Op: op, Fault: x.fault})
			err := call()
			n++
			var e *corpus.Error
			if corpus.KindOf(err) != x.kind || corpus.CodeOf(err) != x.code || !errors.As(err, &e) || e.RetryAfter != x.retry {
				t.Errorf("%s %s %s: kind %s code %s: %v", op, x.fault.Kind, x.fault.Class, corpus.KindOf(err), corpus.CodeOf(err), err)
			}
			if err := call(); err != nil {
				t.Errorf("%s after %s: %v", op, x.fault.Kind, err)
			}
		}
	}
	total := 0
	for _, k := range p.Counts() {
		total += k
	}
	if total != n {
		t.Errorf("%d faults reached their target, %d were set", total, n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.DeletePoints(ctx, ix, []corpus.ID{pid(1)}); corpus.KindOf(err) != corpus.Unavailable {
		t.Errorf("cancelled: %v", err)
	}
}

func TestNobodyThere(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must0(t, err)
	addr := l.Addr().String()
	must0(t, l.Close())
	c := open(t, Config{URL: "http://" + addr})
	if err := c.Ping(t.Context()); corpus.KindOf(err) != corpus.Unavailable || corpus.CodeOf(err) != "index_unavailable" {
		t.Errorf("got %v", err)
	}
}

func TestAPIKeyIsSentAndNeverShown(t *testing.T) {
	t.Parallel()
	s, err := qdrantlocal.Open(t.TempDir(), qdrantlocal.Options{APIKey: "hush-hush"})
	must0(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must0(t, err)
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() { must0(t, s.Close()); wg.Wait() })
	c := open(t, Config{URL: "http://" + l.Addr().String(), APIKey: "hush-hush"})
	makeIndex(t, c, allHeads)
	wrong := open(t, Config{URL: "http://" + l.Addr().String(), APIKey: "hush-wrong"})
	_, err = wrong.ListOurCollections(t.Context(), Prefix)
	if corpus.CodeOf(err) != "index_credentials" || strings.Contains(err.Error(), "hush") {
		t.Errorf("got %v", err)
	}
}
