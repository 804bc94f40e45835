// Command gpu measures the embedding engine on a GPU, without tokenisation and HTTP: token
// ids in, vectors out, through the packed graph and the graph for long texts.
//
//	gpu build  -checkpoint DIR -model DIR [-precision fp16]
//	gpu embed  -library LIB -model DIR -rows rows.json -heads dense,sparse,colbert -out vectors.bin
//	gpu time   -library LIB -model DIR -peak TFLOPS -out times.json
//	gpu http   -library LIB -model DIR -budget TOKENS
//	gpu soak   -library LIB -model DIR -for 4h [-bound MIB]
//
// run.sh beside this file does it all on one machine, with the torch side in torch_side.py.
package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/lockstep-db/lockstep/embedder/model"
	"github.com/lockstep-db/lockstep/embedder/onnx"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "gpu:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return errors.New("name build, embed, time, http or soak")
	}
	fs := flag.NewFlagSet("gpu "+args[0], flag.ContinueOnError)
	checkpoint := fs.String("checkpoint", "", "checkpoint directory")
	dir := fs.String("model", "", "built model directory")
	precision := fs.String("precision", "fp16", "precision to build in")
	library := fs.String("library", os.Getenv("ONNXRUNTIME_LIB"), "ONNX Runtime library of a CUDA build")
	rowsFile := fs.String("rows", "", "JSON file: a list of lists of token ids")
	heads := fs.String("heads", "dense", "heads to compute")
	out := fs.String("out", "", "file to write")
	peak := fs.Float64("peak", 0, "TFLOP/s of the machine's fp16 matrix product, for shares")
	seconds := fs.Float64("seconds", 5, "least time of each measurement")
	budget := fs.Int("budget", 64<<10, "tokens of a batch, over HTTP and in the soak")
	clients := fs.Int("clients", 8, "requests at once, over HTTP and in the soak")
	perRequest := fs.Int("per-request", 256, "texts of a request, over HTTP")
	cpu := fs.Bool("cpu", false, "run on the CPU")
	long := fs.Duration("for", time.Hour, "how long to soak, with the warming up")
	warm := fs.Duration("warm", 5*time.Minute, "what of it is warming up")
	every := fs.Duration("every", time.Minute, "time between lines of the soak")
	draw := fs.Uint64("seed", seed, "draws the soak's texts")
	memory := fs.Int("device-memory", 8<<10, "MiB of device memory for each graph in the soak, as the service's embedder.device_memory; 0 is no bound")
	bound := fs.Int("bound", 0, "soak also in a bound of device memory: MiB at which to begin looking for one that is tight")
	boundTime := fs.Duration("bound-for", time.Minute, "how long to soak within the bound")
	if err := fs.Parse(args[1:]); err != nil {
		return err
	}
	if args[0] == "build" {
		start := time.Now()
		m, err := model.Build(context.Background(), *checkpoint, *dir, model.Options{Precision: model.Precision(*precision)})
		if err != nil {
			return err
		}
		fmt.Printf("built %s %s %s in %.1f s\n", m.Name, m.Precision, m.Fingerprint, time.Since(start).Seconds())
		return nil
	}
	if args[0] == "soak" {
		s := soak{onnx: onnx.Config{Library: *library, ModelDir: *dir, CUDA: !*cpu, DeviceMemory: int64(*memory) << 20},
			budget: *budget, seed: *draw, clients: *clients, whole: *long, warm: *warm, every: *every, bound: *bound, boundTime: *boundTime}
		return s.all()
	}
	start := time.Now()
	e, err := onnx.Open(onnx.Config{Library: *library, ModelDir: *dir, CUDA: !*cpu})
	if err != nil {
		return err
	}
	fmt.Printf("loaded %s on %s in %.1f s\n", *dir, e.Spec().Device, time.Since(start).Seconds())
	switch args[0] {
	case "embed":
		err = embed(e, *rowsFile, *heads, *out)
	case "time":
		b := bench{e: e, peak: *peak, least: time.Duration(*seconds * float64(time.Second))}
		err = b.all(*out)
	case "http":
		o := overHTTP{e: e, least: time.Duration(*seconds * float64(time.Second))}
		err = o.all(*budget, *clients, *perRequest)
	default:
		err = fmt.Errorf("no command %q", args[0])
	}
	return errors.Join(err, e.Close())
}

