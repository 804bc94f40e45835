package faults

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	qc "github.com/qdrant/go-client/qdrant"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
)

func TestMain(m *testing.M) {
	// The Postgres for tests is shared and lives as long as the process.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/lockstep-db/lockstep/store/postgres/pgtest.(*Server).spawn.func1"))
}

// recorder is an index that remembers the ids of upserts, in order.
type recorder struct {
	qc.UnimplementedPointsServer
	mu   sync.Mutex
	seen []uint64
	keys []string
}

func (r *recorder) Upsert(ctx context.Context, req *qc.UpsertPoints) (*qc.PointsOperationResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range req.GetPoints() {
		r.seen = append(r.seen, p.GetId().GetNum())
	}
	md, _ := metadata.FromIncomingContext(ctx)
	r.keys = append(r.keys, strings.Join(md.Get("api-key"), ","))
	if req.GetCollectionName() == "full" {
		if err := grpc.SetTrailer(ctx, metadata.Pairs("retry-after", "7")); err != nil {
			return nil, err
		}
		return nil, status.Error(codes.ResourceExhausted, "slow down")
	}
	return &qc.PointsOperationResponse{Result: &qc.UpdateResult{Status: qc.UpdateStatus_Completed}}, nil
}

func (r *recorder) ids() []uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.seen)
}

type indexBundle struct {
	proxy  *Index
	back   *recorder
	script *Script
	clock  *Clock
	client *qc.Client
}

