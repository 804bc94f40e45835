package storetest

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc/codes"
)

// scored is a point with its score, as the test or the server computed it.
type scored struct {
	id    uint64
	score float64
}

// rank sorts by score, better first. Equal scores are sorted by id.
func rank(in []scored, smallerIsBetter bool) []scored {
	slices.SortFunc(in, func(a, b scored) int {
		c := cmp.Compare(b.score, a.score)
		if smallerIsBetter {
			c = -c
		}
		if c != 0 {
			return c
		}
		return cmp.Compare(a.id, b.id)
	})
	return in
}

func (s *suite) query(name string, q *qdrant.QueryPoints) []scored {
	s.Helper()
	q.CollectionName = name
	hits, err := s.c.Query(s.ctx, q)
	s.must(err)
	return fromHits(hits)
}

func fromHits(hits []*qdrant.ScoredPoint) []scored {
	var out []scored
	for _, h := range hits {
		out = append(out, scored{h.GetId().GetNum(), float64(h.GetScore())})
	}
	return out
}

func close64(a, b float64) bool {
	return math.Abs(a-b) <= tolerance*math.Max(1, math.Max(math.Abs(a), math.Abs(b)))
}

// wantRanked compares results with the whole ranking that was computed here: place for
// place the scores agree, and each point has its own score. Points of nearly equal scores
// may stand in any order.
func (s *suite) wantRanked(what string, got, all []scored, offset, limit int) {
	s.Helper()
	want := all[min(offset, len(all)):min(offset+limit, len(all))]
	if len(got) != len(want) {
		s.Errorf("%s: %d results, want %d\ngot  %v\nwant %v", what, len(got), len(want), got, want)
		return
	}
	own := map[uint64]float64{}
	for _, x := range all {
		own[x.id] = x.score
	}
	seen := map[uint64]bool{}
	for i, g := range got {
		score, known := own[g.id]
		if !known || seen[g.id] || !close64(g.score, score) || !close64(g.score, want[i].score) {
			s.Errorf("%s: place %d is %v, want %v (its own score is %v)", what, i, g, want[i], score)
			return
		}
		seen[g.id] = true
	}
}

func randomVector(r *rand.Rand, n int) []float32 {
	v := make([]float32, n)
	for i := range v {
		v[i] = float32(r.NormFloat64())
	}
	return v
}

func dot(a, b []float32) float64 {
	var sum float64
	for i := range a {
		sum += float64(a[i]) * float64(b[i])
	}
	return sum
}

func unit(v []float32) []float32 {
	n := math.Sqrt(dot(v, v))
	out := make([]float32, len(v))
	for i := range v {
		out[i] = float32(float64(v[i]) / n)
	}
	return out
}

// reference computes a score of the API in double precision.
func reference(d qdrant.Distance, a, b []float32) float64 {
	switch d {
	case qdrant.Distance_Cosine:
		return dot(unit(a), unit(b))
	case qdrant.Distance_Dot:
		return dot(a, b)
	}
	var sum float64
	for i := range a {
		x := float64(a[i]) - float64(b[i])
		if d == qdrant.Distance_Euclid {
			sum += x * x
		} else {
			sum += math.Abs(x)
		}
	}
	if d == qdrant.Distance_Euclid {
		return math.Sqrt(sum)
	}
	return sum
}

func smaller(d qdrant.Distance) bool {
	return d == qdrant.Distance_Euclid || d == qdrant.Distance_Manhattan
}

func (s *suite) distances() {
	r := s.random()
	for _, d := range []qdrant.Distance{qdrant.Distance_Cosine, qdrant.Distance_Dot, qdrant.Distance_Euclid, qdrant.Distance_Manhattan} {
		for _, dim := range []int{1, 3, 8, 33, 384} {
			name := s.plain(uint64(dim), d)
			var ps []*qdrant.PointStruct
			vs := make([][]float32, 200)
			for i := range vs {
				vs[i] = randomVector(r, dim)
				ps = append(ps, &qdrant.PointStruct{Id: num(uint64(i)), Vectors: qdrant.NewVectorsDense(slices.Clone(vs[i]))})
			}
			s.upsert(name, ps...)
			for range 3 {
				q := randomVector(r, dim)
				var all []scored
				for i, v := range vs {
					all = append(all, scored{uint64(i), reference(d, q, v)})
				}
				all = rank(all, smaller(d))
				got := s.query(name, &qdrant.QueryPoints{Query: qdrant.NewQueryDense(q), Limit: qdrant.PtrOf(uint64(20)), Offset: qdrant.PtrOf(uint64(5))})
				s.wantRanked(fmt.Sprintf("%v of %d", d, dim), got, all, 5, 20)
				// A threshold between two scores cuts there.
				cut := float32((all[6].score + all[7].score) / 2)
				if math.Abs(all[6].score-all[7].score) > 1e-3 {
					got = s.query(name, &qdrant.QueryPoints{Query: qdrant.NewQueryDense(q), Limit: qdrant.PtrOf(uint64(20)), ScoreThreshold: &cut})
					s.wantRanked(fmt.Sprintf("%v of %d over %v", d, dim, cut), got, all[:7], 0, 20)
				}
			}
		}
	}
}

