package httpapi

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestKeysAndScopes(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config, _ *bench) {
		c.Keys = []Key{
			{Name: "reader", Scopes: []Scope{Read}, Secret: "reader-secret-0001"},
			{Name: "writer", Scopes: []Scope{Write}, Secret: "writer-secret-0001"},
			{Name: "boss", Scopes: []Scope{Admin}, Secret: "boss-secret-000001"},
		}
	})
	doc := `{"documents":[{"id":"a","text":"x"}]}`
	for _, c := range []struct {
		method, path, body, auth string
		status                   int
	}{
		{"POST", "/search", `{"query":"a"}`, "", 401},
		{"POST", "/search", `{"query":"a"}`, "Bearer wrong", 401},
		{"POST", "/search", `{"query":"a"}`, "Bearer ", 401},
		{"POST", "/search", `{"query":"a"}`, "Basic " + base64.StdEncoding.EncodeToString([]byte("x:reader-secret-0001")), 401},
		{"POST", "/search", `{"query":"a"}`, "Bearer reader-secret-0001", 200},
		{"POST", "/search", `{"query":"a"}`, "bearer   reader-secret-0001", 200},
		{"POST", "/search", `{"query":"a"}`, "Bearer writer-secret-0001", 403},
		{"POST", "/documents", doc, "Bearer reader-secret-0001", 403},
		{"POST", "/documents", doc, "Bearer writer-secret-0001", 202},
		{"POST", "/documents", doc, "Bearer boss-secret-000001", 202},
		{"GET", "/admin/consistency", "", "Bearer writer-secret-0001", 403},
		{"GET", "/admin/consistency", "", "Bearer boss-secret-000001", 200},
		{"GET", "/metrics", "", "", 401},
		{"GET", "/metrics", "", "Bearer reader-secret-0001", 200},
		{"GET", "/healthz", "", "", 200},
		{"GET", "/readyz", "", "", 200},
		{"GET", "/openapi.json", "", "", 200},
		{"GET", "/docs", "", "", 200},
	} {
		a := b.do(c.method, c.path, c.body, "Authorization", c.auth)
		if a.status != c.status {
			t.Errorf("%s %s with %q: %d, expected %d: %s", c.method, c.path, c.auth, a.status, c.status, a.body)
		}
		if c.status == 401 && a.header.Get("WWW-Authenticate") == "" {
			t.Errorf("%s: 401 without a challenge", c.path)
		}
	}
	b.want(b.do("POST", "/search", "{}"), 401, "unauthorized", "")
	b.want(b.do("POST", "/search", "{}", "Authorization", "Bearer writer-secret-0001"), 403, "forbidden", "")
	// The contract of each route shapes its refusals.
	if a := b.do("POST", "/v1/embeddings", `{"input":"a"}`); a.object(t)["error"].(map[string]any)["code"] != "invalid_api_key" {
		t.Errorf("OpenAI: %s", a.body)
	}
	if a := b.do("GET", "/info", ""); a.object(t)["error_type"] != "Unauthorized" {
		t.Errorf("TEI: %s", a.body)
	}
	// The page asks the browser for a password.
	a := b.do("GET", "/admin", "")
	if a.status != 401 || !strings.HasPrefix(a.header.Get("WWW-Authenticate"), "Basic ") {
		t.Errorf("%d %v", a.status, a.header)
	}
	if a := b.do("GET", "/admin", "", "Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte("me:boss-secret-000001"))); a.status != 200 {
		t.Errorf("basic authentication on the page: %d", a.status)
	}
	if logs := b.logs.String(); strings.Contains(logs, "secret-000") || !strings.Contains(logs, `"key":"writer"`) {
		t.Error("the log should name keys, and never their secrets")
	}
}

