package chunk

import (
	"fmt"
	"sort"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

const (
	// specialTokens are added by the model around each chunk (<s> and </s>, or [CLS] and [SEP]).
	specialTokens = 2
	// midWordReserve is kept free in a chunk that starts inside a word. Tokenised alone, the rest
	// of a word gets a word-start mark and other pieces than it had inside the word. Subword
	// tokenizers fall back into step after a token or two: 4 is twice what was seen.
	midWordReserve = 4
	// minTarget leaves room for the special tokens, the reserve and the largest rune
	// (a byte-level tokenizer spends up to 4 tokens, or more for a long grapheme).
	minTarget = 16
	// defaultTarget suits retrieval: long enough for a thought, short enough for one vector
	// to mean it (unmeasured).
	defaultTarget = 512
	// defaultOverlapShare of the target is repeated (unmeasured).
	defaultOverlapShare = 8
)

// Default returns the chunking for a model of the given longest input, in tokens.
func Default(maxTokens int) corpus.Chunking {
	target := defaultTarget
	if maxTokens > 0 {
		target = min(target, maxTokens)
	}
	return corpus.Chunking{TargetTokens: target, OverlapTokens: target / defaultOverlapShare}
}

// Check refuses a chunking that [Split] could not honour: a target below 16 or above the
// model's maxTokens (0 means unbounded), a negative overlap, or one above half the target, which
// would embed most of a text more than twice. The error's Pointer is relative to the chunking.
func Check(c corpus.Chunking, maxTokens int) *corpus.FieldError {
	switch {
	case c.TargetTokens < minTarget:
		return &corpus.FieldError{Pointer: "/target_tokens", Code: "out_of_range",
			Detail: fmt.Sprintf("target_tokens is %d; the smallest is %d", c.TargetTokens, minTarget)}
	case maxTokens > 0 && c.TargetTokens > maxTokens:
		return &corpus.FieldError{Pointer: "/target_tokens", Code: "out_of_range",
			Detail: fmt.Sprintf("target_tokens is %d; the model takes at most %d", c.TargetTokens, maxTokens)}
	case c.OverlapTokens < 0:
		return &corpus.FieldError{Pointer: "/overlap_tokens", Code: "out_of_range", Detail: "overlap_tokens must not be negative"}
	case c.OverlapTokens > c.TargetTokens/2:
		return &corpus.FieldError{Pointer: "/overlap_tokens", Code: "out_of_range",
			Detail: fmt.Sprintf("overlap_tokens is %d; at most half of target_tokens (%d) is allowed", c.OverlapTokens, c.TargetTokens/2)}
	}
	return nil
}

// Split cuts text into chunks of at most c.TargetTokens tokens, special tokens included.
// spans are the places of the text's tokens as the model's tokenizer gives them, special tokens
// left out. Text of only white space has no chunks.
//
// It cuts, in this order of liking, before a Markdown heading, between paragraphs (or before and
// after a fenced code block), between sentences and list items, between lines of code, at commas,
// between words, and only then inside a word; always in the second half of the room that is
// left, if it can. A heading stays with what follows it, and a code block that fits into a chunk
// is not cut. A chunk that does not begin at a heading repeats up to c.OverlapTokens tokens of
// the one before, from the start of a sentence where there is one.
//
// The limit counts the tokens of the whole text. A chunk that begins and ends between words has
// the same tokens when it is tokenised alone; one that begins inside a word may have a few more,
// for which room is kept. Text without a token (spans missing, or cut off early by a tokenizer
// with a limit) is counted as one token for every four bytes of a word and one for any other rune.
// Tokenised again with MiniLM's tokenizer, no chunk of the Go documentation (5,391 texts) was over
// targets of 32, 64 and 256.
//
// A c that [Check] refuses is brought into its range rather than obeyed.
func Split(text string, spans []corpus.TokenSpan, c corpus.Chunking) []string {
	pieces := split(text, spans, c)
	out := make([]string, len(pieces))
	for i, p := range pieces {
		out[i] = text[p.start:p.end]
	}
	return out
}

// piece is a chunk's place in the text.
type piece struct{ start, end int }

func split(text string, spans []corpus.TokenSpan, c corpus.Chunking) []piece {
	target := max(c.TargetTokens, minTarget)
	s := splitter{
		text:    text,
		room:    target - specialTokens,
		overlap: max(0, min(c.OverlapTokens, target/2)),
	}
	s.atoms = atomise(text, spans)
	if len(s.atoms) == 0 {
		return nil
	}
	s.mark()
	return s.run()
}

// splitter is one call of split.
type splitter struct {
	text          string
	room, overlap int
	atoms         []atom
	// fences holds, by fence number, its first atom and the one after its last.
	fences [][2]int
}

// tokens of the atoms from i up to, not including, j.
func (s *splitter) tokens(i, j int) int { return s.sum(j) - s.sum(i) }

func (s *splitter) sum(i int) int {
	if i == len(s.atoms) {
		last := s.atoms[i-1]
		return last.before + last.tokens
	}
	return s.atoms[i].before
}

func (s *splitter) run() []piece {
	var out []piece
	n := len(s.atoms)
	start, done := 0, 0 // the next chunk's first atom; atoms before done are in some chunk
	for done < n {
		room := s.room
		if s.atoms[start].cut >= cutToken {
			room -= midWordReserve
		}
		end := s.cut(start, done, room)
		out = append(out, s.piece(start, end))
		done = end
		if done < n {
			start = s.next(start, done)
		}
	}
	return out
}

// cut returns where the chunk that begins at start ends: after done, and within room unless
// the atom at done alone exceeds it.
func (s *splitter) cut(start, done, room int) int {
	n := len(s.atoms)
	rest := s.tokens(start, n)
	if rest <= room {
		return n
	}
	// A last chunk of a few words would mean little: leave it a quarter of the room.
	if least := room / 4; rest-room < least {
		room = max(rest-least, room/2)
	}
	// The furthest end: the first atom whose tokens would no longer fit.
	furthest := start + sort.Search(n-start, func(k int) bool { return s.tokens(start, start+k+1) > room })
	if furthest = max(furthest, done+1); furthest >= n {
		return n // the last atom alone is too large
	}
	half := start + sort.Search(furthest-start, func(k int) bool { return 2*s.tokens(start, start+k) >= room })
	half = max(half, done+1)

	for _, worst := range [...]cutLevel{cutHeading, cutParagraph, cutSentence, cutCodeLine, cutClause, cutWord} {
		if e, ok := s.latest(half, furthest, worst, false); ok {
			return e
		}
	}
	if e, ok := s.latest(done+1, furthest, cutWord, false); ok {
		return e
	}
	// Only places inside a code block, after a heading or inside a word are left.
	for _, worst := range [...]cutLevel{cutParagraph, cutCodeLine, cutWord, cutToken} {
		if e, ok := s.latest(half, furthest, worst, true); ok {
			return e
		}
	}
	return furthest
}

// latest returns the last atom in [lo, hi] before which a cut is at least as good as worst.
// Places inside a code block that fits, and after a heading, count only when all does.
func (s *splitter) latest(lo, hi int, worst cutLevel, all bool) (int, bool) {
	for e := hi; e >= lo; e-- {
		a := &s.atoms[e]
		if a.cut > worst || !all && (a.glued || s.insideWholeFence(e)) {
			continue
		}
		return e, true
	}
	return 0, false
}

// insideWholeFence reports whether a cut before atom e falls inside a code block that would
// fit into a chunk of its own.
func (s *splitter) insideWholeFence(e int) bool {
	f := s.atoms[e].fence
	if f < 0 || s.fences[f][0] == e {
		return false
	}
	return s.tokens(s.fences[f][0], s.fences[f][1]) <= s.room
}

// next returns where the chunk after a cut at done begins: at done, or up to the overlap
// before it. The atom at done always still fits.
func (s *splitter) next(start, done int) int {
	if s.overlap == 0 || s.atoms[done].cut == cutHeading {
		return done
	}
	budget := min(s.overlap, s.room-midWordReserve-s.atoms[done].tokens)
	lo := done
	for lo-1 > start && s.tokens(lo-1, done) <= budget {
		lo--
	}
	for _, worst := range [...]cutLevel{cutSentence, cutWord} {
		for i := lo; i < done; i++ {
			a := &s.atoms[i]
			if a.cut > worst || a.glued {
				continue
			}
			// No torn-off end of a code block: a stray brace says nothing.
			if a.fence >= 0 && s.fences[a.fence][0] != i && a.cut != cutParagraph {
				continue
			}
			return i
		}
	}
	return done
}

// piece gives the text of atoms [i, j) without the white space around it; the indentation of
// its first line stays, because in code and lists it means something.
func (s *splitter) piece(i, j int) piece {
	start, end := s.atoms[i].start, s.atoms[j-1].end
	indent := start
	for indent > 0 && (s.text[indent-1] == ' ' || s.text[indent-1] == '\t') {
		indent--
	}
	if indent == 0 || s.text[indent-1] == '\n' {
		start = indent
	}
	return piece{start, end}
}
