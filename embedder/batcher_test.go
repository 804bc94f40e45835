package embedder

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// byteTokenizer makes one token of each byte, between 0 and 2.
type byteTokenizer struct{}

func (byteTokenizer) Encode(text string) ([]uint32, error) {
	if text == "untokenisable" {
		return nil, corpus.Errorf(corpus.Invalid, "invalid_text", "no")
	}
	ids := []uint32{0}
	for i := range len(text) {
		ids = append(ids, uint32(text[i]))
	}
	return append(ids, 2), nil
}

func (byteTokenizer) Spans(text string) ([]corpus.TokenSpan, error) {
	var out []corpus.TokenSpan
	for i := range len(text) {
		out = append(out, corpus.TokenSpan{Start: i, End: i + 1})
	}
	return out, nil
}

func (byteTokenizer) Specials() (int, int) { return 1, 1 }

// scriptRunner answers each row with its length and its sum, and lets tests hold batches.
type scriptRunner struct {
	mu      sync.Mutex
	batches [][]int       // the lengths of each batch's rows
	entered chan struct{} // one for each batch that started, if not nil
	release chan struct{} // one is taken before a batch ends, if not nil
	fail    func(rows [][]uint32) error
	poison  uint32 // rows that hold this token come back as NaN
}

func (s *scriptRunner) Run(rows [][]uint32, _ corpus.Heads) ([]corpus.Vectors, error) {
	lengths := make([]int, len(rows))
	for i, r := range rows {
		lengths[i] = len(r)
	}
	s.mu.Lock()
	s.batches = append(s.batches, lengths)
	s.mu.Unlock()
	if s.entered != nil {
		s.entered <- struct{}{}
	}
	if s.release != nil {
		<-s.release
	}
	if s.fail != nil {
		if err := s.fail(rows); err != nil {
			return nil, err
		}
	}
	out := make([]corpus.Vectors, len(rows))
	for i, r := range rows {
		sum := float32(0)
		for _, id := range r {
			sum += float32(id)
		}
		if s.poison != 0 && slices.Contains(r, s.poison) {
			sum = float32(math.NaN())
		}
		out[i].Dense = []float32{float32(len(r)), sum}
	}
	return out, nil
}

func (s *scriptRunner) seen() [][]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.batches)
}

func newBatcher(t *testing.T, run Runner, cfg Config) *Batcher {
	t.Helper()
	spec := corpus.ModelSpec{Name: "test", Heads: corpus.Dense, Dim: 2, MaxTokens: 64, VocabSize: 256}
	b := New(spec, byteTokenizer{}, run, cfg, slog.New(slog.DiscardHandler), prometheus.NewPedanticRegistry())
	t.Cleanup(b.Close)
	return b
}

func texts(lane corpus.Lane, in ...string) corpus.EmbedRequest {
	req := corpus.EmbedRequest{Heads: corpus.Dense, Lane: lane}
	for _, s := range in {
		req.Inputs = append(req.Inputs, corpus.EmbedInput{Text: s})
	}
	return req
}

func TestEmbedAnswersInOrder(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	b := newBatcher(t, &scriptRunner{}, Config{BatchTokens: 128, Padded: true, Runners: 2})
	var callers sync.WaitGroup
	for range 16 {
		n := 1 + rng.IntN(40)
		in := make([]string, n)
		for i := range in {
			in[i] = strings.Repeat(string(rune('a'+rng.IntN(26))), 1+rng.IntN(62))
		}
		lane := corpus.Lane(rng.IntN(2))
		callers.Go(func() {
			out, err := b.Embed(context.Background(), texts(lane, in...))
			if err != nil {
				t.Errorf("embed: %v", err)
				return
			}
			for i, s := range in {
				want := []float32{float32(len(s) + 2), float32(len(s))*float32(s[0]) + 2}
				if !slices.Equal(out[i].Vectors.Dense, want) || out[i].Tokens != len(s)+2 || out[i].Truncated() {
					t.Errorf("input %d: got %+v, want %v", i, out[i], want)
				}
			}
		})
	}
	callers.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lanes[0].tokens != 0 || b.lanes[1].tokens != 0 || b.lanes[0].rows != 0 || b.lanes[1].rows != 0 {
		t.Errorf("weight left behind: %+v", b.lanes)
	}
}

