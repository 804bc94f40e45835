package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Claim leases unsettled entries of an index: those whose time has come, the longest waiting
// first, skipping what others are claiming. Entries of a lease that ran out are among them.
func (s *Store) Claim(ctx context.Context, index corpus.ID, lease corpus.Lease) ([]corpus.Entry, error) {
	// Only what the claim needs is read under the claim; texts and metadata follow from rows
	// that cannot change while an entry wants them.
	rows, err := s.pool.Query(ctx, `
		WITH due AS MATERIALIZED (
			SELECT chunk_id, ctid AS at FROM index_entries
			WHERE index_id = $1 AND (state = 'pending' OR (state = 'indexed' AND meta_version <> want_meta)) AND not_before <= now()
			ORDER BY not_before LIMIT $2 FOR UPDATE SKIP LOCKED)
		UPDATE index_entries e SET claims = e.claims + 1, attempts = e.attempts + 1,
			lease_token = $3, lease_until = now() + $4::interval, not_before = now() + $4::interval
		FROM due, chunks c LEFT JOIN chunk_vectors v ON v.chunk_id = c.id
		WHERE e.ctid = due.at AND c.id = due.chunk_id AND c.document_id IS NOT NULL AND c.text IS NOT NULL
		RETURNING e.chunk_id, c.document_id, c.gen, e.want_meta, e.state = 'indexed', e.need = 'rewrite', e.claims = 1, e.attempts,
			CASE WHEN e.state = 'pending' THEN c.text ELSE '' END, CASE WHEN e.state = 'pending' THEN v.vectors END`,
		index, lease.Max, lease.Token, micros(lease.For))
	if err != nil {
		return nil, wrap("claiming work", err)
	}
	var out []corpus.Entry
	var chunk, doc [16]byte
	var e corpus.Entry
	var vectors []byte
	_, err = pgx.ForEachRow(rows, []any{&chunk, &doc, &e.Gen, &e.WantMeta, &e.MetaOnly, &e.Rewrite, &e.First, &e.Attempts, &e.Text, &vectors}, func() error {
		e.Chunk, e.Document, e.Token, e.Vectors = chunk, doc, lease.Token, nil
		if vectors != nil {
			v, err := corpus.DecodeVectors(vectors)
			if err != nil {
				return fmt.Errorf("vectors of chunk %s: %w", e.Chunk, err)
			}
			e.Vectors = v
		}
		out = append(out, e)
		return nil
	})
	if err != nil {
		return nil, wrap("claiming work", err)
	}
	return s.withMetadata(ctx, out)
}

// withMetadata adds to each entry the metadata it wants. Where that version has gone since,
// the newest one is written instead: the entry follows it (see [Store.Settle]).
func (s *Store) withMetadata(ctx context.Context, entries []corpus.Entry) ([]corpus.Entry, error) {
	if len(entries) == 0 {
		return nil, nil
	}
	docs := make([][16]byte, len(entries))
	for i := range entries {
		docs[i] = entries[i].Document
	}
	slices.SortFunc(docs, func(a, b [16]byte) int { return corpus.ID(a).Compare(b) })
	rows, err := s.pool.Query(ctx, `SELECT document_id, meta_version, metadata FROM document_versions
		WHERE document_id = ANY ($1::uuid[]) ORDER BY document_id, version`, slices.Compact(docs))
	if err != nil {
		return nil, wrap("reading metadata of claimed work", err)
	}
	type version struct {
		meta int64
		m    corpus.Metadata
	}
	byDoc := make(map[corpus.ID][]version, len(docs))
	var doc [16]byte
	var meta int64
	var raw []byte
	_, err = pgx.ForEachRow(rows, []any{&doc, &meta, &raw}, func() error {
		m, err := readMetadata(raw)
		byDoc[doc] = append(byDoc[doc], version{meta, m})
		return err
	})
	if err != nil {
		return nil, wrap("reading metadata of claimed work", err)
	}
	out := entries[:0]
	for _, e := range entries {
		vs := byDoc[e.Document]
		if len(vs) == 0 {
			continue // deleted since the claim; its entry is dead
		}
		use := vs[len(vs)-1]
		for _, v := range vs {
			if v.meta == e.WantMeta {
				use = v
			}
		}
		e.WantMeta, e.Metadata = use.meta, use.m
		out = append(out, e)
	}
	return out, nil
}