func TestRateLimitPerKey(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config, _ *bench) {
		c.Keys = []Key{{Name: "a", Scopes: []Scope{Read}, Secret: "0123456789abcdef"}, {Name: "b", Scopes: []Scope{Read}, Secret: "fedcba9876543210"}}
		c.RatePerKey, c.RateBurst = 0.001, 2
	})
	for i, expected := range []int{200, 200, 429} {
		if a := b.do("GET", "/info", "", "Authorization", "Bearer 0123456789abcdef"); a.status != expected {
			t.Errorf("request %d: %d", i, a.status)
		} else if expected == 429 && a.header.Get("Retry-After") == "" {
			t.Error("429 without Retry-After")
		}
	}
	if a := b.do("GET", "/info", "", "Authorization", "Bearer fedcba9876543210"); a.status != 200 {
		t.Errorf("another key: %d", a.status)
	}
}

func TestWithoutKeysOnlyLoopbackNames(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for host, expected := range map[string]int{
		"localhost": 200, "localhost:8080": 200, "127.0.0.1": 200, "[::1]:80": 200, "app.localhost": 200,
		"evil.example": 403, "127.0.0.1.evil.example": 403, "10.0.0.1": 403, "": 403,
	} {
		r := httptest.NewRequest("GET", "/info", nil)
		r.Host = host
		w := httptest.NewRecorder()
		b.server.Handler().ServeHTTP(w, r)
		if w.Code != expected {
			t.Errorf("Host %q: %d", host, w.Code)
		}
	}
}

func TestOtherSitesCannotWrite(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	doc := `{"documents":[{"id":"a","text":"x"}]}`
	b.want(b.do("POST", "/documents", doc, "Sec-Fetch-Site", "cross-site"), 403, "cross_origin", "")
	b.want(b.do("DELETE", "/documents/a", "", "Origin", "https://evil.example"), 403, "cross_origin", "")
	if a := b.do("POST", "/documents", doc, "Sec-Fetch-Site", "same-origin"); a.status != 202 {
		t.Errorf("%d", a.status)
	}
	a := b.do("POST", "/admin", "action=start", "Content-Type", "application/x-www-form-urlencoded", "Sec-Fetch-Site", "cross-site")
	if a.status != 403 || len(b.runs.started) != 0 {
		t.Errorf("a foreign form started a run: %d", a.status)
	}
}

func TestOverload(t *testing.T) {
	t.Parallel()
	gate, entered := make(chan struct{}), make(chan struct{})
	b := setup(t, func(c *Config, b *bench) { c.MaxRequests = 1; b.ledger.gate, b.ledger.entered = gate, entered })
	done := make(chan answer)
	go func() { done <- b.post("/documents", `{"documents":[{"id":"b","text":"x"}]}`) }()
	<-entered
	if got := testutil.ToFloat64(b.server.m.inFlight); got != 1 {
		t.Errorf("%v requests in flight", got)
	}
	a := b.post("/search", `{"query":"a"}`)
	b.want(a, 429, "overloaded", "")
	if a.header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	if a := b.get("/healthz"); a.status != 200 {
		t.Errorf("health is not counted: %d", a.status)
	}
	gate <- struct{}{}
	if a := <-done; a.status != 202 {
		t.Errorf("the request inside: %d", a.status)
	}
	// The slot is free once the handler has returned, which may be just after its answer.
	for b.post("/search", `{"query":"a"}`).status != 200 {
		runtime.Gosched()
	}
}

func TestTimeoutIsTold(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config, b *bench) {
		c.IngestTimeout = 20 * time.Millisecond
		b.ledger.gate = make(chan struct{})
	})
	b.want(b.post("/documents", `{"documents":[{"id":"a","text":"x"}]}`), 504, "timeout", "")
}

