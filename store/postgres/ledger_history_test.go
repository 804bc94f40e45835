package postgres_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/internal/faults"
	"github.com/lockstep-db/lockstep/store/postgres"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
)

func document(id, text string) corpus.PreparedDocument {
	h := corpus.HashChunk(text, nil)
	return corpus.PreparedDocument{ExternalID: id, Content: h, Metadata: corpus.Metadata{}, Chunks: []corpus.PreparedChunk{{Text: text, Content: h}}}
}

// accept accepts one document, claims its chunk and returns the chunk's gen.
func accept(t testing.TB, s *postgres.Store, collection corpus.ID, id, text string) corpus.Entry {
	t.Helper()
	_, work, err := s.Accept(context.Background(), collection, []corpus.PreparedDocument{document(id, text)}, corpus.Lease{Token: corpus.ID{1}, Max: 1, For: time.Minute})
	if err != nil || len(work) != 1 {
		t.Fatalf("accepting %s: %d entries, %v", id, len(work), err)
	}
	return work[0]
}

func query[T any](t testing.TB, url, sql string) T {
	t.Helper()
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var out T
	if err := conn.QueryRow(ctx, sql).Scan(&out); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return out
}

func TestP8ARestartedPostgresJumpsOnce(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t)
	url := server.Database(t)
	s := open(t, url)
	c, _, _, err := s.EnsureCollection(context.Background(), "c", corpus.Settings{}, denseLayout, "m")
	if err != nil {
		t.Fatal(err)
	}
	before := accept(t, s, c.ID, "a", "one").Gen
	if n := query[int](t, url, "SELECT count(*) FROM lockstep.gen_gaps"); n != 0 {
		t.Fatalf("%d gaps on a Postgres that did not move", n)
	}
	server.Kill(t)
	server.Restart(t)
	s = open(t, url)
	var wg sync.WaitGroup
	gens := make([]int64, 8)
	for i := range gens {
		wg.Go(func() { gens[i] = accept(t, s, c.ID, fmt.Sprint(i), "text").Gen })
	}
	wg.Wait()
	for _, g := range gens {
		if g < before+postgres.GenStride {
			t.Errorf("gen %d after a restart; the last before was %d", g, before)
		}
	}
	if n := query[int](t, url, "SELECT count(*) FROM lockstep.gen_gaps"); n != 1 {
		t.Errorf("%d gaps; want one for one restart", n)
	}
	// Without a hole between the last number in use and the range: what Postgres had logged ahead
	// may have been used in a time that a restore has lost.
	if lo := query[int64](t, url, "SELECT lo FROM lockstep.gen_gaps"); lo != before+1 {
		t.Errorf("the range begins at %d; the last gen in use was %d", lo, before)
	}
	if hi := query[int64](t, url, "SELECT hi FROM lockstep.gen_gaps"); hi != slices.Min(gens)-1 {
		t.Errorf("the range ends at %d; the next gens are %v", hi, gens)
	}
}

