package main

import (
	"bufio"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"go/doc/comment"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/lockstep-db/lockstep/examples/godoc/stdlib"
)

// maxSentences of the set are first sentences: there are many more of them than of the others,
// and they must not decide alone. They are drawn by the hash of their document's id.
const maxSentences = 200

// Sources of queries.
const (
	fromHeading  = "heading"
	fromExample  = "example"
	fromSentence = "sentence"
)

// query is one judged query.
type query struct {
	Text   string `json:"query"`
	Source string `json:"source"`
	// Answers are the ids of the documents that answer it.
	Answers []string `json:"answers"`
}

type document struct {
	ID       string            `json:"id"`
	Text     string            `json:"text"`
	Metadata map[string]string `json:"metadata"`
}

func generate(args []string) error {
	flags := flag.NewFlagSet("generate", flag.ContinueOnError)
	root := flags.String("goroot", stdlib.GOROOT(), "the Go installation to read")
	out := flags.String("out", "", "folder to write to")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *out == "" {
		return fmt.Errorf("generate: name a folder with -out")
	}
	docs, err := stdlib.Read(*root)
	if err != nil {
		return err
	}
	corpus, queries := judge(docs)
	if err := os.MkdirAll(*out, 0o755); err != nil {
		return err
	}
	if err := writeLines(filepath.Join(*out, "corpus.jsonl"), corpus); err != nil {
		return err
	}
	if err := writeLines(filepath.Join(*out, "queries.jsonl"), queries); err != nil {
		return err
	}
	counts := map[string]int{}
	for _, q := range queries {
		counts[q.Source]++
	}
	fmt.Printf("%s: %d documents, %d queries %v\n", stdlib.GoVersion(), len(corpus), len(queries), counts)
	return nil
}

func writeLines[T any](name string, lines []T) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	for _, l := range lines {
		if err := enc.Encode(l); err != nil {
			return err
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return f.Close()
}

// judge parts the documentation into what is indexed and what is asked. A phrase that becomes a
// query is removed from every document that holds it, and a phrase that stood in several
// documents has them all as answers.
func judge(docs []stdlib.Document) ([]document, []query) {
	type source struct{ phrase, kind string }
	answers := map[source][]string{}
	add := func(kind, phrase, id string) {
		phrase = strings.Join(strings.Fields(phrase), " ")
		if s := (source{phrase, kind}); !slices.Contains(answers[s], id) {
			answers[s] = append(answers[s], id)
		}
	}

	// First sentences, of documents that say more than that.
	sentences := map[string]string{} // by document, as a question
	var candidates []string
	for i := range docs {
		d := &docs[i]
		first, rest := firstSentence(d.Comment)
		q := question(first, d)
		sentences[d.ID] = q
		if len(strings.Fields(q)) >= 6 && len(strings.Fields(rest)) >= 30 {
			candidates = append(candidates, d.ID)
		}
	}
	slices.SortFunc(candidates, func(a, b string) int {
		ha, hb := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
		return slices.Compare(ha[:], hb[:])
	})
	drawn := map[string]bool{} // by question: it is removed wherever it stands
	for _, id := range candidates[:min(len(candidates), maxSentences)] {
		drawn[sentences[id]] = true
	}

	corpus := make([]document, 0, len(docs))
	for i := range docs {
		d := docs[i]
		if q := sentences[d.ID]; q != "" && drawn[q] {
			add(fromSentence, q, d.ID)
			_, d.Comment = firstSentence(d.Comment)
		}
		parsed := d.Parse()
		parsed.Content = slices.DeleteFunc(parsed.Content, func(b comment.Block) bool {
			h, ok := b.(*comment.Heading)
			if !ok {
				return false
			}
			text := plain(h.Text)
			if len(strings.Fields(text)) < 3 {
				return false // "Overview", "Syntax": nobody asks that
			}
			add(fromHeading, text, d.ID)
			return true
		})
		for _, e := range d.Examples {
			if text := exampleQuestion(e, &d); text != "" {
				add(fromExample, text, d.ID)
			}
		}
		corpus = append(corpus, document{ID: d.ID, Text: render(&d, parsed), Metadata: map[string]string{
			"package": d.Package, "kind": d.Kind,
		}})
	}

	text := make(map[string]string, len(corpus))
	for _, d := range corpus {
		text[d.ID] = strings.Join(strings.Fields(d.Text), " ")
	}
	queries := make([]query, 0, len(answers))
	for s, ids := range answers {
		if len(ids) > 3 {
			continue // boilerplate that stands everywhere asks for nothing
		}
		if slices.ContainsFunc(ids, func(id string) bool { return strings.Contains(text[id], s.phrase) }) {
			continue // an answer says it a second time, in the text that is indexed
		}
		queries = append(queries, query{Text: s.phrase, Source: s.kind, Answers: ids})
	}
	slices.SortFunc(queries, func(a, b query) int {
		return cmp.Or(cmp.Compare(a.Source, b.Source), cmp.Compare(a.Text, b.Text))
	})
	return corpus, queries
}

// render is the indexed text: as the demo's, without what was removed.
func render(d *stdlib.Document, parsed *comment.Doc) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# %s %s\n\n", d.Kind, d.ID)
	if d.Declaration != "" {
		fmt.Fprintf(&b, "```go\n%s\n```\n\n", d.Declaration)
	}
	b.Write(d.Plain(parsed))
	return b.String()
}

