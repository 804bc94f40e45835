package embedder

import (
	"slices"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// lane holds the waiting rows of one lane, by the outputs they ask for. Guarded by Batcher.mu.
type lane struct {
	sets map[corpus.Heads]*set
	rows int
	// tokens admitted and not yet finished.
	tokens int
}

// set holds waiting rows that may share a batch, both by length and by age.
type set struct {
	// byLength[n] are the rows of n tokens, oldest first.
	byLength map[int][]*row
	// lengths are the keys of byLength, ascending.
	lengths []int
	// byAge are all rows, oldest first; taken ones are skipped.
	byAge []*row
}

// shape is what a batch may be.
type shape struct {
	budget, rows int
	padded       bool
}

func (l *lane) add(w *row) {
	s := l.sets[w.heads]
	if s == nil {
		s = &set{byLength: map[int][]*row{}}
		l.sets[w.heads] = s
	}
	n := len(w.ids)
	if _, ok := s.byLength[n]; !ok {
		at, _ := slices.BinarySearch(s.lengths, n)
		s.lengths = slices.Insert(s.lengths, at, n)
	}
	s.byLength[n] = append(s.byLength[n], w)
	s.byAge = append(s.byAge, w)
	l.rows++
}

// oldest returns the set whose first row has waited longest.
func (l *lane) oldest() *set {
	var best *set
	for _, s := range l.sets {
		if s.skipTaken(); len(s.byAge) > 0 && (best == nil || s.byAge[0].at.Before(best.byAge[0].at)) {
			best = s
		}
	}
	return best
}

func (l *lane) waited(now time.Time) time.Duration {
	if s := l.oldest(); s != nil {
		return now.Sub(s.byAge[0].at)
	}
	return 0
}

func (s *set) skipTaken() {
	i := 0
	for i < len(s.byAge) && s.byAge[i].taken {
		s.byAge[i] = nil
		i++
	}
	s.byAge = s.byAge[i:]
}

// take removes a batch: rows of like length, starting from the longest that waits, or from
// the oldest row when that has been passed over for as long as the age limit.
func (l *lane) take(sh shape, now time.Time, ageLimit time.Duration) []*row {
	s := l.oldest()
	if s == nil {
		return nil
	}
	anchor := s.lengths[len(s.lengths)-1]
	if first := s.byAge[0]; now.Sub(first.at) >= ageLimit {
		anchor = len(first.ids)
	}
	at, _ := slices.BinarySearch(s.lengths, anchor)
	var batch []*row
	used := 0
	for i := at; i >= 0; i-- {
		n := s.lengths[i]
		cost := n
		if sh.padded {
			if len(batch) > 0 && tooShort(n, anchor) {
				break
			}
			cost = anchor
		}
		rows := s.byLength[n]
		k := 0
		for k < len(rows) && len(batch) < sh.rows && (len(batch) == 0 || used+cost <= sh.budget) {
			rows[k].taken = true
			batch = append(batch, rows[k])
			used += cost
			k++
		}
		if k == len(rows) {
			delete(s.byLength, n)
			s.lengths = slices.Delete(s.lengths, i, i+1)
			continue
		}
		s.byLength[n] = rows[k:]
		break
	}
	l.rows -= len(batch)
	if len(s.lengths) == 0 {
		for heads, have := range l.sets {
			if have == s {
				delete(l.sets, heads)
			}
		}
	}
	return batch
}

// tooShort reports whether padding a row of n tokens to the anchor's length would cost more
// than starting another batch: a quarter of the anchor, and at least 8 tokens. Unmeasured.
func tooShort(n, anchor int) bool { return anchor-n > max(8, anchor/4) }