func (s *suite) nearest() {
	name := s.plain(2, qdrant.Distance_Dot)
	var ps []*qdrant.PointStruct
	for i := range uint64(100) {
		ps = append(ps, &qdrant.PointStruct{Id: num(i), Vectors: qdrant.NewVectors(float32(i), 0), Payload: qdrant.NewValueMap(map[string]any{"odd": i%2 == 1, "i": i})})
	}
	s.upsert(name, ps...)
	q := qdrant.NewQuery(1, 0)
	if got := s.query(name, &qdrant.QueryPoints{Query: q}); len(got) != 10 || got[0] != (scored{99, 99}) || got[9] != (scored{90, 90}) {
		s.Errorf("default limit: %v", got)
	}
	odd := &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewMatchBool("odd", true)}}
	if got := s.query(name, &qdrant.QueryPoints{Query: q, Filter: odd, Limit: qdrant.PtrOf(uint64(3)), Offset: qdrant.PtrOf(uint64(1))}); !slices.Equal(got, []scored{{97, 97}, {95, 95}, {93, 93}}) {
		s.Errorf("filter and offset: %v", got)
	}
	if got := s.query(name, &qdrant.QueryPoints{Query: q, Offset: qdrant.PtrOf(uint64(1000))}); len(got) != 0 {
		s.Errorf("offset beyond the end: %v", got)
	}
	if got := s.query(name, &qdrant.QueryPoints{Query: q, Limit: qdrant.PtrOf(uint64(1000))}); len(got) != 100 {
		s.Errorf("limit beyond the end: %d points", len(got))
	}
	if got := s.query(name, &qdrant.QueryPoints{Query: q, ScoreThreshold: qdrant.PtrOf(float32(97))}); !slices.Equal(got, []scored{{99, 99}, {98, 98}}) {
		s.Errorf("a threshold must be passed, not met: %v", got)
	}
	known := &qdrant.Filter{MustNot: []*qdrant.Condition{qdrant.NewHasID(nums(99, 98, 96)...)}}
	if got := s.query(name, &qdrant.QueryPoints{Query: q, Filter: known, Limit: qdrant.PtrOf(uint64(2))}); !slices.Equal(got, []scored{{97, 97}, {95, 95}}) {
		s.Errorf("known ids excluded: %v", got)
	}
	hits, err := s.c.Query(s.ctx, &qdrant.QueryPoints{CollectionName: name, Query: q, Limit: qdrant.PtrOf(uint64(1))})
	s.must(err)
	if len(hits[0].GetPayload()) != 0 || hits[0].GetVectors() != nil {
		s.Errorf("without selectors a hit holds %v", hits[0])
	}
	hits, err = s.c.Query(s.ctx, &qdrant.QueryPoints{
		CollectionName: name, Query: q, Limit: qdrant.PtrOf(uint64(1)),
		WithPayload: qdrant.NewWithPayloadInclude("i"), WithVectors: qdrant.NewWithVectors(true),
	})
	s.must(err)
	if payloadText(s.T, hits[0].GetPayload()) != `{"i":99}` || !near(hits[0].GetVectors().GetVector().GetDenseVector().GetData(), 99, 0) {
		s.Errorf("with selectors a hit holds %v", hits[0])
	}
	// Points without the vector are not found; points rewritten are found as they are now.
	mixed := s.hybrid()
	s.upsert(mixed,
		&qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{"dense": qdrant.NewVector(1, 0, 0, 0)})},
		&qdrant.PointStruct{Id: num(2), Vectors: qdrant.NewVectorsMap(nil)},
		&qdrant.PointStruct{Id: num(3), Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{"dense": qdrant.NewVector(2, 0, 0, 0)})})
	s.upsert(mixed, &qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{"dense": qdrant.NewVector(3, 0, 0, 0)})})
	if got := s.query(mixed, &qdrant.QueryPoints{Query: qdrant.NewQuery(1, 0, 0, 0), Using: qdrant.PtrOf("dense")}); !slices.Equal(got, []scored{{1, 3}, {3, 2}}) {
		s.Errorf("mixed collection: %v", got)
	}
	// A vector that is not finite is stored and readable. A server may find it, with a score that is
	// no number, or not; either way the others are found beside it.
	nan := s.plain(2, qdrant.Distance_Dot)
	s.upsert(nan,
		&qdrant.PointStruct{Id: num(1), Vectors: qdrant.NewVectors(float32(math.NaN()), 1)},
		&qdrant.PointStruct{Id: num(2), Vectors: qdrant.NewVectors(1, 1)})
	if v := s.read(nan, num(1))["1"].GetVectors().GetVector().GetDenseVector().GetData(); len(v) != 2 || v[0] == v[0] || v[1] != 1 {
		s.Errorf("a vector with a NaN is read as %v", v)
	}
	beside := slices.DeleteFunc(s.query(nan, &qdrant.QueryPoints{Query: q}), func(h scored) bool { return h.id == 1 && math.IsNaN(h.score) })
	if !slices.Equal(beside, []scored{{2, 1}}) {
		s.Errorf("beside a vector with a NaN: %v", beside)
	}
	empty := s.plain(2, qdrant.Distance_Dot)
	if got := s.query(empty, &qdrant.QueryPoints{Query: q}); len(got) != 0 {
		s.Errorf("empty collection: %v", got)
	}
}

