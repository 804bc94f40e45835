package ingest

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// acceptor is the group commit of acceptances: documents of concurrent requests share
// transactions. Committers are started when there is work and end when there is none, so an
// idle service has no goroutine here; close waits for them.
type acceptor struct {
	s *Service

	mu         sync.Mutex
	queue      []*pendingDoc // in the order of arrival
	bytes      int           // of the documents in queue
	committers int
	closed     bool
	idle       sync.Cond // committers fell to zero
}

// pendingDoc is one document of a request on its way to the ledger.
type pendingDoc struct {
	in    *corpus.DocumentInput
	place int // in the request
	t     *target
	doc   corpus.PreparedDocument
	size  int
	// patched: the wait is for metadata, whatever the acceptance.
	patched bool

	// Written by whoever decides the document's fate, before done is called.
	got corpus.Accepted
	err error
	// done is told once, when the ledger has answered.
	done func()
}

func (d *pendingDoc) fail(err error) { d.err = err }

func newAcceptor(s *Service) *acceptor {
	a := &acceptor{s: s}
	a.idle.L = &a.mu
	return a
}

// submit queues documents and returns when all of them were decided, or when ctx ended: then
// they may still be accepted, which nobody is told.
func (a *acceptor) submit(ctx context.Context, docs []*pendingDoc) error {
	if len(docs) == 0 {
		return nil
	}
	finished := make(chan struct{})
	var left atomic.Int64
	left.Store(int64(len(docs)))
	size := 0
	for _, d := range docs {
		d.done = func() {
			if left.Add(-1) == 0 {
				close(finished)
			}
		}
		d.size = documentBytes(&d.doc)
		size += d.size
	}
	if err := a.enqueue(docs, size); err != nil {
		return err
	}
	select {
	case <-finished:
		return nil
	case <-ctx.Done():
		return corpus.Wrap(corpus.Unavailable, "timeout", "the ledger did not answer in time; the documents may still be accepted", context.Cause(ctx))
	}
}

func (a *acceptor) enqueue(docs []*pendingDoc, size int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return corpus.Errorf(corpus.Unavailable, "shutting_down", "the service is shutting down; try again")
	}
	// A request larger than the backlog is let in when there is none.
	if a.bytes > 0 && a.bytes+size > a.s.cfg.AcceptBacklog {
		e := corpus.Errorf(corpus.Overloaded, "overloaded", "too many documents are waiting to be accepted; send them again")
		e.RetryAfter = time.Second
		a.s.metrics.rejected.Inc()
		return e
	}
	a.queue = append(a.queue, docs...)
	a.bytes += size
	if a.committers < a.s.cfg.Committers {
		a.committers++
		go a.commit()
	}
	return nil
}

// close refuses what comes and waits for what is under way.
func (a *acceptor) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	for a.committers > 0 {
		a.idle.Wait()
	}
}

// commit takes batches until the queue is empty.
func (a *acceptor) commit() {
	for {
		batch := a.take()
		if batch == nil {
			return
		}
		a.run(batch)
		for _, d := range batch {
			d.done()
		}
	}
}

// take removes documents of one collection with different ids from the front of the queue; nil
// ends the committer.
func (a *acceptor) take() []*pendingDoc {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.queue) == 0 {
		a.committers--
		if a.committers == 0 {
			a.idle.Broadcast()
		}
		return nil
	}
	first := a.queue[0].t.ID
	seen := make(map[string]bool, min(len(a.queue), a.s.cfg.AcceptDocuments))
	var batch []*pendingDoc
	rest := a.queue[:0]
	size := 0
	for i, d := range a.queue {
		full := len(batch) == a.s.cfg.AcceptDocuments || len(batch) > 0 && size+d.size > a.s.cfg.AcceptBytes
		if full {
			rest = append(rest, a.queue[i:]...)
			break
		}
		if d.t.ID != first || seen[d.doc.ExternalID] {
			rest = append(rest, d)
			continue
		}
		seen[d.doc.ExternalID] = true
		batch = append(batch, d)
		size += d.size
	}
	clear(a.queue[len(rest):])
	a.queue = rest
	a.bytes -= size
	return batch
}

// run accepts a batch in one transaction. Where something about a document makes the shared
// transaction fail, halves are tried, so that its neighbours do not fail with it.
func (a *acceptor) run(batch []*pendingDoc) {
	s := a.s
	t := batch[0].t
	docs := make([]corpus.PreparedDocument, len(batch))
	size, chunks := 0, 0
	for i, d := range batch {
		docs[i] = d.doc
		size += d.size
		chunks += len(d.doc.Chunks)
	}
	// Detached: one caller that leaves must not fail the documents of the others.
	ctx, cancel := context.WithTimeout(context.Background(), acceptTimeout)
	defer cancel()
	lease := corpus.Lease{Token: newToken(), For: s.cfg.Lease}
	if s.embeds(t.Index) {
		lease.Max = s.jobs.reserve(chunks, size)
	}
	begin := time.Now()
	got, work, err := s.cfg.Ledger.Accept(ctx, t.ID, docs, lease)
	s.metrics.acceptSeconds.Observe(time.Since(begin).Seconds())
	if err != nil {
		s.jobs.release(lease.Max)
		if kind := corpus.KindOf(err); len(batch) > 1 && (kind == corpus.Invalid || kind == corpus.Internal) {
			a.run(batch[:len(batch)/2])
			a.run(batch[len(batch)/2:])
			return
		}
		for _, d := range batch {
			d.err = err
		}
		return
	}
	s.at(StepAccepted)
	s.metrics.acceptDocuments.Observe(float64(len(batch)))
	for i, d := range batch {
		d.got = got[i]
		s.metrics.documents.WithLabelValues(acceptanceLabel(got[i].Acceptance)).Inc()
	}
	s.jobs.release(lease.Max - len(work))
	s.jobs.push(t.Index, work, s.batchSize(t.Index))
	// What was not claimed here, and metadata, waits in the ledger; entries of a building index
	// are found by the next poll.
	replaced, left := false, chunks > 0 && len(work) == lease.Max
	for i := range got {
		replaced = replaced || got[i].Acceptance == corpus.NewVersion && got[i].Version > 1
		left = left || got[i].Acceptance == corpus.NewMetadata || got[i].Acceptance == corpus.Unchanged
	}
	if left {
		signal(s.claimNow)
	}
	if replaced {
		signal(s.reapNow)
	}
}

// acceptTimeout bounds one accepting transaction (unmeasured: a thousand documents take some
// hundred milliseconds).
const acceptTimeout = 30 * time.Second

func acceptanceLabel(a corpus.Acceptance) string {
	switch a {
	case corpus.Unchanged:
		return "unchanged"
	case corpus.NewMetadata:
		return "metadata"
	case corpus.NewVersion:
		return "accepted"
	default:
		return "uncut"
	}
}

// documentBytes is about what a prepared document takes in memory and on the wire.
func documentBytes(d *corpus.PreparedDocument) int {
	n := 256 + len(d.ExternalID)
	for i := range d.Chunks {
		c := corpus.ChunkInput{Text: d.Chunks[i].Text, Vectors: d.Chunks[i].Vectors}
		n += 128 + chunkBytes(&c)
	}
	return n
}
