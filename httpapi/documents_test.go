package httpapi

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

func results(t *testing.T, a answer) []map[string]any {
	t.Helper()
	list, ok := a.object(t)["results"].([]any)
	if !ok {
		t.Fatalf("%d without results: %s", a.status, a.body)
	}
	var out []map[string]any
	for _, r := range list {
		out = append(out, r.(map[string]any))
	}
	return out
}

func TestPutDocuments(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	a := b.post("/documents", `{"documents":[{"id":"kb/42","text":"hello","metadata":{"lang":"en","n":9007199254740993,"tags":["a"]}}]}`)
	if a.status != http.StatusAccepted || results(t, a)[0]["status"] != "accepted" {
		t.Errorf("without wait: %d %s", a.status, a.body)
	}
	a = b.post("/documents", `{"collection":"other","wait":true,"documents":[{"id":"a","text":"x"},{"id":"b","chunks":["y",{"text":"z","vectors":{"dense":[3,4],"sparse":{"indices":[7,2],"values":[1,2]}}}]}]}`)
	if a.status != http.StatusOK || a.object(t)["collection"] != "other" {
		t.Errorf("with wait: %d %s", a.status, a.body)
	}
	r := results(t, a)
	if len(r) != 2 || r[1]["status"] != "indexed" || r[1]["chunks"] != 2.0 || r[1]["version"] != 1.0 {
		t.Errorf("results %v", r)
	}
	if md := b.ledger.docs["default"]["kb/42"].Metadata; md["n"] != int64(9007199254740993) {
		t.Errorf("a large integer was rounded: %v", md)
	}
	// wait in the query is as good.
	if a := b.post("/documents?wait=true&collection=q", `{"documents":[{"id":"a","text":"x"}]}`); a.status != 200 || a.object(t)["collection"] != "q" {
		t.Errorf("wait=true: %d %s", a.status, a.body)
	}
}

func TestBroughtVectorsAreSorted(t *testing.T) {
	t.Parallel()
	v := vectorsJSON{Sparse: &sparseJSON{Indices: []uint32{7, 2, 9}, Values: []float32{1, 2, 3}}}
	got, bad := v.vectors("")
	if len(bad) > 0 || fmt.Sprint(got.Sparse.Indices, got.Sparse.Values) != "[2 7 9] [2 1 3]" {
		t.Errorf("got %v, %v", got.Sparse, bad)
	}
}

func TestEachDocumentFailsAlone(t *testing.T) {
	t.Parallel()
	b := setup(t, func(_ *Config, b *bench) {
		b.ledger.failDoc = func(id string) *corpus.Error {
			if id == "unlucky" {
				return corpus.Errorf(corpus.Unavailable, "index_unavailable", "the index does not answer")
			}
			return nil
		}
	})
	a := b.post("/documents", `{"documents":[{"id":"ok","text":"x"},{"id":"","text":"x"},{"id":"unlucky","text":"x"},{"id":"nul","text":"a\u0000"}]}`)
	if a.status != http.StatusOK {
		t.Fatalf("%d %s", a.status, a.body)
	}
	r := results(t, a)
	for i, expected := range []string{"accepted", "failed", "failed", "failed"} {
		if r[i]["status"] != expected {
			t.Errorf("document %d is %v, expected %s", i, r[i]["status"], expected)
		}
	}
	if e := r[1]["error"].(map[string]any); e["code"] != "validation_failed" {
		t.Errorf("error %v", e)
	}
	if e := r[2]["error"].(map[string]any); e["code"] != "index_unavailable" || e["detail"] != "the index does not answer" {
		t.Errorf("error %v", e)
	}
	if len(b.ledger.batches) != 1 || b.ledger.batches[0] != 2 {
		t.Errorf("the ledger was sent %v", b.ledger.batches)
	}
}

func TestAllInvalidIsOneProblem(t *testing.T) {
	t.Parallel()
	b := setup(t, func(_ *Config, b *bench) {
		b.ledger.failDoc = func(string) *corpus.Error {
			return corpus.Errorf(corpus.Invalid, "vectors_required", "this collection takes only vectors")
		}
	})
	b.want(b.post("/documents", `{"documents":[{"id":"a","text":"x"},{"id":"b","text":"x"}]}`), 422, "vectors_required", "/documents/0")
}

func TestLedgerErrorsKeepTheirKind(t *testing.T) {
	t.Parallel()
	cases := []struct {
		err    error
		status int
		code   string
		after  string
	}{
		{&corpus.Error{Kind: corpus.Overloaded, Code: "overloaded", Detail: "full", RetryAfter: 2500 * time.Millisecond}, 429, "overloaded", "3"},
		{corpus.Errorf(corpus.Unavailable, "ledger_unavailable", "Postgres does not answer"), 503, "ledger_unavailable", "1"},
		{corpus.Errorf(corpus.Conflict, "collection_stopped", "stopped"), 409, "collection_stopped", ""},
		{corpus.Errorf(corpus.Invalid, "x", "y"), 422, "x", ""},
		{corpus.Errorf(corpus.NotFound, "x", "y"), 404, "x", ""},
		{fmt.Errorf("doing: %w", corpus.Errorf(corpus.Internal, "broken", "told to people")), 500, "broken", ""},
		{fmt.Errorf("password=hunter2 at 10.0.0.1"), 500, "internal", ""},
	}
	for _, c := range cases {
		b := setup(t, func(_ *Config, b *bench) { b.ledger.fail = func(string) error { return c.err } })
		a := b.post("/documents", `{"documents":[{"id":"a","text":"x"}]}`)
		b.want(a, c.status, c.code, "*")
		if got := a.header.Get("Retry-After"); got != c.after {
			t.Errorf("%v: Retry-After %q, expected %q", c.err, got, c.after)
		}
		if strings.Contains(string(a.body), "hunter2") {
			t.Errorf("an internal text was shown: %s", a.body)
		}
	}
}