// terms makes a sparse vector of n of 50 terms.
func terms(r *rand.Rand, n int) ([]uint32, []float32) {
	var idx []uint32
	var val []float32
	for _, t := range r.Perm(50)[:n] {
		idx = append(idx, uint32(t)*1000003)
		val = append(val, float32(r.Float64()+0.01))
	}
	return idx, val
}

func sparseScore(ai []uint32, av []float32, bi []uint32, bv []float32) (sum float64, common bool) {
	for i, t := range ai {
		if j := slices.Index(bi, t); j >= 0 {
			sum += float64(av[i]) * float64(bv[j])
			common = true
		}
	}
	return sum, common
}

func (s *suite) sparse() {
	r := s.random()
	name := s.hybrid()
	type doc struct {
		idx []uint32
		val []float32
	}
	docs := make([]doc, 300)
	var ps []*qdrant.PointStruct
	for i := range docs {
		docs[i].idx, docs[i].val = terms(r, 1+r.IntN(40))
		ps = append(ps, &qdrant.PointStruct{
			Id:      num(uint64(i)),
			Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{"sparse": qdrant.NewVectorSparse(slices.Clone(docs[i].idx), slices.Clone(docs[i].val))}),
			Payload: qdrant.NewValueMap(map[string]any{"i": i}),
		})
	}
	s.upsert(name, ps...)
	for n := 1; n < 30; n += 4 {
		qi, qv := terms(r, n)
		for _, half := range []bool{false, true} {
			var f *qdrant.Filter
			if half {
				f = &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewRange("i", &qdrant.Range{Lt: qdrant.PtrOf(150.0)})}}
			}
			var all []scored
			for i, d := range docs {
				if half && i >= 150 {
					break
				}
				if score, ok := sparseScore(qi, qv, d.idx, d.val); ok {
					all = append(all, scored{uint64(i), score})
				}
			}
			all = rank(all, false)
			got := s.query(name, &qdrant.QueryPoints{Query: qdrant.NewQuerySparse(slices.Clone(qi), slices.Clone(qv)), Using: qdrant.PtrOf("sparse"), Filter: f, Limit: qdrant.PtrOf(uint64(400))})
			s.wantRanked(fmt.Sprintf("%d terms, filtered %v", n, half), got, all, 0, 400)
		}
	}
	if got := s.query(name, &qdrant.QueryPoints{Query: qdrant.NewQuerySparse([]uint32{7}, []float32{1}), Using: qdrant.PtrOf("sparse")}); len(got) != 0 {
		s.Errorf("a term nobody has finds %v", got)
	}
}

func maxSim(q, d [][]float32) float64 {
	var sum float64
	for _, a := range q {
		best := math.Inf(-1)
		for _, b := range d {
			best = math.Max(best, dot(a, b))
		}
		sum += best
	}
	return sum
}

