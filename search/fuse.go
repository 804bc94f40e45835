package search

import (
	"math"
	"slices"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// ranked is a live candidate with its final score.
type ranked struct {
	id    corpus.ID
	score float64
	// chunks of the document among the candidates; set when results are grouped.
	chunks int
}

// rank computes the final scores of the live candidates and orders them. Only what the ledger
// confirmed takes part: junk in the index moves no rank and no mean.
func (q *query) rank() {
	var lists []*list
	for _, l := range q.lists {
		if len(l.among) == 0 {
			lists = append(lists, l)
		}
	}
	var scores map[corpus.ID]float64
	switch {
	case len(lists) == 1:
		scores = make(map[corpus.ID]float64, len(lists[0].order))
		for _, id := range lists[0].order {
			scores[id] = lists[0].scores[id]
		}
	case q.mode == corpus.ModeHybridRerank && q.fusion.Method != fuseWeighted:
		scores = q.each(lists, func(id corpus.ID) float64 { return q.meanMaxSim(id) })
	case q.fusion.Method == fuseWeighted:
		scores = q.each(lists, q.weighted)
	case q.fusion.Method == fuseDBSF:
		scores = fuse(lists, q.fusion.Weights, func(l *list) func(int, float64) float64 { return distribution(l) })
	default:
		k := float64(q.fusion.K)
		scores = fuse(lists, q.fusion.Weights, func(*list) func(int, float64) float64 {
			return func(rank int, _ float64) float64 { return 1 / (k + float64(rank)) }
		})
	}
	q.ranked = q.ranked[:0]
	for id, score := range scores {
		if t := q.req.ScoreThreshold; t == nil || score >= *t {
			q.ranked = append(q.ranked, ranked{id: id, score: score})
		}
	}
	slices.SortFunc(q.ranked, func(a, b ranked) int { return better(a.score, b.score, a.id, b.id) })
}

// each scores every candidate of the lists once.
func (q *query) each(lists []*list, score func(corpus.ID) float64) map[corpus.ID]float64 {
	out := map[corpus.ID]float64{}
	for _, l := range lists {
		for _, id := range l.order {
			if _, seen := out[id]; !seen {
				out[id] = score(id)
			}
		}
	}
	return out
}

// fuse adds up, over the lists that hold a candidate, its weighted part of the score. part is
// given the rank (from 1) and the score in the list.
func fuse(lists []*list, weights []float64, part func(*list) func(rank int, score float64) float64) map[corpus.ID]float64 {
	out := map[corpus.ID]float64{}
	for i, l := range lists {
		of := part(l)
		for r, id := range l.order {
			out[id] += weights[i] * of(r+1, l.scores[id])
		}
	}
	return out
}

// flat is the relative deviation below which scores count as equal: what is left then is the
// rounding of float32, and dividing by it would make ranks out of noise.
const flat = 1e-6

// distribution normalises a list's scores by its mean and three standard deviations on either
// side (distribution-based score fusion): the mean is 0.5. Fewer than two scores, or equal
// ones, have no distribution and count 0.5.
func distribution(l *list) func(int, float64) float64 {
	n := float64(len(l.order))
	mean, variance := 0.0, 0.0
	for _, id := range l.order {
		mean += l.scores[id] / n
	}
	for _, id := range l.order {
		d := l.scores[id] - mean
		variance += d * d
	}
	deviation := 0.0
	if n > 1 {
		deviation = math.Sqrt(variance / (n - 1))
	}
	return func(_ int, score float64) float64 {
		if deviation <= flat*math.Abs(mean) {
			return 0.5
		}
		return (score - mean + 3*deviation) / (6 * deviation)
	}
}

// weighted is the reference's sum: dense·w0 + sparse·w1, and for reranking + colbert·w2, over
// the sum of the weights. A candidate without common terms has sparse score 0.
func (q *query) weighted(id corpus.ID) float64 {
	w := q.fusion.Weights
	sum := w[0]*q.under(corpus.Dense, id) + w[1]*q.under(corpus.SparseHead, id)
	total := w[0] + w[1]
	if q.mode == corpus.ModeHybridRerank {
		sum += w[2] * q.meanMaxSim(id)
		total += w[2]
	}
	return sum / total
}

// under returns a candidate's score under a head, or 0 where the index gave none.
func (q *query) under(head corpus.Heads, id corpus.ID) float64 {
	for _, l := range q.lists {
		if l.head == head {
			if score, ok := l.scores[id]; ok {
				return score
			}
		}
	}
	return 0
}

// meanMaxSim is ColBERT on the reference's scale: the index adds the best dot products up, the
// reference takes their mean over the query's vectors.
func (q *query) meanMaxSim(id corpus.ID) float64 {
	return q.under(corpus.ColBERT, id) / float64(len(q.vecs.ColBERT))
}

// explain returns a candidate's rank and score under each head. A rank of 0 means that the
// head did not propose the candidate but was asked for its score.
func (q *query) explain(id corpus.ID) map[string]corpus.HeadScore {
	out := map[string]corpus.HeadScore{}
	for _, l := range q.lists {
		score, ok := l.scores[id]
		if !ok {
			continue
		}
		name := l.head.String()
		h := corpus.HeadScore{Score: score, Rank: slices.Index(l.order, id) + 1}
		if l.head == corpus.ColBERT {
			h.Score = q.meanMaxSim(id)
			h.Rank = 1
			for _, other := range q.ranked {
				if better(l.scores[other.id], score, other.id, id) < 0 {
					h.Rank++
				}
			}
		}
		if have, seen := out[name]; !seen || have.Rank == 0 {
			out[name] = h
		}
	}
	return out
}
