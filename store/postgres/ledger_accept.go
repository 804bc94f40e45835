package postgres

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// maxIncarnationTries bounds the search for a free incarnation of one chunk. Each try follows
// a row that exists, so only a defect could reach it.
const maxIncarnationTries = 1000

// Unchanged compares documents with their target versions without taking a lock, so that a
// corpus that did not change is ingested again at the speed of one read. The answers, in the
// order of docs, are Unchanged; NewMetadata where the content is equal but something is to be
// done under the lock (other metadata, failed entries to try again); or NeedsChunks.
func (s *Store) Unchanged(ctx context.Context, collection corpus.ID, docs []corpus.PreparedDocument) ([]corpus.Accepted, error) {
	ids := make([]corpus.ID, len(docs))
	hashes := make([][]byte, len(docs))
	metadata := make([]string, len(docs))
	out := make([]corpus.Accepted, len(docs))
	for i := range docs {
		ids[i] = corpus.DocumentID(collection, docs[i].ExternalID)
		hashes[i] = docs[i].Content[:]
		metadata[i] = string(docs[i].Metadata.JSON())
		out[i].Document = ids[i]
	}
	// Each is looked up by its key, whatever the planner believes (LIMIT keeps it from joining as it
	// likes): on tables new since the last ANALYZE it would rather read them all.
	rows, err := s.pool.Query(ctx, `
		SELECT p.ord, d.target_version, coalesce(d.serving_version, 0), v.meta_version, v.chunk_ids,
			v.metadata = p.metadata::jsonb AND NOT EXISTS (SELECT 1 FROM index_entries e WHERE e.document_id = d.id AND e.state = 'failed')
		FROM unnest($2::uuid[], $3::bytea[], $4::text[]) WITH ORDINALITY AS p (id, hash, metadata, ord)
		CROSS JOIN LATERAL (SELECT * FROM documents d WHERE d.id = p.id AND d.deleted_at IS NULL LIMIT 1) d
		CROSS JOIN LATERAL (SELECT * FROM document_versions v
			WHERE v.document_id = d.id AND v.version = d.target_version AND v.content_hash = p.hash LIMIT 1) v
		WHERE EXISTS (SELECT 1 FROM collections WHERE id = $1 AND deleted_at IS NULL)`,
		collection, uuids(ids), hashes, metadata)
	if err != nil {
		return nil, wrap("comparing documents with the ledger", err)
	}
	var ord, target, serving, meta int64
	var points [][16]byte
	var same bool
	_, err = pgx.ForEachRow(rows, []any{&ord, &target, &serving, &meta, &points, &same}, func() error {
		a := &out[ord-1]
		if !same {
			a.Acceptance = corpus.NewMetadata
			return nil
		}
		a.Acceptance, a.Version, a.Serving, a.MetaVersion = corpus.Unchanged, target, serving, meta
		a.PointIDs = fromUUIDs(points)
		return nil
	})
	return out, wrap("comparing documents with the ledger", err)
}

func fromUUIDs(in [][16]byte) []corpus.ID {
	out := make([]corpus.ID, len(in))
	for i, id := range in {
		out[i] = id
	}
	return out
}

// Accept makes the documents' contents and metadata their collection's target, all in one
// transaction under the documents' row locks. The external ids must differ. Entries of new
// chunks are created for every index that is written to; up to lease.Max of those of the
// serving index are claimed at once and returned as work.
//
// A nil error means that everything is durable. On an Unavailable error it is not known whether
// it is; accepting the same again is harmless.
func (s *Store) Accept(ctx context.Context, collection corpus.ID, docs []corpus.PreparedDocument, lease corpus.Lease) ([]corpus.Accepted, []corpus.Entry, error) {
	var out []corpus.Accepted
	var work []corpus.Entry
	for range maxTries {
		err := s.inGenTx(ctx, "accepting documents", func(tx pgx.Tx) error {
			a := acceptance{ctx: ctx, tx: tx, collection: collection, lease: lease}
			err := a.run(docs)
			out, work = a.out, a.work
			return err
		})
		if !errors.Is(err, errPurged) {
			return out, work, err
		}
	}
	return nil, nil, corpus.Errorf(corpus.Unavailable, codeUnavailable, "the documents keep being purged; try again")
}

