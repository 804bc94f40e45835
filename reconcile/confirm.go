package reconcile

import (
	"context"
	"slices"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// maxLooks is how often a suspect whose ledger row keeps moving is looked at again before it
// is left to the next run.
const maxLooks = 5

// confirm takes the second look at a range's suspects, no earlier than the grace period after
// the first: the ledger, then the index, then the ledger again, in the transaction that
// decides. In a repairing run what is missing, stale, damaged or stuck is given to the workers
// in that same transaction; deletes wait for the last stage.
func (w *work) confirm(ctx context.Context, sc *scope, r corpus.RunRange) error {
	for from := r.Lo; ; {
		batch, err := w.ledger.Suspects(ctx, r, from, lookBatch)
		if err != nil {
			return err
		}
		if len(batch) == 0 {
			if from == r.Lo {
				return nil
			}
			from = r.Lo // what moved under the look is due again
			continue
		}
		if err := w.rest(ctx, r, batch); err != nil {
			return err
		}
		if err := w.decide(ctx, sc, batch); err != nil {
			return err
		}
		next, ok := batch[len(batch)-1].ID.Next()
		if !ok {
			next = r.Lo
		}
		from = next
	}
}

// rest waits until the newest of the batch is old enough, keeping the lease alive.
func (w *work) rest(ctx context.Context, r corpus.RunRange, batch []corpus.Suspect) error {
	var newest time.Time
	for _, s := range batch {
		if s.SeenAt.After(newest) {
			newest = s.SeenAt
		}
	}
	for {
		if err := w.ledger.RenewRange(ctx, r, w.cfg.Lease); err != nil {
			return err
		}
		wait := newest.Add(w.cfg.Grace).Sub(w.clock.Now())
		if wait <= 0 {
			return nil
		}
		if err := w.clock.Sleep(ctx, min(wait, w.cfg.Lease/3)); err != nil {
			return err
		}
	}
}

// decide looks at a batch of suspects of one index and has the ledger decide.
func (w *work) decide(ctx context.Context, sc *scope, batch []corpus.Suspect) error {
	bare, damaged := ids(batch)
	rows, err := w.rows(ctx, sc, append(slices.Clone(bare), damaged...))
	if err != nil {
		return err
	}
	pts, err := w.points(ctx, sc, bare, damaged)
	if err != nil {
		return err
	}
	// Read after the points: a gen taken before this is never above LastGen.
	facts, err := w.ledger.RollbackFacts(ctx, sc.ix.Collection)
	if err != nil {
		return err
	}
	j := w.judge(sc, facts)
	now := w.clock.Now()
	var out []corpus.Decision
	asked, lost := false, ""
	for i := 0; i < len(batch); {
		// Suspects are sorted by id; one look serves all kinds suspected of the same id.
		k := i
		for k < len(batch) && batch[k].ID == batch[i].ID {
			k++
		}
		same := batch[i:k]
		i = k
		row, pt := rows[same[0].ID], pts[same[0].ID]
		j.vectors = pt != nil && pt.Vectors != nil || w.spec.Depth == corpus.Deep
		verdicts := j.look(row, pt)
		for n, s := range same {
			d := corpus.Decision{Suspect: s.Kind, Row: row, Dismiss: true, Finding: corpus.Finding{ID: s.ID}}
			if n < len(verdicts) {
				d = w.decision(s, row, pt, verdicts[n], now)
			}
			out = append(out, d)
		}
		for n := len(same); n < len(verdicts); n++ {
			s := corpus.Suspect{ID: same[0].ID, SeenAt: same[0].SeenAt}
			out = append(out, w.decision(s, row, pt, verdicts[n], now))
		}
		for _, v := range verdicts {
			if v.kind == corpus.RolledBack {
				lost = v.detail
			}
		}
	}
	for i := range out {
		asked = asked || out[i].Action != corpus.RepairNone && out[i].Action != corpus.RepairDelete
	}
	if lost != "" {
		if err := w.stop(ctx, sc.target, facts.Adopted, lost); err != nil {
			return err
		}
	}
	moved, err := w.ledger.Decide(ctx, w.spec.ID, sc.ix, out, w.cfg.Overdue, now, maxLooks)
	if err != nil {
		return err
	}
	w.metrics.moved.Add(float64(moved))
	if asked {
		w.cfg.Wake()
	}
	return nil
}

// decision turns a verdict into what the ledger is asked to do about it.
func (w *work) decision(s corpus.Suspect, row *corpus.LedgerRow, pt *corpus.PointState, v verdict, now time.Time) corpus.Decision {
	d := corpus.Decision{
		Suspect: s.Kind, Row: row,
		Finding: corpus.Finding{Kind: v.kind, ID: s.ID, Detail: v.detail, SeenAt: s.SeenAt, ConfirmedAt: now},
	}
	if row != nil {
		d.Finding.Document = row.ExternalID
	}
	if w.spec.Repair {
		d.Action = v.action
	}
	if v.action == corpus.RepairMetadata {
		d.PointMeta = pt.Payload.MetaVersion
	}
	return d
}

// ids splits a batch into those whose payload is enough and those whose vectors are needed.
func ids(batch []corpus.Suspect) (bare, damaged []corpus.ID) {
	for i := 0; i < len(batch); {
		k, vectors := i, false
		for k < len(batch) && batch[k].ID == batch[i].ID {
			vectors = vectors || batch[k].Kind == corpus.CorruptVector
			k++
		}
		if vectors {
			damaged = append(damaged, batch[i].ID)
		} else {
			bare = append(bare, batch[i].ID)
		}
		i = k
	}
	return bare, damaged
}

func (w *work) rows(ctx context.Context, sc *scope, all []corpus.ID) (map[corpus.ID]*corpus.LedgerRow, error) {
	var rows []corpus.LedgerRow
	err := w.pace.retry(ctx, func() (err error) {
		rows, err = w.ledger.ReadRows(ctx, sc.ix, all, w.cfg.Overdue)
		return err
	})
	out := make(map[corpus.ID]*corpus.LedgerRow, len(rows))
	for i := range rows {
		out[rows[i].ID] = &rows[i]
	}
	return out, err
}

// points reads points by id, the damaged ones with their vectors.
func (w *work) points(ctx context.Context, sc *scope, bare, damaged []corpus.ID) (map[corpus.ID]*corpus.PointState, error) {
	out := make(map[corpus.ID]*corpus.PointState, len(bare)+len(damaged))
	for _, part := range []struct {
		ids     []corpus.ID
		vectors bool
	}{{bare, w.spec.Depth == corpus.Deep}, {damaged, true}} {
		if len(part.ids) == 0 {
			continue
		}
		err := w.pace.read(ctx, func() (int, error) {
			pts, err := w.index.ReadPoints(ctx, sc.ix, part.ids, part.vectors)
			for i := range pts {
				out[pts[i].ID] = &pts[i]
			}
			return len(pts), err
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}