func TestBatchesKeepTheBudgetAndLikeLengths(t *testing.T) {
	t.Parallel()
	run := &scriptRunner{entered: make(chan struct{}, 100), release: make(chan struct{}, 100)}
	b := newBatcher(t, run, Config{BatchTokens: 100, Padded: true})
	var callers sync.WaitGroup
	// The first request holds the device while the others gather.
	callers.Go(func() { _, _ = b.Embed(context.Background(), texts(corpus.Bulk, "x")) })
	<-run.entered
	in := []string{}
	for i := range 30 {
		in = append(in, strings.Repeat("y", 2+2*i))
	}
	callers.Go(func() { _, _ = b.Embed(context.Background(), texts(corpus.Bulk, in...)) })
	waitFor(t, func() bool { b.mu.Lock(); defer b.mu.Unlock(); return b.lanes[corpus.Bulk].rows == 30 })
	for range 100 {
		run.release <- struct{}{}
	}
	callers.Wait()
	rows := 0
	for _, batch := range run.seen()[1:] {
		longest := slices.Max(batch)
		if len(batch) > 1 && len(batch)*longest > 100 {
			t.Errorf("batch %v is over the budget of 100 padded tokens", batch)
		}
		if longest-slices.Min(batch) > max(8, longest/4) {
			t.Errorf("batch %v pads too much", batch)
		}
		rows += len(batch)
	}
	if rows != 30 {
		t.Errorf("ran %d rows, want 30", rows)
	}
}

// waitFor polls a condition that another goroutine reaches without a signal of its own.
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("the condition was not reached in 10 s")
		}
	}
}

func TestQueriesRunBeforeBulkAndBulkIsNotStarved(t *testing.T) {
	t.Parallel()
	run := &scriptRunner{entered: make(chan struct{}, 100), release: make(chan struct{}, 100)}
	b := newBatcher(t, run, Config{BatchTokens: 10, BatchRows: 1, AgeLimit: time.Nanosecond})
	var callers sync.WaitGroup
	callers.Go(func() { _, _ = b.Embed(context.Background(), texts(corpus.Bulk, "hold")) })
	<-run.entered
	callers.Go(func() { _, _ = b.Embed(context.Background(), texts(corpus.Bulk, "bulkbulk")) }) // 10 tokens
	waitFor(t, func() bool { b.mu.Lock(); defer b.mu.Unlock(); return b.lanes[corpus.Bulk].rows == 1 })
	callers.Go(func() {
		_, _ = b.Embed(context.Background(), texts(corpus.Query, "q", "q", "q", "q", "q", "q", "q", "q"))
	})
	waitFor(t, func() bool { b.mu.Lock(); defer b.mu.Unlock(); return b.lanes[corpus.Query].rows == 8 })
	for range 100 {
		run.release <- struct{}{}
	}
	callers.Wait()
	at := slices.IndexFunc(run.seen(), func(l []int) bool { return l[0] == 10 })
	if at < 2 || at > 1+maxQueryTurns {
		t.Errorf("bulk ran as batch %d of %v; want after some queries and after at most %d", at, run.seen(), maxQueryTurns)
	}
}