// firstSentence parts a comment after its first sentence, if that ends in the first paragraph.
func firstSentence(text string) (first, rest string) {
	paragraph, after, _ := strings.Cut(text, "\n\n")
	for i := 0; i+1 < len(paragraph); i++ {
		if c := paragraph[i]; c != '.' && c != '!' && c != '?' || !unicode.IsSpace(rune(paragraph[i+1])) {
			continue
		}
		// "i.e. something" goes on with a small letter.
		next := strings.TrimSpace(paragraph[i+1:])
		if next != "" && unicode.IsLower(rune(next[0])) {
			continue
		}
		return paragraph[:i+1], next + "\n\n" + after
	}
	return paragraph, after
}

// question makes of "Do sends an HTTP request." what a person would type: without the symbol's
// name in front, and without the full stop.
func question(sentence string, d *stdlib.Document) string {
	words := strings.Fields(sentence)
	name := d.Symbol[strings.LastIndexByte(d.Symbol, '.')+1:]
	if d.Symbol == "" {
		return ""
	}
	if len(words) > 0 && slices.Contains([]string{"A", "An", "The"}, words[0]) {
		words = words[1:]
	}
	if len(words) > 0 && strings.Trim(words[0], "[]") == name {
		words = words[1:]
		if len(words) > 0 && slices.Contains([]string{"is", "represents", "returns", "reports"}, words[0]) {
			words = words[1:]
		}
	}
	return strings.TrimRight(strings.Join(words, " "), ".!")
}

// exampleQuestion makes a query of an example's comment, or of its name if that has two words.
func exampleQuestion(e stdlib.Example, d *stdlib.Document) string {
	if first, _ := firstSentence(e.Doc); first != "" {
		text := first
		for _, start := range []string{"This example demonstrates ", "This example shows ", "This example ", "Example shows ", "Demonstrates "} {
			if rest, ok := strings.CutPrefix(text, start); ok {
				text = rest
				break
			}
		}
		if words := strings.Fields(text); len(words) >= 4 && !strings.HasPrefix(words[0], "Example") {
			return strings.TrimRight(text, ".!:")
		}
	}
	if words := camelWords(e.Suffix); len(words) >= 2 {
		return strings.Join(words, " ") + " " + path.Base(d.Package)
	}
	return ""
}

// camelWords parts a name at its capitals and underscores: customProtocol is custom protocol.
func camelWords(name string) []string {
	var out []string
	var word []rune
	flush := func() {
		if len(word) > 0 {
			out = append(out, strings.ToLower(string(word)))
			word = word[:0]
		}
	}
	runes := []rune(name)
	for i, r := range runes {
		switch {
		case r == '_':
			flush()
			continue
		case unicode.IsUpper(r) && (i == 0 || !unicode.IsUpper(runes[i-1])):
			flush()
		}
		word = append(word, r)
	}
	flush()
	return out
}

func plain(text []comment.Text) string {
	var b strings.Builder
	for _, t := range text {
		switch t := t.(type) {
		case comment.Plain:
			b.WriteString(string(t))
		case comment.Italic:
			b.WriteString(string(t))
		case *comment.Link:
			b.WriteString(plain(t.Text))
		case *comment.DocLink:
			b.WriteString(plain(t.Text))
		}
	}
	return b.String()
}