func setupIndex(t *testing.T) *indexBundle {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &indexBundle{back: &recorder{}, script: NewScript(), clock: NewClock(time.Unix(0, 0))}
	srv := grpc.NewServer()
	qc.RegisterPointsServer(srv, b.back)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(l) })
	t.Cleanup(func() { srv.Stop(); wg.Wait() })
	if b.proxy, err = NewIndex(l.Addr().String(), b.script, b.clock); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.proxy.Close(); err != nil {
			t.Error(err)
		}
	})
	addr := b.proxy.listener.Addr().(*net.TCPAddr)
	if b.client, err = qc.NewClient(&qc.Config{Host: "127.0.0.1", Port: addr.Port, PoolSize: 1, SkipCompatibilityCheck: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.client.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func (b *indexBundle) upsert(ctx context.Context, collection string, ids ...uint64) (*qc.UpdateResult, error) {
	req := &qc.UpsertPoints{CollectionName: collection}
	for _, id := range ids {
		req.Points = append(req.Points, &qc.PointStruct{Id: qc.NewIDNum(id), Vectors: qc.NewVectors(1)})
	}
	return b.client.Upsert(metadata.AppendToOutgoingContext(ctx, "api-key", "k"), req)
}

func TestIndexFaults(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		fault    Fault
		code     codes.Code // OK: no error
		status   qc.UpdateStatus
		at, late []uint64 // effects at the reply, and after all is released
	}{
		{Fault{}, codes.OK, qc.UpdateStatus_Completed, []uint64{1, 2}, nil},
		{Fault{Kind: DropRequest}, codes.Unavailable, 0, nil, nil},
		{Fault{Kind: DropReply}, codes.Unavailable, 0, []uint64{1, 2}, nil},
		{Fault{Kind: Hold}, codes.DeadlineExceeded, 0, nil, []uint64{1, 2}},
		{Fault{Kind: Duplicate}, codes.OK, qc.UpdateStatus_Completed, []uint64{1, 2, 1, 2}, nil},
		{Fault{Kind: DuplicateLate}, codes.OK, qc.UpdateStatus_Completed, []uint64{1, 2}, []uint64{1, 2, 1, 2}},
		{Fault{Kind: Half}, codes.Internal, 0, []uint64{1}, nil},
		{Fault{Kind: Refuse, Class: "internal"}, codes.Internal, 0, nil, nil},
		{Fault{Kind: RefuseAfter, Class: "data_loss"}, codes.DataLoss, 0, []uint64{1, 2}, nil},
		{Fault{Kind: WaitTimeout}, codes.OK, qc.UpdateStatus_WaitTimeout, []uint64{1, 2}, nil},
		{Fault{Kind: WaitTimeoutLate}, codes.OK, qc.UpdateStatus_WaitTimeout, nil, []uint64{1, 2}},
		{Fault{Kind: Acknowledged}, codes.OK, qc.UpdateStatus_Acknowledged, []uint64{1, 2}, nil},
		{Fault{Kind: Disconnect}, codes.Unavailable, 0, nil, nil},
		{Fault{Kind: DisconnectAfter}, codes.Unavailable, 0, []uint64{1, 2}, nil},
	} {
		t.Run(string(c.fault.Kind)+c.fault.Class, func(t *testing.T) {
			t.Parallel()
			b := setupIndex(t)
			b.script.Add(Rule{Op: "upsert", Fault: c.fault})
			r, err := b.upsert(t.Context(), "c", 1, 2)
			if status.Code(errors.Unwrap(err)) != c.code && !(err == nil && c.code == codes.OK) {
				t.Fatalf("got %v", err)
			}
			if err == nil && r.GetStatus() != c.status {
				t.Errorf("status %v", r.GetStatus())
			}
			if got := b.back.ids(); !slices.Equal(got, c.at) {
				t.Errorf("effects at the reply: %v, want %v", got, c.at)
			}
			b.proxy.ReleaseAll()
			if c.late == nil {
				c.late = c.at
			}
			if got := b.back.ids(); !slices.Equal(got, c.late) {
				t.Errorf("effects after release: %v, want %v", got, c.late)
			}
			if c.fault.Kind != Pass && b.proxy.Counts()[c.fault.Kind] != 1 {
				t.Errorf("counted %v", b.proxy.Counts())
			}
			// The proxy serves on.
			if _, err := b.upsert(t.Context(), "c", 9); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			for _, k := range b.back.keys {
				if k != "k" {
					t.Errorf("the API key arrived as %q", k)
				}
			}
		})
	}
}

func TestIndexErrorsKeepTheirTrailer(t *testing.T) {
	t.Parallel()
	b := setupIndex(t)
	b.script.Add(Rule{Op: "upsert", Fault: Fault{Kind: Refuse, Class: "rate_limited", RetryAfter: 3}}, Rule{Op: "upsert", Fault: Fault{Kind: Refuse, Class: "storage_full"}})
	for _, want := range []int{3, 0, 7} { // injected, injected without, the server's own
		_, err := b.upsert(t.Context(), "full", 1)
		var limited *qc.QdrantResourceExhaustedError
		switch {
		case errors.As(err, &limited) != (want > 0):
			t.Errorf("want %d, got %v", want, err)
		case want > 0 && limited.RetryAfterS != want:
			t.Errorf("want %d, got %d", want, limited.RetryAfterS)
		case want == 0 && status.Code(errors.Unwrap(err)) != codes.ResourceExhausted:
			t.Errorf("got %v", err)
		}
	}
}

func TestIndexLateRequests(t *testing.T) {
	t.Parallel()
	b := setupIndex(t)
	b.script.Add(
		Rule{Fault: Fault{Kind: Hold, For: 10 * time.Minute}},
		Rule{Fault: Fault{Kind: Hold, For: 5 * time.Minute}},
	)
	for id := range uint64(3) { // 0 and 1 are held, 2 passes
		if _, err := b.upsert(t.Context(), "c", id); (err == nil) != (id == 2) {
			t.Fatal(err)
		}
	}
	b.clock.Advance(4 * time.Minute)
	if got := b.back.ids(); !slices.Equal(got, []uint64{2}) {
		t.Errorf("after 4 minutes: %v", got)
	}
	b.clock.Advance(time.Hour)
	if got := b.back.ids(); !slices.Equal(got, []uint64{2, 1, 0}) {
		t.Errorf("after an hour: %v", got)
	}
}

func TestIndexDelayAndReorder(t *testing.T) {
	t.Parallel()
	b := setupIndex(t)
	b.script.Add(Rule{Fault: Fault{Kind: Delay}}, Rule{Fault: Fault{Kind: Reorder}})
	var wg sync.WaitGroup
	send := func(id uint64) {
		wg.Go(func() {
			if _, err := b.upsert(context.Background(), "c", id); err != nil {
				t.Error(err)
			}
		})
	}
	asked := func(n int) {
		for {
			b.proxy.planMu.Lock()
			seq := b.proxy.seq
			b.proxy.planMu.Unlock()
			if seq >= n {
				return
			}
			time.Sleep(time.Millisecond) //nolint:forbidigo // the moment has no event of its own
		}
	}
	send(1)
	asked(1)
	send(2)
	asked(2)
	if _, err := b.upsert(t.Context(), "c", 3); err != nil {
		t.Fatal(err)
	}
	for b.proxy.Held() == 0 {
		time.Sleep(time.Millisecond) //nolint:forbidigo // as above
	}
	for len(b.back.ids()) < 2 {
		time.Sleep(time.Millisecond) //nolint:forbidigo // as above
	}
	b.proxy.ReleaseAll()
	wg.Wait()
	if got := b.back.ids(); !slices.Equal(got, []uint64{3, 2, 1}) {
		t.Errorf("got %v", got)
	}
}

func TestHalvingOfOneIsNoFault(t *testing.T) {
	t.Parallel()
	b := setupIndex(t)
	b.script.Add(Rule{Fault: Fault{Kind: Half}})
	if _, err := b.upsert(t.Context(), "c", 1); err != nil || b.proxy.Counts()[Half] != 0 {
		t.Errorf("%v, %v", err, b.proxy.Counts())
	}
}

func TestRandomIsReplayed(t *testing.T) {
	t.Parallel()
	draw := func() (out []Kind) {
		r := NewRandom(7, 0.5, Fault{Kind: Hold}, Fault{Kind: Half})
		for i := range 100 {
			out = append(out, r.Next(Call{Seq: i}).Kind)
		}
		r.Stop()
		for i := range 100 {
			if k := r.Next(Call{Seq: i}).Kind; k != Pass {
				t.Error("it goes on after Stop")
			}
		}
		return out
	}
	a := draw()
	if !slices.Equal(a, draw()) {
		t.Error("two draws from one seed differ")
	}
	for _, k := range []Kind{Pass, Hold, Half} {
		if !slices.Contains(a, k) {
			t.Errorf("%q never drawn", k)
		}
	}
}

func TestScriptSkipsAndRepeats(t *testing.T) {
	t.Parallel()
	s := NewScript(Rule{Op: "UPSERT", Skip: 1, Times: 2, Fault: Fault{Kind: Hold}}, Rule{Op: "delete", Times: -1, Fault: Fault{Kind: Half}})
	var got []Kind
	for _, op := range []string{"Upsert", "Delete", "Upsert", "Upsert", "Upsert", "Delete", "Get"} {
		got = append(got, Plans{NewScript(), s}.Next(Call{Op: op}).Kind)
	}
	if want := []Kind{Pass, Half, Hold, Hold, Pass, Half, Pass}; !slices.Equal(got, want) {
		t.Errorf("got %v", got)
	}
	s.Clear()
	if k := s.Next(Call{Op: "delete"}).Kind; k != Pass {
		t.Error("it goes on after Clear")
	}
}

type pgBundle struct {
	proxy  *Postgres
	script *Script
	clock  *Clock
	direct *pgx.Conn
	dsn    string // through the proxy
}

func setupPostgres(t *testing.T) *pgBundle {
	t.Helper()
	direct := pgtest.New(t)
	b := &pgBundle{script: NewScript(), clock: NewClock(time.Unix(0, 0))}
	var err error
	if b.proxy, b.dsn, err = NewPostgresURL(direct, b.script, b.clock); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.proxy.Close(); err != nil {
			t.Error(err)
		}
	})
	if b.direct, err = pgx.Connect(t.Context(), direct); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.direct.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if _, err := b.direct.Exec(t.Context(), "CREATE TABLE t (x int)"); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *pgBundle) connect(t *testing.T) *pgx.Conn {
	t.Helper()
	c, err := pgx.Connect(t.Context(), b.dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(context.Background()) }) // often broken on purpose
	return c
}

