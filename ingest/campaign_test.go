package ingest_test

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/lockstep-db/lockstep/embedder/fake"
	"github.com/lockstep-db/lockstep/ingest"
	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/postgres"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
)

var (
	campaignSeed = flag.Uint64("campaign.seed", 0, "replay the campaign's history of this seed; 0 runs campaign.n histories")
	campaignLog  = flag.Bool("campaign.log", false, "log what the last instance of each history does")
	campaignN    = flag.Int("campaign.n", 30, "histories of the campaign")
)

// contents that documents flip between; some share chunks, one has equal ones.
var contents = map[string][]string{
	"A": {"shared one", "only in A", "shared two"},
	"B": {"shared two", "only in B"},
	"C": {"only in C", "only in C", "shared one"},
	"D": {"only in D"},
}

var contentNames = slices.Sorted(maps.Keys(contents))

// history is one random run of clients, instances and faults against one collection, checked
// against a model while it runs and when it is over.
type history struct {
	t     *testing.T
	seed  uint64
	dice  *dice
	store *postgres.Store
	pool  *pgxpool.Pool
	index *fakeIndex
	owner corpus.ID
	name  string
	purge bool // tombstones are purged while it runs

	mu        sync.Mutex
	instances []*instance
	// acked is by document and version; versions of purged documents start again, so then only
	// the contents are kept.
	acked   map[string]map[int64]string // "" for a deletion
	unknown map[string]map[string]bool  // contents whose fate was not told, "" for a deletion
	floor   map[string]int64            // no later look may show an older version
	tags    map[string]map[string]bool  // metadata that was ever sent for a document
	faults  int
	deaths  int
}

type instance struct {
	p    *process
	svc  *ingest.Service
	stop func()
}

