package ingest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// embeds reports whether this service can make what the index holds: its model made the
// index, or callers bring the vectors.
func (s *Service) embeds(ix corpus.Index) bool {
	return ix.Fingerprint == corpus.ExternalModel || ix.Fingerprint == s.cfg.Embedder.Spec().Fingerprint
}

// memory of one batch's vectors; a ColBERT row for each token of a chunk is what makes it
// matter (unmeasured).
const batchBytes = 32 << 20

// batchSize is how many entries of an index are worked on at once.
func (s *Service) batchSize(ix corpus.Index) int {
	const tokens = 512 // of a usual chunk
	l := ix.Layout
	each := 4 * (l.Dim + 1)
	if l.Vectors.Has(corpus.ColBERT) {
		each += 4 * l.ColBERTDim * tokens
	}
	return max(1, min(s.cfg.BatchPoints, batchBytes/each))
}

// claimLoop asks the ledger for work that nobody here holds: what other instances left, what
// came back after a failure, what did not fit into memory when it was accepted.
func (s *Service) claimLoop(ctx context.Context) {
	timer := time.NewTimer(s.cfg.Poll)
	defer timer.Stop()
	for {
		more := s.claimAll(ctx)
		timer.Reset(s.cfg.Poll)
		room := s.jobs.room
		if !more {
			room = nil // nothing known to be left: room alone is no reason to look again
		}
		select {
		case <-ctx.Done():
			return
		case <-s.claimNow:
		case <-room:
		case <-timer.C:
		}
	}
}

// claimAll claims for every index as much as there is room for, and reports whether more is due.
func (s *Service) claimAll(ctx context.Context) (more bool) {
	live, err := s.cfg.Ledger.Indexes(ctx)
	if err != nil {
		if ctx.Err() == nil {
			s.log.WarnContext(ctx, "listing indexes", "err", err)
		}
		return false
	}
	s.metrics.observe(live)
	for _, l := range live {
		if l.Oldest.IsZero() || !l.Ready || !s.embeds(l.Index) || s.pauses.left(l.ID) > 0 || s.pauses.left(corpus.ID{}) > 0 {
			continue
		}
		for {
			n := s.batchSize(l.Index)
			got := s.jobs.reserve(n, 0)
			if got == 0 {
				more = true
				break
			}
			entries, err := s.cfg.Ledger.Claim(ctx, l.ID, corpus.Lease{Token: newToken(), Max: got, For: s.cfg.Lease})
			if err != nil {
				s.jobs.release(got)
				if ctx.Err() == nil {
					s.log.WarnContext(ctx, "claiming work", "err", err)
				}
				break
			}
			if len(entries) > 0 {
				s.at(StepClaimed)
			}
			s.jobs.release(got - len(entries))
			s.jobs.push(l.Index, entries, n)
			if len(entries) < got {
				break
			}
		}
	}
	return more
}

// work settles jobs until the queue closes.
func (s *Service) work(ctx context.Context) {
	for {
		j, ok := s.jobs.pop(s.batchSize)
		if !ok {
			return
		}
		s.process(ctx, j.ix, j.entries)
	}
}

// handBack returns claimed entries that nobody will work on.
func (s *Service) handBack(ctx context.Context, j job) {
	b := batch{s: s, ctx: ctx, ix: j.ix}
	for i := range j.entries {
		b.retry(&j.entries[i], 0, true, "")
	}
	s.settle(ctx, j.ix, b.results)
}

// process works on claimed entries of one index and records what became of them.
func (s *Service) process(ctx context.Context, ix corpus.Index, entries []corpus.Entry) {
	b := batch{s: s, ctx: ctx, ix: ix}
	if wait := max(s.pauses.left(ix.ID), s.pauses.left(corpus.ID{})); wait > 0 {
		for i := range entries {
			b.retry(&entries[i], wait, true, "")
		}
		s.settle(ctx, ix, b.results)
		return
	}
	stop := s.keep(ctx, ix, entries)
	begin := time.Now()
	b.run(entries)
	s.metrics.batchSeconds.Observe(time.Since(begin).Seconds())
	s.metrics.batchEntries.Observe(float64(len(entries)))
	stop()
	s.settle(ctx, ix, b.results)
}

