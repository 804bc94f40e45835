package search

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// cacheKey names one embedding: a model's fingerprint and a text decide it, whenever it is
// computed, so an entry is never wrong, only old.
type cacheKey struct {
	fingerprint string
	heads       corpus.Heads
	text        string
}

type cacheEntry struct {
	vectors *corpus.Vectors
	bytes   int64
	expires time.Time
}

// flight is an embedding that some request computes while others wait for it.
type flight struct {
	done chan struct{} // closed when vectors and err are set
	// vectors is nil on failure. left is set when the computing request failed as a whole, which
	// may be its own doing (its caller left): whoever waits tries again.
	vectors *corpus.Vectors
	err     error
	left    bool
}

// cache keeps query embeddings, bounded by bytes and age, and lets concurrent requests for
// one text compute it once.
type cache struct {
	limit int64
	ttl   time.Duration
	now   func() time.Time

	mu      sync.Mutex
	lru     *simplelru.LRU[cacheKey, cacheEntry] // guarded by mu
	bytes   int64                                // guarded by mu
	flights map[cacheKey]*flight                 // guarded by mu

	hits, shared, misses func() // set by newMetrics
}

// entryOverhead approximates what an entry takes beside its text and vectors.
const entryOverhead = 256

func newCache(limit int64, ttl time.Duration, now func() time.Time) *cache {
	c := &cache{limit: limit, ttl: ttl, now: now, flights: map[cacheKey]*flight{}}
	// Only an impossible size is an error; bytes are the bound that counts.
	c.lru, _ = simplelru.NewLRU(1<<30, func(_ cacheKey, e cacheEntry) { c.bytes -= e.bytes })
	return c
}

// get returns one embedding for each key, and for those that failed alone, an error. compute
// is called at most once a round, with the distinct keys that are neither cached nor under way.
func (c *cache) get(ctx context.Context, keys []cacheKey, compute func(context.Context, []cacheKey) ([]corpus.Embedding, error)) ([]*corpus.Vectors, []error, error) {
	out := make([]*corpus.Vectors, len(keys))
	errs := make([]error, len(keys))
	open := make(map[cacheKey]bool, len(keys))
	for _, k := range keys {
		open[k] = true
	}
	got := make(map[cacheKey]*flight, len(keys))
	first := true
	for len(open) > 0 {
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
		var mine []cacheKey
		flights := map[cacheKey]*flight{} // those of others
		c.mu.Lock()
		for k := range open {
			if e, ok := c.lru.Get(k); ok {
				if c.now().Before(e.expires) {
					got[k] = &flight{vectors: e.vectors}
					delete(open, k)
					c.count(first, c.hits)
					continue
				}
				c.lru.Remove(k)
			}
			if f, ok := c.flights[k]; ok {
				flights[k] = f
				c.count(first, c.shared)
				continue
			}
			c.flights[k] = &flight{done: make(chan struct{})}
			mine = append(mine, k)
			c.count(first, c.misses)
		}
		c.mu.Unlock()
		first = false

		if len(mine) > 0 {
			computed, err := c.run(ctx, mine, compute)
			if err != nil {
				return nil, nil, err
			}
			for k, f := range computed {
				got[k] = f
				delete(open, k)
			}
		}
		for k, f := range flights {
			select {
			case <-f.done:
				if !f.left {
					got[k] = f
					delete(open, k)
				}
			case <-ctx.Done():
				return nil, nil, ctx.Err()
			}
		}
	}
	for i, k := range keys {
		out[i], errs[i] = got[k].vectors, got[k].err
	}
	return out, errs, nil
}

func (c *cache) count(first bool, add func()) {
	if first && add != nil {
		add()
	}
}

// run computes the flights that this request owns and lands them, also when compute panics.
func (c *cache) run(ctx context.Context, mine []cacheKey, compute func(context.Context, []cacheKey) ([]corpus.Embedding, error)) (map[cacheKey]*flight, error) {
	var embeddings []corpus.Embedding
	err := errors.New("search: the embedder panicked")
	landed := make(map[cacheKey]*flight, len(mine))
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for i, k := range mine {
			f := c.flights[k]
			delete(c.flights, k)
			if err != nil {
				f.left = true
			} else {
				e := &embeddings[i]
				if f.err = e.Err; f.err == nil {
					f.vectors = &e.Vectors
					c.add(k, f.vectors)
				}
			}
			landed[k] = f
			close(f.done)
		}
	}()
	embeddings, err = compute(ctx, mine)
	return landed, err
}

// add stores one embedding; the caller holds mu.
func (c *cache) add(k cacheKey, v *corpus.Vectors) {
	size := int64(entryOverhead + len(k.text) + len(k.fingerprint) + 4*len(v.Dense))
	if v.Sparse != nil {
		size += int64(8 * len(v.Sparse.Indices))
	}
	for _, row := range v.ColBERT {
		size += int64(24 + 4*len(row))
	}
	if size > c.limit/8 {
		return // one long query must not empty the cache
	}
	c.lru.Remove(k)
	c.lru.Add(k, cacheEntry{vectors: v, bytes: size, expires: c.now().Add(c.ttl)})
	c.bytes += size
	for c.bytes > c.limit {
		c.lru.RemoveOldest()
	}
}
