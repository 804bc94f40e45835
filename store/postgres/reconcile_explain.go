package postgres

import (
	"context"
	"errors"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// explainLimit bounds the ids of one explanation.
const explainLimit = 200

// ExplainLedger gathers what the ledger knows about a chunk's id, a document's id, or a
// document's external id, in one collection or (empty) in all. An id it does not know is
// returned for every live index of the collections, so that the indexes can be asked.
// NotFound where the collection, or a document named by its external id, does not exist.
func (s *Store) ExplainLedger(ctx context.Context, query, collection string) (corpus.Explanation, error) {
	e, err := s.explain(ctx, query, collection)
	return e, wrap("explaining an id", err)
}

func (s *Store) explain(ctx context.Context, query, collection string) (corpus.Explanation, error) {
	out := corpus.Explanation{Query: query, Chunks: []corpus.ExplainedChunk{}}
	var exists bool
	if err := s.pool.QueryRow(ctx, `SELECT $1 = '' OR EXISTS (SELECT 1 FROM collections WHERE name = $1 AND deleted_at IS NULL)`, collection).Scan(&exists); err != nil {
		return out, err
	}
	if !exists {
		return out, collectionNotFound(collection)
	}
	id, perr := uuid.Parse(query)
	isID := perr == nil && len(query) == 36

	var d corpus.ExplainedDocument
	err := s.pool.QueryRow(ctx, `SELECT c.name, d.id, d.external_id, d.target_version, coalesce(d.serving_version, 0), d.deleted_at, d.incarnation_floor, d.updated_at
		FROM documents d JOIN collections c ON c.id = d.collection_id AND c.deleted_at IS NULL
		WHERE ($2 = '' OR c.name = $2) AND (d.external_id = $1 OR $3 AND (d.id = $4 OR d.id = (SELECT document_id FROM chunks WHERE id = $4)))
		ORDER BY d.external_id = $1 DESC, c.name LIMIT 1`, query, collection, isID, id).
		Scan(&d.Collection, &d.ID, &d.ExternalID, &d.TargetVersion, &d.ServingVersion, &d.DeletedAt, &d.IncarnationFloor, &d.UpdatedAt)
	switch {
	case err == nil:
		out.Document = &d
	case !errors.Is(err, pgx.ErrNoRows):
		return out, err
	case !isID:
		return out, corpus.Errorf(corpus.NotFound, codeDocumentNotFound, "no document with this id is known, and it is not the id of a chunk")
	}
	var ids []corpus.ID
	if out.Document == nil || isID && corpus.ID(id) != d.ID {
		ids = []corpus.ID{corpus.ID(id)}
		if out.Document != nil {
			collection = d.Collection
		}
	} else {
		collection = d.Collection
		if ids, err = scanIDs(s.pool.Query(ctx, `SELECT id FROM chunks WHERE document_id = $1 ORDER BY died_version NULLS FIRST, id LIMIT $2`, d.ID, explainLimit+1)); err != nil {
			return out, err
		}
		if len(ids) > explainLimit {
			ids, out.Truncated = ids[:explainLimit], true
		}
	}
	rows, err := s.pool.Query(ctx, `
		SELECT p.id, c.name, `+indexColumns+`, k.id IS NOT NULL, coalesce(e.state, 'none'), coalesce(e.need, ''), coalesce(k.gen, 0), coalesce(k.born_version, 0), k.died_version,
		       coalesce(k.occurrence, 0), coalesce(k.incarnation, 0), coalesce(e.meta_version, 0), coalesce(e.want_meta, 0), coalesce(e.attempts, 0), coalesce(e.last_error, ''),
		       e.lease_until, e.absent_at, e.changed_at
		FROM unnest($1::uuid[]) WITH ORDINALITY AS p (id, n)
		CROSS JOIN collections c
		JOIN indexes i ON i.collection_id = c.id AND i.state IN ('serving', 'building')
		LEFT JOIN chunks k ON k.id = p.id AND k.collection_id = c.id
		LEFT JOIN index_entries e ON e.index_id = i.id AND e.chunk_id = p.id
		WHERE c.deleted_at IS NULL AND ($2 = '' OR c.name = $2)
		ORDER BY p.n, c.name, i.state DESC LIMIT $3`, uuids(ids), collection, 2*explainLimit)
	if err != nil {
		return out, err
	}
	out.Chunks, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (corpus.ExplainedChunk, error) {
		var c corpus.ExplainedChunk
		var r corpus.ExplainedRow
		var ir indexRow
		var id [16]byte
		var known bool
		dest := append([]any{&id, &c.Collection}, ir.dest()...)
		err := row.Scan(append(dest, &known, &r.State, &r.Need, &r.Gen, &r.BornVersion, &r.DiedVersion, &r.Occurrence, &r.Incarnation,
			&r.MetaVersion, &r.WantMeta, &r.Attempts, &r.LastError, &r.LeaseUntil, &r.AbsentAt, &r.ChangedAt)...)
		if err != nil {
			return c, err
		}
		c.ID = id
		if known {
			c.Ledger = &r
		}
		c.In, err = ir.index()
		c.Index, c.IndexState, c.Verdicts = c.In.QdrantName, c.In.State, []corpus.ExplainedVerdict{}
		return c, err
	})
	return out, err
}
