package onnx

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/daulet/tokenizers"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// TokenizersVersion is the release of the tokenizer binding that is linked in; a test compares
// it with go.mod.
const TokenizersVersion = "1.24.0"

// MaxTextBytes is the longest text a [Tokenizer] takes. A call into it cannot be interrupted, and
// its time and memory grow with the text: 4 MiB of English took 1.8 s and 0.5 GB with MiniLM's
// WordPiece, 2.8 s and 0.85 GB with a Unigram of 400 pieces, on one core of an AMD EPYC.
const MaxTextBytes = 4 << 20

// maxTokenizerFile bounds a tokenizer.json. The largest known, of 250,000 tokens, has 17 MB.
const maxTokenizerFile = 256 << 20

var errTokenizerClosed = corpus.Errorf(corpus.Unavailable, "embedder_closed", "the tokenizer is closed: the service is stopping")

// Token is one token of a text.
type Token struct {
	ID uint32
	// Piece is the token as the vocabulary spells it.
	Piece string
	// Special tells tokens that the model's template adds around a text.
	Special bool
	// Span is the token's place in the text, zero for special tokens.
	Span corpus.TokenSpan
}

// Tokenizer turns texts into a model's token ids exactly as Hugging Face tokenizers does with
// the same tokenizer.json, except that what the file says about padding and truncation is
// ignored: both belong to whoever forms batches. It is safe for concurrent use.
//
// Texts that are not valid UTF-8 or contain NUL are refused: the library would silently embed
// something else (it replaces the former and stops at the latter).
type Tokenizer struct {
	// mu is held for reading during calls into C, for writing while closing.
	mu     sync.RWMutex
	c      *tokenizers.Tokenizer
	closed bool

	// opening and closing count the special tokens around every text.
	opening, closing int
	vocab            int
}

// OpenTokenizer loads a tokenizer.json. The caller closes it.
func OpenTokenizer(path string) (*Tokenizer, error) {
	data, err := readBounded(path, maxTokenizerFile)
	if err != nil {
		return nil, fmt.Errorf("opening tokenizer: %w", err)
	}
	data, err = withoutPaddingAndTruncation(data)
	if err != nil {
		return nil, fmt.Errorf("opening tokenizer %s: %w", path, err)
	}
	c, err := tokenizers.FromBytes(data)
	if err != nil {
		return nil, corpus.Wrap(corpus.Invalid, "tokenizer_invalid", "the tokenizer.json is not one that the tokenizers library reads: "+path, err)
	}
	t := &Tokenizer{c: c, vocab: int(c.VocabSize())}
	if err := t.learnTemplate(); err != nil {
		return nil, errors.Join(fmt.Errorf("opening tokenizer %s: %w", path, err), t.Close())
	}
	return t, nil
}

func readBounded(path string, limit int64) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > limit {
		return nil, corpus.Errorf(corpus.Invalid, "file_too_large", "%s has %d bytes, at most %d are read", path, info.Size(), limit)
	}
	return os.ReadFile(path)
}

// withoutPaddingAndTruncation rewrites a tokenizer.json so that an encoding is the whole text
// and nothing else.
func withoutPaddingAndTruncation(data []byte) ([]byte, error) {
	var file map[string]json.RawMessage
	if err := json.Unmarshal(data, &file); err != nil {
		return nil, corpus.Wrap(corpus.Invalid, "tokenizer_invalid", "the tokenizer.json is not a JSON object", err)
	}
	if len(file["model"]) == 0 {
		return nil, corpus.Errorf(corpus.Invalid, "tokenizer_invalid", "the tokenizer.json has no model")
	}
	file["padding"], file["truncation"] = json.RawMessage("null"), json.RawMessage("null")
	return json.Marshal(file)
}

// learnTemplate finds the special tokens that the post-processor puts before and after a text.
func (t *Tokenizer) learnTemplate() error {
	e := t.c.EncodeWithOptions("a", true, tokenizers.WithReturnSpecialTokensMask())
	if len(e.IDs) == 0 || len(e.SpecialTokensMask) != len(e.IDs) {
		return corpus.Errorf(corpus.Invalid, "tokenizer_invalid", "the tokenizer makes no tokens of the text \"a\"")
	}
	first := 0
	for first < len(e.IDs) && e.SpecialTokensMask[first] == 1 {
		first++
	}
	last := len(e.IDs)
	for last > first && e.SpecialTokensMask[last-1] == 1 {
		last--
	}
	for i := first; i < last; i++ {
		if e.SpecialTokensMask[i] == 1 {
			return corpus.Errorf(corpus.Invalid, "tokenizer_invalid", "the tokenizer puts special tokens inside a text, which no supported model does")
		}
	}
	t.opening, t.closing = first, len(e.IDs)-last
	return nil
}

