package embedder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Tokenizer cuts text into the model's tokens. It must be safe for concurrent use.
type Tokenizer interface {
	// Encode returns the token ids of the whole text, special tokens included, not truncated.
	// An error is the text's own fault.
	Encode(text string) ([]uint32, error)
	// Spans returns the byte range of each token of the text, special tokens excluded.
	Spans(text string) ([]corpus.TokenSpan, error)
	// Specials returns how many special tokens open and close an encoded text.
	Specials() (opening, closing int)
}

// Runner computes vectors. Run is called from several goroutines at once if Config.Runners
// says so; it blocks until the device is done and owns rows until then. It returns one
// Vectors for each row, owned by the caller, or an error for the whole batch. A device that
// ran out of memory is reported as an error of code "device_out_of_memory".
type Runner interface {
	Run(rows [][]uint32, heads corpus.Heads) ([]corpus.Vectors, error)
}

// CodeOutOfMemory is the error code by which a [Runner] reports that the batch did not fit.
const CodeOutOfMemory = "device_out_of_memory"

// Config bounds the batcher. Zero fields take the defaults of [Config.withDefaults].
type Config struct {
	// BatchTokens is the token budget of one batch: padded tokens if Padded, else real ones.
	BatchTokens int
	// BatchRows bounds the texts of one batch.
	BatchRows int
	// Padded is true for graphs that pad each batch to its longest row.
	Padded bool
	// Runners is how many batches run at once.
	Runners int
	// QueueTokens bounds the tokens waiting or running, for each lane.
	QueueTokens int
	// AgeLimit is how long a bulk row may be passed over in favour of better-fitting ones. Queries
	// run in the order in which they came, each batch with those that fit its oldest.
	AgeLimit time.Duration
	// Enter, when not nil, is called by each runner on the thread that it keeps until it ends.
	Enter func() error
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

func (c Config) withDefaults() Config {
	if c.BatchTokens <= 0 {
		// Best on two CPU cores with fp32 MiniLM: 12,200 tokens/s, and 10,100 with 2,048.
		c.BatchTokens = 512
	}
	if c.BatchRows <= 0 {
		c.BatchRows = 256 // unmeasured; bounds the cost of one failed batch's retries
	}
	if c.Runners <= 0 {
		c.Runners = 1
	}
	if c.QueueTokens <= 0 {
		// About ten seconds of work for two CPU cores (MiniLM, 10,000 tokens/s measured), or
		// 16 batches of the budget, whichever is more.
		c.QueueTokens = max(1<<18, 16*c.BatchTokens)
	}
	if c.AgeLimit <= 0 {
		c.AgeLimit = 500 * time.Millisecond // unmeasured
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

// Batcher is the embedder the other rooms use. All methods are safe for concurrent use.
type Batcher struct {
	spec   corpus.ModelSpec
	tok    Tokenizer
	run    Runner
	cfg    Config
	log    *slog.Logger
	m      *metrics
	tokSem *semaphore.Weighted

	mu      sync.Mutex
	wake    *sync.Cond
	closed  bool
	lanes   [2]lane
	budget  int // current token budget; halved when the device runs out of memory
	calm    int // batches that ran since the budget last changed
	bulkRun int // query batches run since bulk last had a turn

	// device is held for reading by a run, for writing by one that has to be alone there.
	device sync.RWMutex
	rate   atomic.Uint64 // float64 bits: tokens per second, moving average
	began  []atomic.Int64
	owners sync.WaitGroup
}

// row is one input on its way. The request's goroutine reads out after done is closed.
type row struct {
	ids   []uint32
	heads corpus.Heads
	req   *request
	at    time.Time
	slot  int
	taken bool
}

type request struct {
	ctx     context.Context // checked when a batch is formed: the caller may have left
	out     []corpus.Embedding
	left    atomic.Int64
	done    chan struct{}
	lane    corpus.Lane
	pending atomic.Int64 // tokens still counted against the lane
}

// New starts cfg.Runners goroutines, which [Batcher.Close] stops.
func New(spec corpus.ModelSpec, tok Tokenizer, run Runner, cfg Config, log *slog.Logger, reg prometheus.Registerer) *Batcher {
	cfg = cfg.withDefaults()
	b := &Batcher{
		spec: spec, tok: tok, run: run, cfg: cfg, log: log.With("component", "embedder"),
		tokSem: semaphore.NewWeighted(int64(runtime.GOMAXPROCS(0))),
		budget: cfg.BatchTokens,
		began:  make([]atomic.Int64, cfg.Runners),
	}
	b.m = newMetrics(reg, b)
	b.wake = sync.NewCond(&b.mu)
	for i := range b.lanes {
		b.lanes[i].sets = map[corpus.Heads]*set{}
	}
	for i := range cfg.Runners {
		b.owners.Add(1)
		go b.work(i)
	}
	return b
}

// Spec returns what the model is and can do.
func (b *Batcher) Spec() corpus.ModelSpec { return b.spec }

// Tokens returns the byte spans of the text's tokens, special tokens excluded.
func (b *Batcher) Tokens(ctx context.Context, text string) ([]corpus.TokenSpan, error) {
	if err := b.tokSem.Acquire(ctx, 1); err != nil {
		return nil, leftEarly(err)
	}
	defer b.tokSem.Release(1)
	return b.tok.Spans(text)
}

// Tokenize returns the text's token ids, special tokens included, not truncated.
func (b *Batcher) Tokenize(ctx context.Context, text string) ([]uint32, error) {
	if err := b.tokSem.Acquire(ctx, 1); err != nil {
		return nil, leftEarly(err)
	}
	defer b.tokSem.Release(1)
	return b.tok.Encode(text)
}

// Embed returns one Embedding for each input, in order; an input that fails carries its own
// Err. The call fails as a whole when the request is wrong (Invalid), the queue is full
// (Overloaded, with RetryAfter), the batcher is closing (Unavailable) or ctx ends.
func (b *Batcher) Embed(ctx context.Context, req corpus.EmbedRequest) ([]corpus.Embedding, error) {
	if err := b.check(req); err != nil {
		return nil, err
	}
	if len(req.Inputs) == 0 {
		return nil, nil
	}
	r := &request{ctx: ctx, out: make([]corpus.Embedding, len(req.Inputs)), done: make(chan struct{}), lane: req.Lane}
	estimate := 0
	for _, in := range req.Inputs {
		estimate += b.estimate(in, req)
	}
	if err := b.admit(r, estimate); err != nil {
		return nil, err
	}
	rows, err := b.tokenise(ctx, r, req)
	if err != nil {
		b.release(r)
		return nil, err
	}
	if len(rows) == 0 {
		b.release(r)
		return r.out, nil
	}
	if err := b.enqueue(r, rows); err != nil {
		b.release(r)
		return nil, err
	}
	select {
	case <-r.done:
		return r.out, nil
	case <-ctx.Done():
		// The rows are skipped when their batch is formed; what runs already, finishes
		// without us, so r.out must not be read any more.
		b.release(r)
		return nil, leftEarly(ctx.Err())
	}
}

func (b *Batcher) check(req corpus.EmbedRequest) error {
	if req.Heads == 0 {
		return corpus.Errorf(corpus.Invalid, "no_output", "no output was asked for")
	}
	if missing := req.Heads &^ b.spec.Heads; missing != 0 {
		return corpus.Errorf(corpus.Invalid, "output_unsupported", "the model %s has no %s output; it has %s", b.spec.Name, missing, b.spec.Heads)
	}
	if req.MaxTokens < 0 || req.MaxTokens > b.spec.MaxTokens {
		return corpus.Errorf(corpus.Invalid, "max_length_out_of_range", "max_length must be 1 to %d, the model's maximum", b.spec.MaxTokens)
	}
	return nil
}

// estimate bounds a text's tokens before it is tokenised: no vocabulary in use has more
// than one token a byte.
func (b *Batcher) estimate(in corpus.EmbedInput, req corpus.EmbedRequest) int {
	limit := b.spec.MaxTokens
	if req.MaxTokens > 0 {
		limit = req.MaxTokens
	}
	if in.Tokens != nil {
		return min(len(in.Tokens), limit)
	}
	return min(len(in.Text)/2+3, limit)
}

// admit takes the request's weight, whole or not at all. An empty lane takes anything, so a
// request above the limit is served alone rather than never.
func (b *Batcher) admit(r *request, tokens int) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return corpus.Errorf(corpus.Unavailable, "shutting_down", "the embedder is shutting down")
	}
	l := &b.lanes[r.lane]
	if l.tokens > 0 && l.tokens+tokens > b.cfg.QueueTokens {
		b.m.rejected.WithLabelValues("queue_full").Inc()
		wait := time.Second
		if rate := math.Float64frombits(b.rate.Load()); rate > 0 {
			wait = min(max(wait, time.Duration(float64(l.tokens)/2/rate*float64(time.Second))), 30*time.Second)
		}
		return &corpus.Error{Kind: corpus.Overloaded, Code: "overloaded", RetryAfter: wait,
			Detail: fmt.Sprintf("the embedding queue is full (%d tokens wait); send less at once or retry later", l.tokens)}
	}
	l.tokens += tokens
	r.pending.Store(int64(tokens))
	return nil
}

// release gives back what the request still holds of its lane.
func (b *Batcher) release(r *request) {
	b.mu.Lock()
	b.lanes[r.lane].tokens -= int(r.pending.Swap(0))
	b.mu.Unlock()
}

// textsATurn is how many texts a worker tokenises at most before another request may have its core:
// about a millisecond of passages of 128 tokens.
const textsATurn = 8

func (b *Batcher) tokenise(ctx context.Context, r *request, req corpus.EmbedRequest) ([]*row, error) {
	rows := make([]*row, len(req.Inputs))
	one := func(i int) {
		ids, original, err := b.encode(req.Inputs[i], req)
		if err != nil {
			r.out[i].Err = err
			return
		}
		r.out[i].Tokens, r.out[i].OriginalTokens = len(ids), original
		rows[i] = &row{ids: ids, heads: req.Heads, req: r, slot: i}
	}
	// A worker for each core at most; the semaphore shares the cores between requests. In a
	// large request a worker keeps its core for a few texts: changing hands after each cost 4 %
	// of the path's rate.
	workers := min(len(req.Inputs), runtime.GOMAXPROCS(0))
	turn := min(max(1, len(req.Inputs)/(4*workers)), textsATurn)
	var next atomic.Int64
	var group sync.WaitGroup
	loop := func() {
		for {
			from := int(next.Add(int64(turn))) - turn
			if from >= len(req.Inputs) || b.tokSem.Acquire(ctx, 1) != nil {
				return
			}
			for i := from; i < min(from+turn, len(req.Inputs)); i++ {
				one(i)
			}
			b.tokSem.Release(1)
		}
	}
	for range workers - 1 {
		group.Go(loop)
	}
	loop()
	group.Wait()
	if err := ctx.Err(); err != nil {
		return nil, leftEarly(err)
	}
	kept := rows[:0]
	for _, w := range rows {
		if w != nil {
			kept = append(kept, w)
		}
	}
	return kept, nil
}

// encode returns the ids to run and how many there were before truncation.
func (b *Batcher) encode(in corpus.EmbedInput, req corpus.EmbedRequest) (ids []uint32, original int, err error) {
	if in.Tokens != nil {
		for i, id := range in.Tokens {
			if int(id) >= b.spec.VocabSize {
				return nil, 0, corpus.Errorf(corpus.Invalid, "token_out_of_range",
					"token %d is %d; the model's ids are 0 to %d", i, id, b.spec.VocabSize-1)
			}
		}
		ids = in.Tokens
	} else if ids, err = b.tok.Encode(in.Text); err != nil {
		return nil, 0, err
	}
	if len(ids) == 0 {
		return nil, 0, corpus.Errorf(corpus.Invalid, "empty_input", "the input has no tokens")
	}
	limit := b.spec.MaxTokens
	if req.MaxTokens > 0 {
		limit = req.MaxTokens
	}
	original = len(ids)
	if original <= limit {
		return ids, original, nil
	}
	if req.RefuseLong {
		return nil, 0, corpus.Errorf(corpus.Invalid, "input_too_long", "the text has %d tokens; at most %d are allowed", original, limit)
	}
	b.m.truncated.Inc()
	opening, closing := b.tok.Specials()
	return Truncate(ids, limit, opening, closing, req.KeepEnd), original, nil
}

// Truncate cuts ids to limit tokens, keeping the opening and closing special tokens in
// place, from the right, or from the left when keepEnd. A limit too small for the special
// tokens keeps the opening ones first. ids is not changed.
func Truncate(ids []uint32, limit, opening, closing int, keepEnd bool) []uint32 {
	if len(ids) <= limit {
		return ids
	}
	opening = min(opening, limit)
	closing = min(closing, limit-opening)
	body := limit - opening - closing
	inner := ids[opening : len(ids)-closing]
	if keepEnd {
		inner = inner[len(inner)-body:]
	} else {
		inner = inner[:body]
	}
	out := make([]uint32, 0, limit)
	out = append(out, ids[:opening]...)
	out = append(out, inner...)
	return append(out, ids[len(ids)-closing:]...)
}

func (b *Batcher) enqueue(r *request, rows []*row) error {
	exact := 0
	for _, w := range rows {
		exact += len(w.ids)
	}
	now := b.cfg.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return corpus.Errorf(corpus.Unavailable, "shutting_down", "the embedder is shutting down")
	}
	l := &b.lanes[r.lane]
	l.tokens += exact - int(r.pending.Swap(int64(exact)))
	r.left.Store(int64(len(rows)))
	for _, w := range rows {
		w.at = now
		l.add(w)
	}
	b.wake.Broadcast()
	return nil
}

