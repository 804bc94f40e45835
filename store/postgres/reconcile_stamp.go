package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// stampHistory is how long issued nonces are remembered. A stamp older than that and unknown
// belongs to an old copy of the index, which is not evidence against this Postgres.
const stampHistory = 24 * time.Hour

// IssueStamp draws the next nonce of an index if the last one is older than every, records it,
// and returns the stamp to be written into the index; due is false while it is fresh. Only one
// of several instances gets it. Times are this Postgres's.
func (s *Store) IssueStamp(ctx context.Context, ix corpus.Index, nonce corpus.ID, every time.Duration) (st corpus.Stamp, due bool, err error) {
	err = s.inTx(ctx, "issuing a stamp", func(tx pgx.Tx) error {
		st, due = corpus.Stamp{Nonce: nonce}, false
		err := tx.QueryRow(ctx, `UPDATE indexes SET previous_nonce = nonce, nonce = $2, stamped_at = now()
			WHERE id = $1 AND state <> 'retired' AND (stamped_at IS NULL OR stamped_at < now() - make_interval(secs => $3))
			RETURNING stamped_at, (SELECT id FROM installation)`, ix.ID, nonce, every.Seconds()).Scan(&st.At, &st.Installation)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		due = true
		_, err = tx.Exec(ctx, `WITH old AS (DELETE FROM index_stamps WHERE index_id = $1 AND issued_at < now() - make_interval(secs => $4))
			INSERT INTO index_stamps (index_id, nonce, issued_at) VALUES ($1, $2, $3)`, ix.ID, nonce, st.At, stampHistory.Seconds())
		return err
	})
	return st, due, err
}

// StampFits says why the stamp read from an index contradicts this ledger, or "". It fits when
// this Postgres issued its nonce, or when it is older than everything remembered here (the
// index is then an old copy, which the ledger outlives).
func (s *Store) StampFits(ctx context.Context, ix corpus.Index, st corpus.Stamp) (string, error) {
	var owner corpus.ID
	var known bool
	var oldest *time.Time
	var other string
	err := s.pool.QueryRow(ctx, `SELECT (SELECT id FROM installation),
			EXISTS (SELECT 1 FROM index_stamps WHERE index_id = $1 AND nonce = $2)
			OR EXISTS (SELECT 1 FROM indexes WHERE id = $1 AND $2 IN (nonce, previous_nonce)),
			(SELECT min(issued_at) FROM index_stamps WHERE index_id = $1),
			coalesce((SELECT i.qdrant_name FROM index_stamps s JOIN indexes i ON i.id = s.index_id WHERE s.nonce = $2 AND s.index_id <> $1 LIMIT 1), '')`, ix.ID, st.Nonce).
		Scan(&owner, &known, &oldest, &other)
	switch {
	case err != nil:
		return "", wrap("checking a stamp", err)
	case st.Installation != owner:
		return "the index is stamped by installation " + st.Installation.String() + "; this ledger is " + owner.String(), nil
	case known:
		return "", nil
	case other != "":
		return "the Qdrant collection " + ix.QdrantName + " carries the stamp of " + other + ": it is an alias or a copy of it", nil
	case oldest == nil:
		return "the index carries a stamp (" + st.At.UTC().Format(time.RFC3339) + ") and this ledger never issued one: it was restored from a time before, or is another one", nil
	case st.At.Before(*oldest):
		return "", nil
	default:
		return "the index carries a stamp of " + st.At.UTC().Format(time.RFC3339) + " that this ledger never issued: another Postgres stamps the same index, or this one was restored from a backup", nil
	}
}

