package corpus

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Metadata is a document's JSON object. Values are nil, bool, string, int64, float64, []any
// and map[string]any, as [ParseMetadata] makes them.
type Metadata map[string]any

// Limits of a document's metadata.
const (
	// MaxMetadataBytes of JSON per document: it is copied onto every chunk's point.
	MaxMetadataBytes = 64 << 10
	// MaxMetadataDepth of nesting, the outermost object included.
	MaxMetadataDepth = 16
)

// ParseMetadata decodes a JSON object into its canonical value form. Integers that fit
// int64 stay integers; other numbers become float64. It refuses what is not an object,
// too large, too deep, U+0000 (Postgres cannot hold it), invalid UTF-8 and numbers outside
// float64; the error's Pointer is relative to the metadata.
func ParseMetadata(raw []byte) (Metadata, *FieldError) {
	if len(raw) > MaxMetadataBytes {
		return nil, &FieldError{Code: "too_large", Detail: fmt.Sprintf("metadata has %d bytes; at most %d are allowed", len(raw), MaxMetadataBytes)}
	}
	return DecodeMetadata(raw)
}

// DecodeMetadata is [ParseMetadata] without the limit of size: for what was accepted before
// and is read back, because a store may print a value longer than it came in.
func DecodeMetadata(raw []byte) (Metadata, *FieldError) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		return nil, &FieldError{Code: "invalid_json", Detail: "metadata is not valid JSON"}
	}
	if v == nil {
		return Metadata{}, nil
	}
	m, ok := v.(map[string]any)
	if !ok {
		return nil, &FieldError{Code: "wrong_type", Detail: "metadata must be a JSON object"}
	}
	out, fe := canonical(m, "", 1)
	if fe != nil {
		return nil, fe
	}
	return out.(map[string]any), nil
}

func canonical(v any, at string, depth int) (any, *FieldError) {
	if depth > MaxMetadataDepth+1 {
		return nil, &FieldError{Pointer: at, Code: "too_deep", Detail: fmt.Sprintf("metadata is nested deeper than %d levels", MaxMetadataDepth)}
	}
	text := func(s, at string) *FieldError {
		if !utf8.ValidString(s) || strings.ContainsRune(s, 0) {
			return &FieldError{Pointer: at, Code: "invalid_text", Detail: "text must be valid UTF-8 without U+0000"}
		}
		return nil
	}
	switch x := v.(type) {
	case string:
		return x, text(x, at)
	case json.Number:
		if i, err := strconv.ParseInt(x.String(), 10, 64); err == nil {
			return i, nil
		}
		f, err := strconv.ParseFloat(x.String(), 64)
		if err != nil || math.IsInf(f, 0) {
			return nil, &FieldError{Pointer: at, Code: "number_out_of_range", Detail: "the number does not fit a 64-bit float"}
		}
		return f, nil
	case []any:
		for i := range x {
			c, fe := canonical(x[i], at+"/"+strconv.Itoa(i), depth+1)
			if fe != nil {
				return nil, fe
			}
			x[i] = c
		}
		return x, nil
	case map[string]any:
		for k, e := range x {
			p := at + "/" + pointerEscaper.Replace(k)
			if fe := text(k, p); fe != nil {
				return nil, fe
			}
			c, fe := canonical(e, p, depth+1)
			if fe != nil {
				return nil, fe
			}
			x[k] = c
		}
		return x, nil
	default: // nil, bool
		return v, nil
	}
}

var pointerEscaper = strings.NewReplacer("~", "~0", "/", "~1")

