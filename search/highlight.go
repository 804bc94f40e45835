package search

import (
	"context"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// maxHighlights of a hit are shown, those that matter most.
const maxHighlights = 10

// highlight finds, for each hit shown, the words of its text whose sparse terms the query has
// too, ordered by what they add to the sparse score.
func (b *batch) highlight(ctx context.Context, q *query) error {
	weights, err := b.queryTerms(ctx, q)
	if err != nil {
		return err
	}
	q.highlights = map[corpus.ID][]string{}
	for _, r := range q.page() {
		stored := q.stored[r.id]
		if stored == nil || stored.Sparse == nil {
			continue
		}
		parts := map[uint32]float64{}
		for i, term := range stored.Sparse.Indices {
			if w := weights[term]; w > 0 && stored.Sparse.Values[i] > 0 {
				parts[term] = w * float64(stored.Sparse.Values[i])
			}
		}
		if len(parts) == 0 {
			continue
		}
		text := q.live[r.id].Text
		ids, err := b.embedder.Tokenize(ctx, text)
		if err != nil {
			return err
		}
		spans, err := b.embedder.Tokens(ctx, text)
		if err != nil {
			return err
		}
		q.highlights[r.id] = words(text, ids, spans, parts)
	}
	return nil
}

// queryTerms returns the query's sparse weights. A dense search has none of its own, so its
// text is embedded for them (through the cache).
func (b *batch) queryTerms(ctx context.Context, q *query) (map[uint32]float64, error) {
	v := q.vecs
	if v.Sparse == nil && q.req.Query != "" {
		spec := b.embedder.Spec()
		got, errs, err := b.cache.get(ctx, []cacheKey{{fingerprint: spec.Fingerprint, heads: corpus.SparseHead, text: q.req.Query}}, b.embed)
		if err != nil {
			return nil, err
		}
		if errs[0] != nil {
			return nil, errs[0]
		}
		v = got[0]
	}
	out := map[uint32]float64{}
	if v.Sparse != nil {
		for i, term := range v.Sparse.Indices {
			out[term] = float64(v.Sparse.Values[i])
		}
	}
	return out, nil
}

// words returns the distinct words of text that hold a token with a part in the score, the
// largest part first. ids are the text's tokens between special ones, spans their places.
func words(text string, ids []uint32, spans []corpus.TokenSpan, parts map[uint32]float64) []string {
	special := len(ids) - len(spans)
	if special < 0 {
		return nil
	}
	ids = ids[(special+1)/2:]
	score := map[string]float64{}
	var order []string
	for i, span := range spans {
		part := parts[ids[i]]
		if part == 0 || span.Start < 0 || span.End > len(text) || span.Start >= span.End {
			continue
		}
		word := wordAround(text, span)
		if word == "" {
			continue
		}
		if _, seen := score[word]; !seen {
			order = append(order, word)
		}
		score[word] = max(score[word], part)
	}
	slices.SortStableFunc(order, func(a, b string) int {
		switch {
		case score[a] > score[b]:
			return -1
		case score[a] < score[b]:
			return 1
		}
		return 0
	})
	return order[:min(len(order), maxHighlights)]
}

// wordAround widens a token to the word it is part of, at most maxWord bytes to either side.
func wordAround(text string, span corpus.TokenSpan) string {
	const maxWord = 64
	inWord := func(r rune) bool { return unicode.IsLetter(r) || unicode.IsDigit(r) || unicode.Is(unicode.Mn, r) }
	token := strings.TrimSpace(text[span.Start:span.End])
	first, _ := utf8.DecodeRuneInString(token)
	last, _ := utf8.DecodeLastRuneInString(token)
	start, end := span.Start, span.End
	// Scripts without spaces between words have no word to widen to.
	if inWord(first) && first < 0x2e80 && text[start] == token[0] {
		for start > 0 && span.Start-start < maxWord {
			r, size := utf8.DecodeLastRuneInString(text[:start])
			if !inWord(r) {
				break
			}
			start -= size
		}
	}
	if inWord(last) && last < 0x2e80 {
		for end < len(text) && end-span.End < maxWord {
			r, size := utf8.DecodeRuneInString(text[end:])
			if !inWord(r) {
				break
			}
			end += size
		}
	}
	return strings.TrimSpace(text[start:end])
}