// errPurged means that a document's row vanished between two statements of a transaction: its
// last tombstone was purged. The transaction starts again and finds the floor that was left.
var errPurged = errors.New("postgres: a document was purged meanwhile")

// liveIndexes are a collection's indexes that are written to.
type liveIndexes struct {
	all     []corpus.ID
	serving corpus.ID
}

// shareCollection share-locks the collection's row, so that its indexes stay what they are
// until the transaction ends, and returns them with the collection's incarnation floor.
func shareCollection(ctx context.Context, tx pgx.Tx, collection corpus.ID) (ix liveIndexes, floorBase int32, err error) {
	var deleted bool
	err = tx.QueryRow(ctx, "SELECT deleted_at IS NOT NULL, floor_base FROM collections WHERE id = $1 FOR SHARE", collection).Scan(&deleted, &floorBase)
	if errors.Is(err, pgx.ErrNoRows) || err == nil && deleted {
		return ix, 0, corpus.Errorf(corpus.NotFound, codeCollectionNotFound, "the collection was deleted")
	}
	if err != nil {
		return ix, 0, err
	}
	rows, err := tx.Query(ctx, "SELECT id, state FROM indexes WHERE collection_id = $1 AND state IN ('serving', 'building')", collection)
	if err != nil {
		return ix, 0, err
	}
	var id [16]byte
	var state string
	_, err = pgx.ForEachRow(rows, []any{&id, &state}, func() error {
		ix.all = append(ix.all, id)
		if state == string(corpus.IndexServing) {
			ix.serving = id
		}
		return nil
	})
	return ix, floorBase, err
}

// acceptance is one run of the accepting transaction.
type acceptance struct {
	ctx        context.Context
	tx         pgx.Tx
	collection corpus.ID
	lease      corpus.Lease
	ix         liveIndexes

	docs []acceptDoc
	out  []corpus.Accepted
	work []corpus.Entry
}

// acceptDoc is a document on its way through the transaction.
type acceptDoc struct {
	in *corpus.PreparedDocument
	// place in the caller's list.
	place int
	id    corpus.ID
	fresh bool // its row was inserted by this transaction
	found bool // its row is there and locked
	floor int32

	target, serving int64 // before; serving 0 for none
	deleted         bool
	oldContent      []byte
	oldMeta         int64
	sameMetadata    bool
	points          []corpus.ID // of the target version

	outcome corpus.Acceptance
	gen     int64
	version int64
	meta    int64
	added   []addedChunk
}

// addedChunk is a chunk of the new version that no live row stands for yet.
type addedChunk struct {
	ordinal     int
	incarnation int32
	id          corpus.ID
}

// servingParam is nil when nothing serves.
func (d *acceptDoc) visible(born int64) bool { return d.serving > 0 && born <= d.serving }

func (a *acceptance) run(docs []corpus.PreparedDocument) error {
	a.docs = make([]acceptDoc, len(docs))
	a.out = make([]corpus.Accepted, len(docs))
	for i := range docs {
		a.docs[i] = acceptDoc{in: &docs[i], place: i, id: corpus.DocumentID(a.collection, docs[i].ExternalID)}
	}
	// Every statement below takes its locks in the order of these ids.
	slices.SortFunc(a.docs, func(x, y acceptDoc) int { return x.id.Compare(y.id) })
	for i := 1; i < len(a.docs); i++ {
		if a.docs[i].id == a.docs[i-1].id {
			return corpus.Errorf(corpus.Internal, "duplicate_id", "one transaction was given a document twice")
		}
	}
	var floorBase int32
	var err error
	if a.ix, floorBase, err = shareCollection(a.ctx, a.tx, a.collection); err != nil {
		return err
	}
	for _, step := range []func() error{a.insertNew, a.lockAndRead, a.classify} {
		if err := step(); err != nil {
			return err
		}
	}
	for i := range a.docs {
		a.docs[i].floor = max(a.docs[i].floor, floorBase)
	}
	for _, step := range []func() error{a.diff, a.insertChunks, a.insertEntries, a.writeVersions, a.settleMetadata, a.rearm} {
		if err := step(); err != nil {
			return err
		}
	}
	for i := range a.docs {
		d := &a.docs[i]
		o := &a.out[d.place]
		*o = corpus.Accepted{
			Document: d.id, Acceptance: d.outcome, Version: d.version, MetaVersion: d.meta,
			Serving: d.serving, PointIDs: d.points,
		}
		for _, c := range d.added {
			if d.in.Chunks[c.ordinal].Vectors == nil {
				o.NewChunks++
			}
		}
	}
	return nil
}

