// Command reconcile measures reconcile against a bare go-client loop that scrolls the same
// collection, in turns in one process on the same cores, and prints the ratios: full against a
// scroll of ids, deep against a scroll of payloads and vectors and against one of a single
// payload field, quick against full; with the bytes that came from the index and the peak of
// the Go heap during a run.
//
// The index is QDRANT_URL's server if set, else a qdrant on PATH, else the embedded one, which
// then runs in a process of its own; Postgres is DATABASE_URL's (an empty database), else a
// fresh one. The ledger is filled by COPY, past the protocol.
//
// usage: go run ./bench/reconcile -n 200000 -dim 8 -rounds 3
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"runtime/pprof"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	qc "github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/internal/devstack"
	"github.com/lockstep-db/lockstep/reconcile"
	"github.com/lockstep-db/lockstep/store/postgres"
	"github.com/lockstep-db/lockstep/store/qdrant"
	"github.com/lockstep-db/lockstep/store/qdrantlocal"
)

const collection = "bench"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if len(os.Args) == 3 && os.Args[1] == "serve-index" {
		if err := serveIndex(ctx, os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "bench/reconcile: index:", err)
			os.Exit(1)
		}
		return
	}
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench/reconcile:", err)
		os.Exit(1)
	}
}

// serveIndex is the child process: it prints its address and serves until its input ends.
func serveIndex(ctx context.Context, dir string) error {
	s, err := qdrantlocal.Open(dir, qdrantlocal.Options{})
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n') // the parent's end closes it
	return errors.Join(s.Close(), <-done)
}

func startIndex(ctx context.Context, dir string) (addr string, stop func() error, err error) {
	self, err := os.Executable()
	if err != nil {
		return "", nil, err
	}
	cmd := exec.CommandContext(ctx, self, "serve-index", dir)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", nil, err
	}
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	stop = func() error { return errors.Join(in.Close(), cmd.Wait()) }
	if err != nil {
		return "", nil, errors.Join(err, stop())
	}
	return "http://" + strings.TrimSpace(line), stop, nil
}

type bench struct {
	store *postgres.Store
	index *qdrant.Client
	raw   *qc.Client
	cfg   reconcile.Config
	ix    corpus.Index
	moved atomic.Int64 // bytes read from the index by the adapter
	n     int
	log   *slog.Logger
}

func run(ctx context.Context) (err error) {
	n := flag.Int("n", 200_000, "points")
	dim := flag.Int("dim", 8, "floats of a vector")
	rounds := flag.Int("rounds", 3, "turns of each side")
	workers := flag.Int("workers", 1, "ranges read at the same time; 1 compares one stream with one stream")
	page := flag.Int("page", 10_000, "page of the bare scroll")
	deep := flag.Bool("deep", true, "measure deep as well")
	verbose := flag.Bool("v", false, "log the stages of each run")
	profile := flag.String("cpuprofile", "", "write a CPU profile of reconcile's turns to this file")
	flag.Parse()

	dir, err := os.MkdirTemp("", "lockstep-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	indexURL, key, what := os.Getenv("QDRANT_URL"), os.Getenv("QDRANT_API_KEY"), "the server at QDRANT_URL"
	_, lookErr := exec.LookPath("qdrant")
	stack, err := devstack.Start(ctx, devstack.Config{
		DataDir: filepath.Join(dir, "data"), NeedPostgres: os.Getenv("DATABASE_URL") == "", NeedQdrant: indexURL == "" && lookErr == nil, Logger: log,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stack.Stop(context.WithoutCancel(ctx))) }()
	dsn := os.Getenv("DATABASE_URL")
	if dsn == "" {
		dsn = stack.DatabaseURL
	}
	if indexURL == "" && lookErr == nil {
		indexURL, key, what = stack.QdrantURL, stack.QdrantAPIKey, "a qdrant from PATH"
	}
	if indexURL == "" {
		var stop func() error
		if indexURL, stop, err = startIndex(ctx, filepath.Join(dir, "index")); err != nil {
			return err
		}
		what = "the embedded index (qdrantlocal) in a process of its own, not a Qdrant server"
		defer func() { err = errors.Join(err, stop()) }()
	}
	fmt.Printf("index: %s; %d points of %d floats; %d CPUs, %d workers\n", what, *n, *dim, runtime.NumCPU(), *workers)

	b := &bench{n: *n, log: slog.New(slog.DiscardHandler)}
	if *verbose {
		b.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if b.raw, err = dial(indexURL, key); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.raw.Close()) }()
	if err := b.open(ctx, dsn, indexURL, key, log); err != nil {
		return err
	}
	defer b.store.Close()
	defer func() { err = errors.Join(err, b.index.Close()) }()
	b.cfg.Workers = *workers
	began := time.Now()
	if err := b.fill(ctx, dsn, *n, *dim); err != nil {
		return err
	}
	fmt.Printf("filled in %s\n", time.Since(began).Round(time.Second))
	return b.turns(ctx, *rounds, *page, *deep, *profile)
}

