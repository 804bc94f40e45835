package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// lockCollection locks the collection's row exclusively: no acceptance and no version switch
// of its documents goes on until the transaction ends.
func lockCollection(ctx context.Context, tx pgx.Tx, collection corpus.ID) error {
	var deleted bool
	err := tx.QueryRow(ctx, "SELECT deleted_at IS NOT NULL FROM collections WHERE id = $1 FOR UPDATE", collection).Scan(&deleted)
	if errors.Is(err, pgx.ErrNoRows) || err == nil && deleted {
		return corpus.Errorf(corpus.NotFound, codeCollectionNotFound, "the collection was deleted")
	}
	return err
}

// fillIndex queues every live chunk of the collection for an index. The collection is locked.
func fillIndex(ctx context.Context, tx pgx.Tx, ix corpus.Index) error {
	_, err := tx.Exec(ctx, `
		INSERT INTO index_entries (index_id, chunk_id, document_id, state, want_meta, not_before)
		SELECT $1, c.id, c.document_id, 'pending', CASE WHEN c.born_version <= d.serving_version AND coalesce(c.died_version > d.serving_version, true)
			THEN sv.meta_version ELSE tv.meta_version END, now()
		FROM chunks c JOIN documents d ON d.id = c.document_id AND d.deleted_at IS NULL
		JOIN document_versions tv ON tv.document_id = d.id AND tv.version = d.target_version
		LEFT JOIN document_versions sv ON sv.document_id = d.id AND sv.version = d.serving_version
		WHERE c.collection_id = $2 AND c.text IS NOT NULL`, ix.ID, ix.Collection)
	return err
}

// BuildIndex starts a second index of a collection, for another model or layout. From its
// commit on every acceptance writes to it too. The caller creates the Qdrant collection and
// calls [Store.IndexReady]. Conflict (index_building) when one is being built already.
func (s *Store) BuildIndex(ctx context.Context, collection corpus.ID, fingerprint string, layout corpus.Layout) (corpus.Index, error) {
	var ix corpus.Index
	err := s.inTx(ctx, "starting an index", func(tx pgx.Tx) error {
		if err := lockCollection(ctx, tx, collection); err != nil {
			return err
		}
		var building bool
		if err := tx.QueryRow(ctx, "SELECT EXISTS (SELECT 1 FROM indexes WHERE collection_id = $1 AND state = 'building')", collection).Scan(&building); err != nil {
			return err
		}
		if building {
			return corpus.Errorf(corpus.Conflict, "index_building", "an index of this collection is being built already")
		}
		var err error
		if ix, err = addIndex(ctx, tx, collection, fingerprint, layout, corpus.IndexBuilding); err != nil {
			return err
		}
		return fillIndex(ctx, tx, ix)
	})
	return ix, err
}

// buildingGap asks whether some live chunk is not settled in the building index.
const buildingGap = `SELECT EXISTS (
	SELECT 1 FROM chunks c LEFT JOIN index_entries e ON e.index_id = $1 AND e.chunk_id = c.id
	WHERE c.collection_id = $2 AND c.text IS NOT NULL
		AND (e.state IS DISTINCT FROM 'indexed' OR e.meta_version <> e.want_meta))`

// SwitchIndex makes a building index the serving one, if it holds every live chunk with its
// metadata; the old one is retired, to be dropped. It reports whether it did.
func (s *Store) SwitchIndex(ctx context.Context, building corpus.Index) (switched bool, err error) {
	// A look without the lock: most calls find work left, and must not hold up ingestion.
	var gap bool
	if err := s.pool.QueryRow(ctx, buildingGap, building.ID, building.Collection).Scan(&gap); err != nil || gap {
		return false, wrap("testing a building index", err)
	}
	err = s.inTx(ctx, "switching indexes", func(tx pgx.Tx) error {
		switched = false
		if err := lockCollection(ctx, tx, building.Collection); err != nil {
			return err
		}
		if err := tx.QueryRow(ctx, buildingGap, building.ID, building.Collection).Scan(&gap); err != nil || gap {
			return err
		}
		var state string
		if err := tx.QueryRow(ctx, "SELECT state FROM indexes WHERE id = $1", building.ID).Scan(&state); err != nil {
			return err
		}
		if state != string(corpus.IndexBuilding) {
			return nil
		}
		if _, err := tx.Exec(ctx, "UPDATE indexes SET state = 'retired', retired_at = now() WHERE collection_id = $1 AND state = 'serving'", building.Collection); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "UPDATE indexes SET state = 'serving' WHERE id = $1", building.ID)
		switched = err == nil
		return err
	})
	return switched && err == nil, err
}

// RebuildIndex replaces an index whose Qdrant collection was lost by an empty one with a new
// name, in the same state; every live chunk is queued for it. The caller creates the Qdrant
// collection and calls [Store.IndexReady]. Conflict (index_retired) when it was replaced already.
func (s *Store) RebuildIndex(ctx context.Context, lost corpus.Index) (corpus.Index, error) {
	var ix corpus.Index
	err := s.inTx(ctx, "rebuilding an index", func(tx pgx.Tx) error {
		if err := lockCollection(ctx, tx, lost.Collection); err != nil {
			return err
		}
		var err error
		ix, err = replaceIndex(ctx, tx, lost.ID)
		return err
	})
	return ix, err
}

