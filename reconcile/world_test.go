package reconcile_test

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"reflect"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	qc "github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/embedder/fake"
	"github.com/lockstep-db/lockstep/ingest"
	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/reconcile"
	"github.com/lockstep-db/lockstep/store/postgres"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
	"github.com/lockstep-db/lockstep/store/qdrant"
	"github.com/lockstep-db/lockstep/store/qdrantlocal"
	"github.com/lockstep-db/lockstep/store/qdranttest"
	"github.com/lockstep-db/lockstep/store/storetest"
)

const name = "c"

// world is a whole Lockstep without its surface: a real Postgres, an index server that speaks
// Qdrant's API, the write path over a fake model, and reconcile.
type world struct {
	t     testing.TB
	url   string
	db    *pgxpool.Pool // past the ledger, for damage
	store *postgres.Store
	index *qdrant.Client
	raw   *qc.Client // past the adapter, for damage
	owner corpus.ID
	model *fake.Embedder
	write *ingest.Service
	rec   *reconcile.Service
	cfg   reconcile.Config

	// server is the embedded index with its files; nil and empty where a real one is used.
	server     *qdrantlocal.Server
	indexDir   string
	addr       string // of the index
	stopIngest func()
}

// newWorld uses a real index server where there is one, else an embedded one.
func newWorld(t testing.TB, change ...func(*reconcile.Config)) *world {
	t.Helper()
	w := &world{t: t, addr: qdranttest.Child(t)}
	if w.addr == "" {
		return newFileWorld(t, change...)
	}
	w.open(change)
	return w
}

// newFileWorld has an embedded index, whose files the test may copy.
func newFileWorld(t testing.TB, change ...func(*reconcile.Config)) *world {
	t.Helper()
	w := &world{t: t, indexDir: t.TempDir()}
	w.serveIndex("127.0.0.1:0")
	t.Cleanup(func() { w.stopIndex() })
	w.open(change)
	return w
}

func (w *world) open(change []func(*reconcile.Config)) {
	t := w.t
	t.Helper()
	w.url, w.model = pgtest.New(t), fake.New(8, corpus.Dense)
	w.raw = storetest.Dial(t, w.addr)
	w.openLedger()
	w.cfg = reconcile.Config{
		Owner: w.owner, Grace: 30 * time.Millisecond, Poll: 10 * time.Millisecond, SettleTimeout: 20 * time.Second,
		Overdue: time.Hour, Lease: 5 * time.Second, Scrub: reconcile.ScrubConfig{Tick: 10 * time.Millisecond},
	}
	for _, c := range change {
		c(&w.cfg)
	}
	w.startIngest()
	w.rec = w.service()
	t.Cleanup(func() { w.stopIngest() })
}

func logger() *slog.Logger {
	if os.Getenv("LOCKSTEP_TEST_LOG") != "" {
		return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return slog.New(slog.DiscardHandler)
}

// service makes one more instance of reconcile over the same stores.
func (w *world) service() *reconcile.Service {
	cfg := w.cfg
	write := w.write
	cfg.Wake = write.Wake
	s := reconcile.New(cfg, w.store, w.index, logger(), prometheus.NewRegistry())
	w.t.Cleanup(s.Close)
	return s
}

func (w *world) serveIndex(addr string) {
	w.t.Helper()
	server, err := qdrantlocal.Open(w.indexDir, qdrantlocal.Options{Logger: logger()})
	if err != nil {
		w.t.Fatal(err)
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		w.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	w.server, w.addr = server, l.Addr().String()
	w.t.Cleanup(func() {
		if err := server.Close(); err != nil {
			w.t.Errorf("closing the index: %v", err)
		}
		if err := <-done; err != nil {
			w.t.Errorf("serving the index: %v", err)
		}
	})
}

func (w *world) stopIndex() {
	if err := w.server.Close(); err != nil {
		w.t.Errorf("closing the index: %v", err)
	}
}

// openLedger connects to the database and to the index, as a starting process does.
func (w *world) openLedger() {
	w.t.Helper()
	ctx := w.ctx()
	store, err := postgres.Open(ctx, postgres.Config{URL: w.url}, logger())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(store.Close)
	if _, err := store.Migrate(ctx); err != nil {
		w.t.Fatal(err)
	}
	w.store = store
	if w.owner, err = store.Installation(ctx); err != nil {
		w.t.Fatal(err)
	}
	pc, err := pgxpool.ParseConfig(w.url)
	if err != nil {
		w.t.Fatal(err)
	}
	pc.ConnConfig.RuntimeParams["search_path"] = "lockstep"
	if w.db, err = pgxpool.NewWithConfig(ctx, pc); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(w.db.Close)
	index, err := qdrant.Open(ctx, qdrant.Config{URL: "http://" + w.addr, Logger: logger()})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = index.Close() })
	index.SetOwner(w.owner)
	w.index = index
}