func (s *suite) multivector() {
	r := s.random()
	name := s.hybrid()
	rows := func(n int) [][]float32 {
		out := make([][]float32, n)
		for i := range out {
			out[i] = randomVector(r, 2)
		}
		return out
	}
	docs := make([][][]float32, 100)
	var ps []*qdrant.PointStruct
	for i := range docs {
		docs[i] = rows(1 + r.IntN(20))
		ps = append(ps, &qdrant.PointStruct{Id: num(uint64(i)), Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{"colbert": qdrant.NewVectorMulti(docs[i])})})
	}
	s.upsert(name, ps...)
	for _, n := range []int{1, 2, 9} {
		q := rows(n)
		var all []scored
		for i, d := range docs {
			all = append(all, scored{uint64(i), maxSim(q, d)})
		}
		all = rank(all, false)
		using := qdrant.PtrOf("colbert")
		s.wantRanked(fmt.Sprintf("%d rows", n), s.query(name, &qdrant.QueryPoints{Query: qdrant.NewQueryMulti(q), Using: using, Limit: qdrant.PtrOf(uint64(30))}), all, 0, 30)
		if n == 1 {
			s.wantRanked("a plain vector", s.query(name, &qdrant.QueryPoints{Query: qdrant.NewQueryDense(q[0]), Using: using, Limit: qdrant.PtrOf(uint64(30))}), all, 0, 30)
		}
	}
}

func (s *suite) queryByID() {
	name := s.plain(2, qdrant.Distance_Cosine)
	for i, v := range [][]float32{{1, 0}, {1, 0.1}, {1, 0.5}, {-1, 0}} {
		s.upsert(name, &qdrant.PointStruct{Id: num(uint64(i)), Vectors: qdrant.NewVectorsDense(v)})
	}
	got := s.query(name, &qdrant.QueryPoints{Query: qdrant.NewQueryID(num(0))})
	if len(got) != 3 || got[0].id != 1 || got[1].id != 2 || got[2].id != 3 {
		s.Errorf("near a point, without it: %v", got)
	}
	_, err := s.c.Query(s.ctx, &qdrant.QueryPoints{CollectionName: name, Query: qdrant.NewQueryID(num(77))})
	s.wantCode(err, codes.NotFound, "near a point that does not exist")
	// The point is left out of fused results too.
	got = s.query(name, &qdrant.QueryPoints{
		Prefetch: []*qdrant.PrefetchQuery{{Query: qdrant.NewQueryID(num(0))}, {Query: qdrant.NewQuery(1, 0)}},
		Query:    qdrant.NewQueryFusion(qdrant.Fusion_RRF),
	})
	if len(got) != 3 || slices.ContainsFunc(got, func(x scored) bool { return x.id == 0 }) {
		s.Errorf("fused: %v", got)
	}
	// Without a query: points in id order.
	got = s.query(name, &qdrant.QueryPoints{Limit: qdrant.PtrOf(uint64(2)), Offset: qdrant.PtrOf(uint64(1))})
	if len(got) != 2 || got[0].id != 1 || got[1].id != 2 {
		s.Errorf("without a query: %v", got)
	}
}

// fused is a collection with two lists of known order: dense ranks 1, 2, 3, ... and sparse
// ranks others.
func (s *suite) fused() (name string, dense, sparse *qdrant.PrefetchQuery) {
	name = s.hybrid()
	scores := map[uint64][2]float32{1: {10, 1}, 2: {9, 7}, 3: {8, 0}, 4: {2, 6.5}, 5: {0, 6}, 6: {1, 3}}
	for _, id := range slices.Sorted(maps.Keys(scores)) {
		v := map[string]*qdrant.Vector{}
		if x := scores[id][0]; x > 0 {
			v["dense"] = qdrant.NewVector(x, 0, 0, 0)
		}
		if x := scores[id][1]; x > 0 {
			v["sparse"] = qdrant.NewVectorSparse([]uint32{1}, []float32{x})
		}
		s.upsert(name, &qdrant.PointStruct{Id: num(id), Vectors: qdrant.NewVectorsMap(v), Payload: qdrant.NewValueMap(map[string]any{"id": id})})
	}
	dense = &qdrant.PrefetchQuery{Query: qdrant.NewQuery(1, 0, 0, 0), Using: qdrant.PtrOf("dense"), Limit: qdrant.PtrOf(uint64(10))}
	sparse = &qdrant.PrefetchQuery{Query: qdrant.NewQuerySparse([]uint32{1}, []float32{1}), Using: qdrant.PtrOf("sparse"), Limit: qdrant.PtrOf(uint64(10))}
	return name, dense, sparse
}