func replaceIndex(ctx context.Context, tx pgx.Tx, old corpus.ID) (corpus.Index, error) {
	var r indexRow
	err := tx.QueryRow(ctx, "SELECT "+indexColumns+" FROM indexes i WHERE i.id = $1", old).Scan(r.dest()...)
	if errors.Is(err, pgx.ErrNoRows) || err == nil && r.state == string(corpus.IndexRetired) {
		return corpus.Index{}, corpus.Errorf(corpus.Conflict, "index_retired", "the index was replaced already")
	}
	if err != nil {
		return corpus.Index{}, err
	}
	was, err := r.index()
	if err != nil {
		return corpus.Index{}, err
	}
	if _, err := tx.Exec(ctx, "UPDATE indexes SET state = 'retired', retired_at = now() WHERE id = $1", old); err != nil {
		return corpus.Index{}, err
	}
	ix, err := addIndex(ctx, tx, was.Collection, was.Fingerprint, was.Layout, was.State)
	if err != nil {
		return corpus.Index{}, err
	}
	return ix, fillIndex(ctx, tx, ix)
}

// RetireIndex gives up a building index.
func (s *Store) RetireIndex(ctx context.Context, building corpus.Index) error {
	return s.inTx(ctx, "retiring an index", func(tx pgx.Tx) error {
		if err := lockCollection(ctx, tx, building.Collection); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "UPDATE indexes SET state = 'retired', retired_at = now() WHERE id = $1 AND state = 'building'", building.ID)
		return err
	})
}

// AdoptRollback is the documented step by which an operator declares that this Postgres, as it
// is, is the truth of the collection: points of the lost time are orphans from now on. Ids
// start above anything the lost time may have used, all entries are read back, and deletes
// run again.
func (s *Store) AdoptRollback(ctx context.Context, collection corpus.ID) error {
	return s.inTx(ctx, "adopting a rollback", func(tx pgx.Tx) error {
		if err := lockCollection(ctx, tx, collection); err != nil {
			return err
		}
		return adopt(ctx, tx, collection)
	})
}

// DiscardIndex is the other documented step: what the index holds is worth nothing, for
// instance because it belongs to another installation's Postgres. Besides what AdoptRollback
// does, every index of the collection is retired and built again from Postgres under a new
// name. It returns the new indexes, whose Qdrant collections the caller creates.
func (s *Store) DiscardIndex(ctx context.Context, collection corpus.ID) ([]corpus.Index, error) {
	var out []corpus.Index
	err := s.inTx(ctx, "discarding an index", func(tx pgx.Tx) error {
		out = nil
		if err := lockCollection(ctx, tx, collection); err != nil {
			return err
		}
		if err := adopt(ctx, tx, collection); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, "SELECT id FROM indexes WHERE collection_id = $1 AND state <> 'retired'", collection)
		old, err := scanIDs(rows, err)
		if err != nil {
			return err
		}
		for _, id := range old {
			ix, err := replaceIndex(ctx, tx, id)
			if err != nil {
				return err
			}
			out = append(out, ix)
		}
		return nil
	})
	return out, err
}

func adopt(ctx context.Context, tx pgx.Tx, collection corpus.ID) error {
	var b pgx.Batch
	// Everything below the present number is history, lost or not.
	// Like a jump of the sequence, a floor follows the clock, so that it passes those that a lost
	// history has adopted. 64 incarnations a minute are more than purges can use up, and last
	// until 2083.
	b.Queue(`UPDATE collections SET stopped_at = NULL, stop_reason = NULL, floor_base = greatest(floor_base + 64, $2),
		adopted_gen = (SELECT last_value FROM gen) WHERE id = $1`, collection, (time.Now().Unix()-jumpEpoch)/60*64)
	b.Queue("UPDATE indexes SET nonce = NULL, previous_nonce = NULL, stamped_at = NULL WHERE collection_id = $1", collection)
	b.Queue(`UPDATE index_entries e SET state = 'pending', need = 'rewrite', meta_version = 0, attempts = 0, not_before = now(),
			lease_token = NULL, lease_until = NULL, last_error = NULL, changed_at = now()
		FROM indexes i WHERE i.collection_id = $1 AND i.state <> 'retired' AND e.index_id = i.id AND e.state <> 'dead'`, collection)
	b.Queue(`UPDATE index_entries e SET absent_at = NULL, attempts = 0, not_before = now(), lease_token = NULL, lease_until = NULL, changed_at = now()
		FROM indexes i WHERE i.collection_id = $1 AND i.state <> 'retired' AND e.index_id = i.id AND e.state = 'dead'`, collection)
	return tx.SendBatch(ctx, &b).Close()
}