// work runs batches until the batcher is closed and drained.
func (b *Batcher) work(self int) {
	defer b.owners.Done()
	// On a GPU ONNX Runtime keeps its plans for long texts by thread, without a bound: one thread
	// for each runner, rather than whichever it wakes on, plans each shape once and keeps it once.
	// The thread is not given back, for Enter may have changed it: it ends with the runner.
	runtime.LockOSThread()
	if b.cfg.Enter != nil {
		if err := b.cfg.Enter(); err != nil {
			b.log.Warn("a runner goes on with its thread as it is", "err", err)
		}
	}
	for {
		b.mu.Lock()
		var batch []*row
		for {
			if batch = b.next(); len(batch) > 0 || b.closed && b.idle() {
				break
			}
			b.wake.Wait()
		}
		b.mu.Unlock()
		if len(batch) == 0 {
			return
		}
		b.began[self].Store(b.cfg.Now().UnixNano())
		b.execute(batch)
		b.began[self].Store(0)
	}
}

func (b *Batcher) idle() bool { return b.lanes[0].rows == 0 && b.lanes[1].rows == 0 }

// maxQueryTurns is how many query batches may pass a waiting bulk row that is older than
// the age limit: bulk then gets at least one batch in five. Unmeasured.
const maxQueryTurns = 4