func dial(rawURL, key string) (*qc.Client, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, err
	}
	port := 6334
	if p := u.Port(); p != "" {
		if _, err := fmt.Sscan(p, &port); err != nil {
			return nil, err
		}
	}
	return qc.NewClient(&qc.Config{
		Host: u.Hostname(), Port: port, APIKey: key, UseTLS: u.Scheme == "https", PoolSize: 1, SkipCompatibilityCheck: true,
		GrpcOptions: []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1 << 30))},
	})
}

// counted counts what is read from a connection.
type counted struct {
	net.Conn
	read *atomic.Int64
}

func (c counted) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.read.Add(int64(n))
	return n, err
}

func (b *bench) open(ctx context.Context, dsn, indexURL, key string, log *slog.Logger) (err error) {
	if b.store, err = postgres.Open(ctx, postgres.Config{URL: dsn}, log); err != nil {
		return err
	}
	if _, err := b.store.Migrate(ctx); err != nil {
		return err
	}
	b.index, err = qdrant.Open(ctx, qdrant.Config{URL: indexURL, APIKey: key, Dial: func(ctx context.Context, addr string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		return counted{conn, &b.moved}, err
	}})
	if err != nil {
		return err
	}
	if b.cfg.Owner, err = b.store.Installation(ctx); err != nil {
		return err
	}
	b.index.SetOwner(b.cfg.Owner)
	b.cfg.Grace = time.Millisecond // nothing is suspected; only the search for orphan indexes waits it out
	return nil
}

// fill writes the same n settled chunks into both stores.
func (b *bench) fill(ctx context.Context, dsn string, n, dim int) error {
	layout := corpus.Layout{Vectors: corpus.Dense, Dim: dim}
	_, ix, _, err := b.store.EnsureCollection(ctx, collection, corpus.Settings{Vectors: corpus.Dense}, layout, "bench")
	if err != nil {
		return err
	}
	b.ix = ix
	if err := b.index.CreateIndex(ctx, ix); err != nil {
		return err
	}
	if err := b.store.IndexReady(ctx, ix.ID); err != nil {
		return err
	}
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		return err
	}
	cfg.RuntimeParams["search_path"] = "lockstep"
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	r := rand.New(rand.NewPCG(1, 2))
	const batch = 5000
	text := strings.Repeat("some words of a chunk ", 20)
	for at := 0; at < n; at += batch {
		m := min(batch, n-at)
		chunks, entries, points := make([][]any, m), make([][]any, m), make([]corpus.Point, m)
		for i := range m {
			id, doc, gen := newID(r), newID(r), int64(at+i+1)
			v := corpus.Vectors{Dense: make([]float32, dim)}
			for k := range v.Dense {
				v.Dense[k] = r.Float32() + 0.01
			}
			chunks[i] = []any{[16]byte(id), [16]byte(ix.Collection), [16]byte(doc), text, []byte{0}, 0, 0, gen, int64(1)}
			entries[i] = []any{[16]byte(ix.ID), [16]byte(id), [16]byte(doc), "indexed", gen, gen}
			points[i] = corpus.Point{ID: id, Vectors: v, Payload: corpus.Payload{
				Owner: b.cfg.Owner, Document: doc, Gen: gen, MetaVersion: gen, Bucket: corpus.Bucket(ix.Salt, id),
				Checksum: corpus.ChecksumVectors(&v, ""), Metadata: corpus.Metadata{"lang": "en"},
			}}
		}
		if _, err := conn.CopyFrom(ctx, pgx.Identifier{"chunks"}, []string{"id", "collection_id", "document_id", "text", "content_hash", "occurrence", "incarnation", "gen", "born_version"}, pgx.CopyFromRows(chunks)); err != nil {
			return err
		}
		if _, err := conn.CopyFrom(ctx, pgx.Identifier{"index_entries"}, []string{"index_id", "chunk_id", "document_id", "state", "want_meta", "meta_version"}, pgx.CopyFromRows(entries)); err != nil {
			return err
		}
		if err := b.index.InsertPoints(ctx, ix, points); err != nil {
			return err
		}
	}
	// What autovacuum does to tables that are not written to any more.
	for _, sql := range []string{fmt.Sprintf("SELECT setval('gen', %d)", n+1), "VACUUM ANALYZE chunks", "VACUUM ANALYZE index_entries"} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

func newID(r *rand.Rand) (id corpus.ID) {
	binary.BigEndian.PutUint64(id[:8], r.Uint64())
	binary.BigEndian.PutUint64(id[8:], r.Uint64())
	id[6] = id[6]&0x0f | 0x50
	id[8] = id[8]&0x3f | 0x80
	return id
}