func TestPanicsAreAnsweredAndLogged(t *testing.T) {
	t.Parallel()
	b := setup(t, func(_ *Config, b *bench) {
		b.ledger.fail = func(string) error { panic("hunter2 in a panic") }
	})
	a := b.post("/documents", `{"documents":[{"id":"a","text":"secret text of a document"}]}`)
	b.want(a, 500, "internal", "")
	if strings.Contains(string(a.body), "hunter2") {
		t.Error("the panic was shown to the caller")
	}
	logs := b.logs.String()
	if !strings.Contains(logs, "hunter2 in a panic") || !strings.Contains(logs, "server_test.go") || !strings.Contains(logs, a.header.Get("X-Request-Id")) {
		t.Errorf("the log lacks the panic: %s", logs)
	}
	if strings.Contains(logs, "secret text") {
		t.Error("document text was logged")
	}
	if got := testutil.ToFloat64(b.server.m.panics); got != 1 {
		t.Errorf("%v panics counted", got)
	}
}

func TestRequestIDs(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	if got := b.do("GET", "/healthz", "", "X-Request-Id", "mine-1.2:3").header.Get("X-Request-Id"); got != "mine-1.2:3" {
		t.Errorf("a sane id became %q", got)
	}
	for _, bad := range []string{strings.Repeat("x", 129), "a b", "<script>", "a\"b"} {
		if got := b.do("GET", "/healthz", "", "X-Request-Id", bad).header.Get("X-Request-Id"); got == bad || got == "" {
			t.Errorf("%q was echoed as %q", bad, got)
		}
	}
	x, y := b.get("/healthz").header.Get("X-Request-Id"), b.get("/healthz").header.Get("X-Request-Id")
	if x == y {
		t.Error("two requests have one id")
	}
}

func TestReadiness(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	if o := b.get("/readyz").object(t); o["status"] != "ready" || len(o["checks"].([]any)) != 3 {
		t.Errorf("%v", o)
	}
	b.health = []Check{{Name: "model", Err: corpus.Errorf(corpus.Unavailable, "model_warming", "the model is being warmed up")}, {Name: "postgres"},
		{Name: "qdrant", Err: errors.New("dial tcp 10.1.2.3:6334: password=hunter2")}}
	a := b.get("/readyz")
	b.want(a, 503, "not_ready", "")
	o := a.object(t)
	if d := o["detail"].(string); !strings.Contains(d, "model: the model is being warmed up") || !strings.Contains(d, "qdrant: ") || strings.Contains(d, "hunter2") || strings.Contains(d, "postgres") {
		t.Errorf("detail %q", d)
	}
	if a.header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	if a := b.get("/healthz"); a.status != 200 {
		t.Errorf("alive: %d", a.status)
	}
	if a := b.do("HEAD", "/readyz", ""); a.status != 503 || len(a.body) != 0 {
		t.Errorf("HEAD: %d %s", a.status, a.body)
	}
	b.health = nil
	if a := b.do("HEAD", "/readyz", ""); a.status != 200 {
		t.Errorf("HEAD: %d", a.status)
	}
	b.server.Drain()
	b.want(b.get("/readyz"), 503, "shutting_down", "")
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.post("/documents", `{"documents":[{"id":"a/secret/id","text":"x"}]}`)
	b.get("/documents/a/secret/id")
	b.get("/documents/no/secret") // an error by a handler keeps its status
	b.get("/nope/secret")
	b.do("FROB", "/x", "")
	a := b.get("/metrics")
	body := string(a.body)
	for _, s := range []string{
		`http_requests_total{method="POST",route="/documents",status="202"} 1`,
		`http_requests_total{method="GET",route="/documents/*",status="200"} 1`,
		`http_requests_total{method="GET",route="/documents/*",status="404"} 1`,
		`http_requests_total{method="other",route="unmatched",status="404"} 2`,
		"http_request_seconds_bucket", "http_received_bytes_total",
	} {
		if !strings.Contains(body, s) {
			t.Errorf("%s is missing:\n%s", s, body)
		}
	}
	if strings.Contains(body, "secret") {
		t.Error("an id became a label")
	}
	problems, err := promlint.New(strings.NewReader(body)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v %v", problems, err)
	}
}