// readMetadata decodes what the ledger stored. It was validated on its way in.
func readMetadata(raw []byte) (corpus.Metadata, error) {
	m, fe := corpus.ParseMetadata(raw)
	if fe == nil {
		return m, nil
	}
	// Postgres writes numbers and spaces in its own way, which may exceed the limit on what
	// comes in; what is stored must be read all the same.
	var out corpus.Metadata
	if err := json.Unmarshal(raw, &out); err != nil {
		return nil, fmt.Errorf("stored metadata: %w", err)
	}
	return out, nil
}

// Renew extends the leases of entries whose work goes on. It passes over entries that somebody
// is changing.
func (s *Store) Renew(ctx context.Context, index corpus.ID, entries []corpus.Entry, until time.Duration) error {
	chunks, tokens := make([][16]byte, len(entries)), make([][16]byte, len(entries))
	for i := range entries {
		chunks[i], tokens[i] = entries[i].Chunk, entries[i].Token
	}
	_, err := s.pool.Exec(ctx, `
		WITH k AS MATERIALIZED (SELECT f.at FROM unnest($2::uuid[], $3::uuid[]) AS p (id, token) CROSS JOIN LATERAL (
			SELECT e.ctid AS at FROM index_entries e WHERE e.index_id = $1 AND e.chunk_id = p.id AND e.lease_token = p.token FOR UPDATE SKIP LOCKED) f)
		UPDATE index_entries e SET lease_until = now() + $4::interval, not_before = now() + $4::interval FROM k WHERE e.ctid = k.at`, index, chunks, tokens, micros(until))
	return wrap("renewing a lease", err)
}

// Settle records what became of claimed entries and, under the same row locks, switches every
// document whose target version the serving index now holds (P2). Results of a lease that was
// lost meanwhile change nothing. It returns where the documents stand.
func (s *Store) Settle(ctx context.Context, ix corpus.Index, results []corpus.EntryResult) ([]corpus.DocumentProgress, error) {
	docs := make([]corpus.ID, len(results))
	for i := range results {
		docs[i] = results[i].Document
	}
	var out []corpus.DocumentProgress
	err := s.inTx(ctx, "recording work", func(tx pgx.Tx) error {
		live, _, err := shareCollection(ctx, tx, ix.Collection)
		if err != nil {
			return err
		}
		standing, err := lockStanding(ctx, tx, docs)
		if err != nil {
			return err
		}
		if err := recordResults(ctx, tx, ix.ID, results); err != nil {
			return err
		}
		out, err = switchVersions(ctx, tx, live, standing)
		return err
	})
	if corpus.CodeOf(err) == codeCollectionNotFound {
		return nil, nil // deleted meanwhile: nothing is left to record
	}
	return out, err
}

// Sweep tests documents whose target does not serve, from after the given id on, whether it
// could: a switch that was due when nobody looked (an index switched, say) is made up for.
// It returns the id to go on from, zero after the last.
func (s *Store) Sweep(ctx context.Context, collection corpus.ID, after corpus.ID, limit int) (moved []corpus.DocumentProgress, next corpus.ID, err error) {
	rows, err := s.pool.Query(ctx, `SELECT id FROM documents WHERE collection_id = $1 AND id > $2
		AND deleted_at IS NULL AND serving_version IS DISTINCT FROM target_version ORDER BY id LIMIT $3`, collection, after, limit)
	docs, err := scanIDs(rows, err)
	if err != nil || len(docs) == 0 {
		return nil, corpus.ID{}, wrap("sweeping unswitched documents", err)
	}
	if len(docs) == limit {
		next = docs[len(docs)-1]
	}
	err = s.inTx(ctx, "switching versions", func(tx pgx.Tx) error {
		live, _, err := shareCollection(ctx, tx, collection)
		if err != nil {
			return err
		}
		standing, err := lockStanding(ctx, tx, docs)
		if err != nil {
			return err
		}
		moved, err = switchVersions(ctx, tx, live, standing)
		return err
	})
	if corpus.CodeOf(err) == codeCollectionNotFound {
		return nil, corpus.ID{}, nil
	}
	return moved, next, err
}

