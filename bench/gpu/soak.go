package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/lockstep-db/lockstep/embedder"
	"github.com/lockstep-db/lockstep/embedder/onnx"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

// soak feeds a batcher, set up as the service does on a GPU, texts of random lengths in random
// numbers, and watches device and host memory: the last quarter after the warming up may not
// take more than the first. Then it does so in too little memory, where everything is still
// to be answered.
type soak struct {
	onnx      onnx.Config
	budget    int
	seed      uint64
	clients   int
	whole     time.Duration // the soak, with the warming up
	warm      time.Duration
	every     time.Duration // between lines printed
	bound     int           // MiB of device memory to begin the search for a tight bound at; 0 leaves that out
	boundTime time.Duration
}

// tolerance is how much more memory the last quarter may take.
const tolerance = 1.05

const allHeads = corpus.Dense | corpus.SparseHead | corpus.ColBERT

func (s *soak) all() error {
	fmt.Printf("seed %d\n", s.seed)
	e, err := s.open()
	if err != nil {
		return err
	}
	err = s.long(e)
	if err = errors.Join(err, e.Close()); s.bound > 0 {
		err = errors.Join(err, s.tight())
	}
	return err
}

func (s *soak) open() (*onnx.Engine, error) {
	start := time.Now()
	e, err := onnx.Open(s.onnx)
	if err != nil {
		return nil, err
	}
	fmt.Printf("loaded %s on %s in %.1f s\n", s.onnx.ModelDir, e.Spec().Device, time.Since(start).Seconds())
	return e, nil
}

// batcher is set up as internal/app does for a GPU.
func (s *soak) batcher(e *onnx.Engine, log *slog.Logger) (*embedder.Batcher, *prometheus.Registry) {
	reg := prometheus.NewRegistry()
	return embedder.New(e.Spec(), e, e, embedder.Config{BatchTokens: s.budget, BatchRows: 1024, Runners: 2, Padded: e.Padded()}, log, reg), reg
}

func (s *soak) long(e *onnx.Engine) error {
	w, outOfMemory, err := s.feed(e, slog.New(slog.DiscardHandler), s.seed, s.whole)
	if outOfMemory > 0 {
		err = errors.Join(err, fmt.Errorf("%v batches found too little memory", outOfMemory))
	}
	return errors.Join(err, w.judge(s.warm))
}

// feed keeps a batcher over e busy for a time, and watches. The watch is over when it returns.
func (s *soak) feed(e *onnx.Engine, log *slog.Logger, seed uint64, during time.Duration) (w *watch, outOfMemory float64, err error) {
	b, reg := s.batcher(e, log)
	defer b.Close()
	l := &load{b: b, spec: e.Spec(), budget: s.budget, seed: seed}
	w = &watch{start: time.Now(), every: s.every, cuda: s.onnx.CUDA, device: s.onnx.DeviceID, load: l, reg: reg}
	ctx, stop := context.WithTimeout(context.Background(), during)
	defer stop()
	var watching sync.WaitGroup
	watching.Go(func() { w.run(ctx) })
	err = l.run(ctx, s.clients)
	stop()
	watching.Wait()
	outOfMemory = total(reg, "lockstep_embedder_out_of_memory_total")
	fmt.Printf("%v batches, %v texts, %v tokens in %.0f s, %d failed, %v times out of memory\n", total(reg, "lockstep_embedder_batch_rows"),
		l.texts.Load(), l.tokens.Load(), time.Since(w.start).Seconds(), l.failed.Load(), outOfMemory)
	return w, outOfMemory, err
}

// tight looks for a bound of device memory in which the longest text just fits, and soaks there.
func (s *soak) tight() error {
	if !s.onnx.CUDA {
		return errors.New("only a GPU's memory can be bounded")
	}
	for mib := s.bound; mib < 16<<10; mib += mib / 8 {
		s.onnx.DeviceMemory = int64(mib) << 20
		e, err := s.open()
		if err != nil {
			fmt.Printf("bound %d MiB: the model does not load: %.300s\n", mib, err)
			continue
		}
		err = s.fits(e)
		if err == nil {
			fmt.Printf("bound %d MiB: a text of %d tokens with all heads fits\n", mib, e.Spec().MaxTokens)
			return errors.Join(s.within(e), e.Close())
		}
		fmt.Printf("bound %d MiB: the longest text does not fit: %.300s\n", mib, err)
		if err := e.Close(); err != nil {
			return err
		}
	}
	return errors.New("no bound below 16 GiB lets the longest text run")
}

