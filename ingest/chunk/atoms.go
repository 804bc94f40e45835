package chunk

import (
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// cutLevel says how good a place for a cut is; lower is better.
type cutLevel uint8

const (
	cutHeading cutLevel = iota
	cutParagraph
	cutSentence
	cutCodeLine
	cutClause
	cutWord
	cutToken
)

// atom is a piece of text that is never cut: the runes of one token, or of several tokens that
// share a rune or a grapheme cluster. White space belongs to no atom.
type atom struct {
	start, end int
	// tokens in it; before counts those of all earlier atoms.
	tokens, before int
	// cut is the quality of the place before the atom.
	cut cutLevel
	// glued marks the first atom after a heading, which stays with the heading.
	glued bool
	// fence is the number of the code block it lies in, or -1.
	fence int32
}

const (
	// bytesPerToken is the estimate for text no token covers; real tokenizers need about 4
	// bytes of English a token, and less often more.
	bytesPerToken = 4
	// longToken is the longest span taken for one token. A tokenizer that gives up on a word (WordPiece
	// above 100 characters) makes a whole line of base64 one token; cut up, the parts count
	// more, so such a span is counted by its bytes: base64 was seen to need 2.2 a token.
	longToken         = 100
	bytesPerLongToken = 2
	// longCluster bounds a grapheme cluster that is kept whole, in runes. Unicode's
	// stream-safe format ends a cluster at 30 combining marks.
	longCluster = 32
	// untokenized is the longest stretch of text between two tokens that is taken for what a
	// normaliser dropped (control characters and the like) rather than for text nobody counted.
	untokenized = 16
)

// atomise makes atoms of the tokens, and of the text that no token covers. It trusts nothing
// about spans: they may lie anywhere, overlap, or split runes.
func atomise(text string, spans []corpus.TokenSpan) []atom {
	atoms := make([]atom, 0, len(spans))
	add := func(start, end, tokens int) {
		for _, w := range trimmed(text, start, end) {
			atoms = append(atoms, atom{start: w.start, end: w.end, tokens: tokens, fence: -1})
			tokens = 0 // a token with white space inside is counted once
		}
	}
	at := 0 // text before at is in atoms, or white space
	for k := 0; k < len(spans); k++ {
		start, end := max(spans[k].Start, at), min(spans[k].End, len(text))
		if end <= start {
			// An empty or misplaced token weighs on the atom it follows.
			if len(atoms) > 0 && spans[k].Start <= at {
				atoms[len(atoms)-1].tokens++
			}
			continue
		}
		start, end = runeStart(text, start), runeEnd(text, end)
		start = max(start, at)
		if gap := text[at:start]; !blank(gap) {
			if len(strings.TrimSpace(gap)) > untokenized {
				estimate(text, at, start, bytesPerToken, add)
			} else {
				add(at, start, 0)
			}
		}
		if end-start > longToken {
			estimate(text, start, end, bytesPerLongToken, add)
		} else {
			add(start, end, 1)
		}
		at = end
	}
	if rest := text[at:]; !blank(rest) {
		if len(spans) > 0 && len(strings.TrimSpace(rest)) <= untokenized {
			add(at, len(text), 0)
		} else {
			estimate(text, at, len(text), bytesPerToken, add)
		}
	}
	atoms = joinClusters(text, atoms)
	total := 0
	for i := range atoms {
		atoms[i].before = total
		total += atoms[i].tokens
		if i == 0 || atoms[i-1].end < atoms[i].start {
			atoms[i].cut = cutWord
		} else {
			atoms[i].cut = cutToken
		}
	}
	return atoms
}

// estimate adds the text between start and end as pieces of words of at most longest bytes (at
// least one rune) and single other runes, one token each.
func estimate(text string, start, end, longest int, add func(start, end, tokens int)) {
	inWord := func(r rune) bool { return unicode.IsLetter(r) || unicode.IsDigit(r) }
	for i := start; i < end; {
		r, size := utf8.DecodeRuneInString(text[i:end])
		if unicode.IsSpace(r) {
			i += size
			continue
		}
		j := i + size
		for inWord(r) && j < end {
			next, size := utf8.DecodeRuneInString(text[j:end])
			if !inWord(next) || j+size-i > longest {
				break
			}
			j += size
		}
		add(i, j, 1)
		i = j
	}
}

// trimmed returns the runs of text between start and end that are not white space.
func trimmed(text string, start, end int) []piece {
	var out []piece
	run := -1
	for i := start; i < end; {
		r, size := utf8.DecodeRuneInString(text[i:end])
		if unicode.IsSpace(r) {
			if run >= 0 {
				out = append(out, piece{run, i})
				run = -1
			}
		} else if run < 0 {
			run = i
		}
		i += size
	}
	if run >= 0 {
		out = append(out, piece{run, end})
	}
	return out
}

// joinClusters joins atoms between which a cut would tear a grapheme cluster: before a
// combining mark, a variation selector, an emoji modifier or a joiner, and after a joiner. It
// is the cheap part of the Unicode rule; flags and Hangul syllables in parts are not looked at.
func joinClusters(text string, atoms []atom) []atom {
	if len(atoms) == 0 {
		return atoms
	}
	out := atoms[:1]
	runes := 0
	for _, a := range atoms[1:] {
		last := &out[len(out)-1]
		if last.end == a.start && runes < longCluster && continues(text, a.start) {
			last.end = a.end
			last.tokens += a.tokens
			runes += utf8.RuneCountInString(text[a.start:a.end])
			continue
		}
		runes = 0
		out = append(out, a)
	}
	return out
}

const joiner = '\u200d' // zero width joiner

// continues reports whether the rune at i belongs to the grapheme cluster before it.
func continues(text string, i int) bool {
	r, _ := utf8.DecodeRuneInString(text[i:])
	if r < 0x300 {
		return false
	}
	if r == joiner || unicode.In(r, unicode.Mn, unicode.Me, unicode.Mc) || r >= 0x1f3fb && r <= 0x1f3ff {
		return true
	}
	before, _ := utf8.DecodeLastRuneInString(text[:i])
	return before == joiner
}

// runeStart moves i back to the start of the rune it lies in.
func runeStart(text string, i int) int {
	for k := i; k > 0 && k > i-utf8.UTFMax && k < len(text); k-- {
		if utf8.RuneStart(text[k]) {
			if _, size := utf8.DecodeRuneInString(text[k:]); k+size > i {
				return k
			}
			return i // stray continuation bytes are runes of their own
		}
	}
	return i
}

// runeEnd moves i forward to the end of the rune it lies in.
func runeEnd(text string, i int) int {
	if i >= len(text) {
		return len(text)
	}
	start := runeStart(text, i)
	if start == i {
		return i
	}
	_, size := utf8.DecodeRuneInString(text[start:])
	return start + size
}

func blank(s string) bool {
	for _, r := range s {
		if !unicode.IsSpace(r) {
			return false
		}
	}
	return true
}
