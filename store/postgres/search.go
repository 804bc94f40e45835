package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// joinHead says whether index and collection still belong together, and whether this is the
// primary: a standby may lag behind an acknowledged delete.
const joinHead = `
SELECT pg_is_in_recovery(),
       EXISTS (SELECT FROM collections c JOIN indexes i ON i.collection_id = c.id
               WHERE c.id = $1 AND c.name = $2 AND i.id = $3 AND i.state = 'serving'),
       j.*
FROM (SELECT) AS one LEFT JOIN (`

// joinBody looks up each candidate by primary keys: chunk, document, serving version. place is
// null unless that version holds the chunk; then the candidate is live. LIMIT 1 says what the
// keys say anyway, but makes the planner look up rather than hash a table it takes for small:
// statistics lag behind ingestion.
const joinBody = `
  SELECT k.n, ch.id IS NOT NULL AS known, ch.died_version IS NOT NULL AS died, v.place,
         d.id AS document, d.external_id, v.version,
         CASE WHEN d.switched_at > clock_timestamp() - interval '1 hour'
              THEN greatest(1, (extract(epoch FROM clock_timestamp() - d.switched_at) * 1000000)::bigint) END AS switched_us,
         CASE WHEN $5 THEN ch.text END AS text, CASE WHEN $6 THEN v.metadata END AS metadata%s
  FROM unnest($4::uuid[]) WITH ORDINALITY AS k(id, n)
  LEFT JOIN LATERAL (
    SELECT c.id, c.document_id, c.text, c.died_version FROM chunks c
    WHERE c.id = k.id AND c.collection_id = $1 LIMIT 1) ch ON true
  LEFT JOIN LATERAL (
    SELECT o.id, o.external_id, o.serving_version, o.switched_at FROM documents o
    WHERE o.id = ch.document_id AND o.deleted_at IS NULL LIMIT 1) d ON true
  LEFT JOIN LATERAL (
    SELECT w.version, w.metadata, w.chunk_ids, array_position(w.chunk_ids, k.id) AS place FROM document_versions w
    WHERE w.document_id = d.id AND w.version = d.serving_version LIMIT 1) v ON true
) AS j ON true`

// joinSQL and joinContextSQL are the two statements of the join; the second brings the
// neighbours of each candidate in its serving version as well.
var (
	joinSQL        = joinHead + fmt.Sprintf(joinBody, "")
	joinContextSQL = joinHead + fmt.Sprintf(joinBody, `,
         ARRAY(SELECT u.id FROM unnest(`+around+`) WITH ORDINALITY u(id, n) ORDER BY u.n) AS around,
         ARRAY(SELECT coalesce(nc.text, '') FROM unnest(`+around+`) WITH ORDINALITY u(id, n)
               LEFT JOIN chunks nc ON nc.id = u.id ORDER BY u.n) AS around_texts`)
)

// around is the part of the version's chunk list within $7 places of the candidate.
const around = `v.chunk_ids[greatest(v.place - $7::int, 1) : v.place + $7::int]`