func (w *world) startIngest() {
	w.write = ingest.New(ingest.Config{
		Ledger: w.store, Index: w.index, Embedder: w.model, Owner: w.owner, Logger: logger(),
		Poll: 20 * time.Millisecond, Upkeep: 30 * time.Millisecond, Lease: 2 * time.Second, Workers: 2, Grace: time.Hour,
	})
	svc := w.write
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := svc.Run(ctx); err != nil {
			w.t.Errorf("ingest: %v", err)
		}
	}()
	w.stopIngest = func() { cancel(); <-done }
}

func (w *world) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	w.t.Cleanup(cancel)
	return ctx
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) exec(sql string, args ...any) {
	w.t.Helper()
	_, err := w.db.Exec(w.ctx(), sql, args...)
	w.must(err)
}

// fill ingests n documents of one chunk each, beginning with number from, and returns their
// points' ids in order.
func (w *world) fill(from, n int) []corpus.ID {
	w.t.Helper()
	var ids []corpus.ID
	for at := 0; at < n; at += 500 {
		var docs []corpus.DocumentInput
		for i := at; i < min(n, at+500); i++ {
			docs = append(docs, corpus.DocumentInput{
				ID: fmt.Sprintf("doc/%d", from+i), Chunks: []corpus.ChunkInput{{Text: fmt.Sprintf("the text of number %d", from+i)}},
				Metadata: corpus.Metadata{"n": int64(from + i)},
			})
		}
		for _, r := range w.ingest(docs...) {
			ids = append(ids, r.PointIDs...)
		}
	}
	w.exec(`ANALYZE index_entries`) // a run is split by what the statistics say
	return ids
}

func (w *world) ingest(docs ...corpus.DocumentInput) []corpus.DocumentResult {
	w.t.Helper()
	out, err := w.write.Ingest(w.ctx(), corpus.IngestRequest{Collection: name, Documents: docs, Wait: true})
	w.must(err)
	for _, r := range out {
		if r.Err != nil {
			w.t.Fatalf("ingesting %s: %v", r.ID, r.Err)
		}
	}
	return out
}

func (w *world) ix() corpus.Index {
	w.t.Helper()
	_, ix, err := w.store.ResolveCollection(w.ctx(), name)
	w.must(err)
	return ix
}