// TestQueriesRunInTheirOrder: a short query does not wait for all longer ones that come after it.
func TestQueriesRunInTheirOrder(t *testing.T) {
	t.Parallel()
	run := &scriptRunner{entered: make(chan struct{}, 100), release: make(chan struct{}, 100)}
	b := newBatcher(t, run, Config{BatchTokens: 64, BatchRows: 2, AgeLimit: time.Hour, Padded: true})
	var callers sync.WaitGroup
	ask := func(text string) {
		callers.Go(func() { _, _ = b.Embed(context.Background(), texts(corpus.Query, text)) })
	}
	waiting := func(n int) {
		waitFor(t, func() bool { b.mu.Lock(); defer b.mu.Unlock(); return b.lanes[corpus.Query].rows == n })
	}
	ask("hold")
	<-run.entered
	long := strings.Repeat("l", 30)
	for i, text := range []string{"short", long, long, "brief", long} {
		ask(text)
		waiting(i + 1)
	}
	for range 100 {
		run.release <- struct{}{}
	}
	callers.Wait()
	want := [][]int{{6}, {7, 7}, {32, 32}, {32}}
	if got := run.seen(); !slices.EqualFunc(got, want, slices.Equal) {
		t.Errorf("batches of %v; want %v", got, want)
	}
}

func TestFullQueueRefusesWhole(t *testing.T) {
	t.Parallel()
	run := &scriptRunner{entered: make(chan struct{}, 10), release: make(chan struct{}, 10)}
	b := newBatcher(t, run, Config{QueueTokens: 50})
	var callers sync.WaitGroup
	callers.Go(func() {
		if _, err := b.Embed(context.Background(), texts(corpus.Bulk, strings.Repeat("a", 40))); err != nil {
			t.Errorf("first: %v", err)
		}
	})
	<-run.entered
	_, err := b.Embed(context.Background(), texts(corpus.Bulk, strings.Repeat("b", 40)))
	var e *corpus.Error
	if !errors.As(err, &e) || e.Kind != corpus.Overloaded || e.RetryAfter <= 0 {
		t.Errorf("got %v, want overloaded with a time to retry", err)
	}
	run.release <- struct{}{}
	run.release <- struct{}{}
	if _, err := b.Embed(context.Background(), texts(corpus.Query, "other lane")); err != nil {
		t.Errorf("the query lane has its own room: %v", err)
	}
	callers.Wait()
}

func TestCancelledRowsAreDroppedBeforeTheyRun(t *testing.T) {
	t.Parallel()
	run := &scriptRunner{entered: make(chan struct{}, 10), release: make(chan struct{}, 10)}
	b := newBatcher(t, run, Config{})
	var callers sync.WaitGroup
	callers.Go(func() { _, _ = b.Embed(context.Background(), texts(corpus.Bulk, "hold")) })
	<-run.entered
	ctx, cancel := context.WithCancel(context.Background())
	left := make(chan error, 1)
	callers.Go(func() {
		_, err := b.Embed(ctx, texts(corpus.Bulk, "gone", "gone too"))
		left <- err
	})
	waitFor(t, func() bool { b.mu.Lock(); defer b.mu.Unlock(); return b.lanes[corpus.Bulk].rows == 2 })
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) || corpus.KindOf(err) != corpus.Unavailable {
		t.Errorf("got %v", err)
	}
	run.release <- struct{}{}
	run.release <- struct{}{}
	callers.Wait()
	b.Close()
	if got := run.seen(); len(got) != 1 {
		t.Errorf("batches %v ran; the cancelled rows must not", got)
	}
	if b.lanes[corpus.Bulk].tokens != 0 {
		t.Errorf("%d tokens of weight left behind", b.lanes[corpus.Bulk].tokens)
	}
}

