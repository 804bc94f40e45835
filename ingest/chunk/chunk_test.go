package chunk

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// tokens is a tokenizer for tests: words are cut into pieces of at most four letters, other
// runes stand alone, like a subword tokenizer's output.
func tokens(text string) []corpus.TokenSpan {
	var out []corpus.TokenSpan
	start, letters := -1, 0
	flush := func(end int) {
		if start >= 0 {
			out = append(out, corpus.TokenSpan{Start: start, End: end})
		}
		start, letters = -1, 0
	}
	for i, r := range text {
		switch {
		case unicode.IsSpace(r):
			flush(i)
		case unicode.IsLetter(r) || unicode.IsDigit(r):
			if letters == 4 {
				flush(i)
			}
			if start < 0 {
				start = i
			}
			letters++
		default:
			flush(i)
			out = append(out, corpus.TokenSpan{Start: i, End: i + utf8.RuneLen(max(r, 0))})
		}
	}
	flush(len(text))
	return out
}

func TestSplitGolden(t *testing.T) {
	t.Parallel()
	inputs, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(inputs) == 0 {
		t.Fatalf("no golden inputs: %v", err)
	}
	for _, in := range inputs {
		t.Run(filepath.Base(in), func(t *testing.T) {
			t.Parallel()
			raw, err := os.ReadFile(in)
			if err != nil {
				t.Fatal(err)
			}
			// The first line holds the settings.
			head, text, _ := strings.Cut(string(raw), "\n")
			var c corpus.Chunking
			if _, err := fmt.Sscanf(head, "target=%d overlap=%d", &c.TargetTokens, &c.OverlapTokens); err != nil {
				t.Fatalf("first line %q: %v", head, err)
			}
			var b strings.Builder
			for i, chunk := range Split(text, tokens(text), c) {
				fmt.Fprintf(&b, "=== %d: %d tokens\n%s\n", i, len(tokens(chunk)), chunk)
			}
			golden := strings.TrimSuffix(in, ".txt") + ".golden"
			if *update {
				if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if b.String() != string(want) {
				t.Errorf("chunks of %s changed; if that is wanted, run with -update.\ngot:\n%s", in, b.String())
			}
		})
	}
}

func TestSplitSmall(t *testing.T) {
	t.Parallel()
	c := corpus.Chunking{TargetTokens: 16, OverlapTokens: 4}
	for _, tc := range []struct {
		name, text string
		spans      []corpus.TokenSpan
		want       []string
	}{
		{name: "empty", text: ""},
		{name: "white space", text: " \n\t\u00a0"},
		{name: "one word", text: " word \n", want: []string{" word"}},
		{name: "fits", text: "One. Two.\n\nThree.", want: []string{"One. Two.\n\nThree."}},
	} {
		spans := tc.spans
		if spans == nil {
			spans = tokens(tc.text)
		}
		got := Split(tc.text, spans, c)
		if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", tc.want) && len(got)+len(tc.want) > 0 {
			t.Errorf("%s: got %q, want %q", tc.name, got, tc.want)
		}
	}
}

func TestFencesAndHeadings(t *testing.T) {
	t.Parallel()
	prose := strings.Repeat("Some words that fill the chunk. ", 6)
	code := "```go\nfunc main() {\n\tprintln(1)\n\n\tprintln(2)\n}\n```"
	text := "# Title\n\n" + prose + "\n\n## Next\n\n" + code + "\n\nAfter the code."
	chunks := Split(text, tokens(text), corpus.Chunking{TargetTokens: 60, OverlapTokens: 10})
	for i, c := range chunks {
		if strings.Contains(c, "```go") != strings.Contains(c, "println(2)\n}\n```") {
			t.Errorf("chunk %d tears the code block: %q", i, c)
		}
		if strings.HasSuffix(c, "## Next") || strings.HasSuffix(c, "# Title") {
			t.Errorf("chunk %d ends with a heading: %q", i, c)
		}
	}
	if len(chunks) < 2 {
		t.Fatalf("got %d chunks, want several", len(chunks))
	}
}

func TestGraphemesStayWhole(t *testing.T) {
	t.Parallel()
	family := "👩\u200d👩\u200d👧\u200d👦" // seven runes, one picture
	text := strings.Repeat(family, 40)
	for i, c := range Split(text, tokens(text), corpus.Chunking{TargetTokens: 32}) {
		if strings.ReplaceAll(c, family, "") != "" {
			t.Errorf("chunk %d tears a grapheme cluster: %q", i, c)
		}
	}
	text = strings.Repeat("e\u0301", 300)
	for i, c := range Split(text, tokens(text), corpus.Chunking{TargetTokens: 32}) {
		if strings.ReplaceAll(c, "e\u0301", "") != "" {
			t.Errorf("chunk %d separates an accent: %q", i, c)
		}
	}
}