// lockStanding locks documents in id order and returns where they stand, in that order.
func lockStanding(ctx context.Context, tx pgx.Tx, docs []corpus.ID) ([]corpus.DocumentProgress, error) {
	docs = slices.Clone(docs)
	slices.SortFunc(docs, corpus.ID.Compare)
	docs = slices.Compact(docs)
	// The columns are those of the row as it is once it is locked.
	rows, err := tx.Query(ctx, `SELECT id, target_version, coalesce(serving_version, 0), deleted_at IS NOT NULL
		FROM documents WHERE id = ANY ($1::uuid[]) ORDER BY id FOR UPDATE`, uuids(docs))
	if err != nil {
		return nil, err
	}
	out := make([]corpus.DocumentProgress, 0, len(docs))
	var id [16]byte
	var p corpus.DocumentProgress
	_, err = pgx.ForEachRow(rows, []any{&id, &p.Target, &p.Serving, &p.Deleted}, func() error {
		p.Document, p.Known = id, true
		out = append(out, p)
		return nil
	})
	return out, err
}

func recordResults(ctx context.Context, tx pgx.Tx, index corpus.ID, results []corpus.EntryResult) error {
	type column struct {
		ids, tokens [][16]byte
		metas       []int64
		delays      []string
		blameless   []bool
		errors      []string
	}
	var by [4]column
	for i := range results {
		r := &results[i]
		c := &by[r.Outcome]
		c.ids, c.tokens, c.metas = append(c.ids, r.Chunk), append(c.tokens, r.Token), append(c.metas, r.Meta)
		c.delays, c.blameless, c.errors = append(c.delays, micros(r.Delay)), append(c.blameless, r.Blameless), append(c.errors, r.Error)
	}
	var b pgx.Batch
	// Each statement checks the state besides the token: what was declared dead stays dead.
	const mine = " WHERE e.ctid = p.at AND p.holder = p.token AND p.was IN ('pending', 'indexed')"
	if c := by[corpus.EntryDone]; len(c.ids) > 0 {
		b.Queue(byKey("$2::uuid[], $3::uuid[], $4::bigint[]", "id, token, meta")+`
			UPDATE index_entries e SET state = 'indexed', need = 'insert', meta_version = p.meta, want_meta = greatest(e.want_meta, p.meta),
				attempts = 0, not_before = now(), lease_token = NULL, lease_until = NULL, last_error = NULL, changed_at = now()
			FROM p`+mine, index, c.ids, c.tokens, c.metas)
	}
	if c := by[corpus.EntryRetry]; len(c.ids) > 0 {
		b.Queue(byKey("$2::uuid[], $3::uuid[], $4::text[], $5::boolean[], $6::text[]", "id, token, delay, blameless, error")+`
			UPDATE index_entries e SET attempts = CASE WHEN p.blameless THEN greatest(e.attempts - 1, 0) ELSE e.attempts END,
				not_before = now() + p.delay::interval, lease_token = NULL, lease_until = NULL, last_error = nullif(p.error, ''), changed_at = now()
			FROM p`+mine,
			index, c.ids, c.tokens, c.delays, c.blameless, c.errors)
	}
	if c := by[corpus.EntryGivenUp]; len(c.ids) > 0 {
		b.Queue(byKey("$2::uuid[], $3::uuid[], $4::text[]", "id, token, error")+`
			UPDATE index_entries e SET state = 'failed', lease_token = NULL, lease_until = NULL, last_error = p.error, changed_at = now()
			FROM p`+mine, index, c.ids, c.tokens, c.errors)
	}
	if c := by[corpus.EntryRewrite]; len(c.ids) > 0 {
		b.Queue(byKey("$2::uuid[], $3::uuid[], $4::text[], $5::text[]", "id, token, delay, error")+`
			UPDATE index_entries e SET state = 'pending', need = 'rewrite', meta_version = 0,
				not_before = now() + p.delay::interval, lease_token = NULL, lease_until = NULL, last_error = nullif(p.error, ''), changed_at = now()
			FROM p`+mine,
			index, c.ids, c.tokens, c.delays, c.errors)
	}
	if b.Len() == 0 {
		return nil
	}
	recorded := 0
	answers := tx.SendBatch(ctx, &b)
	for range b.Len() {
		tag, err := answers.Exec()
		if err != nil {
			return errors.Join(err, answers.Close())
		}
		recorded += int(tag.RowsAffected())
	}
	if err := answers.Close(); err != nil || recorded == len(results) {
		return err
	}
	// Some entry was declared dead while it was worked on. Its point may have been read absent
	// before the write landed, so it is deleted once more; what was read under a lease that is
	// taken away here proves nothing.
	ids := make([]corpus.ID, len(results))
	for i := range results {
		ids[i] = results[i].Chunk
	}
	_, err := tx.Exec(ctx, `UPDATE index_entries SET absent_at = NULL, not_before = now(), lease_token = NULL, lease_until = NULL, changed_at = now()
		WHERE index_id = $1 AND chunk_id = ANY ($2::uuid[]) AND state = 'dead'`, index, uuids(ids))
	return err
}

