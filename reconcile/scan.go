package reconcile

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// maxRanges bounds how finely a run is split: enough for any number of instances.
const maxRanges = 4096

// gapsAtOnce bounds one filter; maxGen is above every gen (2^53, where floats end).
const (
	gapsAtOnce = 64
	maxGen     = 1 << 53
)

// maxEvidence is how many points of a lost history one run lists.
const maxEvidence = 1000

// prepare looks at what needs no walk (history, stamps, the indexes as wholes, stuck work),
// and lays out the ranges.
func (w *work) prepare(ctx context.Context) error {
	for i := range w.targets {
		t := &w.targets[i]
		var ranges []corpus.RunRange
		for _, sc := range t.scopes {
			rs, err := w.prepareScope(ctx, t, sc)
			if err != nil {
				return fmt.Errorf("collection %s: %w", t.Name, err)
			}
			ranges = append(ranges, rs...)
		}
		if err := w.ledger.PrepareTarget(ctx, w.spec.ID, t.RunTarget, ranges); err != nil {
			return err
		}
	}
	if !w.spec.Whole() || len(w.targets) == 0 {
		return nil
	}
	return w.orphanIndexes(ctx)
}

func (w *work) prepareScope(ctx context.Context, t *target, sc *scope) ([]corpus.RunRange, error) {
	var exists bool
	var drift []string
	err := w.pace.retry(ctx, func() (err error) {
		exists, drift, err = w.index.DescribeIndex(ctx, sc.ix)
		return err
	})
	if err != nil {
		return nil, err
	}
	if !exists {
		return nil, w.lostIndex(ctx, sc)
	}
	if len(drift) > 0 {
		if err := w.drifted(ctx, sc, drift); err != nil {
			return nil, err
		}
	}
	if !w.spec.SeedsOnly {
		if err := w.seed(ctx, sc); err != nil {
			return nil, err
		}
	}
	first, n := corpus.StageScan, 1
	switch {
	case w.spec.SeedsOnly:
		first = corpus.StageConfirm
	case w.spec.Whole():
		// An estimate is enough to split by and to show progress against.
		points, err := w.ledger.EstimatePoints(ctx, sc.ix)
		if err != nil {
			return nil, err
		}
		if sc.ix.State == corpus.IndexServing {
			t.IndexPoints = points
		}
		if w.spec.Depth != corpus.Quick {
			n = min(max(int(points/w.cfg.RangePoints), 1), maxRanges)
		}
	}
	var out []corpus.RunRange
	for _, b := range split(w.spec.Lo, w.spec.Hi, n) {
		out = append(out, corpus.RunRange{Run: w.spec.ID, Index: sc.ix.ID, Lo: b[0], Hi: b[1], Stage: first})
	}
	return out, nil
}

// drifted reports that a Qdrant collection is not as it was made. A repairing run adds payload
// indexes that are missing, which takes nothing away; what else differs stays.
func (w *work) drifted(ctx context.Context, sc *scope, drift []string) error {
	now := w.clock.Now()
	f := []corpus.Finding{{Kind: corpus.ConfigDrift, ID: sc.ix.ID, SeenAt: now, ConfirmedAt: now, Detail: notAsMade(sc.ix, drift)}}
	if err := w.ledger.AddFindings(ctx, w.spec.ID, sc.ix, f); err != nil || !w.spec.Repair {
		return err
	}
	err := w.pace.retry(ctx, func() (err error) {
		if err = w.index.CreatePayloadIndexes(ctx, sc.ix); err == nil {
			_, drift, err = w.index.DescribeIndex(ctx, sc.ix)
		}
		return err
	})
	switch {
	case err != nil:
		return fmt.Errorf("adding payload indexes: %w", err)
	case len(drift) > 0:
		return w.outcome(ctx, sc.ix.ID, nil, nil, f, []string{notAsMade(sc.ix, drift)})
	}
	return w.outcome(ctx, sc.ix.ID, f, []string{""}, nil, nil)
}

func notAsMade(ix corpus.Index, drift []string) string {
	return fmt.Sprintf("Qdrant collection %s is not as it was made: %s", ix.QdrantName, strings.Join(drift, "; "))
}

