package httpapi

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Limits of a filter. They bound the work that one query asks of the index and of the join.
const (
	maxFilterDepth      = 8
	maxFilterConditions = 256
	maxFilterValues     = 1000
)

type filterJSON struct {
	Must    []conditionJSON `json:"must"`
	Should  []conditionJSON `json:"should"`
	MustNot []conditionJSON `json:"must_not"`
}

type conditionJSON struct {
	Key     *string          `json:"key"`
	Match   jsontext.Value   `json:"match"`
	Any     []jsontext.Value `json:"any"`
	Except  []jsontext.Value `json:"except"`
	Text    *string          `json:"text"`
	Range   *rangeJSON       `json:"range"`
	IsEmpty *bool            `json:"is_empty"`
	Filter  *filterJSON      `json:"filter"`
}

type rangeJSON struct {
	GT  jsontext.Value `json:"gt"`
	GTE jsontext.Value `json:"gte"`
	LT  jsontext.Value `json:"lt"`
	LTE jsontext.Value `json:"lte"`
}

// filterReader converts and collects faults, so that a caller sees all of them at once.
type filterReader struct {
	bad        []corpus.FieldError
	conditions int
}

func (r *filterReader) fault(at, code, format string, args ...any) {
	if len(r.bad) < maxFieldErrors {
		r.bad = append(r.bad, corpus.FieldError{Pointer: at, Code: code, Detail: fmt.Sprintf(format, args...)})
	}
}

func (in *filterJSON) filter(at string) (*corpus.Filter, []corpus.FieldError) {
	if in == nil {
		return nil, nil
	}
	var r filterReader
	f := r.group(in, at, 1)
	if r.conditions > maxFilterConditions {
		r.fault(at, "too_many", "the filter has %d conditions; at most %d are allowed", r.conditions, maxFilterConditions)
	}
	if f.Empty() {
		f = nil
	}
	return f, r.bad
}

func (r *filterReader) group(in *filterJSON, at string, depth int) *corpus.Filter {
	if depth > maxFilterDepth {
		r.fault(at, "too_deep", "filters nest at most %d deep", maxFilterDepth)
		return nil
	}
	return &corpus.Filter{
		Must:    r.list(in.Must, at+"/must", depth),
		Should:  r.list(in.Should, at+"/should", depth),
		MustNot: r.list(in.MustNot, at+"/must_not", depth),
	}
}

func (r *filterReader) list(in []conditionJSON, at string, depth int) []corpus.Condition {
	r.conditions += len(in)
	if r.conditions > maxFilterConditions {
		return nil // reported once, with the total
	}
	var out []corpus.Condition
	for i := range in {
		out = append(out, r.condition(&in[i], at+"/"+strconv.Itoa(i), depth))
	}
	return out
}

func (r *filterReader) condition(in *conditionJSON, at string, depth int) corpus.Condition {
	var out corpus.Condition
	tests := 0
	set := func(present bool) bool {
		if present {
			tests++
		}
		return present
	}
	if set(in.Match != nil) {
		out.Match = r.value(in.Match, at+"/match")
	}
	if set(in.Any != nil) {
		out.Any = r.values(in.Any, at+"/any")
	}
	if set(in.Except != nil) {
		out.Except = r.values(in.Except, at+"/except")
	}
	if set(in.Text != nil) {
		out.Text = *in.Text
		if strings.TrimSpace(out.Text) == "" {
			r.fault(at+"/text", "empty_text", "give at least one word")
		}
	}
	if set(in.Range != nil) {
		out.Range = r.bounds(in.Range, at+"/range")
	}
	if set(in.IsEmpty != nil) {
		out.IsEmpty = in.IsEmpty
	}
	if set(in.Filter != nil) {
		out.Filter = r.group(in.Filter, at+"/filter", depth+1)
	}
	if tests != 1 {
		r.fault(at, "one_test", "a condition has exactly one of match, any, except, text, range, is_empty and filter; this has %d", tests)
	}
	switch {
	case in.Filter != nil && in.Key != nil:
		r.fault(at+"/key", "not_applicable", "a nested filter has no key of its own")
	case in.Filter == nil && in.Key == nil:
		r.fault(at+"/key", "required", "name the metadata field")
	case in.Key != nil:
		out.Key = *in.Key
		if detail := fieldPathFault(out.Key); detail != "" {
			r.fault(at+"/key", "invalid_name", "%s", detail)
		}
	}
	return out
}