func TestPoisonedInputFailsAlone(t *testing.T) {
	t.Parallel()
	for name, run := range map[string]*scriptRunner{
		"not finite": {poison: '!'},
		"error": {fail: func(rows [][]uint32) error {
			for _, r := range rows {
				if slices.Contains(r, '!') {
					return errors.New("bad row")
				}
			}
			return nil
		}},
		"panic": {fail: func(rows [][]uint32) error {
			for _, r := range rows {
				if slices.Contains(r, '!') {
					panic("bad row")
				}
			}
			return nil
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBatcher(t, run, Config{})
			out, err := b.Embed(context.Background(), texts(corpus.Bulk, "one", "tw!", "three", "untokenisable"))
			if err != nil {
				t.Fatal(err)
			}
			if out[0].Err != nil || out[2].Err != nil {
				t.Errorf("healthy inputs failed: %v, %v", out[0].Err, out[2].Err)
			}
			if corpus.KindOf(out[1].Err) != corpus.Internal || out[1].Vectors.Dense != nil {
				t.Errorf("poisoned input: %+v", out[1])
			}
			if corpus.KindOf(out[3].Err) != corpus.Invalid {
				t.Errorf("untokenisable input: %+v", out[3])
			}
		})
	}
}

func TestOutOfMemoryHalvesTheBudget(t *testing.T) {
	t.Parallel()
	run := &scriptRunner{fail: func(rows [][]uint32) error {
		if len(rows) > 3 {
			return corpus.Errorf(corpus.Unavailable, CodeOutOfMemory, "too big")
		}
		return nil
	}}
	b := newBatcher(t, run, Config{BatchTokens: 4096})
	in := make([]string, 16)
	for i := range in {
		in[i] = "some text"
	}
	out, err := b.Embed(context.Background(), texts(corpus.Bulk, in...))
	if err != nil {
		t.Fatal(err)
	}
	for i := range out {
		if out[i].Err != nil {
			t.Errorf("input %d: %v", i, out[i].Err)
		}
	}
	if b.budget != minBudget {
		t.Errorf("budget is %d, want it shrunk to %d", b.budget, minBudget)
	}
	// Memory that stays enough gives the budget back, never more than was configured.
	for b.budget < 4096 {
		before := b.budget
		for range regrowAfter + 1 {
			if _, err := b.Embed(context.Background(), texts(corpus.Bulk, "a")); err != nil {
				t.Fatal(err)
			}
		}
		if b.budget != 2*before {
			t.Fatalf("after %d calm batches the budget went from %d to %d", regrowAfter, before, b.budget)
		}
	}
	for range 2 * regrowAfter {
		b.regrow()
	}
	if b.budget != 4096 {
		t.Errorf("the budget grew to %d", b.budget)
	}
}

// A batch that does not fit beside another one runs alone; the budget is halved for both, not
// down to half of what the small one had.
func TestOutOfMemoryBesideAnotherBatch(t *testing.T) {
	t.Parallel()
	var running atomic.Int64
	both := make(chan struct{}, 1)
	run := &scriptRunner{fail: func(rows [][]uint32) error {
		defer running.Add(-1)
		if running.Add(1) > 1 {
			both <- struct{}{}
			return corpus.Errorf(corpus.Unavailable, CodeOutOfMemory, "too big beside the other")
		}
		if len(rows) > 1 {
			<-both
		}
		return nil
	}}
	b := newBatcher(t, run, Config{BatchTokens: 4096, Runners: 2})
	var group sync.WaitGroup
	for _, in := range [][]string{{"large", "large"}, {"s"}} {
		group.Go(func() {
			if in[0] == "s" {
				for running.Load() == 0 {
					runtime.Gosched()
				}
			}
			out, err := b.Embed(context.Background(), texts(corpus.Bulk, in...))
			if err != nil {
				t.Error(err)
				return
			}
			for i := range out {
				if out[i].Err != nil {
					t.Errorf("%s: %v", in[i], out[i].Err)
				}
			}
		})
	}
	group.Wait()
	if b.budget != 2048 {
		t.Errorf("budget is %d, want it halved to 2048", b.budget)
	}
	if got := testutil.ToFloat64(b.m.outOfMemory); got != 1 {
		t.Errorf("out of memory was counted %v times, want 1", got)
	}
}

