package postgres_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/postgres"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
)

func execute(t testing.TB, url, sql string, args ...any) {
	t.Helper()
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// settle reports an entry as done.
func settle(t testing.TB, s *postgres.Store, ix corpus.Index, e corpus.Entry) {
	t.Helper()
	if _, err := s.Settle(context.Background(), ix, []corpus.EntryResult{{Chunk: e.Chunk, Document: e.Document, Token: e.Token, Meta: e.WantMeta}}); err != nil {
		t.Fatal(err)
	}
}

func state(t testing.TB, url string) string {
	t.Helper()
	return query[string](t, url, "SELECT string_agg(state || ' ' || need, ',' ORDER BY chunk_id) FROM lockstep.index_entries")
}

func setup(t *testing.T) (*postgres.Store, string, corpus.Collection, corpus.Index) {
	t.Helper()
	url := pgtest.New(t)
	s := open(t, url)
	c, ix, _, err := s.EnsureCollection(context.Background(), "c", corpus.Settings{}, denseLayout, "m")
	if err != nil {
		t.Fatal(err)
	}
	return s, url, c, ix
}

func TestAWorkerThatLostItsLeaseMarksNothing(t *testing.T) {
	t.Parallel()
	s, url, c, ix := setup(t)
	ctx := context.Background()
	stale := accept(t, s, c.ID, "a", "one")
	// Its lease runs out, and another worker takes the entry.
	execute(t, url, "UPDATE lockstep.index_entries SET not_before = now(), lease_until = now()")
	taken, err := s.Claim(ctx, ix.ID, corpus.Lease{Token: corpus.ID{2}, Max: 10, For: time.Minute})
	if err != nil || len(taken) != 1 || taken[0].First || taken[0].Attempts != 2 {
		t.Fatalf("%+v, %v", taken, err)
	}
	settle(t, s, ix, stale)
	if got := state(t, url); got != "pending insert" {
		t.Errorf("after the stale mark: %s", got)
	}
	// Reconcile found the point damaged and sent the entry back while the second worker was at it.
	execute(t, url, "UPDATE lockstep.index_entries SET need = 'rewrite', lease_token = NULL, lease_until = NULL, not_before = now()")
	settle(t, s, ix, taken[0])
	if got := state(t, url); got != "pending rewrite" {
		t.Errorf("after a mark from before it was sent back: %s", got)
	}
	again, err := s.Claim(ctx, ix.ID, corpus.Lease{Token: corpus.ID{3}, Max: 10, For: time.Minute})
	if err != nil || len(again) != 1 || !again[0].Rewrite {
		t.Fatalf("%+v, %v", again, err)
	}
	settle(t, s, ix, again[0])
	if got := state(t, url); got != "indexed insert" {
		t.Errorf("in the end: %s", got)
	}
}

func TestADeadEntryStaysDead(t *testing.T) {
	t.Parallel()
	s, url, c, ix := setup(t)
	ctx := context.Background()
	e := accept(t, s, c.ID, "a", "one")
	if _, err := s.DeleteDocument(ctx, c.ID, "a"); err != nil {
		t.Fatal(err)
	}
	settle(t, s, ix, e)
	if got := state(t, url); got != "dead insert" {
		t.Errorf("after a mark of a dead entry: %s", got)
	}
	// Even under the token that it had: the state is looked at, too.
	execute(t, url, "UPDATE lockstep.index_entries SET lease_token = $1", [16]byte(e.Token))
	settle(t, s, ix, e)
	if got := state(t, url); got != "dead insert" {
		t.Errorf("after a mark with the token: %s", got)
	}
}

// Two claims never hand out one entry, and a lease that is renewed is not handed out.
func TestClaimsAreDisjoint(t *testing.T) {
	t.Parallel()
	s, _, c, ix := setup(t)
	ctx := context.Background()
	var docs []corpus.PreparedDocument
	for i := range 100 {
		docs = append(docs, document(fmt.Sprint(i), fmt.Sprintf("text %d", i)))
	}
	if _, _, err := s.Accept(ctx, c.ID, docs, corpus.Lease{}); err != nil {
		t.Fatal(err)
	}
	claims := make(chan []corpus.Entry, 10)
	for i := range 10 {
		go func() {
			got, err := s.Claim(ctx, ix.ID, corpus.Lease{Token: corpus.ID{byte(i + 1)}, Max: 15, For: time.Minute})
			if err != nil {
				t.Error(err)
			}
			claims <- got
		}()
	}
	seen := map[corpus.ID]bool{}
	var all []corpus.Entry
	for range 10 {
		for _, e := range <-claims {
			if seen[e.Chunk] {
				t.Errorf("%s was handed out twice", e.Chunk)
			}
			seen[e.Chunk] = true
			all = append(all, e)
		}
	}
	for len(seen) < 100 { // skipped by those that ran at the same moment
		got, err := s.Claim(ctx, ix.ID, corpus.Lease{Token: corpus.ID{99}, Max: 15, For: time.Minute})
		if err != nil || len(got) == 0 {
			t.Fatalf("%d of 100 handed out, then %d, %v", len(seen), len(got), err)
		}
		for _, e := range got {
			seen[e.Chunk] = true
		}
		all = append(all, got...)
	}
	if err := s.Renew(ctx, ix.ID, all, time.Hour); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Claim(ctx, ix.ID, corpus.Lease{Token: corpus.ID{100}, Max: 15, For: time.Minute}); err != nil || len(got) != 0 {
		t.Errorf("%d entries under lease were handed out, %v", len(got), err)
	}
}

// Failures that waiting cures do not count; others do.
func TestAttemptsAreCounted(t *testing.T) {
	t.Parallel()
	s, _, c, ix := setup(t)
	ctx := context.Background()
	e := accept(t, s, c.ID, "a", "one")
	want := 1
	for _, blameless := range []bool{true, false, true, false} {
		if e.Attempts != want {
			t.Errorf("attempts %d; want %d", e.Attempts, want)
		}
		r := corpus.EntryResult{Chunk: e.Chunk, Document: e.Document, Token: e.Token, Outcome: corpus.EntryRetry, Blameless: blameless, Error: "not now"}
		if _, err := s.Settle(ctx, ix, []corpus.EntryResult{r}); err != nil {
			t.Fatal(err)
		}
		got, err := s.Claim(ctx, ix.ID, corpus.Lease{Token: corpus.ID{2}, Max: 1, For: time.Minute})
		if err != nil || len(got) != 1 {
			t.Fatal(len(got), err)
		}
		if e = got[0]; e.First {
			t.Error("an entry that was claimed before is called first")
		}
		if !blameless {
			want++
		}
	}
}

// oneSession is a store with a collection and one connection, because each session keeps its
// counters to itself for a while; see counted.
func oneSession(t *testing.T) (*postgres.Store, corpus.Collection, corpus.Index) {
	t.Helper()
	ctx := context.Background()
	s, err := postgres.Open(ctx, postgres.Config{URL: pgtest.New(t), MaxConns: 1}, discard())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	if _, err := s.Migrate(ctx); err != nil {
		t.Fatal(err)
	}
	c, ix, _, err := s.EnsureCollection(ctx, "c", corpus.Settings{}, denseLayout, "m")
	if err != nil {
		t.Fatal(err)
	}
	return s, c, ix
}

// counted reads a number of the server's statistics, with all that the store's session has done.
func counted(t *testing.T, s *postgres.Store, sql string) (n int64) {
	t.Helper()
	ctx := context.Background()
	if _, err := s.Pool().Exec(ctx, "SELECT pg_stat_force_next_flush()"); err != nil {
		t.Fatal(err)
	}
	if err := s.Pool().QueryRow(ctx, sql).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// The queue is found through its index, entries through their key, whatever the statistics say:
// a new index of a large table must not cost a walk through all of them.
func TestWorkIsFoundByKey(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s, c, ix := oneSession(t)
	for n := range 4 {
		if _, _, err := s.Accept(ctx, c.ID, benchDocs(1000*n, 1000), corpus.Lease{}); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := s.Claim(ctx, ix.ID, corpus.Lease{Token: corpus.ID{1}, Max: 20, For: time.Minute})
	if err != nil || len(entries) != 20 {
		t.Fatal(len(entries), err)
	}
	reads := func() int64 {
		t.Helper()
		return counted(t, s, `SELECT (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname = 'index_entries')::bigint
			+ (SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'index_entries')`)
	}
	before := reads()
	var results []corpus.EntryResult
	for _, e := range entries {
		results = append(results, corpus.EntryResult{Chunk: e.Chunk, Document: e.Document, Token: e.Token, Meta: e.WantMeta})
	}
	if _, err := s.Settle(ctx, ix, results); err != nil {
		t.Fatal(err)
	}
	switch got := reads() - before; {
	case got == 0:
		t.Error("the counters say that settling read nothing: the test proves nothing")
	case got > 400:
		t.Errorf("settling 20 entries of 4,000 read %d rows of index_entries", got)
	}
}

// Postgres knows nothing of tables that grew since they were last analysed, and would join whole
// tables for a batch of keys. The statements of the write path look rows up by their keys anyway.
func TestWritingReadsNoTableThrough(t *testing.T) {
	t.Parallel()
	const n, batch = 3000, 100
	ctx := context.Background()
	s, c, ix := oneSession(t)
	tables := []string{"documents", "document_versions", "chunks", "index_entries"}
	for _, table := range tables {
		if _, err := s.Pool().Exec(ctx, "ALTER TABLE "+table+" SET (autovacuum_enabled = off)"); err != nil {
			t.Fatal(err)
		}
	}
	for from := 0; from < n; from += batch {
		docs := benchDocs(from, batch)
		_, work, err := s.Accept(ctx, c.ID, docs, corpus.Lease{Token: corpus.ID{1}, Max: batch, For: time.Minute})
		if err != nil || len(work) != batch {
			t.Fatalf("%d entries, %v", len(work), err)
		}
		results := make([]corpus.EntryResult, len(work))
		for i, e := range work {
			results[i] = corpus.EntryResult{Chunk: e.Chunk, Document: e.Document, Token: e.Token, Meta: e.WantMeta}
		}
		if moved, err := s.Settle(ctx, ix, results); err != nil || len(moved) != batch || moved[0].Serving != 1 {
			t.Fatalf("%d documents, %v", len(moved), err)
		}
		if got, err := s.Unchanged(ctx, c.ID, docs); err != nil || got[0].Acceptance != corpus.Unchanged {
			t.Fatalf("%v, %v", got[0].Acceptance, err)
		}
		// The same contents with other metadata: what is there is locked and read.
		for i := range docs {
			docs[i].Metadata = corpus.Metadata{"n": int64(from + i), "lang": "de"}
		}
		if got, _, err := s.Accept(ctx, c.ID, docs, corpus.Lease{}); err != nil || got[0].Acceptance != corpus.NewMetadata {
			t.Fatalf("%v, %v", got[0].Acceptance, err)
		}
	}
	if got := counted(t, s, "SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = 'documents'"); got < n {
		t.Fatalf("the counters say that %d of %d documents were written: the test proves nothing", got, n)
	}
	for _, table := range tables {
		// While it is small a table may well be read; one statement that goes on with it for every
		// batch would read n*n/batch/2 rows.
		if read := counted(t, s, "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = '"+table+"'"); read > n*n/batch/4 {
			t.Errorf("%d rows of %s were read by going through it, over %d batches", read, table, n/batch)
		}
	}
}
