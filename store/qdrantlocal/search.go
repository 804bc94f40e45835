package qdrantlocal

import (
	"context"
	"math"
	"slices"

	"github.com/qdrant/go-client/qdrant"
	"github.com/viterin/vek/vek32"
)

// hit is a point with its score. While a search runs, score is a similarity: larger is
// better for every distance.
type hit struct {
	id      pointID
	slot    uint32
	score   float32
	version uint64
}

// better orders hits: by score, NaN first as in the real server's order (fused scores may be
// NaN), equal scores by id, of which the real server promises nothing.
func better(a, b hit) bool {
	if a.score != b.score {
		aNaN, bNaN := a.score != a.score, b.score != b.score
		if aNaN != bNaN {
			return aNaN
		}
		if !aNaN {
			return a.score > b.score
		}
	}
	return a.id.compare(b.id) < 0
}

func compareHits(a, b hit) int {
	switch {
	case better(a, b):
		return -1
	case better(b, a):
		return 1
	default:
		return 0
	}
}

// topK keeps the best k hits. The worst of them is at the root of a heap.
type topK struct {
	k    int
	hits []hit
}

// beaten reports whether a similarity cannot enter, so that nothing more of it need be read.
func (t *topK) beaten(score float32) bool {
	return len(t.hits) == t.k && score < t.hits[0].score
}

func (t *topK) add(h hit) {
	if len(t.hits) < t.k {
		t.hits = append(t.hits, h)
		i := len(t.hits) - 1
		for i > 0 {
			up := (i - 1) / 2
			if !better(t.hits[up], t.hits[i]) {
				break
			}
			t.hits[up], t.hits[i] = t.hits[i], t.hits[up]
			i = up
		}
		return
	}
	if t.k == 0 || !better(h, t.hits[0]) {
		return
	}
	t.hits[0] = h
	i := 0
	for {
		worst := i
		for _, down := range [2]int{2*i + 1, 2*i + 2} {
			if down < len(t.hits) && better(t.hits[worst], t.hits[down]) {
				worst = down
			}
		}
		if worst == i {
			return
		}
		t.hits[worst], t.hits[i] = t.hits[i], t.hits[worst]
		i = worst
	}
}

// similarity compares two vectors of equal length; larger is nearer.
func similarity(d qdrant.Distance, a, b []float32) float32 {
	switch d {
	case qdrant.Distance_Euclid:
		x := vek32.Distance(a, b)
		return -x * x
	case qdrant.Distance_Manhattan:
		return -vek32.ManhattanDistance(a, b)
	default:
		return vek32.Dot(a, b)
	}
}

// finalScore turns a similarity into the score of the API.
func finalScore(d qdrant.Distance, sim float32) float32 {
	switch d {
	case qdrant.Distance_Euclid:
		return float32(math.Sqrt(math.Abs(float64(sim))))
	case qdrant.Distance_Manhattan:
		return float32(math.Abs(float64(sim)))
	default:
		return sim
	}
}

// passes applies a score threshold, which the score must pass, not merely meet.
func passes(d qdrant.Distance, score, threshold float32) bool {
	if d == qdrant.Distance_Euclid || d == qdrant.Distance_Manhattan {
		return score < threshold
	}
	return score > threshold
}

// scorer computes the similarity of a query and the vector in a slot; ok is false where
// there is no vector, or for sparse vectors no common term.
type scorer func(slot uint32) (sim float32, ok bool)

// newScorer prepares a query, which must be in stored form.
func newScorer(v *vectorColumn, q vectorData) scorer {
	switch v.shape {
	case shapeSparse:
		return func(slot uint32) (float32, bool) {
			if !v.has(slot) {
				return 0, false
			}
			return sparseDot(q, v.other.at(slot))
		}
	case shapeMulti:
		return func(slot uint32) (float32, bool) {
			if !v.has(slot) {
				return 0, false
			}
			return maxSim(v.distance, v.dim, q.flat, v.other.at(slot).flat), true
		}
	default:
		return func(slot uint32) (float32, bool) {
			if !v.has(slot) {
				return 0, false
			}
			return similarity(v.distance, q.flat, v.row(slot)), true
		}
	}
}

// gallop is the ratio of lengths from which looking terms up beats walking both lists.
// Unmeasured.
const gallop = 8

// sparseDot multiplies two sparse vectors sorted by term.
func sparseDot(q, d vectorData) (float32, bool) {
	var sum float32
	common := false
	if len(d.indices) > gallop*len(q.indices) {
		rest := d.indices
		base := 0
		for i, t := range q.indices {
			j, ok := slices.BinarySearch(rest, t)
			if ok {
				sum += q.flat[i] * d.flat[base+j]
				common = true
			}
			rest = rest[j:]
			base += j
		}
		return sum, common
	}
	for i, j := 0, 0; i < len(q.indices) && j < len(d.indices); {
		switch a, b := q.indices[i], d.indices[j]; {
		case a < b:
			i++
		case a > b:
			j++
		default:
			sum += q.flat[i] * d.flat[j]
			common = true
			i++
			j++
		}
	}
	return sum, common
}