// StampedIndexes lists the serving and building indexes of live collections whose Qdrant
// collection exists and whose stamp is older than every.
func (s *Store) StampedIndexes(ctx context.Context, every time.Duration) ([]corpus.Index, error) {
	rows, err := s.pool.Query(ctx, "SELECT "+indexColumns+` FROM indexes i JOIN collections c ON c.id = i.collection_id AND c.deleted_at IS NULL
		WHERE i.state <> 'retired' AND i.ready_at IS NOT NULL
		  AND (i.stamped_at IS NULL OR i.stamped_at < now() - make_interval(secs => $1))`, every.Seconds())
	if err != nil {
		return nil, wrap("listing stamps", err)
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (corpus.Index, error) {
		var r indexRow
		if err := row.Scan(r.dest()...); err != nil {
			return corpus.Index{}, err
		}
		return r.index()
	})
	return out, wrap("listing stamps", err)
}

// CollectionName returns a live collection's name; NotFound when it was deleted.
func (s *Store) CollectionName(ctx context.Context, id corpus.ID) (string, error) {
	var name string
	err := s.pool.QueryRow(ctx, "SELECT name FROM collections WHERE id = $1 AND deleted_at IS NULL", id).Scan(&name)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", corpus.Errorf(corpus.NotFound, codeCollectionNotFound, "the collection does not exist any more")
	}
	return name, wrap("reading a collection's name", err)
}

// idleScrub holds for the rows of live collections that no run is looking at: what is due waits
// for the run to end.
const idleScrub = `c.id = x.collection_id AND c.deleted_at IS NULL AND NOT EXISTS (SELECT 1 FROM reconcile_targets t WHERE t.collection_id = c.id AND t.active)`

// DueScrubs returns the live collections whose quick check or next slice is due and that no
// run holds, and claims them in the same statement, so that one instance does each. slices is
// how many there are.
func (s *Store) DueScrubs(ctx context.Context, quickEvery, sliceEvery time.Duration, slices int) (quick []string, slice map[string]int, err error) {
	slice = map[string]int{}
	err = s.inTx(ctx, "claiming scrubs", func(tx pgx.Tx) error {
		quick, slice = nil, map[string]int{}
		if _, err := tx.Exec(ctx, `INSERT INTO reconcile_scrub (collection_id) SELECT id FROM collections WHERE deleted_at IS NULL ON CONFLICT DO NOTHING`); err != nil {
			return err
		}
		if quickEvery > 0 {
			rows, err := tx.Query(ctx, `UPDATE reconcile_scrub x SET quick_at = now() FROM collections c
				WHERE `+idleScrub+` AND x.quick_at < now() - make_interval(secs => $1) RETURNING c.name`, quickEvery.Seconds())
			if err != nil {
				return err
			}
			if quick, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
				return err
			}
		}
		if sliceEvery <= 0 {
			return nil
		}
		rows, err := tx.Query(ctx, `UPDATE reconcile_scrub x SET slice_at = now(), next_slice = (x.next_slice + 1) % $2 FROM collections c
			WHERE `+idleScrub+` AND x.slice_at < now() - make_interval(secs => $1)
			RETURNING c.name, (x.next_slice + $2 - 1) % $2`, sliceEvery.Seconds(), slices)
		if err != nil {
			return err
		}
		var name string
		var n int
		_, err = pgx.ForEachRow(rows, []any{&name, &n}, func() error { slice[name] = n; return nil })
		return err
	})
	return quick, slice, err
}

// PutBackScrub makes a claimed check due again that was not carried out: the slice of that
// number, or the quick check where it is negative.
func (s *Store) PutBackScrub(ctx context.Context, collection string, slice int) error {
	_, err := s.pool.Exec(ctx, `UPDATE reconcile_scrub x SET quick_at = CASE WHEN $2 < 0 THEN '-infinity' ELSE quick_at END,
			slice_at = CASE WHEN $2 < 0 THEN slice_at ELSE '-infinity' END, next_slice = CASE WHEN $2 < 0 THEN next_slice ELSE $2 END
		FROM collections c WHERE c.id = x.collection_id AND c.deleted_at IS NULL AND c.name = $1`, collection, slice)
	return wrap("putting a scrub back", err)
}