// insertNew makes rows for documents that have none. Whoever inserted one first is waited for.
func (a *acceptance) insertNew() error {
	var ids [][16]byte
	var names []string
	place := map[corpus.ID]int{}
	for i := range a.docs {
		if d := &a.docs[i]; d.in.Chunks != nil {
			ids, names = append(ids, d.id), append(names, d.in.ExternalID)
			place[d.id] = i
		}
	}
	if len(ids) == 0 {
		return nil
	}
	rows, err := a.tx.Query(a.ctx, `
		INSERT INTO documents (id, collection_id, external_id, target_version)
		SELECT p.id, $1, p.name, 1 FROM unnest($2::uuid[], $3::text[]) WITH ORDINALITY AS p (id, name, ord) ORDER BY p.ord
		ON CONFLICT DO NOTHING RETURNING id`, a.collection, ids, names) // on either unique index, whichever a race meets first
	fresh, err := scanIDs(rows, err)
	if err != nil || len(fresh) == 0 {
		return err
	}
	hashes := make([][]byte, len(fresh))
	byHash := make(map[string]*acceptDoc, len(fresh))
	for i, id := range fresh {
		d := &a.docs[place[id]]
		d.fresh = true
		h := sha256.Sum256([]byte(d.in.ExternalID))
		hashes[i] = h[:]
		byHash[string(h[:])] = d
	}
	// In a statement of its own: a purge that the insertion waited for has left its floor by now.
	rows, err = a.tx.Query(a.ctx, "SELECT external_hash, floor FROM incarnation_floors WHERE collection_id = $1 AND external_hash = ANY ($2::bytea[])", a.collection, hashes)
	if err != nil {
		return err
	}
	var raised [][16]byte
	var floors []int32
	var hash []byte
	var floor int32
	if _, err := pgx.ForEachRow(rows, []any{&hash, &floor}, func() error {
		d := byHash[string(hash)]
		d.floor = floor
		raised, floors = append(raised, d.id), append(floors, floor)
		return nil
	}); err != nil || len(raised) == 0 {
		return err
	}
	_, err = a.tx.Exec(a.ctx, `UPDATE documents d SET incarnation_floor = p.floor
		FROM unnest($1::uuid[], $2::integer[]) AS p (id, floor) WHERE d.id = p.id`, raised, floors)
	return err
}

