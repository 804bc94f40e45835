package search

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Ledger is what search asks of Postgres. Every method is one statement on the primary.
type Ledger interface {
	// ResolveCollection returns a collection and its serving index, or a NotFound error.
	ResolveCollection(ctx context.Context, name string) (corpus.Collection, corpus.Index, error)
	// JoinCandidates says of each candidate what it is worth, all in one snapshot.
	JoinCandidates(ctx context.Context, req corpus.JoinRequest) (corpus.Joined, error)
	// LikeDocument returns up to limit chunks of a document's serving version, or a NotFound error.
	LikeDocument(ctx context.Context, collection corpus.ID, externalID string, limit int) (corpus.LikeDocument, error)
}

// Index is what search asks of Qdrant. Both methods answer NotFound when the index is gone.
type Index interface {
	// QueryBatch answers all queries in one round trip, each best first.
	QueryBatch(ctx context.Context, ix corpus.Index, queries []corpus.IndexQuery) ([][]corpus.Candidate, error)
	// ReadPoints returns those of ids that exist, in any order.
	ReadPoints(ctx context.Context, ix corpus.Index, ids []corpus.ID, withVectors bool) ([]corpus.PointState, error)
}

// Embedder turns queries into vectors. What Embed returns belongs to search, which shares it
// between requests and never changes it.
type Embedder interface {
	Embed(ctx context.Context, req corpus.EmbedRequest) ([]corpus.Embedding, error)
	Spec() corpus.ModelSpec
	// Tokens returns the byte spans of the text's tokens, special tokens left out.
	Tokens(ctx context.Context, text string) ([]corpus.TokenSpan, error)
	// Tokenize returns the ids of the text's tokens, special tokens included.
	Tokenize(ctx context.Context, text string) ([]uint32, error)
}

// Hinter hears of ids that an index proposed and the ledger does not hold alive, or that the
// ledger holds and the index lacks. Hint must not block.
type Hinter interface {
	Hint(ix corpus.Index, ids []corpus.ID)
}

