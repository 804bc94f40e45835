package httpapi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"mime"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// contract is the published document, compiled so that values can be held against it.
type contract struct {
	t        testing.TB
	doc      tree
	compiler *jsonschema.Compiler
	compiled map[string]*jsonschema.Schema
}

const contractURL = "mem:///openapi.json"

func loadContract(t testing.TB) *contract {
	t.Helper()
	d, err := loadDocument("test")
	if err != nil {
		t.Fatal(err)
	}
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(d.json))
	if err != nil {
		t.Fatal(err)
	}
	c := &contract{t: t, doc: v.(tree), compiler: jsonschema.NewCompiler(), compiled: map[string]*jsonschema.Schema{}}
	c.compiler.DefaultDraft(jsonschema.Draft2020)
	if err := c.compiler.AddResource(contractURL, v); err != nil {
		t.Fatal(err)
	}
	return c
}

// check holds a value against the schema at a place of the document.
func (c *contract) check(place string, v any) error {
	s, ok := c.compiled[place]
	if !ok {
		var err error
		if s, err = c.compiler.Compile(contractURL + "#" + place); err != nil {
			c.t.Fatalf("schema at %s: %v", place, err)
		}
		c.compiled[place] = s
	}
	return s.Validate(v)
}

func place(parts ...string) string {
	var b strings.Builder
	for _, p := range parts {
		b.WriteString("/" + url.PathEscape(pointerToken(p)))
	}
	return b.String()
}

// operation is one method of one path of the document.
type operation struct {
	method, path string
	at           []string // place in the document
	tree         tree
	item         tree
}

func (c *contract) operations() []operation {
	var out []operation
	paths := child(c.doc, "paths")
	for path := range paths {
		for _, m := range []string{"get", "post", "patch", "delete", "put", "head", "options"} {
			if op := child(paths, path, m); op != nil {
				out = append(out, operation{strings.ToUpper(m), path, []string{"paths", path, m}, op, child(paths, path)})
			}
		}
	}
	slices.SortFunc(out, func(a, b operation) int { return strings.Compare(a.path+a.method, b.path+b.method) })
	return out
}

func (c *contract) resolve(t tree) (tree, []string) {
	ref, ok := t["$ref"].(string)
	if !ok {
		return t, nil
	}
	at := strings.Split(strings.TrimPrefix(ref, "#/"), "/")
	return child(c.doc, at...), at
}

// schemaOf returns the place of the schema of a reply, and whether the document knows of one.
func (c *contract) schemaOf(op operation, status int, media string) (at string, known bool) {
	name := strconv.Itoa(status)
	responses := child(op.tree, "responses")
	if responses[name] == nil {
		if name = "default"; responses[name] == nil || status < 400 {
			return "", false
		}
	}
	where := append(slices.Clone(op.at), "responses", name)
	r, elsewhere := c.resolve(child(responses, name))
	if elsewhere != nil {
		where = elsewhere
	}
	content := child(r, "content")
	if len(content) == 0 {
		return "", media == ""
	}
	if content[media] == nil {
		return "", false
	}
	return place(append(where, "content", media, "schema")...), true
}

func TestContractListsEveryRoute(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	c := loadContract(t)
	documented := map[string]operation{}
	ids := map[string]bool{}
	for _, op := range c.operations() {
		documented[op.method+" "+op.path] = op
		id := text(op.tree, "operationId")
		if id == "" || ids[id] {
			t.Errorf("%s %s: operationId %q is missing or taken", op.method, op.path, id)
		}
		ids[id] = true
		if text(op.tree, "summary") == "" || len(list(op.tree, "tags")) == 0 {
			t.Errorf("%s %s lacks a summary or a tag", op.method, op.path)
		}
	}
	for _, rt := range b.server.routes {
		path := rt.path
		for _, p := range []string{"name", "run_id", "model"} {
			path = strings.ReplaceAll(path, ":"+p, "{"+p+"}")
		}
		path = strings.Replace(path, "/*", "/{id}", 1)
		key := rt.method + " " + path
		op, ok := documented[key]
		if !ok {
			t.Errorf("%s is not documented", key)
			continue
		}
		delete(documented, key)
		_, open := op.tree["security"]
		if scope := text(op.tree, "x-scope"); Scope(scope) != rt.scope || open != (rt.scope == Public) {
			t.Errorf("%s: documented scope %q, open %v; the route has %q", key, scope, open, rt.scope)
		}
		// Every parameter of the path is declared.
		for _, part := range strings.Split(path, "/") {
			if name, ok := strings.CutPrefix(part, "{"); ok && !declares(c, op, strings.TrimSuffix(name, "}")) {
				t.Errorf("%s: the parameter %s is not declared", key, part)
			}
		}
	}
	for key := range documented {
		t.Errorf("%s is documented and has no route", key)
	}
}