func (b *pgBundle) rows(t *testing.T) (n int) {
	t.Helper()
	if err := b.direct.QueryRow(t.Context(), "SELECT count(*) FROM t").Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// insert commits rows in a transaction of their own, as one pipeline.
func insert(ctx context.Context, c *pgx.Conn, n int) error {
	tx, err := c.Begin(ctx)
	if err != nil {
		return err
	}
	var batch pgx.Batch
	for i := range n {
		batch.Queue("INSERT INTO t VALUES ($1)", i)
	}
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return errors.Join(err, tx.Rollback(ctx))
	}
	return tx.Commit(ctx)
}

func TestPostgresFaults(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		op       string
		fault    Fault
		sqlstate string // of the error; "" with broken: connection lost
		broken   bool
		at, late int // rows at the reply, and after release
	}{
		{"", Fault{}, "", false, 4, 4},
		{"commit", Fault{Kind: DropRequest}, "", true, 0, 0},
		{"commit", Fault{Kind: DropReply}, "", true, 4, 4},
		{"commit", Fault{Kind: DisconnectAfter}, "", true, 4, 4},
		{"insert", Fault{Kind: Disconnect}, "", true, 0, 0},
		{"insert", Fault{Kind: Half}, "", true, 0, 0},
		{"commit", Fault{Kind: Hold}, "", true, 0, 4},
		{"insert", Fault{Kind: Refuse, Class: "serialization"}, "40001", false, 0, 0},
		{"commit", Fault{Kind: Refuse, Class: "deadlock"}, "40P01", false, 0, 0},
		{"insert", Fault{Kind: Refuse, Class: "fatal_shutdown"}, "57P01", false, 0, 0},
	} {
		t.Run(c.op+" "+string(c.fault.Kind)+c.fault.Class, func(t *testing.T) {
			t.Parallel()
			b := setupPostgres(t)
			conn := b.connect(t)
			b.script.Add(Rule{Op: c.op, Times: 1, Fault: c.fault})
			if c.fault.Kind == Pass {
				b.script.Clear()
			}
			err := insert(t.Context(), conn, 4)
			var pgErr *pgconn.PgError
			errors.As(err, &pgErr)
			switch {
			case c.sqlstate != "" && (pgErr == nil || pgErr.Code != c.sqlstate):
				t.Errorf("got %v", err)
			case c.broken && (err == nil || pgErr != nil):
				t.Errorf("got %v", err)
			case !c.broken && c.sqlstate == "" && err != nil:
				t.Errorf("got %v", err)
			}
			if got := b.rows(t); got != c.at {
				t.Errorf("%d rows at the reply, want %d", got, c.at)
			}
			b.proxy.ReleaseAll()
			if got := b.rows(t); got != c.late {
				t.Errorf("%d rows after release, want %d", got, c.late)
			}
			if c.fault.Kind != Pass && b.proxy.Counts()[c.fault.Kind] != 1 {
				t.Errorf("counted %v", b.proxy.Counts())
			}
			if err := insert(t.Context(), b.connect(t), 1); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

func TestPostgresDelayWaits(t *testing.T) {
	t.Parallel()
	b := setupPostgres(t)
	conn := b.connect(t)
	b.script.Add(Rule{Op: "commit", Fault: Fault{Kind: Delay, For: time.Minute}})
	done := make(chan error, 1)
	go func() { done <- insert(context.Background(), conn, 2) }()
	for b.proxy.Held() == 0 {
		time.Sleep(time.Millisecond) //nolint:forbidigo // the moment has no event of its own
	}
	if n := b.rows(t); n != 0 {
		t.Errorf("%d rows before the commit arrived", n)
	}
	b.clock.Advance(2 * time.Minute)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := b.rows(t); n != 2 {
		t.Errorf("%d rows", n)
	}
}

func TestPostgresErrorLeavesAUsableTransactionState(t *testing.T) {
	t.Parallel()
	b := setupPostgres(t)
	conn := b.connect(t)
	b.script.Add(Rule{Op: "insert", Fault: Fault{Kind: Refuse, Class: "serialization"}})
	if err := insert(t.Context(), conn, 1); err == nil {
		t.Fatal("no error")
	}
	if err := insert(t.Context(), conn, 3); err != nil {
		t.Errorf("on the same connection: %v", err)
	}
	if n := b.rows(t); n != 3 {
		t.Errorf("%d rows", n)
	}
	// Prepared statements are known by their SQL.
	b.script.Add(Rule{Op: "select count", Fault: Fault{Kind: Disconnect}})
	var n int
	if err := conn.QueryRow(t.Context(), "SELECT count(*) FROM t WHERE x >= $1", 0).Scan(&n); err == nil {
		t.Error("the rule did not reach the prepared statement")
	}
}

func TestPostgresRefusesConnections(t *testing.T) {
	t.Parallel()
	b := setupPostgres(t)
	conn := b.connect(t)
	b.proxy.Refuse(true)
	if c, err := pgx.Connect(t.Context(), b.dsn); err == nil {
		_ = c.Close(t.Context())
		t.Error("a connection was made")
	}
	if err := insert(t.Context(), conn, 1); err != nil {
		t.Errorf("on the connection that was there: %v", err)
	}
	b.proxy.Refuse(false)
	b.connect(t)
}