// next forms a batch, or returns nil when nothing waits. Called with mu held.
func (b *Batcher) next() []*row {
	now := b.cfg.Now()
	query, bulk := &b.lanes[corpus.Query], &b.lanes[corpus.Bulk]
	for !b.idle() {
		l := query
		if query.rows == 0 || b.bulkRun >= maxQueryTurns && bulk.rows > 0 && bulk.waited(now) > b.cfg.AgeLimit {
			l = bulk
		}
		if l == bulk {
			b.bulkRun = 0
		} else {
			b.bulkRun++
		}
		passedOver := b.cfg.AgeLimit
		if l == query {
			passedOver = 0 // somebody waits for each of them
		}
		batch := l.take(shape{budget: b.budget, rows: b.cfg.BatchRows, padded: b.cfg.Padded}, now, passedOver)
		live := batch[:0]
		for _, w := range batch {
			if w.req.ctx.Err() != nil {
				b.m.dropped.Inc() // the caller left; its weight went back when it did
				continue
			}
			live = append(live, w)
		}
		if len(live) > 0 {
			return live
		}
	}
	return nil
}

// execute runs a batch, halving it while the device has too little memory, and retrying its
// members alone when it fails, so that one bad input fails alone.
func (b *Batcher) execute(batch []*row) {
	start := b.cfg.Now()
	rows := make([][]uint32, len(batch))
	real, longest := 0, 0
	for i, w := range batch {
		rows[i] = w.ids
		real += len(w.ids)
		longest = max(longest, len(w.ids))
		b.m.wait.Observe(start.Sub(w.at).Seconds())
	}
	out, err := b.try(rows, batch[0].heads)
	took := b.cfg.Now().Sub(start)
	if err == nil {
		b.m.batch(len(batch), real, longest, b.cfg.Padded, took)
		b.learn(real, took)
		b.regrow()
		for i, w := range batch {
			if !out[i].Finite() {
				b.alone(w, len(batch) > 1, errNotFinite())
				continue
			}
			b.finish(w, out[i], nil)
		}
		return
	}
	if corpus.CodeOf(err) == CodeOutOfMemory && len(batch) > 1 {
		b.shrink(real / 2)
		b.execute(batch[:len(batch)/2])
		b.execute(batch[len(batch)/2:])
		return
	}
	b.m.failed.Inc()
	b.log.Warn("batch failed, its members are tried one by one", "batch_size", len(batch), "tokens", real, "err", err)
	for _, w := range batch {
		b.alone(w, len(batch) > 1, err)
	}
}

