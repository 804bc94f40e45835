package postgres

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// QdrantPrefix begins the name of every Qdrant collection of ours.
const QdrantPrefix = "lockstep_"

const (
	collectionColumns = "c.id, c.name, c.settings, c.created_at"
	indexColumns      = "i.id, i.collection_id, i.qdrant_name, i.fingerprint, i.layout, i.state"
)

type rowScanner interface{ Scan(dest ...any) error }

func scanCollection(row rowScanner, more ...any) (corpus.Collection, error) {
	var c corpus.Collection
	var id [16]byte
	var settings []byte
	if err := row.Scan(append([]any{&id, &c.Name, &settings, &c.CreatedAt}, more...)...); err != nil {
		return c, err
	}
	c.ID = id
	return c, json.Unmarshal(settings, &c.Settings)
}

// indexRow receives indexColumns.
type indexRow struct {
	id, collection [16]byte
	layout         []byte
	state          string
	ix             corpus.Index
}

func (r *indexRow) dest() []any {
	return []any{&r.id, &r.collection, &r.ix.QdrantName, &r.ix.Fingerprint, &r.layout, &r.state}
}

func (r *indexRow) index() (corpus.Index, error) {
	r.ix.ID, r.ix.Collection, r.ix.Salt = r.id, r.collection, r.id
	r.ix.State = corpus.IndexState(r.state)
	return r.ix, json.Unmarshal(r.layout, &r.ix.Layout)
}

// ResolveCollection returns a collection by name with its serving index, or NotFound
// (collection_not_found).
func (s *Store) ResolveCollection(ctx context.Context, name string) (corpus.Collection, corpus.Index, error) {
	c, ix, err := resolve(ctx, s.pool, name)
	return c, ix, wrap("resolving a collection", err)
}

type queryRower interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

func resolve(ctx context.Context, q queryRower, name string) (corpus.Collection, corpus.Index, error) {
	var r indexRow
	c, err := scanCollection(q.QueryRow(ctx, "SELECT "+collectionColumns+", "+indexColumns+`
		FROM collections c JOIN indexes i ON i.collection_id = c.id AND i.state = 'serving'
		WHERE c.name = $1 AND c.deleted_at IS NULL`, name), r.dest()...)
	if errors.Is(err, pgx.ErrNoRows) {
		return corpus.Collection{}, corpus.Index{}, collectionNotFound(name)
	}
	if err != nil {
		return corpus.Collection{}, corpus.Index{}, err
	}
	ix, err := r.index()
	return c, ix, err
}

// EnsureCollection returns the collection of that name with its serving index. Where there is
// none it is created with the given settings; created then tells the caller to create the
// Qdrant collection and to call [Store.IndexReady]. An existing collection keeps its settings.
func (s *Store) EnsureCollection(ctx context.Context, name string, settings corpus.Settings, layout corpus.Layout, fingerprint string) (c corpus.Collection, ix corpus.Index, created bool, err error) {
	settingsJSON, err := json.Marshal(settings)
	if err != nil {
		return c, ix, false, wrap("encoding the collection's settings", err)
	}
	err = s.inTx(ctx, "creating a collection", func(tx pgx.Tx) error {
		id := newID()
		tag, err := tx.Exec(ctx, `INSERT INTO collections (id, name, settings) VALUES ($1, $2, $3)
			ON CONFLICT (name) WHERE deleted_at IS NULL DO NOTHING`, id, name, settingsJSON)
		if err != nil {
			return err
		}
		if created = tag.RowsAffected() == 1; created {
			if _, err := addIndex(ctx, tx, id, fingerprint, layout, corpus.IndexServing); err != nil {
				return err
			}
		}
		c, ix, err = resolve(ctx, tx, name)
		return err
	})
	return c, ix, created, err
}

