package campaign

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/lockstep-db/lockstep/ingest"
	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/internal/faults"
	"github.com/lockstep-db/lockstep/search"
)

// indexFaults and ledgerFaults are what goes wrong, each as likely. Not among them: answers that
// blame the request, and waits of whole seconds; scenarios_test.go plays those.
var indexFaults = []faults.Fault{
	{Kind: faults.DropRequest}, {Kind: faults.DropReply}, {Kind: faults.Delay, For: 10 * time.Millisecond}, {Kind: faults.Hold}, {Kind: faults.Hold},
	{Kind: faults.Duplicate}, {Kind: faults.DuplicateLate}, {Kind: faults.DuplicateLate}, {Kind: faults.Reorder}, {Kind: faults.Half}, {Kind: faults.Half},
	{Kind: faults.Refuse, Class: "unavailable"}, {Kind: faults.Refuse, Class: "internal"}, {Kind: faults.RefuseAfter, Class: "internal"},
	{Kind: faults.RefuseAfter, Class: "timeout"},
	{Kind: faults.WaitTimeout}, {Kind: faults.WaitTimeoutLate}, {Kind: faults.WaitTimeoutLate}, {Kind: faults.Acknowledged},
	{Kind: faults.Disconnect}, {Kind: faults.DisconnectAfter},
}

var ledgerFaults = []faults.Fault{
	{Kind: faults.DropRequest}, {Kind: faults.DropReply}, {Kind: faults.DropReply}, {Kind: faults.Hold}, {Kind: faults.Delay}, {Kind: faults.Half},
	{Kind: faults.Refuse, Class: "serialization"}, {Kind: faults.Refuse, Class: "deadlock"}, {Kind: faults.Refuse, Class: "statement_timeout"},
	{Kind: faults.Refuse, Class: "fatal_shutdown"}, {Kind: faults.Disconnect}, {Kind: faults.DisconnectAfter},
}

// profile is a history's character, drawn from its seed.
type profile struct {
	purge    bool // tombstones go at once
	declared bool // the collection is made first, with filterable fields
	loss     string
	index    float64 // share of requests at fault
	ledger   float64
	mortal   bool // instances die
	arrival  int  // percent: how soon late requests arrive
}

func draw(d *dice) profile {
	p := profile{purge: d.chance(30), declared: d.chance(75), mortal: d.chance(70)}
	p.index = []float64{0, 0.05, 0.15, 0.3}[d.n(4)]
	p.ledger = []float64{0, 0.01, 0.03}[d.n(3)]
	p.arrival = []int{0, 2, 25}[d.n(3)]
	p.loss = []string{"", "", "", "", "", "some", "all", "collection", "strays", "damage"}[d.n(10)]
	return p
}

// history is one run of clients, instances, faults and kills against one collection.
type history struct {
	t    *testing.T
	r    *rig
	seed uint64
	d    *dice
	p    profile
	m    *model
	name string
	docs []string

	mu        sync.Mutex
	instances []*instance
	ended     sync.WaitGroup // of instances that were replaced
	stats     stats
}

// stats is what a history reached.
type stats struct {
	histories, ops, acked, searches, reconciles int
	faults, kills, late, findings, repaired     int
	slowest                                     time.Duration
}

func (s *stats) add(o stats) {
	s.histories += o.histories
	s.ops += o.ops
	s.acked += o.acked
	s.searches += o.searches
	s.reconciles += o.reconciles
	s.faults += o.faults
	s.kills += o.kills
	s.late += o.late
	s.findings += o.findings
	s.repaired += o.repaired
	s.slowest = max(s.slowest, o.slowest)
}

func newHistory(t *testing.T, r *rig, seed uint64) *history {
	d := newDice(seed)
	h := &history{t: t, r: r, seed: seed, d: d, p: draw(d), name: fmt.Sprintf("h%d", seed), docs: []string{"p", "q", "r/s", "t u"}}
	// With the index that a collection lost go its tombstones, and a document's versions begin anew.
	h.m = newModel(h.docs, !h.p.purge && h.p.loss != "collection")
	r.journal.begin(h.m.time)
	return h
}

func (h *history) fail(format string, args ...any) {
	h.t.Helper()
	h.t.Errorf("seed %d %+v: %s", h.seed, h.p, fmt.Sprintf(format, args...))
}

func (h *history) count(f func(s *stats)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f(&h.stats)
}