// keep renews the entries' leases until stop is called, which waits for the renewal to end.
func (s *Service) keep(ctx context.Context, ix corpus.Index, entries []corpus.Entry) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for sleep(ctx, s.cfg.Lease/3) {
			if err := s.cfg.Ledger.Renew(ctx, ix.ID, entries, s.cfg.Lease); err != nil && ctx.Err() == nil {
				// The lease may run out: then somebody else does the work again, which is safe.
				s.log.WarnContext(ctx, "renewing leases", "err", err)
			}
		}
	}()
	return func() { cancel(); <-done }
}

// settleTries bounds how often recording results is tried before it is left to the end of the
// lease.
const settleTries = 4

// settle records results and wakes who waits for them. Where the ledger cannot be reached, the
// leases run out and the work is looked at again.
func (s *Service) settle(ctx context.Context, ix corpus.Index, results []corpus.EntryResult) {
	if len(results) == 0 {
		return
	}
	// Detached: what happened is to be recorded even while stopping.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	var progress []corpus.DocumentProgress
	var err error
	for try := range settleTries {
		begin := time.Now()
		progress, err = s.cfg.Ledger.Settle(ctx, ix, results)
		s.metrics.settleSeconds.Observe(time.Since(begin).Seconds())
		if !corpus.Retryable(err) || !sleep(ctx, backoff(try+1, s.cfg.Pause, recordTimeout)) {
			break
		}
	}
	if err != nil {
		s.log.ErrorContext(ctx, "recording finished work; it is looked at again when its lease ends", "batch_size", len(results), "err", err)
		return
	}
	s.at(StepSettled)
	again := false
	for i := range results {
		s.metrics.chunks.WithLabelValues(outcomeLabel(results[i].Outcome)).Inc()
		again = again || results[i].Outcome != corpus.EntryDone
	}
	replaced := false
	for i := range progress {
		replaced = replaced || progress[i].Serving == progress[i].Target && progress[i].Target > 1
	}
	for i := range results {
		if results[i].Outcome == corpus.EntryGivenUp { // what it failed of, only the ledger tells
			progress = append(progress, corpus.DocumentProgress{Document: results[i].Document})
		}
	}
	s.waiting.notify(progress)
	if replaced {
		signal(s.reapNow) // what the switch passed is dead now
	}
	if replaced || again {
		signal(s.claimNow) // kept points may want the new version's metadata
	}
}

func outcomeLabel(o corpus.EntryOutcome) string {
	switch o {
	case corpus.EntryDone:
		return "indexed"
	case corpus.EntryGivenUp:
		return "failed"
	case corpus.EntryRewrite:
		return "rewrite"
	default:
		return "retry"
	}
}

// batch is one worker's go at some entries of one index.
type batch struct {
	s       *Service
	ctx     context.Context
	ix      corpus.Index
	results []corpus.EntryResult
}

// item is an entry that is to be written.
type item struct {
	e       *corpus.Entry
	rewrite bool
	// trusted: nothing was ever sent for this entry before, so Completed says all there is to
	// know. Any other is marked only after its gen and meta_version were read back.
	trusted bool
	point   corpus.Point
}

func (b *batch) run(entries []corpus.Entry) {
	var items []*item
	var behind, doubtful []*corpus.Entry
	for i := range entries {
		switch e := &entries[i]; {
		case e.MetaOnly:
			behind = append(behind, e)
		case e.Rewrite:
			items = append(items, &item{e: e, rewrite: true})
		case e.First:
			items = append(items, &item{e: e, trusted: true})
		default:
			doubtful = append(doubtful, e)
		}
	}
	// An earlier claim may have written the point: then it need not be embedded again.
	for _, f := range b.look(doubtful) {
		switch {
		case !f.present:
			items = append(items, &item{e: f.e})
		case !b.own(f.e, &f.state):
			items = append(items, &item{e: f.e, rewrite: true})
		default:
			behind = append(behind, f.e) // settled below, by its meta_version alone
		}
	}
	items = b.embed(items)
	b.write(items, false)
	b.write(items, true)
	b.metadata(behind)
}

