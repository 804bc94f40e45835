package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// relaxed is inTx for the bookkeeping of runs: its commit does not wait for the disk. A crash of
// Postgres may undo the last of them, which costs work that is done again and nothing else: a
// range's progress and its suspects go or stay together, and every later commit that matters
// (a decision, a tombstone) brings all earlier ones to disk first.
func (s *Store) relaxed(ctx context.Context, doing string, do func(tx pgx.Tx) error) error {
	return s.inTx(ctx, doing, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SET LOCAL synchronous_commit = off"); err != nil {
			return err
		}
		return do(tx)
	})
}

// CreateRun records a run and takes its collections for it, with its leader's lease. While
// another run holds one of them the answer is a Conflict with code reconcile_running that
// names the run.
func (s *Store) CreateRun(ctx context.Context, spec corpus.RunSpec, startedAt time.Time, leader corpus.ID, lease time.Duration) (corpus.RunRecord, error) {
	err := s.inTx(ctx, "creating a reconcile run", func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `INSERT INTO reconcile_runs (id, origin, state, depth, repair, sweep, force, max_deletes, delete_foreign, lo, hi, seeds_only,
				started_at, leader_token, leader_until)
			VALUES ($1, $2, 'running', $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, now() + make_interval(secs => $14))`,
			spec.ID, spec.Origin, string(spec.Depth), spec.Repair, spec.Sweep, spec.Force, spec.MaxDeletes, spec.DeleteForeign, spec.Lo, spec.Hi, spec.SeedsOnly,
			startedAt, leader, lease.Seconds())
		if err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `INSERT INTO reconcile_targets (run_id, collection_id, ordinal, name)
			SELECT $1, id, row_number() OVER (ORDER BY name), name FROM collections
			WHERE deleted_at IS NULL AND ($2::text[] IS NULL OR name = ANY ($2)) ORDER BY id`, spec.ID, spec.Collections)
		if err != nil {
			return err
		}
		if n := int(tag.RowsAffected()); n < len(spec.Collections) {
			return collectionNotFound(spec.Collections[0])
		}
		return nil
	})
	if e := (*corpus.Error)(nil); errors.As(err, &e) && e.Code == "already_exists" {
		return corpus.RunRecord{}, s.busy(ctx, spec.Collections)
	}
	if err != nil {
		return corpus.RunRecord{}, err
	}
	return s.GetRun(ctx, spec.ID)
}

// busy names the run that holds one of the collections.
func (s *Store) busy(ctx context.Context, names []string) error {
	var name string
	var run corpus.ID
	err := s.pool.QueryRow(ctx, `SELECT name, run_id FROM reconcile_targets WHERE active AND ($1::text[] IS NULL OR name = ANY ($1)) LIMIT 1`, names).Scan(&name, &run)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return wrap("looking for the running reconcile", err)
	}
	return &corpus.Error{Kind: corpus.Conflict, Code: "reconcile_running", RetryAfter: 5 * time.Second,
		Detail: "collection " + name + " is being reconciled by run " + run.String() + ": wait for it, cancel it, or resume it if its process died"}
}

// GetRun returns a run with its collections; NotFound with code run_not_found.
func (s *Store) GetRun(ctx context.Context, id corpus.ID) (corpus.RunRecord, error) {
	runs, err := s.runs(ctx, `WHERE id = $1`, id)
	if err == nil && len(runs) == 0 {
		return corpus.RunRecord{}, corpus.Errorf(corpus.NotFound, "run_not_found", "there is no reconcile run %s (old runs are forgotten)", id)
	}
	if err != nil {
		return corpus.RunRecord{}, wrap("reading a reconcile run", err)
	}
	return runs[0], nil
}

// ActiveRuns lists the runs that are under way on any instance, oldest first.
func (s *Store) ActiveRuns(ctx context.Context) ([]corpus.RunRecord, error) {
	runs, err := s.runs(ctx, `WHERE state = 'running' ORDER BY started_at LIMIT 100`)
	return runs, wrap("listing reconcile runs", err)
}

// ResumableRun returns the newest run that somebody asked for and that did not reach its end:
// one whose leader is gone, that failed, or that was cancelled. collection is empty for any.
func (s *Store) ResumableRun(ctx context.Context, collection string) (corpus.RunRecord, error) {
	runs, err := s.runs(ctx, `WHERE origin = 'request' AND (state IN ('failed', 'cancelled') OR state = 'running' AND leader_until < now())
		AND ($1 = '' OR EXISTS (SELECT 1 FROM reconcile_targets t WHERE t.run_id = r.id AND t.name = $1))
		AND NOT EXISTS (SELECT 1 FROM reconcile_runs n WHERE n.origin = 'request' AND n.started_at > r.started_at AND n.state IN ('done', 'braked')
			AND EXISTS (SELECT 1 FROM reconcile_targets a JOIN reconcile_targets b USING (collection_id) WHERE a.run_id = n.id AND b.run_id = r.id))
		ORDER BY started_at DESC LIMIT 1`, collection)
	if err == nil && len(runs) == 0 {
		return corpus.RunRecord{}, corpus.Errorf(corpus.NotFound, "nothing_to_resume", "no unfinished reconcile run can be resumed: start a new one")
	}
	if err != nil {
		return corpus.RunRecord{}, wrap("looking for an unfinished reconcile run", err)
	}
	return runs[0], nil
}