func TestAccessLog(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	a := b.post("/search", `{"query":"a very private question"}`)
	b.get("/healthz")
	var line map[string]any
	for l := range strings.Lines(b.logs.String()) {
		var v map[string]any
		if err := json.Unmarshal([]byte(l), &v); err != nil {
			t.Fatal(err)
		}
		if v["route"] == "/search" {
			line = v
		}
		if v["route"] == "/healthz" && v["level"] != "DEBUG" {
			t.Errorf("health checks are logged as %v", v["level"])
		}
	}
	if line["request_id"] != a.header.Get("X-Request-Id") || line["status"] != 200.0 || line["component"] != "httpapi" || line["bytes_in"] != 35.0 {
		t.Errorf("line %v", line)
	}
	if strings.Contains(b.logs.String(), "private") {
		t.Error("a query was logged")
	}
}

func TestSearchIsPassedOnWhole(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	a := b.post("/search", `{"collection":"c","query":"q","limit":5,"offset":2,"mode":"hybrid_rerank","fusion":{"method":"weighted","weights":[1,0.5,2]},
		"filter":{"must":[{"key":"lang","match":"en"},{"key":"year","range":{"gte":2020,"lt":2.5e3}},{"key":"tags","any":["a",7]},{"filter":{"should":[{"key":"x.y","is_empty":true}]}}],"must_not":[{"key":"t","text":"word"},{"key":"at","range":{"gte":"2026-01-01T00:00:00Z"}},{"key":"e","except":["z"]}]},
		"score_threshold":0.3,"group_by":"document","include":["vector"],"context":2,"highlight":true,"explain":true,"timeout_ms":1500}`)
	if a.status != 200 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	r := b.finder.asked(t)
	if r.Collection != "c" || r.Query != "q" || r.Limit != 5 || r.Offset != 2 || r.Mode != corpus.ModeHybridRerank || r.Fusion.Method != "weighted" ||
		!slices.Equal(r.Fusion.Weights, []float64{1, 0.5, 2}) || *r.ScoreThreshold != 0.3 || !r.GroupByDocument || r.IncludeText || r.IncludeMetadata || !r.IncludeVector ||
		r.Context != 2 || !r.Highlight || !r.Explain || r.Timeout != 1500*time.Millisecond {
		t.Errorf("request %+v", r)
	}
	f := r.Filter
	if f.Must[0].Match != "en" || f.Must[1].Range.GTE != int64(2020) || f.Must[1].Range.LT != 2500.0 || f.Must[2].Any[1] != int64(7) ||
		!*f.Must[3].Filter.Should[0].IsEmpty || f.MustNot[0].Text != "word" || f.MustNot[1].Range.GTE != "2026-01-01T00:00:00Z" || f.MustNot[2].Except[0] != "z" {
		t.Errorf("filter %+v", f)
	}
	o := a.object(t)
	hit := o["results"].([]any)[0].(map[string]any)
	if hit["document"] != "kb/42" || hit["score"] != 0.83 || hit["vector"] == nil || hit["text"] != nil || hit["metadata"] != nil || hit["heads"] == nil {
		t.Errorf("hit %v", hit)
	}
	if c := o["consistency"].(map[string]any); c["filtered"] != 1.0 {
		t.Errorf("consistency %v", c)
	}
	b.post("/search", `{"query":"q"}`)
	if r := b.finder.asked(t); r.Limit != 10 || r.Collection != "default" || !r.IncludeText || !r.IncludeMetadata || r.IncludeVector || r.Filter != nil {
		t.Errorf("defaults %+v", r)
	}
	b.post("/search", `{"vector":[3,4]}`)
	if r := b.finder.asked(t); r.Vectors == nil || len(r.Vectors.Dense) != 2 {
		t.Errorf("vector %+v", r)
	}
	a = b.post("/search", `{"collection":"c","limit":3,"queries":["a",{"query":"b","limit":7},{"like":"d"},{"vectors":{"sparse":{"indices":[1],"values":[1]}}}]}`)
	if n := len(a.object(t)["responses"].([]any)); a.status != 200 || n != 4 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	if l := b.finder.last; l[0].Query != "a" || l[0].Limit != 3 || l[1].Limit != 7 || l[2].Like != "d" || l[3].Collection != "c" || l[3].Vectors.Sparse == nil {
		t.Errorf("batch %+v", l)
	}
	if a := b.post("/search", `{"query":"q","fusion":"dbsf"}`); a.status != 200 || b.finder.asked(t).Fusion.Method != "dbsf" {
		t.Errorf("%d", a.status)
	}
	b.finder.fail = &corpus.Error{Kind: corpus.Unavailable, Code: "index_unavailable", Detail: "the index does not answer", RetryAfter: 2 * time.Second}
	a = b.post("/search", `{"query":"q"}`)
	b.want(a, 503, "index_unavailable", "")
	if a.header.Get("Retry-After") != "2" {
		t.Errorf("Retry-After %q", a.header.Get("Retry-After"))
	}
	b.finder.fail = corpus.Wrap(corpus.Unavailable, "embed_late", "the embedder was late", context.DeadlineExceeded)
	b.want(b.post("/search", `{"query":"q"}`), 504, "embed_late", "")
}