// seed makes suspects of what earlier runs left unrepaired, and of work that lies overdue.
func (w *work) seed(ctx context.Context, sc *scope) error {
	now := w.clock.Now()
	if err := w.ledger.SeedSuspects(ctx, w.spec.ID, sc.ix, now); err != nil {
		return err
	}
	return w.ledger.StuckEntries(ctx, sc.ix, w.spec.Lo, w.spec.Hi, w.cfg.Overdue, func(ids []corpus.ID) error {
		stuck := make([]corpus.Suspect, len(ids))
		for i, id := range ids {
			stuck[i] = corpus.Suspect{ID: id, Kind: corpus.Stuck, SeenAt: now}
		}
		return w.ledger.AddSuspects(ctx, w.spec.ID, sc.ix.ID, stuck)
	})
}

// codeNoExact is how the index says that strict mode refuses exact counts and facets.
const codeNoExact = "exact_refused"

// lostIndex reports a Qdrant collection that is gone and, in a repairing run, has it built
// again. Its points are not reported one by one: they are all missing, and come back with it.
func (w *work) lostIndex(ctx context.Context, sc *scope) error {
	now := w.clock.Now()
	f := corpus.Finding{Kind: corpus.LostIndex, ID: sc.ix.ID, SeenAt: now, ConfirmedAt: now,
		Detail: fmt.Sprintf("Qdrant collection %s (the %s index) does not exist any more", sc.ix.QdrantName, sc.ix.State)}
	if err := w.ledger.AddFindings(ctx, w.spec.ID, sc.ix, []corpus.Finding{f}); err != nil || !w.spec.Repair {
		return err
	}
	// Recorded first: a run that dies in between finds the index lost again and goes on.
	err := w.ledger.SetFindings(ctx, w.spec.ID, sc.ix.ID, []corpus.Finding{f}, stateRepairing, []string{"it is built again under a new name"})
	if err != nil {
		return err
	}
	if _, err := w.ledger.RebuildIndex(ctx, sc.ix); err != nil && corpus.KindOf(err) != corpus.Conflict {
		return fmt.Errorf("rebuilding a lost index: %w", err)
	}
	w.cfg.Wake()
	return nil
}

// history checks every index of the run. It runs beside the scan, because the index may take
// as long for it, and is done before anything is decided.
func (w *work) history(ctx context.Context) error {
	for i := range w.targets {
		for _, sc := range w.targets[i].scopes {
			err := w.checkHistory(ctx, &w.targets[i], sc)
			if corpus.KindOf(err) == corpus.NotFound {
				err = w.vanished(ctx, sc, err)
			}
			if err != nil {
				return fmt.Errorf("collection %s: %w", w.targets[i].Name, err)
			}
		}
	}
	return nil
}

// checkHistory looks for signs that the ledger lost part of its history: a stamp that it never
// issued, points with a gen that it never handed out. Either stops deletes in the collection.
func (w *work) checkHistory(ctx context.Context, t *target, sc *scope) error {
	why, err := w.checkStamp(ctx, sc.ix)
	if err != nil {
		return err
	}
	now := w.clock.Now()
	if why != "" {
		f := corpus.Finding{Kind: corpus.RolledBack, ID: sc.ix.ID, Detail: why, SeenAt: now, ConfirmedAt: now}
		if err := w.ledger.AddFindings(ctx, w.spec.ID, sc.ix, []corpus.Finding{f}); err != nil {
			return err
		}
		t.Stopped = why
	}
	before, err := w.ledger.RollbackFacts(ctx, t.Collection)
	if err != nil {
		return err
	}
	if before.Stopped != "" && why == "" {
		// Stopped since an earlier run or by the service's start: it stays a finding until resolved.
		t.Stopped = before.Stopped
		f := corpus.Finding{Kind: corpus.RolledBack, ID: sc.ix.ID, Detail: "deletes are stopped in this collection: " + before.Stopped, SeenAt: now, ConfirmedAt: now}
		if err := w.ledger.AddFindings(ctx, w.spec.ID, sc.ix, []corpus.Finding{f}); err != nil {
			return err
		}
	}
	if t.Stopped != "" {
		if err := w.ledger.StopTarget(ctx, w.spec.ID, t.Collection, t.Stopped); err != nil {
			return err
		}
	}
	if !w.spec.Whole() {
		return nil // the points that it looks at are judged one by one
	}
	var pts []corpus.PointState
	for gen, gaps := before.LastGen, before.Gaps; ; {
		// Every restart of Postgres leaves a gap: years of them must not make one filter.
		n := min(len(gaps), gapsAtOnce)
		err := w.pace.retry(ctx, func() error {
			found, err := w.index.FindGenAbove(ctx, sc.ix, gen, gaps[:n], maxEvidence)
			pts = append(pts, found...)
			return err
		})
		if err != nil {
			return err
		}
		if gaps = gaps[n:]; len(gaps) == 0 || len(pts) >= maxEvidence {
			break
		}
		gen = maxGen // looked for already
	}
	if len(pts) == 0 {
		return nil
	}
	// Gens may have been taken since: only facts read after the points decide.
	facts, err := w.ledger.RollbackFacts(ctx, t.Collection)
	if err != nil {
		return err
	}
	j := w.judge(sc, facts)
	var found []corpus.Finding
	for i := range pts {
		if facts.Evidence(pts[i].Payload.Gen) && pts[i].Payload.Owner == w.cfg.Owner {
			found = append(found, corpus.Finding{Kind: corpus.RolledBack, ID: pts[i].ID, Detail: j.rolledBack(&pts[i]).detail, SeenAt: now, ConfirmedAt: now})
		}
	}
	if len(found) == 0 {
		return nil
	}
	if err := w.ledger.AddFindings(ctx, w.spec.ID, sc.ix, found); err != nil {
		return err
	}
	return w.stop(ctx, t, facts.Adopted, fmt.Sprintf("points in the index carry numbers that this Postgres never handed out (point %s and %d others)", found[0].ID, len(found)-1))
}

