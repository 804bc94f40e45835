package reconcile

import (
	"context"
	"fmt"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// settled kinds: repaired by the workers that also settle ingestion.
var byWorkers = []corpus.FindingKind{corpus.Missing, corpus.StalePayload, corpus.CorruptVector, corpus.Stuck}

// states of a finding in the ledger.
const (
	stateOpen      = "open"
	stateRepairing = "repairing"
	stateRepaired  = "repaired"
	stateRemains   = "remains"
)

// settle waits until the workers have settled what confirm gave them, reads every point back,
// and records which findings are repaired. What reads back wrong is reported as such.
func (w *work) settle(ctx context.Context, sc *scope, r corpus.RunRange) error {
	if !w.spec.Repair {
		return nil
	}
	progress := w.clock.Now()
	for from := r.Lo; ; {
		batch, err := w.ledger.PendingFindings(ctx, r, stateRepairing, byWorkers, from, lookBatch)
		if err != nil {
			return err
		}
		if len(batch) == 0 {
			if from == r.Lo {
				return nil
			}
			from = r.Lo // another round over those that were not settled yet
			if err := w.ledger.RenewRange(ctx, r, w.cfg.Lease); err != nil {
				return err
			}
			if err := w.clock.Sleep(ctx, w.cfg.Poll); err != nil {
				return err
			}
			continue
		}
		if err := w.ledger.RenewRange(ctx, r, w.cfg.Lease); err != nil {
			return err
		}
		done, err := w.readBack(ctx, sc, batch, w.clock.Now().Sub(progress) > w.cfg.SettleTimeout)
		if err != nil {
			return err
		}
		if done > 0 {
			progress = w.clock.Now()
		}
		next, ok := batch[len(batch)-1].ID.Next()
		if !ok {
			next = r.Lo
		}
		from = next
	}
}

// readBack judges again those of batch whose entries are settled and returns how many findings
// are decided. With giveUp the others are decided too: they remain.
func (w *work) readBack(ctx context.Context, sc *scope, batch []corpus.Finding, giveUp bool) (done int, err error) {
	suspects := make([]corpus.Suspect, len(batch))
	for i, f := range batch {
		kind := f.Kind
		if kind == corpus.Missing || kind == corpus.Stuck {
			kind = corpus.CorruptVector // the whole point was written: read all of it back
		}
		suspects[i] = corpus.Suspect{ID: f.ID, Kind: kind}
	}
	bare, whole := ids(suspects)
	rows, err := w.rows(ctx, sc, append(bare, whole...))
	if err != nil {
		return 0, err
	}
	settled := func(id corpus.ID) bool {
		row := rows[id]
		switch {
		case row == nil:
			return true
		case row.State == corpus.EntryDead:
			return row.Absent
		default:
			return row.Died || row.State == corpus.EntryIndexed && row.MetaVersion == row.WantMeta
		}
	}
	keep := func(all []corpus.ID) (out []corpus.ID) {
		for _, id := range all {
			if settled(id) {
				out = append(out, id)
			}
		}
		return out
	}
	pts, err := w.points(ctx, sc, keep(bare), keep(whole))
	if err != nil {
		return 0, err
	}
	facts, err := w.ledger.RollbackFacts(ctx, sc.ix.Collection)
	if err != nil {
		return 0, err
	}
	j := w.judge(sc, facts)
	var good, bad []corpus.Finding
	var goodWhy, badWhy []string
	for _, f := range batch {
		row := rows[f.ID]
		switch {
		case row == nil || row.State != corpus.EntryDead && row.Died || row.State == corpus.EntryDead && f.Kind != corpus.Stuck:
			good, goodWhy = append(good, f), append(goodWhy, "the chunk was dropped meanwhile")
		case row.State == corpus.EntryFailed:
			bad, badWhy = append(bad, f), append(badWhy, "repair failed: "+orUnknown(row.LastError))
		case !settled(f.ID):
			if giveUp {
				bad, badWhy = append(bad, f), append(badWhy, fmt.Sprintf("no worker settled it within %s (entry %s, %d attempts, %s): is a service running that ingests?",
					w.cfg.SettleTimeout, row.State, row.Attempts, orUnknown(row.LastError)))
			}
		default:
			pt := pts[f.ID]
			j.vectors = pt != nil && pt.Vectors != nil
			if v := j.look(row, pt); len(v) > 0 {
				bad, badWhy = append(bad, f), append(badWhy, "repaired, but it reads back wrong: "+v[0].detail)
			} else {
				good, goodWhy = append(good, f), append(goodWhy, "")
			}
		}
	}
	return len(good) + len(bad), w.outcome(ctx, sc.ix.ID, good, goodWhy, bad, badWhy)
}

func orUnknown(s string) string {
	if s == "" {
		return "no error recorded"
	}
	return s
}

// outcome records repaired and remaining findings.
func (w *work) outcome(ctx context.Context, index corpus.ID, good []corpus.Finding, goodWhy []string, bad []corpus.Finding, badWhy []string) error {
	if err := w.ledger.SetFindings(ctx, w.spec.ID, index, good, stateRepaired, goodWhy); err != nil {
		return err
	}
	for _, f := range good {
		w.metrics.repairs.WithLabelValues(string(f.Kind), stateRepaired).Inc()
	}
	if err := w.ledger.SetFindings(ctx, w.spec.ID, index, bad, stateRemains, badWhy); err != nil {
		return err
	}
	for _, f := range bad {
		w.metrics.repairs.WithLabelValues(string(f.Kind), stateRemains).Inc()
	}
	return nil
}

// awaitRebuilds waits for lost indexes that are being built again, and reads the result back.
func (w *work) awaitRebuilds(ctx context.Context) error {
	lost, err := w.ledger.Rebuilding(ctx, w.spec.ID)
	if err != nil {
		return err
	}
	for _, ix := range lost {
		why, err := w.awaitRebuild(ctx, ix)
		if err != nil {
			return err
		}
		f := []corpus.Finding{{Kind: corpus.LostIndex, ID: ix.ID}}
		if why == "" {
			err = w.outcome(ctx, ix.ID, f, []string{""}, nil, nil)
		} else {
			err = w.outcome(ctx, ix.ID, nil, nil, f, []string{why})
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// awaitRebuild returns "" once the collection's indexes exist and hold every chunk that was
// live when the wait began, or why it gave up.
func (w *work) awaitRebuild(ctx context.Context, lost corpus.Index) (string, error) {
	facts, err := w.ledger.RollbackFacts(ctx, lost.Collection)
	if corpus.KindOf(err) == corpus.NotFound {
		return "", nil // the collection was deleted: nothing is lost any more
	}
	if err != nil {
		return "", err
	}
	progress, held := w.clock.Now(), int64(-1)
	for {
		ixs, ready, err := w.ledger.TargetIndexes(ctx, lost.Collection)
		if err != nil {
			return "", err
		}
		done, points := true, int64(0)
		for i, ix := range ixs {
			if !ready[i] {
				done = false
				continue
			}
			pending, err := w.ledger.PendingUpTo(ctx, ix, facts.LastGen)
			if err != nil {
				return "", err
			}
			done = done && !pending
			var n int64
			err = w.pace.retry(ctx, func() (err error) {
				n, err = w.index.CountPoints(ctx, ix)
				return err
			})
			if err != nil && corpus.KindOf(err) != corpus.NotFound && corpus.CodeOf(err) != codeNoExact {
				return "", err
			}
			points += n
		}
		if done {
			for _, ix := range ixs {
				if why, err := w.verifyRebuilt(ctx, ix); err != nil || why != "" {
					return why, err
				}
			}
			return "", nil
		}
		if points != held {
			held, progress = points, w.clock.Now()
		}
		if w.clock.Now().Sub(progress) > w.cfg.SettleTimeout {
			return fmt.Sprintf("the new index holds %d points and did not grow for %s: is a service running that ingests?", held, w.cfg.SettleTimeout), nil
		}
		if err := w.clock.Sleep(ctx, w.cfg.Poll); err != nil {
			return "", err
		}
	}
}

func (w *work) verifyRebuilt(ctx context.Context, ix corpus.Index) (string, error) {
	exists, drift, err := w.index.DescribeIndex(ctx, ix)
	switch {
	case err != nil:
		return "", err
	case !exists:
		return "the new index " + ix.QdrantName + " does not exist either", nil
	case len(drift) > 0:
		return fmt.Sprintf("the new index %s is not as it should be: %v", ix.QdrantName, drift), nil
	}
	return "", nil
}

// checkBrake looks, before the first delete of the run, whether all of them together are
// within what a day allows. The transaction that enters tombstones counts again.
func (w *work) checkBrake(ctx context.Context) error {
	if !w.spec.Repair {
		return nil
	}
	rec, err := w.ledger.GetRun(ctx, w.spec.ID)
	if err != nil {
		return err
	}
	for i := range w.targets {
		t := &w.targets[i]
		if t.Stopped == "" {
			t.Stopped = rec.Targets[i].Stopped // found by another instance
		}
		all, repaired, err := w.ledger.CountFindings(ctx, w.spec.ID, t.Collection)
		if err != nil {
			return err
		}
		want := all[corpus.Orphan] - repaired[corpus.Orphan]
		if t.Stopped != "" {
			if want+all[corpus.RolledBack] > 0 {
				err = w.brake(ctx, t, t.Stopped+"; nothing was deleted. "+afterRollback(t.Name))
			}
			if err != nil {
				return err
			}
			continue
		}
		if want == 0 {
			continue
		}
		if err := w.measure(ctx, t); err != nil {
			return err
		}
		today, err := w.ledger.DeletesToday(ctx, t.Collection)
		if err != nil {
			return err
		}
		empty, err := w.ledger.LedgerEmpty(ctx, t.Collection)
		if err != nil {
			return err
		}
		limit := w.budget(t).Limit
		var why string
		switch {
		case empty:
			why = fmt.Sprintf("the ledger knows no chunk of this collection while its index holds %d points: this looks like the wrong or an emptied database; nothing was deleted", t.IndexPoints)
		case today+want > limit:
			why = fmt.Sprintf("%d points would be deleted, after %d earlier today; the limit is %d (%.0f %% of %d points); nothing was deleted: if the findings are right, run again with --force or a higher --max-deletes",
				want, today, limit, 100*w.spec.MaxDeletes, t.IndexPoints)
		default:
			continue
		}
		if w.spec.Force {
			w.log.WarnContext(ctx, "brake overridden by force", "collection", t.Name, "run", w.spec.ID, "verdict", why)
			continue
		}
		if err := w.brake(ctx, t, why); err != nil {
			return err
		}
	}
	return nil
}

// measure counts the points of a collection's serving index, of which the brake takes its
// share. Where the server refuses exact counts only the free deletes are allowed.
func (w *work) measure(ctx context.Context, t *target) error {
	t.IndexPoints = 0
	for _, sc := range t.scopes {
		if sc.ix.State != corpus.IndexServing {
			continue
		}
		err := w.pace.retry(ctx, func() (err error) {
			t.IndexPoints, err = w.index.CountPoints(ctx, sc.ix)
			return err
		})
		if err != nil && corpus.CodeOf(err) != codeNoExact && corpus.KindOf(err) != corpus.NotFound {
			return err
		}
	}
	return w.ledger.PrepareTarget(ctx, w.spec.ID, t.RunTarget, nil)
}

func (w *work) brake(ctx context.Context, t *target, why string) error {
	w.log.WarnContext(ctx, "deletes stopped by the brake", "collection", t.Name, "run", w.spec.ID, "reason", why)
	return w.ledger.BrakeTarget(ctx, w.spec.ID, t.Collection, why)
}

func (w *work) budget(t *target) corpus.DeleteBudget {
	return corpus.DeleteBudget{
		Limit: max(w.cfg.FreeDeletes, int64(w.spec.MaxDeletes*float64(t.IndexPoints))),
		Force: w.spec.Force, Horizon: w.cfg.Quarantine,
	}
}

// remove deletes the range's confirmed orphans, and foreign points whose owner was named: it
// reads them again, has the ledger declare them dead, deletes them by id and reads them absent.
func (w *work) remove(ctx context.Context, sc *scope, r corpus.RunRange) error {
	if !w.spec.Repair && !w.spec.Sweep {
		return nil
	}
	kinds := []corpus.FindingKind{corpus.Orphan}
	if w.spec.Repair && w.spec.DeleteForeign != "" {
		kinds = append(kinds, corpus.Foreign)
	}
	for from := r.Lo; ; {
		if held, err := w.held(ctx, sc.target); err != nil || held {
			return err
		}
		batch, err := w.ledger.PendingFindings(ctx, r, stateOpen, kinds, from, lookBatch)
		if err != nil || len(batch) == 0 {
			return err
		}
		if err := w.ledger.RenewRange(ctx, r, w.cfg.Lease); err != nil {
			return err
		}
		if err := w.bury(ctx, sc, batch); err != nil {
			return err
		}
		next, ok := batch[len(batch)-1].ID.Next()
		if !ok {
			return nil
		}
		from = next
	}
}

// held reports whether the collection's deletes were stopped, by history or by the brake, on
// whatever instance that was found.
func (w *work) held(ctx context.Context, t *target) (bool, error) {
	rec, err := w.ledger.GetRun(ctx, w.spec.ID)
	if err != nil {
		return false, err
	}
	for _, x := range rec.Targets {
		if x.Collection == t.Collection {
			return x.Stopped != "" || x.Braked != "", nil
		}
	}
	return true, nil
}

// afterRollback is what resolves a stop; force does not.
func afterRollback(collection string) string {
	return fmt.Sprintf("Find out which Postgres is right. If it is this one: lockstep reconcile --collection %q --rollback adopt. If the index is to be built again from it: --rollback discard (docs/reconcile.md)", collection)
}

// bury deletes one batch.
func (w *work) bury(ctx context.Context, sc *scope, batch []corpus.Finding) error {
	all := make([]corpus.ID, len(batch))
	for i, f := range batch {
		all[i] = f.ID
	}
	pts, err := w.points(ctx, sc, all, nil)
	if err != nil {
		return err
	}
	rows, err := w.rows(ctx, sc, all)
	if err != nil {
		return err
	}
	var claims []corpus.OrphanClaim
	var claimed, good, bad []corpus.Finding
	var goodWhy, badWhy []string
	for _, f := range batch {
		pt, row := pts[f.ID], rows[f.ID]
		if pt == nil {
			good, goodWhy = append(good, f), append(goodWhy, "the point is gone")
			continue
		}
		ours := pt.HasOwner && pt.Payload.Owner == w.cfg.Owner
		switch {
		case !w.spec.Repair && row == nil:
			// a sweep deletes only what the ledger has already declared dead
		case f.Kind == corpus.Foreign && !w.named(pt), f.Kind == corpus.Orphan && row == nil && !ours:
			// not the owner that was named, or not ours any more: it stays
		case !ours:
			claims, claimed = append(claims, corpus.OrphanClaim{ID: f.ID, Foreign: true}), append(claimed, f)
		default:
			claims, claimed = append(claims, corpus.OrphanClaim{ID: f.ID, Document: pt.Payload.Document, Gen: pt.Payload.Gen}), append(claimed, f)
		}
	}
	if len(claims) == 0 {
		return w.outcome(ctx, sc.ix.ID, good, goodWhy, nil, nil)
	}
	facts, err := w.ledger.RollbackFacts(ctx, sc.ix.Collection)
	if err != nil {
		return err
	}
	fates, err := w.ledger.EnterTombstones(ctx, sc.ix, claims, w.budget(sc.target))
	switch corpus.CodeOf(err) {
	case codeBraked:
		return w.brake(ctx, sc.target, err.Error())
	case codeStopped:
		return w.ledger.StopTarget(ctx, w.spec.ID, sc.target.Collection, err.Error())
	}
	if err != nil {
		return err
	}
	var dead []corpus.ID
	var deadOf []corpus.Finding
	for i, fate := range fates {
		switch fate {
		case corpus.OrphanRolledBack:
			return w.stop(ctx, sc.target, facts.Adopted, fmt.Sprintf("point %s carries a number that this Postgres never handed out", claims[i].ID))
		case corpus.OrphanElsewhere:
			bad, badWhy = append(bad, claimed[i]), append(badWhy, "nothing was deleted: the id is live in another collection, so this Qdrant collection may be an alias or a copy of that one's")
		case corpus.OrphanAlive:
			good, goodWhy = append(good, claimed[i]), append(goodWhy, "the id became live meanwhile; nothing was deleted")
		case corpus.OrphanDead:
			dead, deadOf = append(dead, claims[i].ID), append(deadOf, claimed[i])
		}
	}
	if w.cfg.Quarantine > 0 {
		until := w.clock.Now().Add(w.cfg.Quarantine).UTC().Format(time.RFC3339)
		for _, f := range deadOf {
			good, goodWhy = append(good, f), append(goodWhy, "declared dead, so no search shows it; its point is deleted after "+until)
		}
		return w.outcome(ctx, sc.ix.ID, good, goodWhy, bad, badWhy)
	}
	if len(dead) > 0 {
		err := w.pace.retry(ctx, func() error { return w.index.DeletePoints(ctx, sc.ix, dead) })
		if err != nil {
			return err
		}
		still, err := w.points(ctx, sc, dead, nil)
		if err != nil {
			return err
		}
		var absent []corpus.ID
		for i, f := range deadOf {
			if still[dead[i]] != nil {
				bad, badWhy = append(bad, f), append(badWhy, "deleted, but it reads back present")
				continue
			}
			absent = append(absent, dead[i])
			good, goodWhy = append(good, f), append(goodWhy, "")
		}
		if err := w.ledger.MarkAbsent(ctx, sc.ix, absent); err != nil {
			return err
		}
	}
	return w.outcome(ctx, sc.ix.ID, good, goodWhy, bad, badWhy)
}

// named reports whether an operator asked for the deletion of this owner's points.
func (w *work) named(pt *corpus.PointState) bool {
	if !pt.HasOwner {
		return w.spec.DeleteForeign == "none"
	}
	return pt.Payload.Owner.String() == w.spec.DeleteForeign
}