func TestReconcileRoutes(t *testing.T) {
	t.Parallel()
	b := setup(t, func(_ *Config, b *bench) {
		b.runs.reports = []corpus.CollectionReport{{Collection: "default", Status: corpus.Inconsistent, Depth: corpus.Full, Findings: corpus.Counts{corpus.Orphan: 2}}}
		b.runs.history = []corpus.RunReport{{RunID: testID(1), State: corpus.RunDone, Depth: corpus.Full}, {RunID: testID(2), State: corpus.RunRunning, Depth: corpus.Quick}}
	})
	o := b.get("/admin/consistency").object(t)["collections"].([]any)[0].(map[string]any)
	if f := o["findings"].(map[string]any); len(f) != len(corpus.FindingKinds) || f["orphan"] != 2.0 || f["missing"] != 0.0 {
		t.Errorf("findings %v", f)
	}
	if o["sample"] == nil || o["repaired"].(map[string]any)["orphan"] != 0.0 {
		t.Errorf("report %v", o)
	}
	b.want(b.get("/admin/consistency?collection=unknown"), 404, "collection_not_found", "")
	a := b.post("/admin/reconcile", `{"collection":"default","depth":"deep","repair":true,"max_deletes":0.5,"force":true}`)
	if a.status != 202 || a.object(t)["run_id"] != testID(1).String() || a.header.Get("Location") != "/admin/reconcile/"+testID(1).String() {
		t.Errorf("%d %s", a.status, a.body)
	}
	if r := b.runs.started[0]; r.Depth != corpus.Deep || !r.Repair || r.MaxDeletes != 0.5 || !r.Force {
		t.Errorf("request %+v", r)
	}
	if a := b.post("/admin/reconcile", `{}`); a.status != 202 || b.runs.started[1].Depth != corpus.Full || b.runs.started[1].Collection != "" {
		t.Errorf("%d %+v", a.status, b.runs.started[1])
	}
	for body, pointer := range map[string]string{
		`{"depth":"shallow"}`: "/depth", `{"max_deletes":0}`: "/max_deletes", `{"max_deletes":1.5}`: "/max_deletes",
		`{"collection":"a/b"}`: "/collection", `{"delete_foreign":"none"}`: "/delete_foreign", `{"repair":true,"delete_foreign":"x"}`: "/delete_foreign",
	} {
		b.want(b.post("/admin/reconcile", body), 422, "validation_failed", pointer)
	}
	if o := b.get("/admin/reconcile/" + testID(2).String()).object(t); o["state"] != "running" || o["collections"] == nil {
		t.Errorf("run %v", o)
	}
	b.want(b.get("/admin/reconcile/"+testID(9).String()), 404, "run_not_found", "")
	b.want(b.get("/admin/reconcile/nonsense"), 404, "run_not_found", "")
	if a := b.do("DELETE", "/admin/reconcile/"+testID(2).String(), ""); a.status != 204 {
		t.Errorf("%d", a.status)
	}
	if n := len(b.get("/admin/reconcile?limit=1").object(t)["runs"].([]any)); n != 1 {
		t.Errorf("%d runs", n)
	}
	b.runs.fail = corpus.Errorf(corpus.Conflict, "reconcile_running", "a run is going on")
	b.want(b.post("/admin/reconcile", `{}`), 409, "reconcile_running", "")
	if o := b.get("/admin/explain?id=kb%2F42").object(t); o["query"] != "kb/42" || o["verdict"] != "healthy" {
		t.Errorf("explain %v", o)
	}
	b.want(b.get("/admin/explain"), 422, "validation_failed", "?id")
	b.want(b.get("/admin/explain?id=unknown"), 404, "document_not_found", "")
	if a := b.post("/admin/rollback", `{"collection":"c","decision":"adopt"}`); a.status != 204 || b.runs.resolutions[0] != "adopt c" {
		t.Errorf("%d %s", a.status, a.body)
	}
	b.want(b.post("/admin/rollback", `{"collection":"c","decision":"both"}`), 422, "validation_failed", "/decision")
	b.want(b.post("/admin/rollback", `{"decision":"adopt"}`), 422, "validation_failed", "/collection")
}