// embed writes, for each row, the length and the canonical encoding of its vectors: once for
// the row alone, then once more for the row in a batch of them all.
func embed(e *onnx.Engine, rowsFile, names, out string) error {
	data, err := os.ReadFile(rowsFile)
	if err != nil {
		return err
	}
	var rows [][]uint32
	if err := json.Unmarshal(data, &rows); err != nil {
		return err
	}
	var heads corpus.Heads
	for _, name := range strings.Split(names, ",") {
		h, ok := corpus.ParseHead(name)
		if !ok {
			return fmt.Errorf("no head %q", name)
		}
		heads |= h
	}
	var all []corpus.Vectors
	for _, row := range rows {
		v, err := e.Run([][]uint32{row}, heads)
		if err != nil {
			return err
		}
		all = append(all, v...)
	}
	v, err := e.Run(rows, heads)
	if err != nil {
		return err
	}
	all = append(all, v...)
	var b []byte
	for i := range all {
		enc := all[i].AppendBinary(nil)
		b = append(binary.LittleEndian.AppendUint32(b, uint32(len(enc))), enc...)
	}
	return os.WriteFile(out, b, 0o644)
}

// workload is a kind of traffic, cut into batches of a token budget.
type workload struct {
	name    string
	heads   corpus.Heads
	threads int
	batches [][][]uint32
}

// result is one measurement.
type result struct {
	Workload string  `json:"workload"`
	Heads    string  `json:"heads"`
	Budget   int     `json:"batch_tokens"`
	Threads  int     `json:"host_threads"`
	Texts    int     `json:"texts"`
	Seconds  float64 `json:"seconds"`
	PerSec   float64 `json:"texts_per_second"`
	Tokens   float64 `json:"tokens_per_second"`
	TFLOPS   float64 `json:"model_tflops"`
	Share    float64 `json:"share_of_peak,omitempty"`
}

type bench struct {
	e     *onnx.Engine
	peak  float64
	least time.Duration
	list  []result
}

// seed draws the token ids and lengths.
const seed = 20261123

func (b *bench) rows(n int, length func(*rand.Rand) int) [][]uint32 {
	rng := rand.New(rand.NewPCG(seed, 1))
	vocab := b.e.Spec().VocabSize
	rows := make([][]uint32, n)
	for i := range rows {
		row := make([]uint32, length(rng))
		for j := range row {
			row[j] = uint32(4 + rng.IntN(vocab-5))
		}
		row[0], row[len(row)-1] = 0, 2
		rows[i] = row
	}
	return rows
}

func fixed(n int) func(*rand.Rand) int { return func(*rand.Rand) int { return n } }

// mixed is lognormal with median 120, between 8 and 2,048 tokens.
func mixed(rng *rand.Rand) int {
	return min(max(int(math.Exp(math.Log(120)+0.9*rng.NormFloat64())), 8), 2048)
}

// cut makes batches of at most budget tokens.
func cut(rows [][]uint32, budget int) [][][]uint32 {
	var out [][][]uint32
	var cur [][]uint32
	tokens := 0
	for _, row := range rows {
		if len(cur) > 0 && tokens+len(row) > budget {
			out, cur, tokens = append(out, cur), nil, 0
		}
		cur, tokens = append(cur, row), tokens+len(row)
	}
	return append(out, cur)
}