// alone gives a row a run of its own, if retry, and its own error.
func (b *Batcher) alone(w *row, retry bool, cause error) {
	if retry {
		out, err := b.try([][]uint32{w.ids}, w.heads)
		if err == nil && out[0].Finite() {
			b.finish(w, out[0], nil)
			return
		}
		if cause = err; cause == nil {
			cause = errNotFinite()
		}
	}
	b.m.poisoned.Inc()
	var known *corpus.Error
	if !errors.As(cause, &known) {
		cause = corpus.Wrap(corpus.Internal, "embedding_failed", "the model could not embed this input", cause)
	}
	b.finish(w, corpus.Vectors{}, cause)
}

func errNotFinite() error {
	return corpus.Errorf(corpus.Internal, "not_finite", "the model produced values that are not finite for this input")
}

// try runs a batch, beside others if it can. One that finds too little memory there is tried
// again alone, so that a large neighbour cannot make a small batch fail.
func (b *Batcher) try(rows [][]uint32, heads corpus.Heads) ([]corpus.Vectors, error) {
	b.mu.Lock()
	budget := b.budget
	b.mu.Unlock()
	b.device.RLock()
	out, err := b.guard(rows, heads)
	b.device.RUnlock()
	if b.cfg.Runners == 1 || corpus.CodeOf(err) != CodeOutOfMemory {
		return out, err
	}
	b.shrink(budget / 2)
	b.device.Lock()
	defer b.device.Unlock()
	return b.guard(rows, heads)
}