// fits runs the longest text through both graphs: alone, and packed with a short one.
func (s *soak) fits(e *onnx.Engine) error {
	l := &load{spec: e.Spec()}
	rng := rand.New(rand.NewPCG(s.seed, 0))
	row := l.row(rng, e.Spec().MaxTokens)
	_, err := e.Run([][]uint32{row}, allHeads)
	if err == nil {
		_, err = e.Run([][]uint32{row, l.row(rng, 8)}, allHeads)
	}
	return err
}

func (s *soak) within(e *onnx.Engine) error {
	warnings := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{Level: slog.LevelWarn}))
	w, outOfMemory, err := s.feed(e, warnings, s.seed+1, s.boundTime)
	if outOfMemory == 0 {
		err = errors.Join(err, errors.New("the bound was never reached"))
	}
	return errors.Join(err, w.rose())
}

// load sends requests and counts what came back.
type load struct {
	b                     *embedder.Batcher
	spec                  corpus.ModelSpec
	budget                int
	seed                  uint64
	texts, tokens, failed atomic.Int64
}

// run keeps clients requests under way until ctx ends. A text that fails is counted; the first
// one's error is returned.
func (l *load) run(ctx context.Context, clients int) error {
	var g errgroup.Group
	for i := range clients {
		g.Go(func() error {
			rng := rand.New(rand.NewPCG(l.seed, uint64(i+1)))
			var first error
			for ctx.Err() == nil {
				if err := l.request(rng); err != nil && first == nil {
					first = err
					fmt.Printf("failed: %.500s\n", err)
				}
			}
			return first
		})
	}
	return g.Wait()
}

// request sends what may be one of three kinds, with one of three combinations of heads.
func (l *load) request(rng *rand.Rand) error {
	heads := []corpus.Heads{corpus.Dense, corpus.Dense | corpus.SparseHead, allHeads}[rng.IntN(3)] & l.spec.Heads
	var n int
	var length func() int
	switch kind := rng.IntN(20); {
	case kind < 3: // long texts only
		n, length = 1+rng.IntN(8), func() int { return l.spec.MaxTokens/2 + rng.IntN(l.spec.MaxTokens/2+1) }
	case kind < 6: // short ones only
		n, length = 1+rng.IntN(1024), func() int { return 1 + rng.IntN(16) }
	default:
		n, length = 1+rng.IntN(256), func() int { return int(math.Exp(math.Log(120) + 1.2*rng.NormFloat64())) }
	}
	req := corpus.EmbedRequest{Heads: heads, Lane: corpus.Bulk}
	if rng.IntN(8) == 0 {
		req.Lane = corpus.Query
	}
	tokens := 0
	for range n {
		row := l.row(rng, length())
		if tokens += len(row); tokens > l.budget && len(req.Inputs) > 0 {
			tokens -= len(row)
			break
		}
		req.Inputs = append(req.Inputs, corpus.EmbedInput{Tokens: row})
	}
	out, err := l.b.Embed(context.Background(), req)
	if err != nil {
		l.failed.Add(int64(len(req.Inputs)))
		return err
	}
	for i := range out {
		l.texts.Add(1)
		if out[i].Err != nil {
			l.failed.Add(1)
			err = fmt.Errorf("text of %d tokens, %s: %w", len(req.Inputs[i].Tokens), heads, out[i].Err)
		} else if heads.Has(corpus.Dense) && len(out[i].Vectors.Dense) != l.spec.Dim {
			l.failed.Add(1)
			err = fmt.Errorf("%d dimensions came back", len(out[i].Vectors.Dense))
		}
	}
	l.tokens.Add(int64(tokens))
	return err
}

// row makes a text of n tokens, or of the nearest length that the model takes.
func (l *load) row(rng *rand.Rand, n int) []uint32 {
	row := make([]uint32, min(max(n, 1), l.spec.MaxTokens))
	for i := range row {
		row[i] = uint32(4 + rng.IntN(l.spec.VocabSize-5))
	}
	row[0] = 0
	if len(row) > 1 {
		row[len(row)-1] = 2
	}
	return row
}

// sample is one look at memory, in MiB. device is 0 where there is none. rss includes what Go
// holds, for vectors on their way among others; native is the rest. budget is the tokens of a batch.
type sample struct {
	at                  time.Duration
	device, rss, native int
	budget              int
}

// watch takes samples.
type watch struct {
	start   time.Time
	every   time.Duration
	cuda    bool
	device  int
	load    *load
	reg     prometheus.Gatherer
	samples []sample
}