func TestOverlapRepeatsWholeSentences(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	for i := range 40 {
		fmt.Fprintf(&b, "This is sentence %d. ", i)
	}
	text := b.String()
	pieces := split(text, tokens(text), corpus.Chunking{TargetTokens: 64, OverlapTokens: 16})
	for i := 1; i < len(pieces); i++ {
		if pieces[i].start >= pieces[i-1].end {
			t.Errorf("chunk %d repeats nothing", i)
		}
		repeated := text[pieces[i].start:pieces[i-1].end]
		if !strings.HasPrefix(repeated, "This is") || !strings.HasSuffix(repeated, ".") {
			t.Errorf("chunk %d repeats %q, not whole sentences", i, repeated)
		}
		if n := len(tokens(repeated)); n > 16 {
			t.Errorf("chunk %d repeats %d tokens, more than 16", i, n)
		}
	}
}

func TestMissingSpansAreEstimated(t *testing.T) {
	t.Parallel()
	text := strings.Repeat("word and another word. ", 2000)
	all := tokens(text)
	for name, spans := range map[string][]corpus.TokenSpan{"none": nil, "cut off by the tokenizer": all[:100]} {
		for i, c := range Split(text, spans, corpus.Chunking{TargetTokens: 64}) {
			if n := len(tokens(c)); n > 64 {
				t.Errorf("%s: chunk %d has %d tokens", name, i, n)
			}
		}
	}
	// A tokenizer that gives up on a long word calls it one token.
	line := strings.Repeat("QUJD", 5000)
	chunks := Split(line, []corpus.TokenSpan{{Start: 0, End: len(line)}}, corpus.Chunking{TargetTokens: 64})
	for i, c := range chunks {
		if len(c) > 64*bytesPerLongToken {
			t.Errorf("chunk %d of a long word has %d bytes", i, len(c))
		}
	}
	if strings.Join(chunks, "") != line {
		t.Error("a long word is not covered")
	}
}

// TestOneRuneOverTheLimit: the last rune has more tokens than a chunk may; it stands alone.
func TestOneRuneOverTheLimit(t *testing.T) {
	t.Parallel()
	text := "word \u00e9"
	spans := []corpus.TokenSpan{{Start: 0, End: 4}}
	for range 100 {
		spans = append(spans, corpus.TokenSpan{Start: 5, End: 7})
	}
	if got := Split(text, spans, corpus.Chunking{TargetTokens: 16, OverlapTokens: 8}); len(got) != 2 || got[1] != "\u00e9" {
		t.Errorf("got %q", got)
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		c    corpus.Chunking
		max  int
		want string
	}{
		{corpus.Chunking{TargetTokens: 256, OverlapTokens: 32}, 256, ""},
		{corpus.Chunking{TargetTokens: 256, OverlapTokens: 128}, 0, ""},
		{corpus.Chunking{TargetTokens: 15}, 256, "/target_tokens"},
		{corpus.Chunking{TargetTokens: 257}, 256, "/target_tokens"},
		{corpus.Chunking{TargetTokens: 64, OverlapTokens: -1}, 256, "/overlap_tokens"},
		{corpus.Chunking{TargetTokens: 64, OverlapTokens: 33}, 256, "/overlap_tokens"},
		{corpus.Chunking{TargetTokens: 64, OverlapTokens: 64}, 256, "/overlap_tokens"},
		{Default(256), 256, ""}, {Default(8192), 8192, ""}, {Default(0), 0, ""},
	} {
		got := ""
		if fe := Check(tc.c, tc.max); fe != nil {
			got = fe.Pointer
		}
		if got != tc.want {
			t.Errorf("Check(%+v, %d) points at %q, want %q", tc.c, tc.max, got, tc.want)
		}
	}
}

