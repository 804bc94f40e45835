package postgres

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// walkPlan keeps the planner on the one plan whose cost does not depend on statistics: a merge
// join of two index-only scans in id order. Right after a bulk load the statistics know
// nothing, and a walk must never sort, or read the heap that holds the texts. Workers of a
// parallel plan would be started anew for each page.
const walkPlan = `SELECT set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
	set_config('enable_hashjoin', 'off', true), set_config('enable_nestloop', 'off', true), set_config('enable_sort', 'off', true),
	set_config('max_parallel_workers_per_gather', '0', true)`

// The entries are a subquery of their own, kept apart by its ORDER BY: as a condition of the
// outer join the fixed index_id would hide from the planner that they come in id order.
const (
	walkIDs = `
		SELECT c.id, c.died_version IS NOT NULL, e.state
		FROM chunks c LEFT JOIN (
			SELECT chunk_id, state FROM index_entries WHERE index_id = $2 AND chunk_id >= $3 AND chunk_id <= $4 ORDER BY chunk_id) e
		  ON e.chunk_id = c.id
		WHERE c.collection_id = $1 AND c.id >= $3 AND c.id <= $4
		ORDER BY c.id LIMIT $5`
	walkAll = `
		SELECT c.id, c.died_version IS NOT NULL, e.state, c.document_id, c.gen, e.meta_version, e.want_meta
		FROM chunks c LEFT JOIN (
			SELECT chunk_id, state, meta_version, want_meta FROM index_entries WHERE index_id = $2 AND chunk_id >= $3 AND chunk_id <= $4 ORDER BY chunk_id) e
		  ON e.chunk_id = c.id
		WHERE c.collection_id = $1 AND c.id >= $3 AND c.id <= $4
		ORDER BY c.id LIMIT $5`
)

// WalkChunks appends to dst up to limit rows of the index's collection with from <= id <= to,
// ascending. It starts from chunks, not from entries: a chunk without an entry is a row with
// [corpus.EntryNone]. Depth Deep adds document, gen and meta versions. Each call is a read of
// its own; a page of n rows costs two index-only scans over n rows.
func (s *Store) WalkChunks(ctx context.Context, ix corpus.Index, from, to corpus.ID, limit int, depth corpus.Depth, dst []corpus.LedgerRow) ([]corpus.LedgerRow, error) {
	sql := walkIDs
	if depth == corpus.Deep {
		sql = walkAll
	}
	err := pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, walkPlan); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, sql, ix.Collection, ix.ID, from, to, limit)
		if err != nil {
			return err
		}
		dst, err = appendWalk(rows, dst)
		return err
	})
	return dst, wrap("walking the ledger", err)
}

// appendWalk decodes rows by hand: the walk has to keep up with the index's own scroll, and
// scanning by reflection took three times as long (measured on 200,000 rows).
func appendWalk(rows pgx.Rows, dst []corpus.LedgerRow) ([]corpus.LedgerRow, error) {
	defer rows.Close()
	for rows.Next() {
		v := rows.RawValues()
		if len(v) < 3 || len(v[0]) != 16 || len(v[1]) != 1 {
			return dst, fmt.Errorf("unexpected shape of a walked row")
		}
		r := corpus.LedgerRow{ID: corpus.ID(v[0]), Died: v[1][0] != 0, State: entryState(v[2])}
		if len(v) == 7 {
			if len(v[3]) == 16 {
				r.Document = corpus.ID(v[3])
			}
			r.Gen, r.MetaVersion, r.WantMeta = int8Value(v[4]), int8Value(v[5]), int8Value(v[6])
		}
		dst = append(dst, r)
	}
	return dst, rows.Err()
}

// entryState tells the four states by their first byte: p, i, f, d.
func entryState(word []byte) corpus.EntryState {
	if len(word) == 0 {
		return corpus.EntryNone
	}
	switch word[0] {
	case 'i':
		return corpus.EntryIndexed
	case 'p':
		return corpus.EntryPending
	case 'f':
		return corpus.EntryFailed
	case 'd':
		return corpus.EntryDead
	default:
		return corpus.EntryNone
	}
}