// lockAndRead locks the rows that were there before, and only then reads what they say.
func (a *acceptance) lockAndRead() error {
	var ids []corpus.ID
	var metadata []string
	place := map[corpus.ID]int{}
	for i := range a.docs {
		if d := &a.docs[i]; !d.fresh {
			ids, metadata = append(ids, d.id), append(metadata, string(d.in.Metadata.JSON()))
			place[d.id] = i
		}
	}
	if len(ids) == 0 {
		return nil
	}
	if err := lockDocuments(a.ctx, a.tx, ids); err != nil { // ids are sorted already
		return err
	}
	rows, err := a.tx.Query(a.ctx, `
		SELECT d.id, d.target_version, coalesce(d.serving_version, 0), d.deleted_at IS NOT NULL, d.incarnation_floor,
			v.content_hash, coalesce(v.meta_version, 0), coalesce(v.metadata = p.metadata::jsonb, false), v.chunk_ids
		FROM unnest($1::uuid[], $2::text[]) AS p (id, metadata)
		CROSS JOIN LATERAL (SELECT * FROM documents d WHERE d.id = p.id LIMIT 1) d
		LEFT JOIN LATERAL (SELECT * FROM document_versions v
			WHERE v.document_id = d.id AND v.version = d.target_version LIMIT 1) v ON true`, uuids(ids), metadata)
	if err != nil {
		return err
	}
	var id [16]byte
	var r acceptDoc
	var points [][16]byte
	if _, err := pgx.ForEachRow(rows, []any{&id, &r.target, &r.serving, &r.deleted, &r.floor, &r.oldContent, &r.oldMeta, &r.sameMetadata, &points}, func() error {
		d := &a.docs[place[id]]
		d.found = true
		d.target, d.serving, d.deleted, d.floor = r.target, r.serving, r.deleted, r.floor
		d.oldContent, d.oldMeta, d.sameMetadata = slices.Clone(r.oldContent), r.oldMeta, r.sameMetadata
		d.points = fromUUIDs(points)
		return nil
	}); err != nil {
		return err
	}
	for i := range a.docs {
		if d := &a.docs[i]; !d.fresh && !d.found && d.in.Chunks != nil {
			return errPurged
		}
	}
	return nil
}

// classify decides what each document is, and takes the numbers that the changed ones need.
// They are taken under the row locks, so that a document's later change has the higher one.
func (a *acceptance) classify() error {
	need := 0
	for i := range a.docs {
		d := &a.docs[i]
		d.version, d.meta = d.target, d.oldMeta
		switch {
		case !d.fresh && !d.found:
			d.outcome = corpus.NeedsChunks
		case !d.fresh && !d.deleted && string(d.oldContent) == string(d.in.Content[:]):
			if d.outcome = corpus.Unchanged; !d.sameMetadata {
				d.outcome = corpus.NewMetadata
				need++
			}
		case d.in.Chunks == nil:
			d.outcome = corpus.NeedsChunks
		default:
			d.outcome = corpus.NewVersion
			d.version = d.target + 1
			need++
		}
	}
	gens, err := takeGens(a.ctx, a.tx, need)
	if err != nil {
		return err
	}
	for i := range a.docs {
		d := &a.docs[i]
		if d.outcome != corpus.NewVersion && d.outcome != corpus.NewMetadata {
			continue
		}
		d.gen, gens = gens[0], gens[1:]
		// Equal metadata keeps its version, so that kept chunks' points need no write.
		if d.outcome == corpus.NewMetadata || d.fresh || d.deleted || !d.sameMetadata {
			d.meta = d.gen
		}
	}
	return nil
}

// contentKey is what two chunks of one document have in common when one may stand for the other.
type contentKey struct {
	content    corpus.ContentHash
	occurrence uint32
}

