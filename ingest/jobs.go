package ingest

import (
	"math/rand/v2"
	"sync"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// jobQueue holds claimed entries that wait for a worker. Room is reserved before entries are
// claimed, so that what is claimed never waits for long and memory is bounded.
type jobQueue struct {
	mu       sync.Mutex
	some     sync.Cond // jobs came, or the queue closed
	maxCount int
	maxBytes int
	count    int // entries queued or reserved
	bytes    int // of entries queued
	jobs     []job
	closed   bool
	// room is signalled when entries leave the queue.
	room chan struct{}
}

// job is work of one index.
type job struct {
	ix      corpus.Index
	entries []corpus.Entry
	bytes   int
}

func newJobQueue(count, bytes int) *jobQueue {
	q := &jobQueue{maxCount: count, maxBytes: bytes, room: make(chan struct{}, 1)}
	q.some.L = &q.mu
	return q
}

// reserve takes room for up to want entries and returns for how many. Entries of about size
// bytes find none while the queue holds its fill.
func (q *jobQueue) reserve(want, size int) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || q.bytes > 0 && q.bytes+size > q.maxBytes {
		return 0
	}
	n := max(0, min(want, q.maxCount-q.count))
	q.count += n
	return n
}

// release gives back room that was reserved and is not used.
func (q *jobQueue) release(n int) {
	if n == 0 {
		return
	}
	q.mu.Lock()
	q.count -= n
	q.mu.Unlock()
	signal(q.room)
}

// push queues entries for which room is reserved, in jobs of at most size entries.
func (q *jobQueue) push(ix corpus.Index, entries []corpus.Entry, size int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(entries) > 0 {
		n := min(size, len(entries))
		j := job{ix: ix, entries: entries[:n:n]}
		for i := range j.entries {
			j.bytes += entryBytes(&j.entries[i])
		}
		q.bytes += j.bytes
		q.jobs = append(q.jobs, j)
		entries = entries[n:]
		q.some.Signal()
	}
}

// pop waits for a job and adds to it others of the same index, up to size entries, so that
// small requests travel together. ok is false once the queue is closed.
func (q *jobQueue) pop(size func(corpus.Index) int) (j job, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.jobs) == 0 && !q.closed {
		q.some.Wait()
	}
	if q.closed {
		return job{}, false
	}
	j = q.jobs[0]
	limit := size(j.ix)
	rest := q.jobs[:0]
	for _, other := range q.jobs[1:] {
		if other.ix.ID == j.ix.ID && len(j.entries)+len(other.entries) <= limit {
			j.entries = append(j.entries, other.entries...)
			j.bytes += other.bytes
			continue
		}
		rest = append(rest, other)
	}
	clear(q.jobs[len(rest):])
	q.jobs = rest
	q.count -= len(j.entries)
	q.bytes -= j.bytes
	signal(q.room)
	return j, true
}

// close ends pop and returns what was waiting.
func (q *jobQueue) close() []job {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	rest := q.jobs
	q.jobs, q.count, q.bytes = nil, 0, 0
	q.some.Broadcast()
	return rest
}

func (q *jobQueue) waiting() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := 0
	for i := range q.jobs {
		n += len(q.jobs[i].entries)
	}
	return n
}

func entryBytes(e *corpus.Entry) int {
	c := corpus.ChunkInput{Text: e.Text, Vectors: e.Vectors}
	return 128 + chunkBytes(&c)
}

// pauses holds off from stores that fail: one key for each index, the zero ID for the embedder.
// The delay doubles with each failure in a row and honours what the store asks for.
type pauses struct {
	first, last time.Duration
	mu          sync.Mutex
	byKey       map[corpus.ID]pause
}

type pause struct {
	failures int
	until    time.Time
}

func newPauses(first time.Duration) *pauses {
	return &pauses{first: first, last: 150 * first, byKey: map[corpus.ID]pause{}}
}

// failed records a failure and returns how long to wait.
func (p *pauses) failed(key corpus.ID, atLeast time.Duration) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := p.byKey[key]
	v.failures++
	d := max(backoff(v.failures, p.first, p.last), atLeast)
	v.until = time.Now().Add(d)
	p.byKey[key] = v
	return d
}

// worked ends a series of failures.
func (p *pauses) worked(key corpus.ID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.byKey, key)
}

// left returns how long the key is still paused.
func (p *pauses) left(key corpus.ID) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Until(p.byKey[key].until)
}

// backoff doubles from first to last, with jitter of half to one and a half.
func backoff(failures int, first, last time.Duration) time.Duration {
	d := last
	if failures < 20 {
		d = min(last, first<<max(0, failures-1))
	}
	return d/2 + rand.N(d)
}
