package main

import (
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/lockstep-db/lockstep/examples/godoc/stdlib"
)

func TestScore(t *testing.T) {
	t.Parallel()
	ranking := []string{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"}
	for _, tc := range []struct {
		answers []string
		want    scores
	}{
		{[]string{"a"}, scores{1, 1, 1}},
		{[]string{"b"}, scores{1 / math.Log2(3), 0.5, 1}},
		{[]string{"k"}, scores{0, 1.0 / 11, 1}}, // beyond the first ten
		{[]string{"z"}, scores{0, 0, 0}},
		{[]string{"a", "z"}, scores{1 / (1 + 1/math.Log2(3)), 1, 0.5}},
		{[]string{"c", "a"}, scores{(1 + 0.5) / (1 + 1/math.Log2(3)), 1, 1}},
	} {
		got := score(ranking, tc.answers)
		if math.Abs(got.ndcg10-tc.want.ndcg10)+math.Abs(got.mrr-tc.want.mrr)+math.Abs(got.recall100-tc.want.recall100) > 1e-12 {
			t.Errorf("%v: %+v, want %+v", tc.answers, got, tc.want)
		}
	}
	if got := score(nil, []string{"a"}); got != (scores{}) {
		t.Errorf("an empty ranking scores %+v", got)
	}
}

func TestBM25(t *testing.T) {
	t.Parallel()
	b := newBM25([]document{
		{ID: "common", Text: "the the the the reader"}, {ID: "reader", Text: "The Reader reads lines"},
		{ID: "writer", Text: "the writer writes lines"}, {ID: "long", Text: "reads lines " + strings.Repeat("filler ", 50)},
	})
	if got, want := b.search("reads LINES", 10), []string{"reader", "long", "writer"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := b.search("nothing of this", 10); len(got) != 0 {
		t.Errorf("got %v", got)
	}
	if got := rrf([]string{"a", "b"}, []string{"b", "c"}); !reflect.DeepEqual(got, []string{"b", "a", "c"}) {
		t.Errorf("fused %v", got)
	}
}

// TestJudgedSet: the set is large enough, the same every time, and no query can be found by the
// very words that made it.
func TestJudgedSet(t *testing.T) {
	t.Parallel()
	docs, err := stdlib.Read(stdlib.GOROOT())
	if err != nil {
		t.Fatal(err)
	}
	corpus, queries := judge(docs)
	again, queriesAgain := judge(docs)
	if !reflect.DeepEqual(queries, queriesAgain) || !reflect.DeepEqual(corpus, again) {
		t.Error("two runs differ")
	}
	if len(queries) < 300 || len(corpus) < 2000 {
		t.Errorf("%d queries over %d documents; at least 300 over thousands are wanted", len(queries), len(corpus))
	}
	text := map[string]string{}
	for _, d := range corpus {
		text[d.ID] = strings.Join(strings.Fields(d.Text), " ")
	}
	sources := map[string]int{}
	for _, q := range queries {
		sources[q.Source]++
		for _, id := range q.Answers {
			have, ok := text[id]
			if !ok {
				t.Fatalf("the answer %s to %q is not in the corpus", id, q.Text)
			}
			if strings.Contains(have, q.Text) {
				t.Errorf("%q still stands in %s", q.Text, id)
			}
		}
	}
	if len(sources) != 3 {
		t.Errorf("sources %v", sources)
	}
}

func TestQuestions(t *testing.T) {
	t.Parallel()
	d := &stdlib.Document{Package: "net/http", Symbol: "Client.Do"}
	for sentence, want := range map[string]string{
		"Do sends an HTTP request.":          "sends an HTTP request",
		"A Do is a thing, i.e. this.":        "a thing, i.e. this",
		"Deprecated things happen elsewhere": "Deprecated things happen elsewhere",
	} {
		if got := question(sentence, d); got != want {
			t.Errorf("%q: %q, want %q", sentence, got, want)
		}
	}
	first, rest := firstSentence("It ends here, i.e. there. Then\nmore.\n\nNext.")
	if first != "It ends here, i.e. there." || rest != "Then\nmore.\n\nNext." {
		t.Errorf("%q and %q", first, rest)
	}
	if got := camelWords("customProtocol_HTTPServer"); !slices.Equal(got, []string{"custom", "protocol", "httpserver"}) {
		t.Errorf("%v", got)
	}
}
