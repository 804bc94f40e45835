// Command ingest measures the write path with the model's cost taken out: one-chunk documents
// with vectors from a fake embedder, over HTTP as NDJSON, into real Postgres and the index,
// against a bare go-client loop that upserts the same points into the same index with
// wait=true. Both run in turns in one process on the same cores; ratios are printed.
//
// The index is QDRANT_URL's server if set, else a qdrant on PATH, else the embedded one; Postgres
// is DATABASE_URL's (an empty database), else a fresh one.
//
// usage: go run ./bench/ingest -n 20000 -dim 1024 -rounds 3
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
	"time"

	"github.com/google/uuid"
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
		fmt.Fprintln(os.Stderr, "bench/ingest:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	n := flag.Int("n", 20_000, "documents")
	dim := flag.Int("dim", 1024, "floats of a vector")
	rounds := flag.Int("rounds", 3, "turns of each side")
	profile := flag.String("cpuprofile", "", "write a CPU profile of Lockstep's turns to this file")
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
	indexURL, indexKey := os.Getenv("QDRANT_URL"), os.Getenv("QDRANT_API_KEY")
	stack, err := devstack.Start(ctx, devstack.Config{DataDir: filepath.Join(dir, "data"), NeedPostgres: os.Getenv("DATABASE_URL") == "", NeedQdrant: indexURL == "", Logger: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stack.Stop(context.Background())) }()
	if indexURL == "" {
		indexURL, indexKey = stack.QdrantURL, stack.QdrantAPIKey
	}
	for _, e := range stack.Embedded {
		fmt.Println(e)
	}
	emb := fake.New(*dim, corpus.Dense)
	cfg := config.Default()
	cfg.Listen, cfg.DataDir, cfg.Scrub = "127.0.0.1:0", filepath.Join(dir, "unused"), false
	cfg.DatabaseURL, cfg.QdrantURL = config.Secret(stack.DatabaseURL), indexURL
	if url := os.Getenv("DATABASE_URL"); url != "" {
		cfg.DatabaseURL = config.Secret(url)
	}
	cfg.QdrantAPIKey = config.Secret(indexKey)
	a, err := app.New(ctx, cfg, log, app.Options{Embedder: emb, Version: "bench"})
	if err != nil {
		return err
	}
	serving, stopServing := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- errors.Join(a.Run(serving), a.Close()) }()
	defer func() { stopServing(); err = errors.Join(err, <-done) }()
	base := "http://" + a.Addr().String()

	texts := make([]string, *n)
	for i := range texts {
		texts[i] = fmt.Sprintf("document %d about topic %d", i, i%97)
	}
	client, err := dial(indexURL, indexKey)
	if err != nil {
		return err
	}
	defer client.Close()
	points, err := makePoints(ctx, emb, texts)
	if err != nil {
		return err
	}

	var ratios []float64
	for round := range *rounds {
		bare, err := bareLoop(ctx, client, points, *dim, fmt.Sprintf("bare_%d_%d", os.Getpid(), round))
		if err != nil {
			return err
		}
		stopProfile, err := startProfile(*profile, round)
		if err != nil {
			return err
		}
		name := fmt.Sprintf("bench-%d", round)
		first, err := stream(ctx, base, name, texts, "indexed")
		if err != nil {
			return err
		}
		again, err := stream(ctx, base, name, texts, "unchanged")
		if err != nil {
			return err
		}
		stopProfile()
		if err := drop(ctx, base, name); err != nil {
			return err
		}
		rate := func(d time.Duration) float64 { return float64(*n) / d.Seconds() }
		ratios = append(ratios, rate(first)/rate(bare))
		fmt.Printf("turn %d: bare loop %.0f points/s; lockstep %.0f docs/s, ratio %.2f; again, unchanged: %.0f docs/s\n",
			round+1, rate(bare), rate(first), rate(first)/rate(bare), rate(again))
	}
	slices.Sort(ratios)
	fmt.Printf("first ingestion / bare loop: median %.2f (min %.2f, max %.2f); peak resident memory of the whole process %s\n",
		ratios[len(ratios)/2], ratios[0], ratios[len(ratios)-1], peak())
	return nil
}

func startProfile(path string, round int) (stop func(), err error) {
	if path == "" || round > 0 {
		return func() {}, nil
	}
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { pprof.StopCPUProfile(); _ = f.Close() }, nil
}