// eventually polls until ok.
func (w *world) eventually(what string, ok func() bool) {
	w.t.Helper()
	deadline := time.After(30 * time.Second)
	for !ok() {
		select {
		case <-deadline:
			w.t.Fatalf("%s: not within 30 s%s", what, w.lastRuns())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// lastRuns is what a failing test says about the ledger's latest runs and the rotation.
func (w *world) lastRuns() string {
	var runs string
	w.must(w.db.QueryRow(w.ctx(), `SELECT coalesce(string_agg(r::text, E'\n' ORDER BY r.started_at), '') || E'\n' ||
			(SELECT coalesce(string_agg(s::text, E'\n'), '') FROM reconcile_scrub s)
		FROM (SELECT started_at, finished_at, origin, state, stage, depth, lo, compared, error, leader_until FROM reconcile_runs ORDER BY started_at DESC LIMIT 12) r`).Scan(&runs))
	return "; now it is " + time.Now().Format(time.RFC3339Nano) + ", and the ledger says\n" + runs
}

// settled waits until nothing is pending and every dead point is known to be absent.
func (w *world) settled() {
	w.t.Helper()
	w.eventually("settling", func() bool {
		var n int
		w.must(w.db.QueryRow(w.ctx(), `SELECT count(*) FROM index_entries WHERE state = 'pending' OR state = 'indexed' AND meta_version <> want_meta OR state = 'dead' AND absent_at IS NULL`).Scan(&n))
		return n == 0
	})
}

// run reconciles to the end and returns the report and every finding of it.
func (w *world) run(req corpus.ReconcileRequest) (corpus.RunReport, []corpus.Finding) {
	w.t.Helper()
	return w.runOn(w.rec, req)
}

func (w *world) runOn(s *reconcile.Service, req corpus.ReconcileRequest) (corpus.RunReport, []corpus.Finding) {
	w.t.Helper()
	id, err := s.Start(w.ctx(), req)
	w.must(err)
	rep, err := s.Wait(w.ctx(), id, nil)
	w.must(err)
	return rep, w.findings(id)
}

func (w *world) findings(run corpus.ID) []corpus.Finding {
	w.t.Helper()
	reports, err := w.store.TargetReports(w.ctx(), run, 1_000_000)
	w.must(err)
	var out []corpus.Finding
	for _, r := range reports {
		out = append(out, r.Sample...)
	}
	return out
}

// points reads everything the index holds, vectors and payload included.
func (w *world) points() map[corpus.ID]corpus.PointState {
	w.t.Helper()
	out := map[corpus.ID]corpus.PointState{}
	var from corpus.ID
	for {
		page, next, err := w.index.Scroll(w.ctx(), w.ix(), from, 1000, corpus.Deep)
		w.must(err)
		for _, p := range page {
			out[p.ID] = p
		}
		if next == nil {
			return out
		}
		from = *next
	}
}

// point makes a point as Lockstep would write it.
func (w *world) point(id, document corpus.ID, gen int64, r *rand.Rand) corpus.Point {
	v := corpus.Vectors{Dense: make([]float32, 8)}
	for i := range v.Dense {
		v.Dense[i] = r.Float32() + 0.1
	}
	return corpus.Point{ID: id, Vectors: v, Payload: corpus.Payload{
		Owner: w.owner, Document: document, Gen: gen, MetaVersion: gen, Bucket: corpus.Bucket(w.ix().Salt, id),
		Checksum: corpus.ChecksumVectors(&v, ""), Metadata: corpus.Metadata{},
	}}
}

func randomUUID(r *rand.Rand) corpus.ID {
	var id corpus.ID
	for i := range id {
		id[i] = byte(r.UintN(256))
	}
	id[6] = id[6]&0x0f | 0x50
	id[8] = id[8]&0x3f | 0x80
	return id
}

// setPayload changes a point's payload past everything.
func (w *world) setPayload(id corpus.ID, key string, v *qc.Value) {
	w.t.Helper()
	_, err := w.raw.SetPayload(w.ctx(), &qc.SetPayloadPoints{
		CollectionName: w.ix().QdrantName, Wait: qc.PtrOf(true), Payload: map[string]*qc.Value{key: v},
		PointsSelector: qc.NewPointsSelector(qc.NewIDUUID(id.String())),
	})
	w.must(err)
}

func (w *world) deletePayload(id corpus.ID, key string) {
	w.t.Helper()
	_, err := w.raw.DeletePayload(w.ctx(), &qc.DeletePayloadPoints{
		CollectionName: w.ix().QdrantName, Wait: qc.PtrOf(true), Keys: []string{key},
		PointsSelector: qc.NewPointsSelector(qc.NewIDUUID(id.String())),
	})
	w.must(err)
}

// upsert writes a point past everything.
func (w *world) upsert(id corpus.ID, dense []float32, payload map[string]*qc.Value) {
	w.t.Helper()
	_, err := w.raw.Upsert(w.ctx(), &qc.UpsertPoints{CollectionName: w.ix().QdrantName, Wait: qc.PtrOf(true), Points: []*qc.PointStruct{{
		Id: qc.NewIDUUID(id.String()), Payload: payload,
		Vectors: qc.NewVectorsMap(map[string]*qc.Vector{"dense": qc.NewVectorDense(dense)}),
	}}})
	w.must(err)
}

// payloadOf reads a point's payload as the server has it.
func (w *world) payloadOf(id corpus.ID) map[string]*qc.Value {
	w.t.Helper()
	pts, err := w.raw.Get(w.ctx(), &qc.GetPoints{CollectionName: w.ix().QdrantName, Ids: []*qc.PointId{qc.NewIDUUID(id.String())}, WithPayload: qc.NewWithPayloadEnable(true)})
	w.must(err)
	if len(pts) != 1 {
		w.t.Fatalf("point %s is not there", id)
	}
	return pts[0].GetPayload()
}

// sameExcept fails unless both hold the same points, byte for byte, except those named.
func sameExcept(t testing.TB, before, after map[corpus.ID]corpus.PointState, except map[corpus.ID]bool) {
	t.Helper()
	for id, was := range before {
		if except[id] {
			continue
		}
		if is, ok := after[id]; !ok {
			t.Errorf("healthy point %s is gone", id)
		} else if !reflect.DeepEqual(was, is) {
			t.Errorf("healthy point %s changed:\n%+v\n%+v", id, was, is)
		}
	}
	for id := range after {
		if _, ok := before[id]; !ok && !except[id] {
			t.Errorf("point %s appeared", id)
		}
	}
}