// byKey begins a statement on entries of index $1 whose keys come as arrays, the first of them
// named id. It looks each one up by the primary key, whatever the planner believes: for an
// index that is new since the last ANALYZE it expects one row, and would rather read them all.
// For the same reason conditions are put on p, which holds the locked rows as they are.
//
// A row that is changed by somebody else while the statement waits for its lock is passed over.
// That suits whoever holds a lease, for such a change ends it; others lock the rows in a
// statement before, see lockEntries.
func byKey(arrays, names string) string {
	return "WITH p AS MATERIALIZED (SELECT a.*, f.* FROM unnest(" + arrays + ") AS a (" + names + `) CROSS JOIN LATERAL (
		SELECT e.ctid AS at, e.state AS was, e.lease_token AS holder, e.absent_at AS gone_at
		FROM index_entries e WHERE e.index_id = $1 AND e.chunk_id = a.id FOR UPDATE) f)`
}

// lockEntries locks the entries of chunks in all indexes, so that a following statement sees and
// changes each of them, also one that a claim was just about to lease.
func lockEntries(b *pgx.Batch, ix liveIndexes, chunks [][16]byte) {
	for _, index := range ix.all {
		b.Queue(byKey("$2::uuid[]", "id")+" SELECT count(*) FROM p", index, chunks)
	}
}

// switchVersions moves serving_version to the target of those locked documents whose target
// the serving index holds entirely, and lets die what the move passed. Only ever to the
// current target of a document that is not deleted.
func switchVersions(ctx context.Context, tx pgx.Tx, live liveIndexes, standing []corpus.DocumentProgress) ([]corpus.DocumentProgress, error) {
	var waiting [][16]byte
	place := map[corpus.ID]int{}
	for i, p := range standing {
		if !p.Deleted && p.Serving != p.Target {
			waiting = append(waiting, p.Document)
			place[p.Document] = i
		}
	}
	if len(waiting) == 0 {
		return standing, nil
	}
	// The clock is read after the statement's snapshot showed every point to be in the index:
	// whoever asks the index later than that sees all of them.
	// By their keys, as in byKey: the rows are locked, so that their places hold.
	rows, err := tx.Query(ctx, `
		WITH whole AS MATERIALIZED (
			SELECT d.at FROM unnest($1::uuid[]) AS w (id)
			CROSS JOIN LATERAL (SELECT ctid AS at, target_version FROM documents WHERE id = w.id LIMIT 1) d
			CROSS JOIN LATERAL (SELECT chunk_ids FROM document_versions WHERE document_id = w.id AND version = d.target_version LIMIT 1) v
			WHERE NOT EXISTS (
				SELECT 1 FROM unnest(v.chunk_ids) AS k (id)
				LEFT JOIN LATERAL (SELECT e.state FROM index_entries e WHERE e.index_id = $2 AND e.chunk_id = k.id LIMIT 1) e ON true
				WHERE e.state IS DISTINCT FROM 'indexed'))
		UPDATE documents d SET serving_version = d.target_version, switched_at = clock_timestamp()
		FROM whole WHERE d.ctid = whole.at RETURNING d.id`, waiting, live.serving)
	moved, err := scanIDs(rows, err)
	if err != nil {
		return nil, err
	}
	var passed [][16]byte // documents of which an earlier version may have left something
	for _, id := range moved {
		p := &standing[place[id]]
		if p.Target > 1 {
			passed = append(passed, id)
		}
		p.Serving = p.Target
	}
	if len(passed) == 0 {
		return standing, nil
	}
	rows, err = tx.Query(ctx, `SELECT c.id FROM documents d JOIN chunks c ON c.document_id = d.id
		WHERE d.id = ANY ($1::uuid[]) AND c.died_version <= d.serving_version AND c.text IS NOT NULL`, passed)
	dead, err := scanIDs(rows, err)
	if err != nil {
		return nil, err
	}
	if err := killChunks(ctx, tx, live, uuids(dead)); err != nil {
		return nil, err
	}
	if _, err := tx.Exec(ctx, `DELETE FROM document_versions v USING documents d
		WHERE d.id = ANY ($1::uuid[]) AND v.document_id = d.id AND v.version <> d.target_version`, passed); err != nil {
		return nil, err
	}
	return standing, wantMetadata(ctx, tx, live, passed)
}

