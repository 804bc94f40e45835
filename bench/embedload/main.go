// Command embedload measures what the way to the model costs: the same texts go
//
//   - as token ids, sorted and cut into batches, straight into the engine ("engine"),
//   - as texts through the tokenizer and the batcher in this process ("batcher"),
//   - over HTTP on loopback into a child process, which answers in bytes ("http"),
//
// in turns, and the rates of each turn and their ratios to the engine's are printed. Nothing
// but the embedding path runs: no Postgres, no index. It takes a built model and the library,
// so that the built program can be copied to a machine with a GPU and run there:
//
//	go build -o embedload ./bench/embedload
//	embedload -library libonnxruntime.so -model DIR -cuda -tokens 128 -n 10000 -clients 16
//
// With -instant the engine's place is taken by one that answers at once: what tokenizer,
// batcher and HTTP can carry on this machine, whatever the model.
//
// CPU time is printed beside the rates: on a machine that others use, it is the steadier of
// the two. -server names a running server to measure in place of the child.
package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/lockstep-db/lockstep/embedder"
	"github.com/lockstep-db/lockstep/embedder/onnx"
	"github.com/lockstep-db/lockstep/httpapi"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "embedload:", err)
		os.Exit(1)
	}
}

type settings struct {
	library, model, server           string
	cuda, serve, instant             bool
	threads, runners, budget         int
	n, rounds, clients, perRequest   int
	tokens, shortest, longest, query int
	seed                             uint64
	only                             string
}

func run(ctx context.Context, args []string) error {
	var s settings
	fs := flag.NewFlagSet("embedload", flag.ContinueOnError)
	fs.StringVar(&s.library, "library", os.Getenv("ONNXRUNTIME_LIB"), "ONNX Runtime library")
	fs.StringVar(&s.model, "model", "", "built model directory")
	fs.StringVar(&s.server, "server", "", "a running server to measure; without it a child process serves")
	fs.BoolVar(&s.serve, "serve", false, "be that child: serve until standard input ends")
	fs.BoolVar(&s.cuda, "cuda", false, "run on the GPU")
	fs.BoolVar(&s.instant, "instant", false, "leave the model out: answer at once")
	fs.IntVar(&s.threads, "threads", 0, "threads of a batch on the CPU, 0 for all cores")
	fs.IntVar(&s.runners, "runners", 0, "batches at once; 0 is 1 on a CPU and 2 on a GPU")
	fs.IntVar(&s.budget, "batch-tokens", 0, "token budget of a batch; 0 is 512 on a CPU and 32,768 on a GPU")
	fs.IntVar(&s.n, "n", 1000, "texts in a turn")
	fs.IntVar(&s.rounds, "rounds", 3, "turns")
	fs.IntVar(&s.clients, "clients", 4, "concurrent requests")
	fs.IntVar(&s.perRequest, "per-request", 250, "texts in a request")
	fs.IntVar(&s.tokens, "tokens", 0, "tokens of every text; 0 draws lognormal lengths with median 120")
	fs.IntVar(&s.shortest, "shortest", 8, "shortest drawn length")
	fs.IntVar(&s.longest, "longest", 2048, "longest drawn length, cut to the model's maximum")
	fs.IntVar(&s.query, "query", 100, "single texts of 32 tokens for the latency over HTTP")
	fs.Uint64Var(&s.seed, "seed", 1, "seed of the texts")
	fs.StringVar(&s.only, "only", "", "measure one of engine, batcher and http")
	if err := fs.Parse(args); err != nil {
		return err
	}
	e, err := onnx.Open(onnx.Config{Library: s.library, ModelDir: s.model, CUDA: s.cuda, Threads: s.threads})
	if err != nil {
		return err
	}
	if s.runners == 0 {
		s.runners = 1
		if s.cuda {
			s.runners = 2
		}
	}
	if s.budget == 0 {
		s.budget = 512
		if s.cuda {
			s.budget = 32768
		}
	}
	if s.serve {
		return errors.Join(serve(ctx, e, s), e.Close())
	}
	return errors.Join(measure(ctx, e, s), e.Close())
}

// instant answers without computing.
type instant struct{ dense []float32 }

