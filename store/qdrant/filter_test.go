package qdrant

import (
	"encoding/json"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/qdranttest"
)

// The arbiter is corpus.Filter.Matches: for random metadata and random filters, the server
// must select exactly the points that it selects. A real one may select more where a filter contradicts
// itself: the join with the ledger drops what does not match, and nothing brings back what is missing.
func TestFiltersMeanWhatCorpusSays(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	addr := qdranttest.Child(t)
	real := addr != ""
	if !real {
		addr = qdranttest.Embedded(t)
	}
	c := open(t, Config{URL: "http://" + addr})
	declared := map[string]corpus.FieldType{
		"lang": corpus.Keyword, "year": corpus.Integer, "price": corpus.Float, "ok": corpus.Boolean, "when": corpus.Datetime,
		"body": corpus.FullText, "a.b": corpus.Keyword, "a.c.d": corpus.Integer, "odd key": corpus.Keyword,
	}
	for name, fields := range map[string]map[string]corpus.FieldType{"declared": declared, "undeclared": {"body": corpus.FullText}} {
		t.Run(name, func(t *testing.T) {
			ix := makeIndex(t, c, corpus.Layout{Vectors: corpus.Dense, Dim: 1, Fields: fields})
			g := generator{rng}
			const n = 400
			md := map[corpus.ID]corpus.Metadata{}
			var pts []corpus.Point
			for i := range n {
				p := makePoint(ix, i, 1, 1, nil)
				// Through the ledger's JSON, as every document's metadata goes.
				parsed, fe := corpus.ParseMetadata(g.metadata().JSON())
				if fe != nil {
					t.Fatal(fe)
				}
				p.Payload.Metadata = parsed
				md[p.ID] = parsed
				p.Vectors.Dense = []float32{1}
				pts = append(pts, p)
			}
			must0(t, c.InsertPoints(t.Context(), ix, pts))
			some := 0
			for range 1500 {
				f := g.filter(0)
				var want []corpus.ID
				for _, p := range pts {
					if f.Matches(md[p.ID]) {
						want = append(want, p.ID)
					}
				}
				got, err := c.Query(t.Context(), ix, corpus.IndexQuery{Head: corpus.Dense, Vectors: &corpus.Vectors{Dense: []float32{1}}, Filter: f, Limit: n, Exact: true})
				if err != nil {
					t.Fatalf("%v\n%s", err, show(f))
				}
				var have []corpus.ID
				for _, x := range got {
					have = append(have, x.ID)
				}
				slices.SortFunc(have, corpus.ID.Compare)
				if len(want) > 0 && len(want) < n {
					some++
				}
				if real && contradicts(f) {
					have = slices.DeleteFunc(have, func(id corpus.ID) bool { return !slices.Contains(want, id) })
				}
				if !slices.Equal(have, want) {
					for _, p := range pts {
						if slices.Contains(have, p.ID) != slices.Contains(want, p.ID) {
							t.Errorf("server %v, corpus %v on %s", slices.Contains(have, p.ID), slices.Contains(want, p.ID), md[p.ID].JSON())
							break
						}
					}
					t.Fatalf("filter %s", show(f))
				}
			}
			if some < 500 {
				t.Errorf("only %d of 1500 filters told points apart", some)
			}
		})
	}
}

// contradicts reports whether the filter asks for and excludes one condition. Qdrant 1.19 walks the
// points by the index of the one and takes both for done.
func contradicts(f *corpus.Filter) bool {
	for _, not := range f.MustNot {
		for _, list := range [][]corpus.Condition{f.Must, f.Should} {
			if slices.ContainsFunc(list, func(c corpus.Condition) bool { return reflect.DeepEqual(c, not) }) {
				return true
			}
		}
		if not.Filter != nil && contradicts(not.Filter) {
			return true
		}
	}
	return slices.ContainsFunc(slices.Concat(f.Must, f.Should), func(c corpus.Condition) bool { return c.Filter != nil && contradicts(c.Filter) })
}