func (b *bench) all(out string) error {
	w1, w2 := b.rows(10000, fixed(128)), b.rows(4096, fixed(512))
	w4, w3 := b.rows(10000, mixed), b.rows(64, fixed(8192))
	sorted := slices.Clone(w4)
	slices.SortStableFunc(sorted, func(x, y []uint32) int { return cmp.Compare(len(y), len(x)) })
	three := corpus.Dense | corpus.SparseHead | corpus.ColBERT
	for _, m := range []struct {
		name    string
		rows    [][]uint32
		budget  int
		heads   corpus.Heads
		threads int
	}{
		{"128 tokens", w1, 64 << 10, corpus.Dense, 1},
		{"128 tokens", w1, 64 << 10, corpus.Dense, 2},
		{"128 tokens", w1, 32 << 10, corpus.Dense, 2},
		{"128 tokens", w1, 128 << 10, corpus.Dense, 2},
		{"512 tokens", w2, 64 << 10, corpus.Dense, 1},
		{"512 tokens", w2, 64 << 10, corpus.Dense, 2},
		{"512 tokens", w2, 128 << 10, corpus.Dense, 2},
		{"mixed, as they come", w4, 64 << 10, corpus.Dense, 2},
		{"mixed, sorted", sorted, 64 << 10, corpus.Dense, 1},
		{"mixed, sorted", sorted, 64 << 10, corpus.Dense, 2},
		{"mixed, sorted", sorted, 128 << 10, corpus.Dense, 2},
		{"mixed, sorted", sorted, 64 << 10, corpus.Dense, 3},
		{"8192 tokens", w3, 64 << 10, corpus.Dense, 1},
		{"8192 tokens", w3, 64 << 10, corpus.Dense, 2},
		{"128 tokens", w1, 64 << 10, corpus.Dense | corpus.SparseHead, 2},
		{"128 tokens", w1[:2000], 64 << 10, three, 2},
	} {
		r, err := b.measure(workload{m.name, m.heads, m.threads, cut(m.rows, m.budget)})
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		r.Budget = m.budget
		b.list = append(b.list, r)
		fmt.Printf("%-20s %-14s budget %6d threads %d: %7.0f texts/s %9.0f tokens/s %6.1f TFLOP/s share %.3f\n",
			r.Workload, r.Heads, r.Budget, r.Threads, r.PerSec, r.Tokens, r.TFLOPS, r.Share)
	}
	one, err := b.latency(b.rows(1, fixed(32))[0])
	if err != nil {
		return err
	}
	data, err := json.MarshalIndent(map[string]any{"peak_tflops": b.peak, "throughput": b.list, "latency_32_tokens_ms": one}, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(out, data, 0o644)
}

// measure runs the batches in whole rounds, so that all lengths count alike, for at least
// b.least, after the first and the last for warming up (new shapes are planned on first use).
func (b *bench) measure(w workload) (result, error) {
	for _, batch := range [][][]uint32{w.batches[0], w.batches[len(w.batches)-1], w.batches[0]} {
		if _, err := b.e.Run(batch, w.heads); err != nil {
			return result{}, err
		}
	}
	var tokens, texts int
	var flops float64
	start := time.Now()
	for done := false; !done; done = time.Since(start) > b.least {
		var next atomic.Int64
		var g errgroup.Group
		for range w.threads {
			g.Go(func() error {
				for {
					i := int(next.Add(1)) - 1
					if i >= len(w.batches) {
						return nil
					}
					if _, err := b.e.Run(w.batches[i], w.heads); err != nil {
						return err
					}
				}
			})
		}
		if err := g.Wait(); err != nil {
			return result{}, err
		}
		for _, batch := range w.batches {
			for _, row := range batch {
				tokens += len(row)
				flops += modelFLOPs(len(row))
			}
			texts += len(batch)
		}
	}
	took := time.Since(start).Seconds()
	r := result{Workload: w.name, Heads: w.heads.String(), Threads: w.threads, Texts: texts, Seconds: took,
		PerSec: float64(texts) / took, Tokens: float64(tokens) / took, TFLOPS: flops / 1e12 / took}
	if b.peak > 0 {
		r.Share = r.TFLOPS / b.peak
	}
	return r, nil
}

// modelFLOPs is what BGE-M3's encoder computes for a text: the products with weights and
// those inside the attention, a multiplication and an addition each. What a graph leaves out
// (the last layer for all but the first token) is counted too, as for every engine.
func modelFLOPs(tokens int) float64 {
	const layers, hidden, inner = 24, 1024, 4096
	n := float64(tokens)
	return layers * (n*2*(4*hidden*hidden+2*hidden*inner) + 4*n*n*hidden)
}

// latency is one short text at a time: p50 and p99 in milliseconds.
func (b *bench) latency(row []uint32) (map[string]float64, error) {
	var times []float64
	for i := range 520 {
		start := time.Now()
		if _, err := b.e.Run([][]uint32{row}, corpus.Dense); err != nil {
			return nil, err
		}
		if i >= 20 {
			times = append(times, float64(time.Since(start).Microseconds())/1e3)
		}
	}
	slices.Sort(times)
	p := map[string]float64{"p50": times[len(times)/2], "p99": times[len(times)*99/100]}
	fmt.Printf("one text of 32 tokens: p50 %.2f ms, p99 %.2f ms\n", p["p50"], p["p99"])
	return p, nil
}