// guard turns a panic of the runner and a short answer into errors.
func (b *Batcher) guard(rows [][]uint32, heads corpus.Heads) (out []corpus.Vectors, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = corpus.Wrap(corpus.Internal, "embedding_failed", "the model's runtime failed", fmt.Errorf("panic: %v", p))
		}
	}()
	out, err = b.run.Run(rows, heads)
	if err == nil && len(out) != len(rows) {
		err = fmt.Errorf("the runner answered %d rows of %d", len(out), len(rows))
	}
	return out, err
}

// minBudget is the smallest token budget that shrinking may leave: one long text must still run.
const minBudget = 512

// regrowAfter is how many batches have to run before a shrunk budget is doubled again: a neighbour
// on the device may have gone, and if not, a guess that was wrong costs one retry in as many
// batches: on an H200 with far too little memory one in 465, at 0.92 of the tokens a second.
const regrowAfter = 512

// regrow counts a batch that ran, and raises a shrunk budget in time.
func (b *Batcher) regrow() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.budget >= b.cfg.BatchTokens {
		return
	}
	if b.calm++; b.calm >= regrowAfter {
		b.budget, b.calm = min(b.cfg.BatchTokens, 2*b.budget), 0
	}
}

// shrink lowers the budget to tokens, unless it is lower by now.
func (b *Batcher) shrink(tokens int) {
	b.mu.Lock()
	b.budget = min(b.budget, max(minBudget, tokens))
	b.calm = 0
	now := b.budget
	b.mu.Unlock()
	b.m.outOfMemory.Inc()
	b.log.Warn("the device ran out of memory; the batch budget is halved", "batch_tokens", now)
}