func declares(c *contract, op operation, name string) bool {
	for _, raw := range append(list(op.item, "parameters"), list(op.tree, "parameters")...) {
		p, _ := c.resolve(raw.(tree))
		if text(p, "name") == name && text(p, "in") == "path" && p["required"] == true {
			return true
		}
	}
	return false
}

// TestContractIsSound compiles every schema, follows every reference and holds every example
// against its schema.
func TestContractIsSound(t *testing.T) {
	t.Parallel()
	c := loadContract(t)
	var walk func(v any, at []string)
	walk = func(v any, at []string) {
		switch x := v.(type) {
		case tree:
			if ref, ok := x["$ref"].(string); ok {
				if target, _ := c.resolve(x); target == nil {
					t.Errorf("%v: %s leads nowhere", at, ref)
				}
			}
			if schema, ok := x["schema"]; ok {
				p := place(append(slices.Clone(at), "schema")...)
				_ = schema
				if example, ok := x["example"]; ok {
					if err := c.check(p, example); err != nil {
						t.Errorf("the example at %v does not fit its schema: %v", at, err)
					}
				} else {
					_ = c.check(p, nil) // only that it compiles
				}
			}
			for k, e := range x {
				walk(e, append(slices.Clone(at), k))
			}
		case []any:
			for i, e := range x {
				walk(e, append(slices.Clone(at), strconv.Itoa(i)))
			}
		}
	}
	walk(c.doc, nil)
	for name := range child(c.doc, "components", "schemas") {
		_ = c.check(place("components", "schemas", name), nil)
	}
	var kinds []string
	for _, k := range list(child(c.doc, "components", "schemas", "Counts"), "required") {
		kinds = append(kinds, k.(string))
	}
	var want []string
	for _, k := range corpus.FindingKinds {
		want = append(want, string(k))
	}
	if !slices.Equal(kinds, want) {
		t.Errorf("the contract's findings are %v, not %v", kinds, want)
	}
}

// checkReply fails when a reply is not what the document says of its operation.
func (c *contract) checkReply(t *testing.T, op operation, a answer, request string) {
	t.Helper()
	media, _, _ := mime.ParseMediaType(a.header.Get("Content-Type"))
	if a.status == http.StatusInternalServerError {
		t.Errorf("%s %s answered 500 to %.300s: %s", op.method, op.path, request, a.body)
		return
	}
	at, known := c.schemaOf(op, a.status, media)
	if !known {
		t.Errorf("%s %s: %d with %q is not documented (request %.300s): %.300s", op.method, op.path, a.status, media, request, a.body)
		return
	}
	if at == "" || !strings.HasSuffix(media, "json") || media == mediaNDJSON {
		return
	}
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(a.body))
	if err != nil {
		t.Errorf("%s %s: the reply is no JSON: %v", op.method, op.path, err)
		return
	}
	if err := c.check(at, v); err != nil {
		t.Errorf("%s %s: the %d reply to %.300s breaks the contract: %v\n%.500s", op.method, op.path, a.status, request, err, a.body)
	}
}

