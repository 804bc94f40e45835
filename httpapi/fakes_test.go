package httpapi

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/lockstep-db/lockstep/embedder/fake"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ledger is an in-memory Ingester that keeps documents and counts calls.
type ledger struct {
	mu          sync.Mutex
	docs        map[string]map[string]corpus.DocumentView // collection → external id
	collections map[string]corpus.CollectionView
	calls       int
	batches     []int
	// fail is asked before each call; a document's own error comes from failDoc.
	fail    func(op string) error
	failDoc func(id string) *corpus.Error
	// gate, when set, is received from before each Ingest answers; entered is sent to before.
	gate, entered chan struct{}
}

func newLedger() *ledger {
	return &ledger{docs: map[string]map[string]corpus.DocumentView{}, collections: map[string]corpus.CollectionView{}}
}

func (l *ledger) check(op string) error {
	if l.fail != nil {
		return l.fail(op)
	}
	return nil
}

func testID(n byte) corpus.ID { return corpus.ID{15: n} }

func (l *ledger) Ingest(ctx context.Context, req corpus.IngestRequest) ([]corpus.DocumentResult, error) {
	if err := l.check("ingest"); err != nil {
		return nil, err
	}
	if l.entered != nil {
		l.entered <- struct{}{}
	}
	if l.gate != nil {
		select {
		case <-l.gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls++
	l.batches = append(l.batches, len(req.Documents))
	if l.docs[req.Collection] == nil {
		l.docs[req.Collection] = map[string]corpus.DocumentView{}
	}
	out := make([]corpus.DocumentResult, len(req.Documents))
	for i, d := range req.Documents {
		out[i] = corpus.DocumentResult{ID: d.ID, Status: corpus.StatusAccepted}
		if l.failDoc != nil {
			if e := l.failDoc(d.ID); e != nil {
				out[i].Status, out[i].Err = corpus.StatusFailed, e
				continue
			}
		}
		v := l.docs[req.Collection][d.ID]
		v.ExternalID, v.DocumentID, v.Metadata = d.ID, testID(byte(len(d.ID))), d.Metadata
		v.TargetVersion++
		v.Chunks = []corpus.ChunkView{{ID: testID(9), Text: d.Text, State: "indexed"}}
		if d.Chunks != nil {
			v.Chunks = nil
			for k, c := range d.Chunks {
				v.Chunks = append(v.Chunks, corpus.ChunkView{ID: testID(byte(k)), Ordinal: k, Text: c.Text, State: "pending"})
			}
		}
		l.docs[req.Collection][d.ID] = v
		out[i].DocumentID, out[i].Version, out[i].Chunks = v.DocumentID, v.TargetVersion, len(v.Chunks)
		for _, c := range v.Chunks {
			out[i].PointIDs = append(out[i].PointIDs, c.ID)
		}
		if req.Wait {
			out[i].Status = corpus.StatusIndexed
		}
	}
	return out, nil
}

func (l *ledger) find(collection, id string) (corpus.DocumentView, error) {
	v, ok := l.docs[collection][id]
	if !ok {
		return v, corpus.Errorf(corpus.NotFound, "document_not_found", "there is no document %q", id)
	}
	return v, nil
}

func (l *ledger) Patch(_ context.Context, collection, id string, md corpus.Metadata, wait bool) (corpus.DocumentResult, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v, err := l.find(collection, id)
	if err != nil {
		return corpus.DocumentResult{}, err
	}
	v.Metadata = md
	l.docs[collection][id] = v
	st := corpus.StatusAccepted
	if wait {
		st = corpus.StatusIndexed
	}
	return corpus.DocumentResult{ID: id, DocumentID: v.DocumentID, Version: v.TargetVersion, Status: st}, nil
}

func (l *ledger) Delete(_ context.Context, collection, id string, wait bool) (corpus.DocumentResult, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v, err := l.find(collection, id)
	if err != nil {
		return corpus.DocumentResult{}, err
	}
	delete(l.docs[collection], id)
	st := corpus.StatusAccepted
	if wait {
		st = corpus.StatusIndexed
	}
	return corpus.DocumentResult{ID: id, DocumentID: v.DocumentID, Version: v.TargetVersion + 1, Status: st}, nil
}

func (l *ledger) Document(_ context.Context, collection, id string) (corpus.DocumentView, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.find(collection, id)
}

func (l *ledger) Documents(_ context.Context, collection string, limit int, after string) ([]corpus.DocumentView, string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []corpus.DocumentView
	for _, id := range slices.Sorted(maps.Keys(l.docs[collection])) {
		if id <= after {
			continue
		}
		if len(out) == limit {
			return out, out[len(out)-1].ExternalID, nil
		}
		out = append(out, l.docs[collection][id])
	}
	return out, "", nil
}

func (l *ledger) CreateCollection(_ context.Context, name string, s corpus.Settings) (corpus.CollectionView, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.collections[name]; ok {
		return corpus.CollectionView{}, corpus.Errorf(corpus.Conflict, "collection_exists", "the collection exists")
	}
	v := corpus.CollectionView{Collection: corpus.Collection{ID: testID(1), Name: name, Settings: s, CreatedAt: time.Unix(1, 0)}}
	v.Index.Layout.Dim = 8
	l.collections[name] = v
	return v, nil
}

func (l *ledger) Collection(_ context.Context, name string) (corpus.CollectionView, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v, ok := l.collections[name]
	if !ok {
		return v, corpus.Errorf(corpus.NotFound, "collection_not_found", "there is no collection %q", name)
	}
	return v, nil
}

func (l *ledger) Collections(context.Context) ([]corpus.CollectionView, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []corpus.CollectionView
	for _, n := range slices.Sorted(maps.Keys(l.collections)) {
		out = append(out, l.collections[n])
	}
	return out, nil
}

func (l *ledger) DeleteCollection(_ context.Context, name string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.collections[name]; !ok {
		return corpus.Errorf(corpus.NotFound, "collection_not_found", "there is no collection %q", name)
	}
	delete(l.collections, name)
	return nil
}

// finder is a Searcher that records what it was asked.
type finder struct {
	mu   sync.Mutex
	last []corpus.SearchRequest
	fail error
}

func (f *finder) Search(ctx context.Context, req corpus.SearchRequest) (corpus.SearchResponse, error) {
	rs, err := f.SearchBatch(ctx, []corpus.SearchRequest{req})
	if err != nil {
		return corpus.SearchResponse{}, err
	}
	return rs[0], nil
}

func (f *finder) SearchBatch(_ context.Context, reqs []corpus.SearchRequest) ([]corpus.SearchResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last = reqs
	if f.fail != nil {
		return nil, f.fail
	}
	out := make([]corpus.SearchResponse, len(reqs))
	for i := range reqs {
		if reqs[i].Collection == "unknown" {
			return nil, corpus.Errorf(corpus.NotFound, "collection_not_found", "there is no collection %q", "unknown")
		}
		out[i] = corpus.SearchResponse{Mode: corpus.ModeDense, Filtered: 1, Results: []corpus.SearchResult{{
			ID: testID(1), DocumentID: testID(2), ExternalID: "kb/42", Version: 3, Score: 0.83, Text: "hello",
			Metadata: corpus.Metadata{"lang": "en"}, Vectors: &corpus.Vectors{Dense: []float32{0.6, 0.8}},
			Heads: map[string]corpus.HeadScore{"dense": {Rank: 1, Score: 0.83}},
		}}}
	}
	return out, nil
}

func (f *finder) asked(t *testing.T) corpus.SearchRequest {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.last) == 0 {
		t.Fatal("search was not called")
	}
	return f.last[0]
}

// runs is an in-memory Reconciler.
type runs struct {
	mu      sync.Mutex
	started []corpus.ReconcileRequest
	reports []corpus.CollectionReport
	history []corpus.RunReport
	fail    error

	resolutions []string
}

func (r *runs) Start(_ context.Context, req corpus.ReconcileRequest) (corpus.ID, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil {
		return corpus.ID{}, r.fail
	}
	r.started = append(r.started, req)
	return testID(byte(len(r.started))), nil
}

func (r *runs) Run(_ context.Context, id corpus.ID) (corpus.RunReport, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.history {
		if h.RunID == id {
			return h, nil
		}
	}
	return corpus.RunReport{}, corpus.Errorf(corpus.NotFound, "run_not_found", "there is no such run")
}

func (r *runs) Cancel(ctx context.Context, id corpus.ID) error {
	_, err := r.Run(ctx, id)
	return err
}

func (r *runs) Latest(_ context.Context, collection string) ([]corpus.CollectionReport, error) {
	if collection == "unknown" {
		return nil, corpus.Errorf(corpus.NotFound, "collection_not_found", "there is no collection %q", collection)
	}
	return slices.Clone(r.reports), nil
}

func (r *runs) History(_ context.Context, _ string, limit int) ([]corpus.RunReport, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.history[:min(limit, len(r.history))]), nil
}