// The orders of fused's two lists.
var (
	denseOrder   = []scored{{1, 10}, {2, 9}, {3, 8}, {4, 2}, {6, 1}}
	sparseOrder  = []scored{{2, 7}, {4, 6.5}, {5, 6}, {6, 3}, {1, 1}}
	fusedMembers = [][]scored{denseOrder, sparseOrder}
)

// referenceRRF is reciprocal rank fusion as Qdrant weighs it.
func referenceRRF(lists [][]scored, k float64, weights ...float64) []scored {
	sum := map[uint64]float64{}
	for i, l := range lists {
		w := 1.0
		if len(weights) > 0 {
			w = weights[i]
		}
		for place, x := range l {
			if w > 0 {
				sum[x.id] += 1 / ((float64(place)+1)/w + k - 1)
			} else {
				sum[x.id] += 0
			}
		}
	}
	return fromSums(sum)
}

func referenceDBSF(lists [][]scored) []scored {
	sum := map[uint64]float64{}
	for _, l := range lists {
		var mean, variance float64
		for _, x := range l {
			mean += x.score / float64(len(l))
		}
		for _, x := range l {
			variance += (x.score - mean) * (x.score - mean) / float64(len(l)-1)
		}
		dev := math.Sqrt(variance)
		for _, x := range l {
			if len(l) < 2 || dev == 0 {
				sum[x.id] += 0.5
				continue
			}
			sum[x.id] += (x.score - mean + 3*dev) / (6 * dev)
		}
	}
	return fromSums(sum)
}

func fromSums(sum map[uint64]float64) []scored {
	var out []scored
	for id, x := range sum {
		out = append(out, scored{id, x})
	}
	return rank(out, false)
}