func (r *filterReader) values(in []jsontext.Value, at string) []any {
	switch {
	case len(in) == 0:
		r.fault(at, "empty_input", "give at least one value")
		return nil
	case len(in) > maxFilterValues:
		r.fault(at, "too_many", "at most %d values are allowed", maxFilterValues)
		return nil
	}
	out := make([]any, len(in))
	for i := range in {
		p := at + "/" + strconv.Itoa(i)
		out[i] = r.value(in[i], p)
		if _, ok := out[i].(bool); ok {
			r.fault(p, "wrong_type", "the values of a list are strings or integers")
		}
	}
	return out
}

// value reads a string, boolean or integer. A float is refused: equality of floats is not
// what anybody means, and the index has no such test.
func (r *filterReader) value(raw jsontext.Value, at string) any {
	switch raw.Kind() {
	case jsontext.KindTrue:
		return true
	case jsontext.KindFalse:
		return false
	case jsontext.KindString:
		s, err := jsontext.AppendUnquote(nil, raw)
		if err == nil {
			return string(s)
		}
	case jsontext.KindNumber:
		if i, err := strconv.ParseInt(string(raw), 10, 64); err == nil {
			return i
		}
		if f, err := strconv.ParseFloat(string(raw), 64); err == nil && f == float64(int64(f)) && f > -1<<53 && f < 1<<53 {
			return int64(f)
		}
		r.fault(at, "wrong_type", "numbers are matched as 64-bit integers; use range for others")
		return nil
	}
	r.fault(at, "wrong_type", "%s is not accepted here; a string, an integer or a boolean is needed", kindName(raw.Kind()))
	return nil
}

func (r *filterReader) bounds(in *rangeJSON, at string) *corpus.Range {
	out := &corpus.Range{}
	numbers, times := 0, 0
	for _, b := range []struct {
		name string
		raw  jsontext.Value
		to   *any
	}{{"gt", in.GT, &out.GT}, {"gte", in.GTE, &out.GTE}, {"lt", in.LT, &out.LT}, {"lte", in.LTE, &out.LTE}} {
		if b.raw == nil || b.raw.Kind() == jsontext.KindNull {
			continue
		}
		p := at + "/" + b.name
		switch b.raw.Kind() {
		case jsontext.KindNumber:
			numbers++
			if i, err := strconv.ParseInt(string(b.raw), 10, 64); err == nil {
				*b.to = i
			} else if f, err := strconv.ParseFloat(string(b.raw), 64); err == nil {
				*b.to = f
			} else {
				r.fault(p, "number_out_of_range", "the number does not fit a 64-bit float")
			}
		case jsontext.KindString:
			times++
			s, err := jsontext.AppendUnquote(nil, b.raw)
			if _, ok := corpus.ParseTime(string(s)); err != nil || !ok {
				r.fault(p, "invalid_time", "a bound is a number or an RFC 3339 time")
			}
			*b.to = string(s)
		default:
			r.fault(p, "wrong_type", "a bound is a number or an RFC 3339 time")
		}
	}
	switch {
	case numbers+times == 0 && len(r.bad) == 0:
		r.fault(at, "empty_input", "give at least one of gt, gte, lt and lte")
	case numbers > 0 && times > 0:
		r.fault(at, "wrong_type", "the bounds are all numbers or all times")
	case in.GT != nil && in.GTE != nil, in.LT != nil && in.LTE != nil:
		r.fault(at, "one_test", "give gt or gte, and lt or lte, not both of a kind")
	}
	return out
}
