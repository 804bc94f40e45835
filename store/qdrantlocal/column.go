package qdrantlocal

import (
	"slices"
	"strings"
	"unicode"

	"github.com/google/uuid"
	"github.com/qdrant/go-client/qdrant"
)

// columnKind is the type of a payload index.
type columnKind uint8

const (
	columnKeyword columnKind = iota
	columnInteger
	columnFloat
	columnBool
	columnDatetime
	columnUUID
	columnText
)

// columnState says what a column knows of a slot.
type columnState uint8

const (
	// stateAbsent: the point has no value at the path.
	stateAbsent columnState = iota
	// stateScalar: it has exactly one, of the column's type, and the column holds it.
	stateScalar
	// stateOther: anything else; the payload must be read.
	stateOther
)

// column is a payload index: the parsed value of one field of every point. Conditions read
// it instead of the payload where it holds the whole truth, and facets count over it, so
// that a filter costs nanoseconds per point and never answers differently with the index
// than without.
type column struct {
	path jsonPath
	kind columnKind
	// dropped is set when the index is deleted: a filter compiled before falls back to
	// the payload.
	dropped bool
	// text is the tokenizer of a text index, which keeps no values.
	text *tokenizer

	state chunked[columnState]
	// num holds an integer, the bits of a float, a bool, or the number of a string.
	num chunked[uint64]

	// counts says how many points hold each value, for keyword, uuid, integer and bool.
	counts map[uint64]int
	// names numbers the strings in use; free numbers are used again.
	names   map[string]uint32
	strings []string
	free    []uint32
	// points counts the points that have an indexed value.
	points int
}

func newColumn(p jsonPath, kind columnKind, text *tokenizer) *column {
	return &column{
		path: p, kind: kind, text: text,
		counts: map[uint64]int{}, names: map[string]uint32{},
	}
}

// facetable reports whether the type supports match conditions, hence facets.
func (c *column) facetable() bool {
	switch c.kind {
	case columnKeyword, columnInteger, columnBool, columnUUID:
		return true
	default:
		return false
	}
}

func (c *column) isString() bool { return c.kind == columnKeyword || c.kind == columnUUID }

func (c *column) grow(slot uint32) {
	if c.kind == columnText {
		return
	}
	c.state.grow(slot)
	c.num.grow(slot)
}

// get returns the value in slot if its state is stateScalar.
func (c *column) get(slot uint32) (value, columnState) {
	st := c.state.at(slot)
	if st != stateScalar {
		return value{}, st
	}
	n := c.num.at(slot)
	switch c.kind {
	case columnInteger:
		return value{kind: kindInt, num: n}, st
	case columnFloat:
		return value{kind: kindFloat, num: n}, st
	case columnBool:
		return value{kind: kindBool, num: n}, st
	default:
		return value{kind: kindString, raw: stringBytes(c.strings[n])}, st
	}
}

// key turns a value into the number it is counted under. ok is false if the value is not of
// the column's type. Strings are numbered on the way if add is set.
func (c *column) key(v value, add bool) (n uint64, ok bool) {
	switch c.kind {
	case columnInteger:
		return v.num, v.kind == kindInt
	case columnFloat:
		return v.num, v.kind == kindFloat
	case columnBool:
		return v.num, v.kind == kindBool
	case columnKeyword, columnUUID:
		if v.kind != kindString {
			return 0, false
		}
		if c.kind == columnUUID {
			if _, err := uuid.ParseBytes(v.raw); err != nil {
				return 0, false
			}
		}
		if id, ok := c.names[string(v.raw)]; ok {
			return uint64(id), true
		}
		if !add {
			return 0, false
		}
		s := string(v.raw)
		id := uint32(len(c.strings))
		if n := len(c.free); n > 0 {
			id = c.free[n-1]
			c.free = c.free[:n-1]
			c.strings[id] = s
		} else {
			c.strings = append(c.strings, s)
		}
		c.names[s] = id
		return uint64(id), true
	default:
		return 0, false
	}
}

// scan lists the distinct values of the column's type in a payload, and the state the slot
// has with them.
func (c *column) scan(payload []byte, add bool, out []uint64) ([]uint64, columnState) {
	total := 0
	state := stateAbsent
	note := func(v value) {
		n, ok := c.key(v, add)
		if !ok {
			return
		}
		for _, x := range out {
			if x == n {
				return
			}
		}
		out = append(out, n)
	}
	c.path.each(payload, func(v value) bool {
		total++
		state = stateOther
		if v.kind == kindList {
			eachItem(v.raw, func(enc []byte) bool {
				note(decodeValue(enc))
				return true
			})
			return true
		}
		note(v)
		if total == 1 && len(out) == 1 {
			state = stateScalar
		}
		return true
	})
	return out, state
}

