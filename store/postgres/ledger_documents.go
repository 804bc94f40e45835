package postgres

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

func documentNotFound(externalID string) error {
	return corpus.Errorf(corpus.NotFound, codeDocumentNotFound, "there is no document %q in this collection", externalID)
}

// DeleteDocument takes a version in which the document does not exist: all its chunks die, its
// texts, vectors and versions go at once, nothing serves. A document that is deleted already
// stays so. NotFound (document_not_found) when the ledger knows none of that name.
func (s *Store) DeleteDocument(ctx context.Context, collection corpus.ID, externalID string) (corpus.DocumentProgress, error) {
	id := corpus.DocumentID(collection, externalID)
	var out corpus.DocumentProgress
	err := s.inTx(ctx, "deleting a document", func(tx pgx.Tx) error {
		live, _, err := shareCollection(ctx, tx, collection)
		if err != nil {
			return err
		}
		standing, err := lockStanding(ctx, tx, []corpus.ID{id})
		if err != nil {
			return err
		}
		if len(standing) == 0 {
			return documentNotFound(externalID)
		}
		if out = standing[0]; out.Deleted {
			return nil
		}
		out.Target++
		out.Serving, out.Deleted = 0, true
		if _, err := tx.Exec(ctx, `UPDATE documents SET target_version = $2, serving_version = NULL, deleted_at = now(), updated_at = now()
			WHERE id = $1`, id, out.Target); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "DELETE FROM document_versions WHERE document_id = $1", id); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "UPDATE chunks SET died_version = $2 WHERE document_id = $1 AND died_version IS NULL", id, out.Target); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, "SELECT id FROM chunks WHERE document_id = $1 AND text IS NOT NULL", id)
		dead, err := scanIDs(rows, err)
		if err != nil {
			return err
		}
		return killChunks(ctx, tx, live, uuids(dead))
	})
	return out, err
}

// PatchDocument replaces a document's metadata without touching its content: of the version
// that serves, at once, and of the one that is to serve. NotFound (document_not_found) when
// there is no live document of that name.
func (s *Store) PatchDocument(ctx context.Context, collection corpus.ID, externalID string, md corpus.Metadata) (corpus.Accepted, error) {
	id := corpus.DocumentID(collection, externalID)
	var out corpus.Accepted
	err := s.inGenTx(ctx, "changing metadata", func(tx pgx.Tx) error {
		live, _, err := shareCollection(ctx, tx, collection)
		if err != nil {
			return err
		}
		standing, err := lockStanding(ctx, tx, []corpus.ID{id})
		if err != nil {
			return err
		}
		if len(standing) == 0 || standing[0].Deleted {
			return documentNotFound(externalID)
		}
		raw := string(md.JSON())
		var same bool
		var meta int64
		var points [][16]byte
		// Unchanged only if it equals what every version of the document says.
		if err := tx.QueryRow(ctx, `SELECT bool_and(metadata = $2::jsonb), max(meta_version),
				(array_agg(chunk_ids::text ORDER BY version DESC))[1]::uuid[]
			FROM document_versions WHERE document_id = $1`, id, raw).Scan(&same, &meta, &points); err != nil {
			return err
		}
		out = corpus.Accepted{
			Document: id, Acceptance: corpus.Unchanged, Version: standing[0].Target, MetaVersion: meta,
			Serving: standing[0].Serving, PointIDs: fromUUIDs(points),
		}
		if same {
			return nil
		}
		gens, err := takeGens(ctx, tx, 1)
		if err != nil {
			return err
		}
		out.Acceptance, out.MetaVersion = corpus.NewMetadata, gens[0]
		if _, err := tx.Exec(ctx, "UPDATE document_versions SET metadata = $2::jsonb, meta_version = $3 WHERE document_id = $1", id, raw, gens[0]); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "UPDATE documents SET updated_at = now() WHERE id = $1", id); err != nil {
			return err
		}
		return wantMetadata(ctx, tx, live, [][16]byte{id})
	})
	return out, err
}