func (s *Store) runs(ctx context.Context, where string, args ...any) ([]corpus.RunRecord, error) {
	rows, err := s.pool.Query(ctx, `SELECT id, origin, state, stage, depth, repair, sweep, force, max_deletes, delete_foreign, lo, hi, seeds_only,
		started_at, finished_at, cancel_requested, error, leader_token, coalesce(leader_until > now(), false) FROM reconcile_runs r `+where, args...)
	if err != nil {
		return nil, err
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (corpus.RunRecord, error) {
		var r corpus.RunRecord
		var leader *corpus.ID
		err := row.Scan(&r.Spec.ID, &r.Spec.Origin, &r.State, &r.Stage, &r.Spec.Depth, &r.Spec.Repair, &r.Spec.Sweep, &r.Spec.Force, &r.Spec.MaxDeletes,
			&r.Spec.DeleteForeign, &r.Spec.Lo, &r.Spec.Hi, &r.Spec.SeedsOnly, &r.StartedAt, &r.FinishedAt, &r.CancelRequested, &r.Error, &leader, &r.Led)
		if leader != nil {
			r.Leader = *leader
		}
		return r, err
	})
	if err != nil {
		return nil, err
	}
	for i := range out {
		rows, err := s.pool.Query(ctx, `SELECT collection_id, name, index_points, stopped, braked FROM reconcile_targets WHERE run_id = $1 ORDER BY ordinal`, out[i].Spec.ID)
		if err != nil {
			return nil, err
		}
		out[i].Targets, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (corpus.RunTarget, error) {
			var t corpus.RunTarget
			return t, row.Scan(&t.Collection, &t.Name, &t.IndexPoints, &t.Stopped, &t.Braked)
		})
		if err != nil {
			return nil, err
		}
		for _, t := range out[i].Targets {
			out[i].Spec.Collections = append(out[i].Spec.Collections, t.Name)
		}
	}
	return out, nil
}

// LeadRun takes or renews the lead of a run; false while another instance holds it or the run
// has ended. With revive a run that failed or was cancelled runs again from its checkpoints;
// a Conflict (reconcile_running) says that another run holds one of its collections by now.
func (s *Store) LeadRun(ctx context.Context, id, leader corpus.ID, lease time.Duration, revive bool) (bool, error) {
	var got bool
	err := s.inTx(ctx, "leading a reconcile run", func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `UPDATE reconcile_runs SET leader_token = $2, leader_until = now() + make_interval(secs => $3),
				state = 'running', finished_at = NULL, error = '', cancel_requested = cancel_requested AND NOT $4
			WHERE id = $1 AND (leader_token IS NULL OR leader_token = $2 OR leader_until < now() OR state IN ('failed', 'cancelled'))
			  AND (state = 'running' OR $4 AND state IN ('failed', 'cancelled'))`, id, leader, lease.Seconds(), revive)
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		got = true
		if revive {
			_, err = tx.Exec(ctx, `UPDATE reconcile_targets SET active = true, finished_at = NULL WHERE run_id = $1`, id)
		}
		return err
	})
	if corpus.CodeOf(err) == "already_exists" {
		return false, s.busy(ctx, nil)
	}
	return got, err
}

// AdvanceRun moves the run to stage if leader still leads it; false otherwise.
func (s *Store) AdvanceRun(ctx context.Context, id, leader corpus.ID, stage corpus.RunStage) (bool, error) {
	var moved bool
	err := s.relaxed(ctx, "advancing a reconcile run", func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `UPDATE reconcile_runs SET stage = $3 WHERE id = $1 AND leader_token = $2 AND state = 'running' AND stage < $3`, id, leader, int(stage))
		moved = tag.RowsAffected() == 1
		return err
	})
	return moved, err
}