// stop forbids deletes in a collection, in the ledger and in this run. adopted is what the
// facts said that the evidence was judged by: an operator's step in between wins.
func (w *work) stop(ctx context.Context, t *target, adopted int64, why string) error {
	stopped, err := w.ledger.StopCollection(ctx, t.Collection, adopted, why)
	if err != nil {
		return err
	}
	if !stopped {
		w.log.InfoContext(ctx, "a rollback was resolved while a run looked at it", "collection", t.Name)
		return nil
	}
	if err := w.ledger.StopTarget(ctx, w.spec.ID, t.Collection, why); err != nil {
		return err
	}
	t.Stopped = why
	w.log.ErrorContext(ctx, "deletes stopped: the ledger's history is in doubt", "collection", t.Name, "reason", why)
	return nil
}

// checkStamp compares the index's stamp with the ledger. A stamp that does not fit stops the
// collection's deletes and makes the gen sequence jump; why then says what was found.
func (s *Service) checkStamp(ctx context.Context, ix corpus.Index) (why string, err error) {
	// Before the stamp: if an operator resolves a rollback between the two, the stamp is out of date.
	facts, err := s.ledger.RollbackFacts(ctx, ix.Collection)
	if err != nil {
		return "", err
	}
	st, ok, err := s.index.ReadStamp(ctx, ix)
	if err != nil || !ok {
		return "", err
	}
	if why, err = s.ledger.StampFits(ctx, ix, st); err != nil || why == "" {
		return "", err
	}
	if facts.Stopped != "" {
		return why, nil // known since an earlier look; the stamp stays until an operator has decided
	}
	// The jump comes first: stopping is what ends the repetition.
	if err := s.ledger.JumpSequence(ctx, "the stamp of "+ix.QdrantName+" does not fit"); err != nil {
		return "", err
	}
	stopped, err := s.ledger.StopCollection(ctx, ix.Collection, facts.Adopted, why)
	if err != nil || !stopped {
		return "", err
	}
	return why, nil
}

// stray is a Qdrant collection of ours that no index of the ledger has.
type stray struct {
	why     string
	dropped bool // the ledger had one of that name dropped
}