// Progress returns where documents stand, in the order asked for.
func (s *Store) Progress(ctx context.Context, collection corpus.ID, docs []corpus.ID) ([]corpus.DocumentProgress, error) {
	rows, err := s.pool.Query(ctx, `
		SELECT p.ord, d.deleted_at IS NOT NULL, d.target_version, coalesce(d.serving_version, 0),
			coalesce((SELECT min(e.meta_version) FROM document_versions v, unnest(v.chunk_ids) AS k (id)
				CROSS JOIN LATERAL (SELECT e.meta_version FROM index_entries e WHERE e.index_id = i.id AND e.chunk_id = k.id LIMIT 1) e
				WHERE v.document_id = d.id AND v.version = d.serving_version), 0),
			CASE WHEN d.deleted_at IS NULL THEN 0 ELSE (SELECT count(*) FROM chunks c
				CROSS JOIN LATERAL (SELECT e.state, e.absent_at FROM index_entries e WHERE e.index_id = i.id AND e.chunk_id = c.id LIMIT 1) e
				WHERE c.document_id = d.id AND e.state = 'dead' AND e.absent_at IS NULL) END,
			coalesce((SELECT coalesce(e.last_error, 'failed') FROM index_entries e WHERE e.document_id = d.id
				AND e.index_id IS NOT DISTINCT FROM i.id AND e.state = 'failed' LIMIT 1), '')
		FROM unnest($2::uuid[]) WITH ORDINALITY AS p (id, ord)
		JOIN documents d ON d.id = p.id
		JOIN collections c ON c.id = d.collection_id AND c.deleted_at IS NULL
		JOIN indexes i ON i.collection_id = c.id AND i.state = 'serving'
		WHERE c.id = $1`, collection, uuids(docs))
	if err != nil {
		return nil, wrap("reading progress", err)
	}
	out := make([]corpus.DocumentProgress, len(docs))
	for i, id := range docs {
		out[i].Document = id
	}
	var ord int64
	var p corpus.DocumentProgress
	_, err = pgx.ForEachRow(rows, []any{&ord, &p.Deleted, &p.Target, &p.Serving, &p.MetaSettled, &p.Dying, &p.Failure}, func() error {
		p.Document, p.Known = docs[ord-1], true
		out[ord-1] = p
		return nil
	})
	return out, wrap("reading progress", err)
}