func (s *suite) fusion() {
	name, dense, sparse := s.fused()
	both := []*qdrant.PrefetchQuery{dense, sparse}
	for _, test := range []struct {
		name  string
		query *qdrant.Query
		want  []scored
	}{
		{"rrf", qdrant.NewQueryFusion(qdrant.Fusion_RRF), referenceRRF(fusedMembers, 2)},
		{"rrf without parameters", qdrant.NewQueryRRF(&qdrant.Rrf{}), referenceRRF(fusedMembers, 2)},
		{"rrf with k", qdrant.NewQueryRRF(&qdrant.Rrf{K: qdrant.PtrOf(uint32(60))}), referenceRRF(fusedMembers, 60)},
		{"rrf with weights", qdrant.NewQueryRRF(&qdrant.Rrf{K: qdrant.PtrOf(uint32(60)), Weights: []float32{3, 1}}), referenceRRF(fusedMembers, 60, 3, 1)},
		{"rrf with small k and weights", qdrant.NewQueryRRF(&qdrant.Rrf{K: qdrant.PtrOf(uint32(1)), Weights: []float32{0.5, 2}}), referenceRRF(fusedMembers, 1, 0.5, 2)},
		{"dbsf", qdrant.NewQueryFusion(qdrant.Fusion_DBSF), referenceDBSF(fusedMembers)},
	} {
		s.wantRanked(test.name, s.query(name, &qdrant.QueryPoints{Prefetch: both, Query: test.query, Limit: qdrant.PtrOf(uint64(10))}), test.want, 0, 10)
		s.wantRanked(test.name+" with offset", s.query(name, &qdrant.QueryPoints{Prefetch: both, Query: test.query, Limit: qdrant.PtrOf(uint64(3)), Offset: qdrant.PtrOf(uint64(2))}), test.want, 2, 3)
	}
	rrf := referenceRRF(fusedMembers, 2)
	cut := float32((rrf[2].score + rrf[3].score) / 2)
	s.wantRanked("rrf over a threshold", s.query(name, &qdrant.QueryPoints{Prefetch: both, Query: qdrant.NewQueryFusion(qdrant.Fusion_RRF), ScoreThreshold: &cut}), rrf[:3], 0, 10)
	// The limit of a prefetch decides what the fusion sees; its threshold and filter too.
	short := &qdrant.PrefetchQuery{Query: dense.Query, Using: dense.Using, Limit: qdrant.PtrOf(uint64(2))}
	s.wantRanked("short prefetch", s.query(name, &qdrant.QueryPoints{Prefetch: []*qdrant.PrefetchQuery{short, sparse}, Query: qdrant.NewQueryFusion(qdrant.Fusion_RRF)}),
		referenceRRF([][]scored{denseOrder[:2], sparseOrder}, 2), 0, 10)
	over := &qdrant.PrefetchQuery{Query: dense.Query, Using: dense.Using, ScoreThreshold: qdrant.PtrOf(float32(5))}
	s.wantRanked("prefetch over a threshold", s.query(name, &qdrant.QueryPoints{Prefetch: []*qdrant.PrefetchQuery{over, sparse}, Query: qdrant.NewQueryFusion(qdrant.Fusion_RRF)}),
		referenceRRF([][]scored{denseOrder[:3], sparseOrder}, 2), 0, 10)
	// A filter of the query applies to every prefetch.
	without2 := func(l []scored) []scored {
		return slices.DeleteFunc(slices.Clone(l), func(x scored) bool { return x.id == 2 })
	}
	not2 := &qdrant.Filter{MustNot: []*qdrant.Condition{qdrant.NewMatchInt("id", 2)}}
	s.wantRanked("filtered", s.query(name, &qdrant.QueryPoints{Prefetch: both, Query: qdrant.NewQueryFusion(qdrant.Fusion_RRF), Filter: not2}),
		referenceRRF([][]scored{without2(denseOrder), without2(sparseOrder)}, 2), 0, 10)
	filtered := &qdrant.PrefetchQuery{Query: dense.Query, Using: dense.Using, Filter: not2}
	s.wantRanked("one filtered", s.query(name, &qdrant.QueryPoints{Prefetch: []*qdrant.PrefetchQuery{filtered, sparse}, Query: qdrant.NewQueryFusion(qdrant.Fusion_RRF)}),
		referenceRRF([][]scored{without2(denseOrder), sparseOrder}, 2), 0, 10)
	// One list of one point: a score of 0.5 in DBSF.
	one := &qdrant.PrefetchQuery{Query: dense.Query, Using: dense.Using, Limit: qdrant.PtrOf(uint64(1))}
	s.wantRanked("dbsf of one", s.query(name, &qdrant.QueryPoints{Prefetch: []*qdrant.PrefetchQuery{one}, Query: qdrant.NewQueryFusion(qdrant.Fusion_DBSF)}), []scored{{1, 0.5}}, 0, 10)
	hits, err := s.c.Query(s.ctx, &qdrant.QueryPoints{CollectionName: name, Prefetch: both, Query: qdrant.NewQueryFusion(qdrant.Fusion_RRF), WithPayload: qdrant.NewWithPayload(true)})
	s.must(err)
	for _, h := range hits {
		if h.GetPayload()["id"].GetIntegerValue() != int64(h.GetId().GetNum()) {
			s.Errorf("payload of %v: %v", h.GetId(), h.GetPayload())
		}
	}
}

func (s *suite) nestedPrefetch() {
	name, dense, sparse := s.fused()
	// hybrid_rerank: fused candidates, scored again by another vector.
	s.wantRanked("rescored", s.query(name, &qdrant.QueryPoints{
		Prefetch: []*qdrant.PrefetchQuery{{
			Prefetch: []*qdrant.PrefetchQuery{dense, sparse}, Query: qdrant.NewQueryFusion(qdrant.Fusion_RRF), Limit: qdrant.PtrOf(uint64(3)),
		}},
		Query: qdrant.NewQuery(-1, 0, 0, 0), Using: qdrant.PtrOf("dense"),
	}), negated(referenceRRF(fusedMembers, 2)[:3]), 0, 10)
	// Candidates without the rescoring vector drop out.
	s.wantRanked("rescored by what some lack", s.query(name, &qdrant.QueryPoints{
		Prefetch: []*qdrant.PrefetchQuery{sparse}, Query: qdrant.NewQuery(1, 0, 0, 0), Using: qdrant.PtrOf("dense"),
	}), []scored{{1, 10}, {2, 9}, {4, 2}, {6, 1}}, 0, 10)
	// A fusion inside a fusion.
	inner := &qdrant.PrefetchQuery{Prefetch: []*qdrant.PrefetchQuery{dense, sparse}, Query: qdrant.NewQueryRRF(&qdrant.Rrf{K: qdrant.PtrOf(uint32(60))}), Limit: qdrant.PtrOf(uint64(4))}
	s.wantRanked("fusion of a fusion", s.query(name, &qdrant.QueryPoints{
		Prefetch: []*qdrant.PrefetchQuery{inner, dense}, Query: qdrant.NewQueryFusion(qdrant.Fusion_RRF),
	}), referenceRRF([][]scored{referenceRRF(fusedMembers, 60)[:4], denseOrder}, 2), 0, 10)
}

