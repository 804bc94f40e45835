package postgres

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// RollbackFacts returns what this Postgres knows about its own history, for one collection.
// To judge points, read them first and the facts afterwards.
func (s *Store) RollbackFacts(ctx context.Context, collection corpus.ID) (corpus.RollbackFacts, error) {
	f, err := rollbackFacts(ctx, s.pool, collection)
	if errors.Is(err, pgx.ErrNoRows) {
		err = corpus.Errorf(corpus.NotFound, codeCollectionNotFound, "the collection does not exist any more")
	}
	return f, wrap("reading the history of the gen sequence", err)
}

type rowQuerier interface {
	querier
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

func rollbackFacts(ctx context.Context, q rowQuerier, collection corpus.ID) (corpus.RollbackFacts, error) {
	var f corpus.RollbackFacts
	err := q.QueryRow(ctx, `
		SELECT adopted_gen, CASE WHEN stopped_at IS NULL THEN '' ELSE coalesce(nullif(stop_reason, ''), 'the collection was stopped') END
		FROM collections WHERE id = $1`, collection).Scan(&f.Adopted, &f.Stopped)
	if err != nil {
		return f, err
	}
	rows, err := q.Query(ctx, `SELECT lo, hi FROM gen_gaps WHERE hi > $1 ORDER BY lo`, f.Adopted)
	if err != nil {
		return f, err
	}
	var lo, hi int64
	if _, err = pgx.ForEachRow(rows, []any{&lo, &hi}, func() error {
		f.Gaps = append(f.Gaps, [2]int64{max(lo, f.Adopted+1), hi})
		return nil
	}); err != nil {
		return f, err
	}
	// Last of all: a gen taken before this read is then never above it.
	err = q.QueryRow(ctx, `SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM gen`).Scan(&f.LastGen)
	return f, err
}

// Decide carries out decisions in one transaction under the row locks of their documents. Each
// counts only if the ledger still says what its Row says, to the version of the entry's row;
// those that do are recorded in the run's findings (or dismissed) and acted upon, and their
// suspects removed. Where the ledger moved, the suspect stays, due at retryAt, with one more
// look, or is dropped after maxLooks. moved counts those.
func (s *Store) Decide(ctx context.Context, run corpus.ID, ix corpus.Index, decisions []corpus.Decision, overdue time.Duration, retryAt time.Time, maxLooks int) (moved int, err error) {
	if len(decisions) == 0 {
		return 0, nil
	}
	err = s.inTx(ctx, "deciding findings", func(tx pgx.Tx) error {
		moved = 0
		var docs, ids []corpus.ID
		for _, d := range decisions {
			ids = append(ids, d.Finding.ID)
			if d.Row != nil && !d.Row.Document.IsZero() && !d.Dismiss {
				docs = append(docs, d.Row.Document)
			}
		}
		if err := lockDocuments(ctx, tx, docs); err != nil {
			return err
		}
		now, err := s.readRows(ctx, tx, ix, ids, overdue)
		if err != nil {
			return err
		}
		current := make(map[corpus.ID]*corpus.LedgerRow, len(now))
		for i := range now {
			current[now[i].ID] = &now[i]
		}
		var b decided
		for i := range decisions {
			d := &decisions[i]
			if !same(d.Row, current[d.Finding.ID]) {
				moved++
				b.again(d)
				continue
			}
			b.settle(d)
		}
		return b.write(ctx, tx, run, ix, retryAt, maxLooks)
	})
	return moved, err
}

// lockDocuments takes the documents' row locks in id order, as every other writer does.
func lockDocuments(ctx context.Context, tx pgx.Tx, docs []corpus.ID) error {
	if len(docs) == 0 {
		return nil
	}
	slices.SortFunc(docs, corpus.ID.Compare)
	_, err := tx.Exec(ctx, `SELECT 1 FROM documents WHERE id = ANY ($1::uuid[]) ORDER BY id FOR UPDATE`, slices.Compact(docs))
	return err
}

func same(before, now *corpus.LedgerRow) bool {
	if before == nil || now == nil {
		return before == now
	}
	return before.Version == now.Version && before.State == now.State && before.Died == now.Died && before.Gen == now.Gen
}

// decided collects the columns of the statements that carry decisions out.
type decided struct {
	dropIDs, againIDs     []corpus.ID
	dropKinds, againKinds []string

	ids                      []corpus.ID
	kinds, docs, details, st []string
	seen, confirmed          []time.Time

	rewrite, rearm, enter []corpus.ID
	meta                  []corpus.ID
	metaVersions          []int64
}

func (b *decided) again(d *corpus.Decision) {
	b.againIDs = append(b.againIDs, d.Finding.ID)
	b.againKinds = append(b.againKinds, string(d.Suspect))
}

func (b *decided) settle(d *corpus.Decision) {
	if d.Suspect != "" {
		b.dropIDs = append(b.dropIDs, d.Finding.ID)
		b.dropKinds = append(b.dropKinds, string(d.Suspect))
	}
	if d.Dismiss {
		return
	}
	state := "open"
	switch d.Action {
	case corpus.RepairRewrite:
		state = "repairing"
		if d.Row.State == corpus.EntryNone {
			b.enter = append(b.enter, d.Finding.ID)
		} else {
			b.rewrite = append(b.rewrite, d.Finding.ID)
		}
	case corpus.RepairMetadata:
		state = "repairing"
		b.meta = append(b.meta, d.Finding.ID)
		b.metaVersions = append(b.metaVersions, d.PointMeta)
	case corpus.RepairRearm:
		state = "repairing"
		b.rearm = append(b.rearm, d.Finding.ID)
	}
	b.ids = append(b.ids, d.Finding.ID)
	b.kinds = append(b.kinds, string(d.Finding.Kind))
	b.docs = append(b.docs, d.Finding.Document)
	b.details = append(b.details, d.Finding.Detail)
	b.st = append(b.st, state)
	b.seen = append(b.seen, d.Finding.SeenAt)
	b.confirmed = append(b.confirmed, d.Finding.ConfirmedAt)
}

func (b *decided) write(ctx context.Context, tx pgx.Tx, run corpus.ID, ix corpus.Index, retryAt time.Time, maxLooks int) error {
	var batch pgx.Batch
	if len(b.rewrite) > 0 {
		// meta_version 0: what the point holds is in doubt until it is read back.
		batch.Queue(`UPDATE index_entries SET state = 'pending', need = 'rewrite', meta_version = 0, attempts = 0, not_before = now(),
				lease_token = NULL, lease_until = NULL, last_error = NULL, changed_at = now()
			WHERE index_id = $1 AND chunk_id = ANY ($2::uuid[]) AND state IN ('indexed', 'failed')`, ix.ID, b.rewrite)
	}
	if len(b.enter) > 0 {
		batch.Queue(`INSERT INTO index_entries (index_id, chunk_id, document_id, state, need, want_meta)
			SELECT $1, c.id, c.document_id, 'pending', 'rewrite', v.meta_version
			FROM chunks c CROSS JOIN LATERAL (
				SELECT meta_version FROM document_versions
				WHERE document_id = c.document_id AND c.id = ANY (chunk_ids) ORDER BY version DESC LIMIT 1) v
			WHERE c.id = ANY ($2::uuid[])
			ON CONFLICT (index_id, chunk_id) DO NOTHING`, ix.ID, b.enter)
	}
	if len(b.meta) > 0 {
		batch.Queue(`UPDATE index_entries e SET meta_version = p.meta, attempts = 0, not_before = now(),
				lease_token = NULL, lease_until = NULL, last_error = NULL, changed_at = now()
			FROM unnest($2::uuid[], $3::bigint[]) AS p (id, meta)
			WHERE e.index_id = $1 AND e.chunk_id = p.id AND e.state = 'indexed'`, ix.ID, b.meta, b.metaVersions)
	}
	if len(b.rearm) > 0 {
		// A failed entry may have reached the index: only a read-back tells.
		batch.Queue(`UPDATE index_entries SET
				need = CASE WHEN state IN ('pending', 'failed') THEN 'rewrite' ELSE need END,
				state = CASE WHEN state = 'failed' THEN 'pending' ELSE state END,
				attempts = 0, not_before = now(), lease_token = NULL, lease_until = NULL, last_error = NULL, changed_at = now()
			WHERE index_id = $1 AND chunk_id = ANY ($2::uuid[])`, ix.ID, b.rearm)
	}
	if len(b.ids) > 0 {
		batch.Queue(`INSERT INTO reconcile_findings (run_id, index_id, collection_id, point_id, kind, document, detail, state, seen_at, confirmed_at)
			SELECT $1, $2, $3, * FROM unnest($4::uuid[], $5::text[], $6::text[], $7::text[], $8::text[], $9::timestamptz[], $10::timestamptz[])
			ON CONFLICT (run_id, index_id, point_id, kind) DO NOTHING`,
			run, ix.ID, ix.Collection, b.ids, b.kinds, b.docs, b.details, b.st, b.seen, b.confirmed)
	}
	if len(b.dropIDs) > 0 {
		batch.Queue(`DELETE FROM reconcile_suspects s USING unnest($3::uuid[], $4::text[]) AS p (id, kind)
			WHERE s.run_id = $1 AND s.index_id = $2 AND s.point_id = p.id AND s.kind = p.kind`, run, ix.ID, b.dropIDs, b.dropKinds)
	}
	if len(b.againIDs) > 0 {
		batch.Queue(`UPDATE reconcile_suspects s SET looks = looks + 1, seen_at = $5 FROM unnest($3::uuid[], $4::text[]) AS p (id, kind)
			WHERE s.run_id = $1 AND s.index_id = $2 AND s.point_id = p.id AND s.kind = p.kind`, run, ix.ID, b.againIDs, b.againKinds, retryAt)
		batch.Queue(`DELETE FROM reconcile_suspects s USING unnest($3::uuid[], $4::text[]) AS p (id, kind)
			WHERE s.run_id = $1 AND s.index_id = $2 AND s.point_id = p.id AND s.kind = p.kind AND s.looks >= $5`, run, ix.ID, b.againIDs, b.againKinds, maxLooks)
	}
	return tx.SendBatch(ctx, &batch).Close()
}

// codeBraked marks the refusal of [Store.EnterTombstones] to go on.
const codeBraked = "reconcile_braked"

// EnterTombstones declares ids dead in the index, so that their points may be deleted: ids the
// ledger does not know get a dead row of their own, ids it knows as dead are queued for
// deletion again. The primary key of chunks decides against an ingest of the same id. In the
// same transaction each gen is checked against the history of the sequence, and the number is
// counted against the day's budget; when either forbids it, nothing happens: the error is then
// a Conflict with code reconcile_braked or collection_stopped, or the fates name the evidence.
func (s *Store) EnterTombstones(ctx context.Context, ix corpus.Index, claims []corpus.OrphanClaim, budget corpus.DeleteBudget) (fates []corpus.OrphanFate, err error) {
	if len(claims) == 0 {
		return nil, nil
	}
	claims = slices.Clone(claims)
	err = s.inTx(ctx, "entering tombstones", func(tx pgx.Tx) error {
		var err error
		fates, err = enterTombstones(ctx, tx, ix, claims, budget)
		return err
	})
	return fates, err
}

func enterTombstones(ctx context.Context, tx pgx.Tx, ix corpus.Index, claims []corpus.OrphanClaim, budget corpus.DeleteBudget) ([]corpus.OrphanFate, error) {
	fates := make([]corpus.OrphanFate, len(claims))
	// Stopping, adopting and deleting a collection wait for this, and this for them.
	var gone bool
	if err := tx.QueryRow(ctx, `SELECT deleted_at IS NOT NULL FROM collections WHERE id = $1 FOR SHARE`, ix.Collection).Scan(&gone); err != nil {
		return nil, err
	}
	if gone {
		return nil, corpus.Errorf(corpus.Conflict, codeCollectionNotFound, "the collection was deleted meanwhile")
	}
	facts, err := rollbackFacts(ctx, tx, ix.Collection)
	if err != nil {
		return nil, err
	}
	if facts.Stopped != "" {
		return nil, corpus.Errorf(corpus.Conflict, "collection_stopped", "no delete runs in this collection: %s", facts.Stopped)
	}
	var docs []corpus.ID
	evidence := false
	for i, c := range claims {
		if !c.Foreign && facts.Evidence(c.Gen) {
			fates[i], evidence = corpus.OrphanRolledBack, true
		}
		if !c.Document.IsZero() {
			docs = append(docs, c.Document)
		}
	}
	if evidence {
		return fates, nil
	}
	if err := lockDocuments(ctx, tx, docs); err != nil {
		return nil, err
	}
	var empty bool
	if err := tx.QueryRow(ctx, `SELECT NOT EXISTS (SELECT 1 FROM chunks WHERE collection_id = $1 AND document_id IS NOT NULL)
		AND NOT EXISTS (SELECT 1 FROM incarnation_floors WHERE collection_id = $1)`, ix.Collection).Scan(&empty); err != nil {
		return nil, err
	}
	if empty && !budget.Force {
		return nil, corpus.Errorf(corpus.Conflict, codeBraked, "the ledger knows no chunk of this collection while its index holds points: this looks like the wrong or an emptied database")
	}

	ids := make([]corpus.ID, len(claims))
	gens := make([]int64, len(claims))
	for i, c := range claims {
		ids[i], gens[i] = c.ID, c.Gen
	}
	if _, err := tx.Exec(ctx, `
		INSERT INTO chunks (id, collection_id, document_id, text, content_hash, occurrence, incarnation, gen, born_version, died_version)
		SELECT p.id, $1, NULL, NULL, NULL, 0, 0, p.gen, 0, 0 FROM unnest($2::uuid[], $3::bigint[]) AS p (id, gen) ORDER BY p.id
		ON CONFLICT (id) DO NOTHING`, ix.Collection, ids, gens); err != nil {
		return nil, err
	}
	rows, err := tx.Query(ctx, `
		SELECT c.id, c.collection_id = $1, e.absent_at IS NULL AND e.state = 'dead',
		       c.died_version IS NOT NULL AND (d.id IS NULL OR d.deleted_at IS NOT NULL OR d.serving_version IS NULL OR d.serving_version >= c.died_version)
		       AND coalesce(e.state, 'dead') = 'dead'
		FROM chunks c
		LEFT JOIN documents d ON d.id = c.document_id
		LEFT JOIN index_entries e ON e.index_id = $2 AND e.chunk_id = c.id
		WHERE c.id = ANY ($3::uuid[])`, ix.Collection, ix.ID, ids)
	if err != nil {
		return nil, err
	}
	// A chunk of another collection has no business in this index. If it is dead there, it may
	// be deleted here; it gets no entry, which would later be purged together with that
	// collection's row. If it is live there, this Qdrant collection may be that one's under
	// another name, and a delete would hit what serves.
	type standing struct{ here, queued, dead bool }
	found := make(map[corpus.ID]standing, len(ids))
	var id corpus.ID
	var st standing
	var queued *bool
	if _, err := pgx.ForEachRow(rows, []any{&id, &st.here, &queued, &st.dead}, func() error {
		st.queued = queued != nil && *queued
		found[id] = st
		return nil
	}); err != nil {
		return nil, err
	}
	var dead []corpus.ID
	n := int64(0)
	for i, c := range claims {
		switch st := found[c.ID]; {
		case st.here && !st.dead:
			fates[i] = corpus.OrphanAlive
			continue
		case !st.dead:
			fates[i] = corpus.OrphanElsewhere
			continue
		case st.here:
			dead = append(dead, c.ID)
		}
		fates[i] = corpus.OrphanDead
		if !st.queued { // what is queued was counted, or was the clients' own delete
			n++
		}
	}
	if n == 0 {
		return fates, nil
	}
	if _, err := tx.Exec(ctx, `
		INSERT INTO index_entries (index_id, chunk_id, document_id, state, want_meta, not_before)
		SELECT $1, c.id, c.document_id, 'dead', 0, now() + make_interval(secs => $3) FROM chunks c WHERE c.id = ANY ($2::uuid[]) ORDER BY c.id
		ON CONFLICT (index_id, chunk_id) DO UPDATE SET absent_at = NULL, attempts = 0, lease_token = NULL, lease_until = NULL,
			last_error = NULL, not_before = excluded.not_before, changed_at = now()
		WHERE index_entries.state = 'dead'`, ix.ID, dead, budget.Horizon.Seconds()); err != nil {
		return nil, err
	}
	var entered int64
	if err := tx.QueryRow(ctx, `
		INSERT INTO reconcile_deletes (collection_id, day, entered) VALUES ($1, (now() AT TIME ZONE 'UTC')::date, $2)
		ON CONFLICT (collection_id, day) DO UPDATE SET entered = reconcile_deletes.entered + excluded.entered
		RETURNING entered`, ix.Collection, n).Scan(&entered); err != nil {
		return nil, err
	}
	if entered > budget.Limit && !budget.Force {
		return nil, corpus.Errorf(corpus.Conflict, codeBraked, "%d deletes of today would exceed the limit of %d", entered, budget.Limit)
	}
	return fates, nil
}

// DeletesToday returns how many points reconcile declared dead in the collection today (UTC).
func (s *Store) DeletesToday(ctx context.Context, collection corpus.ID) (int64, error) {
	var n int64
	err := s.pool.QueryRow(ctx, `SELECT coalesce((SELECT entered FROM reconcile_deletes
		WHERE collection_id = $1 AND day = (now() AT TIME ZONE 'UTC')::date), 0)`, collection).Scan(&n)
	return n, wrap("reading the brake", err)
}

// LedgerEmpty reports whether the ledger knows nothing of the collection, not even the dead.
func (s *Store) LedgerEmpty(ctx context.Context, collection corpus.ID) (bool, error) {
	var empty bool
	err := s.pool.QueryRow(ctx, `SELECT NOT EXISTS (SELECT 1 FROM chunks WHERE collection_id = $1 AND document_id IS NOT NULL)
		AND NOT EXISTS (SELECT 1 FROM incarnation_floors WHERE collection_id = $1)`, collection).Scan(&empty)
	return empty, wrap("reading whether the ledger is empty", err)
}

// MarkAbsent records that the points of dead entries were read absent, which starts the grace
// period after which their tombstones may be purged.
func (s *Store) MarkAbsent(ctx context.Context, ix corpus.Index, ids []corpus.ID) error {
	_, err := s.pool.Exec(ctx, `UPDATE index_entries SET absent_at = now(), lease_token = NULL, lease_until = NULL, changed_at = now()
		WHERE index_id = $1 AND chunk_id = ANY ($2::uuid[]) AND state = 'dead' AND absent_at IS NULL`, ix.ID, ids)
	return wrap("recording absence", err)
}