func (r *runs) Explain(_ context.Context, query, _ string) (corpus.Explanation, error) {
	if query == "unknown" {
		return corpus.Explanation{}, corpus.Errorf(corpus.NotFound, "document_not_found", "nothing answers to %q", query)
	}
	return corpus.Explanation{Query: query, Verdict: "healthy"}, nil
}

func (r *runs) AdoptRollback(_ context.Context, c string) error   { return r.resolved("adopt " + c) }
func (r *runs) DiscardRollback(_ context.Context, c string) error { return r.resolved("discard " + c) }

func (r *runs) resolved(what string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.resolutions = append(r.resolutions, what)
	return nil
}

type checks func(context.Context) []Check

func (f checks) Checks(ctx context.Context) []Check { return f(ctx) }

// bench is one server over real HTTP with fakes behind it.
type bench struct {
	t      *testing.T
	url    string
	server *Server
	ledger *ledger
	finder *finder
	runs   *runs
	model  *fake.Embedder
	health []Check
	logs   *syncBuffer
	reg    *prometheus.Registry
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

const allHeads = corpus.Dense | corpus.SparseHead | corpus.ColBERT

func setup(t *testing.T, edit func(*Config, *bench)) *bench {
	t.Helper()
	b := &bench{
		t: t, ledger: newLedger(), finder: &finder{}, runs: &runs{}, model: fake.New(8, allHeads),
		health: []Check{{Name: "model"}, {Name: "postgres"}, {Name: "qdrant"}}, logs: &syncBuffer{},
		reg: prometheus.NewRegistry(),
	}
	cfg := Config{Version: "test"}
	if edit != nil {
		edit(&cfg, b)
	}
	deps := Deps{
		Ingester: b.ledger, Searcher: b.finder, Embedder: b.model, Reconciler: b.runs,
		Health:   checks(func(context.Context) []Check { return b.health }),
		Registry: b.reg,
		Logger:   slog.New(slog.NewJSONHandler(b.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	s, err := New(cfg, deps)
	if err != nil {
		t.Fatal(err)
	}
	b.server = s
	ts := httptest.NewUnstartedServer(s.Handler())
	ts.Config.ErrorLog = log.New(b.logs, "net/http: ", 0)
	ts.Start()
	t.Cleanup(func() {
		ts.Close()
		if strings.Contains(b.logs.String(), "panic serving") {
			t.Errorf("a panic reached net/http:\n%s", b.logs.String())
		}
	})
	b.url = ts.URL
	return b
}

// answer is a reply that was read whole.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func (a answer) object(t *testing.T) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal(a.body, &v); err != nil {
		t.Fatalf("the reply (%d) is no JSON object: %v\n%s", a.status, err, a.body)
	}
	return v
}

func (a answer) code(t *testing.T) string {
	t.Helper()
	c, _ := a.object(t)["code"].(string)
	return c
}

// pointer of the first field error, or "".
func (a answer) pointer(t *testing.T) string {
	t.Helper()
	errs, _ := a.object(t)["errors"].([]any)
	if len(errs) == 0 {
		return ""
	}
	p, _ := errs[0].(map[string]any)["pointer"].(string)
	return p
}

func (b *bench) do(method, path, body string, header ...string) answer {
	b.t.Helper()
	return b.send(method, path, strings.NewReader(body), header...)
}

func (b *bench) send(method, path string, body io.Reader, header ...string) answer {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, b.url+path, body)
	if err != nil {
		b.t.Fatal(err)
	}
	if method == http.MethodPost || method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(header); i += 2 {
		if header[i+1] == "" {
			req.Header.Del(header[i])
			continue
		}
		req.Header.Set(header[i], header[i+1])
	}
	// No redirects, no shared connections: each answer is what the server sent.
	client := &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	res, err := client.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		b.t.Fatalf("read the reply: %v", err)
	}
	return answer{res.StatusCode, res.Header, data}
}

func (b *bench) post(path, body string) answer { b.t.Helper(); return b.do("POST", path, body) }
func (b *bench) get(path string) answer        { b.t.Helper(); return b.do("GET", path, "") }

// want fails unless the answer is a problem of that status, code and first pointer.
func (b *bench) want(a answer, status int, code, pointer string) {
	b.t.Helper()
	if a.status != status || a.code(b.t) != code || pointer != "*" && a.pointer(b.t) != pointer {
		b.t.Errorf("got %d %s %q, want %d %s %q\n%s", a.status, a.code(b.t), a.pointer(b.t), status, code, pointer, a.body)
	}
	if ct := a.header.Get("Content-Type"); ct != "application/problem+json" {
		b.t.Errorf("Content-Type %q", ct)
	}
	if a.object(b.t)["request_id"] != a.header.Get("X-Request-Id") || a.header.Get("X-Request-Id") == "" {
		b.t.Errorf("request id missing: %s", a.body)
	}
}