// negated is what scoring fused's candidates by the negated dense vector gives.
func negated(in []scored) []scored {
	own := map[uint64]float64{}
	for _, x := range denseOrder {
		own[x.id] = x.score
	}
	var out []scored
	for _, x := range in {
		if score, ok := own[x.id]; ok {
			out = append(out, scored{x.id, -score})
		}
	}
	return rank(out, false)
}

func (s *suite) queryBatch() {
	name, dense, sparse := s.fused()
	rs, err := s.c.QueryBatch(s.ctx, &qdrant.QueryBatchPoints{CollectionName: name, QueryPoints: []*qdrant.QueryPoints{
		{CollectionName: name, Query: dense.Query, Using: dense.Using, Limit: qdrant.PtrOf(uint64(2))},
		{CollectionName: name, Query: sparse.Query, Using: sparse.Using},
		{CollectionName: name, Prefetch: []*qdrant.PrefetchQuery{dense, sparse}, Query: qdrant.NewQueryFusion(qdrant.Fusion_RRF)},
	}})
	s.must(err)
	if len(rs) != 3 {
		s.Fatalf("%d results, want 3", len(rs))
	}
	s.wantRanked("first", fromHits(rs[0].GetResult()), denseOrder, 0, 2)
	s.wantRanked("second", fromHits(rs[1].GetResult()), sparseOrder, 0, 10)
	s.wantRanked("third", fromHits(rs[2].GetResult()), referenceRRF(fusedMembers, 2), 0, 10)
	_, err = s.c.QueryBatch(s.ctx, &qdrant.QueryBatchPoints{CollectionName: name, QueryPoints: []*qdrant.QueryPoints{
		{CollectionName: name, Query: dense.Query, Using: dense.Using}, {CollectionName: name, Query: qdrant.NewQuery(1), Using: dense.Using},
	}})
	s.wantCode(err, codes.InvalidArgument, "a batch with one bad query")
}

// predicate is a random filter together with what it means, computed on its own terms.
type predicate struct {
	filter *qdrant.Filter
	holds  func(doc map[string]any) bool
	text   string
}

// randomFilters compares random filters over random documents with a plain evaluation.
// Fields have one type each, as Lockstep's declared fields do, so that indexes change
// nothing; half of the collections have them.
func (s *suite) randomFilters() {
	r := s.random()
	for _, indexed := range []bool{false, true} {
		name := s.plain(1, qdrant.Distance_Dot)
		if indexed {
			s.index(name, "k", qdrant.FieldType_FieldTypeKeyword)
			s.index(name, "n", qdrant.FieldType_FieldTypeInteger)
			s.index(name, "f", qdrant.FieldType_FieldTypeFloat)
			s.index(name, "b", qdrant.FieldType_FieldTypeBool)
			s.index(name, "o.k", qdrant.FieldType_FieldTypeKeyword)
		}
		docs := make([]map[string]any, 400)
		var ps []*qdrant.PointStruct
		for i := range docs {
			docs[i] = randomDocument(r)
			ps = append(ps, &qdrant.PointStruct{Id: num(uint64(i)), Vectors: qdrant.NewVectors(1), Payload: qdrant.NewValueMap(docs[i])})
		}
		s.upsert(name, ps...)
		for range 150 {
			p := randomPredicate(r, 3)
			var want []uint64
			for i, d := range docs {
				if p.holds(d) {
					want = append(want, uint64(i))
				}
			}
			if got := s.matching(name, p.filter); !slices.Equal(got, want) {
				s.Errorf("indexed %v, %s: %d points, want %d: %v", indexed, p.text, len(got), len(want), firstDifference(got, want, docs))
				return
			}
		}
	}
}

func firstDifference(got, want []uint64, docs []map[string]any) string {
	for i := range docs {
		if g, w := slices.Contains(got, uint64(i)), slices.Contains(want, uint64(i)); g != w {
			return fmt.Sprintf("point %d %v, got %v, want %v", i, docs[i], g, w)
		}
	}
	return "in order only"
}

