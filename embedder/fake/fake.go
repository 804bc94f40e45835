// Package fake is a deterministic embedder for tests and benchmarks: seeded vectors in which
// texts that share words are near, so that search tests mean something. It implements the
// same methods as the real batcher and has all three heads.
package fake

import (
	"context"
	"fmt"
	"hash/fnv"
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"unicode"
	"unicode/utf8"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Embedder is safe for concurrent use. Its zero value is not usable; see [New].
type Embedder struct {
	spec corpus.ModelSpec
	// calls and texts count what was embedded, for tests that assert how little was.
	calls, texts atomic.Int64
	// Fail, when not nil, is asked before each text; its error fails that text alone.
	Fail func(text string) error
	// Gate, when not nil, is called before each request; its error fails the request.
	Gate func(ctx context.Context, req corpus.EmbedRequest) error
}

// New returns an embedder of dense vectors of length dim and the given heads. The token
// vectors of the ColBERT head have min(dim, 16) values, to keep tests small.
func New(dim int, heads corpus.Heads) *Embedder {
	colbert := 0
	if heads.Has(corpus.ColBERT) {
		colbert = min(dim, 16)
	}
	return &Embedder{spec: corpus.ModelSpec{
		Name: "fake", Fingerprint: fmt.Sprintf("fake-%d-%s", dim, heads), Heads: heads,
		Dim: dim, ColBERTDim: colbert, MaxTokens: 8192, VocabSize: 1 << 20, Precision: "fp32", Device: "cpu",
	}}
}

// Spec returns the fake model's specification.
func (e *Embedder) Spec() corpus.ModelSpec { return e.spec }

// Counts returns how many requests and how many texts were embedded so far.
func (e *Embedder) Counts() (calls, texts int64) { return e.calls.Load(), e.texts.Load() }

// Embed answers at once; it blocks only in Gate.
func (e *Embedder) Embed(ctx context.Context, req corpus.EmbedRequest) ([]corpus.Embedding, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if e.Gate != nil {
		if err := e.Gate(ctx, req); err != nil {
			return nil, err
		}
	}
	e.calls.Add(1)
	e.texts.Add(int64(len(req.Inputs)))
	out := make([]corpus.Embedding, len(req.Inputs))
	for i, in := range req.Inputs {
		out[i] = e.one(in, req)
	}
	return out, nil
}

func (e *Embedder) one(in corpus.EmbedInput, req corpus.EmbedRequest) corpus.Embedding {
	if e.Fail != nil {
		if err := e.Fail(in.Text); err != nil {
			return corpus.Embedding{Err: err}
		}
	}
	ids := slices.Clone(in.Tokens)
	if ids == nil {
		for _, s := range spans(in.Text) {
			ids = append(ids, e.id(in.Text[s.Start:s.End]))
		}
	}
	limit := e.spec.MaxTokens
	if req.MaxTokens > 0 {
		limit = min(limit, req.MaxTokens)
	}
	original := len(ids) + 2
	if original > limit {
		if req.RefuseLong {
			return corpus.Embedding{Err: corpus.Errorf(corpus.Invalid, "input_too_long",
				"the text has %d tokens; at most %d are allowed", original, limit)}
		}
		ids = ids[:max(0, limit-2)]
	}
	out := corpus.Embedding{Tokens: len(ids) + 2, OriginalTokens: original}
	if req.Heads.Has(corpus.Dense) {
		v := make([]float32, e.spec.Dim)
		addWord(v, 0, 0.05) // a text without words still has a direction
		for _, id := range ids {
			addWord(v, id, 1)
		}
		out.Vectors.DenseNorm = normalise(v)
		out.Vectors.Dense = v
	}
	if req.Heads.Has(corpus.SparseHead) && e.spec.Heads.Has(corpus.SparseHead) {
		s := &corpus.Sparse{Indices: []uint32{}, Values: []float32{}}
		seen := slices.Clone(ids)
		slices.Sort(seen)
		for _, id := range slices.Compact(seen) {
			s.Indices = append(s.Indices, id)
			s.Values = append(s.Values, 0.1+float32(id%64)/128)
		}
		out.Vectors.Sparse = s
	}
	if req.Heads.Has(corpus.ColBERT) && e.spec.Heads.Has(corpus.ColBERT) {
		rows := make([][]float32, 0, len(ids)+1)
		for _, id := range append(slices.Clone(ids), 2) {
			v := make([]float32, e.spec.ColBERTDim)
			addWord(v, id, 1)
			normalise(v)
			rows = append(rows, v)
		}
		out.Vectors.ColBERT = rows
	}
	return out
}

// Tokens returns the byte spans of the text's words.
func (e *Embedder) Tokens(_ context.Context, text string) ([]corpus.TokenSpan, error) {
	return spans(text), nil
}

// Tokenize returns the ids of the text's words between a start and an end token.
func (e *Embedder) Tokenize(_ context.Context, text string) ([]uint32, error) {
	ids := []uint32{0}
	for _, s := range spans(text) {
		ids = append(ids, e.id(text[s.Start:s.End]))
	}
	return append(ids, 2), nil
}

// spans cuts words: runs of letters and digits, or one other visible rune. A word longer
// than 8 runes counts as several tokens, as it would in a real vocabulary.
func spans(text string) []corpus.TokenSpan {
	var out []corpus.TokenSpan
	start, runes := -1, 0
	flush := func(end int) {
		if start >= 0 {
			out = append(out, corpus.TokenSpan{Start: start, End: end})
			start, runes = -1, 0
		}
	}
	for i, r := range text {
		switch {
		case unicode.IsLetter(r) || unicode.IsDigit(r):
			if start >= 0 && runes == 8 {
				flush(i)
			}
			if start < 0 {
				start = i
			}
			runes++
		case unicode.IsSpace(r):
			flush(i)
		default:
			flush(i)
			out = append(out, corpus.TokenSpan{Start: i, End: i + max(1, utf8.RuneLen(r))})
			if r == utf8.RuneError {
				out[len(out)-1].End = i + 1
			}
		}
	}
	flush(len(text))
	return out
}

func (e *Embedder) id(word string) uint32 {
	h := fnv.New32a()
	h.Write([]byte(strings.ToLower(word)))
	return 4 + h.Sum32()%uint32(e.spec.VocabSize-4)
}

// addWord adds a word's fixed random direction (splitmix64, values in [-1, 1)).
func addWord(v []float32, id uint32, weight float32) {
	x := uint64(id)*0x9e3779b97f4a7c15 + 0x6c6f636b73746570
	for i := range v {
		x += 0x9e3779b97f4a7c15
		z := x
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		z ^= z >> 31
		v[i] += weight * (float32(z>>40)/(1<<23) - 1)
	}
}

// normalise gives v length 1 and returns what it was.
func normalise(v []float32) float32 {
	var sum float64
	for _, x := range v {
		sum += float64(x) * float64(x)
	}
	if sum == 0 {
		return 0
	}
	length := math.Sqrt(sum)
	inv := float32(1 / length)
	for i := range v {
		v[i] *= inv
	}
	return float32(length)
}
