package search

import (
	"math"
	"slices"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// query is one request on its way through the rounds.
type query struct {
	req           *corpus.SearchRequest
	pointer       string
	mode          corpus.SearchMode
	heads         corpus.Heads
	fusion        corpus.Fusion
	filter        *corpus.Filter
	offset, limit int
	vecs          *corpus.Vectors
	// self is the document that Like names; its own chunks are no answer.
	self corpus.ID

	lists    []*list
	exclude  []corpus.ID
	excluded map[corpus.ID]bool // the same, as a set

	// What the last join left. live holds the candidates that may be shown, junk the others.
	live     map[corpus.ID]*corpus.JoinedChunk
	junk     map[corpus.ID]bool
	docs     []corpus.JoinedDocument
	ranked   []ranked
	filtered int

	widened   int
	refreshed int
	truncated bool
	done      bool

	// stored vectors and highlights of what is shown, where they were asked for.
	stored     map[corpus.ID]*corpus.Vectors
	highlights map[corpus.ID][]string
}

// list is the candidates under one head. Scores gather over the rounds: a point's vectors
// never change under its id, so neither does its score.
type list struct {
	head corpus.Heads
	// among are the lists whose points this one scores again; empty for a search of the index.
	among []*list
	// depth of live candidates wanted; ask is how many to fetch in order to get them, and
	// limit the most that may be asked.
	depth, ask, limit int
	threshold         *float64
	scores            map[corpus.ID]float64
	// worst is the lowest score of the last answer.
	worst float64
	// asked is when the index was last asked, before the question left.
	asked time.Time
	// settled: deep enough, or nothing more to be had.
	settled   bool
	exhausted bool
	// order of the live candidates, at most depth, and how many there are; set by each join.
	order []corpus.ID
	alive int
}

func newList(head corpus.Heads, depth int) *list {
	limit := min(max(2*slack(depth), minLimit), maxLimit)
	return &list{head: head, depth: depth, ask: min(slack(depth), limit), limit: limit, scores: map[corpus.ID]float64{}}
}

func newRescore(head corpus.Heads, among ...*list) *list {
	return &list{head: head, among: among, scores: map[corpus.ID]float64{}}
}

// slack adds a few candidates, so that a handful of dead points costs no second round
// (unmeasured; a fetched candidate costs some microseconds in the join).
func slack(depth int) int { return depth + max(4, depth/4) }

// ask makes the list's query to the index.
func (q *query) ask(l *list, exact bool) corpus.IndexQuery {
	iq := corpus.IndexQuery{
		Head: l.head, Vectors: q.vecs, Filter: q.filter, Exclude: q.exclude, Limit: l.ask,
		Threshold: l.threshold, Exact: exact,
	}
	for _, a := range l.among {
		iq.Among = append(iq.Among, corpus.IndexPrefetch{Head: a.head, Limit: a.ask})
		iq.Limit += a.ask
	}
	return iq
}

// take adds an answer of the index. It returns ids whose score is no number: their vectors
// are damaged, and they are no candidates.
func (l *list) take(answer []corpus.Candidate) (broken []corpus.ID) {
	l.worst = math.Inf(1)
	for _, c := range answer {
		if math.IsNaN(c.Score) || math.IsInf(c.Score, 0) {
			broken = append(broken, c.ID)
			continue
		}
		l.scores[c.ID] = c.Score
		l.worst = min(l.worst, c.Score)
	}
	l.exhausted = len(answer) < l.ask
	return broken
}

// maxTied bounds how many candidates are asked for so that equal scores are told apart by id: each
// is joined with its text and neighbours. Unmeasured; some milliseconds.
const maxTied = 256

// tied reports whether a candidate that the index kept back may score as well as the last of
// those wanted. A server cuts equal scores where it likes, other pages and other heads elsewhere;
// their order is by id, so all of them have to be seen.
func (l *list) tied() bool {
	return !l.exhausted && l.alive >= l.depth && l.ask < min(l.limit, maxTied) && l.scores[l.order[l.depth-1]] <= l.worst
}

// maxRefreshes bounds how often a query asks the index again because documents switched
// meanwhile. One is nearly always enough: what is in the way is a switch in the few
// milliseconds between the question and the join.
const maxRefreshes = 4

// outrun reports whether a candidate's document moved to another version after the index was
// asked: the answer may then hold a part of the new version's points, or none. now is when
// the join had returned, so the comparison errs on the side of asking again.
func (q *query) outrun(joined *corpus.Joined, place map[corpus.ID]int, now time.Time) bool {
	for _, l := range q.lists {
		for id := range l.scores {
			if ago := joined.Chunks[place[id]].SwitchedAgo; ago > 0 && ago <= now.Sub(l.asked) {
				return true
			}
		}
	}
	return false
}

// refresh asks the same of the index again.
func (q *query) refresh() {
	q.refreshed++
	q.truncated = true // until a later round says otherwise
	for _, l := range q.lists {
		l.settled = false
	}
}

// settle takes a join of the whole list and decides whether the query is done. place gives
// each candidate's row in the join, which had returned at now.
func (q *query) settle(joined *corpus.Joined, place map[corpus.ID]int, now time.Time) {
	q.sift(joined, place)
	outrun := q.outrun(joined, place, now)
	if outrun && q.refreshed < maxRefreshes {
		for _, l := range q.lists {
			if len(l.among) == 0 {
				l.rank(q.live)
			}
		}
		q.rank() // it is the answer if time runs out
		q.refresh()
		return
	}
	for {
		deep := true
		for _, l := range q.lists {
			if len(l.among) == 0 {
				l.rank(q.live)
				l.settled = l.exhausted || l.alive >= l.depth && !l.tied()
				deep = deep && l.settled
			}
		}
		q.rank()
		if !deep {
			q.widen()
			q.truncated = q.truncated || outrun
			return
		}
		if !q.short() || !q.deepen() {
			q.done, q.truncated = true, outrun
			return
		}
	}
}

// sift parts the candidates into live ones that match, and junk.
func (q *query) sift(joined *corpus.Joined, place map[corpus.ID]int) {
	clear(q.live)
	clear(q.junk)
	q.docs, q.filtered = joined.Documents, 0
	matches := make(map[int]bool, len(joined.Documents))
	for _, l := range q.lists {
		for id := range l.scores {
			if q.live[id] != nil || q.junk[id] {
				continue
			}
			c := &joined.Chunks[place[id]]
			if c.State == corpus.JoinLive {
				doc := &joined.Documents[c.Document]
				if doc.ID == q.self {
					q.junk[id] = true
					continue
				}
				ok, asked := matches[c.Document]
				if !asked {
					// The index filtered by its copy of the metadata; this is the truth.
					ok = q.filter.Matches(doc.Metadata)
					matches[c.Document] = ok
				}
				if ok {
					q.live[id] = c
					continue
				}
			}
			q.junk[id] = true
			q.filtered++
		}
	}
}

// short reports whether too few documents are among the candidates of a grouped query.
// Candidates that were dropped for their score end the matter: deeper ones score less.
func (q *query) short() bool {
	return q.req.GroupByDocument && q.groups() < q.offset+q.limit && !q.cutByThreshold()
}

// deepen makes the lists deeper that have more to give, and reports whether any has.
func (q *query) deepen() bool {
	any := false
	for _, l := range q.lists {
		if len(l.among) == 0 && (l.alive > l.depth || !l.exhausted) {
			l.depth *= 2
			any = true
		}
	}
	return any
}

// widen asks for more, of the lists that are too short; the ids that were no good are left out
// from now on. Where nothing more may be asked for, the query is done, and says so.
func (q *query) widen() {
	q.truncated = false // until a later round says otherwise
	q.done = true
	for _, l := range q.lists {
		if len(l.among) > 0 || l.settled {
			continue
		}
		limit := l.limit
		if l.alive >= l.depth {
			limit = min(limit, maxTied) // nothing is missing but the order of equal scores
		} else {
			q.truncated = true
		}
		if l.ask < limit {
			l.ask = min(max(2*l.ask, slack(l.depth)), limit)
			q.done = false
		} else {
			l.settled = true
		}
	}
	if q.done {
		return
	}
	// Rescoring covers what its lists will hold.
	for _, l := range q.lists {
		if len(l.among) > 0 {
			l.settled = true
			for _, a := range l.among {
				l.settled = l.settled && a.settled
			}
		}
	}
	for id := range q.junk {
		q.leaveOut([]corpus.ID{id})
	}
}

// leaveOut keeps ids out of the next answers of the index.
func (q *query) leaveOut(ids []corpus.ID) {
	for _, id := range ids {
		if !q.excluded[id] && len(q.exclude) < maxExclude {
			q.excluded[id] = true
			q.exclude = append(q.exclude, id)
		}
	}
}

// rank orders the live candidates of a list, best first, equal scores by id, counts them and
// keeps depth of them.
func (l *list) rank(live map[corpus.ID]*corpus.JoinedChunk) {
	l.order = l.order[:0]
	for id := range l.scores {
		if live[id] != nil {
			l.order = append(l.order, id)
		}
	}
	slices.SortFunc(l.order, func(a, b corpus.ID) int { return better(l.scores[a], l.scores[b], a, b) })
	l.alive = len(l.order)
	l.order = l.order[:min(l.alive, l.depth)]
}

// better orders by descending score, then by ascending id.
func better(a, b float64, ida, idb corpus.ID) int {
	switch {
	case a > b:
		return -1
	case a < b:
		return 1
	}
	return ida.Compare(idb)
}

// groups counts the documents among the ranked candidates.
func (q *query) groups() int {
	seen := map[int]bool{}
	for _, r := range q.ranked {
		seen[q.live[r.id].Document] = true
	}
	return len(seen)
}

// cutByThreshold reports whether candidates were dropped for their score: deeper ones score
// less, so more of them would not help.
func (q *query) cutByThreshold() bool {
	if q.req.ScoreThreshold == nil {
		return false
	}
	seen := map[corpus.ID]bool{}
	for _, l := range q.lists {
		for _, id := range l.order {
			seen[id] = true
		}
	}
	return len(seen) > len(q.ranked)
}

// page returns what is shown, in order: the window of the ranking, of documents' best chunks
// if it is grouped.
func (q *query) page() []ranked {
	all := q.ranked
	if q.req.GroupByDocument {
		best := map[int]int{}
		var groups []ranked
		for _, r := range q.ranked {
			doc := q.live[r.id].Document
			g, seen := best[doc]
			if !seen {
				g = len(groups)
				best[doc] = g
				groups = append(groups, r)
			}
			groups[g].chunks++
		}
		all = groups
	}
	return all[min(q.offset, len(all)):min(q.offset+q.limit, len(all))]
}

// response renders what the last join left.
func (q *query) response() corpus.SearchResponse {
	out := corpus.SearchResponse{
		Mode: q.mode, Filtered: q.filtered, Widened: q.widened, Truncated: q.truncated,
		Results: []corpus.SearchResult{},
	}
	if q.mode == corpus.ModeHybrid || q.mode == corpus.ModeHybridRerank {
		out.Fusion = q.fusion
	}
	for _, r := range q.page() {
		c := q.live[r.id]
		d := &q.docs[c.Document]
		hit := corpus.SearchResult{
			ID: r.id, DocumentID: d.ID, ExternalID: d.ExternalID, Version: d.Version, Ordinal: c.Ordinal,
			Score: r.score, ChunkCount: r.chunks, Highlights: q.highlights[r.id],
		}
		if q.req.IncludeText {
			hit.Text = c.Text
		}
		if q.req.IncludeMetadata {
			hit.Metadata = d.Metadata
		}
		if q.req.IncludeVector {
			hit.Vectors = q.stored[r.id]
		}
		if n := q.req.Context; n > 0 {
			// The join served the widest request of the batch.
			hit.Before = c.Before[max(0, len(c.Before)-n):]
			hit.After = c.After[:min(n, len(c.After))]
		}
		if q.req.Explain {
			hit.Heads = q.explain(r.id)
		}
		out.Results = append(out.Results, hit)
	}
	return out
}