func TestAdminPage(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	b := setup(t, func(c *Config, b *bench) {
		c.Now = func() time.Time { return now }
		b.runs.reports = []corpus.CollectionReport{{Collection: "default", Status: corpus.Inconsistent, Depth: corpus.Full, CheckedAt: now.Add(-90 * time.Second), ExpectedPoints: 1234567,
			Findings: corpus.Counts{corpus.Orphan: 2}, Sample: []corpus.Finding{{Kind: corpus.Orphan, ID: testID(7), Document: "<script>alert(1)</script>", Detail: "evidence"}}}}
		b.runs.history = []corpus.RunReport{{RunID: testID(2), State: corpus.RunRunning, Depth: corpus.Quick, StartedAt: now.Add(-time.Second), Compared: 30, Expected: 120}}
	})
	a := b.get("/admin")
	body := string(a.body)
	for _, s := range []string{"default", "inconsistent", "1 minute ago", "1,234,567", "orphan", "Records the id as dead", "lockstep reconcile --collection default --depth full --repair", "evidence", "25 %", "Cancel"} {
		if !strings.Contains(body, s) {
			t.Errorf("the page lacks %q", s)
		}
	}
	if strings.Contains(body, "<script") {
		t.Error("a document's id was not escaped")
	}
	if strings.Contains(body, "http://") || strings.Contains(body, "https://") || strings.Contains(body, " src=") {
		t.Error("the page needs something from elsewhere")
	}
	if csp := a.header.Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'") || !strings.Contains(csp, "frame-ancestors 'none'") {
		t.Errorf("policy %q", csp)
	}
	form := func(v url.Values) answer {
		return b.do("POST", "/admin", v.Encode(), "Content-Type", "application/x-www-form-urlencoded", "Sec-Fetch-Site", "same-origin")
	}
	a = form(url.Values{"action": {"start"}, "depth": {"deep"}, "repair": {"on"}, "collection": {"default"}})
	if a.status != 303 || !strings.HasPrefix(a.header.Get("Location"), "/admin?run="+testID(1).String()) {
		t.Errorf("%d %v %s", a.status, a.header, a.body)
	}
	if r := b.runs.started[0]; r.Depth != corpus.Deep || !r.Repair || r.Collection != "default" {
		t.Errorf("started %+v", r)
	}
	if a := form(url.Values{"action": {"cancel"}, "run_id": {testID(2).String()}}); a.status != 303 {
		t.Errorf("cancel: %d", a.status)
	}
	for _, v := range []url.Values{{"action": {"drop"}}, {"action": {"start"}, "depth": {"x"}}, {"action": {"cancel"}, "run_id": {"x"}}} {
		a := form(v)
		if a.status < 400 || a.status > 422 || !strings.HasPrefix(a.header.Get("Content-Type"), "text/html") {
			t.Errorf("%v: %d %v", v, a.status, a.header)
		}
	}
	if a := b.do("POST", "/admin", `{"action":"start"}`); a.status != 415 {
		t.Errorf("JSON at the page's form: %d", a.status)
	}
	if a := b.get("/admin?refresh=5"); !strings.Contains(string(a.body), `http-equiv="refresh" content="5"`) {
		t.Error("the page does not refresh while a run goes on")
	}
	if a := b.get("/"); a.status != 303 || a.header.Get("Location") != "/docs" {
		t.Errorf("root: %d", a.status)
	}
}

