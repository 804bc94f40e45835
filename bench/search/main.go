// Command search measures the read path, with the model's cost taken out or in: k = 10 over many
// chunks, over HTTP, beside a bare go-client loop that sends the same vectors to the same index.
// Both run in turns, in one process on the same cores; ratios are printed, and the recall of the
// index's approximate search against its exact one. With -load, searches run
// idle and under full ingestion in turns, for the ratio of their p99.
//
// The index is QDRANT_URL's server if set, else a qdrant on PATH, else the embedded one, which
// searches exactly: then most of the time is the index's own.
//
//	go run ./bench/search -n 100000 -dim 384 -clients 32
//	go run ./bench/search -n 5000 -model minilm -load
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	qc "github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc"

	"github.com/lockstep-db/lockstep/embedder/fake"
	"github.com/lockstep-db/lockstep/internal/app"
	"github.com/lockstep-db/lockstep/internal/config"
	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/internal/devstack"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench/search:", err)
		os.Exit(1)
	}
}

type bench struct {
	base       string
	collection string
	mode       string
	clients    int
	queries    []string
	http       *http.Client
}

func run(ctx context.Context) (err error) {
	n := flag.Int("n", 100_000, "chunks")
	dim := flag.Int("dim", 384, "floats of a fake vector")
	model := flag.String("model", "", "a real model instead of the fake embedder: minilm, or a directory")
	b := bench{collection: "bench"}
	flag.IntVar(&b.clients, "clients", 32, "concurrent clients")
	flag.StringVar(&b.mode, "mode", "dense", "search mode (the bare loop is always dense)")
	seconds := flag.Int("seconds", 5, "length of each turn")
	rounds := flag.Int("rounds", 3, "turns of each side")
	profile := flag.String("cpuprofile", "", "write a CPU profile of all turns to this file")
	load := flag.Bool("load", false, "compare idle searches with searches under ingestion, instead of with the bare loop")
	settings := config.AddFlags(flag.NewFlagSet("settings", flag.ContinueOnError)) // none: variables only
	flag.Parse()

	dir, err := os.MkdirTemp("", "lockstep-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	indexURL := os.Getenv("QDRANT_URL")
	stack, err := devstack.Start(ctx, devstack.Config{DataDir: filepath.Join(dir, "data"), NeedPostgres: true, NeedQdrant: indexURL == "", Logger: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stack.Stop(context.Background())) }()
	key := os.Getenv("QDRANT_API_KEY")
	if indexURL == "" {
		indexURL, key = stack.QdrantURL, stack.QdrantAPIKey
	}
	for _, e := range stack.Embedded {
		fmt.Println(e)
	}
	heads := corpus.Dense
	if b.mode != "dense" {
		heads |= corpus.SparseHead
	}
	emb := fake.New(*dim, heads)
	opts := app.Options{Version: "bench", Embedder: emb}
	cfg, err := config.Load(settings, config.Source{Getenv: os.Getenv, Root: os.Geteuid() == 0})
	if err != nil {
		return err
	}
	cfg.Listen, cfg.DataDir, cfg.Scrub = "127.0.0.1:0", filepath.Join(dir, "unused"), false
	cfg.DatabaseURL, cfg.QdrantURL, cfg.QdrantAPIKey = config.Secret(stack.DatabaseURL), indexURL, config.Secret(key)
	if *model != "" {
		cfg.Model, opts.Embedder = *model, nil
	}
	a, err := app.New(ctx, cfg, log, opts)
	if err != nil {
		return err
	}
	serving, stopServing := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- errors.Join(a.Run(serving), a.Close()) }()
	defer func() { stopServing(); err = errors.Join(err, <-done) }()
	b.base = "http://" + a.Addr().String()
	b.http = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: b.clients + 1}}

	began := time.Now()
	if err := b.ingest(ctx, b.collection, 0, *n); err != nil {
		return err
	}
	fmt.Printf("%d chunks ingested in %.1f s; %d clients, mode %s, k = 10\n", *n, time.Since(began).Seconds(), b.clients, b.mode)
	for i := range 1000 {
		b.queries = append(b.queries, text(i*7919%*n))
	}
	turn := time.Duration(*seconds) * time.Second
	for i := range b.queries { // warm: no turn begins with an empty cache
		if _, err := b.search(ctx, i); err != nil {
			return err
		}
	}
	if *profile != "" {
		f, err := os.Create(*profile)
		if err != nil {
			return err
		}
		if err := pprof.StartCPUProfile(f); err != nil {
			return errors.Join(err, f.Close())
		}
		defer func() { pprof.StopCPUProfile(); err = errors.Join(err, f.Close()) }()
	}
	if *load {
		return b.underLoad(ctx, *rounds, turn, *n)
	}
	if *model != "" {
		return errors.New("the bare loop takes the fake embedder's vectors: use -model with -load")
	}
	return b.besideBare(ctx, *rounds, turn, emb, indexURL, key)
}