// put indexes the payload of slot, which must have been cleared.
func (c *column) put(slot uint32, payload []byte) {
	switch c.kind {
	case columnText:
		return
	case columnDatetime:
		// Dates are kept as the payload spells them: a condition reads them there.
		st := stateAbsent
		c.path.each(payload, func(value) bool { st = stateOther; return false })
		c.state.set(slot, st)
		if st != stateAbsent {
			c.points++
		}
		return
	}
	var buf [8]uint64
	values, st := c.scan(payload, true, buf[:0])
	c.state.set(slot, st)
	if st == stateScalar {
		c.num.set(slot, values[0])
	}
	if len(values) == 0 {
		return
	}
	c.points++
	if c.facetable() {
		for _, n := range values {
			c.counts[n]++
		}
	}
}

// remove forgets slot, which held payload.
func (c *column) remove(slot uint32, payload []byte) {
	if c.kind == columnText {
		return
	}
	st := c.state.at(slot)
	c.state.set(slot, stateAbsent)
	switch {
	case st == stateAbsent:
		return
	case c.kind == columnDatetime:
		c.points--
		return
	}
	var buf [8]uint64
	values := buf[:0]
	if st == stateScalar {
		values = append(values, c.num.at(slot))
	} else {
		values, _ = c.scan(payload, false, values)
	}
	if len(values) == 0 {
		return
	}
	c.points--
	if !c.facetable() {
		return
	}
	for _, n := range values {
		if c.counts[n]--; c.counts[n] > 0 {
			continue
		}
		delete(c.counts, n)
		if c.isString() {
			delete(c.names, c.strings[n])
			c.strings[n] = ""
			c.free = append(c.free, uint32(n))
		}
	}
}

// each calls f with every distinct counted value of slot.
func (c *column) each(slot uint32, payload []byte, f func(n uint64)) {
	switch c.state.at(slot) {
	case stateScalar:
		f(c.num.at(slot))
	case stateOther:
		var buf [8]uint64
		values, _ := c.scan(payload, false, buf[:0])
		for _, n := range values {
			f(n)
		}
	}
}

// textMode says how many of the query's tokens a text must hold.
type textMode uint8

const (
	textAll textMode = iota
	textAny
	textPhrase
)

// tokenizer cuts text into tokens as a text index of the real server does.
type tokenizer struct {
	whitespace, prefix bool
	lower              bool
	minLen, maxLen     int
	phrases            bool
}

func (t *tokenizer) words(s string) []string {
	cut := func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsNumber(r) }
	if t.whitespace {
		cut = unicode.IsSpace
	}
	words := strings.FieldsFunc(s, cut)
	out := words[:0]
	for _, w := range words {
		if t.lower {
			w = strings.ToLower(w)
		}
		n := len([]rune(w))
		if n < t.minLen || n > t.maxLen {
			continue
		}
		out = append(out, w)
	}
	return out
}

// tokenCondition matches the texts of a field by token, as a text index does: all tokens
// are looked for in all of a point's texts together, a phrase in one of them.
type tokenCondition struct {
	path  jsonPath
	tok   *tokenizer
	query []string
	mode  textMode
}

// newTokenCondition returns nil for a match that is not about text.
func newTokenCondition(col *column, m *qdrant.Match) (condition, error) {
	c := tokenCondition{path: col.path, tok: col.text}
	var query string
	switch k := m.GetMatchValue().(type) {
	case *qdrant.Match_Text:
		query = k.Text
	case *qdrant.Match_TextAny:
		query, c.mode = k.TextAny, textAny
	case *qdrant.Match_Phrase:
		if !c.tok.phrases {
			return nil, invalid("Wrong input: phrase matching is not enabled in the text index of " + col.path.text)
		}
		query, c.mode = k.Phrase, textPhrase
	default:
		return nil, nil
	}
	c.query = c.tok.words(query)
	return c, nil
}

func (c tokenCondition) match(d *document) bool {
	if len(c.query) == 0 {
		return false
	}
	found := make([]bool, len(c.query))
	left := len(found)
	done := false
	text := func(v value) bool {
		if v.kind != kindString {
			return true
		}
		words := c.tok.words(string(v.raw))
		if c.mode == textPhrase {
			for i := 0; !done && i+len(c.query) <= len(words); i++ {
				done = slices.Equal(words[i:i+len(c.query)], c.query)
			}
			return !done
		}
		for i, q := range c.query {
			if found[i] || !slices.ContainsFunc(words, func(w string) bool {
				return w == q || c.tok.prefix && strings.HasPrefix(w, q)
			}) {
				continue
			}
			found[i] = true
			left--
		}
		done = left == 0 || c.mode == textAny && left < len(found)
		return !done
	}
	c.path.each(d.payload, func(v value) bool {
		if v.kind != kindList {
			return text(v)
		}
		eachItem(v.raw, func(enc []byte) bool { return text(decodeValue(enc)) })
		return !done
	})
	return done
}