// diff finds for each new version which chunks stay, which are new and which are dropped, and
// declares the dropped ones: died_version is set, and those that no version can ever serve die.
func (a *acceptance) diff() error {
	type row struct {
		id          corpus.ID
		incarnation int32
		born        int64
	}
	var ids [][16]byte
	place := map[corpus.ID]int{}
	for i := range a.docs {
		if d := &a.docs[i]; d.outcome == corpus.NewVersion && !d.fresh {
			ids = append(ids, d.id)
			place[d.id] = i
		}
	}
	live := make([]map[contentKey]row, len(a.docs))
	next := make([]map[contentKey]int32, len(a.docs)) // the incarnation after the highest known
	if len(ids) > 0 {
		rows, err := a.tx.Query(a.ctx, `SELECT document_id, id, content_hash, occurrence, incarnation, born_version, died_version IS NULL
			FROM chunks WHERE document_id = ANY ($1::uuid[])`, ids)
		if err != nil {
			return err
		}
		var doc, id [16]byte
		var content []byte
		var r row
		var occurrence int32
		var alive bool
		if _, err := pgx.ForEachRow(rows, []any{&doc, &id, &content, &occurrence, &r.incarnation, &r.born, &alive}, func() error {
			if len(content) != sha256.Size {
				return fmt.Errorf("chunk %s has a content hash of %d bytes", corpus.ID(id), len(content))
			}
			i := place[doc]
			if live[i] == nil {
				live[i], next[i] = map[contentKey]row{}, map[contentKey]int32{}
			}
			key := contentKey{corpus.ContentHash(content), uint32(occurrence)}
			if r.id = id; alive {
				live[i][key] = r
			}
			next[i][key] = max(next[i][key], r.incarnation+1)
			return nil
		}); err != nil {
			return err
		}
	}
	var dropped, dead [][16]byte
	var diedAt []int64
	for i := range a.docs {
		d := &a.docs[i]
		if d.outcome != corpus.NewVersion {
			continue
		}
		d.points = make([]corpus.ID, len(d.in.Chunks))
		for j := range d.in.Chunks {
			c := &d.in.Chunks[j]
			key := contentKey{c.Content, c.Occurrence}
			if r, ok := live[i][key]; ok {
				d.points[j] = r.id
				delete(live[i], key)
				continue
			}
			d.added = append(d.added, addedChunk{ordinal: j, incarnation: max(d.floor, next[i][key])})
		}
		for _, r := range live[i] {
			dropped, diedAt = append(dropped, r.id), append(diedAt, d.version)
			if !d.visible(r.born) {
				dead = append(dead, r.id)
			}
		}
	}
	if len(dropped) == 0 {
		return nil
	}
	if _, err := a.tx.Exec(a.ctx, `UPDATE chunks c SET died_version = p.version
		FROM unnest($1::uuid[], $2::bigint[]) AS p (id, version) WHERE c.id = p.id AND c.died_version IS NULL`, dropped, diedAt); err != nil {
		return err
	}
	return killChunks(a.ctx, a.tx, a.ix, dead)
}

// killChunks carries out the death of chunks that nothing serves or will serve: texts and
// vectors go at once, entries wait for their points to be deleted. died_version is set already.
func killChunks(ctx context.Context, tx pgx.Tx, ix liveIndexes, ids [][16]byte) error {
	if len(ids) == 0 {
		return nil
	}
	var b pgx.Batch
	b.Queue("UPDATE chunks SET text = NULL WHERE id = ANY ($1::uuid[]) AND died_version IS NOT NULL", ids)
	b.Queue("DELETE FROM chunk_vectors WHERE chunk_id = ANY ($1::uuid[])", ids)
	lockEntries(&b, ix, ids)
	for _, index := range ix.all {
		b.Queue(byKey("$2::uuid[]", "id")+`
			UPDATE index_entries e SET state = 'dead', lease_token = NULL, lease_until = NULL, attempts = 0, not_before = now(),
				last_error = NULL, absent_at = NULL, changed_at = now()
			FROM p WHERE e.ctid = p.at AND p.was <> 'dead'`, index, ids)
	}
	return tx.SendBatch(ctx, &b).Close()
}

