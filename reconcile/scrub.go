package reconcile

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// ScrubConfig of the background. The zero value of a field means its default.
type ScrubConfig struct {
	// Off switches quick checks and slices off; hints, stamps and help for other instances'
	// runs go on.
	Off bool
	// QuickEvery is the time between quick checks of a collection; default 5 min.
	QuickEvery time.Duration
	// FullWithin is the time in which every id is read once, slice by slice; default 24 h.
	FullWithin time.Duration
	// Depth of the slices: full (default) or deep.
	Depth corpus.Depth
	// Share of the time in which scrubbing has a request open at the index; default 0.1.
	Share float64
	// PointsPerSecond bounds it further; default 20,000.
	PointsPerSecond int
	// Repair lets scrubbing repair what it finds; by default it only reports, and deletes again
	// what the ledger had already declared dead.
	Repair bool
	// HintEvery is the time between looks at read-repair hints; default 10 s.
	HintEvery time.Duration
	// StampEvery is how often an index's stamp is renewed; default 1 min.
	StampEvery time.Duration
	// Tick is how often the loop looks for something to do; default 1 s.
	Tick time.Duration
}

func (c *ScrubConfig) defaults() {
	def(&c.QuickEvery, 5*time.Minute)
	def(&c.FullWithin, 24*time.Hour)
	def(&c.Depth, corpus.Full)
	def(&c.Share, 0.1)
	def(&c.PointsPerSecond, 20_000)
	def(&c.HintEvery, 10*time.Second)
	def(&c.StampEvery, time.Minute)
	def(&c.Tick, time.Second)
}

// sliceCount is into how many slices a rotation cuts the ids: by the first byte.
const sliceCount = 256

// maxHints bounds the queue of read-repair hints: what is dropped is found by the rotation.
const maxHints = 10_000

// hintBatch is how many hints of one index are looked at together.
const hintBatch = 1000

// Scrub keeps checking in the background until ctx ends: it renews stamps, follows read-repair
// hints, helps with runs of other instances, takes over runs whose leader died, runs quick
// checks, and reads a rotating slice of every collection. It blocks; run it once an instance.
// It returns nil when ctx ends: failures are logged and tried again.
func (s *Service) Scrub(ctx context.Context) error {
	pace := newPacer(s.clock, s.cfg.Scrub.PointsPerSecond, s.cfg.Scrub.Share, s.metrics.throttled.Inc)
	var loops sync.WaitGroup
	// Each duty has a loop of its own, so that a long slice holds up neither stamps nor hints.
	for _, duty := range []struct {
		what  string
		every time.Duration
		do    func(context.Context) error
	}{
		{"renewing stamps", s.cfg.Scrub.Tick, s.renewStamps},
		{"helping with runs", s.cfg.Scrub.Tick, func(ctx context.Context) error { return s.helpRuns(ctx, pace) }},
		{"following hints", s.cfg.Scrub.HintEvery, func(ctx context.Context) error { return s.followHints(ctx, pace) }},
		{"scrubbing", s.cfg.Scrub.Tick, func(ctx context.Context) error { return s.scrubDue(ctx, pace) }},
		{"forgetting old runs", time.Hour, func(ctx context.Context) error {
			s.refreshGauges(ctx)
			return s.ledger.ForgetRuns(ctx)
		}},
	} {
		loops.Go(func() {
			for {
				s.try(ctx, duty.what, duty.do)
				if s.clock.Sleep(ctx, duty.every) != nil {
					return
				}
			}
		})
	}
	loops.Wait()
	return nil
}

// try runs one duty of the loop. A failure is logged once here, and the loop goes on.
func (s *Service) try(ctx context.Context, what string, f func(context.Context) error) {
	if ctx.Err() != nil {
		return
	}
	err := f(ctx)
	switch {
	case err == nil, ctx.Err() != nil:
	case corpus.CodeOf(err) == codeRunning:
		// somebody is looking at the collection already
	default:
		s.log.WarnContext(ctx, "background reconcile failed", "doing", what, "error", err)
	}
}