const viewColumns = `d.id, d.external_id, d.target_version, coalesce(d.serving_version, 0), d.created_at, d.updated_at,
	greatest(d.incarnation_floor, c.floor_base), v.metadata, cardinality(v.chunk_ids)`

func scanView(row rowScanner) (corpus.DocumentView, error) {
	var v corpus.DocumentView
	var id [16]byte
	var floor int32
	var metadata []byte
	if err := row.Scan(&id, &v.ExternalID, &v.TargetVersion, &v.ServingVersion, &v.CreatedAt, &v.UpdatedAt, &floor, &metadata, &v.ChunkCount); err != nil {
		return v, err
	}
	v.DocumentID, v.IncarnationFloor = id, uint32(floor)
	var err error
	v.Metadata, err = readMetadata(metadata)
	return v, err
}

// Document returns a live document with the chunks of its target version, in order.
// NotFound (document_not_found) when there is none of that name.
func (s *Store) Document(ctx context.Context, collection corpus.ID, externalID string) (corpus.DocumentView, error) {
	id := corpus.DocumentID(collection, externalID)
	var view corpus.DocumentView
	// One snapshot for both statements, so that the chunks are those of the version shown.
	err := pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		var err error
		view, err = scanView(tx.QueryRow(ctx, "SELECT "+viewColumns+`
			FROM documents d JOIN collections c ON c.id = d.collection_id AND c.deleted_at IS NULL
			JOIN document_versions v ON v.document_id = d.id AND v.version = d.target_version
			WHERE d.id = $1 AND d.deleted_at IS NULL`, id))
		if errors.Is(err, pgx.ErrNoRows) {
			return documentNotFound(externalID)
		}
		if err != nil {
			return err
		}
		rows, err := tx.Query(ctx, `
			SELECT k.id, k.ord - 1, c.text, c.occurrence, c.incarnation, coalesce(e.state, 'pending'), coalesce(e.last_error, '')
			FROM document_versions v
			CROSS JOIN LATERAL unnest(v.chunk_ids) WITH ORDINALITY AS k (id, ord)
			JOIN chunks c ON c.id = k.id
			LEFT JOIN indexes i ON i.collection_id = $3 AND i.state = 'serving'
			LEFT JOIN index_entries e ON e.index_id = i.id AND e.chunk_id = k.id
			WHERE v.document_id = $1 AND v.version = $2 ORDER BY k.ord`, id, view.TargetVersion, collection)
		if err != nil {
			return err
		}
		var chunk [16]byte
		var text *string
		var occurrence, incarnation int32
		var c corpus.ChunkView
		_, err = pgx.ForEachRow(rows, []any{&chunk, &c.Ordinal, &text, &occurrence, &incarnation, &c.State, &c.LastError}, func() error {
			c.ID, c.Occurrence, c.Incarnation = chunk, uint32(occurrence), uint32(incarnation)
			if c.Text = ""; text != nil {
				c.Text = *text
			}
			view.Chunks = append(view.Chunks, c)
			return nil
		})
		return err
	})
	return view, wrap("reading a document", err)
}

// Documents lists up to limit live documents by external id, bytewise, after the given one.
// next is the id to go on after, or empty on the last page.
func (s *Store) Documents(ctx context.Context, collection corpus.ID, limit int, after string) (page []corpus.DocumentView, next string, err error) {
	rows, err := s.pool.Query(ctx, "SELECT "+viewColumns+`
		FROM documents d JOIN collections c ON c.id = d.collection_id AND c.deleted_at IS NULL
		JOIN document_versions v ON v.document_id = d.id AND v.version = d.target_version
		WHERE d.collection_id = $1 AND d.external_id > $2 AND d.deleted_at IS NULL
		ORDER BY d.external_id LIMIT $3`, collection, after, limit+1)
	if err != nil {
		return nil, "", wrap("listing documents", err)
	}
	page, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (corpus.DocumentView, error) { return scanView(row) })
	if err != nil {
		return nil, "", wrap("listing documents", err)
	}
	if len(page) > limit {
		page = page[:limit]
		next = page[limit-1].ExternalID
	}
	return page, next, nil
}