func dial(url, key string) (*qc.Client, error) {
	host, port := "", 0
	if _, err := fmt.Sscanf(strings.NewReplacer("http://", "", ":", " ").Replace(url), "%s %d", &host, &port); err != nil {
		return nil, fmt.Errorf("QDRANT_URL %q: want http://host:port", url)
	}
	return qc.NewClient(&qc.Config{Host: host, Port: port, APIKey: key, SkipCompatibilityCheck: true,
		GrpcOptions: []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64 << 20))}})
}

func makePoints(ctx context.Context, emb *fake.Embedder, texts []string) ([]*qc.PointStruct, error) {
	req := corpus.EmbedRequest{Heads: corpus.Dense}
	for _, t := range texts {
		req.Inputs = append(req.Inputs, corpus.EmbedInput{Text: t})
	}
	out, err := emb.Embed(ctx, req)
	if err != nil {
		return nil, err
	}
	points := make([]*qc.PointStruct, len(out))
	for i := range out {
		points[i] = &qc.PointStruct{
			Id:      qc.NewIDUUID(uuid.NewString()),
			Vectors: qc.NewVectorsMap(map[string]*qc.Vector{"dense": qc.NewVectorDense(out[i].Vectors.Dense)}),
			// As many fields as Lockstep writes.
			Payload: qc.NewValueMap(map[string]any{"_owner": uuid.NewString(), "_doc": uuid.NewString(), "_gen": i, "_mv": i,
				"_bucket": i % 4096, "_sum": "0123456789abcdef", "m": map[string]any{}}),
		}
	}
	return points, nil
}

// bareLoop is one worker that upserts batches of 256 and waits for each.
func bareLoop(ctx context.Context, client *qc.Client, points []*qc.PointStruct, dim int, name string) (time.Duration, error) {
	err := client.CreateCollection(ctx, &qc.CreateCollection{CollectionName: name,
		VectorsConfig: qc.NewVectorsConfigMap(map[string]*qc.VectorParams{"dense": {Size: uint64(dim), Distance: qc.Distance_Dot}})})
	if err != nil {
		return 0, err
	}
	for field, kind := range map[string]qc.FieldType{"_owner": qc.FieldType_FieldTypeKeyword, "_doc": qc.FieldType_FieldTypeKeyword,
		"_gen": qc.FieldType_FieldTypeInteger, "_bucket": qc.FieldType_FieldTypeInteger} {
		if _, err := client.CreateFieldIndex(ctx, &qc.CreateFieldIndexCollection{CollectionName: name, FieldName: field,
			FieldType: kind.Enum(), Wait: qc.PtrOf(true)}); err != nil {
			return 0, err
		}
	}
	start := time.Now()
	for batch := range slices.Chunk(points, 256) {
		if _, err := client.Upsert(ctx, &qc.UpsertPoints{CollectionName: name, Wait: qc.PtrOf(true), Points: batch}); err != nil {
			return 0, err
		}
	}
	took := time.Since(start)
	return took, client.DeleteCollection(ctx, name)
}

// stream sends all documents in one request and returns when each was answered with status.
func stream(ctx context.Context, base, collection string, texts []string, status string) (time.Duration, error) {
	var body bytes.Buffer
	for i, t := range texts {
		line, err := json.Marshal(map[string]any{"id": fmt.Sprintf("doc-%d", i), "chunks": []string{t}})
		if err != nil {
			return 0, err
		}
		body.Write(append(line, '\n'))
	}
	start := time.Now()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/documents?wait=true&collection="+collection, &body)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/x-ndjson")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		raw, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return 0, fmt.Errorf("%s: %s", resp.Status, raw)
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 1<<20)
	seen := 0
	for lines.Scan() {
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		var r struct {
			Status string `json:"status"`
		}
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil || r.Status != status {
			return 0, fmt.Errorf("expected status %s, got %s (%w)", status, lines.Bytes(), err)
		}
		seen++
	}
	took := time.Since(start)
	if err := lines.Err(); err != nil {
		return 0, err
	}
	if seen != len(texts) {
		return 0, fmt.Errorf("%d of %d documents were answered", seen, len(texts))
	}
	return took, nil
}

func drop(ctx context.Context, base, collection string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodDelete, base+"/collections/"+collection, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return fmt.Errorf("dropping %s: %s", collection, resp.Status)
	}
	return nil
}

// peak is the process's VmHWM where the system tells.
func peak() string {
	raw, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(raw)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}