// found is an entry with what the index holds under its id.
type found struct {
	e       *corpus.Entry
	present bool
	state   corpus.PointState
}

// look reads the entries' points. Where that fails, the entries are retried and not returned.
func (b *batch) look(entries []*corpus.Entry) []found {
	if len(entries) == 0 {
		return nil
	}
	ids := make([]corpus.ID, len(entries))
	for i, e := range entries {
		ids[i] = e.Chunk
	}
	states, err := b.s.cfg.Index.ReadPoints(b.ctx, b.ix, ids, false)
	if err != nil {
		b.storeFailed(entries, err)
		return nil
	}
	b.s.pauses.worked(b.ix.ID)
	b.s.at(StepReadBack)
	byID := make(map[corpus.ID]*corpus.PointState, len(states))
	for i := range states {
		byID[states[i].ID] = &states[i]
	}
	out := make([]found, len(entries))
	for i, e := range entries {
		out[i] = found{e: e}
		if st := byID[e.Chunk]; st != nil {
			out[i].present, out[i].state = true, *st
		}
	}
	return out
}

// own reports whether a point is the very life of the chunk that the entry stands for, whatever
// its metadata. An unreadable meta_version does not make it another's.
func (b *batch) own(e *corpus.Entry, st *corpus.PointState) bool {
	for _, key := range st.Unreadable {
		if key != corpus.KeyMetaVersion && key != corpus.KeyMetadata {
			return false
		}
	}
	return st.HasOwner && st.Payload.Owner == b.s.cfg.Owner && st.Payload.Document == e.Document && st.Payload.Gen == e.Gen
}

// metaOf is the meta_version a point holds: 0 where it is unreadable, or beyond what any
// sequence reaches: neither protects the point from a guarded write.
func metaOf(st *corpus.PointState) int64 {
	for _, key := range st.Unreadable {
		if key == corpus.KeyMetaVersion || key == corpus.KeyMetadata {
			return 0
		}
	}
	if st.Payload.MetaVersion > 1<<53 {
		return 0
	}
	return st.Payload.MetaVersion
}

// embed computes what the items' points lack and completes them. Items that cannot go on are
// reported and left out.
func (b *batch) embed(items []*item) []*item {
	byHeads := map[corpus.Heads][]*item{}
	var out []*item
	for _, it := range items {
		var v corpus.Vectors
		if it.e.Vectors != nil {
			v = normalised(it.e.Vectors)
		}
		it.point.Vectors = v
		if lacks := b.ix.Layout.Vectors &^ v.Heads(); lacks != 0 {
			byHeads[lacks] = append(byHeads[lacks], it)
			continue
		}
		out = append(out, it)
	}
	for lacks, group := range byHeads {
		out = append(out, b.embedGroup(lacks, group)...)
	}
	for _, it := range out {
		b.complete(it)
	}
	if len(out) > 0 {
		b.s.at(StepEmbedded)
	}
	return out
}

func (b *batch) embedGroup(lacks corpus.Heads, group []*item) []*item {
	if b.ix.Fingerprint == corpus.ExternalModel {
		for _, it := range group {
			b.giveUp(it.e, "the chunk came without its "+lacks.String()+" vector, and the collection has no model")
		}
		return nil
	}
	req := corpus.EmbedRequest{Inputs: make([]corpus.EmbedInput, len(group)), Heads: lacks, Lane: corpus.Bulk}
	for i, it := range group {
		req.Inputs[i].Text = it.e.Text
	}
	got, err := b.s.cfg.Embedder.Embed(b.ctx, req)
	if err == nil && len(got) != len(group) {
		err = corpus.Errorf(corpus.Internal, "embedder_answer", "the embedder answered %d of %d texts", len(got), len(group))
	}
	if err != nil {
		return b.embedderFailed(lacks, group, err)
	}
	b.s.pauses.worked(corpus.ID{})
	var out []*item
	for i, it := range group {
		if got[i].Err != nil {
			b.permanent(it.e, got[i].Err)
			continue
		}
		v := &it.point.Vectors
		if lacks.Has(corpus.Dense) {
			v.Dense = got[i].Vectors.Dense
		}
		if lacks.Has(corpus.SparseHead) {
			v.Sparse = got[i].Vectors.Sparse
		}
		if lacks.Has(corpus.ColBERT) {
			v.ColBERT = got[i].Vectors.ColBERT
		}
		if missing := b.ix.Layout.Vectors &^ v.Heads(); missing != 0 || !v.Finite() {
			b.permanent(it.e, corpus.Errorf(corpus.Internal, "embedder_answer", "the embedder's answer is incomplete or not finite"))
			continue
		}
		out = append(out, it)
	}
	return out
}

