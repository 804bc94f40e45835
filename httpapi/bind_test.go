package httpapi

import (
	"fmt"
	"strings"
	"testing"
)

func TestBodiesAreReadStrictly(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config, _ *bench) { c.MaxBodyBytes = 4096 })
	long := strings.Repeat("x", 513)
	deep := strings.Repeat(`{"a":`, 20) + "1" + strings.Repeat("}", 20)
	doc := func(fields string) string { return `{"documents":[{` + fields + `}]}` }
	cases := []struct {
		name, path, body string
		header           []string
		status           int
		code, pointer    string
	}{
		{"empty body", "/search", "", nil, 400, "invalid_json", ""},
		{"white space", "/search", "  \n", nil, 400, "invalid_json", ""},
		{"truncated", "/search", `{"query":"a`, nil, 400, "invalid_json", "*"},
		{"trailing data", "/search", `{"query":"a"} x`, nil, 400, "invalid_json", "*"},
		{"two values", "/search", `{"query":"a"}{"query":"b"}`, nil, 400, "invalid_json", "*"},
		{"single quotes", "/search", `{'query':'a'}`, nil, 400, "invalid_json", "*"},
		{"comment", "/search", `{"query":"a" /*x*/}`, nil, 400, "invalid_json", "*"},
		{"NaN", "/search", `{"query":"a","score_threshold":NaN}`, nil, 400, "invalid_json", "*"},
		{"raw control character", "/search", "{\"query\":\"a\x00b\"}", nil, 400, "invalid_json", "*"},
		{"list instead of object", "/search", `["a"]`, nil, 422, "validation_failed", ""},
		{"null body", "/search", `null`, nil, 422, "validation_failed", ""},
		{"unknown field", "/search", `{"query":"a","colection":"x"}`, nil, 400, "unknown_field", "/colection"},
		{"letter case matters", "/search", `{"Query":"a"}`, nil, 400, "unknown_field", "/Query"},
		{"nested unknown field", "/search", `{"query":"a","filter":{"must":[{"key":"a","matches":1}]}}`, nil, 400, "unknown_field", "/filter/must/0/matches"},
		{"unknown field in a document", "/documents", doc(`"id":"a","text":"b","meta":{}`), nil, 400, "unknown_field", "/documents/0/meta"},
		{"duplicate field", "/search", `{"query":"a","query":"b"}`, nil, 400, "duplicate_field", "/query"},
		{"duplicate field in metadata", "/documents", doc(`"id":"a","text":"b","metadata":{"x":1,"x":2}`), nil, 400, "duplicate_field", "/documents/0/metadata/x"},
		{"number for a string", "/search", `{"query":5}`, nil, 422, "validation_failed", "/query"},
		{"string for a number", "/search", `{"query":"a","limit":"5"}`, nil, 422, "validation_failed", "/limit"},
		{"fraction for an integer", "/search", `{"query":"a","limit":5.5}`, nil, 422, "validation_failed", "/limit"},
		{"integer overflow", "/search", `{"query":"a","limit":99999999999999999999}`, nil, 422, "validation_failed", "/limit"},
		{"float overflow", "/search", `{"query":"a","score_threshold":1e999}`, nil, 422, "validation_failed", "/score_threshold"},
		{"float32 overflow", "/search", `{"vector":[1,1e39]}`, nil, 422, "validation_failed", "/vector/1"},
		{"null in a query vector", "/search", `{"vector":[1,null]}`, nil, 422, "validation_failed", "/vector/1"},
		{"null in sparse indices", "/search", `{"vectors":{"sparse":{"indices":[null],"values":[1]}}}`, nil, 422, "validation_failed", "/vectors/sparse/indices/0"},
		{"null in a brought vector", "/documents", doc(`"id":"a","metadata":{"x":[null]},"chunks":[{"text":"x","vectors":{"dense":[1,null]}}]`), nil, 422, "validation_failed", "/documents/0/chunks/0/vectors/dense/1"},
		{"null among texts", "/embed", `{"texts":["a",null]}`, nil, 422, "validation_failed", "/texts/1"},
		{"text in a vector", "/documents", doc(`"id":"a","chunks":[{"text":"x","vectors":{"dense":["1"]}}]`), nil, 422, "validation_failed", "/documents/0/chunks/0/vectors/dense/0"},
		{"metadata number overflow", "/documents", doc(`"id":"a","text":"b","metadata":{"x":[1e999]}`), nil, 422, "validation_failed", "/documents/0/metadata/x/0"},
		{"metadata is a list", "/documents", doc(`"id":"a","text":"b","metadata":[]`), nil, 422, "validation_failed", "/documents/0/metadata"},
		{"metadata too deep", "/documents", doc(`"id":"a","text":"b","metadata":` + deep), nil, 422, "validation_failed", "*"},
		{"NUL in a query", "/search", `{"query":"a\u0000b"}`, nil, 422, "validation_failed", "/query"},
		{"NUL in a filter", "/search", `{"query":"a","filter":{"must":[{"key":"k","match":"\u0000"}]}}`, nil, 422, "validation_failed", "/filter/must/0/match"},
		{"NUL in a text to embed", "/embed", `{"texts":["a","b\u0000"]}`, nil, 422, "validation_failed", "/texts/1"},
		{"NUL in a document", "/documents", doc(`"id":"a","text":"\u0000"`), nil, 422, "validation_failed", "/documents/0/text"},
		{"NUL in an id", "/documents", doc(`"id":"a\u0000","text":"x"`), nil, 422, "validation_failed", "/documents/0/id"},
		{"NUL in metadata", "/documents", doc(`"id":"a","text":"x","metadata":{"k":"\u0000"}`), nil, 422, "validation_failed", "/documents/0/metadata/k"},
		{"an escaped backslash is no NUL", "/embed", `{"texts":["\\u0000"],"batch_size":0}`, nil, 422, "validation_failed", "/batch_size"},
		{"invalid UTF-8", "/search", "{\"query\":\"a\xff\"}", nil, 400, "invalid_utf8", "/query"},
		{"invalid UTF-8 in a document", "/documents", "{\"documents\":[{\"id\":\"a\",\"text\":\"\xc3\x28\"}]}", nil, 400, "invalid_utf8", "/documents/0/text"},
		{"lone surrogate", "/search", `{"query":"\ud800"}`, nil, 400, "invalid_utf8", "/query"},
		{"too deep", "/search", `{"query":` + strings.Repeat("[", 2000) + strings.Repeat("]", 2000) + `}`, nil, 422, "validation_failed", "/query"},
		{"body over the limit", "/search", `{"query":"` + strings.Repeat("x", 5000) + `"}`, nil, 413, "body_too_large", ""},
		{"form", "/search", "query=a", []string{"Content-Type", "application/x-www-form-urlencoded"}, 415, "unsupported_media_type", ""},
		{"no content type", "/search", `{"query":"a"}`, []string{"Content-Type", ""}, 415, "unsupported_media_type", ""},
		{"other charset", "/search", `{"query":"a"}`, []string{"Content-Type", "application/json; charset=latin1"}, 415, "unsupported_media_type", ""},
		{"compressed", "/search", `x`, []string{"Content-Encoding", "gzip"}, 415, "unsupported_encoding", ""},
		{"ndjson where it is not taken", "/search", `{}`, []string{"Content-Type", "application/x-ndjson"}, 415, "unsupported_media_type", ""},

		{"no documents", "/documents", `{}`, nil, 422, "validation_failed", "/documents"},
		{"empty list of documents", "/documents", `{"documents":[]}`, nil, 422, "validation_failed", "/documents"},
		{"documents is an object", "/documents", `{"documents":{}}`, nil, 422, "validation_failed", "/documents"},
		{"no id", "/documents", doc(`"text":"x"`), nil, 422, "validation_failed", "/documents/0/id"},
		{"empty id", "/documents", doc(`"id":"","text":"x"`), nil, 422, "validation_failed", "/documents/0/id"},
		{"id of 513 bytes", "/documents", doc(`"id":"` + long + `","text":"x"`), nil, 422, "validation_failed", "/documents/0/id"},
		{"numeric id", "/documents", doc(`"id":7,"text":"x"`), nil, 422, "validation_failed", "/documents/0/id"},
		{"no text", "/documents", doc(`"id":"a"`), nil, 422, "validation_failed", "/documents/0"},
		{"empty text", "/documents", doc(`"id":"a","text":""`), nil, 422, "validation_failed", "/documents/0/text"},
		{"white space only", "/documents", doc(`"id":"a","text":" \n\u3000"`), nil, 422, "validation_failed", "/documents/0/text"},
		{"text and chunks", "/documents", doc(`"id":"a","text":"x","chunks":["y"]`), nil, 422, "validation_failed", "/documents/0"},
		{"empty chunks", "/documents", doc(`"id":"a","chunks":[]`), nil, 422, "validation_failed", "/documents/0/chunks"},
		{"empty chunk", "/documents", doc(`"id":"a","chunks":["x",""]`), nil, 422, "validation_failed", "/documents/0/chunks/1"},
		{"chunk is a number", "/documents", doc(`"id":"a","chunks":[5]`), nil, 422, "validation_failed", "/documents/0/chunks/0"},
		{"chunk with unknown field", "/documents", doc(`"id":"a","chunks":[{"text":"x","vector":[1]}]`), nil, 400, "unknown_field", "/documents/0/chunks/0/vector"},
		{"empty vectors", "/documents", doc(`"id":"a","chunks":[{"text":"x","vectors":{}}]`), nil, 422, "validation_failed", "/documents/0/chunks/0/vectors"},
		{"zero vector", "/documents", doc(`"id":"a","chunks":[{"text":"x","vectors":{"dense":[0,0]}}]`), nil, 422, "validation_failed", "/documents/0/chunks/0/vectors/dense"},
		{"sparse of two lengths", "/documents", doc(`"id":"a","chunks":[{"text":"x","vectors":{"sparse":{"indices":[1],"values":[]}}}]`), nil, 422, "validation_failed", "/documents/0/chunks/0/vectors/sparse"},
		{"sparse index twice", "/documents", doc(`"id":"a","chunks":[{"text":"x","vectors":{"sparse":{"indices":[1,1],"values":[1,2]}}}]`), nil, 422, "validation_failed", "/documents/0/chunks/0/vectors/sparse/indices"},
		{"negative sparse index", "/documents", doc(`"id":"a","chunks":[{"text":"x","vectors":{"sparse":{"indices":[-1],"values":[1]}}}]`), nil, 422, "validation_failed", "/documents/0/chunks/0/vectors/sparse/indices/0"},
		{"ragged colbert", "/documents", doc(`"id":"a","chunks":[{"text":"x","vectors":{"colbert":[[1,2],[3]]}}]`), nil, 422, "validation_failed", "/documents/0/chunks/0/vectors/colbert/1"},
		{"the same id twice", "/documents", `{"documents":[{"id":"a","text":"x"},{"id":"b","text":"x"},{"id":"a","text":"y"}]}`, nil, 422, "duplicate_id", "/documents/2/id"},
		{"bad collection", "/documents", `{"collection":"a/b","documents":[{"id":"a","text":"x"}]}`, nil, 422, "validation_failed", "/collection"},
		{"bad collection in the query", "/documents?collection=%20", `{"documents":[{"id":"a","text":"x"}]}`, nil, 422, "validation_failed", "?collection"},
		{"misspelt parameter", "/documents?colection=x", `{"documents":[{"id":"a","text":"x"}]}`, nil, 400, "unknown_parameter", ""},
		{"bad wait", "/documents?wait=maybe", `{"documents":[{"id":"a","text":"x"}]}`, nil, 422, "validation_failed", "?wait"},
		{"1001 documents", "/documents", `{"documents":[` + strings.TrimSuffix(strings.Repeat(`{},`, 1001), ",") + `]}`, nil, 422, "validation_failed", "/documents"},

		{"unknown collection", "/search", `{"collection":"unknown","query":"a"}`, nil, 404, "collection_not_found", ""},
		{"empty query", "/search", `{"query":""}`, nil, 422, "validation_failed", "/query"},
		{"blank query", "/search", `{"query":" \t"}`, nil, 422, "validation_failed", "/query"},
		{"no query", "/search", `{}`, nil, 422, "validation_failed", ""},
		{"query and vector", "/search", `{"query":"a","vector":[1]}`, nil, 422, "validation_failed", ""},
		{"limit 0", "/search", `{"query":"a","limit":0}`, nil, 422, "validation_failed", "/limit"},
		{"limit 1001", "/search", `{"query":"a","limit":1001}`, nil, 422, "validation_failed", "/limit"},
		{"negative offset", "/search", `{"query":"a","offset":-1}`, nil, 422, "validation_failed", "/offset"},
		{"unknown mode", "/search", `{"query":"a","mode":"fuzzy"}`, nil, 422, "validation_failed", "/mode"},
		{"unknown group", "/search", `{"query":"a","group_by":"lang"}`, nil, 422, "validation_failed", "/group_by"},
		{"unknown include", "/search", `{"query":"a","include":["text","score"]}`, nil, 422, "validation_failed", "/include/1"},
		{"zero query vector", "/search", `{"vector":[0,0]}`, nil, 422, "validation_failed", "/vector"},
		{"empty query vector", "/search", `{"vector":[]}`, nil, 422, "validation_failed", "/vector"},
		{"timeout 0", "/search", `{"query":"a","timeout_ms":0}`, nil, 422, "validation_failed", "/timeout_ms"},
		{"empty like", "/search", `{"like":""}`, nil, 422, "validation_failed", "/like"},
		{"no queries", "/search", `{"queries":[]}`, nil, 422, "validation_failed", "/queries"},
		{"queries and query", "/search", `{"query":"a","queries":["b"]}`, nil, 422, "validation_failed", "/queries"},
		{"a bad query of a batch", "/search", `{"queries":["a",{"query":"b","limit":0}]}`, nil, 422, "validation_failed", "/queries/1/limit"},
		{"a query of a batch is a number", "/search", `{"queries":["a",7]}`, nil, 422, "validation_failed", "/queries/1"},
		{"101 queries", "/search", `{"queries":[` + strings.TrimSuffix(strings.Repeat(`"a",`, 101), ",") + `]}`, nil, 422, "validation_failed", "/queries"},
		{"bad fusion", "/search", `{"query":"a","fusion":"borda"}`, nil, 422, "validation_failed", "/fusion/method"},
		{"negative weight", "/search", `{"query":"a","fusion":{"method":"rrf","weights":[1,-1]}}`, nil, 422, "validation_failed", "/fusion/weights/1"},

		{"filter without test", "/search", `{"query":"a","filter":{"must":[{"key":"k"}]}}`, nil, 422, "validation_failed", "/filter/must/0"},
		{"filter without key", "/search", `{"query":"a","filter":{"must":[{"match":"k"}]}}`, nil, 422, "validation_failed", "/filter/must/0/key"},
		{"filter with empty key", "/search", `{"query":"a","filter":{"must":[{"key":"","match":"k"}]}}`, nil, 422, "validation_failed", "/filter/must/0/key"},
		{"filter with two tests", "/search", `{"query":"a","filter":{"must":[{"key":"k","match":1,"any":[1]}]}}`, nil, 422, "validation_failed", "/filter/must/0"},
		{"filter matches a float", "/search", `{"query":"a","filter":{"must":[{"key":"k","match":1.5}]}}`, nil, 422, "validation_failed", "/filter/must/0/match"},
		{"filter matches null", "/search", `{"query":"a","filter":{"must":[{"key":"k","match":null}]}}`, nil, 422, "validation_failed", "/filter/must/0/match"},
		{"filter any of nothing", "/search", `{"query":"a","filter":{"should":[{"key":"k","any":[]}]}}`, nil, 422, "validation_failed", "/filter/should/0/any"},
		{"empty range", "/search", `{"query":"a","filter":{"must_not":[{"key":"k","range":{}}]}}`, nil, 422, "validation_failed", "/filter/must_not/0/range"},
		{"range of a word", "/search", `{"query":"a","filter":{"must":[{"key":"k","range":{"gte":"soon"}}]}}`, nil, 422, "validation_failed", "/filter/must/0/range/gte"},
		{"range of number and time", "/search", `{"query":"a","filter":{"must":[{"key":"k","range":{"gte":1,"lt":"2026-01-01"}}]}}`, nil, 422, "validation_failed", "/filter/must/0/range"},
		{"range overflow", "/search", `{"query":"a","filter":{"must":[{"key":"k","range":{"gte":1e999}}]}}`, nil, 422, "validation_failed", "/filter/must/0/range/gte"},
		{"deep filter", "/search", `{"query":"a","filter":` + strings.Repeat(`{"must":[{"filter":`, 9) + `{}` + strings.Repeat(`}]}`, 9) + `}`, nil, 422, "validation_failed", "*"},
		{"wide filter", "/search", `{"query":"a","filter":{"must":[` + strings.TrimSuffix(strings.Repeat(`{},`, 300), ",") + `]}}`, nil, 422, "validation_failed", "/filter"},

		{"no texts", "/embed", `{}`, nil, 422, "validation_failed", "/texts"},
		{"empty texts", "/embed", `{"texts":[]}`, nil, 422, "validation_failed", "/texts"},
		{"empty text in texts", "/embed", `{"texts":["a","","c"]}`, nil, 422, "validation_failed", "/texts/1"},
		{"texts is a string", "/embed", `{"texts":"a"}`, nil, 422, "validation_failed", "/texts"},
		{"1001 texts", "/embed", `{"texts":[` + strings.TrimSuffix(strings.Repeat(`"",`, 1001), ",") + `]}`, nil, 422, "validation_failed", "/texts"},
		{"max_length 0", "/embed", `{"texts":["a"],"max_length":0}`, nil, 422, "validation_failed", "/max_length"},
		{"max_length over", "/embed", `{"texts":["a"],"max_length":100000}`, nil, 422, "validation_failed", "/max_length"},
		{"batch_size 0", "/embed", `{"texts":["a"],"batch_size":0}`, nil, 422, "validation_failed", "/batch_size"},
		{"batch_size 129", "/embed", `{"texts":["a"],"batch_size":129}`, nil, 422, "validation_failed", "/batch_size"},
		{"unknown output", "/embed", `{"texts":["a"],"output_type":"splade"}`, nil, 422, "validation_failed", "/output_type"},
		{"no output", "/embed", `{"texts":["a"],"output_type":[]}`, nil, 422, "validation_failed", "/output_type"},
		{"unknown encoding", "/embed", `{"texts":["a"],"encoding":"hex"}`, nil, 422, "validation_failed", "/encoding"},
		{"text too long, not to be cut", "/embed", `{"texts":["a b c","a"],"max_length":4,"truncate":false}`, nil, 422, "input_too_long", "/texts/0"},
		{"unknown embed field", "/embed", `{"texts":["a"],"model":"x"}`, nil, 400, "unknown_field", "/model"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b := *b
			b.t = t
			before := b.ledger.calls
			b.want(b.do("POST", c.path, c.body, c.header...), c.status, c.code, c.pointer)
			if b.ledger.calls != before {
				t.Error("bad input reached the ledger")
			}
		})
	}
}