// besideBare takes turns with a bare go-client loop.
func (b *bench) besideBare(ctx context.Context, rounds int, turn time.Duration, emb *fake.Embedder, indexURL, key string) error {
	client, err := dial(indexURL, key)
	if err != nil {
		return err
	}
	defer client.Close()
	name, err := b.indexName(ctx)
	if err != nil {
		return err
	}
	if err := optimized(ctx, client, name); err != nil {
		return err
	}
	req := corpus.EmbedRequest{Heads: corpus.Dense}
	for _, q := range b.queries {
		req.Inputs = append(req.Inputs, corpus.EmbedInput{Text: q})
	}
	vectors, err := emb.Embed(ctx, req)
	if err != nil {
		return err
	}
	bare := func(ctx context.Context, i int) (timing, error) {
		began := time.Now()
		using := "dense"
		got, err := client.Query(ctx, &qc.QueryPoints{CollectionName: name, Query: qc.NewQueryDense(vectors[i%len(vectors)].Vectors.Dense),
			Using: &using, Limit: qc.PtrOf(uint64(10))})
		if err == nil && len(got) != 10 {
			err = fmt.Errorf("the bare loop found %d points", len(got))
		}
		return timing{total: time.Since(began)}, err
	}
	var ratios []float64
	for round := range rounds {
		raw, err := b.turn(ctx, turn, bare)
		if err != nil {
			return err
		}
		own, err := b.turn(ctx, turn, b.search)
		if err != nil {
			return err
		}
		ratios = append(ratios, own.rate/raw.rate)
		fmt.Printf("turn %d: bare %.0f/s (median %v, p99 %v); lockstep %.0f/s (median %v, p99 %v), ratio %.2f; added to the index's own time: median %v, p99 %v; join: median %v, p99 %v\n",
			round+1, raw.rate, raw.at(.5), raw.at(.99), own.rate, own.at(.5), own.at(.99), own.rate/raw.rate,
			own.added(.5), own.added(.99), own.join(.5), own.join(.99))
	}
	slices.Sort(ratios)
	fmt.Printf("searches/s over the bare loop's: median %.2f (min %.2f, max %.2f)\n", ratios[len(ratios)/2], ratios[0], ratios[len(ratios)-1])
	exact := func(i int) ([]string, error) {
		using := "dense"
		got, err := client.Query(ctx, &qc.QueryPoints{CollectionName: name, Query: qc.NewQueryDense(vectors[i].Vectors.Dense),
			Using: &using, Limit: qc.PtrOf(uint64(10)), Params: &qc.SearchParams{Exact: qc.PtrOf(true)}})
		ids := make([]string, len(got))
		for j, p := range got {
			ids[j] = p.GetId().GetUuid()
		}
		return ids, err
	}
	return b.recall(ctx, min(500, len(vectors)), exact)
}

