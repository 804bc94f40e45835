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

// watch is one caller's wait for some documents.
type watch struct {
	docs    []corpus.ID
	changed chan struct{} // holds at most one
	// fresh is what was settled here since the caller last looked. Guarded by waiters.mu.
	fresh []corpus.DocumentProgress
}

func newWaiters() *waiters { return &waiters{byDoc: map[corpus.ID][]*watch{}} }

func (w *waiters) add(docs []corpus.ID) *watch {
	c := &watch{docs: docs, changed: make(chan struct{}, 1)}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range docs {
		w.byDoc[id] = append(w.byDoc[id], c)
	}
	return c
}

func (w *waiters) remove(c *watch) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range c.docs {
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

// notify tells those who wait for any of the documents where it stands. One without a Target
// says only that something happened to it.
func (w *waiters) notify(progress []corpus.DocumentProgress) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.byDoc) == 0 {
		return
	}
	for i := range progress {
		for _, c := range w.byDoc[progress[i].Document] {
			c.fresh = append(c.fresh, progress[i])
			signal(c.changed)
		}
	}
}

// take returns what came for c since the last call.
func (w *waiters) take(c *watch) []corpus.DocumentProgress {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := c.fresh
	c.fresh = nil
	return out
}

// Polls of a wait: often at first, for work that is done in milliseconds, then seldom, for what
// another instance does (unmeasured).
const (
	firstWaitPoll = 250 * time.Millisecond
	lastWaitPoll  = 2 * time.Second
)

// poll calls test until it returns true: with what came for c, whenever something did, and now
// and then with ask set, for what came from elsewhere. It reports false if ctx ended or the
// service stopped first.
func (s *Service) poll(ctx context.Context, c *watch, test func(fresh []corpus.DocumentProgress, ask bool) bool) bool {
	if test(s.waiting.take(c), false) {
		return true
	}
	wait := firstWaitPoll
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case <-c.changed:
			if test(s.waiting.take(c), false) {
				return true
			}
		case <-timer.C:
			if test(nil, true) {
				return true
			}
			wait = min(2*wait, lastWaitPoll)
			timer.Reset(wait)
		case <-s.stopping:
			return test(nil, true) // a last look: the work may have been done while stopping
		case <-ctx.Done():
			return false
		}
	}
}

// await fills in the fates of accepted documents once they are known. c was made before they
// were accepted, so that nothing settled since has been missed.
func (s *Service) await(ctx context.Context, collection corpus.ID, c *watch, docs []*pendingDoc, out []corpus.DocumentResult) {
	open := make(map[corpus.ID]*pendingDoc, len(docs))
	for _, d := range docs {
		// What was unchanged and serves already needs no wait.
		if d.err == nil && !(d.got.Acceptance == corpus.Unchanged && d.got.Serving == d.got.Version && !d.patched) {
			open[d.got.Document] = d
		}
	}
	if len(open) == 0 {
		return
	}
	settle := func(p *corpus.DocumentProgress) {
		d := open[p.Document]
		if d == nil {
			return
		}
		if status, cause, settled := verdict(d, p); settled {
			out[d.place].Status, out[d.place].Err = status, cause
			delete(open, p.Document)
		}
	}
	s.poll(ctx, c, func(fresh []corpus.DocumentProgress, ask bool) bool {
		for i := range fresh {
			switch d := open[fresh[i].Document]; {
			case d == nil:
			case fresh[i].Target == 0 || d.forMetadata():
				ask = true // only the ledger knows
			default:
				settle(&fresh[i])
			}
		}
		if !ask || len(open) == 0 {
			return len(open) == 0
		}
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
			settle(&progress[i])
		}
		return len(open) == 0
	})
	// Unchanged would say that it serves, to a caller who waits for that.
	for _, d := range open {
		if out[d.place].Status == corpus.StatusUnchanged {
			out[d.place].Status = corpus.StatusAccepted
		}
	}
}

// forMetadata reports that the wait is for metadata to be on the points.
func (d *pendingDoc) forMetadata() bool {
	return d.got.Acceptance == corpus.NewMetadata || d.patched
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
		if d.forMetadata() && p.MetaSettled < d.got.MetaVersion && p.Failure == "" {
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
	c := s.waiting.add([]corpus.ID{doc})
	defer s.waiting.remove(c)
	gone := func() bool {
		p, err := s.cfg.Ledger.Progress(ctx, collection, []corpus.ID{doc})
		if err != nil {
			s.log.DebugContext(ctx, "reading progress", "err", err)
			return false
		}
		return !p[0].Known || p[0].Dying == 0 || p[0].Target > version
	}
	return gone() || s.poll(ctx, c, func(fresh []corpus.DocumentProgress, ask bool) bool {
		return (ask || len(fresh) > 0) && gone()
	})
}