func TestTruncate(t *testing.T) {
	t.Parallel()
	ids := []uint32{0, 10, 11, 12, 13, 2}
	for _, c := range []struct {
		limit   int
		keepEnd bool
		want    []uint32
	}{
		{6, false, ids},
		{5, false, []uint32{0, 10, 11, 12, 2}},
		{4, true, []uint32{0, 12, 13, 2}},
		{2, false, []uint32{0, 2}},
		{1, false, []uint32{0}},
	} {
		if got := Truncate(ids, c.limit, 1, 1, c.keepEnd); !slices.Equal(got, c.want) {
			t.Errorf("limit %d, keepEnd %v: got %v, want %v", c.limit, c.keepEnd, got, c.want)
		}
	}
	b := newBatcher(t, &scriptRunner{}, Config{})
	req := texts(corpus.Bulk, "abcdefgh")
	req.MaxTokens = 5
	out, err := b.Embed(context.Background(), req)
	if err != nil || out[0].Tokens != 5 || out[0].OriginalTokens != 10 || !out[0].Truncated() {
		t.Errorf("got %+v, %v", out, err)
	}
	req.RefuseLong = true
	out, err = b.Embed(context.Background(), req)
	if err != nil || corpus.CodeOf(out[0].Err) != "input_too_long" {
		t.Errorf("got %+v, %v", out, err)
	}
}

func TestWrongRequestsAreInvalid(t *testing.T) {
	t.Parallel()
	b := newBatcher(t, &scriptRunner{}, Config{})
	for name, req := range map[string]corpus.EmbedRequest{
		"no output":         {Inputs: []corpus.EmbedInput{{Text: "a"}}},
		"head it lacks":     {Inputs: []corpus.EmbedInput{{Text: "a"}}, Heads: corpus.ColBERT},
		"negative maximum":  {Inputs: []corpus.EmbedInput{{Text: "a"}}, Heads: corpus.Dense, MaxTokens: -1},
		"maximum too large": {Inputs: []corpus.EmbedInput{{Text: "a"}}, Heads: corpus.Dense, MaxTokens: 65},
	} {
		if _, err := b.Embed(context.Background(), req); corpus.KindOf(err) != corpus.Invalid {
			t.Errorf("%s: got %v", name, err)
		}
	}
	out, err := b.Embed(context.Background(), corpus.EmbedRequest{Heads: corpus.Dense,
		Inputs: []corpus.EmbedInput{{Tokens: []uint32{1, 256}}, {Tokens: []uint32{}}, {Tokens: []uint32{5}}}})
	if err != nil || corpus.CodeOf(out[0].Err) != "token_out_of_range" || corpus.CodeOf(out[1].Err) != "empty_input" || out[2].Err != nil {
		t.Errorf("got %+v, %v", out, err)
	}
}

func TestCloseFinishesWhatWasAdmitted(t *testing.T) {
	t.Parallel()
	run := &scriptRunner{entered: make(chan struct{}, 10), release: make(chan struct{}, 10)}
	b := newBatcher(t, run, Config{BatchRows: 1})
	var callers sync.WaitGroup
	callers.Go(func() {
		if out, err := b.Embed(context.Background(), texts(corpus.Bulk, "a", "b", "c")); err != nil || out[2].Err != nil {
			t.Errorf("admitted work was lost: %v", err)
		}
	})
	<-run.entered
	waitFor(t, func() bool { return b.Stalled() > 0 })
	closed := make(chan struct{})
	callers.Go(func() { b.Close(); close(closed) })
	waitFor(t, func() bool { b.mu.Lock(); defer b.mu.Unlock(); return b.closed })
	if _, err := b.Embed(context.Background(), texts(corpus.Bulk, "late")); corpus.CodeOf(err) != "shutting_down" {
		t.Errorf("got %v", err)
	}
	for range 3 {
		run.release <- struct{}{}
	}
	callers.Wait()
	<-closed
}