// Config bounds the service. Zero fields take the defaults.
type Config struct {
	// Timeout of a search that does not ask for its own (10 s).
	Timeout time.Duration
	// CacheBytes bounds the cached query embeddings (32 MiB); negative turns the cache off.
	CacheBytes int64
	// CacheTTL is how long a query embedding is kept (10 min). It bounds memory, not
	// staleness: a fingerprint's embedding of a text never changes.
	CacheTTL time.Duration
	// Exact turns approximate search off in every query; for tests and measurements.
	Exact bool
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

const (
	defaultTimeout    = 10 * time.Second
	defaultCacheBytes = 32 << 20
	defaultCacheTTL   = 10 * time.Minute

	defaultLimit = 10
	// maxWindow bounds offset+limit: all of it is joined with the ledger.
	maxWindow = 11_000
	// maxContext bounds the neighbours of a hit, on either side.
	maxContext = 20
	// maxQueries of a batch.
	maxQueries = 100

	// fusedDepth is the least number of candidates each head contributes to a fused mode.
	// Deeper lists change what is ranked, so the depth stays the same for the first pages.
	fusedDepth = 64
	// minLimit and maxLimit bound what widening asks of one head: twice what the window needs,
	// but at least minLimit and at most maxLimit candidates.
	minLimit, maxLimit = 4096, 16384
	// maxExclude bounds the ids a widened query excludes; beyond it, doubling alone helps.
	maxExclude = 1024
	// groupFactor chunks are fetched for each document wanted, at first (unmeasured).
	groupFactor = 4
)

// Service answers searches. It is safe for concurrent use.
type Service struct {
	ledger   Ledger
	index    Index
	embedder Embedder
	hints    Hinter
	cfg      Config
	cache    *cache
	resolved *resolver
	metrics  *metrics
}

// New returns a service. hints may be nil.
func New(ledger Ledger, index Index, embedder Embedder, hints Hinter, cfg Config, reg prometheus.Registerer) *Service {
	if cfg.Timeout <= 0 {
		cfg.Timeout = defaultTimeout
	}
	if cfg.CacheBytes == 0 {
		cfg.CacheBytes = defaultCacheBytes
	}
	if cfg.CacheTTL <= 0 {
		cfg.CacheTTL = defaultCacheTTL
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Service{ledger: ledger, index: index, embedder: embedder, hints: hints, cfg: cfg}
	s.cache = newCache(cfg.CacheBytes, cfg.CacheTTL, cfg.Now)
	s.resolved = newResolver(ledger, cfg.Now)
	s.metrics = newMetrics(reg, s.cache)
	return s
}

// Search answers one query within its timeout. Errors: Invalid with field errors whose
// pointers are relative to the query; NotFound (collection, document); Conflict (the index
// holds another model's vectors); Unavailable, naming what was late or cannot be reached;
// Overloaded from the embedder.
func (s *Service) Search(ctx context.Context, req corpus.SearchRequest) (corpus.SearchResponse, error) {
	out, err := s.search(ctx, []corpus.SearchRequest{req}, func(int) string { return "" })
	if err != nil {
		return corpus.SearchResponse{}, err
	}
	return out[0], nil
}

// SearchBatch answers one response for each request, in order, or an error for all. Queries of
// one collection share each call of the embedder, the index and the ledger. The batch has
// the longest of its requests' timeouts. Pointers of field errors begin with /queries/N.
func (s *Service) SearchBatch(ctx context.Context, reqs []corpus.SearchRequest) ([]corpus.SearchResponse, error) {
	if len(reqs) > maxQueries {
		return nil, invalid(corpus.FieldError{Pointer: "/queries", Code: "out_of_range",
			Detail: fmt.Sprintf("a batch has at most %d queries; these are %d", maxQueries, len(reqs))})
	}
	return s.search(ctx, reqs, func(i int) string { return "/queries/" + strconv.Itoa(i) })
}

func (s *Service) search(parent context.Context, reqs []corpus.SearchRequest, pointer func(int) string) ([]corpus.SearchResponse, error) {
	began := s.cfg.Now()
	budget := time.Duration(0)
	for i := range reqs {
		asked := reqs[i].Timeout
		if asked <= 0 {
			asked = s.cfg.Timeout
		}
		budget = max(budget, asked)
	}
	ctx, cancel := context.WithTimeout(parent, budget)
	defer cancel()

	out := make([]corpus.SearchResponse, len(reqs))
	b := batch{Service: s, parent: parent, budget: budget, reqs: reqs, pointer: pointer, out: out, hinted: map[corpus.ID]bool{}}
	var names []string
	places := map[string][]int{}
	for i := range reqs {
		if _, seen := places[reqs[i].Collection]; !seen {
			names = append(names, reqs[i].Collection)
		}
		places[reqs[i].Collection] = append(places[reqs[i].Collection], i)
	}
	for _, name := range names {
		if err := b.collection(ctx, name, places[name]); err != nil {
			s.metrics.failed(err, len(reqs))
			return nil, err
		}
	}
	s.metrics.answered(out, s.cfg.Now().Sub(began))
	return out, nil
}

// batch is one call of Search or SearchBatch.
type batch struct {
	*Service
	parent  context.Context // the caller's, to tell its end from our deadline
	budget  time.Duration
	reqs    []corpus.SearchRequest
	pointer func(int) string
	out     []corpus.SearchResponse
	hinted  map[corpus.ID]bool
}

// errMoved says that the index in hand does not serve the collection any more.
var errMoved = errors.New("the index no longer serves the collection")

// collection answers the requests at places, all of one collection. Index and model are
// pinned together; where the index was retired meanwhile it starts again: after a cached
// resolution that was out of date, and then once.
func (b *batch) collection(ctx context.Context, name string, places []int) error {
	cached := true
	for attempt := 0; ; {
		coll, ix, fromCache, err := b.resolved.get(ctx, name, cached)
		if err != nil {
			return b.late(ctx, "the ledger", fmt.Errorf("resolving the collection: %w", err))
		}
		err = b.pinned(ctx, coll, ix, places)
		stale := errors.Is(err, errMoved) || fromCache && corpus.KindOf(err) == corpus.Invalid
		if !stale {
			return err
		}
		b.resolved.forget(name)
		cached = false
		if !fromCache {
			attempt++
		}
		if attempt > 1 {
			e := corpus.Wrap(corpus.Unavailable, "index_unavailable",
				"the collection's index is missing or being replaced; try again, and if this stays, run reconcile", err)
			e.RetryAfter = time.Second
			return e
		}
	}
}

// pinned answers the requests with one collection and index.
func (b *batch) pinned(ctx context.Context, coll corpus.Collection, ix corpus.Index, places []int) error {
	queries := make([]*query, len(places))
	var bad []corpus.FieldError
	for i, place := range places {
		q, wrong := plan(&b.reqs[place], coll, ix, b.embedder.Spec())
		for _, w := range wrong {
			w.Pointer = b.pointer(place) + w.Pointer
			bad = append(bad, w)
		}
		queries[i] = q
		if q != nil {
			q.pointer = b.pointer(place)
		}
	}
	if len(bad) > 0 {
		return invalid(bad...)
	}
	began := b.cfg.Now()
	if err := b.vectors(ctx, coll, ix, queries); err != nil {
		return err
	}
	embed := b.cfg.Now().Sub(began)
	t, err := b.rounds(ctx, coll, ix, queries)
	if err != nil {
		return err
	}
	if err := b.decorate(ctx, ix, queries); err != nil {
		return err
	}
	for i, place := range places {
		r := &b.out[place]
		*r = queries[i].response()
		r.Embed, r.Index, r.Join = embed, t.index, t.join
	}
	b.metrics.stage(embed, t.index, t.join)
	return nil
}

type timings struct{ index, join time.Duration }

// rounds queries, joins and widens until every query is done. Each round joins the whole list
// of every open query again: the last join alone is the answer.
func (b *batch) rounds(ctx context.Context, coll corpus.Collection, ix corpus.Index, queries []*query) (timings, error) {
	var t timings
	for round := 0; ; round++ {
		began := b.cfg.Now()
		open, err := b.round(ctx, coll, ix, queries, &t)
		if round > 0 && err != nil && ctx.Err() != nil && b.parent.Err() == nil {
			// Out of time while widening: what was joined before is a true answer, only short.
			return t, nil
		}
		if err != nil || !open {
			return t, err
		}
		// No point in a round that cannot end in time: the next one asks for more.
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < b.cfg.Now().Sub(began) {
			return t, nil
		}
	}
}

// round does one query and one join for all open queries, and reports whether any is still open.
func (b *batch) round(ctx context.Context, coll corpus.Collection, ix corpus.Index, queries []*query, t *timings) (bool, error) {
	began := b.cfg.Now()
	var asks []corpus.IndexQuery
	var askers []*query
	var lists []*list
	for _, q := range queries {
		for _, l := range q.lists {
			if !q.done && !l.settled {
				asks, askers, lists = append(asks, q.ask(l, b.cfg.Exact)), append(askers, q), append(lists, l)
				l.asked = began
			}
		}
	}
	if len(asks) > 0 {
		answers, err := b.index.QueryBatch(ctx, ix, asks)
		t.index += b.cfg.Now().Sub(began)
		if err != nil {
			return false, b.indexError(ctx, err)
		}
		for i, l := range lists {
			broken := l.take(answers[i])
			askers[i].leaveOut(broken)
			b.hint(ix, broken)
		}
	}

	join := corpus.JoinRequest{Collection: coll.ID, Name: coll.Name, Index: ix.ID}
	place := map[corpus.ID]int{}
	for _, q := range queries {
		if q.done {
			continue
		}
		join.Texts = join.Texts || q.req.IncludeText || q.req.Highlight
		join.Metadata = join.Metadata || q.req.IncludeMetadata || !q.filter.Empty()
		join.Context = max(join.Context, q.req.Context)
		for _, l := range q.lists {
			for id := range l.scores {
				if _, seen := place[id]; !seen {
					place[id] = len(join.Candidates)
					join.Candidates = append(join.Candidates, id)
				}
			}
		}
	}
	began = b.cfg.Now()
	joined, err := b.ledger.JoinCandidates(ctx, join)
	now := b.cfg.Now()
	t.join += now.Sub(began)
	if err != nil {
		return false, b.late(ctx, "the ledger", fmt.Errorf("joining candidates: %w", err))
	}
	if !joined.Serving {
		return false, errMoved
	}
	var dead []corpus.ID
	for i := range joined.Chunks {
		if c := &joined.Chunks[i]; c.State == corpus.JoinUnknown || c.State == corpus.JoinDead {
			dead = append(dead, c.ID)
		}
	}
	b.hint(ix, dead)

	open := false
	for _, q := range queries {
		if q.done {
			continue
		}
		refreshed := q.refreshed
		q.settle(&joined, place, now)
		switch {
		case q.done:
		case q.refreshed > refreshed:
			b.metrics.refreshed.Inc()
			open = true
		default:
			q.widened++
			open = true
		}
	}
	return open, nil
}

// decorate reads the vectors of what is shown, for queries that want to see them.
func (b *batch) decorate(ctx context.Context, ix corpus.Index, queries []*query) error {
	var ids []corpus.ID
	for _, q := range queries {
		if q.req.IncludeVector || q.req.Highlight {
			for _, r := range q.page() {
				ids = append(ids, r.id)
			}
		}
	}
	if len(ids) == 0 {
		return nil
	}
	slices.SortFunc(ids, corpus.ID.Compare)
	ids = slices.Compact(ids)
	points, err := b.index.ReadPoints(ctx, ix, ids, true)
	if err != nil {
		return b.indexError(ctx, err)
	}
	vectors := make(map[corpus.ID]*corpus.Vectors, len(points))
	for i := range points {
		// A damaged vector is not shown: JSON has no word for NaN. A deep reconcile finds it.
		if v := points[i].Vectors; v != nil && v.Finite() {
			vectors[points[i].ID] = v
		}
	}
	var missing []corpus.ID
	for _, id := range ids {
		if vectors[id] == nil {
			missing = append(missing, id)
		}
	}
	b.hint(ix, missing)
	for _, q := range queries {
		q.stored = vectors
		if q.req.Highlight {
			if err := b.highlight(ctx, q); err != nil {
				return b.late(ctx, "the embedder", fmt.Errorf("highlighting: %w", err))
			}
		}
	}
	return nil
}

// hint hands ids to reconcile, each once a batch.
func (b *batch) hint(ix corpus.Index, ids []corpus.ID) {
	var fresh []corpus.ID
	for _, id := range ids {
		if !b.hinted[id] {
			b.hinted[id] = true
			fresh = append(fresh, id)
		}
	}
	if len(fresh) > 0 && b.hints != nil {
		b.metrics.hinted.Add(float64(len(fresh)))
		b.hints.Hint(ix, fresh)
	}
}

// indexError turns an error of the index into the caller's.
func (b *batch) indexError(ctx context.Context, err error) error {
	switch corpus.KindOf(err) {
	case corpus.NotFound:
		return fmt.Errorf("%w: %w", errMoved, err)
	case corpus.Invalid:
		// The query was checked against the recorded layout: the index differs from it.
		return corpus.Wrap(corpus.Conflict, "index_refused",
			"the index refused a query that fits its recorded layout; run reconcile to look for config drift", err)
	}
	return b.late(ctx, "the index", fmt.Errorf("querying the index: %w", err))
}

// late names what was being waited for when our own deadline passed. Where it was the caller
// who left, or something else that failed, err stays what it is.
func (b *batch) late(ctx context.Context, what string, err error) error {
	if b.parent.Err() != nil || !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return err
	}
	e := corpus.Wrap(corpus.Unavailable, "search_timeout",
		fmt.Sprintf("%s did not answer within the search's %v; try again, or raise timeout_ms", what, b.budget),
		fmt.Errorf("%w: %w", ctx.Err(), err)) // the store's own error need not say that it was the deadline
	e.RetryAfter = time.Second
	return e
}

// invalid makes one error of field errors.
func invalid(bad ...corpus.FieldError) *corpus.Error {
	return &corpus.Error{Kind: corpus.Invalid, Code: "validation_failed", Detail: bad[0].Detail, Fields: bad}
}