func TestAdminPageWhileTheLedgerIsAway(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.server.deps.Reconciler = brokenRuns{b.runs}
	b.health = []Check{{Name: "postgres", Err: corpus.Errorf(corpus.Unavailable, "ledger_unavailable", "Postgres does not answer")}}
	a := b.get("/admin")
	if a.status != 200 || !strings.Contains(string(a.body), "Postgres does not answer") || !strings.Contains(string(a.body), "cannot be read now") {
		t.Errorf("%d %s", a.status, a.body)
	}
}

type brokenRuns struct{ *runs }

func (brokenRuns) Latest(context.Context, string) ([]corpus.CollectionReport, error) {
	return nil, errors.New("SELECT failed at 10.0.0.1")
}

func (brokenRuns) History(context.Context, string, int) ([]corpus.RunReport, error) {
	return nil, corpus.Errorf(corpus.Unavailable, "ledger_unavailable", "Postgres does not answer")
}

// TestGoldenProblems keeps the exact form of error replies: clients parse them.
func TestGoldenProblems(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config, _ *bench) { c.MaxBodyBytes = 200 })
	var got strings.Builder
	for _, c := range []struct{ name, method, path, body, contentType string }{
		{"unknown field", "POST", "/search", `{"query":"a","colection":"x"}`, "application/json"},
		{"several faults", "POST", "/search", `{"limit":0,"mode":"x","query":""}`, "application/json"},
		{"unknown route", "GET", "/nope", "", ""},
		{"unknown collection", "POST", "/search", `{"query":"a","collection":"unknown"}`, "application/json"},
		{"too large", "POST", "/search", `{"query":"` + strings.Repeat("x", 300) + `"}`, "application/json"},
		{"content type", "POST", "/search", `query=a`, "text/plain"},
		{"TEI", "POST", "/embed", `{"inputs":""}`, "application/json"},
		{"OpenAI", "POST", "/v1/embeddings", `{"input":["a",""]}`, "application/json"},
	} {
		a := b.do(c.method, c.path, c.body, "Content-Type", c.contentType, "X-Request-Id", "golden")
		fmt.Fprintf(&got, "# %s\n%s %s\n---\n%d %s\n%s\n\n", c.name, c.method, c.path, a.status, a.header.Get("Content-Type"), a.body)
	}
	golden(t, "problems.golden", got.String())
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; look at it, then run with -update:\n%s", path, got)
	}
}

func TestServeDrains(t *testing.T) {
	t.Parallel()
	gate, entered := make(chan struct{}), make(chan struct{})
	b := setup(t, func(_ *Config, b *bench) { b.ledger.gate, b.ledger.entered = gate, entered })
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- b.server.Serve(ctx, ln, nil, 10*time.Second) }()
	b.url = "http://" + ln.Addr().String()
	done := make(chan answer, 1)
	go func() { done <- b.post("/documents", `{"documents":[{"id":"a","text":"x"}]}`) }()
	<-entered
	stop()
	for !b.server.draining.Load() {
		runtime.Gosched() // draining has no event to wait for
	}
	gate <- struct{}{}
	if a := <-done; a.status != 202 {
		t.Errorf("the request under way got %d", a.status)
	}
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if res, err := http.Get(b.url + "/healthz"); err == nil {
		res.Body.Close()
		t.Error("still listening")
	}
}