// RaiseMetadata gives documents whose points hold a higher meta_version than their own a new
// one above it, so that a guarded write applies again. seen maps each to the highest that was
// read. A number beyond what the sequence may ever reach is refused as Invalid.
func (s *Store) RaiseMetadata(ctx context.Context, collection corpus.ID, seen map[corpus.ID]int64) error {
	highest := int64(0)
	docs := make([]corpus.ID, 0, len(seen))
	for id, v := range seen {
		docs, highest = append(docs, id), max(highest, v)
	}
	if highest >= maxRaise {
		return corpus.Errorf(corpus.Invalid, "meta_version_out_of_range", "a point holds meta_version %d, which no installation can have written", highest)
	}
	return s.inGenTx(ctx, "raising metadata versions", func(tx pgx.Tx) error {
		live, _, err := shareCollection(ctx, tx, collection)
		if err != nil {
			return err
		}
		standing, err := lockStanding(ctx, tx, docs)
		if err != nil {
			return err
		}
		var known, raised [][16]byte
		for _, p := range standing {
			known = append(known, p.Document)
		}
		// A change accepted since the point was read may have raised it already.
		rows, err := tx.Query(ctx, "SELECT document_id, min(meta_version) FROM document_versions WHERE document_id = ANY ($1::uuid[]) GROUP BY 1", known)
		if err != nil {
			return err
		}
		var doc [16]byte
		var lowest int64
		if _, err := pgx.ForEachRow(rows, []any{&doc, &lowest}, func() error {
			if seen[doc] > lowest {
				raised = append(raised, doc)
			}
			return nil
		}); err != nil || len(raised) == 0 {
			return err
		}
		if err := raiseSequence(ctx, tx, highest); err != nil {
			return err
		}
		// Rows that shared a version hold the same metadata and go on sharing one.
		if _, err := tx.Exec(ctx, `
			WITH old AS (SELECT DISTINCT document_id, meta_version FROM document_versions WHERE document_id = ANY ($1::uuid[])),
			fresh AS (SELECT document_id, meta_version, nextval('gen') AS meta FROM (SELECT * FROM old ORDER BY document_id, meta_version) o)
			UPDATE document_versions v SET meta_version = f.meta FROM fresh f
			WHERE v.document_id = f.document_id AND v.meta_version = f.meta_version`, raised); err != nil {
			return err
		}
		return wantMetadata(ctx, tx, live, raised)
	})
}

// maxRaise leaves half of the sequence's range (2^53) to numbers that come after a jump.
const maxRaise = 1 << 52

// ClaimDead leases dead entries of an index whose points are not known to be absent, unless
// deletes are stopped in the collection.
func (s *Store) ClaimDead(ctx context.Context, index corpus.ID, lease corpus.Lease) ([]corpus.ID, error) {
	rows, err := s.pool.Query(ctx, `
		WITH due AS MATERIALIZED (
			SELECT ctid AS at FROM index_entries WHERE index_id = $1 AND state = 'dead' AND absent_at IS NULL AND not_before <= now()
				AND NOT EXISTS (SELECT 1 FROM indexes i JOIN collections c ON c.id = i.collection_id WHERE i.id = $1 AND c.stopped_at IS NOT NULL)
			ORDER BY not_before LIMIT $2 FOR UPDATE SKIP LOCKED)
		UPDATE index_entries e SET lease_token = $3, attempts = e.attempts + 1, claims = e.claims + 1,
			lease_until = now() + $4::interval, not_before = now() + $4::interval
		FROM due WHERE e.ctid = due.at RETURNING e.chunk_id`, index, lease.Max, lease.Token, micros(lease.For))
	ids, err := scanIDs(rows, err)
	return ids, wrap("claiming dead points", err)
}

// Confirm records for claimed dead entries which points were read absent; the others are
// tried again after the delay. It returns the documents of all of them.
func (s *Store) Confirm(ctx context.Context, index, token corpus.ID, absent, again []corpus.ID, delay time.Duration, why string) ([]corpus.ID, error) {
	ids := append(uuids(absent), uuids(again)...)
	gone := make([]bool, len(ids))
	for i := range absent {
		gone[i] = true
	}
	rows, err := s.pool.Query(ctx, byKey("$3::uuid[], $4::boolean[]", "id, gone")+`
		UPDATE index_entries e SET lease_token = NULL, lease_until = NULL, changed_at = now(),
			absent_at = CASE WHEN p.gone THEN now() END,
			attempts = CASE WHEN p.gone THEN 0 ELSE e.attempts END,
			not_before = CASE WHEN p.gone THEN now() ELSE now() + $5::interval END,
			last_error = CASE WHEN p.gone THEN NULL ELSE $6 END
		FROM p WHERE e.ctid = p.at AND p.holder = $2 AND p.was = 'dead'
		RETURNING coalesce(e.document_id, '00000000-0000-0000-0000-000000000000'::uuid)`,
		index, token, ids, gone, micros(delay), why)
	docs, err := scanIDs(rows, err)
	return docs, wrap("recording absence", err)
}

