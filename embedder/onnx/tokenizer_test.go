package onnx

import (
	"encoding/json"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"

	"github.com/lockstep-db/lockstep/embedder"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

// golden is what testdata/make_goldens.py writes.
type golden struct {
	Tokenizers string
	Cases      []struct {
		Text  string
		IDs   []uint32
		Spans [][2]int
		Cut   []struct {
			Max     int
			KeepEnd bool `json:"keep_end"`
			IDs     []uint32
		}
	}
}

func readGolden(t *testing.T, name string) golden {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	var g golden
	if err := json.Unmarshal(data, &g); err != nil {
		t.Fatal(err)
	}
	if len(g.Cases) < 100 {
		t.Fatalf("%s has %d cases", name, len(g.Cases))
	}
	return g
}

func openTestTokenizer(tb testing.TB, path string) *Tokenizer {
	tb.Helper()
	tok, err := OpenTokenizer(path)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := tok.Close(); err != nil {
			tb.Error(err)
		}
	})
	return tok
}

func miniLMTokenizer(tb testing.TB) *Tokenizer {
	return openTestTokenizer(tb, filepath.Join(need(tb, "LOCKSTEP_MINILM"), "tokenizer.json"))
}

func unigramTokenizer(tb testing.TB) *Tokenizer {
	return openTestTokenizer(tb, filepath.Join("testdata", "unigram.json"))
}

func TestTokensAreHuggingFaces(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, golden string
		open         func(testing.TB) *Tokenizer
	}{
		{"minilm", "tokens_minilm.json", miniLMTokenizer},
		{"unigram", "tokens_unigram.json", unigramTokenizer},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			tok := c.open(t)
			opening, closing := tok.Specials()
			if opening != 1 || closing != 1 {
				t.Fatalf("template of %d and %d special tokens, expected 1 and 1", opening, closing)
			}
			for _, g := range readGolden(t, c.golden).Cases {
				ids, err := tok.Encode(g.Text)
				if err != nil {
					t.Fatalf("%q: %v", g.Text, err)
				}
				if !slices.Equal(ids, g.IDs) {
					t.Errorf("%q: ids %v, expected %v", g.Text, ids, g.IDs)
					continue
				}
				for _, cut := range g.Cut {
					if got := embedder.Truncate(ids, cut.Max, opening, closing, cut.KeepEnd); !slices.Equal(got, cut.IDs) {
						t.Errorf("%q cut to %d (keep end %v): %v, expected %v", g.Text, cut.Max, cut.KeepEnd, got, cut.IDs)
					}
				}
				spans, err := tok.Spans(g.Text)
				if err != nil {
					t.Fatalf("%q: %v", g.Text, err)
				}
				if len(spans) != len(g.Spans) {
					t.Errorf("%q: %d spans, expected %d", g.Text, len(spans), len(g.Spans))
					continue
				}
				for i, s := range spans {
					if s.Start != g.Spans[i][0] || s.End != g.Spans[i][1] {
						t.Errorf("%q: span %d is %v, expected %v", g.Text, i, s, g.Spans[i])
					}
				}
			}
		})
	}
}

func TestTokenizeShowsEveryToken(t *testing.T) {
	t.Parallel()
	got, err := miniLMTokenizer(t).Tokenize("Héllo 🙂")
	if err != nil {
		t.Fatal(err)
	}
	want := []Token{
		{ID: 101, Piece: "[CLS]", Special: true},
		{ID: 7592, Piece: "hello", Span: corpus.TokenSpan{Start: 0, End: 6}},
		{ID: 100, Piece: "[UNK]", Span: corpus.TokenSpan{Start: 7, End: 11}},
		{ID: 102, Piece: "[SEP]", Special: true},
	}
	if !slices.Equal(got, want) {
		t.Fatalf("tokens %+v, expected %+v", got, want)
	}
}

// badTexts are refused by every call.
var badTexts = []struct{ name, text, code, detail string }{
	{"nul", "a\x00b", "invalid_text", "byte 1"},
	{"only nul", "\x00", "invalid_text", "byte 0"},
	{"cut rune", "abc\xe4\xb8", "invalid_text", "byte 3"},
	{"lone continuation", "\x80", "invalid_text", "byte 0"},
	{"surrogate", "x\xed\xa0\x80", "invalid_text", "byte 1"},
	{"overlong", "\xc0\xaf", "invalid_text", "byte 0"},
	{"replacement before", "\ufffd\xff", "invalid_text", "byte 3"},
	{"too long", strings.Repeat("a", MaxTextBytes+1), "text_too_long", "4194305"},
}

func TestBadTextsAreRefused(t *testing.T) {
	t.Parallel()
	tok := miniLMTokenizer(t)
	for _, c := range badTexts {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, err := tok.Encode(c.text)
			_, errSpans := tok.Spans(c.text)
			_, errTokens := tok.Tokenize(c.text)
			for _, err := range []error{err, errSpans, errTokens} {
				if corpus.KindOf(err) != corpus.Invalid || corpus.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.detail) {
					t.Errorf("error %v, expected invalid, %s, naming %q", err, c.code, c.detail)
				}
			}
		})
	}
}