// Close frees the tokenizer after calls in flight have ended. It may be called again.
func (t *Tokenizer) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.closed = true
	return t.c.Close()
}

// VocabSize is one more than the largest token id.
func (t *Tokenizer) VocabSize() int { return t.vocab }

// Specials returns how many special tokens stand before and after every encoded text.
func (t *Tokenizer) Specials() (opening, closing int) { return t.opening, t.closing }

// Encode returns the ids of all of a text's tokens, special tokens included, however
// many there are. It fails with corpus.Invalid for a text that is too long, not UTF-8 or
// has a NUL. It blocks for as long as the text takes, about 0.5 µs a byte on one core.
func (t *Tokenizer) Encode(text string) ([]uint32, error) {
	e, err := t.encode(text)
	if err != nil {
		return nil, err
	}
	return e.IDs, nil
}

// Spans returns the place in the text of each token, special tokens left out: byte offsets with
// Start <= End on boundaries of runes, Start never decreasing. Spans may be empty, overlap, or
// leave out what the tokenizer drops. It fails as Encode does.
func (t *Tokenizer) Spans(text string) ([]corpus.TokenSpan, error) {
	e, err := t.encode(text, tokenizers.WithReturnAllAttributes())
	if err != nil {
		return nil, err
	}
	spans := make([]corpus.TokenSpan, 0, len(e.IDs))
	start := 0
	for i, o := range e.Offsets {
		if e.SpecialTokensMask[i] == 1 {
			continue
		}
		span := spanIn(text, o)
		// Normalisers that reorder combining marks can make a token begin before its predecessor.
		start = max(start, span.Start)
		spans = append(spans, corpus.TokenSpan{Start: start, End: max(start, span.End)})
	}
	return spans, nil
}

// Tokenize returns all that is known of each token, special tokens included. It fails as
// Encode does.
func (t *Tokenizer) Tokenize(text string) ([]Token, error) {
	e, err := t.encode(text, tokenizers.WithReturnAllAttributes())
	if err != nil {
		return nil, err
	}
	out := make([]Token, len(e.IDs))
	for i, id := range e.IDs {
		out[i] = Token{ID: id, Piece: e.Tokens[i], Special: e.SpecialTokensMask[i] == 1}
		if !out[i].Special {
			out[i].Span = spanIn(text, e.Offsets[i])
		}
	}
	return out, nil
}

// encode is the one call into C.
func (t *Tokenizer) encode(text string, opts ...tokenizers.EncodeOption) (tokenizers.Encoding, error) {
	if err := checkText(text); err != nil {
		return tokenizers.Encoding{}, err
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.closed {
		return tokenizers.Encoding{}, errTokenizerClosed
	}
	e := t.c.EncodeWithOptions(text, true, opts...)
	// The library answers an error, and a panic of its own, with nothing at all.
	if len(e.IDs) < t.opening+t.closing {
		return tokenizers.Encoding{}, corpus.Errorf(corpus.Invalid, "tokenization_failed", "the model's tokenizer cannot read this text of %d bytes", len(text))
	}
	return e, nil
}

// checkText refuses what the library would misread. A token's spelling with a NUL in it would
// also end the process, because the library unwraps it across the border to C.
func checkText(text string) error {
	if len(text) > MaxTextBytes {
		return corpus.Errorf(corpus.Invalid, "text_too_long", "the text has %d bytes, at most %d are tokenized: cut it", len(text), MaxTextBytes)
	}
	if i := strings.IndexByte(text, 0); i >= 0 {
		return corpus.Errorf(corpus.Invalid, "invalid_text", "the text has a NUL at byte %d: remove it", i)
	}
	if !utf8.ValidString(text) {
		return corpus.Errorf(corpus.Invalid, "invalid_text", "the text is not valid UTF-8 at byte %d", invalidAt(text))
	}
	return nil
}

func invalidAt(text string) int {
	for i, r := range text {
		if r == utf8.RuneError {
			if _, n := utf8.DecodeRuneInString(text[i:]); n == 1 {
				return i
			}
		}
	}
	return len(text)
}

// spanIn brings a token's offsets into the text and to boundaries of runes: tokens of byte
// level models can begin or end inside one.
func spanIn(text string, o tokenizers.Offset) corpus.TokenSpan {
	start, end := int(min(o[0], uint(len(text)))), int(min(o[1], uint(len(text))))
	for start > 0 && start < len(text) && !utf8.RuneStart(text[start]) {
		start--
	}
	for end < len(text) && !utf8.RuneStart(text[end]) {
		end++
	}
	return corpus.TokenSpan{Start: start, End: max(start, end)}
}
