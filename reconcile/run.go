package reconcile

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Pages of a scan. A larger page of ids gains little (0.23 M ids/s at 1,000 and 0.32 M/s at
// 10,000 from a real server on 2 cores); a deep page is cut further by the index, by bytes.
const (
	scrollPage = 10_000
	deepPage   = 1_000
)

// lookBatch is how many suspects are read again together: one Get and two statements.
const lookBatch = 500

// checkpointEvery is the longest a scan goes on without recording how far it came: what is
// read again after a kill, at most (unmeasured).
const checkpointEvery = 2 * time.Second

// codes of errors that steer a run.
const (
	codeLeaseLost = "lease_lost"
	codeBraked    = "reconcile_braked"
	codeStopped   = "collection_stopped"
)

var (
	errCancelled = errors.New("reconcile: the run was cancelled")
	errLostLead  = errors.New("reconcile: another instance leads the run")
)

// work is one run as one instance sees it. It is shared by the instance's workers.
type work struct {
	*Service
	spec    corpus.RunSpec
	targets []target
	byIndex map[corpus.ID]*scope
	pace    *pacer
}

// target is one collection of the run.
type target struct {
	corpus.RunTarget
	scopes []*scope
}

// scope is one index that a run reads.
type scope struct {
	ix     corpus.Index
	target *target
}

// lead takes a run from its stage to its end and records how it ended, which it returns; "" when
// others have recorded it, or will.
func (s *Service) lead(ctx context.Context, id corpus.ID, pace *pacer) corpus.RunState {
	defer s.hold(id)()
	began := s.clock.Now()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var guard errgroup.Group
	guard.Go(func() error { return s.keepLead(ctx, id, cancel) })
	rec, err := s.ledger.GetRun(ctx, id)
	var braked string
	if err == nil {
		braked, err = s.stages(ctx, rec, pace)
	}
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	cancel(errClosing)
	_ = guard.Wait() // its error is the cause above

	// What was done must be recorded even as the process leaves.
	rctx, stop := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer stop()
	stopping := errors.Is(err, errClosing) || errors.Is(err, context.Canceled)
	state, message := corpus.RunDone, ""
	switch {
	case errors.Is(err, errLostLead):
		s.log.InfoContext(ctx, "reconcile run led elsewhere", "run", id)
		return ""
	case stopping && (rec.Spec.Origin == "request" || rec.Spec.ID.IsZero()):
		// Somebody waits for it: its checkpoints stay, and another instance may lead at once.
		s.log.InfoContext(ctx, "reconcile run left to others", "run", id)
		if _, err := s.ledger.LeadRun(rctx, id, s.leader, 0, false); err != nil {
			s.log.WarnContext(rctx, "giving up the lead of a reconcile run", "run", id, "error", err)
		}
		return ""
	case stopping:
		state, message = corpus.RunCancelled, "the service stopped" // the background comes round again
	case errors.Is(err, errCancelled) && rec.Spec.Origin != "request":
		state, message = corpus.RunCancelled, "made way for a run that was asked for"
	case errors.Is(err, errCancelled):
		state, message = corpus.RunCancelled, "the run was cancelled; it can be resumed"
	case err != nil:
		state, message = corpus.RunFailed, err.Error()+"; the run can be resumed from its checkpoints"
	case braked != "":
		state, message = corpus.RunBraked, braked
	}
	ended, ferr := s.ledger.FinishRun(rctx, id, s.leader, state, message, s.clock.Now())
	switch {
	case ferr != nil:
		s.log.ErrorContext(rctx, "recording the end of a reconcile run", "run", id, "error", ferr)
	case !ended:
		s.log.InfoContext(rctx, "reconcile run ended elsewhere", "run", id)
	default:
		s.ended(rctx, rec, state, err, s.clock.Now().Sub(began))
		return state
	}
	return ""
}

// ended logs and counts a finished run.
func (s *Service) ended(ctx context.Context, rec corpus.RunRecord, state corpus.RunState, err error, took time.Duration) {
	s.metrics.runs.WithLabelValues(string(state)).Inc()
	s.metrics.seconds.WithLabelValues(string(rec.Spec.Depth)).Observe(took.Seconds())
	if state == corpus.RunDone && rec.Spec.Whole() {
		s.metrics.lastSuccess.Set(float64(s.clock.Now().Unix()))
	}
	attrs := []any{"run", rec.Spec.ID, "origin", rec.Spec.Origin, "depth", rec.Spec.Depth, "state", state, "took", took.Round(time.Millisecond)}
	for _, t := range rec.Targets {
		all, repaired, cerr := s.ledger.CountFindings(ctx, rec.Spec.ID, t.Collection)
		if cerr != nil {
			s.log.ErrorContext(ctx, "counting findings", "error", cerr)
			break
		}
		for _, k := range corpus.FindingKinds {
			if all[k] > 0 {
				attrs = append(attrs, t.Name+"."+string(k), fmt.Sprintf("%d found, %d repaired", all[k], repaired[k]))
			}
		}
	}
	switch {
	case err != nil && state == corpus.RunFailed:
		s.log.ErrorContext(ctx, "reconcile run failed", append(attrs, "error", err)...)
	case rec.Spec.Origin == "request":
		s.log.InfoContext(ctx, "reconcile run ended", attrs...)
	default:
		s.log.DebugContext(ctx, "scrub ended", attrs...)
	}
	s.refreshGauges(ctx)
}

// keepLead renews the lead three times a lease and ends the run's context when the lead is
// lost or the run was cancelled.
func (s *Service) keepLead(ctx context.Context, id corpus.ID, cancel context.CancelCauseFunc) error {
	failing := s.clock.Now()
	for {
		// A short step bounds how late a cancellation is noticed.
		if err := s.clock.Sleep(ctx, min(s.cfg.Lease/3, time.Second)); err != nil {
			return err
		}
		rec, err := s.ledger.GetRun(ctx, id)
		var got bool
		if err == nil {
			got, err = s.ledger.LeadRun(ctx, id, s.leader, s.leadFor(rec.Spec.Origin), false)
		}
		switch {
		case err != nil:
			if ctx.Err() == nil && s.clock.Now().Sub(failing) > s.cfg.Lease {
				cancel(err)
				return err
			}
			continue
		case rec.CancelRequested:
			cancel(errCancelled)
			return errCancelled
		case !got:
			cancel(errLostLead)
			return errLostLead
		}
		failing = s.clock.Now()
	}
}

// stages runs what is left of a run. braked says why the brake stopped deletes somewhere.
func (s *Service) stages(ctx context.Context, rec corpus.RunRecord, pace *pacer) (braked string, err error) {
	w, err := s.open(ctx, rec, pace)
	if err != nil {
		return "", err
	}
	for stage := rec.Stage; stage < corpus.StageFinish; {
		began := s.clock.Now()
		switch stage {
		case corpus.StagePrepare:
			err = w.prepare(ctx)
		case corpus.StageScan:
			g, gctx := errgroup.WithContext(ctx)
			g.Go(func() error { return w.history(gctx) })
			g.Go(func() error { return w.drain(gctx, corpus.StageScan) })
			err = g.Wait()
		case corpus.StageDelete:
			if err = w.checkBrake(ctx); err == nil {
				err = w.drain(ctx, stage)
			}
		default:
			err = w.drain(ctx, stage)
		}
		if err == nil && stage == corpus.StageSettle {
			err = w.awaitRebuilds(ctx)
		}
		if err != nil {
			return "", err
		}
		s.log.DebugContext(ctx, "reconcile stage done", "run", w.spec.ID, "stage", int(stage), "took", s.clock.Now().Sub(began))
		next := stage + 1
		if next == corpus.StageSettle && !w.spec.Repair && !w.spec.Sweep {
			next = corpus.StageFinish // nothing is to be changed
		}
		ok, err := s.ledger.AdvanceRun(ctx, w.spec.ID, s.leader, next)
		if err != nil {
			return "", err
		}
		if !ok {
			return "", errLostLead
		}
		stage = next
	}
	rec, err = s.ledger.GetRun(ctx, w.spec.ID)
	for _, t := range rec.Targets {
		if t.Braked != "" {
			braked = "collection " + t.Name + ": " + t.Braked
		}
	}
	return braked, err
}

// open reads what a run covers.
func (s *Service) open(ctx context.Context, rec corpus.RunRecord, pace *pacer) (*work, error) {
	w := &work{Service: s, spec: rec.Spec, byIndex: map[corpus.ID]*scope{}, pace: pace}
	w.targets = make([]target, len(rec.Targets))
	for i, t := range rec.Targets {
		w.targets[i].RunTarget = t
		ixs, ready, err := s.ledger.TargetIndexes(ctx, t.Collection)
		if err != nil {
			return nil, err
		}
		for j, ix := range ixs {
			// An index whose Qdrant collection was never made holds nothing to compare with.
			if !ready[j] {
				continue
			}
			sc := &scope{ix: ix, target: &w.targets[i]}
			w.targets[i].scopes = append(w.targets[i].scopes, sc)
			w.byIndex[ix.ID] = sc
		}
	}
	return w, nil
}

// drain works on the run's ranges until all have finished the stage, here or elsewhere.
func (w *work) drain(ctx context.Context, stage corpus.RunStage) error {
	g, ctx := errgroup.WithContext(ctx)
	for range w.cfg.Workers {
		g.Go(func() error {
			for {
				r, ok, left, err := w.ledger.ClaimRange(ctx, w.spec.ID, stage, newID(), w.cfg.Lease)
				switch {
				case err != nil:
					return err
				case ok:
					if err := w.do(ctx, r); err != nil {
						return err
					}
				case left == 0:
					return nil
				default: // others work on what is left; if they die, their leases end
					if err := w.clock.Sleep(ctx, w.cfg.Poll); err != nil {
						return err
					}
				}
			}
		})
	}
	return g.Wait()
}

// help works on ranges that are free now, in the run's current stage, and returns when there
// are none. It is how an instance that does not lead takes part.
func (w *work) help(ctx context.Context, stage corpus.RunStage) error {
	for {
		r, ok, _, err := w.ledger.ClaimRange(ctx, w.spec.ID, stage, newID(), w.cfg.Lease)
		if err != nil || !ok {
			return err
		}
		if err := w.do(ctx, r); err != nil {
			return err
		}
	}
}

// do carries one range through its stage. A lost lease is not an error: somebody else has it.
func (w *work) do(ctx context.Context, r corpus.RunRange) error {
	sc := w.byIndex[r.Index]
	var err error
	switch {
	case sc == nil: // the index was retired, or its collection deleted, since the run began
	case r.Stage == corpus.StageScan:
		err = w.scan(ctx, sc, r)
	case r.Stage == corpus.StageConfirm:
		err = w.confirm(ctx, sc, r)
	case r.Stage == corpus.StageSettle:
		err = w.settle(ctx, sc, r)
	case r.Stage == corpus.StageDelete:
		err = w.remove(ctx, sc, r)
	}
	if corpus.KindOf(err) == corpus.NotFound {
		err = w.vanished(ctx, sc, err)
	}
	if err == nil {
		err = w.ledger.FinishStage(ctx, r)
	}
	if corpus.CodeOf(err) == codeLeaseLost {
		return nil
	}
	if err != nil {
		rctx, stop := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer stop()
		if rerr := w.ledger.ReleaseRange(rctx, r); rerr != nil {
			w.log.WarnContext(ctx, "releasing a range", "run", r.Run, "error", rerr)
		}
	}
	return err
}

// vanished decides what it means that an index, or its collection, is not there any more: it
// was retired while the run read it, and nobody misses it, or it was lost.
func (w *work) vanished(ctx context.Context, sc *scope, cause error) error {
	ixs, _, err := w.ledger.TargetIndexes(ctx, sc.ix.Collection)
	if err != nil {
		return err
	}
	for _, ix := range ixs {
		if ix.ID != sc.ix.ID {
			continue
		}
		exists, _, err := w.index.DescribeIndex(ctx, ix)
		if err != nil {
			return err
		}
		if exists {
			return cause
		}
		return w.lostIndex(ctx, sc)
	}
	w.log.InfoContext(ctx, "an index was retired during a reconcile run", "index", sc.ix.QdrantName, "run", w.spec.ID)
	return nil
}

// split cuts lo..hi into n ranges of about equal width by the first eight bytes.
func split(lo, hi corpus.ID, n int) [][2]corpus.ID {
	from, to := binary.BigEndian.Uint64(lo[:8]), binary.BigEndian.Uint64(hi[:8])
	step := (to-from)/uint64(n) + 1
	var out [][2]corpus.ID
	at := lo
	for i := 1; i < n; i++ {
		next := from + uint64(i)*step
		if next < from || next > to {
			break
		}
		var edge corpus.ID
		binary.BigEndian.PutUint64(edge[:8], next)
		out = append(out, [2]corpus.ID{at, before(edge)})
		at = edge
	}
	return append(out, [2]corpus.ID{at, hi})
}

// before returns the id in front of id, which is not zero.
func before(id corpus.ID) corpus.ID {
	for i := len(id) - 1; i >= 0; i-- {
		id[i]--
		if id[i] != 255 {
			break
		}
	}
	return id
}
