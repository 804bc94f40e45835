package main

import (
	"math"
	"slices"
)

// scores of one ranking against one query's answers.
type scores struct{ ndcg10, mrr, recall100 float64 }

// score judges a ranking of document ids, best first, without repetitions. All answers are
// equally good. MRR looks at the first 100.
func score(ranking, answers []string) scores {
	var s scores
	dcg, ideal := 0.0, 0.0
	for i := range min(len(answers), 10) {
		ideal += 1 / math.Log2(float64(i)+2)
	}
	found := 0
	for i, id := range ranking[:min(len(ranking), 100)] {
		if !slices.Contains(answers, id) {
			continue
		}
		if i < 10 {
			dcg += 1 / math.Log2(float64(i)+2)
		}
		if found == 0 {
			s.mrr = 1 / float64(i+1)
		}
		found++
	}
	s.ndcg10 = dcg / ideal
	s.recall100 = float64(found) / float64(len(answers))
	return s
}

// rrf fuses rankings with reciprocal ranks, k = 60, as the server does.
func rrf(rankings ...[]string) []string {
	const k = 60
	sum := map[string]float64{}
	var out []string
	for _, r := range rankings {
		for i, id := range r {
			if _, seen := sum[id]; !seen {
				out = append(out, id)
			}
			sum[id] += 1 / float64(k+i+1)
		}
	}
	slices.SortStableFunc(out, func(a, b string) int {
		switch {
		case sum[a] > sum[b]:
			return -1
		case sum[a] < sum[b]:
			return 1
		}
		return 0
	})
	return out
}

// bm25 is the lexical baseline (Robertson's, with the usual k1 = 1.2 and b = 0.75) over whole
// documents; words are runs of letters and digits in lower case.
type bm25 struct {
	ids      []string
	lengths  []float64
	average  float64
	postings map[string][]posting
}

type posting struct {
	doc   int
	count float64
}

func newBM25(corpus []document) *bm25 {
	b := &bm25{postings: map[string][]posting{}}
	for i, d := range corpus {
		counts := map[string]float64{}
		n := 0.0
		for _, w := range words(d.Text) {
			counts[w]++
			n++
		}
		b.ids = append(b.ids, d.ID)
		b.lengths = append(b.lengths, n)
		b.average += n
		for w, c := range counts {
			b.postings[w] = append(b.postings[w], posting{i, c})
		}
	}
	b.average /= float64(max(len(corpus), 1))
	return b
}

// search returns the ids of the best documents; equal scores in the order of the corpus.
func (b *bm25) search(text string, limit int) []string {
	const k1, norm = 1.2, 0.75
	sum := map[int]float64{}
	n := float64(len(b.ids))
	asked := words(text)
	slices.Sort(asked)
	for _, w := range slices.Compact(asked) {
		list := b.postings[w]
		df := float64(len(list))
		idf := math.Log(1 + (n-df+0.5)/(df+0.5))
		for _, p := range list {
			sum[p.doc] += idf * p.count * (k1 + 1) / (p.count + k1*(1-norm+norm*b.lengths[p.doc]/b.average))
		}
	}
	order := make([]int, 0, len(sum))
	for doc := range sum {
		order = append(order, doc)
	}
	slices.SortFunc(order, func(x, y int) int {
		switch {
		case sum[x] > sum[y]:
			return -1
		case sum[x] < sum[y]:
			return 1
		}
		return x - y
	})
	out := make([]string, 0, limit)
	for _, doc := range order[:min(limit, len(order))] {
		out = append(out, b.ids[doc])
	}
	return out
}