// A2: a Postgres restored from a backup must not forget that it lost time once its sequence
// has caught up.
func TestA2ARestoredBackupNeverIssuesALostGenAgain(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	server := pgtest.Start(t)
	url := server.Database(t)
	s := open(t, url)
	c, ix, _, err := s.EnsureCollection(ctx, "c", corpus.Settings{}, denseLayout, "m")
	if err != nil {
		t.Fatal(err)
	}
	kept := accept(t, s, c.ID, "kept", "one")
	backup := server.Dir() + ".backup"
	server.Kill(t)
	copyDir(t, server.Dir(), backup)
	server.Restart(t)
	s = open(t, url)
	// The lost time has a restart of its own, which has jumped as well.
	var lost []corpus.Entry
	for i := range 5 {
		lost = append(lost, accept(t, s, c.ID, fmt.Sprintf("lost %d", i), "acknowledged"))
	}
	second := time.Now().Unix()
	server.Kill(t)
	if err := os.RemoveAll(server.Dir()); err != nil {
		t.Fatal(err)
	}
	copyDir(t, backup, server.Dir())
	for time.Now().Unix() <= second { // a restore takes a second, even here
		<-time.After(10 * time.Millisecond)
	}
	server.Restart(t)
	s = open(t, url)
	for i := range 20 { // more than were lost
		if g := accept(t, s, c.ID, fmt.Sprintf("new %d", i), "later").Gen; g <= lost[4].Gen {
			t.Fatalf("gen %d is issued a second time; %d was issued in the lost time", g, lost[4].Gen)
		}
	}
	facts, err := s.RollbackFacts(ctx, c.ID)
	if err != nil {
		t.Fatal(err)
	}
	var claims []corpus.OrphanClaim
	for _, e := range lost {
		if !facts.Evidence(e.Gen) {
			t.Errorf("gen %d of a lost write is no evidence: last %d, gaps %v", e.Gen, facts.LastGen, facts.Gaps)
		}
		claims = append(claims, corpus.OrphanClaim{ID: e.Chunk, Document: e.Document, Gen: e.Gen})
	}
	fates, err := s.EnterTombstones(ctx, ix, claims, corpus.DeleteBudget{Limit: 1000, Force: true})
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range fates {
		if f == corpus.OrphanDead {
			t.Errorf("lost write %d may be deleted", i)
		}
	}
	if facts.Evidence(kept.Gen) || !facts.Evidence(kept.Gen+1) {
		t.Errorf("the evidence begins elsewhere than after gen %d: %v", kept.Gen, facts.Gaps)
	}
	// Adopted, they are orphans like others, and nobody takes their ids again.
	if err := s.AdoptRollback(ctx, c.ID); err != nil {
		t.Fatal(err)
	}
	if facts, err = s.RollbackFacts(ctx, c.ID); err != nil || facts.Evidence(lost[0].Gen) {
		t.Errorf("after adoption gen %d is still evidence: %+v, %v", lost[0].Gen, facts, err)
	}
	if again := accept(t, s, c.ID, "lost 0", "acknowledged"); again.Chunk == lost[0].Chunk {
		t.Error("an id of the lost time is used again")
	}
}

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
		t.Fatalf("copying %s: %v: %s", from, err, out)
	}
}

func TestJumpSequenceRecordsItsRange(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	url := pgtest.New(t)
	s := open(t, url)
	c, _, _, err := s.EnsureCollection(ctx, "c", corpus.Settings{}, denseLayout, "m")
	if err != nil {
		t.Fatal(err)
	}
	before := accept(t, s, c.ID, "a", "one").Gen
	if err := s.JumpSequence(ctx, "a stamp does not fit"); err != nil {
		t.Fatal(err)
	}
	after := accept(t, s, c.ID, "b", "two").Gen
	if after <= before+postgres.GenStride {
		t.Errorf("gen %d, then %d", before, after)
	}
	if why := query[string](t, url, "SELECT reason FROM lockstep.gen_gaps"); why != "a stamp does not fit" {
		t.Errorf("reason %q", why)
	}
}

func TestOpenRefusesWhatCouldLoseData(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	server := pgtest.Start(t)
	url := server.Database(t)
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{"ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()"} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	deadline := time.Now().Add(10 * time.Second)
	for query[string](t, url, "SHOW fsync") != "off" {
		if time.Now().After(deadline) {
			t.Fatal("the setting does not take effect")
		}
	}
	_ = conn.Close(ctx)
	_, err = postgres.Open(ctx, postgres.Config{URL: url}, discard())
	if corpus.CodeOf(err) != "fsync_off" {
		t.Errorf("fsync = off: %v", err)
	}
	_, err = postgres.Open(ctx, postgres.Config{URL: "postgres://user:s3cret@host:notaport/db"}, discard())
	if err == nil || strings.Contains(fmt.Sprintf("%+v", err), "s3cret") {
		t.Errorf("a wrong URL: %v", err)
	}
}