// insertChunks gives each new chunk a row. An id whose row exists is dead, or about to be: the
// chunk takes the next incarnation and tries again, so the primary key decides.
func (a *acceptance) insertChunks() error {
	type pending struct {
		d *acceptDoc
		c *addedChunk
	}
	var todo []pending
	for i := range a.docs {
		for j := range a.docs[i].added {
			todo = append(todo, pending{&a.docs[i], &a.docs[i].added[j]})
		}
	}
	for try := 0; len(todo) > 0; try++ {
		if try == maxIncarnationTries {
			return corpus.Errorf(corpus.Internal, "no_free_incarnation", "document %s: no free incarnation for a chunk", todo[0].d.id)
		}
		byID := make(map[corpus.ID]pending, len(todo))
		for _, p := range todo {
			c := &p.d.in.Chunks[p.c.ordinal]
			p.c.id = corpus.PointID(a.collection, corpus.ChunkKey{
				ExternalID: p.d.in.ExternalID, Content: c.Content, Occurrence: c.Occurrence, Incarnation: uint32(p.c.incarnation),
			})
			byID[p.c.id] = p
		}
		// In id order, as whoever else enters rows here does.
		slices.SortFunc(todo, func(x, y pending) int { return x.c.id.Compare(y.c.id) })
		n := len(todo)
		ids, docs := make([][16]byte, n), make([][16]byte, n)
		texts, hashes := make([]string, n), make([][]byte, n)
		occurrences, incarnations := make([]int32, n), make([]int32, n)
		gens, born := make([]int64, n), make([]int64, n)
		for i, p := range todo {
			c := &p.d.in.Chunks[p.c.ordinal]
			ids[i], docs[i], texts[i], hashes[i] = p.c.id, p.d.id, c.Text, c.Content[:]
			occurrences[i], incarnations[i], gens[i], born[i] = int32(c.Occurrence), p.c.incarnation, p.d.gen, p.d.version
		}
		tag, err := a.tx.Exec(a.ctx, `
			INSERT INTO chunks (id, collection_id, document_id, text, content_hash, occurrence, incarnation, gen, born_version)
			SELECT p.id, $1, p.doc, p.text, p.hash, p.occurrence, p.incarnation, p.gen, p.born
			FROM unnest($2::uuid[], $3::uuid[], $4::text[], $5::bytea[], $6::integer[], $7::integer[], $8::bigint[], $9::bigint[])
				WITH ORDINALITY AS p (id, doc, text, hash, occurrence, incarnation, gen, born, ord) ORDER BY p.ord
			ON CONFLICT (id) DO NOTHING`, a.collection, ids, docs, texts, hashes, occurrences, incarnations, gens, born)
		if err != nil {
			return err
		}
		if int(tag.RowsAffected()) == n {
			break
		}
		// A gen belongs to this transaction alone, so a row with another one is somebody else's.
		rows, err := a.tx.Query(a.ctx, `SELECT c.id FROM unnest($1::uuid[], $2::bigint[]) AS p (id, gen)
			JOIN chunks c ON c.id = p.id WHERE c.gen <> p.gen`, ids, gens)
		taken, err := scanIDs(rows, err)
		if err != nil {
			return err
		}
		todo = todo[:0]
		for _, id := range taken {
			p := byID[id]
			p.c.incarnation++
			todo = append(todo, p)
		}
		if len(todo)+int(tag.RowsAffected()) != n {
			return corpus.Errorf(corpus.Internal, "lost_insert", "%d of %d chunk rows are unaccounted for", n-len(todo)-int(tag.RowsAffected()), n)
		}
	}
	var ids [][16]byte
	var vectors [][]byte
	for i := range a.docs {
		d := &a.docs[i]
		for j := range d.added {
			c := &d.added[j]
			d.points[c.ordinal] = c.id
			if v := d.in.Chunks[c.ordinal].Vectors; v != nil {
				ids, vectors = append(ids, c.id), append(vectors, v.AppendBinary(nil))
			}
		}
	}
	if len(ids) == 0 {
		return nil
	}
	_, err := a.tx.Exec(a.ctx, "INSERT INTO chunk_vectors (chunk_id, vectors) SELECT * FROM unnest($1::uuid[], $2::bytea[])", ids, vectors)
	return err
}