// ClaimTombs leases entries whose points were read absent longer than grace ago. Tombstones of
// points whose document was never known are not among them: without the document there is no
// floor to raise, so they are kept for ever.
func (s *Store) ClaimTombs(ctx context.Context, index corpus.ID, grace time.Duration, lease corpus.Lease) ([]corpus.ID, error) {
	rows, err := s.pool.Query(ctx, `
		WITH due AS MATERIALIZED (
			SELECT e.ctid AS at FROM index_entries e JOIN chunks c ON c.id = e.chunk_id
			WHERE e.index_id = $1 AND e.state = 'dead' AND e.absent_at < now() - $5::interval AND e.not_before <= now()
				AND c.document_id IS NOT NULL AND c.content_hash IS NOT NULL
			ORDER BY e.absent_at LIMIT $2 FOR UPDATE OF e SKIP LOCKED)
		UPDATE index_entries e SET lease_token = $3, lease_until = now() + $4::interval, not_before = now() + $4::interval
		FROM due WHERE e.ctid = due.at RETURNING e.chunk_id`,
		index, lease.Max, lease.Token, micros(lease.For), micros(grace))
	ids, err := scanIDs(rows, err)
	return ids, wrap("claiming tombstones", err)
}

// Purge removes claimed tombstones whose points were read absent once more. Each raises its
// document's incarnation floor, so that no id is ever used again; a deleted document whose
// last tombstone goes leaves only its floor, under the hash of its external id.
func (s *Store) Purge(ctx context.Context, ix corpus.Index, token corpus.ID, ids []corpus.ID) (purged int, err error) {
	if len(ids) == 0 {
		return 0, nil
	}
	err = s.inTx(ctx, "purging tombstones", func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, "SELECT DISTINCT document_id FROM chunks WHERE id = ANY ($1::uuid[]) AND document_id IS NOT NULL", uuids(ids))
		docs, err := scanIDs(rows, err)
		if err != nil {
			return err
		}
		if err := lockDocuments(ctx, tx, docs); err != nil {
			return err
		}
		rows, err = tx.Query(ctx, byKey("$3::uuid[]", "id")+`
			DELETE FROM index_entries e USING p WHERE e.ctid = p.at AND p.holder = $2
			AND p.was = 'dead' AND p.gone_at IS NOT NULL RETURNING e.chunk_id`, ix.ID, token, uuids(ids))
		gone, err := scanIDs(rows, err)
		if err != nil {
			return err
		}
		purged = len(gone)
		return purgeChunks(ctx, tx, ix.Collection, gone)
	})
	return purged, err
}

// purgeChunks removes those dead chunks that have no entry left in any index. Their documents'
// rows are locked.
func purgeChunks(ctx context.Context, tx pgx.Tx, collection corpus.ID, ids []corpus.ID) error {
	rows, err := tx.Query(ctx, `
		WITH gone AS (
			DELETE FROM chunks c WHERE c.id = ANY ($1::uuid[]) AND c.collection_id = $2 AND c.died_version IS NOT NULL AND c.text IS NULL
				AND c.document_id IS NOT NULL AND c.content_hash IS NOT NULL
				AND NOT EXISTS (SELECT 1 FROM index_entries e JOIN indexes i ON i.id = e.index_id
					WHERE i.collection_id = $2 AND e.index_id = i.id AND e.chunk_id = c.id)
			RETURNING c.document_id, c.incarnation)
		UPDATE documents d SET incarnation_floor = greatest(d.incarnation_floor, g.floor)
		FROM (SELECT document_id, max(incarnation) + 1 AS floor FROM gone GROUP BY document_id) g
		WHERE d.id = g.document_id RETURNING d.id`, uuids(ids), collection)
	docs, err := scanIDs(rows, err)
	if err != nil || len(docs) == 0 {
		return err
	}
	_, err = tx.Exec(ctx, `
		WITH gone AS (
			DELETE FROM documents d WHERE d.id = ANY ($1::uuid[]) AND d.deleted_at IS NOT NULL
				AND NOT EXISTS (SELECT 1 FROM chunks c WHERE c.document_id = d.id)
			RETURNING d.collection_id, d.external_id, d.incarnation_floor)
		INSERT INTO incarnation_floors (collection_id, external_hash, floor)
		SELECT collection_id, sha256(convert_to(external_id, 'UTF8')), incarnation_floor FROM gone
		ON CONFLICT (collection_id, external_hash) DO UPDATE SET floor = greatest(incarnation_floors.floor, excluded.floor)`, uuids(docs))
	return err
}