// orphanIndexes reports Qdrant collections that carry our prefix and our stamp, or none, and
// that no index of the ledger has. They are listed under the run's first collection. Those
// whose names the ledger has retired are dropped again by a repairing run; what it does not
// know may be a lost history's, or another installation's that has not been stamped yet.
func (w *work) orphanIndexes(ctx context.Context) error {
	first, err := w.strays(ctx)
	if err != nil || len(first) == 0 {
		return err
	}
	seen := w.clock.Now()
	if err := w.clock.Sleep(ctx, w.cfg.Grace); err != nil {
		return err
	}
	again, err := w.strays(ctx)
	if err != nil {
		return err
	}
	var found, drop []corpus.Finding
	var names []string
	for n, s := range again {
		if _, ok := first[n]; !ok {
			continue
		}
		f := corpus.Finding{Kind: corpus.OrphanIndex, ID: nameID(n), SeenAt: seen, ConfirmedAt: w.clock.Now(),
			Detail: fmt.Sprintf("Qdrant collection %s %s", n, s.why)}
		if found = append(found, f); s.dropped {
			drop, names = append(drop, f), append(names, n)
		}
	}
	if len(found) == 0 {
		return nil
	}
	under := corpus.Index{ID: nameID("orphan indexes"), Collection: w.targets[0].Collection}
	if err := w.ledger.AddFindings(ctx, w.spec.ID, under, found); err != nil || !w.spec.Repair || len(drop) == 0 {
		return err
	}
	for _, n := range names {
		if err := w.pace.retry(ctx, func() error { return w.index.DropIndex(ctx, corpus.Index{QdrantName: n}) }); err != nil {
			return fmt.Errorf("dropping %s: %w", n, err)
		}
	}
	left, err := w.strays(ctx)
	if err != nil {
		return err
	}
	var good, bad []corpus.Finding
	var badWhy []string
	for i, f := range drop {
		if _, ok := left[names[i]]; ok {
			bad, badWhy = append(bad, f), append(badWhy, f.Detail+"; it was dropped and is there again")
		} else {
			good = append(good, f)
		}
	}
	return w.outcome(ctx, under.ID, good, make([]string, len(good)), bad, badWhy)
}

// strays finds them by name.
func (w *work) strays(ctx context.Context) (map[string]stray, error) {
	var names []string
	err := w.pace.retry(ctx, func() (err error) {
		names, err = w.index.ListOurCollections(ctx, w.cfg.IndexPrefix)
		return err
	})
	if err != nil || len(names) == 0 {
		return nil, err
	}
	known, dropped, err := w.ledger.KnownQdrantNames(ctx, names)
	if err != nil {
		return nil, err
	}
	out := map[string]stray{}
	for _, n := range names {
		if slices.Contains(known, n) {
			continue
		}
		st, ok, err := w.index.ReadStamp(ctx, corpus.Index{QdrantName: n})
		if corpus.KindOf(err) == corpus.NotFound || ok && st.Installation != w.cfg.Owner {
			continue // gone, or another installation's business
		}
		if err != nil {
			return nil, err
		}
		switch {
		case slices.Contains(dropped, n):
			out[n] = stray{"was retired and dropped, and is there again: a request to create it arrived late", true}
		case ok:
			out[n] = stray{"carries our stamp of " + st.At.UTC().Format("2006-01-02 15:04:05Z") + " and the ledger does not know it", false}
		default:
			out[n] = stray{"carries our prefix and no stamp, and the ledger does not know it", false}
		}
	}
	return out, nil
}

func (w *work) judge(sc *scope, facts corpus.RollbackFacts) judge {
	return judge{index: sc.ix, owner: w.cfg.Owner, facts: facts, payload: true, vectors: w.spec.Depth == corpus.Deep}
}

// nameID makes an id for something that only has a name.
func nameID(name string) corpus.ID {
	sum := sha256.Sum256([]byte(name))
	return corpus.ID(sum[:16])
}

// scan reads one range of both sides and records what disagrees.
func (w *work) scan(ctx context.Context, sc *scope, r corpus.RunRange) error {
	rec := &recorder{work: w, r: r, last: w.clock.Now()}
	var err error
	if w.spec.Depth == corpus.Quick && w.spec.Whole() {
		err = w.quick(ctx, sc, rec)
	} else {
		err = w.join(ctx, sc, rec, r.Cursor, r.Hi)
	}
	if err != nil {
		return err
	}
	return rec.flush(ctx, r.Hi)
}

// recorder gathers suspects and counts of a range between checkpoints.
type recorder struct {
	*work
	r        corpus.RunRange
	last     time.Time
	suspects []corpus.Suspect
	tally    tally
}

func (rec *recorder) suspect(id corpus.ID, kind corpus.FindingKind) {
	rec.suspects = append(rec.suspects, corpus.Suspect{ID: id, Kind: kind, SeenAt: rec.clock.Now()})
}