// Run returns the same vector for every row.
func (i instant) Run(rows [][]uint32, _ corpus.Heads) ([]corpus.Vectors, error) {
	out := make([]corpus.Vectors, len(rows))
	for k := range out {
		out[k].Dense = i.dense
	}
	return out, nil
}

func newBatcher(e *onnx.Engine, s settings, log *slog.Logger, reg prometheus.Registerer) *embedder.Batcher {
	var run embedder.Runner = e
	if s.instant {
		run = instant{make([]float32, e.Spec().Dim)}
	}
	return embedder.New(e.Spec(), e, run, embedder.Config{
		BatchTokens: s.budget, Runners: s.runners, Padded: e.Padded(),
		// The load is what is measured, not how it is refused.
		QueueTokens: 1 << 30,
	}, log, reg)
}

// serve answers /embed until standard input ends. The other rooms are absent: nothing calls
// their routes here.
func serve(ctx context.Context, e *onnx.Engine, s settings) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	b := newBatcher(e, s, log, reg)
	defer b.Close()
	api, err := httpapi.New(httpapi.Config{}, httpapi.Deps{Embedder: b, Registry: reg, Logger: log})
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Printf("http://%s\n", ln.Addr())
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // its end is the signal
		cancel()
	}()
	return api.Serve(ctx, ln, nil, 5*time.Second)
}

// child starts this program again as a server and returns its address.
func child(ctx context.Context, s settings) (address string, stop func() error, err error) {
	self, err := os.Executable()
	if err != nil {
		return "", nil, err
	}
	cmd := exec.CommandContext(ctx, self, "-serve", "-library", s.library, "-model", s.model, fmt.Sprintf("-cuda=%t", s.cuda), fmt.Sprintf("-instant=%t", s.instant),
		"-threads", fmt.Sprint(s.threads), "-runners", fmt.Sprint(s.runners), "-batch-tokens", fmt.Sprint(s.budget))
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
	stop = func() error { return errors.Join(in.Close(), cmd.Wait()) }
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return "", nil, errors.Join(err, stop())
	}
	return strings.TrimSpace(line), stop, nil
}

func measure(ctx context.Context, e *onnx.Engine, s settings) (err error) {
	spec := e.Spec()
	texts, rows, err := makeTexts(e, s)
	if err != nil {
		return err
	}
	tokens := 0
	for _, r := range rows {
		tokens += len(r)
	}
	fmt.Printf("%s %s on %s: %d texts, %d tokens (%.1f each), seed %d; %d tokens a batch, %d runners, %d clients of %d texts\n",
		spec.Name, spec.Precision, spec.Device, len(texts), tokens, float64(tokens)/float64(len(texts)), s.seed, s.budget, s.runners, s.clients, s.perRequest)

	b := newBatcher(e, s, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	defer b.Close()
	address := s.server
	if address == "" && (s.only == "" || s.only == "http") {
		var stop func() error
		if address, stop, err = child(ctx, s); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, stop()) }()
	}
	remote := &client{server: address}
	kinds := []struct {
		name string
		run  func() error
		cpu  func() (float64, error)
	}{
		{"engine", func() error { return engineTurn(e, rows, s) }, ownCPU},
		{"batcher", func() error { return batcherTurn(ctx, b, texts, s) }, ownCPU},
		{"http", func() error { return remote.turn(ctx, texts, s) }, remote.cpu},
	}
	ratios := map[string][]float64{}
	for round := range s.rounds + 1 {
		var base float64
		for _, k := range kinds {
			if s.only != "" && s.only != k.name || s.instant && k.name == "engine" {
				continue
			}
			before, err := k.cpu()
			if err != nil {
				return err
			}
			start := time.Now()
			if err := k.run(); err != nil {
				return fmt.Errorf("%s: %w", k.name, err)
			}
			took := time.Since(start).Seconds()
			after, err := k.cpu()
			if err != nil {
				return err
			}
			if round == 0 {
				continue // warms up
			}
			rate := float64(len(texts)) / took
			if k.name == "engine" {
				base = rate
			}
			fmt.Printf("turn %d: %-7s %9.1f texts/s %11.0f tokens/s  CPU %.3f ms a text", round, k.name, rate, float64(tokens)/took, 1e3*(after-before)/float64(len(texts)))
			if base > 0 && k.name != "engine" {
				ratios[k.name] = append(ratios[k.name], rate/base)
				fmt.Printf("  %.3f of the engine", rate/base)
			}
			fmt.Println()
		}
	}
	for _, name := range []string{"batcher", "http"} {
		if r := ratios[name]; len(r) > 0 {
			slices.Sort(r)
			fmt.Printf("%s to engine: median %.3f (min %.3f, max %.3f)\n", name, r[len(r)/2], r[0], r[len(r)-1])
		}
	}
	if address == "" || s.query == 0 {
		return nil
	}
	return remote.latency(ctx, e, s)
}