// scrubDue runs the checks that are due and that no other instance took.
func (s *Service) scrubDue(ctx context.Context, pace *pacer) error {
	c := s.cfg.Scrub
	if c.Off {
		return nil
	}
	quick, slice, err := s.ledger.DueScrubs(ctx, c.QuickEvery, c.FullWithin/sliceCount, sliceCount)
	if err != nil {
		return err
	}
	for _, name := range quick {
		s.try(ctx, "quick check", func(ctx context.Context) error {
			return s.claimed(ctx, s.scrubSpec(name, "scrub", corpus.Quick), -1, pace)
		})
	}
	for name, n := range slice {
		spec := s.scrubSpec(name, "scrub", c.Depth)
		spec.Lo, spec.Hi = sliceBounds(n)
		s.try(ctx, "slice", func(ctx context.Context) error { return s.claimed(ctx, spec, n, pace) })
	}
	return nil
}

// claimed carries out a check that DueScrubs handed out. Where it could not begin, or a request or
// the end of the service cut it short, it is put back: the rotation leaves nothing out. A check
// that failed is not, lest one slice that cannot be read keeps the others from their turn.
func (s *Service) claimed(ctx context.Context, spec corpus.RunSpec, slice int, pace *pacer) error {
	state, err := s.background(ctx, spec, pace)
	if err != nil || state == corpus.RunCancelled {
		// Also as the service ends: the next one begins with it.
		pctx, stop := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer stop()
		err = errors.Join(s.ledger.PutBackScrub(pctx, spec.Collections[0], slice), err)
	}
	return err
}

func sliceBounds(n int) (lo, hi corpus.ID) {
	hi = corpus.MaxID
	lo[0], hi[0] = byte(n), byte(n)
	return lo, hi
}

func (s *Service) scrubSpec(collection, origin string, depth corpus.Depth) corpus.RunSpec {
	return corpus.RunSpec{
		ID: newID(), Collections: []string{collection}, Depth: depth, Origin: origin, Repair: s.cfg.Scrub.Repair, Sweep: true,
		MaxDeletes: s.cfg.MaxDeletes, Hi: corpus.MaxID,
	}
}

// backgroundLead bounds the lease of a background run's lead, below preemptWait: what a killed
// instance was scrubbing must not be in the way of somebody who asks. It is renewed each second.
const backgroundLead = 10 * time.Second

func (s *Service) leadFor(origin string) time.Duration {
	if origin == "request" {
		return s.cfg.Lease
	}
	return min(s.cfg.Lease, backgroundLead)
}

// background runs a spec to its end in the caller's goroutine, and returns how it ended; "" when
// that was recorded elsewhere.
func (s *Service) background(ctx context.Context, spec corpus.RunSpec, pace *pacer) (corpus.RunState, error) {
	defer s.hold(spec.ID)()
	rec, err := s.ledger.CreateRun(ctx, spec, s.clock.Now(), s.leader, s.leadFor(spec.Origin))
	if err != nil {
		return "", err
	}
	return s.lead(ctx, rec.Spec.ID, pace), nil
}

// helpRuns takes part in runs of other instances, and takes over those whose leader is gone.
func (s *Service) helpRuns(ctx context.Context, scrubPace *pacer) error {
	runs, err := s.ledger.ActiveRuns(ctx)
	if err != nil {
		return err
	}
	for _, rec := range runs {
		pace := scrubPace
		if rec.Spec.Origin == "request" {
			pace = s.requestPace()
		}
		if s.isLeading(rec.Spec.ID) {
			continue // in another goroutine
		}
		if !rec.Led || rec.Leader == s.leader {
			got, err := s.ledger.LeadRun(ctx, rec.Spec.ID, s.leader, s.leadFor(rec.Spec.Origin), false)
			if err != nil {
				return err
			}
			if got {
				s.log.InfoContext(ctx, "taking over a reconcile run whose leader is gone", "run", rec.Spec.ID)
				s.lead(ctx, rec.Spec.ID, pace)
				continue
			}
		}
		if rec.Stage <= corpus.StagePrepare || rec.Stage >= corpus.StageFinish {
			continue
		}
		w, err := s.open(ctx, rec, pace)
		if err != nil {
			return err
		}
		if err := w.help(ctx, rec.Stage); err != nil {
			return err
		}
	}
	return nil
}