// JoinCandidates says what each candidate of an index is worth. It is one statement, so all
// it answers is one moment's truth, and one round trip. Errors: Unavailable also where the
// server has become a standby.
func (s *Store) JoinCandidates(ctx context.Context, req corpus.JoinRequest) (corpus.Joined, error) {
	out := corpus.Joined{Chunks: make([]corpus.JoinedChunk, len(req.Candidates))}
	for i, id := range req.Candidates {
		out.Chunks[i].ID = id
	}
	sql, args := joinSQL, []any{
		[16]byte(req.Collection), req.Name, [16]byte(req.Index), uuids(req.Candidates), req.Texts, req.Metadata,
	}
	if req.Context > 0 {
		sql, args = joinContextSQL, append(args, req.Context)
	}
	rows, err := s.pool.Query(ctx, sql, args...)
	if err != nil {
		return corpus.Joined{}, wrap("joining candidates", err)
	}
	defer rows.Close()

	documents := make(map[corpus.ID]int, len(req.Candidates))
	for rows.Next() {
		var (
			standby        bool
			n, place       *int64 // n is null in the one row of a join without candidates
			known, died    *bool
			document       *[16]byte
			external, text *string
			version        *int64
			switched       *int64 // microseconds ago
			metadata       []byte
			aroundIDs      [][16]byte
			aroundTexts    []string
			into           = []any{&standby, &out.Serving, &n, &known, &died, &place, &document, &external, &version, &switched, &text, &metadata}
		)
		if req.Context > 0 {
			into = append(into, &aroundIDs, &aroundTexts)
		}
		if err := rows.Scan(into...); err != nil {
			return corpus.Joined{}, wrap("joining candidates", err)
		}
		if standby {
			return corpus.Joined{}, corpus.Errorf(corpus.Unavailable, codeUnavailable,
				"the database has become a read-only standby, which may lag behind acknowledged deletes: connect to the primary (target_session_attrs=read-write)")
		}
		if n == nil {
			continue
		}
		c := &out.Chunks[*n-1]
		switch {
		case place != nil:
			c.State = corpus.JoinLive
		case !*known:
			c.State = corpus.JoinUnknown
		case *died:
			c.State = corpus.JoinDead
		default:
			c.State = corpus.JoinWaiting
		}
		if switched != nil {
			c.SwitchedAgo = time.Duration(*switched) * time.Microsecond
		}
		if c.State != corpus.JoinLive {
			continue
		}
		c.Ordinal = int(*place - 1)
		if text != nil {
			c.Text = *text
		}
		at, seen := documents[*document]
		if !seen {
			at = len(out.Documents)
			documents[*document] = at
			d := corpus.JoinedDocument{ID: *document, ExternalID: *external, Version: *version}
			if req.Metadata {
				var fault *corpus.FieldError
				if d.Metadata, fault = corpus.DecodeMetadata(metadata); fault != nil {
					return corpus.Joined{}, wrap("joining candidates", fmt.Errorf("stored metadata: %s", fault.Detail))
				}
			}
			out.Documents = append(out.Documents, d)
		}
		c.Document = at
		if req.Context > 0 {
			own := min(c.Ordinal, req.Context)
			for i := range aroundIDs {
				neighbour := corpus.Neighbour{ID: aroundIDs[i], Ordinal: c.Ordinal - own + i, Text: aroundTexts[i]}
				switch {
				case i < own:
					c.Before = append(c.Before, neighbour)
				case i > own:
					c.After = append(c.After, neighbour)
				}
			}
		}
	}
	if err := rows.Err(); err != nil {
		return corpus.Joined{}, wrap("joining candidates", err)
	}
	return out, nil
}

// LikeDocument returns up to limit chunks, evenly taken, of the serving version of a live
// document, with the vectors that its caller brought. NotFound where there is none.
func (s *Store) LikeDocument(ctx context.Context, collection corpus.ID, externalID string, limit int) (corpus.LikeDocument, error) {
	const doing = "reading a document's chunks"
	rows, err := s.pool.Query(ctx, `
SELECT d.id, u.id, ch.text, cv.vectors
FROM documents d
JOIN document_versions v ON v.document_id = d.id AND v.version = d.serving_version
CROSS JOIN LATERAL (SELECT cardinality(v.chunk_ids) AS total) size
LEFT JOIN LATERAL (
  SELECT v.chunk_ids[1 + (g.i * size.total) / least($3::int, size.total)] AS id, g.i
  FROM generate_series(0, least($3::int, size.total) - 1) AS g(i)) u ON true
LEFT JOIN chunks ch ON ch.id = u.id
LEFT JOIN chunk_vectors cv ON cv.chunk_id = u.id
WHERE d.collection_id = $1 AND d.external_id = $2 AND d.deleted_at IS NULL
ORDER BY u.i`, [16]byte(collection), externalID, limit)
	if err != nil {
		return corpus.LikeDocument{}, wrap(doing, err)
	}
	var out corpus.LikeDocument
	var document [16]byte
	var chunk *[16]byte
	var text *string
	var vectors []byte
	found := false
	_, err = pgx.ForEachRow(rows, []any{&document, &chunk, &text, &vectors}, func() error {
		found = true
		out.ID = document
		if chunk == nil || text == nil {
			return nil
		}
		c := corpus.LikeChunk{ID: *chunk, Text: *text}
		if vectors != nil {
			v, err := corpus.DecodeVectors(vectors)
			if err != nil {
				return err
			}
			c.Vectors = v
		}
		out.Chunks = append(out.Chunks, c)
		return nil
	})
	if err != nil {
		return corpus.LikeDocument{}, wrap(doing, err)
	}
	if !found {
		return corpus.LikeDocument{}, corpus.Errorf(corpus.NotFound, codeDocumentNotFound,
			"no document %q is served by this collection", externalID)
	}
	return out, nil
}