// scroll is the bare loop: it counts the points and looks at nothing.
func (b *bench) scroll(ctx context.Context, page int, payload *qc.WithPayloadSelector, vectors bool) (time.Duration, error) {
	began := time.Now()
	var offset *qc.PointId
	n := 0
	for {
		pts, next, err := b.raw.ScrollAndOffset(ctx, &qc.ScrollPoints{
			CollectionName: b.ix.QdrantName, Offset: offset, Limit: qc.PtrOf(uint32(page)), WithPayload: payload, WithVectors: qc.NewWithVectorsEnable(vectors),
		})
		if err != nil {
			return 0, err
		}
		n += len(pts)
		if next == nil {
			break
		}
		offset = next
	}
	if n < b.n {
		return 0, fmt.Errorf("the bare scroll saw %d of %d points", n, b.n)
	}
	return time.Since(began), nil
}

type result struct {
	took  time.Duration
	moved int64
	heap  uint64
}

// reconcile runs once and insists on a clean verdict over all points.
func (b *bench) reconcile(ctx context.Context, depth corpus.Depth) (result, error) {
	s := reconcile.New(b.cfg, b.store, b.index, b.log, prometheus.NewRegistry())
	defer s.Close()
	debug.FreeOSMemory()
	peak := watchHeap()
	moved := b.moved.Load()
	id, err := s.Start(ctx, corpus.ReconcileRequest{Collection: collection, Depth: depth})
	if err != nil {
		return result{}, err
	}
	rep, err := s.Wait(ctx, id, nil)
	out := result{moved: b.moved.Load() - moved, heap: peak()}
	switch {
	case err != nil:
		return out, err
	case rep.FinishedAt == nil:
		return out, errors.New("the run has no end")
	case rep.State != corpus.RunDone || rep.Collections[0].Status != corpus.Consistent || rep.Compared < int64(b.n):
		return out, fmt.Errorf("%s: %s %s, %d compared, %+v", depth, rep.State, rep.Error, rep.Compared, rep.Collections)
	}
	out.took = rep.FinishedAt.Sub(rep.StartedAt) // not until the next poll
	return out, nil
}

// watchHeap samples the live and unswept heap until the returned function is called.
func watchHeap() (peak func() uint64) {
	stop, done := make(chan struct{}), make(chan uint64)
	go func() {
		sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
		var most uint64
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			metrics.Read(sample)
			most = max(most, sample[0].Value.Uint64())
			select {
			case <-tick.C:
			case <-stop:
				done <- most
				return
			}
		}
	}()
	return func() uint64 { close(stop); return <-done }
}

func (b *bench) turns(ctx context.Context, rounds, page int, deep bool, profile string) error {
	var stop func()
	if profile != "" {
		f, err := os.Create(profile)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		stop = pprof.StopCPUProfile
		defer stop()
	}
	ratios := map[string][]float64{}
	note := func(what string, v float64) { ratios[what] = append(ratios[what], v) }
	for round := range rounds {
		bare, err := b.scroll(ctx, page, qc.NewWithPayloadEnable(false), false)
		if err != nil {
			return err
		}
		full, err := b.reconcile(ctx, corpus.Full)
		if err != nil {
			return err
		}
		quick, err := b.reconcile(ctx, corpus.Quick)
		if err != nil {
			return err
		}
		rate := func(d time.Duration) float64 { return float64(b.n) / d.Seconds() }
		fmt.Printf("turn %d: bare scroll of ids %.0f/s; full %.0f/s, %.1f MB from the index, peak heap %.1f MB; quick %s, %.2f MB\n",
			round+1, rate(bare), rate(full.took), mb(full.moved), mb(int64(full.heap)), quick.took.Round(time.Millisecond), mb(quick.moved))
		note("full / bare scroll of ids", rate(full.took)/rate(bare))
		note("quick's time / full's time", quick.took.Seconds()/full.took.Seconds())
		if !deep {
			continue
		}
		field, err := b.scroll(ctx, page, qc.NewWithPayloadInclude(corpus.KeyMetaVersion), false)
		if err != nil {
			return err
		}
		all, err := b.scroll(ctx, 1000, qc.NewWithPayloadEnable(true), true)
		if err != nil {
			return err
		}
		d, err := b.reconcile(ctx, corpus.Deep)
		if err != nil {
			return err
		}
		fmt.Printf("        bare scroll of one payload field %.0f/s, of payload and vectors %.0f/s; deep %.0f/s, %.1f MB, peak heap %.1f MB\n",
			rate(field), rate(all), rate(d.took), mb(d.moved), mb(int64(d.heap)))
		note("deep / bare scroll of payload and vectors", rate(d.took)/rate(all))
		note("deep / bare scroll of one payload field", rate(d.took)/rate(field))
	}
	for _, what := range slices.Sorted(maps.Keys(ratios)) {
		v := ratios[what]
		slices.Sort(v)
		fmt.Printf("%s: median %.2f (min %.2f, max %.2f)\n", what, v[len(v)/2], v[0], v[len(v)-1])
	}
	return nil
}

func mb(n int64) float64 { return float64(n) / 1e6 }