// optimized waits until the server has built what it builds in the background: until then both
// sides search points that are in no graph yet, on cores that are building one.
func optimized(ctx context.Context, client *qc.Client, name string) error {
	began := time.Now()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		info, err := client.GetCollectionInfo(ctx, name)
		if err != nil {
			return err
		}
		if info.GetStatus() == qc.CollectionStatus_Green {
			fmt.Printf("the index is in order after another %.1f s: %d points, %d vectors in a graph\n",
				time.Since(began).Seconds(), info.GetPointsCount(), info.GetIndexedVectorsCount())
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// recall prints how many of the ten nearest points Lockstep's dense searches find. It is 1 where
// the index searches exactly, as the embedded one does.
func (b *bench) recall(ctx context.Context, queries int, exact func(i int) ([]string, error)) error {
	if b.mode != "dense" {
		return nil // other modes rank otherwise
	}
	found, all := 0, 0
	for i := range queries {
		want, err := exact(i)
		if err != nil {
			return err
		}
		hits, _, err := b.ask(ctx, i)
		if err != nil {
			return err
		}
		for _, h := range hits {
			if slices.Contains(want, h.ID) {
				found++
			}
		}
		all += len(want)
	}
	fmt.Printf("recall@10 against exact search, %d queries: %.4f\n", queries, float64(found)/float64(max(1, all)))
	return nil
}

// underLoad compares idle turns with turns under ingestion.
func (b *bench) underLoad(ctx context.Context, rounds int, turn time.Duration, n int) error {
	var ratios []float64
	next := n // document of the load: each turn goes on where the last one ended
	for round := range rounds {
		idle, err := b.turn(ctx, turn, b.search)
		if err != nil {
			return err
		}
		loading, stop := context.WithCancel(ctx)
		var wg sync.WaitGroup
		var ingested atomic.Int64
		wg.Go(func() {
			for ; loading.Err() == nil; next += 200 {
				// Other texts into another collection: searches see the same data in every turn.
				if b.ingest(loading, "load", next, 200) == nil {
					ingested.Add(200)
				}
			}
		})
		busy, err := b.turn(ctx, turn, b.search)
		stop()
		wg.Wait()
		// What was cut short is finished, or the next turn would not be idle.
		if err = errors.Join(err, b.ingest(ctx, "load", next-200, 200)); err != nil {
			return err
		}
		ratio := float64(busy.at(.99)) / float64(idle.at(.99))
		ratios = append(ratios, ratio)
		fmt.Printf("turn %d: idle %.0f/s, p99 %v; under ingestion (%.0f documents/s) %.0f/s, p99 %v: %.2f times\n",
			round+1, idle.rate, idle.at(.99), float64(ingested.Load())/turn.Seconds(), busy.rate, busy.at(.99), ratio)
	}
	slices.Sort(ratios)
	fmt.Printf("p99 under ingestion over idle: median %.2f (min %.2f, max %.2f)\n", ratios[len(ratios)/2], ratios[0], ratios[len(ratios)-1])
	return nil
}

type timing struct{ total, index, join time.Duration }

type result struct {
	rate  float64
	times []timing
}

func quantile(times []timing, p float64, of func(timing) time.Duration) time.Duration {
	all := make([]time.Duration, len(times))
	for i, t := range times {
		all[i] = of(t)
	}
	slices.Sort(all)
	return all[min(int(p*float64(len(all))), len(all)-1)].Round(time.Microsecond)
}

func (r *result) at(p float64) time.Duration {
	return quantile(r.times, p, func(t timing) time.Duration { return t.total })
}

func (r *result) added(p float64) time.Duration {
	return quantile(r.times, p, func(t timing) time.Duration { return t.total - t.index })
}

func (r *result) join(p float64) time.Duration {
	return quantile(r.times, p, func(t timing) time.Duration { return t.join })
}

// turn runs one by all clients for a while.
func (b *bench) turn(ctx context.Context, length time.Duration, one func(context.Context, int) (timing, error)) (result, error) {
	var mu sync.Mutex
	var all []timing
	var failed error
	var next atomic.Int64
	var wg sync.WaitGroup
	began := time.Now()
	for range b.clients {
		wg.Go(func() {
			var mine []timing
			var err error
			for time.Since(began) < length && ctx.Err() == nil && err == nil {
				var t timing
				if t, err = one(ctx, int(next.Add(1))); err == nil {
					mine = append(mine, t)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, mine...)
			failed = errors.Join(failed, err)
		})
	}
	wg.Wait()
	if failed == nil && len(all) == 0 {
		failed = ctx.Err()
	}
	return result{rate: float64(len(all)) / time.Since(began).Seconds(), times: all}, failed
}

func (b *bench) search(ctx context.Context, i int) (timing, error) {
	hits, t, err := b.ask(ctx, i)
	if err == nil && len(hits) != 10 {
		err = fmt.Errorf("%d results, want 10", len(hits))
	}
	return t, err
}

// hit is what the bench reads of a result.
type hit struct {
	ID string `json:"id"`
}

func (b *bench) ask(ctx context.Context, i int) ([]hit, timing, error) {
	body, err := json.Marshal(map[string]any{"collection": b.collection, "query": b.queries[i%len(b.queries)], "mode": b.mode, "limit": 10})
	if err != nil {
		return nil, timing{}, err
	}
	began := time.Now()
	var reply struct {
		Results   []hit              `json:"results"`
		TimingsMS map[string]float64 `json:"timings_ms"`
	}
	if err := b.call(ctx, http.MethodPost, "/search", bytes.NewReader(body), &reply); err != nil {
		return nil, timing{}, err
	}
	took := time.Since(began)
	ms := func(name string) time.Duration {
		return time.Duration(reply.TimingsMS[name] * float64(time.Millisecond))
	}
	return reply.Results, timing{total: took, index: ms("index"), join: ms("join")}, nil
}

func (b *bench) indexName(ctx context.Context) (string, error) {
	var reply struct {
		Index string `json:"index"`
	}
	err := b.call(ctx, http.MethodGet, "/collections/"+b.collection, nil, &reply)
	return reply.Index, err
}

func (b *bench) call(ctx context.Context, method, path string, body io.Reader, into any) error {
	req, err := http.NewRequestWithContext(ctx, method, b.base+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := b.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, raw)
	}
	return json.Unmarshal(raw, into)
}

// text of chunk i: a few words, and some more so that its row has the size of real ones.
func text(i int) string {
	return fmt.Sprintf("Article %d speaks of topic %d and of subject %d. ", i, i%997, i%89) +
		strings.Repeat("It goes on for a while, as texts do. ", 1+i%10)
}

func (b *bench) ingest(ctx context.Context, collection string, first, n int) error {
	body, w := io.Pipe()
	go func() { // ends with the pipe
		enc := json.NewEncoder(w)
		var err error
		for i := first; i < first+n && err == nil; i++ {
			err = enc.Encode(map[string]any{"id": fmt.Sprintf("doc-%d", i), "chunks": []string{text(i)}, "metadata": map[string]any{"n": i % 10}})
		}
		w.CloseWithError(err)
	}()
	defer body.Close()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, b.base+"/documents?wait=true&collection="+collection, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-ndjson")
	resp, err := b.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 1<<20)
	answered := 0
	for lines.Scan() {
		if bytes.Contains(lines.Bytes(), []byte(`"failed"`)) || resp.StatusCode >= 300 {
			return fmt.Errorf("ingesting: %s: %s", resp.Status, lines.Bytes())
		}
		answered++
	}
	if lines.Err() == nil && answered < n {
		return fmt.Errorf("%d of %d documents were answered", answered, n)
	}
	return lines.Err()
}

func dial(url, key string) (*qc.Client, error) {
	host, port := "", 0
	if _, err := fmt.Sscanf(strings.NewReplacer("http://", "", ":", " ").Replace(url), "%s %d", &host, &port); err != nil {
		return nil, fmt.Errorf("QDRANT_URL %q: want http://host:port", url)
	}
	return qc.NewClient(&qc.Config{Host: host, Port: port, APIKey: key, SkipCompatibilityCheck: true,
		GrpcOptions: []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64 << 20))}})
}
