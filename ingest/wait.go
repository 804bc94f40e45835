package ingest

import (
	"context"
	"sync"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// waiters holds who waits for documents. What this instance settles reaches them at once; what
// another one does, at their next poll.
type waiters struct {
	mu    sync.Mutex
	byDoc map[corpus.ID][]*watch
}

// watch is one caller's wait.
type watch struct {
	changed chan struct{} // holds at most one
}

func newWaiters() *waiters { return &waiters{byDoc: map[corpus.ID][]*watch{}} }

func (w *waiters) add(docs []corpus.ID) *watch {
	c := &watch{changed: make(chan struct{}, 1)}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range docs {
		w.byDoc[id] = append(w.byDoc[id], c)
	}
	return c
}

func (w *waiters) remove(c *watch, docs []corpus.ID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range docs {
		list := w.byDoc[id]
		for i := range list {
			if list[i] == c {
				list[i] = list[len(list)-1]
				list = list[:len(list)-1]
				break
			}
		}
		if len(list) == 0 {
			delete(w.byDoc, id)
		} else {
			w.byDoc[id] = list
		}
	}
}

// notify wakes those who wait for any of the documents.
func (w *waiters) notify(progress []corpus.DocumentProgress) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.byDoc) == 0 {
		return
	}
	for i := range progress {
		for _, c := range w.byDoc[progress[i].Document] {
			signal(c.changed)
		}
	}
}

// Polls of a wait: often at first, for work that is done in milliseconds, then seldom, for what
// another instance does (unmeasured).
const (
	firstWaitPoll = 250 * time.Millisecond
	lastWaitPoll  = 2 * time.Second
)

// poll calls test until it returns true, whenever one of docs moved and now and then besides.
// It reports false if ctx ended or the service stopped first.
func (s *Service) poll(ctx context.Context, docs []corpus.ID, test func() bool) bool {
	c := s.waiting.add(docs)
	defer s.waiting.remove(c, docs)
	for wait := firstWaitPoll; ; wait = min(2*wait, lastWaitPoll) {
		if test() {
			return true
		}
		t := time.NewTimer(wait)
		select {
		case <-c.changed:
			t.Stop()
		case <-t.C:
		case <-s.stopping:
			t.Stop()
			return test() // a last look: the work may have been done while stopping
		case <-ctx.Done():
			t.Stop()
			return false
		}
	}
}

// await fills in the fates of accepted documents once they are known.
func (s *Service) await(ctx context.Context, collection corpus.ID, docs []*pendingDoc, out []corpus.DocumentResult) {
	open := make(map[corpus.ID]*pendingDoc, len(docs))
	ids := make([]corpus.ID, 0, len(docs))
	for _, d := range docs {
		// What was unchanged and serves already needs no wait.
		if d.err == nil && !(d.got.Acceptance == corpus.Unchanged && d.got.Serving == d.got.Version && !d.patched) {
			open[d.got.Document] = d
			ids = append(ids, d.got.Document)
		}
	}
	if len(open) == 0 {
		return
	}
	s.poll(ctx, ids, func() bool {
		rest := make([]corpus.ID, 0, len(open))
		for id := range open {
			rest = append(rest, id)
		}
		progress, err := s.cfg.Ledger.Progress(ctx, collection, rest)
		if err != nil {
			s.log.DebugContext(ctx, "reading progress", "err", err)
			return false // the next poll tries again, until ctx ends
		}
		for i := range progress {
			d := open[progress[i].Document]
			if status, cause, settled := verdict(d, &progress[i]); settled {
				out[d.place].Status, out[d.place].Err = status, cause
				delete(open, progress[i].Document)
			}
		}
		return len(open) == 0
	})
}

// verdict decides whether a wait for a document is over, and how it ended.
func verdict(d *pendingDoc, p *corpus.DocumentProgress) (status corpus.DocumentStatus, cause *corpus.Error, settled bool) {
	done := corpus.StatusIndexed
	if d.got.Acceptance == corpus.Unchanged {
		done = corpus.StatusUnchanged
	}
	switch {
	case !p.Known || p.Deleted || p.Target > d.got.Version && p.Serving != d.got.Version:
		// The target only grows and serving only ever moves to it: this version is history.
		return corpus.StatusSuperseded, nil, true
	case p.Serving == d.got.Version:
		// Metadata that was asked for has to be on the points, so that filters find it.
		if (d.got.Acceptance == corpus.NewMetadata || d.patched) && p.MetaSettled < d.got.MetaVersion && p.Failure == "" {
			return "", nil, false
		}
		return done, nil, true
	case p.Failure != "":
		return corpus.StatusFailed, corpus.Errorf(corpus.Invalid, "indexing_failed", "%s", p.Failure), true
	}
	return "", nil, false
}

// awaitGone waits until a deleted document's points are known to be absent.
func (s *Service) awaitGone(ctx context.Context, collection, doc corpus.ID, version int64) bool {
	return s.poll(ctx, []corpus.ID{doc}, func() bool {
		p, err := s.cfg.Ledger.Progress(ctx, collection, []corpus.ID{doc})
		if err != nil {
			s.log.DebugContext(ctx, "reading progress", "err", err)
			return false
		}
		return !p[0].Known || p[0].Dying == 0 || p[0].Target > version
	})
}