// checkPieces asserts the promises that hold for any input.
func checkPieces(t *testing.T, text string, spans []corpus.TokenSpan, c corpus.Chunking) {
	t.Helper()
	pieces := split(text, spans, c)
	covered, last := 0, -1
	for i, p := range pieces {
		if p.start < 0 || p.end > len(text) || p.start >= p.end {
			t.Fatalf("piece %d is %v of %d bytes", i, p, len(text))
		}
		if p.start <= last {
			t.Fatalf("piece %d starts at %d, not after the one before (%d)", i, p.start, last)
		}
		if p.end <= covered {
			t.Fatalf("piece %d ends at %d: it adds nothing to the %d bytes before", i, p.end, covered)
		}
		if p.start > covered && !blank(text[covered:p.start]) {
			t.Fatalf("text %q before piece %d is in no chunk", text[covered:p.start], i)
		}
		if blank(text[p.start:p.end]) {
			t.Fatalf("piece %d is white space", i)
		}
		if runeStart(text, p.start) != p.start || runeStart(text, p.end) != p.end {
			t.Fatalf("piece %d (%v) cuts a rune", i, p)
		}
		covered, last = p.end, p.start
	}
	if !blank(text[covered:]) {
		t.Fatalf("the end %q is in no chunk", text[covered:])
	}
	// The limit, counted over the atoms as the splitter does.
	atoms := atomise(text, spans)
	limit := max(c.TargetTokens, minTarget) - specialTokens
	for i, p := range pieces {
		n, parts := 0, 0
		for _, a := range atoms {
			if a.start >= p.start && a.end <= p.end {
				n, parts = n+a.tokens, parts+1
			}
		}
		if n > limit && parts > 1 {
			t.Fatalf("piece %d has %d tokens; the limit is %d", i, n, limit)
		}
	}
}

func TestSplitPromisesOnRealText(t *testing.T) {
	t.Parallel()
	inputs, _ := filepath.Glob("testdata/*.txt")
	for _, in := range inputs {
		raw, err := os.ReadFile(in)
		if err != nil {
			t.Fatal(err)
		}
		for _, target := range []int{0, 16, 17, 40, 200} {
			for _, overlap := range []int{0, 3, 8, target / 2, target * 2} {
				checkPieces(t, string(raw), tokens(string(raw)), corpus.Chunking{TargetTokens: target, OverlapTokens: overlap})
			}
		}
	}
}

// FuzzSplit: any text, tokens placed well or badly, any settings.
func FuzzSplit(f *testing.F) {
	f.Add("# A\n\nText. More text.\n\n```\ncode\n\nmore\n```\n", []byte{1, 2, 3}, 16, 4)
	f.Add("e\u0301\u200d👩\u200d👧", []byte{}, 0, 100)
	f.Add("\xff\xfe\x80\x80\xe2\x82", []byte{0, 1, 1, 1}, 20, 7)
	f.Add(strings.Repeat("~~~\n", 30)+strings.Repeat("x", 300), []byte{200, 0, 50}, 16, 8)
	f.Fuzz(func(t *testing.T, text string, places []byte, target, overlap int) {
		if len(text) > 4096 {
			text = text[:4096]
		}
		target, overlap = target%300, overlap%300
		checkPieces(t, text, tokens(text), corpus.Chunking{TargetTokens: target, OverlapTokens: overlap})
		checkPieces(t, text, nil, corpus.Chunking{TargetTokens: target, OverlapTokens: overlap})
		// Spans from the fuzzer: pairs of a step (sometimes back) and a length.
		var spans []corpus.TokenSpan
		at := 0
		for i := 0; i+1 < len(places); i += 2 {
			at += int(int8(places[i]))
			for range 1 + int(places[i])%17/16*30 { // now and then many tokens in one place
				spans = append(spans, corpus.TokenSpan{Start: max(0, at), End: max(0, at) + int(places[i+1]) - 3})
			}
			at += int(places[i+1])
		}
		checkPieces(t, text, spans, corpus.Chunking{TargetTokens: target, OverlapTokens: overlap})
	})
}

// TestSplitIsLinear: text made to be slow is no slower a byte than prose.
func TestSplitIsLinear(t *testing.T) {
	t.Parallel()
	for name, unit := range map[string]string{
		"brackets": ")", "one line": "word ", "fences": "```\n", "headings": "# a\n", "blank lines": "\n\n \n",
		"marks": "e\u0301\u0301", "joiners": "\u200d", "underlines": "a\n--\n", "no letters": "\x00",
	} {
		start := time.Now()
		text := strings.Repeat(unit, (1<<20)/len(unit))
		for _, spans := range [][]corpus.TokenSpan{nil, tokens(text)} {
			checkSome(t, name, split(text, spans, corpus.Chunking{TargetTokens: 256, OverlapTokens: 128}), text)
		}
		// 1 MiB twice takes 0.3 s here at most; a quadratic step takes minutes.
		if d := time.Since(start); d > 20*time.Second {
			t.Errorf("%s took %v", name, d)
		}
	}
}

func checkSome(t *testing.T, name string, pieces []piece, text string) {
	t.Helper()
	if len(pieces) == 0 && !blank(text) {
		t.Errorf("%s: no chunks", name)
	}
}

func BenchmarkSplit(b *testing.B) {
	text := strings.Repeat("A paragraph of some words, which goes on for a while. It has two sentences.\n\n", 5000)
	spans := tokens(text)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		Split(text, spans, corpus.Chunking{TargetTokens: 256, OverlapTokens: 32})
	}
}