// pause is the join's call after each page: a checkpoint when one is due.
func (rec *recorder) pause(ctx context.Context, next corpus.ID, t tally) error {
	rec.metrics.compared.Add(float64(t.compared))
	rec.tally.compared += t.compared
	rec.tally.expected += t.expected
	rec.tally.points += t.points
	if len(rec.suspects) < lookBatch && rec.clock.Now().Sub(rec.last) < checkpointEvery {
		return nil
	}
	return rec.flush(ctx, next)
}

func (rec *recorder) flush(ctx context.Context, next corpus.ID) error {
	p := corpus.ScanProgress{Cursor: next, Compared: rec.tally.compared, Expected: rec.tally.expected, Points: rec.tally.points, Suspects: rec.suspects}
	if err := rec.ledger.Checkpoint(ctx, rec.r, p, rec.cfg.Lease); err != nil {
		return err
	}
	rec.tally, rec.suspects, rec.last = tally{}, rec.suspects[:0], rec.clock.Now()
	return nil
}

// join is the streaming merge join over from..to.
func (w *work) join(ctx context.Context, sc *scope, rec *recorder, from, to corpus.ID) error {
	depth, page := corpus.Full, scrollPage
	read := corpus.Quick // ids alone: half of what payloads cost
	if w.spec.Depth == corpus.Deep {
		depth, read, page = corpus.Deep, corpus.Deep, deepPage
	}
	rows := newStream(ctx, w.walk(from, to, page, func(ctx context.Context, at corpus.ID, buf []corpus.LedgerRow) ([]corpus.LedgerRow, error) {
		return w.ledger.WalkChunks(ctx, sc.ix, at, to, page, depth, buf)
	}))
	defer rows.close()
	pts := newStream(ctx, w.scroll(from, to, func(ctx context.Context, at corpus.ID) ([]corpus.PointState, *corpus.ID, error) {
		return w.index.Scroll(ctx, sc.ix, at, page, read)
	}))
	defer pts.close()
	// No evidence of a rollback is looked for here: see checkHistory and the second look.
	j := judge{index: sc.ix, owner: w.cfg.Owner, facts: corpus.RollbackFacts{LastGen: math.MaxInt64}, payload: true, vectors: true}
	return merge(ctx, rows, pts, depth == corpus.Deep,
		func(st step) error {
			if depth == corpus.Deep && st.row != nil && st.pt != nil && st.row.State == corpus.EntryIndexed && !st.pt.Partial {
				for _, v := range j.look(st.row, st.pt) {
					rec.suspect(st.id, v.kind)
				}
			} else if kind, ok := suspicion(st.row, st.pt); ok {
				rec.suspect(st.id, kind)
			}
			return nil
		},
		func(next corpus.ID, t tally) error { return rec.pause(ctx, next, t) })
}

// walk turns keyset pages of the ledger into a fetchFunc. A page shorter than limit is the last.
func (w *work) walk(from, to corpus.ID, limit int, read func(context.Context, corpus.ID, []corpus.LedgerRow) ([]corpus.LedgerRow, error)) fetchFunc[corpus.LedgerRow] {
	at := from
	return func(ctx context.Context, buf []corpus.LedgerRow) (page []corpus.LedgerRow, last bool, err error) {
		err = w.pace.retry(ctx, func() (err error) {
			page, err = read(ctx, at, buf[:0])
			return err
		})
		if err != nil || len(page) < limit {
			return page, true, err
		}
		next, ok := page[len(page)-1].ID.Next()
		at = next
		return page, !ok || next.Compare(to) > 0, nil
	}
}

// scroll turns pages of the index into a fetchFunc that ends after to.
func (w *work) scroll(from, to corpus.ID, read func(context.Context, corpus.ID) ([]corpus.PointState, *corpus.ID, error)) fetchFunc[corpus.PointState] {
	at := from
	return func(ctx context.Context, _ []corpus.PointState) (page []corpus.PointState, last bool, err error) {
		var next *corpus.ID
		err = w.pace.read(ctx, func() (int, error) {
			page, next, err = read(ctx, at)
			return len(page), err
		})
		if err != nil {
			return nil, true, err
		}
		for len(page) > 0 && page[len(page)-1].ID.Compare(to) > 0 {
			page = page[:len(page)-1]
			next = nil
		}
		if next == nil || next.Compare(to) > 0 {
			return page, true, nil
		}
		at = *next
		return page, false, nil
	}
}