// tempo of instances in a history: everything is short, so that leases run out and sweeps run
// while clients are at work.
func (h *history) tempo(mortal bool) tempo {
	t := tempo{
		lease: 120 * time.Millisecond, poll: 30 * time.Millisecond, grace: time.Hour, stamp: 60 * time.Millisecond,
		workers: 2, batch: 1 + h.d.n(4), queue: 1 + h.d.n(8), accept: 1 + h.d.n(4), scrubRepairs: h.d.chance(50),
	}
	if h.p.purge {
		t.grace = time.Millisecond
	}
	if h.d.chance(30) {
		t.quick = 20 * time.Millisecond
	}
	if mortal {
		t.dieAt, t.dieNth = ingest.Steps[h.d.n(len(ingest.Steps))], int64(1+h.d.n(4))
	}
	return t
}

// spawn starts an instance on a host with the history's faults.
func (h *history) spawn() {
	host := h.r.borrow(h.t)
	host.valve.set(faults.NewRandom(h.d.seed(), h.p.index, indexFaults...), faults.NewRandom(h.d.seed(), h.p.ledger, ledgerFaults...), false)
	h.mu.Lock()
	mortal := h.p.mortal && h.stats.kills < maxKills && h.d.chance(60)
	h.mu.Unlock()
	i := h.r.start(host, h.tempo(mortal), h.d)
	h.mu.Lock()
	h.instances = append(h.instances, i)
	h.mu.Unlock()
}

// pick returns a living instance. Those that died are replaced.
func (h *history) pick() *instance {
	h.mu.Lock()
	died := 0
	h.instances = slices.DeleteFunc(h.instances, func(i *instance) bool {
		if !i.killed() {
			return false
		}
		died++
		h.stats.kills++
		h.ended.Go(i.stop)
		return true
	})
	h.mu.Unlock()
	for range died {
		h.spawn()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.instances) == 0 {
		return nil // somebody else is replacing it
	}
	return h.instances[h.d.n(len(h.instances))]
}

const (
	clients      = 3
	opsPerClient = 9
	// maxKills bounds the restarts of a history.
	maxKills = 4
	// waitTimeout ends waits for what the faults may never let happen, opTimeout all the rest.
	waitTimeout = 500 * time.Millisecond
	opTimeout   = 2 * time.Second
)

func (h *history) run() stats {
	begin := time.Now()
	if h.p.declared {
		h.declare()
	}
	h.spawn()
	h.spawn()
	var working sync.WaitGroup
	for range clients {
		working.Go(func() {
			for range opsPerClient {
				h.operation()
			}
		})
	}
	over, quiet := make(chan struct{}), make(chan struct{})
	var beside, releasing sync.WaitGroup
	beside.Go(func() { h.every(over, 3*time.Millisecond, func() { h.r.clock.Advance(3 * time.Millisecond) }) })
	beside.Go(func() { h.every(over, 20*time.Millisecond, func() { h.search(nil) }) })
	// It ends last: what becomes due may need a lock that something held has.
	releasing.Go(func() {
		h.every(quiet, 3*time.Millisecond, func() { h.r.release(h.d, h.d.chance(h.p.arrival), h.d.chance(60), false) })
	})
	working.Wait()
	close(over)
	beside.Wait()
	close(quiet)
	releasing.Wait()
	if !h.t.Failed() {
		h.conclude()
	}
	h.clean()
	if h.t.Failed() {
		for _, doc := range h.docs {
			h.t.Logf("seed %d: %s", h.seed, h.r.journal.of(doc))
		}
	}
	h.stats.histories, h.stats.slowest = 1, time.Since(begin)
	return h.stats
}

// every calls f now and then until over is closed.
func (h *history) every(over <-chan struct{}, pause time.Duration, f func()) {
	t := time.NewTicker(pause)
	defer t.Stop()
	for {
		select {
		case <-over:
			return
		case <-t.C:
			f()
		}
	}
}

func settings() corpus.Settings {
	return corpus.Settings{Vectors: heads, Fields: map[string]corpus.FieldType{"grp": corpus.Keyword, "op": corpus.Integer}}
}

// declare makes the collection, with an instance of its own that nothing happens to.
func (h *history) declare() {
	i := h.r.start(h.r.borrow(h.t), h.tempo(false), h.d)
	defer i.stop()
	if _, err := i.in.CreateCollection(context.Background(), h.name, settings()); err != nil {
		h.fail("declaring the collection: %v", err)
	}
}