// JSON encodes m with sorted keys; equal metadata has equal bytes. A nil map is {}.
func (m Metadata) JSON() []byte {
	if m == nil {
		return []byte("{}")
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(map[string]any(m)); err != nil {
		// Every value came through ParseMetadata, which leaves only encodable ones.
		panic(fmt.Sprintf("corpus: metadata not encodable: %v", err))
	}
	return bytes.TrimRight(b.Bytes(), "\n")
}

// Filter is the contract's metadata filter: all of Must, at least one of Should (if any are
// given), none of MustNot. A nil filter and an empty one match everything.
type Filter struct {
	Must    []Condition `json:"must,omitempty"`
	Should  []Condition `json:"should,omitempty"`
	MustNot []Condition `json:"must_not,omitempty"`
}

// Condition tests one metadata field. Exactly one of Match, Any, Except, Text, Range and
// IsEmpty is set, or Filter for a nested group. Key is a path of object keys joined by
// dots; arrays on the way and at the end match when any element does.
type Condition struct {
	Key string `json:"key,omitempty"`
	// Match is a string, bool or integer the value must equal.
	Match any `json:"match,omitempty"`
	// Any: the value equals one of these strings or integers.
	Any []any `json:"any,omitempty"`
	// Except: some value exists that equals none of these.
	Except []any `json:"except,omitempty"`
	// Text: every word of it occurs in the value, or in a list's values together (full-text fields).
	Text string `json:"text,omitempty"`
	// Range bounds a number or an RFC 3339 time.
	Range *Range `json:"range,omitempty"`
	// IsEmpty: the field is absent, null or an empty array (true), or none of these (false).
	IsEmpty *bool `json:"is_empty,omitempty"`
	// Filter is a nested group.
	Filter *Filter `json:"filter,omitempty"`
}

// Range holds bounds, each a number (float64 or int64) or an RFC 3339 string, or nil.
type Range struct {
	GT  any `json:"gt,omitempty"`
	GTE any `json:"gte,omitempty"`
	LT  any `json:"lt,omitempty"`
	LTE any `json:"lte,omitempty"`
}

// Empty reports whether the filter constrains nothing.
func (f *Filter) Empty() bool {
	return f == nil || len(f.Must)+len(f.Should)+len(f.MustNot) == 0
}

// Matches evaluates the filter on a document's metadata, with the meaning Qdrant gives the
// translated filter. It is what decides in the join: nothing is shown that does not match.
func (f *Filter) Matches(m Metadata) bool {
	if f.Empty() {
		return true
	}
	for i := range f.Must {
		if !f.Must[i].matches(m) {
			return false
		}
	}
	for i := range f.MustNot {
		if f.MustNot[i].matches(m) {
			return false
		}
	}
	if len(f.Should) == 0 {
		return true
	}
	for i := range f.Should {
		if f.Should[i].matches(m) {
			return true
		}
	}
	return false
}

func (c *Condition) matches(m Metadata) bool {
	if c.Filter != nil {
		return c.Filter.Matches(m)
	}
	values := lookup(map[string]any(m), strings.Split(c.Key, "."), nil)
	if c.IsEmpty != nil {
		empty := true
		for _, v := range values {
			if a, ok := v.([]any); v != nil && (!ok || len(a) > 0) {
				empty = false
			}
		}
		return empty == *c.IsEmpty
	}
	if c.Text != "" {
		return containsWords(values, c.Text)
	}
	for _, v := range values {
		if a, ok := v.([]any); ok {
			for _, e := range a {
				if c.test(e) {
					return true
				}
			}
			continue
		}
		if c.test(v) {
			return true
		}
	}
	return false
}

// lookup collects the values at path; arrays on the way fan out.
func lookup(v any, path []string, out []any) []any {
	switch x := v.(type) {
	case map[string]any:
		child, ok := x[path[0]]
		if !ok {
			return out
		}
		if len(path) == 1 {
			return append(out, child)
		}
		return lookup(child, path[1:], out)
	case []any:
		for _, e := range x {
			if _, ok := e.(map[string]any); ok {
				out = lookup(e, path, out)
			}
		}
	}
	return out
}

func (c *Condition) test(v any) bool {
	switch {
	case c.Match != nil:
		return equal(v, c.Match)
	case c.Any != nil:
		for _, want := range c.Any {
			if equal(v, want) {
				return true
			}
		}
		return false
	case c.Except != nil:
		if v == nil {
			return false
		}
		for _, bad := range c.Except {
			if equal(v, bad) {
				return false
			}
		}
		return true
	case c.Range != nil:
		return c.Range.contains(v)
	}
	return false
}

func equal(v, want any) bool {
	if v == nil || want == nil {
		return false
	}
	switch w := want.(type) {
	case int64:
		switch x := v.(type) {
		case int64:
			return x == w
		case float64:
			return x == float64(w) && x == math.Trunc(x)
		}
		return false
	case float64:
		if w == math.Trunc(w) && math.Abs(w) < 1<<53 {
			return equal(v, int64(w))
		}
		x, ok := v.(float64)
		return ok && x == w
	case string:
		x, ok := v.(string)
		return ok && x == w
	case bool:
		x, ok := v.(bool)
		return ok && x == w
	}
	return false
}

func (r *Range) contains(v any) bool {
	within := func(cmp func(bound any) (int, bool)) bool {
		for _, b := range []struct {
			bound any
			ok    func(int) bool
		}{
			{r.GT, func(c int) bool { return c > 0 }},
			{r.GTE, func(c int) bool { return c >= 0 }},
			{r.LT, func(c int) bool { return c < 0 }},
			{r.LTE, func(c int) bool { return c <= 0 }},
		} {
			if b.bound == nil {
				continue
			}
			c, comparable := cmp(b.bound)
			if !comparable || !b.ok(c) {
				return false
			}
		}
		return true
	}
	switch x := v.(type) {
	case int64, float64:
		n := toFloat(x)
		return within(func(bound any) (int, bool) {
			switch bound.(type) {
			case int64, float64:
			default:
				return 0, false
			}
			b := toFloat(bound)
			switch {
			case n < b:
				return -1, true
			case n > b:
				return 1, true
			}
			return 0, true
		})
	case string:
		t, ok := ParseTime(x)
		if !ok {
			return false
		}
		return within(func(bound any) (int, bool) {
			s, isText := bound.(string)
			if !isText {
				return 0, false
			}
			b, ok := ParseTime(s)
			return t.Compare(b), ok
		})
	}
	return false
}

func toFloat(v any) float64 {
	if i, ok := v.(int64); ok {
		return float64(i)
	}
	return v.(float64)
}

// ParseTime reads an RFC 3339 time, or a date (midnight UTC).
func ParseTime(s string) (time.Time, bool) {
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02"} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, true
		}
	}
	return time.Time{}, false
}

// containsWords reports whether every word of want occurs in the values, letter case folded. A
// list's texts are one, as in the index: its words may come from several of them. Without any
// word in want nothing matches.
func containsWords(values []any, want string) bool {
	have := map[string]bool{}
	add := func(v any) {
		if s, ok := v.(string); ok {
			for _, w := range words(s) {
				have[w] = true
			}
		}
	}
	for _, v := range values {
		add(v)
		if a, ok := v.([]any); ok {
			for _, e := range a {
				add(e)
			}
		}
	}
	needed := words(want)
	for _, w := range needed {
		if !have[w] {
			return false
		}
	}
	return len(needed) > 0
}

// words cuts at everything that is neither alphabetic nor numeric, as Qdrant's word tokenizer does.
func words(s string) []string {
	return strings.FieldsFunc(strings.ToLower(s), func(r rune) bool {
		return !(unicode.IsLetter(r) || unicode.IsNumber(r) || unicode.Is(unicode.Other_Alphabetic, r))
	})
}