// quick compares exact counts per id bucket and descends only where they differ. What it
// cannot see stands in docs/reconcile.md.
func (w *work) quick(ctx context.Context, sc *scope, rec *recorder) error {
	var (
		counts             map[uint32]int64
		total              int64
		settled, unsettled []int64
	)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return w.pace.read(gctx, func() (int, error) {
			both, bctx := errgroup.WithContext(gctx)
			both.Go(func() (err error) {
				counts, err = w.index.FacetBuckets(bctx, sc.ix)
				return err
			})
			both.Go(func() (err error) {
				total, err = w.index.CountPoints(bctx, sc.ix)
				return err
			})
			err := both.Wait()
			return len(counts), err
		})
	})
	g.Go(func() (err error) {
		settled, unsettled, err = w.ledger.BucketCounts(gctx, sc.ix)
		return err
	})
	err := g.Wait()
	if corpus.CodeOf(err) == codeNoExact {
		w.log.InfoContext(ctx, "the index refuses exact counts; reading all ids instead", "index", sc.ix.QdrantName)
		return w.join(ctx, sc, rec, rec.r.Cursor, rec.r.Hi)
	}
	if err != nil {
		return err
	}
	var differ []uint32
	var t tally
	var ours int64
	for b := range settled {
		n := counts[uint32(b)]
		ours += n
		t.expected += settled[b]
		t.compared += max(n, settled[b])
		// What is not settled may be there or not.
		if n < settled[b] || n > settled[b]+unsettled[b] {
			differ = append(differ, uint32(b))
		}
	}
	if len(differ) > w.cfg.QuickBuckets {
		return w.join(ctx, sc, rec, rec.r.Cursor, rec.r.Hi)
	}
	t.points = total
	t.compared += max(total-ours, 0)
	for _, b := range differ {
		if err := w.descend(ctx, sc, rec, b); err != nil {
			return err
		}
	}
	if total != ours {
		if err := w.foreign(ctx, sc, rec); err != nil {
			return err
		}
	}
	// Everything was compared, by counts or by ids; the descents read ids a second time.
	rec.tally = t
	rec.metrics.compared.Add(float64(t.compared))
	return nil
}

// descend compares the ids of one bucket.
func (w *work) descend(ctx context.Context, sc *scope, rec *recorder, bucket uint32) error {
	rows := newStream(ctx, w.walk(corpus.ID{}, corpus.MaxID, deepPage, func(ctx context.Context, at corpus.ID, buf []corpus.LedgerRow) ([]corpus.LedgerRow, error) {
		return w.ledger.WalkBucket(ctx, sc.ix, bucket, at, deepPage, buf)
	}))
	defer rows.close()
	pts := newStream(ctx, w.scroll(corpus.ID{}, corpus.MaxID, func(ctx context.Context, at corpus.ID) ([]corpus.PointState, *corpus.ID, error) {
		return w.index.ScrollBucket(ctx, sc.ix, []uint32{bucket}, at, deepPage)
	}))
	defer pts.close()
	return merge(ctx, rows, pts, false,
		func(st step) error {
			if kind, ok := suspicion(st.row, st.pt); ok {
				rec.suspect(st.id, kind)
			}
			return nil
		},
		func(corpus.ID, tally) error { return rec.spill(ctx) })
}

// foreign lists points that are not ours; the second look tells what they are.
func (w *work) foreign(ctx context.Context, sc *scope, rec *recorder) error {
	fetch := w.scroll(corpus.ID{}, corpus.MaxID, func(ctx context.Context, at corpus.ID) ([]corpus.PointState, *corpus.ID, error) {
		return w.index.ScrollForeign(ctx, sc.ix, at, deepPage)
	})
	for {
		page, last, err := fetch(ctx, nil)
		if err != nil {
			return err
		}
		for i := range page {
			rec.suspect(page[i].ID, corpus.Foreign)
		}
		if err := rec.spill(ctx); err != nil || last {
			return err
		}
	}
}

// spill records suspects without moving the cursor, when there are many.
func (rec *recorder) spill(ctx context.Context) error {
	if len(rec.suspects) < lookBatch && rec.clock.Now().Sub(rec.last) < checkpointEvery {
		return nil
	}
	held := rec.tally
	rec.tally = tally{}
	err := rec.flush(ctx, rec.r.Cursor)
	rec.tally = held
	return err
}