func int8Value(b []byte) int64 {
	if len(b) != 8 {
		return 0
	}
	return int64(binary.BigEndian.Uint64(b))
}

const bucketCounts = `
	SELECT bucket, state = 'indexed', count(*) FROM index_entries
	WHERE index_id = $1 AND state <> 'dead' GROUP BY bucket, state
	UNION ALL
	SELECT bucket, false, count(*) FROM index_entries
	WHERE index_id = $1 AND state = 'dead' AND absent_at IS NULL GROUP BY bucket`

// BucketCounts returns, per id bucket of the index, how many entries are settled in the index
// (their points must be there) and how many are not (their points may be): pending, failed,
// and dead ones whose deletion was not confirmed. Both slices have [corpus.Buckets] elements.
func (s *Store) BucketCounts(ctx context.Context, ix corpus.Index) (settled, unsettled []int64, err error) {
	settled, unsettled = make([]int64, corpus.Buckets), make([]int64, corpus.Buckets)
	rows, err := s.pool.Query(ctx, bucketCounts, ix.ID)
	if err != nil {
		return nil, nil, wrap("counting the ledger's buckets", err)
	}
	var (
		bucket  int16
		indexed bool
		n       int64
	)
	_, err = pgx.ForEachRow(rows, []any{&bucket, &indexed, &n}, func() error {
		if bucket < 0 || int(bucket) >= corpus.Buckets {
			return fmt.Errorf("bucket %d out of range", bucket)
		}
		if indexed {
			settled[bucket] += n
		} else {
			unsettled[bucket] += n
		}
		return nil
	})
	return settled, unsettled, wrap("counting the ledger's buckets", err)
}

// EstimatePoints returns the planner's estimate of the points that an index should hold, which
// costs no scan and is as old as the table's statistics.
func (s *Store) EstimatePoints(ctx context.Context, ix corpus.Index) (int64, error) {
	// EXPLAIN takes no parameters in the place of a constant it should estimate by; an id is
	// safe to write out.
	var raw []byte
	err := s.pool.QueryRow(ctx, "EXPLAIN (FORMAT JSON) SELECT 1 FROM index_entries WHERE index_id = '"+ix.ID.String()+"' AND state <> 'dead'").Scan(&raw)
	if err != nil {
		return 0, wrap("estimating an index", err)
	}
	var plans []struct {
		Plan struct {
			Rows float64 `json:"Plan Rows"`
		}
	}
	if err := json.Unmarshal(raw, &plans); err != nil {
		return 0, wrap("estimating an index", err)
	}
	if len(plans) != 1 {
		return 0, wrap("estimating an index", fmt.Errorf("unexpected plan: %s", raw))
	}
	return int64(plans[0].Plan.Rows), nil
}

// WalkBucket appends to dst up to limit rows of one bucket with id >= from, ascending; dead
// entries are left out. Only ID and State are set.
func (s *Store) WalkBucket(ctx context.Context, ix corpus.Index, bucket uint32, from corpus.ID, limit int, dst []corpus.LedgerRow) ([]corpus.LedgerRow, error) {
	rows, err := s.pool.Query(ctx, `
		SELECT chunk_id, false, state FROM index_entries
		WHERE index_id = $1 AND bucket = $2 AND state <> 'dead' AND chunk_id >= $3
		ORDER BY chunk_id LIMIT $4`, ix.ID, int16(bucket), from, limit)
	if err != nil {
		return dst, wrap("walking a bucket of the ledger", err)
	}
	dst, err = appendWalk(rows, dst)
	return dst, wrap("walking a bucket of the ledger", err)
}

// readRows is the ledger's whole answer about single ids. $4 is how long work may be overdue
// before it counts as stuck, in seconds.
const readRows = `
	SELECT c.id, c.document_id, c.gen,
	       c.died_version IS NOT NULL AND (d.id IS NULL OR d.deleted_at IS NOT NULL OR d.serving_version IS NULL OR d.serving_version >= c.died_version),
	       coalesce(e.state, ''), coalesce(e.meta_version, 0), coalesce(e.want_meta, 0), coalesce(e.xmin::text::bigint, 0),
	       coalesce(d.external_id, ''),
	       coalesce(e.state = 'dead' AND e.absent_at IS NULL, false),
	       coalesce(` + stuckEntry + `, false),
	       coalesce(e.state = 'dead' AND e.absent_at IS NOT NULL, false),
	       coalesce(e.attempts, 0), coalesce(e.last_error, '')
	FROM chunks c
	LEFT JOIN index_entries e ON e.index_id = $2 AND e.chunk_id = c.id
	LEFT JOIN documents d ON d.id = c.document_id
	WHERE c.collection_id = $1 AND c.id = ANY ($3::uuid[])`