// insertEntries queues the new chunks for every index, and claims what the lease allows.
func (a *acceptance) insertEntries() error {
	var ids, docs [][16]byte
	var metas []int64
	for i := range a.docs {
		d := &a.docs[i]
		for j := range d.added {
			ids, docs, metas = append(ids, d.added[j].id), append(docs, d.id), append(metas, d.meta)
			if len(a.work) < a.lease.Max {
				c := &d.in.Chunks[d.added[j].ordinal]
				a.work = append(a.work, corpus.Entry{
					Chunk: d.added[j].id, Document: d.id, Token: a.lease.Token, Gen: d.gen, WantMeta: d.meta, Metadata: d.in.Metadata,
					Text: c.Text, Vectors: c.Vectors, First: true, Attempts: 1,
				})
			}
		}
	}
	if len(ids) == 0 {
		return nil
	}
	for _, index := range a.ix.all {
		claimed := 0
		if index == a.ix.serving {
			claimed = len(a.work)
		}
		if _, err := a.tx.Exec(a.ctx, `
			INSERT INTO index_entries (index_id, chunk_id, document_id, state, want_meta, claims, attempts, lease_token, lease_until, not_before)
			SELECT $1, p.id, p.doc, 'pending', p.meta, k.n, k.n, k.token, k.until, coalesce(k.until, now())
			FROM unnest($2::uuid[], $3::uuid[], $4::bigint[]) WITH ORDINALITY AS p (id, doc, meta, ord)
			CROSS JOIN LATERAL (SELECT CASE WHEN p.ord <= $5 THEN 1 ELSE 0 END AS n,
				CASE WHEN p.ord <= $5 THEN $6::uuid END AS token,
				CASE WHEN p.ord <= $5 THEN now() + $7::interval END AS until) k`,
			index, ids, docs, metas, claimed, a.lease.Token, micros(a.lease.For)); err != nil {
			return err
		}
	}
	return nil
}