func (b *Batcher) learn(tokens int, took time.Duration) {
	if took <= 0 {
		return
	}
	rate := float64(tokens) / took.Seconds() * float64(b.cfg.Runners)
	if old := math.Float64frombits(b.rate.Load()); old > 0 {
		rate = 0.9*old + 0.1*rate
	}
	b.rate.Store(math.Float64bits(rate))
}

func (b *Batcher) finish(w *row, v corpus.Vectors, err error) {
	e := &w.req.out[w.slot]
	e.Vectors, e.Err = v, err
	// The caller may have left meanwhile and taken its whole weight with it.
	b.mu.Lock()
	if p := w.req.pending.Load(); p > 0 {
		n := min(p, int64(len(w.ids)))
		w.req.pending.Store(p - n)
		b.lanes[w.req.lane].tokens -= int(n)
	}
	b.mu.Unlock()
	if w.req.left.Add(-1) == 0 {
		close(w.req.done)
	}
}

// Stalled returns how long the slowest batch has been running: readiness fails on a device
// that has stopped answering.
func (b *Batcher) Stalled() time.Duration {
	var longest time.Duration
	now := b.cfg.Now().UnixNano()
	for i := range b.began {
		if t := b.began[i].Load(); t > 0 {
			longest = max(longest, time.Duration(now-t))
		}
	}
	return longest
}

// Warm runs one batch of each of the given lengths, so that the first caller does not pay
// for the device's preparations. It returns the first error.
func (b *Batcher) Warm(ctx context.Context, lengths ...int) error {
	for _, n := range lengths {
		ids := make([]uint32, min(n, b.spec.MaxTokens))
		out, err := b.Embed(ctx, corpus.EmbedRequest{
			Inputs: []corpus.EmbedInput{{Tokens: ids}}, Heads: b.spec.Heads, Lane: corpus.Query})
		if err == nil {
			err = out[0].Err
		}
		if err != nil {
			return fmt.Errorf("warming the model up with %d tokens: %w", n, err)
		}
	}
	return nil
}

// Close refuses new requests, finishes those admitted, and returns when the runners have
// stopped. It may be called more than once.
func (b *Batcher) Close() {
	b.mu.Lock()
	b.closed = true
	b.wake.Broadcast()
	b.mu.Unlock()
	b.owners.Wait()
}

func leftEarly(err error) error {
	return corpus.Wrap(corpus.Unavailable, "embedding_cancelled", "the embedding was not finished in time", err)
}
