package postgres_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/postgres"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
)

// bulk writes n settled one-chunk documents past the protocol.
func bulk(t testing.TB, conn *pgx.Conn, c corpus.Collection, ix corpus.Index, n int) {
	t.Helper()
	ctx := context.Background()
	for _, sql := range []string{
		`INSERT INTO chunks (id, collection_id, document_id, text, content_hash, occurrence, incarnation, gen, born_version)
		 SELECT gen_random_uuid(), $1::uuid, gen_random_uuid(), repeat('word ', 50), '\x00', 0, 0, g, 1 FROM generate_series(1, $3::int) g WHERE $2::uuid IS NOT NULL`,
		`INSERT INTO index_entries (index_id, chunk_id, document_id, state, want_meta, meta_version)
		 SELECT $2::uuid, id, document_id, 'indexed', gen, gen FROM chunks WHERE collection_id = $1::uuid AND $3::int > 0 ON CONFLICT DO NOTHING`,
	} {
		if _, err := conn.Exec(ctx, sql, c.ID, ix.ID, n); err != nil {
			t.Fatal(err)
		}
	}
}

func connect(t testing.TB, url string) *pgx.Conn {
	t.Helper()
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	cfg.RuntimeParams["search_path"] = "lockstep"
	conn, err := pgx.ConnectConfig(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func walked(t testing.TB) (*postgres.Store, *pgx.Conn, corpus.Collection, corpus.Index) {
	t.Helper()
	url := pgtest.New(t)
	s := open(t, url)
	c, ix, _, err := s.EnsureCollection(context.Background(), "c", corpus.Settings{Vectors: corpus.Dense}, corpus.Layout{Vectors: corpus.Dense, Dim: 8}, "f")
	if err != nil {
		t.Fatal(err)
	}
	return s, connect(t, url), c, ix
}

// The walk reads two indexes and nothing else, in order, whatever the planner believes about
// the tables: before any statistics exist, and after.
func TestWalkIsIndexOnly(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	_, conn, c, ix := walked(t)
	for _, n := range []int{0, 100, 20_000} {
		if n > 0 {
			bulk(t, conn, c, ix, n-1)
		}
		for _, maintained := range []bool{false, true} {
			if maintained {
				for _, table := range []string{"chunks", "index_entries"} {
					if _, err := conn.Exec(ctx, "VACUUM ANALYZE "+table); err != nil {
						t.Fatal(err)
					}
				}
			}
			for _, q := range []struct{ name, sql string }{{"ids", postgres.WalkIDsSQL}, {"all", postgres.WalkAllSQL}} {
				// Once with the parameters seen, once with the generic plan that a prepared
				// statement ends up with.
				for _, mode := range []string{"force_custom_plan", "force_generic_plan"} {
					plan := explain(t, conn, mode, q.sql, c.ID, ix.ID, corpus.ID{}, corpus.MaxID, 10_000)
					where := fmt.Sprintf("%s, %d rows, maintained %v, %s:\n%s", q.name, n, maintained, mode, plan)
					for _, table := range []string{"on chunks", "on index_entries"} {
						if !strings.Contains(plan, table) {
							t.Errorf("the plan does not read %q: %s", table, where)
						}
					}
					if strings.Count(plan, "Index Only Scan") != 2 {
						t.Errorf("not two index-only scans: %s", where)
					}
					for _, bad := range []string{"Seq Scan", "Sort", "Bitmap", "Hash", "Nested Loop", "Gather"} {
						if strings.Contains(plan, bad) {
							t.Errorf("%s in the plan: %s", bad, where)
						}
					}
					if maintained && strings.Contains(plan, "Heap Fetches:") {
						for line := range strings.Lines(plan) {
							if s := strings.TrimSpace(line); strings.HasPrefix(s, "Heap Fetches:") && s != "Heap Fetches: 0" {
								t.Errorf("the heap was read (%s): %s", s, where)
							}
						}
					}
				}
			}
		}
	}
}

// The counts of a quick run come from the bucket index alone.
func TestBucketCountsAreIndexOnly(t *testing.T) {
	t.Parallel()
	_, conn, c, ix := walked(t)
	bulk(t, conn, c, ix, 20_000)
	if _, err := conn.Exec(context.Background(), "VACUUM ANALYZE index_entries"); err != nil {
		t.Fatal(err)
	}
	plan := explain(t, conn, "force_custom_plan", postgres.BucketCountsSQL, ix.ID)
	if !strings.Contains(plan, "Index Only Scan using index_entries_bucket") || strings.Contains(plan, "Seq Scan") {
		t.Errorf("plan:\n%s", plan)
	}
}

func explain(t testing.TB, conn *pgx.Conn, mode, sql string, args ...any) string {
	t.Helper()
	ctx := context.Background()
	tx, err := conn.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(ctx) }()
	if _, err := tx.Exec(ctx, "SELECT set_config('plan_cache_mode', $1, true)", mode); err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(ctx, postgres.WalkPlanSQL); err != nil {
		t.Fatal(err)
	}
	rows, err := tx.Query(ctx, "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF) "+sql, args...)
	if err != nil {
		t.Fatal(err)
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(lines, "\n")
}

// The bucket that Postgres generates is the one that the payload carries.
func TestGeneratedBucketIsCorpusBucket(t *testing.T) {
	t.Parallel()
	_, conn, c, ix := walked(t)
	bulk(t, conn, c, ix, 500)
	rows, err := conn.Query(context.Background(), `SELECT chunk_id, bucket FROM index_entries`)
	if err != nil {
		t.Fatal(err)
	}
	var id corpus.ID
	var bucket int16
	n := 0
	if _, err := pgx.ForEachRow(rows, []any{&id, &bucket}, func() error {
		n++
		if want := corpus.Bucket(ix.Salt, id); uint32(bucket) != want {
			t.Errorf("%s: Postgres says bucket %d, corpus %d", id, bucket, want)
		}
		return nil
	}); err != nil || n != 500 {
		t.Fatal(n, err)
	}
}

func TestWalkPagesInOrder(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s, conn, c, ix := walked(t)
	bulk(t, conn, c, ix, 2500)
	for _, depth := range []corpus.Depth{corpus.Full, corpus.Deep} {
		var all []corpus.LedgerRow
		from := corpus.ID{}
		for {
			page, err := s.WalkChunks(ctx, ix, from, corpus.MaxID, 1000, depth, nil)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, page...)
			if len(page) < 1000 {
				break
			}
			from, _ = page[len(page)-1].ID.Next()
		}
		if len(all) != 2500 || !slices.IsSortedFunc(all, func(a, b corpus.LedgerRow) int { return a.ID.Compare(b.ID) }) {
			t.Fatalf("%s: %d rows, or not in order", depth, len(all))
		}
		for _, r := range all {
			if r.State != corpus.EntryIndexed || r.Died || depth == corpus.Deep && (r.Gen == 0 || r.MetaVersion != r.Gen || r.WantMeta != r.Gen || r.Document.IsZero()) {
				t.Fatalf("%s: %+v", depth, r)
			}
		}
	}
	lo, hi := corpus.ID{0x40}, corpus.ID{0x7f, 0xff}
	page, err := s.WalkChunks(ctx, ix, lo, hi, 10_000, corpus.Full, nil)
	if err != nil || len(page) < 400 || len(page) > 900 || page[0].ID.Compare(lo) < 0 || page[len(page)-1].ID.Compare(hi) > 0 {
		t.Fatalf("a quarter holds %d rows (%v)", len(page), err)
	}
}

// A decision counts only if the ledger still says what it said when the index was read.
func TestDecideLeavesWhatMoved(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s, conn, c, ix := walked(t)
	bulk(t, conn, c, ix, 3)
	spec := corpus.RunSpec{ID: corpus.ID{1}, Depth: corpus.Full, Origin: "request", Hi: corpus.MaxID, MaxDeletes: 0.1}
	if _, err := s.CreateRun(ctx, spec, time.Now(), corpus.ID{9}, time.Minute); err != nil {
		t.Fatal(err)
	}
	walk, err := s.WalkChunks(ctx, ix, corpus.ID{}, corpus.MaxID, 10, corpus.Full, nil)
	if err != nil {
		t.Fatal(err)
	}
	ids := []corpus.ID{walk[0].ID, walk[1].ID, walk[2].ID, {0xff}}
	var suspects []corpus.Suspect
	for _, id := range ids {
		suspects = append(suspects, corpus.Suspect{ID: id, Kind: corpus.Missing, SeenAt: time.Now()})
	}
	if err := s.AddSuspects(ctx, spec.ID, ix.ID, suspects); err != nil {
		t.Fatal(err)
	}
	rows, err := s.ReadRows(ctx, ix, ids, time.Minute)
	if err != nil || len(rows) != 3 {
		t.Fatal(rows, err)
	}
	decisions := make([]corpus.Decision, 0, 4)
	for _, id := range ids {
		d := corpus.Decision{Suspect: corpus.Missing, Action: corpus.RepairRewrite, Finding: corpus.Finding{Kind: corpus.Missing, ID: id, SeenAt: time.Now(), ConfirmedAt: time.Now()}}
		if i := slices.IndexFunc(rows, func(r corpus.LedgerRow) bool { return r.ID == id }); i >= 0 {
			d.Row = &rows[i]
		} else {
			d.Finding.Kind, d.Action = corpus.Orphan, corpus.RepairDelete
		}
		decisions = append(decisions, d)
	}
	// Between the look and the decision one entry is claimed, one dies, and the unknown id is born.
	if _, err := conn.Exec(ctx, `UPDATE index_entries SET lease_until = now() WHERE chunk_id = $1`, ids[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(ctx, `UPDATE index_entries SET state = 'dead' WHERE chunk_id = $1`, ids[1]); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(ctx, `INSERT INTO chunks (id, collection_id, occurrence, incarnation, gen, born_version) VALUES ($1, $2, 0, 0, 99, 1)`, ids[3], c.ID); err != nil {
		t.Fatal(err)
	}
	moved, err := s.Decide(ctx, spec.ID, ix, decisions, time.Minute, time.Now(), 5)
	if err != nil || moved != 3 {
		t.Fatalf("%d moved (%v), want 3", moved, err)
	}
	all, _, err := s.CountFindings(ctx, spec.ID, ix.Collection)
	if err != nil || all.Total() != 1 || all[corpus.Missing] != 1 {
		t.Fatalf("findings %v (%v)", all, err)
	}
	r := corpus.RunRange{Run: spec.ID, Index: ix.ID, Hi: corpus.MaxID}
	left, err := s.Suspects(ctx, r, corpus.ID{}, 10)
	if err != nil || len(left) != 3 || left[0].Looks != 1 {
		t.Fatalf("%+v (%v)", left, err)
	}
	after, err := s.ReadRows(ctx, ix, ids[:3], time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	states := map[corpus.ID]corpus.EntryState{}
	for _, row := range after {
		states[row.ID] = row.State
	}
	if states[ids[0]] != corpus.EntryIndexed || states[ids[1]] != corpus.EntryDead || states[ids[2]] != corpus.EntryPending {
		t.Errorf("states %v: only the one that did not move may be sent back", states)
	}
}

// The primary key of chunks decides between a tombstone and an ingest of the same id, and a
// gen that was never handed out stops everything.
func TestEnterTombstones(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s, conn, c, ix := walked(t)
	bulk(t, conn, c, ix, 2)
	if _, err := conn.Exec(ctx, `SELECT setval('gen', 100)`); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(ctx, `INSERT INTO gen_gaps (lo, hi, reason) VALUES (40, 50, 'test')`); err != nil {
		t.Fatal(err)
	}
	live, err := s.WalkChunks(ctx, ix, corpus.ID{}, corpus.MaxID, 10, corpus.Full, nil)
	if err != nil {
		t.Fatal(err)
	}
	id := func(n uint64) (out corpus.ID) { binary.BigEndian.PutUint64(out[:8], n); return out }
	many := corpus.DeleteBudget{Limit: 1000}
	for _, c := range []struct {
		name   string
		claim  corpus.OrphanClaim
		budget corpus.DeleteBudget
		fate   corpus.OrphanFate
		code   string
	}{
		{"unknown", corpus.OrphanClaim{ID: id(1), Gen: 7}, many, corpus.OrphanDead, ""},
		{"the same again", corpus.OrphanClaim{ID: id(1), Gen: 7}, many, corpus.OrphanDead, ""},
		{"live", corpus.OrphanClaim{ID: live[0].ID, Gen: 7}, many, corpus.OrphanAlive, ""},
		{"gen above the sequence", corpus.OrphanClaim{ID: id(2), Gen: 101}, many, corpus.OrphanRolledBack, ""},
		{"gen in a gap", corpus.OrphanClaim{ID: id(3), Gen: 45}, many, corpus.OrphanRolledBack, ""},
		{"gen in a gap, forced", corpus.OrphanClaim{ID: id(3), Gen: 45}, corpus.DeleteBudget{Limit: 1000, Force: true}, corpus.OrphanRolledBack, ""},
		{"foreign", corpus.OrphanClaim{ID: id(4), Gen: 1000, Foreign: true}, many, corpus.OrphanDead, ""},
		{"over the limit", corpus.OrphanClaim{ID: id(5), Gen: 7}, corpus.DeleteBudget{Limit: 1}, 0, "reconcile_braked"},
		{"over the limit, forced", corpus.OrphanClaim{ID: id(5), Gen: 7}, corpus.DeleteBudget{Limit: 1, Force: true}, corpus.OrphanDead, ""},
	} {
		fates, err := s.EnterTombstones(ctx, ix, []corpus.OrphanClaim{c.claim}, c.budget)
		if corpus.CodeOf(err) != c.code || c.code == "" && (err != nil || fates[0] != c.fate) {
			t.Errorf("%s: %v, %v; want fate %d, code %q", c.name, fates, err, c.fate, c.code)
		}
	}
	if _, err := s.StopCollection(ctx, ix.Collection, 0, "because"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.EnterTombstones(ctx, ix, []corpus.OrphanClaim{{ID: id(6), Gen: 7}}, corpus.DeleteBudget{Limit: 1000, Force: true}); corpus.CodeOf(err) != "collection_stopped" {
		t.Errorf("a stopped collection: %v", err)
	}
	rows, err := s.ReadRows(ctx, ix, []corpus.ID{id(1), id(2), id(3), id(4), id(5), id(6), live[0].ID}, time.Minute)
	if err != nil || len(rows) != 4 {
		t.Fatalf("%d rows are known (%v): %+v", len(rows), err, rows)
	}
	for _, r := range rows {
		if want := r.ID == live[0].ID; (r.State == corpus.EntryIndexed) != want || r.Died == want {
			t.Errorf("%+v", r)
		}
	}
}

func TestStampFits(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s, conn, _, ix := walked(t)
	owner, err := s.Installation(ctx)
	if err != nil {
		t.Fatal(err)
	}
	fits := func(what string, st corpus.Stamp, want bool) {
		t.Helper()
		why, err := s.StampFits(ctx, ix, st)
		if err != nil || (why == "") != want {
			t.Errorf("%s: %q (%v)", what, why, err)
		}
	}
	fits("one of ours before any was issued", corpus.Stamp{Installation: owner, Nonce: corpus.ID{1}, At: time.Now()}, false)
	var issued []corpus.Stamp
	for n := range 3 {
		st, due, err := s.IssueStamp(ctx, ix, corpus.ID{10, byte(n)}, 0)
		if err != nil || !due {
			t.Fatal(due, err)
		}
		issued = append(issued, st)
	}
	if _, due, err := s.IssueStamp(ctx, ix, corpus.ID{11}, time.Minute); err != nil || due {
		t.Errorf("a fresh stamp was renewed (%v)", err)
	}
	for i, st := range issued {
		// A write that was late leaves an older nonce behind: that is no evidence.
		fits(fmt.Sprintf("issued %d", i), st, true)
	}
	fits("issued elsewhere", corpus.Stamp{Installation: owner, Nonce: corpus.ID{5}, At: time.Now()}, false)
	fits("another installation", corpus.Stamp{Installation: corpus.ID{5}, Nonce: issued[0].Nonce, At: time.Now()}, false)
	fits("an old copy of the index", corpus.Stamp{Installation: owner, Nonce: corpus.ID{5}, At: time.Now().Add(-48 * time.Hour)}, true)
	if _, err := conn.Exec(ctx, `UPDATE index_stamps SET issued_at = issued_at - interval '25 hours'`); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.IssueStamp(ctx, ix, corpus.ID{12}, 0); err != nil {
		t.Fatal(err)
	}
	var n int
	if err := conn.QueryRow(ctx, `SELECT count(*) FROM index_stamps`).Scan(&n); err != nil || n != 1 {
		t.Errorf("%d stamps are remembered (%v), want 1", n, err)
	}
}
