package qdrant

import (
	"math"
	"strings"

	qc "github.com/qdrant/go-client/qdrant"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// maxKeyParts bounds a filter's path. Each part but the last may hold an object or a list of
// objects, which Qdrant addresses by different paths: 2^(parts-1) of them.
const maxKeyParts = 4

// paths returns the payload paths under which the values of a metadata key can lie: for a.b,
// m.a.b and, where a holds a list, m.a[].b.
func paths(key string) ([]string, error) {
	parts := strings.Split(key, ".")
	if len(parts) > maxKeyParts {
		return nil, corpus.Errorf(corpus.Invalid, "filter_key", "the key %q has %d parts; filters reach %d levels deep", key, len(parts), maxKeyParts)
	}
	out := []string{corpus.KeyMetadata}
	for i, p := range parts {
		q, ok := quoted(p)
		if !ok {
			return nil, corpus.Errorf(corpus.Invalid, "filter_key", `the key %q cannot be filtered on: the index has no way to write a quotation mark or a backslash`, key)
		}
		var next []string
		for _, base := range out {
			next = append(next, base+"."+q)
			if i < len(parts)-1 {
				next = append(next, base+"."+q+"[]")
			}
		}
		out = next
	}
	return out, nil
}

// quoted writes one key as a part of a path; plain words need no quotes.
func quoted(part string) (string, bool) {
	if strings.ContainsAny(part, `"\`) {
		return "", false
	}
	for _, r := range part {
		if !(r == '_' || r == '-' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z') {
			return `"` + part + `"`, true
		}
	}
	if part == "" {
		return `""`, true
	}
	return part, true
}

// translate turns the contract's filter into Qdrant's, with the meaning of
// [corpus.Filter.Matches], and adds the points to leave out. nil means no filter. One
// difference remains: of a declared field, a server's index knows only values of the declared
// type, so that others (a fraction in an integer field) are found by nobody.
func translate(f *corpus.Filter, fields map[string]corpus.FieldType, exclude []corpus.ID) (*qc.Filter, error) {
	var out *qc.Filter
	if !f.Empty() {
		t := translator{fields}
		var err error
		if out, err = t.filter(f); err != nil {
			return nil, err
		}
	}
	if len(exclude) > 0 {
		if out == nil {
			out = &qc.Filter{}
		}
		out.MustNot = append(out.MustNot, qc.NewHasID(pointIDs(exclude)...))
	}
	return out, nil
}

type translator struct{ fields map[string]corpus.FieldType }

func (t translator) filter(f *corpus.Filter) (*qc.Filter, error) {
	out := &qc.Filter{}
	for _, g := range []struct {
		in  []corpus.Condition
		out *[]*qc.Condition
	}{{f.Must, &out.Must}, {f.Should, &out.Should}, {f.MustNot, &out.MustNot}} {
		for i := range g.in {
			c, err := t.condition(&g.in[i])
			if err != nil {
				return nil, err
			}
			*g.out = append(*g.out, c)
		}
	}
	return out, nil
}

func (t translator) condition(c *corpus.Condition) (*qc.Condition, error) {
	if c.Filter != nil {
		f, err := t.filter(c.Filter)
		if err != nil {
			return nil, err
		}
		return qc.NewFilterAsCondition(f), nil
	}
	variants, err := paths(c.Key)
	if err != nil {
		return nil, err
	}
	if c.IsEmpty != nil {
		// Empty means empty wherever the values may lie.
		all := make([]*qc.Condition, len(variants))
		for i, p := range variants {
			all[i] = qc.NewIsEmpty(p)
		}
		return negated(must(all), !*c.IsEmpty), nil
	}
	tests, err := t.tests(c)
	if err != nil {
		return nil, err
	}
	var some []*qc.Condition
	for _, p := range variants {
		for _, test := range tests {
			some = append(some, test(p))
		}
	}
	if len(some) == 1 {
		return some[0], nil
	}
	return qc.NewFilterAsCondition(&qc.Filter{Should: some}), nil
}

func must(all []*qc.Condition) *qc.Condition {
	if len(all) == 1 {
		return all[0]
	}
	return qc.NewFilterAsCondition(&qc.Filter{Must: all})
}

func negated(c *qc.Condition, not bool) *qc.Condition {
	if !not {
		return c
	}
	return qc.NewFilterAsCondition(&qc.Filter{MustNot: []*qc.Condition{c}})
}

type test func(path string) *qc.Condition

// tests returns conditions of which one must hold for a value at a path.
func (t translator) tests(c *corpus.Condition) ([]test, error) {
	refuse := func(format string, args ...any) ([]test, error) {
		args = append([]any{c.Key}, args...)
		return nil, corpus.Errorf(corpus.Invalid, "filter_condition", "the condition on %q "+format, args...)
	}
	switch {
	case c.Match != nil:
		return oneOf([]any{c.Match}, refuse)
	case c.Any != nil:
		return oneOf(c.Any, refuse)
	case c.Except != nil:
		words, numbers, others := sorted(c.Except)
		switch {
		case len(others) > 0 || len(words) > 0 && len(numbers) > 0:
			return refuse("excepts values of several types; use strings or integers, not both")
		case len(numbers) > 0:
			return []test{func(p string) *qc.Condition { return qc.NewMatchExceptInts(p, numbers...) }}, nil
		}
		return []test{func(p string) *qc.Condition { return qc.NewMatchExceptKeywords(p, words...) }}, nil
	case c.Text != "":
		if t.fields[c.Key] != corpus.FullText {
			return refuse("searches text in a field that is not declared as text")
		}
		return []test{func(p string) *qc.Condition { return qc.NewMatchText(p, c.Text) }}, nil
	case c.Range != nil:
		return bounds(c.Range, refuse)
	}
	return refuse("tests nothing")
}

// oneOf tests for equality with any of the values.
func oneOf(values []any, refuse func(string, ...any) ([]test, error)) ([]test, error) {
	words, numbers, others := sorted(values)
	var out []test
	switch {
	case len(words) == 1:
		out = append(out, func(p string) *qc.Condition { return qc.NewMatchKeyword(p, words[0]) })
	case len(words) > 1:
		out = append(out, func(p string) *qc.Condition { return qc.NewMatchKeywords(p, words...) })
	}
	switch {
	case len(numbers) == 1:
		out = append(out, func(p string) *qc.Condition { return qc.NewMatchInt(p, numbers[0]) })
	case len(numbers) > 1:
		out = append(out, func(p string) *qc.Condition { return qc.NewMatchInts(p, numbers...) })
	}
	for _, v := range others {
		switch x := v.(type) {
		case bool:
			out = append(out, func(p string) *qc.Condition { return qc.NewMatchBool(p, x) })
		case float64:
			out = append(out, func(p string) *qc.Condition { return qc.NewRange(p, &qc.Range{Gte: &x, Lte: &x}) })
		default:
			return refuse("compares with something that is no string, number or boolean")
		}
	}
	if len(out) == 0 { // an empty list: nothing is one of none
		out = append(out, func(string) *qc.Condition { return qc.NewHasID() })
	}
	return out, nil
}

// sorted separates strings, whole numbers and the rest.
func sorted(values []any) (words []string, numbers []int64, others []any) {
	for _, v := range values {
		switch x := v.(type) {
		case string:
			words = append(words, x)
		case int64:
			numbers = append(numbers, x)
		case float64:
			if x == math.Trunc(x) && math.Abs(x) < 1<<63 {
				numbers = append(numbers, int64(x))
			} else {
				others = append(others, x)
			}
		default:
			others = append(others, v)
		}
	}
	return words, numbers, others
}

func bounds(r *corpus.Range, refuse func(string, ...any) ([]test, error)) ([]test, error) {
	var (
		numbers qc.Range
		times   qc.DatetimeRange
		n, t    int
	)
	for _, b := range []struct {
		v      any
		number **float64
		time   **timestamppb.Timestamp
	}{{r.GT, &numbers.Gt, &times.Gt}, {r.GTE, &numbers.Gte, &times.Gte}, {r.LT, &numbers.Lt, &times.Lt}, {r.LTE, &numbers.Lte, &times.Lte}} {
		switch x := b.v.(type) {
		case nil:
		case int64:
			*b.number = qc.PtrOf(float64(x))
			n++
		case float64:
			*b.number = qc.PtrOf(x)
			n++
		case string:
			at, ok := corpus.ParseTime(x)
			if !ok {
				return refuse("has a bound that is neither a number nor a time such as 2026-01-31T12:00:00Z")
			}
			*b.time = timestamppb.New(at)
			t++
		default:
			return refuse("has a bound that is neither a number nor a time")
		}
	}
	switch {
	case n > 0 && t > 0:
		return refuse("has bounds of which some are numbers and some are times")
	case n > 0:
		return []test{func(p string) *qc.Condition { return qc.NewRange(p, &numbers) }}, nil
	case t > 0:
		return []test{func(p string) *qc.Condition { return qc.NewDatetimeRange(p, &times) }}, nil
	}
	return refuse("has a range without bounds")
}