// TestContractAgainstHandlers generates requests from the contract, well-formed and damaged,
// and holds every reply against it. A request that fits the schema may be refused for what a
// schema cannot say, but never with 400 for an unknown field, and never with 500.
func TestContractAgainstHandlers(t *testing.T) {
	t.Parallel()
	seed := uint64(20261123)
	if s := os.Getenv("LOCKSTEP_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d", seed)
	c := loadContract(t)
	b := setup(t, func(_ *Config, b *bench) {
		b.runs.reports = []corpus.CollectionReport{{Collection: "default", Status: corpus.Consistent, Depth: corpus.Full}}
		b.runs.history = []corpus.RunReport{{RunID: testID(1), State: corpus.RunDone, Depth: corpus.Full, Collections: b.runs.reports}}
	})
	b.post("/collections", `{"name":"articles"}`)
	for _, op := range c.operations() {
		t.Run(op.method+" "+op.path, func(t *testing.T) {
			b := *b
			b.t = t
			b.post("/documents", `{"wait":true,"documents":[{"id":"kb/42","text":"x"}]}`)
			g := &generator{rng: rand.New(rand.NewPCG(seed, uint64(len(op.path)))), c: c}
			content := child(op.tree, "requestBody", "content")
			rounds := 30
			if child(content, mediaJSON) == nil {
				rounds = 3
			}
			for round := range rounds {
				path := g.path(op, round)
				body, media := "", ""
				var schemaAt string
				if m := child(content, mediaJSON); m != nil {
					media, schemaAt = mediaJSON, place(append(slices.Clone(op.at), "requestBody", "content", mediaJSON, "schema")...)
					v := m["example"]
					if round > 0 {
						v = g.value(child(m, "schema"), 0)
					}
					if round%2 == 1 {
						v = g.damage(v)
					}
					raw, err := json.Marshal(v)
					if err != nil {
						t.Fatal(err)
					}
					body = string(raw)
				}
				a := b.do(op.method, path, body, "Content-Type", media)
				c.checkReply(t, op, a, path+" "+body)
				if schemaAt == "" {
					continue
				}
				v, err := jsonschema.UnmarshalJSON(strings.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				fits := c.check(schemaAt, withoutNulls(v)) == nil
				if fits && a.status == http.StatusBadRequest && strings.Contains(string(a.body), "unknown_field") {
					t.Errorf("%s fits the contract and is refused: %s", body, a.body)
				}
				// Documents fail one by one, inside a 200.
				if !fits && a.status < 300 && op.path != "/documents" && len(list(child(content, mediaJSON, "schema"), "anyOf")) == 0 {
					t.Errorf("%s does not fit the contract and got %d", body, a.status)
				}
				if round == 0 && a.status >= 400 && a.status != http.StatusConflict {
					t.Errorf("the example is refused: %d %s", a.status, a.body)
				}
			}
		})
	}
}

// withoutNulls drops fields that are null: they count as left out.
func withoutNulls(v any) any {
	switch x := v.(type) {
	case map[string]any:
		for k, e := range x {
			if e == nil && k != "surprise" {
				delete(x, k)
			} else {
				x[k] = withoutNulls(e)
			}
		}
	case []any:
		for i := range x {
			x[i] = withoutNulls(x[i])
		}
	}
	return v
}

// generator makes values that fit a schema, more or less: it knows the keywords this document
// uses, and is no judge.
type generator struct {
	rng *rand.Rand
	c   *contract
}

func (g *generator) path(op operation, round int) string {
	path := op.path
	query := url.Values{}
	for _, raw := range append(list(op.item, "parameters"), list(op.tree, "parameters")...) {
		p, _ := g.c.resolve(raw.(tree))
		name := text(p, "name")
		v := fmt.Sprint(g.value(child(p, "schema"), 0))
		if e, ok := p["example"].(string); ok && round%3 != 2 {
			v = e
		}
		switch text(p, "in") {
		case "path":
			path = strings.ReplaceAll(path, "{"+name+"}", url.PathEscape(v))
		case "query":
			if p["required"] == true || round > 0 && g.rng.IntN(3) == 0 {
				query.Set(name, v)
			}
		}
	}
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	return path
}

const deepest = 6

func (g *generator) value(schema tree, depth int) any {
	schema, _ = g.c.resolve(schema)
	if schema == nil || depth > deepest {
		return nil
	}
	if v, ok := schema["const"]; ok {
		return v
	}
	if e := list(schema, "enum"); len(e) > 0 {
		return e[g.rng.IntN(len(e))]
	}
	for _, key := range []string{"anyOf", "allOf"} {
		if alternatives := list(schema, key); len(alternatives) > 0 {
			i := g.rng.IntN(len(alternatives))
			if key == "allOf" {
				i = 0
			}
			return g.value(alternatives[i].(tree), depth)
		}
	}
	kind, _ := schema["type"].(string)
	if kinds := list(schema, "type"); len(kinds) > 0 {
		kind = kinds[g.rng.IntN(len(kinds))].(string)
	}
	switch kind {
	case "object":
		out := map[string]any{}
		for name, p := range child(schema, "properties") {
			if slices.Contains(list(schema, "required"), any(name)) || g.rng.IntN(3) == 0 {
				out[name] = g.value(p.(tree), depth+1)
			}
		}
		return out
	case "array":
		out := []any{}
		for range g.bound(schema, "minItems", 0) + g.rng.IntN(3) {
			out = append(out, g.value(child(schema, "items"), depth+1))
		}
		return out
	case "integer":
		lo, hi := g.bound(schema, "minimum", -3), g.bound(schema, "maximum", 100)
		return lo + g.rng.IntN(max(1, min(hi, lo+1000)-lo+1))
	case "number":
		return g.rng.Float64() * float64(g.bound(schema, "maximum", 3))
	case "boolean":
		return g.rng.IntN(2) == 0
	case "null":
		return nil
	case "string":
		if p, ok := schema["pattern"].(string); ok {
			if strings.HasPrefix(p, "^[0-9a-f]") {
				return testID(byte(g.rng.IntN(3))).String()
			}
			return []string{"default", "articles", "a.b-c_d"}[g.rng.IntN(3)]
		}
		return []string{"x", "ü\u0301", "kb/42", " ", "a\nb", "\U0001F469\u200d\U0001F467"}[g.rng.IntN(6)]
	}
	return map[string]any{"any": 1}
}

func (g *generator) bound(schema tree, key string, fallback int) int {
	n, ok := schema[key].(json.Number)
	if !ok {
		return fallback
	}
	i, err := n.Int64()
	if err != nil {
		return fallback
	}
	return int(i)
}

// damage changes one thing somewhere in v.
func (g *generator) damage(v any) any {
	odd := []any{nil, true, -1, 1e30, "", "\x00", []any{}, map[string]any{}, strings.Repeat("y", 600), []any{map[string]any{"x": 0}}, 0.5, "2147483648"}
	switch x := v.(type) {
	case map[string]any:
		if len(x) == 0 || g.rng.IntN(4) == 0 {
			x["surprise"] = odd[g.rng.IntN(len(odd))]
			return x
		}
		var keys []string
		for k := range x {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		k := keys[g.rng.IntN(len(keys))]
		if g.rng.IntN(5) == 0 {
			delete(x, k)
		} else {
			x[k] = g.damage(x[k])
		}
		return x
	case []any:
		if len(x) == 0 || g.rng.IntN(3) == 0 {
			return odd[g.rng.IntN(len(odd))]
		}
		x = slices.Clone(x)
		i := g.rng.IntN(len(x))
		x[i] = g.damage(x[i])
		return x
	}
	return odd[g.rng.IntN(len(odd))]
}

func TestDocsPageShowsEverything(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	a := b.get("/docs")
	page := string(a.body)
	for _, op := range loadContract(t).operations() {
		if !strings.Contains(page, `id="`+text(op.tree, "operationId")+`"`) {
			t.Errorf("%s %s is missing", op.method, op.path)
		}
	}
	if a.status != 200 || strings.Contains(page, "<script") || strings.Contains(page, "src=") || strings.Contains(page, "%!") {
		t.Errorf("%d: the page is broken or needs something from elsewhere", a.status)
	}
	if o := b.get("/openapi.json").object(t); o["openapi"] != "3.1.0" || o["info"].(map[string]any)["version"] != "test" {
		t.Errorf("openapi.json: %v", o["info"])
	}
}