func normalised(in *corpus.Vectors) corpus.Vectors {
	out := *in
	if in.Dense != nil {
		out.Dense = unit(in.Dense)
	}
	if in.ColBERT != nil {
		out.ColBERT = make([][]float32, len(in.ColBERT))
		for i, row := range in.ColBERT {
			out.ColBERT[i] = unit(row)
		}
	}
	return out
}

// complete fills in the payload.
func (b *batch) complete(it *item) {
	it.point.ID = it.e.Chunk
	it.point.Payload = corpus.Payload{
		Owner: b.s.cfg.Owner, Document: it.e.Document, Gen: it.e.Gen, MetaVersion: it.e.WantMeta,
		Bucket:   corpus.Bucket(b.ix.Salt, it.e.Chunk),
		Checksum: corpus.ChecksumVectors(&it.point.Vectors, b.ix.Layout.DenseType), Metadata: it.e.Metadata,
	}
}

// write sends the items of one kind of write, and settles them: trusted ones when the index
// completed the write, others when what they hold was read back.
func (b *batch) write(items []*item, rewrite bool) {
	var todo []*item
	for _, it := range items {
		if it.rewrite == rewrite {
			todo = append(todo, it)
		}
	}
	send := b.s.cfg.Index.InsertPoints
	if rewrite {
		send = b.s.cfg.Index.RewritePoints
	}
	var unproved []*corpus.Entry
	for _, it := range b.send(todo, send) {
		if it.trusted {
			b.done(it.e, it.e.WantMeta)
		} else {
			unproved = append(unproved, it.e)
		}
	}
	for _, f := range b.look(unproved) {
		switch {
		case !f.present:
			b.retry(f.e, b.delay(f.e), true, "the index completed the write, and the point is not there")
		case !b.own(f.e, &f.state):
			b.rewrite(f.e, "the point holds another life's content")
		default:
			b.judge(f.e, metaOf(&f.state))
		}
	}
	b.raise()
}

// send writes items and returns those the index completed; the others are reported. A batch
// that the index refuses is halved until the one that is wrong stands alone.
func (b *batch) send(items []*item, send func(context.Context, corpus.Index, []corpus.Point) error) []*item {
	if len(items) == 0 {
		return nil
	}
	points := make([]corpus.Point, len(items))
	for i, it := range items {
		points[i] = it.point
	}
	err := send(b.ctx, b.ix, points)
	if err == nil {
		b.s.pauses.worked(b.ix.ID)
		b.s.at(StepWritten)
		b.s.metrics.points.Add(float64(len(items)))
		return items
	}
	var partial *corpus.PartialError
	if errors.As(err, &partial) {
		done := make(map[corpus.ID]bool, len(partial.Done))
		for _, id := range partial.Done {
			done[id] = true
		}
		var completed, unknown []*item
		for _, it := range items {
			if why, refused := partial.Refused[it.e.Chunk]; refused {
				b.permanent(it.e, why)
			} else if done[it.e.Chunk] {
				completed = append(completed, it)
			} else {
				unknown = append(unknown, it)
			}
		}
		if len(completed) > 0 {
			b.s.at(StepWritten)
			b.s.metrics.points.Add(float64(len(completed)))
		}
		b.sendFailed(unknown, partial.Err, send, &completed)
		return completed
	}
	var completed []*item
	b.sendFailed(items, err, send, &completed)
	return completed
}