// operation is one step of a client.
func (h *history) operation() {
	i := h.pick()
	if i == nil {
		return
	}
	doc := h.docs[h.d.n(len(h.docs))]
	wait := h.d.chance(35)
	limit := opTimeout
	if wait {
		limit = waitTimeout
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	h.count(func(s *stats) { s.ops++ })
	switch n := h.d.n(100); {
	case n < 48:
		h.put(ctx, i, doc, wait)
	case n < 60:
		o := h.m.begin(doc, patch, "", false)
		out, err := i.in.Patch(ctx, h.name, doc, metadataOf(o.value), wait)
		h.answered(o, doc, out, err, wait)
	case n < 76:
		o := h.m.begin(doc, remove, "", false)
		out, err := i.in.Delete(ctx, h.name, doc, wait)
		h.answered(o, doc, out, err, wait)
	case n < 88:
		h.search(i)
	case n < 96:
		h.reconcile(i)
	case n < 98 || !h.p.mortal:
		h.damage()
	default:
		i.kill()
	}
}

func (h *history) put(ctx context.Context, i *instance, doc string, wait bool) {
	o := h.m.begin(doc, put, contentNames[h.d.n(len(contentNames))], h.d.chance(20))
	docs := []corpus.DocumentInput{input(doc, o.content, o.value)}
	// Now and then a request with a neighbour, which shares its transaction.
	var beside *op
	var other string
	if h.d.chance(20) {
		if other = h.docs[h.d.n(len(h.docs))]; other != doc {
			beside = h.m.begin(other, put, contentNames[h.d.n(len(contentNames))], false)
			docs = append(docs, input(other, beside.content, beside.value))
		}
	}
	out, err := i.in.Ingest(ctx, corpus.IngestRequest{Collection: h.name, Documents: docs, Wait: wait})
	result := func(n int) (corpus.DocumentResult, error) {
		if err != nil {
			return corpus.DocumentResult{}, err
		}
		if out[n].Status == corpus.StatusFailed {
			return corpus.DocumentResult{}, out[n].Err
		}
		return out[n], nil
	}
	r, rerr := result(0)
	h.answered(o, doc, r, rerr, wait)
	if beside != nil {
		r, rerr := result(1)
		h.answered(beside, other, r, rerr, wait)
	}
}

// answered tells the model what an operation's caller was told.
func (h *history) answered(o *op, doc string, out corpus.DocumentResult, err error, wait bool) {
	switch {
	case err == nil:
		h.count(func(s *stats) { s.acked++ })
		h.m.done(o, func(o *op) {
			o.acked, o.version = true, out.Version
			o.visible = o.kind == remove || wait && (out.Status == corpus.StatusIndexed || out.Status == corpus.StatusUnchanged)
		})
	case corpus.Retryable(err): // its end stays open
		h.r.log.Debug("campaign: unknown outcome", "op", o.kind, "err", err)
	case o.kind != put && corpus.KindOf(err) == corpus.NotFound:
		if bad := h.m.notFound(doc, o); bad != "" {
			h.fail("%s", bad)
		}
		h.m.done(o, func(o *op) { o.void = true })
	default:
		h.fail("%s of %s: %v", o, doc, err)
	}
}

// search asks and judges. Without an instance it asks over connections that nothing disturbs:
// then an error is a broken promise (P7).
func (h *history) search(i *instance) {
	var find *search.Service
	clean := i == nil
	if clean {
		find = search.New(h.r.store, h.r.index, h.r.model, nil, search.Config{Exact: true}, nil)
	} else {
		find = i.find
	}
	req := corpus.SearchRequest{Collection: h.name, Query: "shared only in alpha beta", Limit: 200, IncludeText: true, IncludeMetadata: true}
	req.Mode = []corpus.SearchMode{corpus.ModeDense, corpus.ModeDense, corpus.ModeSparse, corpus.ModeHybrid}[h.d.n(4)]
	whole := req.Mode == corpus.ModeDense
	filter := ""
	if h.p.declared && h.d.chance(25) {
		filter, whole = groups[h.d.n(len(groups))], false
		req.Filter = &corpus.Filter{Must: []corpus.Condition{{Key: "grp", Match: filter}}}
	}
	if h.d.chance(25) {
		req.Context = 1 + h.d.n(2)
	}
	if h.d.chance(20) {
		req.GroupByDocument, whole = true, false
	}
	if h.d.chance(20) {
		req.Limit, whole = 1+h.d.n(4), false
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	h.count(func(s *stats) { s.searches++ })
	start := h.m.tick()
	resp, err := find.Search(ctx, req)
	end := h.m.tick()
	must := h.m.mustFind(start) // asked now: a delete that began meanwhile may have been first
	switch kind := corpus.KindOf(err); {
	case err == nil:
	case kind == corpus.NotFound && corpus.CodeOf(err) == "collection_not_found" && !h.p.declared && len(must) == 0:
		return
	case corpus.Retryable(err) && (!clean || h.p.loss == "collection" || !h.p.declared):
		// Out of reach; or the index is gone until reconcile builds it again, or not there yet.
		return
	default:
		h.fail("P7: a search failed (undisturbed: %v): %v", clean, err)
		return
	}
	found := map[string]*seen{}
	show := func(r *corpus.SearchResult, s *seen, ordinal int, text string) {
		if was, ok := s.texts[ordinal]; ok && was != text {
			h.fail("P2: one search shows %s at place %d with %q and with %q", r.ExternalID, ordinal, was, text)
		}
		s.texts[ordinal] = text
	}
	for n := range resp.Results {
		r := &resp.Results[n]
		s := found[r.ExternalID]
		if s == nil {
			s = &seen{start: start, end: end, version: r.Version, value: valueOf(r.Metadata), texts: map[int]string{}}
			found[r.ExternalID] = s
		}
		if s.version != r.Version || s.value != valueOf(r.Metadata) {
			h.fail("P2: one search shows %s at versions %d and %d, with metadata %d and %v", r.ExternalID, s.version, r.Version, s.value, r.Metadata)
		}
		if filter != "" && r.Metadata["grp"] != filter {
			h.fail("P2: a search for group %s shows %v", filter, r.Metadata)
		}
		show(r, s, r.Ordinal, r.Text)
		for _, side := range [][]corpus.Neighbour{r.Before, r.After} {
			for _, nb := range side {
				show(r, s, nb.Ordinal, nb.Text)
			}
		}
	}
	if len(resp.Results) > req.Limit {
		h.fail("a search for %d answered %d results", req.Limit, len(resp.Results))
	}
	for doc, s := range found {
		if bad := h.m.look(doc, *s); bad != "" {
			h.fail("%s", bad)
		}
	}
	if !whole || resp.Truncated || h.p.loss != "" {
		return
	}
	for _, doc := range must {
		if found[doc] == nil {
			h.fail("P3: a search in [%d,%d] does not find %s\n%s", start, end, doc, h.m.docs[doc])
		}
	}
	for doc, s := range found {
		if !slices.ContainsFunc(contentNames, func(n string) bool { return len(contents[n]) == len(s.texts) }) || !h.completes(s) {
			h.fail("P2: a search that sees all shows only %v of %s", s.texts, doc)
		}
	}
}

// completes reports whether the texts are all of some content.
func (h *history) completes(s *seen) bool {
	return slices.ContainsFunc(contentNames, func(n string) bool {
		if len(contents[n]) != len(s.texts) {
			return false
		}
		for i, text := range contents[n] {
			if s.texts[i] != text {
				return false
			}
		}
		return true
	})
}

// reconcile starts a run beside the others.
func (h *history) reconcile(i *instance) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	req := corpus.ReconcileRequest{
		Collection: h.name, Depth: []corpus.Depth{corpus.Quick, corpus.Full, corpus.Deep}[h.d.n(3)], Repair: h.d.chance(70), Resume: h.d.chance(15),
	}
	id, err := i.rec.Start(ctx, req)
	switch corpus.KindOf(err) {
	case "":
	case corpus.NotFound, corpus.Conflict, corpus.Unavailable, corpus.Overloaded:
		return
	default:
		h.fail("starting a reconcile: %v", err)
		return
	}
	h.count(func(s *stats) { s.reconciles++ })
	if h.d.chance(15) {
		_ = i.rec.Cancel(ctx, id) // it may have ended, or the ledger be out of reach
	}
	if h.d.chance(30) {
		return // it goes on beside
	}
	for ctx.Err() == nil && !i.killed() {
		rep, err := i.rec.Run(ctx, id)
		if err == nil && rep.State != corpus.RunRunning {
			h.judge(rep)
			return
		}
		if err != nil && !corpus.Retryable(err) {
			h.fail("reading a reconcile run: %v", err)
			return
		}
		pause(ctx, 3*time.Millisecond)
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// judge looks for false findings (P6): where nothing was lost or damaged, no point that the
// ledger calls indexed can be missing or wrong.
func (h *history) judge(rep corpus.RunReport) {
	impossible := []corpus.FindingKind{corpus.Foreign, corpus.RolledBack}
	if !h.revived() {
		impossible = append(impossible, corpus.ConfigDrift, corpus.OrphanIndex)
	}
	switch h.p.loss {
	case "":
		impossible = append(impossible, corpus.Missing, corpus.CorruptVector, corpus.LostIndex, corpus.StalePayload)
	case "strays":
		impossible = append(impossible, corpus.Missing, corpus.LostIndex)
	}
	for _, c := range rep.Collections {
		for _, k := range impossible {
			if c.Findings[k] > 0 {
				h.fail("P6: a %s run (%s) reports %d %s: %v", rep.Depth, rep.State, c.Findings[k], k, c.Sample)
			}
		}
		h.count(func(s *stats) { s.findings += int(c.Findings.Total()); s.repaired += int(c.Repaired.Total()) })
	}
}

// revived reports whether late requests may make a dropped Qdrant collection again, in part or
// whole: those that first created it, as instances do side by side when it is new or built
// anew. A run tells it, rightly.
func (h *history) revived() bool { return h.p.loss == "collection" }

// damage does to the index what the history's profile says, behind everybody's back.
func (h *history) damage() {
	if h.p.loss == "" {
		return
	}
	ctx := context.Background()
	c, ix, err := h.r.store.ResolveCollection(ctx, h.name)
	if err != nil {
		return // nobody has made it yet
	}
	var err2 error
	switch h.p.loss {
	case "collection":
		if h.d.chance(40) {
			err2 = h.r.index.DropIndex(ctx, ix)
		}
	case "strays":
		// A number that was handed out before.
		facts, err := h.r.store.RollbackFacts(ctx, c.ID)
		if err != nil || facts.LastGen == 0 {
			return
		}
		gen := facts.LastGen
		text := fmt.Sprintf("stray %d", h.d.n(1000))
		id := corpus.PointID(c.ID, corpus.ChunkKey{ExternalID: "nobody", Content: corpus.HashChunk(text, nil)})
		emb, _ := h.r.model.Embed(ctx, corpus.EmbedRequest{Inputs: []corpus.EmbedInput{{Text: text}}, Heads: heads})
		err2 = h.r.index.InsertPoints(ctx, ix, []corpus.Point{{ID: id, Vectors: emb[0].Vectors, Payload: corpus.Payload{
			Owner: h.r.owner, Document: corpus.DocumentID(c.ID, h.docs[0]), Gen: gen, MetaVersion: gen, Bucket: corpus.Bucket(ix.Salt, id), Metadata: metadataOf(1),
			Checksum: corpus.ChecksumVectors(&emb[0].Vectors, ix.Layout.DenseType),
		}}})
	default:
		points, err := scrollAll(ctx, h.r, ix)
		if err != nil {
			err2 = err
			break
		}
		var ids []corpus.ID
		for _, p := range points {
			if h.p.loss == "all" || h.d.chance(50) {
				ids = append(ids, p.ID)
			}
		}
		if h.p.loss != "damage" {
			err2 = h.r.index.DeletePoints(ctx, ix, ids)
			break
		}
		var broken []corpus.Point
		for _, p := range points {
			if slices.Contains(ids, p.ID) && p.Vectors != nil && p.HasOwner {
				v := *p.Vectors
				v.Dense = slices.Clone(v.Dense)
				slices.Reverse(v.Dense)
				broken = append(broken, corpus.Point{ID: p.ID, Vectors: v, Payload: p.Payload})
			}
		}
		err2 = h.r.index.RewritePoints(ctx, ix, broken)
	}
	if err2 != nil && corpus.KindOf(err2) != corpus.NotFound {
		h.fail("damaging the index: %v", err2)
	}
}

func scrollAll(ctx context.Context, r *rig, ix corpus.Index) ([]corpus.PointState, error) {
	var out []corpus.PointState
	for from := (corpus.ID{}); ; {
		page, next, err := r.index.Scroll(ctx, ix, from, 1000, corpus.Deep)
		if err != nil {
			return nil, err
		}
		out = append(out, page...)
		if next == nil {
			return out, nil
		}
		from = *next
	}
}
