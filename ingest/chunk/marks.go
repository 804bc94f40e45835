package chunk

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// mark walks the text's lines and rates the place before each atom: headings, paragraphs, code
// blocks, sentences. It knows as much Markdown as that takes; plain text has paragraphs and
// sentences too.
func (s *splitter) mark() {
	var (
		next      int    // first atom not yet rated
		fence     string // the mark that closes the code block we are in, or ""
		blankLine = true // the line before was blank, or this is the first
		heading   bool   // the last line that was not blank was a heading
		afterCode bool   // a code block ended above
	)
	for at := 0; at < len(s.text) && next < len(s.atoms); {
		end := len(s.text)
		if k := strings.IndexByte(s.text[at:], '\n'); k >= 0 {
			end = at + k
		}
		line := strings.TrimSuffix(s.text[at:end], "\r")
		following := end + 1
		first := next
		for next < len(s.atoms) && s.atoms[next].start < following {
			next++
		}
		at = following
		trimmedLine := strings.TrimSpace(line)

		if fence != "" { // inside a code block
			number := int32(len(s.fences) - 1)
			for i := first; i < next; i++ {
				s.atoms[i].fence = number
			}
			s.fences[number][1] = next
			if first < next {
				s.atoms[first].cut = cutCodeLine
				if blankLine {
					s.atoms[first].cut = cutParagraph
				}
			}
			blankLine = trimmedLine == ""
			if closes(line, fence) {
				fence, afterCode, blankLine = "", true, false
			}
			continue
		}
		if trimmedLine == "" {
			blankLine = true
			continue
		}
		if first == next { // only what belongs to an atom of an earlier line
			continue
		}
		opened := opens(line)
		isHeading := opened == "" && (isATX(line) || blankLine && s.isSetext(at))
		a := &s.atoms[first]
		switch {
		case isHeading:
			a.cut = cutHeading
		case blankLine, opened != "", afterCode:
			a.cut = cutParagraph
		case isItem(trimmedLine):
			a.cut = cutSentence
		case first > 0 && endsSentence(s.text[:s.atoms[first-1].end]):
			a.cut = cutSentence
		}
		a.glued = heading
		if opened != "" {
			fence = opened
			s.fences = append(s.fences, [2]int{first, next})
			for i := first; i < next; i++ {
				s.atoms[i].fence = int32(len(s.fences) - 1)
			}
		} else {
			s.markSentences(first+1, next)
		}
		// The underline of a heading belongs to it, as what follows does.
		heading = isHeading || heading && a.glued && isUnderline(line)
		blankLine, afterCode = false, false
	}
}

// markSentences rates the places before atoms [i, j), which share a line.
func (s *splitter) markSentences(i, j int) {
	for ; i < j; i++ {
		before := s.text[:s.atoms[i-1].end]
		spaced := s.atoms[i].cut == cutWord
		last, _ := utf8.DecodeLastRuneInString(before)
		switch {
		case !spaced && last < 0x2000: // full-width marks need no space after them
		case endsSentence(before) && (!spaced || startsSentence(s.text[s.atoms[i].start:])):
			s.atoms[i].cut = cutSentence
		case strings.ContainsRune(",;:，；：、،؛–—", last):
			s.atoms[i].cut = cutClause
		}
	}
}

// endsSentence reports whether text ends with a sentence's mark, closing quotes and brackets
// after it allowed.
func endsSentence(text string) bool {
	for range maxClosing + 1 {
		r, size := utf8.DecodeLastRuneInString(text)
		switch r {
		case '.', '!', '?', '…', '。', '！', '？', '؟', '۔', '।', '॥', '።', '։':
			return true
		case '"', '\'', ')', ']', '}', '”', '’', '»', '」', '』', '）', '】', '*', '_', '`':
			text = text[:len(text)-size]
		default:
			return false
		}
	}
	return false
}

// maxClosing is how many closing quotes and brackets may follow a sentence's mark.
const maxClosing = 4

// startsSentence rules out what follows the dot of "e.g." and "approx.": a small letter.
func startsSentence(text string) bool {
	r, _ := utf8.DecodeRuneInString(text)
	return !unicode.IsLower(r)
}

// opens returns the run of marks that opens a fenced code block on this line, or "".
func opens(line string) string {
	t := strings.TrimLeft(line, " ")
	if len(line)-len(t) > 3 || len(t) < 3 || t[0] != '`' && t[0] != '~' {
		return ""
	}
	run := t[:len(t)-len(strings.TrimLeft(t, t[:1]))]
	if len(run) < 3 || t[0] == '`' && strings.ContainsRune(t[len(run):], '`') {
		return "" // inline code
	}
	return run
}

// closes reports whether the line closes a block that fence opened.
func closes(line, fence string) bool {
	t := strings.TrimSpace(line)
	return len(t) >= len(fence) && strings.Trim(t, fence[:1]) == ""
}

func isATX(line string) bool {
	t := strings.TrimLeft(line, " ")
	if len(line)-len(t) > 3 {
		return false
	}
	rest := strings.TrimLeft(t, "#")
	depth := len(t) - len(rest)
	return depth >= 1 && depth <= 6 && (rest == "" || rest[0] == ' ' || rest[0] == '\t')
}

// isSetext reports whether the line that starts at next underlines the one before it.
func (s *splitter) isSetext(next int) bool {
	if next >= len(s.text) {
		return false
	}
	line, _, _ := strings.Cut(s.text[next:], "\n")
	return isUnderline(line)
}

func isUnderline(line string) bool {
	t := strings.TrimSpace(line)
	return len(t) >= 2 && (strings.Trim(t, "=") == "" || strings.Trim(t, "-") == "")
}

// isItem reports whether a line starts a list item, a table row or a quotation.
func isItem(line string) bool {
	switch {
	case strings.HasPrefix(line, "- "), strings.HasPrefix(line, "* "), strings.HasPrefix(line, "+ "),
		strings.HasPrefix(line, "• "), strings.HasPrefix(line, "|"), strings.HasPrefix(line, "> "):
		return true
	}
	digits := len(line) - len(strings.TrimLeft(line, "0123456789"))
	return digits > 0 && digits <= 9 && len(line) > digits+1 &&
		(line[digits] == '.' || line[digits] == ')') && line[digits+1] == ' '
}