func TestErrorsHaveKinds(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	server := pgtest.Start(t)
	s := open(t, server.Database(t))
	if err := s.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	server.Kill(t)
	for range 3 { // the first may meet a connection that was open, later ones a closed door
		if _, _, err := s.ResolveCollection(ctx, "c"); corpus.KindOf(err) != corpus.Unavailable {
			t.Errorf("with Postgres down: %v, kind %s", err, corpus.KindOf(err))
		}
	}
	server.Restart(t)
	var err error
	for range 20 { // each connection that died is noticed once
		if _, _, err = s.ResolveCollection(ctx, "c"); corpus.KindOf(err) == corpus.NotFound {
			break
		}
	}
	if corpus.KindOf(err) != corpus.NotFound {
		t.Errorf("with Postgres back: %v", err)
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if _, _, err := s.ResolveCollection(canceled, "c"); corpus.KindOf(err) != corpus.Unavailable {
		t.Errorf("cancelled: %v", err)
	}
}

// After a restart of Postgres every pooled connection may be dead, and no caller hears of it.
func TestDeadPooledConnectionsAreReplaced(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	const conns = 12
	s, err := postgres.Open(ctx, postgres.Config{URL: pgtest.New(t), MaxConns: conns}, discard())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	if _, err := s.Migrate(ctx); err != nil {
		t.Fatal(err)
	}
	var held []*pgxpool.Conn
	for range conns {
		c, err := s.Pool().Acquire(ctx)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	for _, c := range held {
		// Behind the pool's back: it learns of it only by using the connection.
		if err := c.Conn().PgConn().Conn().Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range held {
		c.Release()
	}
	if _, _, _, err := s.EnsureCollection(ctx, "c", corpus.Settings{}, denseLayout, "m"); err != nil {
		t.Error(err)
	}
}

// A transaction whose commit may have happened is not run again: its caller is told that the
// outcome is not known. One that Postgres aborted at its commit is.
func TestLostCommitIsNotRepeated(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	script := faults.NewScript()
	proxy, through, err := faults.NewPostgresURL(pgtest.New(t), script, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = proxy.Close() })
	s, err := postgres.Open(ctx, postgres.Config{URL: through, MaxConns: 2}, discard())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	if _, err := s.Pool().Exec(ctx, "CREATE SCHEMA lockstep; CREATE TABLE done (what text)"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		fault faults.Fault
		known bool // that nothing happened
	}{
		{faults.Fault{Kind: faults.DropReply}, false},
		{faults.Fault{Kind: faults.DropRequest}, false},
		{faults.Fault{Kind: faults.Hold}, false},
		{faults.Fault{Kind: faults.DisconnectAfter}, false},
		{faults.Fault{Kind: faults.Refuse, Class: "fatal_shutdown"}, false},
		{faults.Fault{Kind: faults.Refuse, Class: "serialization"}, true},
		{faults.Fault{Kind: faults.Refuse, Class: "deadlock"}, true},
	} {
		what := string(c.fault.Kind) + c.fault.Class
		script.Add(faults.Rule{Op: "commit", Fault: c.fault})
		runs := 0
		err := s.InTx(ctx, func(tx pgx.Tx) error {
			runs++
			_, err := tx.Exec(ctx, "INSERT INTO done VALUES ($1)", what)
			return err
		})
		proxy.ReleaseAll()
		var done int
		if err := s.Pool().QueryRow(ctx, "SELECT count(*) FROM done WHERE what = $1", what).Scan(&done); err != nil {
			t.Fatal(err)
		}
		switch {
		case c.known && (err != nil || runs != 2 || done != 1):
			t.Errorf("%s: run %d times, done %d times: %v", what, runs, done, err)
		case !c.known && (corpus.KindOf(err) != corpus.Unavailable || runs != 1 || done > 1):
			t.Errorf("%s: run %d times, done %d times: %v", what, runs, done, err)
		}
		if took := proxy.Counts()[c.fault.Kind]; took == 0 {
			t.Errorf("%s: the fault never took effect", what)
		}
	}
}