// sendFailed decides about items whose write failed as a whole.
func (b *batch) sendFailed(items []*item, err error, send func(context.Context, corpus.Index, []corpus.Point) error, completed *[]*item) {
	if len(items) == 0 {
		return
	}
	if corpus.KindOf(err) == corpus.Invalid && len(items) > 1 {
		*completed = append(*completed, b.send(items[:len(items)/2], send)...)
		*completed = append(*completed, b.send(items[len(items)/2:], send)...)
		return
	}
	entries := make([]*corpus.Entry, len(items))
	for i, it := range items {
		entries[i] = it.e
	}
	b.storeFailed(entries, err)
}

// metadata brings the metadata of points that are there up to date, and settles the entries by
// what the points then hold.
func (b *batch) metadata(entries []*corpus.Entry) {
	if len(entries) == 0 {
		return
	}
	type key struct {
		doc  corpus.ID
		meta int64
	}
	at := map[key]int{}
	var writes []corpus.MetadataWrite
	for _, e := range entries {
		k := key{e.Document, e.WantMeta}
		i, ok := at[k]
		if !ok {
			i = len(writes)
			at[k] = i
			writes = append(writes, corpus.MetadataWrite{MetaVersion: e.WantMeta, Metadata: e.Metadata})
		}
		writes[i].Points = append(writes[i].Points, e.Chunk)
	}
	if err := b.s.cfg.Index.SetMetadata(b.ctx, b.ix, writes); err != nil {
		if corpus.KindOf(err) == corpus.Invalid && len(entries) > 1 {
			b.metadata(entries[:len(entries)/2])
			b.metadata(entries[len(entries)/2:])
			return
		}
		b.storeFailed(entries, err)
		return
	}
	b.s.at(StepMetadataSent)
	for _, f := range b.look(entries) {
		switch {
		case !f.present:
			b.rewrite(f.e, "the point is missing")
		case !b.own(f.e, &f.state):
			b.rewrite(f.e, "the point holds another life's content")
		default:
			b.judge(f.e, metaOf(&f.state))
		}
	}
	b.raise()
}

// judge settles an entry by the meta_version that was read from its own point.
func (b *batch) judge(e *corpus.Entry, holds int64) {
	switch {
	case holds == e.WantMeta:
		b.done(e, holds)
	case holds < e.WantMeta:
		b.retry(e, b.delay(e), false, "the guarded write has not taken effect")
	default:
		b.results = append(b.results, corpus.EntryResult{Chunk: e.Chunk, Document: e.Document, Token: e.Token, Outcome: outcomeHigher, Meta: holds})
	}
}

// outcomeHigher stands in results for points that hold a higher meta_version than wanted, until
// raise has decided about them. It never reaches the ledger.
const outcomeHigher corpus.EntryOutcome = 255

// raise gives the documents of such points a version above it; their entries are claimed anew.
func (b *batch) raise() {
	seen := map[corpus.ID]int64{}
	for i := range b.results {
		if r := &b.results[i]; r.Outcome == outcomeHigher {
			seen[r.Document] = max(seen[r.Document], r.Meta)
		}
	}
	if len(seen) == 0 {
		return
	}
	err := b.s.cfg.Ledger.RaiseMetadata(b.ctx, b.ix.Collection, seen)
	if err != nil {
		b.s.log.WarnContext(b.ctx, "raising metadata versions", "err", err)
	}
	for i := range b.results {
		r := &b.results[i]
		if r.Outcome != outcomeHigher {
			continue
		}
		r.Outcome, r.Blameless, r.Error = corpus.EntryRetry, true, "the point held a higher meta_version"
		switch {
		case corpus.KindOf(err) == corpus.Invalid:
			r.Outcome, r.Error = corpus.EntryGivenUp, describe(err)
		case err != nil:
			r.Delay = b.s.cfg.Pause
		}
	}
}

// done, retry, rewrite, giveUp and permanent report an entry. Each entry is reported once.

func (b *batch) done(e *corpus.Entry, meta int64) {
	b.report(e, corpus.EntryResult{Outcome: corpus.EntryDone, Meta: meta})
}

func (b *batch) retry(e *corpus.Entry, delay time.Duration, blameless bool, why string) {
	if !blameless && e.Attempts >= b.s.cfg.Attempts {
		b.giveUp(e, why)
		return
	}
	b.report(e, corpus.EntryResult{Outcome: corpus.EntryRetry, Delay: delay, Blameless: blameless, Error: why})
}