// maxSim sums, over the query's rows, the best similarity to any row of the document.
func maxSim(d qdrant.Distance, dim int, q, doc []float32) float32 {
	var sum float32
	for i := 0; i < len(q); i += dim {
		best := float32(math.Inf(-1))
		for j := 0; j < len(doc); j += dim {
			if s := similarity(d, q[i:i+dim], doc[j:j+dim]); s > best {
				best = s
			}
		}
		sum += best
	}
	return sum
}

// nearest is one exact search.
type nearest struct {
	vec       *vectorColumn
	query     vectorData
	filter    *filter
	limit     int
	threshold *float32
	// among, if not nil, restricts the search to these points.
	among []pointID
}

// search runs a nearest search over all points, or those named, and returns the best,
// best first, with API scores.
func (s *Server) search(ctx context.Context, c *collection, q *nearest) ([]hit, error) {
	if q.limit == 0 || q.vec.shape == shapeSparse && len(q.query.indices) == 0 {
		return nil, nil
	}
	score := newScorer(q.vec, q.query)
	try := func(top *topK, slot uint32) {
		if q.filter != nil {
			if d := c.document(slot); !q.filter.match(&d) {
				return
			}
		}
		sim, ok := score(slot)
		// What compares with nothing is not found: a vector that is not finite may be stored.
		if !ok || sim != sim || top.beaten(sim) {
			return
		}
		top.add(hit{id: c.slotIDs.at(slot), slot: slot, score: sim, version: c.versions.at(slot)})
	}
	among := q.among
	if among == nil {
		if ids, ok := q.filter.ids(); ok {
			among = make([]pointID, 0, len(ids))
			for id := range ids {
				among = append(among, id)
			}
		}
	}
	var top topK
	if among != nil {
		top.k = min(q.limit, len(among))
		for len(among) > 0 {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			n := min(len(among), scrollHold)
			c.mu.RLock()
			for _, id := range among[:n] {
				if slot, ok := c.slotOf(id); ok {
					try(&top, slot)
				}
			}
			c.mu.RUnlock()
			among = among[n:]
		}
	} else {
		tops := make([]topK, s.opts.Workers)
		for i := range tops {
			tops[i].k = q.limit
		}
		err := s.scan(ctx, c, func(w int, first, end uint32) {
			for slot := first; slot < end; slot++ {
				if c.live.at(slot) {
					try(&tops[w], slot)
				}
			}
		})
		if err != nil {
			return nil, err
		}
		for _, t := range tops {
			top.hits = append(top.hits, t.hits...)
		}
	}
	slices.SortFunc(top.hits, compareHits)
	hits := top.hits[:0]
	seen := make(map[pointID]struct{}, min(q.limit, len(top.hits)))
	for _, h := range top.hits {
		if len(hits) == q.limit {
			break
		}
		// A point deleted and inserted again while the scan ran may have been met twice.
		if _, dup := seen[h.id]; dup {
			continue
		}
		seen[h.id] = struct{}{}
		h.score = finalScore(q.vec.distance, h.score)
		if q.threshold != nil && !passes(q.vec.distance, h.score, *q.threshold) {
			break
		}
		hits = append(hits, h)
	}
	return hits, nil
}

// rrfScore is the share of a place in one list, counted from 0. The weight stretches the
// list: with weight 3 the third place counts as much as the first does with weight 1.
func rrfScore(place int, k uint32, weight float32) float32 {
	if weight <= 0 {
		return 0
	}
	return 1 / (float32(place+1)/weight + float32(k) - 1)
}

// fuseRRF adds up the shares of each point. weights may be empty.
func fuseRRF(lists [][]hit, k uint32, weights []float32) []hit {
	return fuse(lists, func(list, place int, _ float32) float32 {
		w := float32(1)
		if len(weights) > 0 {
			w = weights[list]
		}
		return rrfScore(place, k, w)
	})
}

// fuseDBSF adds up scores that were normalised per list: three standard deviations around
// the mean become 0 to 1.
func fuseDBSF(lists [][]hit) []hit {
	type norm struct{ low, high float32 }
	norms := make([]norm, len(lists))
	for i, l := range lists {
		if len(l) < 2 {
			continue
		}
		// Welford's method in single precision, as the real server computes it.
		var mean, sum float32
		for n, h := range l {
			old := h.score - mean
			mean += old / float32(n+1)
			sum += old * (h.score - mean)
		}
		dev := float32(math.Sqrt(float64(sum / (float32(len(l)) - 1))))
		norms[i] = norm{mean - 3*dev, mean + 3*dev}
	}
	return fuse(lists, func(list, _ int, score float32) float32 {
		n := norms[list]
		if n.low == n.high {
			return 0.5
		}
		return (score - n.low) / (n.high - n.low)
	})
}

func fuse(lists [][]hit, share func(list, place int, score float32) float32) []hit {
	index := map[pointID]int{}
	var out []hit
	for i, l := range lists {
		for place, h := range l {
			s := share(i, place, h.score)
			if j, ok := index[h.id]; ok {
				out[j].score += s
				continue
			}
			index[h.id] = len(out)
			h.score = s
			out = append(out, h)
		}
	}
	slices.SortFunc(out, compareHits)
	return out
}