// TestCampaign runs random histories under seeded faults and checks promises P1 to P5.
func TestCampaign(t *testing.T) {
	url := pgtest.New(t)
	ctx := context.Background()
	store := openStore(t, url)
	pool, err := pgxpool.New(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	seeds := []uint64{*campaignSeed}
	if *campaignSeed == 0 {
		seeds = seeds[:0]
		base := rand.Uint64()>>16 | 1
		for i := range *campaignN {
			seeds = append(seeds, base+uint64(i))
		}
	}
	owner, err := store.Installation(ctx)
	if err != nil {
		t.Fatal(err)
	}
	faults, deaths := 0, 0
	for _, seed := range seeds {
		h := &history{
			t: t, seed: seed, dice: newDice(seed), store: store, pool: pool, index: newFakeIndex(), owner: owner,
			name: fmt.Sprintf("h%d", seed), purge: seed%3 == 0,
			acked: map[string]map[int64]string{}, unknown: map[string]map[string]bool{}, floor: map[string]int64{}, tags: map[string]map[string]bool{},
		}
		if h.run(); t.Failed() {
			t.Fatalf("replay with: go test ./ingest -run TestCampaign -campaign.seed=%d", seed)
		}
		faults, deaths = faults+h.faults, deaths+h.deaths
		if err := store.DeleteCollection(ctx, h.name); err != nil && corpus.KindOf(err) != corpus.NotFound {
			t.Fatal(err)
		}
		retireAll(t, store)
	}
	t.Logf("%d histories from seed %d: %d network faults, %d instances killed", len(seeds), seeds[0], faults, deaths)
	if len(seeds) >= 10 && (faults == 0 || deaths == 0) {
		t.Error("the campaign reached no fault or killed no instance: it proves nothing")
	}
}

func retireAll(t *testing.T, store *postgres.Store) {
	ctx := context.Background()
	retired, err := store.RetiredIndexes(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, ix := range retired {
		if err := store.ForgetIndex(ctx, ix.ID); err != nil {
			t.Fatal(err)
		}
	}
	if err := store.ClearCollections(ctx); err != nil {
		t.Fatal(err)
	}
}

func (h *history) fail(format string, args ...any) {
	h.t.Helper()
	h.t.Errorf("seed %d: %s", h.seed, fmt.Sprintf(format, args...))
}

// networkFault is the plan of the index's network while faults last.
func (h *history) networkFault(op string, ids []corpus.ID) fault {
	if h.dice.n(100) >= 25 {
		return fault{}
	}
	h.mu.Lock()
	h.faults++
	h.mu.Unlock()
	switch h.dice.n(7) {
	case 6:
		if op == "delete" || op == "metadata" {
			return fault{pretend: true}
		}
		return fault{half: true}
	case 0:
		return fault{lose: true}
	case 1:
		return fault{lose: true, late: true}
	case 2:
		return fault{loseReply: true, late: true}
	case 3:
		return fault{late: true}
	case 4:
		return fault{half: true}
	default:
		return fault{lose: true, err: &corpus.Error{Kind: corpus.Overloaded, Code: "index_rate_limited", RetryAfter: time.Millisecond}}
	}
}

func (h *history) spawn(faulty bool) {
	p := &process{dice: h.dice, died: make(chan struct{})}
	if faulty {
		p.percent = 8
		if h.dice.n(3) > 0 {
			p.dieAt = ingest.Steps[h.dice.n(len(ingest.Steps))]
			p.after.Store(int64(1 + h.dice.n(6)))
		}
	}
	grace := time.Hour
	if h.purge {
		grace = time.Millisecond
	}
	var log *slog.Logger
	if !faulty && *campaignLog {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	svc := ingest.New(ingest.Config{
		Logger: log, Ledger: faultyLedger{h.store, p}, Index: faultyIndex{h.index, p}, Embedder: fake.New(4, corpus.Dense), Owner: h.owner,
		Workers: 2, BatchPoints: 1 + h.dice.n(4), QueueEntries: 1 + h.dice.n(8), AcceptDocuments: 1 + h.dice.n(4),
		Lease: 60 * time.Millisecond, Poll: 4 * time.Millisecond, Upkeep: 10 * time.Millisecond, Grace: grace,
		Drain: time.Second, Pause: time.Millisecond, At: p.at,
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := svc.Run(ctx); err != nil {
			h.fail("Run: %v", err)
		}
	}()
	in := &instance{p: p, svc: svc, stop: func() { cancel(); <-done }}
	h.mu.Lock()
	h.instances = append(h.instances, in)
	h.mu.Unlock()
}

// pick returns a living instance, replacing those that died.
func (h *history) pick() *instance {
	h.mu.Lock()
	var dead []*instance
	h.instances = slices.DeleteFunc(h.instances, func(in *instance) bool {
		if in.p.dead.Load() {
			dead = append(dead, in)
			return true
		}
		return false
	})
	h.deaths += len(dead)
	h.mu.Unlock()
	for _, in := range dead {
		in.stop()
		h.spawn(true)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.instances) == 0 {
		return nil // another client is replacing it
	}
	return h.instances[h.dice.n(len(h.instances))]
}

func (h *history) run() {
	h.index.set(h.networkFault)
	h.spawn(true)
	h.spawn(true)
	docs := []string{"p", "q", "r"}
	for _, d := range docs {
		h.acked[d], h.unknown[d], h.tags[d] = map[int64]string{}, map[string]bool{}, map[string]bool{}
	}
	var clients sync.WaitGroup
	for c := range 3 {
		clients.Go(func() {
			for i := range 14 {
				h.operation(docs[h.dice.n(len(docs))], fmt.Sprintf("%d-%d", c, i))
			}
		})
	}
	watching := make(chan struct{})
	var watcher sync.WaitGroup
	watcher.Go(func() {
		for {
			select {
			case <-watching:
				return
			default:
				h.look()
				h.index.deliver(h.dice.rand())
			}
		}
	})
	clients.Wait()
	close(watching)
	watcher.Wait()

	// Faults stop. What was sent may still arrive.
	h.index.set(nil)
	h.mu.Lock()
	old := h.instances
	h.instances = nil
	h.mu.Unlock()
	for _, in := range old {
		in.stop()
	}
	for range 30 {
		h.index.deliver(h.dice.rand())
	}
	h.spawn(false)
	in := h.pick()
	h.settle(docs)
	h.look()
	h.final(docs)
	in.stop()
}

func (d *dice) rand() *rand.Rand { return rand.New(rand.NewPCG(uint64(d.n(1<<30)), 7)) }

// operation is one client's step, told to the model.
func (h *history) operation(doc, tag string) {
	in := h.pick()
	if in == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 80*time.Millisecond)
	defer cancel()
	wait := h.dice.n(3) == 0
	h.mu.Lock()
	h.tags[doc][tag] = true
	h.mu.Unlock()
	switch n := h.dice.n(10); {
	case n < 6:
		name := contentNames[h.dice.n(len(contentNames))]
		in1 := texts(doc, contents[name]...)
		in1.Metadata = corpus.Metadata{"tag": tag}
		h.intend(doc, name)
		out, err := in.svc.Ingest(ctx, corpus.IngestRequest{Collection: h.name, Documents: []corpus.DocumentInput{in1}, Wait: wait})
		if err != nil || out[0].Status == corpus.StatusFailed {
			if err == nil {
				err = out[0].Err
			}
			if !corpus.Retryable(err) {
				h.fail("put %s: %v", doc, err)
			}
			return
		}
		h.ack(doc, out[0].Version, name)
	case n < 8:
		_, err := in.svc.Patch(ctx, h.name, doc, corpus.Metadata{"tag": tag}, wait)
		if err != nil && !corpus.Retryable(err) && corpus.KindOf(err) != corpus.NotFound {
			h.fail("patch %s: %v", doc, err)
		}
	default:
		h.intend(doc, "")
		out, err := in.svc.Delete(ctx, h.name, doc, wait)
		switch {
		case err == nil:
			h.ack(doc, out.Version, "")
		case !corpus.Retryable(err) && corpus.KindOf(err) != corpus.NotFound:
			h.fail("delete %s: %v", doc, err)
		}
	}
}

// intend notes what may become true although nobody is told.
func (h *history) intend(doc, content string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.unknown[doc][content] = true
}

func (h *history) ack(doc string, version int64, content string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if was, ok := h.acked[doc][version]; ok && was != content && !h.purge {
		h.fail("P3: version %d of %s was acknowledged as %q and as %q", version, doc, was, content)
	}
	h.acked[doc][version] = content
	if content == "" && !h.purge {
		h.floor[doc] = max(h.floor[doc], version+1)
	}
}

// look checks what a search could find at this moment (P1, P2, and P4 for served points).
func (h *history) look() {
	ctx := context.Background()
	c, ix, err := h.store.ResolveCollection(ctx, h.name)
	if err != nil {
		return // nobody has created it yet
	}
	h.mu.Lock()
	floor := maps.Clone(h.floor)
	h.mu.Unlock()
	held := h.index.points(ix)
	var live map[corpus.ID]served
	for ids := h.chunkIDs(c.ID); ; {
		live = h.join(c, ix, ids)
		// A chunk that was born since the list was made would be absent from the answer for want
		// of being a candidate, not because of the ledger.
		now := h.chunkIDs(c.ID)
		known := map[corpus.ID]bool{}
		for _, id := range ids {
			known[id] = true
		}
		if !slices.ContainsFunc(now, func(id corpus.ID) bool { return !known[id] }) {
			break
		}
		ids = now
	}
	seen := map[string][]string{}
	for _, v := range live {
		seen[v.doc] = append(seen[v.doc], "")
	}
	for doc := range seen {
		got := make([]string, len(seen[doc]))
		version := int64(0)
		for _, v := range live {
			if v.doc == doc {
				if v.ordinal >= len(got) {
					h.fail("P2: %s shows a chunk at place %d of %d", doc, v.ordinal, len(got))
					return
				}
				got[v.ordinal], version = v.text, v.version
			}
		}
		if !slices.ContainsFunc(contentNames, func(n string) bool { return slices.Equal(contents[n], got) }) {
			h.fail("P2: %s version %d shows %q", doc, version, got)
		}
		if version < floor[doc] {
			h.fail("P2: %s shows version %d after %d was seen or a deletion acknowledged", doc, version, floor[doc])
		}
		h.mu.Lock()
		if want, ok := h.acked[doc][version]; ok && !h.purge && !slices.Equal(contents[want], got) {
			h.fail("P1: %s version %d is %q and shows %q", doc, version, want, got)
		}
		if !h.purge {
			h.floor[doc] = max(h.floor[doc], version)
		}
		h.mu.Unlock()
	}
	// Each served chunk's point must be there. One that is not in the earlier look may have been
	// written since; one that a later look lacks may have been passed by a switch.
	held2 := h.index.points(ix)
	var gone []corpus.ID
	for id := range live {
		_, before := held[id]
		_, after := held2[id]
		if !before && !after {
			gone = append(gone, id)
		}
	}
	if len(gone) > 0 {
		for id := range h.join(c, ix, gone) {
			h.fail("P4: %s is served and its point is not in the index", id)
		}
	}
}

type served struct {
	doc, text string
	version   int64
	ordinal   int
}

func (h *history) join(c corpus.Collection, ix corpus.Index, ids []corpus.ID) map[corpus.ID]served {
	j, err := h.store.JoinCandidates(context.Background(), corpus.JoinRequest{Collection: c.ID, Name: c.Name, Index: ix.ID, Candidates: ids, Texts: true, Metadata: true})
	if err != nil {
		h.fail("join: %v", err)
		return nil
	}
	out := map[corpus.ID]served{}
	for _, k := range j.Chunks {
		if k.State == corpus.JoinLive {
			d := j.Documents[k.Document]
			out[k.ID] = served{d.ExternalID, k.Text, d.Version, k.Ordinal}
		}
	}
	return out
}

func (h *history) chunkIDs(collection corpus.ID) []corpus.ID {
	rows, err := h.pool.Query(context.Background(), "SELECT id FROM lockstep.chunks WHERE collection_id = $1", collection)
	if err != nil {
		h.fail("chunks: %v", err)
		return nil
	}
	defer rows.Close()
	var out []corpus.ID
	for rows.Next() {
		var id [16]byte
		if err := rows.Scan(&id); err != nil {
			h.fail("chunks: %v", err)
		}
		out = append(out, id)
	}
	return out
}

// settle waits until the ledger has nothing left to do.
func (h *history) settle(docs []string) {
	const unsettled = `SELECT
		(SELECT count(*) FROM lockstep.index_entries e JOIN lockstep.indexes i ON i.id = e.index_id JOIN lockstep.collections c ON c.id = i.collection_id
			WHERE c.name = $1 AND c.deleted_at IS NULL AND (e.state IN ('pending', 'failed') OR e.state = 'indexed' AND e.meta_version <> e.want_meta OR e.state = 'dead' AND e.absent_at IS NULL)),
		(SELECT count(*) FROM lockstep.documents d JOIN lockstep.collections c ON c.id = d.collection_id
			WHERE c.name = $1 AND c.deleted_at IS NULL AND d.deleted_at IS NULL AND d.serving_version IS DISTINCT FROM d.target_version)`
	deadline := time.Now().Add(60 * time.Second)
	var entries, unswitched int
	for time.Now().Before(deadline) {
		if err := h.pool.QueryRow(context.Background(), unsettled, h.name).Scan(&entries, &unswitched); err != nil {
			h.fail("settling: %v", err)
			return
		}
		if entries == 0 && unswitched == 0 {
			return
		}
		<-time.After(5 * time.Millisecond)
	}
	var detail string
	if err := h.pool.QueryRow(context.Background(), `SELECT coalesce(string_agg(row_to_json(e)::text, E'\n'), '') FROM lockstep.index_entries e JOIN lockstep.indexes i ON i.id = e.index_id
		JOIN lockstep.collections c ON c.id = i.collection_id WHERE c.name = $1 AND (e.state IN ('pending', 'failed') OR e.state = 'indexed' AND e.meta_version <> e.want_meta OR e.state = 'dead' AND e.absent_at IS NULL)`, h.name).Scan(&detail); err != nil {
		h.fail("settling: %v", err)
	}
	h.fail("P5: after faults stopped, %d entries and %d documents do not settle\n%s", entries, unswitched, detail)
	buf := make([]byte, 1<<20)
	fmt.Fprintf(os.Stderr, "%s\n", buf[:runtime.Stack(buf, true)])
}

// final compares both stores with the model.
func (h *history) final(docs []string) {
	ctx := context.Background()
	c, ix, err := h.store.ResolveCollection(ctx, h.name)
	if err != nil {
		if corpus.KindOf(err) != corpus.NotFound {
			h.fail("resolve: %v", err)
		}
		return
	}
	alive := map[corpus.ID]bool{}
	held := h.index.points(ix)
	for _, doc := range docs {
		last := int64(0)
		for v := range h.acked[doc] {
			last = max(last, v)
		}
		view, err := h.store.Document(ctx, c.ID, doc)
		switch {
		case corpus.KindOf(err) == corpus.NotFound:
			if want := h.acked[doc][last]; last > 0 && want != "" && !h.unknown[doc][""] {
				h.fail("P3: %s is gone; version %d was acknowledged as %s", doc, last, want)
			}
			continue
		case err != nil:
			h.fail("document: %v", err)
			continue
		}
		var got []string
		for _, k := range view.Chunks {
			got = append(got, k.Text)
			alive[k.ID] = true
		}
		name := ""
		for _, n := range contentNames {
			if slices.Equal(contents[n], got) {
				name = n
			}
		}
		if want, ok := h.acked[doc][view.TargetVersion]; !h.purge {
			if ok && want != name {
				h.fail("P3: %s version %d holds %q; acknowledged was %q", doc, view.TargetVersion, got, want)
			}
			if view.TargetVersion < last {
				h.fail("P3: %s is at version %d; %d was acknowledged", doc, view.TargetVersion, last)
			}
		}
		if !h.unknown[doc][name] {
			h.fail("P1: %s holds %q, which nobody sent", doc, got)
		}
		tag, _ := view.Metadata["tag"].(string)
		if !h.tags[doc][tag] {
			h.fail("P1: %s has metadata %v, which nobody sent", doc, view.Metadata)
		}
		for _, k := range view.Chunks {
			p, ok := held[k.ID]
			switch {
			case !ok:
				h.fail("P4: %s of %s is live and not in the index", k.ID, doc)
			case string(p.Payload.Metadata.JSON()) != string(view.Metadata.JSON()):
				h.fail("P5: point %s of %s carries %v; the document has %v", k.ID, doc, p.Payload.Metadata, view.Metadata)
			case p.Payload.Owner != h.owner || p.Payload.Document != view.DocumentID:
				h.fail("P4: point %s of %s carries another's payload: %+v", k.ID, doc, p.Payload)
			}
		}
	}
	// What else the index holds was brought back by late writes: dead for ever, for reconcile to
	// sweep, and never again the id of anything.
	for id := range held {
		if alive[id] {
			continue
		}
		var died *int64
		var text *string
		err := h.pool.QueryRow(ctx, "SELECT died_version, text FROM lockstep.chunks WHERE id = $1", [16]byte(id)).Scan(&died, &text)
		if err == nil && (died == nil || text != nil) {
			h.fail("P5: point %s is no live chunk's, and the ledger does not call it dead", id)
		}
	}
}