func (b *batch) rewrite(e *corpus.Entry, why string) {
	if e.Attempts >= b.s.cfg.Attempts {
		b.giveUp(e, why)
		return
	}
	var delay time.Duration
	if e.Attempts > 1 {
		delay = b.delay(e)
	}
	b.report(e, corpus.EntryResult{Outcome: corpus.EntryRewrite, Delay: delay, Error: why})
}

func (b *batch) giveUp(e *corpus.Entry, why string) {
	b.s.log.WarnContext(b.ctx, "entry given up", "chunk_id", e.Chunk.String(), "doc_id", e.Document.String(), "attempts", e.Attempts, "reason", why)
	b.report(e, corpus.EntryResult{Outcome: corpus.EntryGivenUp, Error: why})
}

func (b *batch) report(e *corpus.Entry, r corpus.EntryResult) {
	r.Chunk, r.Document, r.Token = e.Chunk, e.Document, e.Token
	b.results = append(b.results, r)
}

// permanent reports an entry that failed by itself: wrong input never works, the rest is tried
// again a few times, and for as long as it takes where waiting may cure it.
func (b *batch) permanent(e *corpus.Entry, err error) {
	switch corpus.KindOf(err) {
	case corpus.Invalid:
		b.giveUp(e, describe(err))
	case corpus.Overloaded, corpus.Unavailable:
		b.retry(e, max(b.delay(e), retryAfter(err)), true, describe(err))
	default:
		b.retry(e, b.delay(e), false, describe(err))
	}
}

// storeFailed reports entries whose index call failed. An index that cannot answer, or that is
// lost, is no reason to give up: reconcile or an operator brings it back.
func (b *batch) storeFailed(entries []*corpus.Entry, err error) {
	if len(entries) == 0 {
		return
	}
	switch corpus.KindOf(err) {
	case corpus.Overloaded, corpus.Unavailable, corpus.NotFound, corpus.Conflict:
		delay := b.s.pauses.failed(b.ix.ID, retryAfter(err))
		b.s.metrics.storeFailures.Inc()
		b.s.log.WarnContext(b.ctx, "the index does not answer; its work waits", "index", b.ix.QdrantName, "batch_size", len(entries), "pause", delay, "err", err)
		for _, e := range entries {
			b.retry(e, delay, true, describe(err))
		}
	default:
		for _, e := range entries {
			b.permanent(e, err)
		}
	}
}

// embedderFailed decides about texts whose request failed as a whole, and returns those that
// could be embedded after all.
func (b *batch) embedderFailed(lacks corpus.Heads, group []*item, err error) []*item {
	kind := corpus.KindOf(err)
	if kind == corpus.Invalid && len(group) > 1 {
		// One of the texts may be at fault: alone, it fails alone.
		out := b.embedGroup(lacks, group[:len(group)/2:len(group)/2])
		return append(out, b.embedGroup(lacks, group[len(group)/2:])...)
	}
	var delay time.Duration
	if kind == corpus.Overloaded || kind == corpus.Unavailable {
		delay = b.s.pauses.failed(corpus.ID{}, retryAfter(err))
		b.s.log.InfoContext(b.ctx, "the embedder does not answer; its work waits", "batch_size", len(group), "pause", delay, "err", err)
	}
	for _, it := range group {
		if delay > 0 {
			b.retry(it.e, delay, true, describe(err))
		} else {
			b.permanent(it.e, err)
		}
	}
	return nil
}

// delay before an entry's next try.
func (b *batch) delay(e *corpus.Entry) time.Duration {
	return backoff(e.Attempts, b.s.cfg.Pause, 1500*b.s.cfg.Pause)
}

func retryAfter(err error) time.Duration {
	var e *corpus.Error
	if errors.As(err, &e) {
		return e.RetryAfter
	}
	return 0
}

// describe is what the ledger and callers are told about an error: its detail, never a text.
func describe(err error) string {
	var e *corpus.Error
	if errors.As(err, &e) && e.Detail != "" {
		if e.Code != "" {
			return fmt.Sprintf("%s (%s)", e.Detail, e.Code)
		}
		return e.Detail
	}
	return "internal error"
}