// writeVersions moves the targets and writes their versions' rows; rows of versions that are
// neither target nor serving go.
func (a *acceptance) writeVersions() error {
	var ids, moved [][16]byte
	var versions, metas, movedTo []int64
	var hashes [][]byte
	var metadata, points []string
	for i := range a.docs {
		d := &a.docs[i]
		if d.outcome != corpus.NewVersion {
			continue
		}
		ids, versions, metas = append(ids, d.id), append(versions, d.version), append(metas, d.meta)
		hashes, metadata = append(hashes, d.in.Content[:]), append(metadata, string(d.in.Metadata.JSON()))
		points = append(points, uuidArray(d.points))
		if !d.fresh {
			moved, movedTo = append(moved, d.id), append(movedTo, d.version)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	if len(moved) > 0 {
		var b pgx.Batch
		b.Queue(`UPDATE documents d SET target_version = p.version, deleted_at = NULL, updated_at = now()
			FROM unnest($1::uuid[], $2::bigint[]) AS p (id, version) WHERE d.id = p.id`, moved, movedTo)
		b.Queue(`DELETE FROM document_versions v USING documents d
			WHERE d.id = ANY ($1::uuid[]) AND v.document_id = d.id AND v.version IS DISTINCT FROM d.serving_version`, moved)
		if err := a.tx.SendBatch(a.ctx, &b).Close(); err != nil {
			return err
		}
	}
	_, err := a.tx.Exec(a.ctx, `
		INSERT INTO document_versions (document_id, version, content_hash, metadata, meta_version, chunk_ids)
		SELECT p.id, p.version, p.hash, p.metadata::jsonb, p.meta, p.points::uuid[]
		FROM unnest($1::uuid[], $2::bigint[], $3::bytea[], $4::text[], $5::bigint[], $6::text[]) AS p (id, version, hash, metadata, meta, points)`,
		ids, versions, hashes, metadata, metas, points)
	return err
}

// settleMetadata writes metadata changes of unchanged contents, and lets every entry want the
// metadata of the version its chunk is shown with.
func (a *acceptance) settleMetadata() error {
	var changed, rewant [][16]byte
	var metas []int64
	var metadata []string
	for i := range a.docs {
		d := &a.docs[i]
		switch d.outcome {
		case corpus.NewMetadata:
			changed, metas = append(changed, d.id), append(metas, d.meta)
			metadata = append(metadata, string(d.in.Metadata.JSON()))
			rewant = append(rewant, d.id)
		case corpus.NewVersion:
			if !d.fresh && d.meta != d.oldMeta {
				rewant = append(rewant, d.id)
			}
		}
	}
	if len(changed) > 0 {
		var b pgx.Batch
		b.Queue(`
			WITH p AS MATERIALIZED (
				SELECT v.at, a.metadata, a.meta FROM unnest($1::uuid[], $2::text[], $3::bigint[]) AS a (id, metadata, meta)
				CROSS JOIN LATERAL (SELECT target_version FROM documents WHERE id = a.id LIMIT 1) d
				CROSS JOIN LATERAL (SELECT ctid AS at FROM document_versions WHERE document_id = a.id AND version = d.target_version LIMIT 1) v)
			UPDATE document_versions v SET metadata = p.metadata::jsonb, meta_version = p.meta FROM p WHERE v.ctid = p.at`, changed, metadata, metas)
		b.Queue("UPDATE documents SET updated_at = now() WHERE id = ANY ($1::uuid[])", changed)
		if err := a.tx.SendBatch(a.ctx, &b).Close(); err != nil {
			return err
		}
	}
	return wantMetadata(a.ctx, a.tx, a.ix, rewant)
}

// wantMetadata makes the entries of the documents' chunks want the meta_version of the version
// they are shown with: the serving one where that holds the chunk, else the target.
func wantMetadata(ctx context.Context, tx pgx.Tx, ix liveIndexes, docs [][16]byte) error {
	if len(docs) == 0 {
		return nil
	}
	rows, err := tx.Query(ctx, `
		SELECT c.id, CASE WHEN c.born_version <= d.serving_version AND coalesce(c.died_version > d.serving_version, true)
			THEN sv.meta_version ELSE tv.meta_version END
		FROM unnest($1::uuid[]) AS q (id)
		CROSS JOIN LATERAL (SELECT * FROM documents WHERE id = q.id AND deleted_at IS NULL LIMIT 1) d
		CROSS JOIN LATERAL (SELECT meta_version FROM document_versions WHERE document_id = d.id AND version = d.target_version LIMIT 1) tv
		LEFT JOIN LATERAL (SELECT meta_version FROM document_versions WHERE document_id = d.id AND version = d.serving_version LIMIT 1) sv ON true
		CROSS JOIN LATERAL (SELECT id, born_version, died_version FROM chunks WHERE document_id = d.id AND text IS NOT NULL OFFSET 0) c`, docs)
	if err != nil {
		return err
	}
	var chunks [][16]byte
	var metas []int64
	var chunk [16]byte
	var meta *int64 // null where the serving version's row is missing, in a damaged ledger
	if _, err := pgx.ForEachRow(rows, []any{&chunk, &meta}, func() error {
		if meta != nil {
			chunks, metas = append(chunks, chunk), append(metas, *meta)
		}
		return nil
	}); err != nil || len(chunks) == 0 {
		return err
	}
	var b pgx.Batch
	lockEntries(&b, ix, chunks)
	for _, index := range ix.all {
		b.Queue(byKey("$2::uuid[], $3::bigint[]", "id, meta")+`
			UPDATE index_entries e SET want_meta = p.meta, changed_at = now(),
				attempts = CASE WHEN p.was = 'indexed' THEN 0 ELSE e.attempts END,
				not_before = CASE WHEN p.was = 'indexed' THEN now() ELSE e.not_before END
			FROM p WHERE e.ctid = p.at AND p.was <> 'dead' AND e.want_meta <> p.meta`, index, chunks, metas)
	}
	return tx.SendBatch(ctx, &b).Close()
}

// rearm gives the failed entries of unchanged documents another life: whoever sends a document
// again wants it to be tried again.
func (a *acceptance) rearm() error {
	var ids [][16]byte
	for i := range a.docs {
		if o := a.docs[i].outcome; o == corpus.Unchanged || o == corpus.NewMetadata {
			ids = append(ids, a.docs[i].id)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	_, err := a.tx.Exec(a.ctx, `UPDATE index_entries SET state = 'pending', attempts = 0, not_before = now(),
			lease_token = NULL, lease_until = NULL, last_error = NULL, changed_at = now()
		WHERE document_id = ANY ($1::uuid[]) AND state = 'failed'`, ids)
	return err
}

// uuidArray renders ids as a Postgres array literal: unnest cannot carry arrays of arrays.
func uuidArray(ids []corpus.ID) string {
	var b strings.Builder
	b.Grow(2 + 37*len(ids))
	b.WriteByte('{')
	for i, id := range ids {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(id.String())
	}
	b.WriteByte('}')
	return b.String()
}