// TestIDsAreByteExact writes, reads, patches and deletes under ids that paths usually mangle.
func TestIDsAreByteExact(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	ids := []string{
		"a/b", "..", ".", "../../etc/passwd", "a//b", "//", "/", " ", "%2F", "a%2Fb", "?x=1#y", "ü/日本", "a+b", "a b", "e\u0301",
		"\n", "\u202e", `\`, ";,:@&=", strings.Repeat("é", 256), "https://example.org/a?b=c",
	}
	for _, id := range ids {
		raw, err := encodeJSONString(id)
		if err != nil {
			t.Fatal(err)
		}
		if a := b.post("/documents", `{"documents":[{"id":`+raw+`,"text":"x"}]}`); a.status != 202 {
			t.Fatalf("%q: %d %s", id, a.status, a.body)
		}
		path := "/documents/" + url.PathEscape(id)
		a := b.get(path)
		if a.status != 200 || a.object(t)["id"] != id {
			t.Errorf("GET %s: %d %s", path, a.status, a.body)
			continue
		}
		if a := b.do("PATCH", path, `{"metadata":{"k":1}}`); a.status != 202 {
			t.Errorf("PATCH %s: %d %s", path, a.status, a.body)
		}
		if a := b.do("DELETE", path+"?wait=true", ""); a.status != 200 {
			t.Errorf("DELETE %s: %d %s", path, a.status, a.body)
		}
		if len(b.ledger.docs["default"]) != 0 {
			t.Fatalf("%q: left %v", id, b.ledger.docs["default"])
		}
	}
	// Slashes may stand as they are.
	b.post("/documents", `{"documents":[{"id":"a/b//../c","text":"x"}]}`)
	if a := b.get("/documents/a/b//../c"); a.status != 200 {
		t.Errorf("unescaped: %d %s", a.status, a.body)
	}
	for path, code := range map[string]string{
		"/documents/": "empty_id", "/documents/" + strings.Repeat("x", 513): "id_too_long", "/documents/%FF": "invalid_text", "/documents/a%00b": "invalid_text",
	} {
		a := b.get(path)
		b.want(a, 422, "validation_failed", "")
		if errs := a.object(t)["errors"].([]any); errs[0].(map[string]any)["code"] != code {
			t.Errorf("%s: %s", path, a.body)
		}
	}
	if a := b.get("/documents/" + strings.Repeat("x", 512)); a.status != 404 {
		t.Errorf("512 bytes: %d", a.status)
	}
}

func encodeJSONString(s string) (string, error) {
	b, err := jsonMarshal(s)
	return string(b), err
}

func TestDocumentRoutes(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for i := range 5 {
		b.post("/documents", fmt.Sprintf(`{"documents":[{"id":"d%d","text":"x"}]}`, i))
	}
	var seen []string
	after := ""
	for range 10 {
		a := b.get("/documents?limit=2&after=" + url.QueryEscape(after))
		o := a.object(t)
		for _, d := range o["documents"].([]any) {
			d := d.(map[string]any)
			seen = append(seen, d["id"].(string))
			if _, ok := d["chunks"]; ok {
				t.Error("a listing shows chunks")
			}
			if d["version"] != 1.0 {
				t.Errorf("version %v", d["version"])
			}
		}
		next, ok := o["next"].(string)
		if !ok {
			break
		}
		after = next
	}
	if got := strings.Join(seen, " "); got != "d0 d1 d2 d3 d4" {
		t.Errorf("pages gave %q", got)
	}
	o := b.get("/documents/d0").object(t)
	if c := o["chunks"].([]any)[0].(map[string]any); c["state"] != "indexed" || c["text"] != "x" || o["target_version"] != 1.0 {
		t.Errorf("document %v", o)
	}
	b.want(b.get("/documents/nope"), 404, "document_not_found", "")
	b.want(b.do("DELETE", "/documents/nope", ""), 404, "document_not_found", "")
	b.want(b.do("PATCH", "/documents/nope", `{"metadata":{}}`), 404, "document_not_found", "")
	b.want(b.do("PATCH", "/documents/d0", `{}`), 422, "validation_failed", "/metadata")
	b.want(b.do("PATCH", "/documents/d0", `{"metadata":{"a":"\u0000"}}`), 422, "validation_failed", "/metadata/a")
	b.want(b.do("PATCH", "/documents/d0", `{"metadata":{},"text":"x"}`), 400, "unknown_field", "/text")
	b.want(b.get("/documents?limit=0"), 422, "validation_failed", "?limit")
	b.want(b.get("/documents?limit=1001"), 422, "validation_failed", "?limit")
	b.want(b.get("/documents?after=%FF"), 422, "validation_failed", "?after")
	if a := b.do("PATCH", "/documents/d0?wait=true", `{"metadata":{"a":1}}`); a.status != 200 {
		t.Errorf("PATCH with wait: %d", a.status)
	}
	if a := b.do("DELETE", "/documents/d0", ""); a.status != 202 {
		t.Errorf("DELETE: %d", a.status)
	}
}

func TestUnknownRoutesAndMethods(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.want(b.get("/nope"), 404, "route_not_found", "")
	a := b.do("PUT", "/documents", "{}")
	b.want(a, 405, "method_not_allowed", "")
	if allow := a.header.Get("Allow"); !strings.Contains(allow, "POST") {
		t.Errorf("Allow %q", allow)
	}
	b.want(b.do("FROB", "/documents", ""), 405, "method_not_allowed", "")
}

func TestCollections(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	a := b.post("/collections", `{"name":"c1","chunking":{"target_tokens":128,"overlap_tokens":16},"fields":{"lang":"keyword","a.b":"integer"},"vectors":["dense","sparse"],"quantization":"scalar","dense_type":"float16","on_disk":true}`)
	if a.status != 201 || a.header.Get("Location") != "/collections/c1" {
		t.Fatalf("%d %s", a.status, a.body)
	}
	s := b.ledger.collections["c1"].Settings
	if s.Vectors != corpus.Dense|corpus.SparseHead || s.Chunking.TargetTokens != 128 || s.Fields["a.b"] != corpus.Integer || s.Quantization != "scalar" || !s.OnDisk || s.DenseType != "float16" {
		t.Errorf("settings %+v", s)
	}
	if a := b.post("/collections/c2", `{"model":"external","dense":{"size":1024}}`); a.status != 201 {
		t.Errorf("%d %s", a.status, a.body)
	}
	if s := b.ledger.collections["c2"].Settings; s.Model != corpus.ExternalModel || s.DenseSize != 1024 || s.Vectors != corpus.Dense {
		t.Errorf("settings %+v", s)
	}
	if a := b.do("POST", "/collections/c3", "", "Content-Type", ""); a.status != 201 {
		t.Errorf("without a body: %d %s", a.status, a.body)
	}
	b.want(b.post("/collections", `{"name":"c1"}`), 409, "collection_exists", "")
	if n := len(b.get("/collections").object(t)["collections"].([]any)); n != 3 {
		t.Errorf("%d collections", n)
	}
	if o := b.get("/collections/c1").object(t); o["name"] != "c1" || o["dense_type"] != "float16" {
		t.Errorf("%v", o)
	}
	if a := b.do("DELETE", "/collections/c1", ""); a.status != 204 || len(a.body) != 0 {
		t.Errorf("%d %s", a.status, a.body)
	}
	b.want(b.get("/collections/c1"), 404, "collection_not_found", "")
	b.want(b.do("DELETE", "/collections/c1", ""), 404, "collection_not_found", "")
	for body, pointer := range map[string]string{
		`{}`: "/name", `{"name":""}`: "/name", `{"name":".."}`: "/name", `{"name":"a b"}`: "/name", `{"name":"` + strings.Repeat("x", 129) + `"}`: "/name",
		`{"name":"x","model":"gpt"}`:                                                 "/model",
		`{"name":"x","model":"external"}`:                                            "/dense/size",
		`{"name":"x","model":"external","dense":{"size":0}}`:                         "/dense/size",
		`{"name":"x","dense":{"size":4}}`:                                            "/dense",
		`{"name":"x","vectors":[]}`:                                                  "/vectors",
		`{"name":"x","vectors":["dense","bm25"]}`:                                    "/vectors/1",
		`{"name":"x","chunking":{"target_tokens":1}}`:                                "/chunking/target_tokens",
		`{"name":"x","chunking":{"target_tokens":100000}}`:                           "/chunking/target_tokens",
		`{"name":"x","chunking":{"target_tokens":100,"overlap_tokens":90}}`:          "/chunking/overlap_tokens",
		`{"name":"x","chunking":{"overlap_tokens":9}}`:                               "/chunking/target_tokens",
		`{"name":"x","fields":{"a/b":"geo"}}`:                                        "/fields/a~1b",
		`{"name":"x","fields":{"a..b":"keyword"}}`:                                   "/fields/a..b",
		`{"name":"x","quantization":"product"}`:                                      "/quantization",
		`{"name":"x","dense_type":"float64"}`:                                        "/dense_type",
		`{"name":"x","model":"external","vectors":["sparse"],"dense":{"size":1024}}`: "/dense",
	} {
		b.want(b.post("/collections", body), 422, "validation_failed", pointer)
	}
	b.want(b.post("/collections/x", `{"name":"y"}`), 422, "validation_failed", "/name")
}