// addIndex draws a new index with a name that was never used.
func addIndex(ctx context.Context, tx pgx.Tx, collection corpus.ID, fingerprint string, layout corpus.Layout, state corpus.IndexState) (corpus.Index, error) {
	raw, err := json.Marshal(layout)
	if err != nil {
		return corpus.Index{}, err
	}
	id := newID()
	ix := corpus.Index{
		ID: id, Collection: collection, QdrantName: QdrantPrefix + hex.EncodeToString(id[:]),
		Fingerprint: fingerprint, State: state, Layout: layout, Salt: id,
	}
	_, err = tx.Exec(ctx, `INSERT INTO indexes (id, collection_id, qdrant_name, fingerprint, layout, state)
		VALUES ($1, $2, $3, $4, $5, $6)`, id, collection, ix.QdrantName, fingerprint, raw, string(state))
	return ix, err
}

// IndexReady records that the Qdrant collection of an index exists. From then on nobody
// creates it again: if it is gone, it was lost.
func (s *Store) IndexReady(ctx context.Context, index corpus.ID) error {
	_, err := s.pool.Exec(ctx, "UPDATE indexes SET ready_at = now() WHERE id = $1 AND ready_at IS NULL", index)
	return wrap("recording that an index exists", err)
}

// Indexes lists the serving and building indexes of all collections, each with what there is
// to do in it.
func (s *Store) Indexes(ctx context.Context) ([]corpus.LiveIndex, error) {
	rows, err := s.pool.Query(ctx, "SELECT "+indexColumns+`, c.name, i.ready_at IS NOT NULL, c.stopped_at IS NOT NULL,
			(SELECT min(e.not_before) FROM index_entries e WHERE e.index_id = i.id AND e.not_before <= now()
				AND (e.state = 'pending' OR (e.state = 'indexed' AND e.meta_version <> e.want_meta))),
			EXISTS (SELECT 1 FROM index_entries e WHERE e.index_id = i.id AND e.state = 'dead' AND e.absent_at IS NULL AND e.not_before <= now())
		FROM indexes i JOIN collections c ON c.id = i.collection_id
		WHERE i.state IN ('serving', 'building') AND c.deleted_at IS NULL ORDER BY i.id`)
	if err != nil {
		return nil, wrap("listing indexes", err)
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (corpus.LiveIndex, error) {
		var l corpus.LiveIndex
		var r indexRow
		var oldest *time.Time
		if err := row.Scan(append(r.dest(), &l.CollectionName, &l.Ready, &l.Stopped, &oldest, &l.Dead)...); err != nil {
			return l, err
		}
		if oldest != nil {
			l.Oldest = *oldest
		}
		ix, err := r.index()
		l.Index = ix
		return l, err
	})
	return out, wrap("listing indexes", err)
}

// Collections lists all collections by name, with their serving index and counts.
func (s *Store) Collections(ctx context.Context) ([]corpus.CollectionView, error) {
	return s.views(ctx, "")
}

// CollectionView inspects one collection, or answers NotFound (collection_not_found).
func (s *Store) CollectionView(ctx context.Context, name string) (corpus.CollectionView, error) {
	views, err := s.views(ctx, name)
	if err == nil && len(views) == 0 {
		err = collectionNotFound(name)
	}
	if err != nil {
		return corpus.CollectionView{}, err
	}
	return views[0], nil
}

// views counts with scans of partial indexes where there are some; the two totals read an
// index of every live row.
func (s *Store) views(ctx context.Context, name string) ([]corpus.CollectionView, error) {
	rows, err := s.pool.Query(ctx, "SELECT "+collectionColumns+", "+indexColumns+`,
			(SELECT count(*) FROM documents d WHERE d.collection_id = c.id AND d.deleted_at IS NULL),
			(SELECT count(*) FROM chunks k WHERE k.collection_id = c.id AND k.died_version IS NULL),
			(SELECT count(*) FROM index_entries e WHERE e.index_id = i.id
				AND (e.state = 'pending' OR (e.state = 'indexed' AND e.meta_version <> e.want_meta))),
			(SELECT count(*) FROM index_entries e WHERE e.index_id = i.id AND e.state = 'failed')
		FROM collections c JOIN indexes i ON i.collection_id = c.id AND i.state = 'serving'
		WHERE c.deleted_at IS NULL AND ($1 = '' OR c.name = $1) ORDER BY c.name`, name)
	if err != nil {
		return nil, wrap("reading collections", err)
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (corpus.CollectionView, error) {
		var v corpus.CollectionView
		var r indexRow
		c, err := scanCollection(row, append(r.dest(), &v.Documents, &v.Chunks, &v.Pending, &v.Failed)...)
		if err != nil {
			return v, err
		}
		v.Collection = c
		v.Index, err = r.index()
		return v, err
	})
	return out, wrap("reading collections", err)
}