func show(f *corpus.Filter) string {
	b, err := json.Marshal(f)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

type generator struct{ *rand.Rand }

func pick[T any](g generator, list ...T) T { return list[g.IntN(len(list))] }

func (g generator) maybeList(one func() any) any {
	switch g.IntN(6) {
	case 0:
		return nil
	case 1, 2:
		list := []any{}
		for range g.IntN(3) {
			list = append(list, one())
		}
		return list
	}
	return one()
}

func (g generator) lang() any  { return pick[any](g, "en", "de", "", "fr") }
func (g generator) year() any  { return pick[any](g, int64(2019), int64(2020), int64(-5), int64(1)<<53) }
func (g generator) price() any { return pick[any](g, 1.5, int64(3), 2.0, -0.25) }
func (g generator) when() any {
	return pick[any](g, "2020-01-01", "2020-06-01T12:00:00Z", "2020-06-01T12:00:00+02:00", "2021-01-01 10:00:00", "2020-06-01T12:00:00.123456Z", "2020-01-01T00:00:00")
}
func (g generator) body() any {
	return pick[any](g, "the quick fox", "Quick, brown!", "foxes and x_y", "Ünïcode fox", "")
}

func (g generator) metadata() corpus.Metadata {
	m := corpus.Metadata{}
	put := func(key string, v func() any) {
		if g.IntN(4) > 0 {
			m[key] = g.maybeList(v)
		}
	}
	put("lang", g.lang)
	put("year", g.year)
	put("price", g.price)
	put("ok", func() any { return g.IntN(2) == 0 })
	put("when", g.when)
	put("body", g.body)
	put("odd key", g.lang)
	inner := func() any {
		o := map[string]any{}
		if g.IntN(3) > 0 {
			o["b"] = g.maybeList(g.lang)
		}
		if g.IntN(3) > 0 {
			o["c"] = g.maybeList(func() any { return map[string]any{"d": g.maybeList(g.year)} })
		}
		return o
	}
	put("a", inner)
	return m
}

func (g generator) filter(depth int) *corpus.Filter {
	f := &corpus.Filter{}
	for _, list := range []*[]corpus.Condition{&f.Must, &f.Should, &f.MustNot} {
		for range g.IntN(3) {
			*list = append(*list, g.condition(depth))
		}
	}
	return f
}

func (g generator) condition(depth int) corpus.Condition {
	if depth < 2 && g.IntN(6) == 0 {
		return corpus.Condition{Filter: g.filter(depth + 1)}
	}
	key := pick(g, "lang", "year", "price", "ok", "when", "body", "a.b", "a.c.d", "odd key", "absent", "a.absent")
	c := corpus.Condition{Key: key}
	if g.IntN(6) == 0 {
		empty := g.IntN(2) == 0
		c.IsEmpty = &empty
		return c
	}
	bound := func(v func() any) *corpus.Range {
		r := &corpus.Range{}
		*pick(g, &r.GT, &r.GTE) = v()
		if g.IntN(2) == 0 {
			*pick(g, &r.LT, &r.LTE) = v()
		}
		return r
	}
	several := func(v func() any) []any {
		out := []any{}
		for range 1 + g.IntN(3) {
			out = append(out, v())
		}
		return out
	}
	equal := func(v func() any) corpus.Condition {
		switch g.IntN(3) {
		case 0:
			c.Match = v()
		case 1:
			c.Any = several(v)
		default:
			c.Except = several(v)
		}
		return c
	}
	switch key {
	case "year", "a.c.d":
		if g.IntN(2) == 0 {
			c.Range = bound(g.year)
			return c
		}
		return equal(g.year)
	case "price":
		if g.IntN(2) == 0 {
			c.Range = bound(g.price)
			return c
		}
		if g.IntN(2) == 0 {
			c.Match = g.price()
		} else {
			c.Any = several(g.price)
		}
		return c
	case "ok":
		c.Match = g.IntN(2) == 0
		return c
	case "when":
		if g.IntN(3) > 0 {
			c.Range = bound(g.when)
			return c
		}
		return equal(g.when)
	case "body":
		c.Text = pick(g, "fox", "quick FOX", "x", "x y", "ünïcode", "nothing", "--")
		return c
	}
	return equal(g.lang)
}

func TestFiltersThatCannotBeAsked(t *testing.T) {
	t.Parallel()
	yes := true
	for name, c := range map[string]corpus.Condition{
		"quotation mark":     {Key: `a"b`, Match: "x"},
		"backslash":          {Key: `a\b`, Match: "x"},
		"too deep":           {Key: "a.b.c.d.e", IsEmpty: &yes},
		"mixed except":       {Key: "k", Except: []any{"a", int64(1)}},
		"boolean except":     {Key: "k", Except: []any{true}},
		"text undeclared":    {Key: "k", Text: "x"},
		"mixed range":        {Key: "k", Range: &corpus.Range{GT: int64(1), LT: "2020-01-01"}},
		"empty range":        {Key: "k", Range: &corpus.Range{}},
		"range over words":   {Key: "k", Range: &corpus.Range{GT: "abc"}},
		"range over objects": {Key: "k", Range: &corpus.Range{GT: true}},
		"match an object":    {Key: "k", Match: map[string]any{}},
		"nothing":            {Key: "k"},
		"nested":             {Filter: &corpus.Filter{MustNot: []corpus.Condition{{Key: "k"}}}},
	} {
		_, err := translate(&corpus.Filter{Must: []corpus.Condition{c}}, nil, nil)
		if corpus.KindOf(err) != corpus.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	if f, err := translate(nil, nil, nil); f != nil || err != nil {
		t.Errorf("no filter became %v, %v", f, err)
	}
	if f, err := translate(&corpus.Filter{}, nil, []corpus.ID{{1}}); err != nil || len(f.GetMustNot()) != 1 {
		t.Errorf("exclusions alone: %v, %v", f, err)
	}
}

func TestPaths(t *testing.T) {
	t.Parallel()
	for key, want := range map[string]string{
		"lang":      "m.lang",
		"a.b":       "m.a.b m.a[].b",
		"a.b.c":     "m.a.b.c m.a.b[].c m.a[].b.c m.a[].b[].c",
		"odd key.x": `m."odd key".x m."odd key"[].x`,
		"":          `m.""`,
		"a[]":       `m."a[]"`,
		"ü":         `m."ü"`,
	} {
		got, err := paths(key)
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%q: %q, %v", key, got, err)
		}
	}
}

// The translator never panics, whatever a caller sends.
func FuzzTranslate(f *testing.F) {
	f.Add(`{"must":[{"key":"a.b","match":"x"}]}`)
	f.Add(`{"should":[{"key":"","range":{"gt":1,"lt":"2020-01-01"}}],"must_not":[{"filter":{"must":[{"key":"k","except":[1,"a"]}]}}]}`)
	f.Fuzz(func(t *testing.T, raw string) {
		var in corpus.Filter
		if json.Unmarshal([]byte(raw), &in) != nil {
			return
		}
		if _, err := translate(&in, allHeads.Fields, nil); err != nil && corpus.KindOf(err) != corpus.Invalid {
			t.Errorf("%v", err)
		}
	})
}