// CancelRun asks for a run's end; its leader and helpers notice at their next checkpoint. A
// run without a living leader is ended at once. Ended runs are left as they are.
func (s *Store) CancelRun(ctx context.Context, id corpus.ID) error {
	return s.inTx(ctx, "cancelling a reconcile run", func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `UPDATE reconcile_runs SET cancel_requested = true,
				state = CASE WHEN leader_until < now() THEN 'cancelled' ELSE state END,
				finished_at = CASE WHEN leader_until < now() THEN now() END
			WHERE id = $1 AND state = 'running'`, id)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			var exists bool
			if err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT 1 FROM reconcile_runs WHERE id = $1)`, id).Scan(&exists); err != nil {
				return err
			}
			if !exists {
				return corpus.Errorf(corpus.NotFound, "run_not_found", "there is no reconcile run %s", id)
			}
			return nil
		}
		_, err = tx.Exec(ctx, `UPDATE reconcile_targets t SET active = false, finished_at = r.finished_at
			FROM reconcile_runs r WHERE r.id = $1 AND t.run_id = r.id AND r.state = 'cancelled'`, id)
		return err
	})
}

// TargetIndexes returns the serving and the building index of a collection, serving first,
// and for each whether its Qdrant collection was ever known to exist.
func (s *Store) TargetIndexes(ctx context.Context, collection corpus.ID) (ixs []corpus.Index, ready []bool, err error) {
	rows, err := s.pool.Query(ctx, "SELECT "+indexColumns+`, i.ready_at IS NOT NULL FROM indexes i
		WHERE i.collection_id = $1 AND i.state IN ('serving', 'building') ORDER BY i.state DESC`, collection)
	if err != nil {
		return nil, nil, wrap("reading a collection's indexes", err)
	}
	ixs, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (corpus.Index, error) {
		var r indexRow
		var ok bool
		if err := row.Scan(append(r.dest(), &ok)...); err != nil {
			return corpus.Index{}, err
		}
		ready = append(ready, ok)
		return r.index()
	})
	return ixs, ready, wrap("reading a collection's indexes", err)
}

// KnownQdrantNames returns those of names that belong to an index of the ledger, in whatever
// state, and those that belonged to one whose Qdrant collection was dropped.
func (s *Store) KnownQdrantNames(ctx context.Context, names []string) (known, dropped []string, err error) {
	// One statement, one snapshot: a name moves from the one table into the other.
	err = s.pool.QueryRow(ctx, `SELECT ARRAY(SELECT qdrant_name FROM indexes WHERE qdrant_name = ANY ($1)),
		ARRAY(SELECT qdrant_name FROM dropped_indexes WHERE qdrant_name = ANY ($1))`, names).Scan(&known, &dropped)
	return known, dropped, wrap("reading index names", err)
}

// PrepareTarget stores what a run found at the beginning of a collection: the points counted,
// whether deletes are forbidden, and the ranges to read. Doing it again changes nothing that
// has begun.
func (s *Store) PrepareTarget(ctx context.Context, run corpus.ID, t corpus.RunTarget, ranges []corpus.RunRange) error {
	return s.relaxed(ctx, "preparing a reconcile run", func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `UPDATE reconcile_targets SET index_points = $3, stopped = coalesce(nullif($4, ''), stopped) WHERE run_id = $1 AND collection_id = $2`,
			run, t.Collection, t.IndexPoints, t.Stopped); err != nil {
			return err
		}
		var batch pgx.Batch
		for _, r := range ranges {
			batch.Queue(`INSERT INTO reconcile_ranges (run_id, index_id, lo, hi, collection_id, cursor, stage) VALUES ($1, $2, $3, $4, $5, $3, $6)
				ON CONFLICT (run_id, index_id, lo) DO NOTHING`, run, r.Index, r.Lo, r.Hi, t.Collection, int(r.Stage))
		}
		return tx.SendBatch(ctx, &batch).Close()
	})
}

// ClaimRange leases one range of the run that still has stage, or one before it, to do; the
// range says which. ok is false if there is none to be had now, and left says how many are
// unfinished, leased ones included.
func (s *Store) ClaimRange(ctx context.Context, run corpus.ID, stage corpus.RunStage, token corpus.ID, lease time.Duration) (r corpus.RunRange, ok bool, left int, err error) {
	err = s.relaxed(ctx, "leasing a range", func(tx pgx.Tx) error {
		err := tx.QueryRow(ctx, `
			WITH next AS (
				SELECT run_id, index_id, lo FROM reconcile_ranges
				WHERE run_id = $1 AND stage <= $2 AND (lease_until IS NULL OR lease_until < now())
				ORDER BY index_id, lo LIMIT 1 FOR UPDATE SKIP LOCKED)
			UPDATE reconcile_ranges r SET lease_token = $3, lease_until = now() + make_interval(secs => $4)
			FROM next n WHERE r.run_id = n.run_id AND r.index_id = n.index_id AND r.lo = n.lo
			RETURNING r.run_id, r.index_id, r.lo, r.hi, r.cursor, r.stage, r.lease_token`,
			run, int(stage), token, lease.Seconds()).Scan(&r.Run, &r.Index, &r.Lo, &r.Hi, &r.Cursor, &r.Stage, &r.Token)
		if ok = err == nil; ok || !errors.Is(err, pgx.ErrNoRows) {
			left = 1
			return err
		}
		return tx.QueryRow(ctx, `SELECT count(*) FROM reconcile_ranges WHERE run_id = $1 AND stage <= $2`, run, int(stage)).Scan(&left)
	})
	return r, ok, left, err
}

// lostLease tells a worker that its range belongs to somebody else by now, or that the run
// was cancelled: it stops without recording anything.
func lostLease() error {
	return corpus.Errorf(corpus.Conflict, "lease_lost", "the range is leased to another worker, or its run has ended")
}

// RenewRange extends a range's lease; a Conflict with code lease_lost ends the worker's claim.
func (s *Store) RenewRange(ctx context.Context, r corpus.RunRange, lease time.Duration) error {
	return s.onRange(ctx, r, `UPDATE reconcile_ranges SET lease_until = now() + make_interval(secs => $5)`, lease.Seconds())
}

// FinishStage says that the range is done with its stage, and gives the lease back.
func (s *Store) FinishStage(ctx context.Context, r corpus.RunRange) error {
	return s.onRange(ctx, r, `UPDATE reconcile_ranges SET stage = stage + 1, lease_token = NULL, lease_until = NULL`)
}

// ReleaseRange gives a lease back without having finished; losing it meanwhile is fine.
func (s *Store) ReleaseRange(ctx context.Context, r corpus.RunRange) error {
	_, err := s.pool.Exec(ctx, `UPDATE reconcile_ranges SET lease_token = NULL, lease_until = NULL
		WHERE run_id = $1 AND index_id = $2 AND lo = $3 AND lease_token = $4`, r.Run, r.Index, r.Lo, r.Token)
	return wrap("releasing a range", err)
}

func (s *Store) onRange(ctx context.Context, r corpus.RunRange, update string, args ...any) error {
	return s.relaxed(ctx, "updating a range", func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, update+` WHERE run_id = $1 AND index_id = $2 AND lo = $3 AND lease_token = $4
			AND EXISTS (SELECT 1 FROM reconcile_runs WHERE id = $1 AND state = 'running' AND NOT cancel_requested)`,
			append([]any{r.Run, r.Index, r.Lo, r.Token}, args...)...)
		if err == nil && tag.RowsAffected() == 0 {
			return lostLease()
		}
		return err
	})
}

// Checkpoint records in one transaction how far a scan has come and what it suspects, and
// renews the lease; a Conflict with code lease_lost records nothing.
func (s *Store) Checkpoint(ctx context.Context, r corpus.RunRange, p corpus.ScanProgress, lease time.Duration) error {
	return s.relaxed(ctx, "recording a checkpoint", func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `UPDATE reconcile_ranges SET cursor = $5, compared = compared + $6, expected = expected + $7, points = points + $8,
				lease_until = now() + make_interval(secs => $9)
			WHERE run_id = $1 AND index_id = $2 AND lo = $3 AND lease_token = $4
			  AND EXISTS (SELECT 1 FROM reconcile_runs WHERE id = $1 AND state = 'running' AND NOT cancel_requested)`,
			r.Run, r.Index, r.Lo, r.Token, p.Cursor, p.Compared, p.Expected, p.Points, lease.Seconds())
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return lostLease()
		}
		return addSuspects(ctx, tx, r.Run, r.Index, p.Suspects)
	})
}

// AddSuspects records suspects of a run outside any range.
func (s *Store) AddSuspects(ctx context.Context, run, index corpus.ID, suspects []corpus.Suspect) error {
	if len(suspects) == 0 {
		return nil
	}
	return s.relaxed(ctx, "recording suspects", func(tx pgx.Tx) error { return addSuspects(ctx, tx, run, index, suspects) })
}

func addSuspects(ctx context.Context, tx pgx.Tx, run, index corpus.ID, suspects []corpus.Suspect) error {
	if len(suspects) == 0 {
		return nil
	}
	ids, kinds, seen := make([]corpus.ID, len(suspects)), make([]string, len(suspects)), make([]time.Time, len(suspects))
	for i, x := range suspects {
		ids[i], kinds[i], seen[i] = x.ID, string(x.Kind), x.SeenAt
	}
	_, err := tx.Exec(ctx, `INSERT INTO reconcile_suspects (run_id, index_id, point_id, kind, seen_at)
		SELECT $1, $2, * FROM unnest($3::uuid[], $4::text[], $5::timestamptz[]) ON CONFLICT DO NOTHING`, run, index, ids, kinds, seen)
	return err
}

// Suspects returns up to limit suspects of a range with id >= from, ascending, all kinds of
// one id together at the end of a page only if limit allows.
func (s *Store) Suspects(ctx context.Context, r corpus.RunRange, from corpus.ID, limit int) ([]corpus.Suspect, error) {
	rows, err := s.pool.Query(ctx, `SELECT point_id, kind, seen_at, looks FROM reconcile_suspects
		WHERE run_id = $1 AND index_id = $2 AND point_id >= $3 AND point_id <= $4 ORDER BY point_id, kind LIMIT $5`, r.Run, r.Index, from, r.Hi, limit)
	if err != nil {
		return nil, wrap("reading suspects", err)
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (corpus.Suspect, error) {
		var x corpus.Suspect
		return x, row.Scan(&x.ID, &x.Kind, &x.SeenAt, &x.Looks)
	})
	return out, wrap("reading suspects", err)
}

// SeedSuspects makes suspects of what earlier runs found in the run's collections and did not
// repair, so that a shallow or partial run cannot make the verdict forget it. Only findings
// about points of the given index are carried over.
func (s *Store) SeedSuspects(ctx context.Context, run corpus.ID, ix corpus.Index, seenAt time.Time) error {
	_, err := s.pool.Exec(ctx, `
		INSERT INTO reconcile_suspects (run_id, index_id, point_id, kind, seen_at)
		SELECT r.id, f.index_id, f.point_id, f.kind, $3 FROM reconcile_runs r, reconcile_findings f
		WHERE r.id = $1 AND f.index_id = $2 AND f.run_id <> r.id AND f.state IN ('open', 'remains') AND f.point_id >= r.lo AND f.point_id <= r.hi
		  AND f.kind IN ('missing', 'orphan', 'foreign', 'stale_payload', 'corrupt_vector', 'stuck', 'rolled_back')
		  AND f.run_id IN (`+sinceWhole+`)
		ON CONFLICT DO NOTHING`, run, ix.ID, seenAt, ix.Collection)
	return wrap("carrying findings over", err)
}

// sinceWhole selects the latest finished run that covered the whole of collection $4, and the
// partial ones since.
const sinceWhole = `SELECT w.id FROM reconcile_runs w JOIN reconcile_targets t ON t.run_id = w.id
	WHERE t.collection_id = $4 AND t.finished_at IS NOT NULL AND w.state IN ('done', 'braked') AND w.started_at >= coalesce((
		SELECT max(r.started_at) FROM reconcile_runs r JOIN reconcile_targets y ON y.run_id = r.id
		WHERE y.collection_id = $4 AND y.finished_at IS NOT NULL AND r.state IN ('done', 'braked') AND ` + wholeRun + `), '-infinity')`

// AddFindings records findings that need no decision under a row lock: those about indexes.
func (s *Store) AddFindings(ctx context.Context, run corpus.ID, ix corpus.Index, findings []corpus.Finding) error {
	var b decided
	for i := range findings {
		b.settle(&corpus.Decision{Finding: findings[i]})
	}
	return s.inTx(ctx, "recording findings", func(tx pgx.Tx) error { return b.write(ctx, tx, run, ix, time.Time{}, 0) })
}

// PendingFindings returns up to limit findings of a range in the given state with id >= from,
// ascending by id; kinds bounds them.
func (s *Store) PendingFindings(ctx context.Context, r corpus.RunRange, state string, kinds []corpus.FindingKind, from corpus.ID, limit int) ([]corpus.Finding, error) {
	rows, err := s.pool.Query(ctx, `SELECT point_id, kind, document, detail, seen_at, confirmed_at FROM reconcile_findings
		WHERE run_id = $1 AND index_id = $2 AND state = $3 AND kind = ANY ($4) AND point_id >= $5 AND point_id <= $6
		ORDER BY point_id, kind LIMIT $7`, r.Run, r.Index, state, words(kinds), from, r.Hi, limit)
	if err != nil {
		return nil, wrap("reading findings", err)
	}
	out, err := pgx.CollectRows(rows, scanFinding)
	return out, wrap("reading findings", err)
}

func scanFinding(row pgx.CollectableRow) (corpus.Finding, error) {
	var f corpus.Finding
	return f, row.Scan(&f.ID, &f.Kind, &f.Document, &f.Detail, &f.SeenAt, &f.ConfirmedAt)
}

func words(kinds []corpus.FindingKind) []string {
	out := make([]string, len(kinds))
	for i, k := range kinds {
		out[i] = string(k)
	}
	return out
}

// SetFindings records what became of findings of one index; detail, where not empty, is
// appended to the evidence.
func (s *Store) SetFindings(ctx context.Context, run, index corpus.ID, findings []corpus.Finding, state string, details []string) error {
	if len(findings) == 0 {
		return nil
	}
	ids, kinds := make([]corpus.ID, len(findings)), make([]string, len(findings))
	for i, f := range findings {
		ids[i], kinds[i] = f.ID, string(f.Kind)
	}
	_, err := s.pool.Exec(ctx, `UPDATE reconcile_findings f SET state = $5, detail = f.detail || CASE WHEN p.more = '' THEN '' ELSE '; ' || p.more END
		FROM unnest($3::uuid[], $4::text[], $6::text[]) AS p (id, kind, more)
		WHERE f.run_id = $1 AND f.index_id = $2 AND f.point_id = p.id AND f.kind = p.kind`, run, index, ids, kinds, state, details)
	return wrap("recording what became of findings", err)
}

// Rebuilding lists the lost indexes that the run had built again and that are not accounted
// for yet; of each only ID and Collection are set.
func (s *Store) Rebuilding(ctx context.Context, run corpus.ID) ([]corpus.Index, error) {
	rows, err := s.pool.Query(ctx, `SELECT index_id, collection_id FROM reconcile_findings WHERE run_id = $1 AND kind = 'lost_index' AND state = 'repairing'`, run)
	if err != nil {
		return nil, wrap("reading rebuilt indexes", err)
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (corpus.Index, error) {
		var ix corpus.Index
		return ix, row.Scan(&ix.ID, &ix.Collection)
	})
	return out, wrap("reading rebuilt indexes", err)
}

// PendingUpTo reports whether entries of chunks with at most this gen are still pending in the
// index.
func (s *Store) PendingUpTo(ctx context.Context, ix corpus.Index, gen int64) (bool, error) {
	var pending bool
	err := s.pool.QueryRow(ctx, `SELECT EXISTS (SELECT 1 FROM index_entries e JOIN chunks c ON c.id = e.chunk_id
		WHERE e.index_id = $1 AND e.state = 'pending' AND c.gen <= $2)`, ix.ID, gen).Scan(&pending)
	return pending, wrap("reading what is pending", err)
}

// CountFindings returns the run's findings in one collection, by kind: all, and the repaired.
func (s *Store) CountFindings(ctx context.Context, run, collection corpus.ID) (all, repaired corpus.Counts, err error) {
	all, repaired = corpus.NewCounts(), corpus.NewCounts()
	rows, err := s.pool.Query(ctx, `SELECT kind, count(*), count(*) FILTER (WHERE state = 'repaired') FROM reconcile_findings
		WHERE run_id = $1 AND collection_id = $2 GROUP BY kind`, run, collection)
	if err != nil {
		return nil, nil, wrap("counting findings", err)
	}
	var k corpus.FindingKind
	var n, done int64
	_, err = pgx.ForEachRow(rows, []any{&k, &n, &done}, func() error { all[k], repaired[k] = n, done; return nil })
	return all, repaired, wrap("counting findings", err)
}

// StopTarget records why nothing may be deleted in a collection of the run.
func (s *Store) StopTarget(ctx context.Context, run, collection corpus.ID, reason string) error {
	_, err := s.pool.Exec(ctx, `UPDATE reconcile_targets SET stopped = $3 WHERE run_id = $1 AND collection_id = $2 AND stopped = ''`, run, collection, reason)
	return wrap("recording a stop", err)
}

// BrakeTarget records why the brake ended the run's deletes in a collection.
func (s *Store) BrakeTarget(ctx context.Context, run, collection corpus.ID, reason string) error {
	_, err := s.pool.Exec(ctx, `UPDATE reconcile_targets SET braked = $3 WHERE run_id = $1 AND collection_id = $2 AND braked = ''`, run, collection, reason)
	return wrap("recording a brake", err)
}

// keepFindings of one kind, run and collection once the run has ended; the counts are kept in
// full. It bounds what history costs.
const keepFindings = 1000

// FinishRun ends a run if leader still leads it: the collections' results are computed and
// kept, and the bulk of its working rows removed. state is done, failed, braked or cancelled;
// a failed or cancelled run keeps its checkpoints, so that it can be resumed.
func (s *Store) FinishRun(ctx context.Context, id, leader corpus.ID, state corpus.RunState, message string, at time.Time) (bool, error) {
	var ended bool
	err := s.inTx(ctx, "finishing a reconcile run", func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `UPDATE reconcile_runs SET state = $3, error = $4, finished_at = $5, leader_until = now(),
				compared = (SELECT coalesce(sum(compared), 0) FROM reconcile_ranges WHERE run_id = $1)
			WHERE id = $1 AND leader_token = $2 AND state = 'running'`, id, leader, string(state), message, at)
		ended = tag.RowsAffected() == 1
		if err != nil || !ended {
			return err
		}
		if _, err := tx.Exec(ctx, finishTargets, id, at); err != nil {
			return err
		}
		if state != corpus.RunDone && state != corpus.RunBraked {
			return nil
		}
		var batch pgx.Batch
		batch.Queue(`DELETE FROM reconcile_suspects WHERE run_id = $1`, id)
		batch.Queue(`DELETE FROM reconcile_ranges WHERE run_id = $1`, id)
		// Earlier runs over the same collections that did not end are not resumed any more.
		for _, table := range []string{"reconcile_suspects", "reconcile_ranges"} {
			batch.Queue(`DELETE FROM `+table+` w USING reconcile_runs r, reconcile_targets old, reconcile_targets mine, reconcile_runs me
				WHERE me.id = $1 AND mine.run_id = me.id AND old.collection_id = mine.collection_id AND r.id = old.run_id
				  AND r.state IN ('failed', 'cancelled') AND r.started_at < me.started_at AND w.run_id = r.id`, id)
		}
		batch.Queue(`DELETE FROM reconcile_findings f USING (
				SELECT index_id, point_id, kind, row_number() OVER (PARTITION BY collection_id, kind ORDER BY state = 'repaired', point_id) AS n
				FROM reconcile_findings WHERE run_id = $1) x
			WHERE f.run_id = $1 AND f.index_id = x.index_id AND f.point_id = x.point_id AND f.kind = x.kind AND x.n > $2`, id, keepFindings)
		return tx.SendBatch(ctx, &batch).Close()
	})
	return ended, err
}

const finishTargets = `
	UPDATE reconcile_targets t SET active = false, finished_at = $2,
		documents = (SELECT count(*) FROM documents d WHERE d.collection_id = t.collection_id AND d.deleted_at IS NULL),
		expected_points = coalesce((SELECT sum(expected) FROM reconcile_ranges r JOIN indexes i ON i.id = r.index_id AND i.state = 'serving'
			WHERE r.run_id = t.run_id AND r.collection_id = t.collection_id), 0),
		indexed_points = coalesce((SELECT sum(points) FROM reconcile_ranges r JOIN indexes i ON i.id = r.index_id AND i.state = 'serving'
			WHERE r.run_id = t.run_id AND r.collection_id = t.collection_id), 0),
		pending = (SELECT coalesce(sum(
				(SELECT count(*) FROM index_entries e WHERE e.index_id = i.id AND (e.state = 'pending' OR e.state = 'indexed' AND e.meta_version <> e.want_meta))
				+ (SELECT count(*) FROM index_entries e WHERE e.index_id = i.id AND e.state = 'dead' AND e.absent_at IS NULL)), 0)
			FROM indexes i WHERE i.collection_id = t.collection_id AND i.state = 'serving'),
		findings = (SELECT coalesce(jsonb_object_agg(kind, n), '{}') FROM (SELECT kind, count(*) AS n FROM reconcile_findings f
			WHERE f.run_id = t.run_id AND f.collection_id = t.collection_id GROUP BY kind) x),
		repaired = (SELECT coalesce(jsonb_object_agg(kind, n), '{}') FROM (SELECT kind, count(*) AS n FROM reconcile_findings f
			WHERE f.run_id = t.run_id AND f.collection_id = t.collection_id AND f.state = 'repaired' GROUP BY kind) x)
	WHERE t.run_id = $1`

// RunProgress sums what a run has read so far, over all its collections.
func (s *Store) RunProgress(ctx context.Context, run corpus.ID) (compared int64, err error) {
	err = s.pool.QueryRow(ctx, `SELECT greatest(compared, coalesce((SELECT sum(compared) FROM reconcile_ranges WHERE run_id = $1), 0))::bigint
		FROM reconcile_runs WHERE id = $1`, run).Scan(&compared)
	return compared, wrap("reading a run's progress", err)
}

// TargetReports returns a run's collections as the contract shows them, with up to sample
// findings each, the unrepaired first.
func (s *Store) TargetReports(ctx context.Context, run corpus.ID, sample int) ([]corpus.CollectionReport, error) {
	out, err := s.reports(ctx, `SELECT t.name, t.collection_id, r.state, t.finished_at, r.id, r.depth, t.documents, t.expected_points, t.indexed_points, t.pending, t.findings, t.repaired
		FROM reconcile_targets t JOIN reconcile_runs r ON r.id = t.run_id WHERE r.id = $1 ORDER BY t.ordinal`, sample, run)
	return out, wrap("reading a run's reports", err)
}

// PastRuns lists ended runs of a collection ("" for all), newest first. Of the background's
// runs only those that covered a whole collection or found something are listed.
func (s *Store) PastRuns(ctx context.Context, collection string, limit int) ([]corpus.RunRecord, error) {
	runs, err := s.runs(ctx, `WHERE state <> 'running' AND ($1 = '' OR EXISTS (SELECT 1 FROM reconcile_targets t WHERE t.run_id = r.id AND t.name = $1))
		AND (origin = 'request' OR `+wholeRun+` OR EXISTS (SELECT 1 FROM reconcile_findings f WHERE f.run_id = r.id))
		ORDER BY started_at DESC LIMIT $2`, collection, limit)
	return runs, wrap("reading the history of reconcile runs", err)
}

// wholeRun holds for a run r that covered every id.
const wholeRun = `(NOT r.seeds_only AND r.lo = '00000000-0000-0000-0000-000000000000' AND r.hi = 'ffffffff-ffff-ffff-ffff-ffffffffffff')`

// LatestReports returns the latest verdict of each live collection, or of the named one: the
// last run that covered all of it, with what partial runs found since. A collection that was
// never checked is unknown. NotFound where the named collection does not exist.
func (s *Store) LatestReports(ctx context.Context, collection string, sample int) ([]corpus.CollectionReport, error) {
	rows, err := s.pool.Query(ctx, `SELECT id, name, EXISTS (SELECT 1 FROM reconcile_targets t JOIN reconcile_runs r ON r.id = t.run_id
			WHERE t.collection_id = c.id AND t.active AND r.origin = 'request')
		FROM collections c WHERE deleted_at IS NULL AND ($1 = '' OR name = $1) ORDER BY name`, collection)
	if err != nil {
		return nil, wrap("reading the latest verdicts", err)
	}
	type live struct {
		id      corpus.ID
		name    string
		running bool
	}
	colls, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (live, error) {
		var l live
		return l, row.Scan(&l.id, &l.name, &l.running)
	})
	if err != nil {
		return nil, wrap("reading the latest verdicts", err)
	}
	if collection != "" && len(colls) == 0 {
		return nil, collectionNotFound(collection)
	}
	out := make([]corpus.CollectionReport, 0, len(colls))
	for _, c := range colls {
		got, err := s.reports(ctx, `SELECT t.name, t.collection_id, r.state, t.finished_at, r.id, r.depth, t.documents, t.expected_points, t.indexed_points, t.pending, t.findings, t.repaired
			FROM reconcile_targets t JOIN reconcile_runs r ON r.id = t.run_id
			WHERE t.collection_id = $1 AND t.finished_at IS NOT NULL AND r.state IN ('done', 'braked') AND `+wholeRun+`
			ORDER BY r.started_at DESC LIMIT 1`, sample, c.id)
		if err != nil {
			return nil, wrap("reading the latest verdicts", err)
		}
		rep := corpus.CollectionReport{Collection: c.name, Status: corpus.Unknown, Findings: corpus.NewCounts(), Repaired: corpus.NewCounts()}
		if len(got) > 0 {
			rep = got[0]
			if err := s.addPartial(ctx, c.id, &rep, sample); err != nil {
				return nil, wrap("reading the latest verdicts", err)
			}
		}
		if c.running {
			rep.Status = corpus.Running
		}
		out = append(out, rep)
	}
	return out, nil
}

// addPartial adds what slices and hints found since the run in rep and did not repair.
func (s *Store) addPartial(ctx context.Context, collection corpus.ID, rep *corpus.CollectionReport, sample int) error {
	const since = `FROM reconcile_findings f JOIN reconcile_runs r ON r.id = f.run_id
		WHERE f.collection_id = $1 AND f.state IN ('open', 'remains') AND r.state IN ('done', 'braked')
		  AND r.started_at > (SELECT started_at FROM reconcile_runs WHERE id = $2)
		  AND NOT EXISTS (SELECT 1 FROM reconcile_findings g WHERE g.run_id = $2 AND g.index_id = f.index_id AND g.point_id = f.point_id AND g.kind = f.kind)`
	rows, err := s.pool.Query(ctx, `SELECT f.kind, count(DISTINCT (f.index_id, f.point_id)) `+since+` GROUP BY f.kind`, collection, rep.RunID)
	if err != nil {
		return err
	}
	var k corpus.FindingKind
	var n, total int64
	if _, err := pgx.ForEachRow(rows, []any{&k, &n}, func() error { rep.Findings[k] += n; total += n; return nil }); err != nil || total == 0 {
		return err
	}
	rep.Status = corpus.Inconsistent
	if room := sample - len(rep.Sample); room > 0 {
		rows, err := s.pool.Query(ctx, `SELECT f.point_id, f.kind, f.document, f.detail, f.seen_at, f.confirmed_at `+since+` ORDER BY f.confirmed_at DESC LIMIT $3`, collection, rep.RunID, room)
		if err != nil {
			return err
		}
		more, err := pgx.CollectRows(rows, scanFinding)
		if err != nil {
			return err
		}
		rep.Sample = append(rep.Sample, more...)
	}
	return nil
}

func (s *Store) reports(ctx context.Context, sql string, sample int, args ...any) ([]corpus.CollectionReport, error) {
	rows, err := s.pool.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	type keyed struct {
		corpus.CollectionReport
		id    corpus.ID
		state corpus.RunState
	}
	got, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (keyed, error) {
		k := keyed{CollectionReport: corpus.CollectionReport{Findings: corpus.NewCounts(), Repaired: corpus.NewCounts(), Sample: []corpus.Finding{}}}
		var found, repaired []byte
		var at *time.Time
		err := row.Scan(&k.Collection, &k.id, &k.state, &at, &k.RunID, &k.Depth, &k.Documents, &k.ExpectedPoints, &k.IndexedPoints, &k.Pending, &found, &repaired)
		if err != nil {
			return k, err
		}
		if at != nil {
			k.CheckedAt = *at
		}
		return k, errors.Join(json.Unmarshal(found, &k.Findings), json.Unmarshal(repaired, &k.Repaired))
	})
	if err != nil {
		return nil, err
	}
	out := make([]corpus.CollectionReport, len(got))
	for i, k := range got {
		rep := k.CollectionReport
		if k.state == corpus.RunRunning {
			if rep.Findings, rep.Repaired, err = s.CountFindings(ctx, rep.RunID, k.id); err != nil {
				return nil, err
			}
		}
		switch {
		case k.state == corpus.RunRunning:
			rep.Status = corpus.Running
		case k.state == corpus.RunFailed || k.state == corpus.RunCancelled:
			rep.Status = corpus.Unknown
		case rep.Findings.Total() > rep.Repaired.Total():
			rep.Status = corpus.Inconsistent
		default:
			rep.Status = corpus.Consistent
		}
		if sample > 0 {
			rows, err := s.pool.Query(ctx, `SELECT point_id, kind, document, detail, seen_at, confirmed_at, state = 'repaired' FROM reconcile_findings
				WHERE run_id = $1 AND collection_id = $2 ORDER BY state = 'repaired', kind, point_id LIMIT $3`, rep.RunID, k.id, sample)
			if err != nil {
				return nil, err
			}
			rep.Sample, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (corpus.Finding, error) {
				var f corpus.Finding
				return f, row.Scan(&f.ID, &f.Kind, &f.Document, &f.Detail, &f.SeenAt, &f.ConfirmedAt, &f.Repaired)
			})
			if err != nil {
				return nil, err
			}
		}
		out[i] = rep
	}
	return out, nil
}

// History that is kept, per collection: runs somebody asked for, and runs of the background.
const (
	keepRequested  = 1000
	keepBackground = 300
)

// ForgetRuns removes runs beyond what is kept, oldest first; never one that a verdict rests on.
func (s *Store) ForgetRuns(ctx context.Context) error {
	_, err := s.pool.Exec(ctx, `
		DELETE FROM reconcile_runs WHERE state <> 'running' AND id IN (
			SELECT run_id FROM (
				SELECT t.run_id, r.origin = 'request' AS asked,
				       row_number() OVER (PARTITION BY t.collection_id, r.origin = 'request' ORDER BY r.started_at DESC) AS n,
				       `+wholeRun+` AND r.state IN ('done', 'braked') AS whole,
				       row_number() OVER (PARTITION BY t.collection_id, `+wholeRun+` AND r.state IN ('done', 'braked') ORDER BY r.started_at DESC) AS nth
				FROM reconcile_targets t JOIN reconcile_runs r ON r.id = t.run_id) x
			GROUP BY run_id HAVING bool_and(n > CASE WHEN asked THEN $1::bigint ELSE $2::bigint END AND NOT (whole AND nth = 1)))`, keepRequested, keepBackground)
	return wrap("forgetting old reconcile runs", err)
}