// DeleteCollection acknowledges a deletion: from this commit on the name is free and nothing
// finds the collection. Its rows and Qdrant collections are cleared by [Store.ClearCollections]
// and the workers. NotFound (collection_not_found) when there is none of that name.
func (s *Store) DeleteCollection(ctx context.Context, name string) error {
	return s.inTx(ctx, "deleting a collection", func(tx pgx.Tx) error {
		var id [16]byte
		err := tx.QueryRow(ctx, `UPDATE collections SET deleted_at = now() WHERE name = $1 AND deleted_at IS NULL RETURNING id`, name).Scan(&id)
		if errors.Is(err, pgx.ErrNoRows) {
			return collectionNotFound(name)
		}
		if err != nil {
			return err
		}
		_, err = tx.Exec(ctx, "UPDATE indexes SET state = 'retired', retired_at = now() WHERE collection_id = $1 AND state <> 'retired'", id)
		return err
	})
}

// RetiredIndexes lists indexes whose Qdrant collection is to be dropped.
func (s *Store) RetiredIndexes(ctx context.Context) ([]corpus.Index, error) {
	rows, err := s.pool.Query(ctx, "SELECT "+indexColumns+" FROM indexes i WHERE i.state = 'retired' ORDER BY i.retired_at")
	if err != nil {
		return nil, wrap("listing retired indexes", err)
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (corpus.Index, error) {
		var r indexRow
		if err := row.Scan(r.dest()...); err != nil {
			return corpus.Index{}, err
		}
		return r.index()
	})
	return out, wrap("listing retired indexes", err)
}

// clearBatch is how many rows one clearing transaction removes: some tens of milliseconds
// (unmeasured), so that it holds up nobody.
const clearBatch = 5000

// ForgetIndex removes what the ledger holds of a retired index whose Qdrant collection was
// dropped, in small transactions, except for its name. It may be called again after an
// interruption.
func (s *Store) ForgetIndex(ctx context.Context, index corpus.ID) error {
	for done := false; !done; {
		err := s.inTx(ctx, "clearing a retired index", func(tx pgx.Tx) error {
			rows, err := tx.Query(ctx, `SELECT e.chunk_id, c.document_id, i.collection_id FROM index_entries e
				JOIN indexes i ON i.id = e.index_id AND i.state = 'retired'
				LEFT JOIN chunks c ON c.id = e.chunk_id AND c.document_id IS NOT NULL AND e.state = 'dead'
				WHERE e.index_id = $1 LIMIT $2`, index, clearBatch)
			if err != nil {
				return err
			}
			var chunk, collection [16]byte
			var doc *[16]byte
			var chunks, dead, docs []corpus.ID
			if _, err := pgx.ForEachRow(rows, []any{&chunk, &doc, &collection}, func() error {
				chunks = append(chunks, chunk)
				if doc != nil {
					dead, docs = append(dead, chunk), append(docs, *doc)
				}
				return nil
			}); err != nil {
				return err
			}
			if done = len(chunks) < clearBatch; len(chunks) == 0 {
				return nil
			}
			if err := lockDocuments(ctx, tx, docs); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, "DELETE FROM index_entries WHERE index_id = $1 AND chunk_id = ANY ($2::uuid[])", index, uuids(chunks)); err != nil {
				return err
			}
			// The Qdrant collection is gone and its name is never used again: the dead are absent.
			return purgeChunks(ctx, tx, collection, dead)
		})
		if err != nil {
			return err
		}
	}
	_, err := s.pool.Exec(ctx, `WITH gone AS (DELETE FROM indexes WHERE id = $1 AND state = 'retired' RETURNING qdrant_name)
		INSERT INTO dropped_indexes (qdrant_name) SELECT qdrant_name FROM gone`, index)
	return wrap("forgetting a retired index", err)
}