// TestLongTexts covers shapes that make naive tokenizers quadratic; go test's own limit of
// time is the assertion.
func TestLongTexts(t *testing.T) {
	t.Parallel()
	size := 256 << 10
	if testing.Short() {
		size = 32 << 10
	}
	for _, open := range []func(testing.TB) *Tokenizer{miniLMTokenizer, unigramTokenizer} {
		tok := open(t)
		for _, unit := range []string{"a", " ", "\n", "word ", "é", "e\u0301", "日", "🙂", "👩‍👩‍👧‍👦", "\u0301", "[CLS]", "#", "<s>", ".", "\u200b"} {
			ids, err := tok.Encode(strings.Repeat(unit, size/len(unit)))
			if err != nil {
				t.Errorf("%q repeated: %v", unit, err)
			}
			if len(ids) < 2 {
				t.Errorf("%q repeated: ids %v", unit, ids)
			}
		}
	}
}

func TestConcurrentEncodeAndClose(t *testing.T) {
	t.Parallel()
	tok, err := OpenTokenizer(filepath.Join("testdata", "unigram.json"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := tok.Encode("the quick brown fox")
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	started := make(chan struct{}, 8)
	for range 8 {
		group.Go(func() {
			for first := true; ; first = false {
				got, err := tok.Encode("the quick brown fox")
				if first {
					started <- struct{}{}
				}
				if err != nil {
					if corpus.KindOf(err) != corpus.Unavailable {
						t.Errorf("error %v after closing", err)
					}
					return
				}
				if !slices.Equal(got, want) {
					t.Errorf("ids %v, expected %v", got, want)
					return
				}
			}
		})
	}
	for range 8 {
		<-started
	}
	for range 3 {
		if err := tok.Close(); err != nil {
			t.Error(err)
		}
	}
	group.Wait()
}

func TestOpenTokenizerRefusesWhatIsNone(t *testing.T) {
	t.Parallel()
	for name, content := range map[string]string{
		"empty": "", "not json": "{", "a list": "[]", "null": "null", "no model": `{"version":"1.0"}`,
		"unknown model": `{"version":"1.0","model":{"type":"Nonsense"}}`,
		"wrong types":   `{"version":1,"model":[]}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "tokenizer.json")
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := OpenTokenizer(path); corpus.KindOf(err) != corpus.Invalid {
				t.Fatalf("error %v, expected invalid", err)
			}
		})
	}
	if _, err := OpenTokenizer(filepath.Join(t.TempDir(), "absent.json")); err == nil {
		t.Fatal("an absent file opens")
	}
}

func TestTokenizersVersionIsTheOneLinked(t *testing.T) {
	t.Parallel()
	mod, err := os.ReadFile(filepath.Join("..", "..", "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	if want := "github.com/daulet/tokenizers v" + TokenizersVersion + "\n"; !strings.Contains(string(mod), want) {
		t.Errorf("go.mod does not require %q", strings.TrimSpace(want))
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			if d.Path == "github.com/daulet/tokenizers" && d.Version != "v"+TokenizersVersion {
				t.Errorf("linked %s, expected %s", d.Version, TokenizersVersion)
			}
		}
	}
}

func FuzzTokenizer(f *testing.F) {
	toks := []*Tokenizer{miniLMTokenizer(f), unigramTokenizer(f)}
	for _, c := range badTexts[:len(badTexts)-1] {
		f.Add(c.text)
	}
	for _, s := range []string{"", " ", "hello world", "naïve e\u0301\u0323", "👩‍👩‍👧‍👦", "[CLS] [SEP]", "<mask> <s>", "مرحبا", "\ufeff\u200b", "\U0010ffff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for _, tok := range toks {
			ids, err := tok.Encode(text)
			if valid := utf8.ValidString(text) && !strings.Contains(text, "\x00"); (err == nil) != valid {
				t.Fatalf("error %v, text valid %v", err, valid)
			}
			if err != nil {
				if corpus.KindOf(err) != corpus.Invalid {
					t.Fatalf("error %v is not invalid", err)
				}
				continue
			}
			for _, id := range ids {
				if int(id) >= tok.VocabSize() {
					t.Fatalf("id %d of a vocabulary of %d", id, tok.VocabSize())
				}
			}
			spans, err := tok.Spans(text)
			if err != nil {
				t.Fatal(err)
			}
			opening, closing := tok.Specials()
			if len(spans) != len(ids)-opening-closing {
				t.Fatalf("%d spans for %d ids", len(spans), len(ids))
			}
			at := 0
			for _, s := range spans {
				if s.Start < at || s.End < s.Start || s.End > len(text) ||
					s.Start < len(text) && !utf8.RuneStart(text[s.Start]) || s.End < len(text) && !utf8.RuneStart(text[s.End]) {
					t.Fatalf("span %v of a text of %d bytes, after %d", s, len(text), at)
				}
				at = s.Start
			}
			again, err := tok.Encode(text)
			if err != nil || !slices.Equal(ids, again) {
				t.Fatalf("a second encoding differs: %v, %v, %v", ids, again, err)
			}
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	tok := miniLMTokenizer(b)
	text := strings.Repeat("The quick brown fox jumps over the lazy dog near the river bank. ", 8)
	b.Run("ids", func(b *testing.B) {
		b.SetBytes(int64(len(text)))
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if _, err := tok.Encode(text); err != nil {
					b.Error(err)
				}
			}
		})
	})
	b.Run("spans", func(b *testing.B) {
		b.SetBytes(int64(len(text)))
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if _, err := tok.Spans(text); err != nil {
					b.Error(err)
				}
			}
		})
	})
}