// between is the time between samples.
const between = time.Second

func (w *watch) run(ctx context.Context) {
	tick := time.NewTicker(between)
	defer tick.Stop()
	var told time.Duration
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s, err := w.look(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			fmt.Printf("no sample: %v\n", err)
			continue
		}
		w.samples = append(w.samples, s)
		if s.at-told >= w.every || len(w.samples) == 1 {
			told = s.at
			fmt.Printf("%4.0f s  device %s  host %5d MiB, without Go's %5d  budget %6d  texts %9d  tokens %10d\n",
				s.at.Seconds(), w.mib(s.device), s.rss, s.native, s.budget, w.load.texts.Load(), w.load.tokens.Load())
		}
	}
}

func (w *watch) mib(n int) string {
	if !w.cuda {
		return "none"
	}
	return fmt.Sprintf("%6d MiB", n)
}

func (w *watch) look(ctx context.Context) (sample, error) {
	s := sample{at: time.Since(w.start), budget: int(total(w.reg, "lockstep_embedder_budget_tokens"))}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return s, err
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			kib, err := strconv.Atoi(f[1])
			if err != nil {
				return s, err
			}
			s.rss = kib >> 10
		}
	}
	held := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(held)
	s.native = s.rss - int((held[0].Value.Uint64()-held[1].Value.Uint64())>>20)
	if !w.cuda {
		return s, nil
	}
	// All of the device: it is to have no other user meanwhile.
	out, err := exec.CommandContext(ctx, "nvidia-smi", "-i", strconv.Itoa(w.device), "--query-gpu=memory.used", "--format=csv,noheader,nounits").Output()
	if err != nil {
		return s, err
	}
	s.device, err = strconv.Atoi(strings.TrimSpace(string(out)))
	return s, err
}

// judge compares the first and the last quarter of the samples after the warming up.
func (w *watch) judge(warm time.Duration) error {
	after := w.samples
	for len(after) > 0 && after[0].at < warm {
		after = after[1:]
	}
	n := len(after) / 4
	if n == 0 {
		return fmt.Errorf("%d samples after the warming up are too few", len(after))
	}
	var failures []error
	for _, series := range []struct {
		name   string
		judged bool
		read   func(sample) int
	}{
		{"device memory", w.cuda, func(s sample) int { return s.device }},
		{"host memory (RSS)", true, func(s sample) int { return s.rss }},
		{"of it, not Go's", false, func(s sample) int { return s.native }},
	} {
		if series.name == "device memory" && !w.cuda {
			fmt.Println("device memory: none")
			continue
		}
		first, last := spread(after[:n], series.read), spread(after[len(after)-n:], series.read)
		high, rose := 0, time.Duration(0)
		for _, s := range w.samples {
			if v := series.read(s); v > high {
				high, rose = v, s.at
			}
		}
		fmt.Printf("%-18s first quarter min %d max %d last %d, last quarter min %d max %d last %d MiB (ratio of maxima %.3f); highest %d at %.0f s\n",
			series.name, first.min, first.max, first.last, last.min, last.max, last.last, float64(last.max)/float64(first.max), high, rose.Seconds())
		if series.judged && float64(last.max) > tolerance*float64(first.max) {
			failures = append(failures, fmt.Errorf("%s grew from %d to %d MiB", series.name, first.max, last.max))
		}
	}
	return errors.Join(failures...)
}

// rose tells how far a batch's budget fell and how far it came back, which it is to do.
func (w *watch) rose() error {
	var low, back sample
	for i, s := range w.samples {
		if i == 0 || s.budget < low.budget {
			low, back = s, s
		}
		if s.budget > back.budget {
			back = s
		}
	}
	fmt.Printf("budget of a batch: down to %d tokens at %.0f s, back up to %d at %.0f s\n", low.budget, low.at.Seconds(), back.budget, back.at.Seconds())
	if back.budget == low.budget {
		return errors.New("the budget never rose again")
	}
	return nil
}

type extent struct{ min, max, last int }

func spread(samples []sample, read func(sample) int) extent {
	x := extent{min: read(samples[0]), max: read(samples[0])}
	for _, s := range samples {
		x.last = read(s)
		x.min, x.max = min(x.min, x.last), max(x.max, x.last)
	}
	return x
}

// total is the sum of a metric's counters or gauges, or of its histograms' counts.
func total(reg prometheus.Gatherer, name string) float64 {
	families, err := reg.Gather()
	if err != nil {
		return math.NaN()
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return sum
}