// renewStamps gives every live index of every collection a fresh nonce, once a minute over all
// instances. A stamp that does not fit is left as it is, as evidence.
func (s *Service) renewStamps(ctx context.Context) error {
	ixs, err := s.ledger.StampedIndexes(ctx, s.cfg.Scrub.StampEvery)
	if err != nil {
		return err
	}
	for _, ix := range ixs {
		s.try(ctx, "renewing the stamp of "+ix.QdrantName, func(ctx context.Context) error {
			why, err := s.checkStamp(ctx, ix)
			if err != nil || why != "" {
				return err
			}
			return s.writeStamp(ctx, ix, s.cfg.Scrub.StampEvery)
		})
	}
	return nil
}

// writeStamp issues a nonce and writes it. The ledger comes first: at any time the index's
// nonce is one that the ledger has issued.
func (s *Service) writeStamp(ctx context.Context, ix corpus.Index, every time.Duration) error {
	st, due, err := s.ledger.IssueStamp(ctx, ix, newID(), every)
	if err != nil || !due {
		return err
	}
	return s.index.WriteStamp(ctx, ix, st)
}

// Hint tells reconcile that a search met ids that are dead or unknown in the ledger. It never
// blocks; when the queue is full the hint is dropped, and the rotation finds the points later.
func (s *Service) Hint(ix corpus.Index, ids []corpus.ID) {
	for _, id := range ids {
		s.metrics.hints.WithLabelValues(s.hints.put(ix, id)).Inc()
	}
}

// followHints looks at what searches met: one run for each collection, over the hinted ids only.
func (s *Service) followHints(ctx context.Context, pace *pacer) error {
	ix, batch := s.hints.take(hintBatch)
	if len(batch) == 0 {
		return nil
	}
	name, err := s.ledger.CollectionName(ctx, ix.Collection)
	if err != nil {
		if corpus.KindOf(err) == corpus.NotFound {
			return nil // deleted meanwhile
		}
		return err
	}
	spec := s.scrubSpec(name, "hint", corpus.Full)
	spec.SeedsOnly = true
	defer s.hold(spec.ID)()
	rec, err := s.ledger.CreateRun(ctx, spec, s.clock.Now(), s.leader, s.leadFor(spec.Origin))
	if err != nil {
		s.Hint(ix, batch) // the collection is busy: later
		return err
	}
	suspects := make([]corpus.Suspect, len(batch))
	for i, id := range batch {
		suspects[i] = corpus.Suspect{ID: id, Kind: corpus.Orphan, SeenAt: s.clock.Now()}
	}
	if err := s.ledger.AddSuspects(ctx, spec.ID, ix.ID, suspects); err != nil {
		return err // the run stays without a leader's renewal and is taken over, empty
	}
	s.lead(ctx, rec.Spec.ID, pace)
	return nil
}

// hintQueue holds distinct ids, oldest first, up to a bound.
type hintQueue struct {
	mu    sync.Mutex
	limit int
	known map[hint]struct{}
	order []hint
	// indexes by id, so that a hint is two ids and not a whole Index.
	indexes map[corpus.ID]corpus.Index
}

type hint struct{ index, id corpus.ID }

func newHintQueue(limit int) *hintQueue {
	return &hintQueue{limit: limit, known: map[hint]struct{}{}, indexes: map[corpus.ID]corpus.Index{}}
}

func (q *hintQueue) put(ix corpus.Index, id corpus.ID) string {
	q.mu.Lock()
	defer q.mu.Unlock()
	h := hint{ix.ID, id}
	if _, ok := q.known[h]; ok {
		return "known"
	}
	if len(q.order) >= q.limit {
		return "dropped"
	}
	q.known[h] = struct{}{}
	q.order = append(q.order, h)
	q.indexes[ix.ID] = ix
	return "queued"
}

// take removes up to n hints of the index whose hint is the oldest.
func (q *hintQueue) take(n int) (ix corpus.Index, ids []corpus.ID) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.order) == 0 {
		return ix, nil
	}
	first := q.order[0].index
	ix = q.indexes[first]
	rest := q.order[:0]
	for _, h := range q.order {
		if h.index == first && len(ids) < n {
			ids = append(ids, h.id)
			delete(q.known, h)
		} else {
			rest = append(rest, h)
		}
	}
	q.order = rest
	if len(q.order) == 0 {
		clear(q.indexes)
	}
	return ix, ids
}