func TestBodyLimitIsNamed(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config, _ *bench) { c.MaxBodyBytes = 100 })
	a := b.post("/search", `{"query":"`+strings.Repeat("x", 200)+`"}`)
	b.want(a, 413, "body_too_large", "")
	if a.object(t)["limit"] != float64(100) {
		t.Errorf("limit is not named: %s", a.body)
	}
	// A body of unknown length is cut off while it is read.
	a = b.send("POST", "/search", struct{ *strings.Reader }{strings.NewReader(`{"query":"` + strings.Repeat("x", 200) + `"}`)})
	b.want(a, 413, "body_too_large", "")
	// Exactly the limit passes.
	body := `{"query":"` + strings.Repeat("x", 100-12) + `"}`
	if a := b.post("/search", body); len(body) != 100 || a.status != 200 {
		t.Errorf("a body of %d bytes got %d", len(body), a.status)
	}
}

func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		`{"query":"a","filter":{"must":[{"key":"k","range":{"gte":1}}]}}`,
		`{"documents":[{"id":"a","chunks":[{"text":"x","vectors":{"dense":[1,2],"sparse":{"indices":[1],"values":[2]}}}]}]}`,
		`{"queries":["a",{"query":"b","fusion":{"method":"rrf"}}]}`,
		`{"texts":["a"],"output_type":["dense","sparse"]}`, `{"inputs":[[1,2],"a"]}`, `{"input":[1,2]}`,
		`{"name":"c","vectors":["dense"],"fields":{"a.b":"keyword"}}`, "{\"query\":\"\xff\"}", `{"query":"\u0000"}`, `[[[[`,
	} {
		f.Add([]byte(seed))
	}
	s := &Server{cfg: Config{}.withDefaults()}
	f.Fuzz(func(t *testing.T, body []byte) {
		refused := func(err error) {
			if err == nil {
				return
			}
			if p := toProblem(err); p.Status < 400 || p.Status > 422 || p.Code == "" || p.Detail == "" {
				t.Fatalf("bad problem %+v for %q", p, body)
			}
		}
		var docs ingestJSON
		if err := unmarshal(body, &docs, strict); err != nil {
			refused(err)
		}
		for i := range docs.Documents {
			d, bad := docs.Documents[i].document(fmt.Sprintf("/documents/%d", i))
			if len(bad) > 0 {
				continue
			}
			if d.ID == "" || len(d.ID) > 512 || textFault(d.Text) != "" {
				t.Fatalf("accepted %+v", d)
			}
			_ = d.Metadata.JSON() // panics if a value got through that JSON cannot hold
		}
		var q searchBatchJSON
		if err := decode(body, &q, strict); err != nil {
			refused(err)
		} else if req, bad := s.searchRequest(&q.searchJSON, ""); len(bad) == 0 {
			req.Filter.Matches(nil)
			if req.Vectors != nil && !req.Vectors.Finite() {
				t.Fatalf("accepted a vector that is not finite: %q", body)
			}
		}
		var c collectionJSON
		refused(decode(body, &c, strict))
		var e embedJSON
		refused(decode(body, &e, strict))
		var tr teiJSON
		if err := decode(body, &tr, lenient); err != nil {
			refused(err)
		} else {
			refused(tr.Inputs.check("inputs"))
		}
		var o openAIJSON
		refused(decode(body, &o, lenient))
		firstOf(body, "inputs", "texts")
	})
}