// stuckEntry holds for entries nobody works on although they need it: given up, or unsettled
// with a lease that ran out a while ago, or dead after more tries than a passing trouble takes.
// Work that was never leased waits for its turn, however long the queue.
const stuckEntry = `(e.state = 'failed'
	OR (e.state = 'pending' OR e.state = 'indexed' AND e.meta_version <> e.want_meta) AND e.lease_until < now() - make_interval(secs => $4)
	OR e.state = 'dead' AND e.absent_at IS NULL AND (e.lease_until < now() - make_interval(secs => $4) OR e.attempts >= 10))`

// ReadRows returns what the ledger says about those of ids that it knows in the index's
// collection, in any order. overdue is how long work may lie before it counts as stuck.
func (s *Store) ReadRows(ctx context.Context, ix corpus.Index, ids []corpus.ID, overdue time.Duration) ([]corpus.LedgerRow, error) {
	out, err := s.readRows(ctx, s.pool, ix, ids, overdue)
	return out, wrap("reading the ledger by id", err)
}

type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func (s *Store) readRows(ctx context.Context, q querier, ix corpus.Index, ids []corpus.ID, overdue time.Duration) ([]corpus.LedgerRow, error) {
	rows, err := q.Query(ctx, readRows, ix.Collection, ix.ID, ids, overdue.Seconds())
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (corpus.LedgerRow, error) {
		var (
			r     corpus.LedgerRow
			doc   *corpus.ID
			state string
		)
		err := row.Scan(&r.ID, &doc, &r.Gen, &r.Died, &state, &r.MetaVersion, &r.WantMeta, &r.Version,
			&r.ExternalID, &r.Scheduled, &r.Stuck, &r.Absent, &r.Attempts, &r.LastError)
		if doc != nil {
			r.Document = *doc
		}
		r.State = corpus.ParseEntryState(state)
		return r, err
	})
}

// StuckEntries calls each with batches of at most a thousand ids between lo and hi whose
// entries are stuck (see [corpus.LedgerRow]). each must not use
// the store's connection for long: the read stays open meanwhile.
func (s *Store) StuckEntries(ctx context.Context, ix corpus.Index, lo, hi corpus.ID, overdue time.Duration, each func([]corpus.ID) error) error {
	rows, err := s.pool.Query(ctx, `
		SELECT chunk_id FROM index_entries e WHERE index_id = $1 AND state = 'failed' AND chunk_id >= $2 AND chunk_id <= $3
		UNION ALL
		SELECT chunk_id FROM index_entries e
		WHERE index_id = $1 AND chunk_id >= $2 AND chunk_id <= $3
		  AND (state = 'pending' OR (state = 'indexed' AND meta_version <> want_meta))
		  AND lease_until < now() - make_interval(secs => $4)
		UNION ALL
		SELECT chunk_id FROM index_entries e
		WHERE index_id = $1 AND chunk_id >= $2 AND chunk_id <= $3 AND state = 'dead' AND absent_at IS NULL
		  AND (lease_until < now() - make_interval(secs => $4) OR attempts >= 10)`, ix.ID, lo, hi, overdue.Seconds())
	if err != nil {
		return wrap("looking for stuck entries", err)
	}
	var (
		id    corpus.ID
		batch []corpus.ID
	)
	_, err = pgx.ForEachRow(rows, []any{&id}, func() error {
		batch = append(batch, id)
		if len(batch) < 1000 {
			return nil
		}
		err := each(batch)
		batch = batch[:0]
		return err
	})
	if err == nil && len(batch) > 0 {
		err = each(batch)
	}
	return wrap("looking for stuck entries", err)
}
