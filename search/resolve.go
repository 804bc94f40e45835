package search

import (
	"context"
	"sync"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

const (
	// resolveTTL bounds how long a collection's settings may be out of date. Which index
	// serves is checked by every join, so a stale entry costs a second try, never a wrong answer.
	resolveTTL = 10 * time.Second
	// maxResolved collections are remembered.
	maxResolved = 1024
)

// resolver remembers which index serves a collection, to save a round trip a search.
type resolver struct {
	ledger Ledger
	now    func() time.Time

	mu    sync.Mutex
	known map[string]resolution // guarded by mu
}

type resolution struct {
	coll corpus.Collection
	ix   corpus.Index
	at   time.Time
}

func newResolver(ledger Ledger, now func() time.Time) *resolver {
	return &resolver{ledger: ledger, now: now, known: map[string]resolution{}}
}

// get returns the collection and its serving index, from memory if cached allows it.
func (r *resolver) get(ctx context.Context, name string, cached bool) (corpus.Collection, corpus.Index, bool, error) {
	if cached {
		r.mu.Lock()
		k, ok := r.known[name]
		r.mu.Unlock()
		if ok && r.now().Sub(k.at) < resolveTTL {
			return k.coll, k.ix, true, nil
		}
	}
	at := r.now()
	coll, ix, err := r.ledger.ResolveCollection(ctx, name)
	if err != nil {
		return coll, ix, false, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.known) >= maxResolved {
		clear(r.known)
	}
	r.known[name] = resolution{coll, ix, at}
	return coll, ix, false, nil
}

func (r *resolver) forget(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.known, name)
}