// ownCPU is this process's CPU time in seconds.
func ownCPU() (float64, error) {
	var u syscall.Rusage
	err := syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9, err
}

// makeTexts draws texts of exactly the wanted numbers of tokens, and their ids.
func makeTexts(e *onnx.Engine, s settings) (texts []string, rows [][]uint32, err error) {
	rng := rand.New(rand.NewPCG(s.seed, 2))
	words := strings.Fields(`the a of to and in is that for it with as was on are by this be from or have an they which one
		you had not but what all were when we there can more if out so said about up its into than them only other new some
		index vector document search query consistency repair store metadata payload embedding transaction ledger chunk version`)
	opening, closing := e.Specials()
	most := min(s.longest, e.Spec().MaxTokens)
	for len(texts) < s.n {
		want := s.tokens
		if want == 0 {
			want = min(max(int(math.Exp(math.Log(120)+0.9*rng.NormFloat64())), s.shortest), most)
		}
		inner := max(1, want-opening-closing)
		var b strings.Builder
		for range inner {
			b.WriteString(words[rng.IntN(len(words))])
			b.WriteByte(' ')
		}
		spans, err := e.Spans(b.String())
		if err != nil {
			return nil, nil, err
		}
		text := strings.TrimSpace(b.String()[:spans[min(inner, len(spans))-1].End])
		ids, err := e.Encode(text)
		if err != nil {
			return nil, nil, err
		}
		texts, rows = append(texts, text), append(rows, ids)
	}
	return texts, rows, nil
}

// engineTurn runs rows through the engine alone, longest first.
func engineTurn(e *onnx.Engine, rows [][]uint32, s settings) error {
	rows = slices.Clone(rows)
	slices.SortStableFunc(rows, func(x, y []uint32) int { return cmp.Compare(len(y), len(x)) })
	var batches [][][]uint32
	var cur [][]uint32
	cost := 0
	for _, r := range rows {
		c := len(r)
		if e.Padded() && len(cur) > 0 {
			c = len(cur[0])
		}
		if len(cur) > 0 && cost+c > s.budget {
			batches, cur, cost = append(batches, cur), nil, 0
			c = len(r)
		}
		cur, cost = append(cur, r), cost+c
	}
	batches = append(batches, cur)
	var next atomic.Int64
	var group errgroup.Group
	for range s.runners {
		group.Go(func() error {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(batches) {
					return nil
				}
				if _, err := e.Run(batches[i], corpus.Dense); err != nil {
					return err
				}
			}
		})
	}
	return group.Wait()
}

// eachPart calls do with every part of the texts, from as many goroutines as there are clients.
func eachPart(texts []string, s settings, do func(part []string) error) error {
	var group errgroup.Group
	group.SetLimit(s.clients)
	for part := range slices.Chunk(texts, s.perRequest) {
		group.Go(func() error { return do(part) })
	}
	return group.Wait()
}

func batcherTurn(ctx context.Context, b *embedder.Batcher, texts []string, s settings) error {
	return eachPart(texts, s, func(part []string) error {
		req := corpus.EmbedRequest{Inputs: make([]corpus.EmbedInput, len(part)), Heads: corpus.Dense, Lane: corpus.Bulk}
		for i, t := range part {
			req.Inputs[i].Text = t
		}
		out, err := b.Embed(ctx, req)
		for i := range out {
			err = errors.Join(err, out[i].Err)
		}
		return err
	})
}