// ClearCollections removes the rows of deleted collections whose indexes are all forgotten,
// text first, in small transactions. It may be called again after an interruption.
func (s *Store) ClearCollections(ctx context.Context) error {
	rows, err := s.pool.Query(ctx, "SELECT id FROM collections WHERE deleted_at IS NOT NULL")
	ids, err := scanIDs(rows, err)
	if err != nil {
		return wrap("listing deleted collections", err)
	}
	for _, id := range ids {
		for _, sql := range []string{
			`DELETE FROM chunk_vectors WHERE chunk_id = ANY (ARRAY(SELECT v.chunk_id FROM chunk_vectors v
				JOIN chunks c ON c.id = v.chunk_id WHERE c.collection_id = $1 LIMIT $2))`,
			`DELETE FROM chunks WHERE id = ANY (ARRAY(SELECT id FROM chunks WHERE collection_id = $1 LIMIT $2))`,
			`DELETE FROM document_versions WHERE document_id = ANY (ARRAY(SELECT v.document_id FROM document_versions v
				JOIN documents d ON d.id = v.document_id WHERE d.collection_id = $1 LIMIT $2))`,
			`DELETE FROM documents WHERE id = ANY (ARRAY(SELECT id FROM documents WHERE collection_id = $1 LIMIT $2))`,
			`DELETE FROM incarnation_floors WHERE ctid = ANY (ARRAY(SELECT ctid FROM incarnation_floors WHERE collection_id = $1 LIMIT $2))`,
		} {
			for {
				tag, err := s.pool.Exec(ctx, sql, id, clearBatch)
				if err != nil {
					return wrap("clearing a deleted collection", err)
				}
				if tag.RowsAffected() == 0 {
					break
				}
			}
		}
		// The row goes last, and only when no index of it is left to be dropped.
		_, err := s.pool.Exec(ctx, `DELETE FROM collections c WHERE c.id = $1
			AND NOT EXISTS (SELECT 1 FROM indexes i WHERE i.collection_id = c.id)`, id)
		if err != nil {
			return wrap("clearing a deleted collection", err)
		}
	}
	return nil
}

// StopCollection forbids deletes in a collection until a documented step is taken (promise P8).
// adopted is what [Store.RollbackFacts] said when the evidence was gathered: stopped is false,
// and nothing changes, where an operator has taken that step since. A collection that is
// stopped already keeps its reason.
func (s *Store) StopCollection(ctx context.Context, collection corpus.ID, adopted int64, reason string) (stopped bool, err error) {
	tag, err := s.pool.Exec(ctx, `UPDATE collections SET stopped_at = coalesce(stopped_at, now()), stop_reason = coalesce(stop_reason, $3)
		WHERE id = $1 AND adopted_gen = $2`, collection, adopted, reason)
	return tag.RowsAffected() > 0, wrap("stopping deletes in a collection", err)
}

// CollectionStopped tells whether, since when and why deletes are forbidden in a collection.
func (s *Store) CollectionStopped(ctx context.Context, collection corpus.ID) (reason string, since time.Time, stopped bool, err error) {
	var at *time.Time
	var why *string
	err = s.pool.QueryRow(ctx, "SELECT stopped_at, stop_reason FROM collections WHERE id = $1", collection).Scan(&at, &why)
	if err != nil || at == nil {
		return "", time.Time{}, false, wrap("reading whether a collection is stopped", err)
	}
	if why != nil {
		reason = *why
	}
	return reason, *at, true, nil
}