func randomDocument(r *rand.Rand) map[string]any {
	words := []string{"a", "b", "c", "d"}
	d := map[string]any{}
	put := func(key string, v func() any) {
		switch r.IntN(6) {
		case 0:
		case 1:
			l := []any{}
			for range r.IntN(3) + 1 {
				l = append(l, v())
			}
			d[key] = l
		default:
			d[key] = v()
		}
	}
	put("k", func() any { return words[r.IntN(4)] })
	put("n", func() any { return int64(r.IntN(9) - 4) })
	put("f", func() any { return float64(r.IntN(9))/2 + 0.25 })
	put("b", func() any { return r.IntN(2) == 0 })
	if r.IntN(3) > 0 {
		d["o"] = map[string]any{"k": words[r.IntN(4)]}
	}
	return d
}

// values lists what a field holds, lists taken apart.
func values(d map[string]any, key string) []any {
	var v any = d
	for part := range strings.SplitSeq(key, ".") {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		if v, ok = m[part]; !ok {
			return nil
		}
	}
	if l, ok := v.([]any); ok {
		return l
	}
	return []any{v}
}

func randomPredicate(r *rand.Rand, depth int) predicate {
	leaf := func(text string, c *qdrant.Condition, holds func(d map[string]any) bool) predicate {
		return predicate{&qdrant.Filter{Must: []*qdrant.Condition{c}}, holds, text}
	}
	some := func(key string, test func(v any) bool) func(map[string]any) bool {
		return func(d map[string]any) bool { return slices.ContainsFunc(values(d, key), test) }
	}
	if depth == 0 || r.IntN(3) == 0 {
		word := []string{"a", "b", "c", "d"}[r.IntN(4)]
		key := []string{"k", "o.k"}[r.IntN(2)]
		n := int64(r.IntN(9) - 4)
		lo := float64(r.IntN(10)) - 5
		hi := lo + float64(r.IntN(4))
		switch r.IntN(9) {
		case 0:
			return leaf(key+"="+word, qdrant.NewMatch(key, word), some(key, func(v any) bool { return v == word }))
		case 1:
			return leaf(key+" in a,"+word, qdrant.NewMatchKeywords(key, "a", word), some(key, func(v any) bool { return v == word || v == "a" }))
		case 2:
			return leaf(key+" except "+word, qdrant.NewMatchExcept(key, word), some(key, func(v any) bool { return v != word }))
		case 3:
			return leaf(fmt.Sprintf("n=%d", n), qdrant.NewMatchInt("n", n), some("n", func(v any) bool { return v == n }))
		case 4:
			return leaf(fmt.Sprintf("n in %v..%v", lo, hi), qdrant.NewRange("n", &qdrant.Range{Gte: &lo, Lt: &hi}),
				some("n", func(v any) bool { x := float64(v.(int64)); return x >= lo && x < hi }))
		case 5:
			return leaf(fmt.Sprintf("f in %v..%v", lo, hi), qdrant.NewRange("f", &qdrant.Range{Gt: &lo, Lte: &hi}),
				some("f", func(v any) bool { x := v.(float64); return x > lo && x <= hi }))
		case 6:
			return leaf("b", qdrant.NewMatchBool("b", true), some("b", func(v any) bool { return v == true }))
		case 7:
			return leaf("empty "+key, qdrant.NewIsEmpty(key), func(d map[string]any) bool { return len(values(d, key)) == 0 })
		default:
			count := uint64(r.IntN(3))
			return leaf(fmt.Sprintf("count n>%d", count), qdrant.NewValuesCount("n", &qdrant.ValuesCount{Gt: &count}),
				func(d map[string]any) bool { return uint64(len(values(d, "n"))) > count })
		}
	}
	f := &qdrant.Filter{}
	var parts [3][]predicate
	var text []string
	for i, list := range []*[]*qdrant.Condition{&f.Must, &f.Should, &f.MustNot} {
		for range r.IntN(3) {
			p := randomPredicate(r, depth-1)
			parts[i] = append(parts[i], p)
			*list = append(*list, qdrant.NewFilterAsCondition(p.filter))
			text = append(text, []string{"must ", "should ", "not "}[i]+"("+p.text+")")
		}
	}
	return predicate{f, func(d map[string]any) bool {
		hold := func(p predicate) bool { return p.holds(d) }
		for _, p := range parts[0] {
			if !p.holds(d) {
				return false
			}
		}
		return (len(parts[1]) == 0 || slices.ContainsFunc(parts[1], hold)) && !slices.ContainsFunc(parts[2], hold)
	}, strings.Join(text, " ")}
}
