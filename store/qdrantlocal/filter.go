package qdrantlocal

import (
	"math"
	"strings"
	"time"

	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxFilterDepth bounds nested filters; the real server's decoder stops near 50 levels.
const maxFilterDepth = 48

// document is what a filter looks at: a stored point, or an object inside its payload.
type document struct {
	// col is nil inside a nested filter, where only payload conditions can hold.
	col     *collection
	slot    uint32
	payload []byte
}

// condition is one compiled node of a filter.
type condition interface {
	match(d *document) bool
}

// filter is a compiled qdrant.Filter. A nil *filter matches everything. It is immutable and
// may be shared by goroutines that hold the collection's read lock.
type filter struct {
	should, must, mustNot []condition
	minShould             []condition
	minCount              int
	// conditions counts the leaves; keys lists the fields used, for strict mode.
	conditions int
	largest    int
	keys       []string
}

func (f *filter) match(d *document) bool {
	if f == nil {
		return true
	}
	for _, c := range f.must {
		if !c.match(d) {
			return false
		}
	}
	for _, c := range f.mustNot {
		if c.match(d) {
			return false
		}
	}
	if len(f.should) > 0 && !anyMatch(f.should, d) {
		return false
	}
	if f.minCount > 0 {
		n := 0
		for _, c := range f.minShould {
			if c.match(d) {
				if n++; n == f.minCount {
					break
				}
			}
		}
		return n == f.minCount
	}
	return true
}

func anyMatch(cs []condition, d *document) bool {
	for _, c := range cs {
		if c.match(d) {
			return true
		}
	}
	return false
}

// ids returns the ids that alone can match, if a has_id among the must conditions says so.
func (f *filter) ids() (map[pointID]struct{}, bool) {
	if f == nil {
		return nil, false
	}
	var best map[pointID]struct{}
	found := false
	for _, c := range f.must {
		var ids map[pointID]struct{}
		ok := false
		switch c := c.(type) {
		case idCondition:
			ids, ok = c, true
		case *filter:
			ids, ok = c.ids()
		}
		if ok && (!found || len(ids) < len(best)) {
			best, found = ids, true
		}
	}
	return best, found
}

// and merges two filters; either may be nil.
func and(a, b *filter) *filter {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	}
	return &filter{
		must:       []condition{a, b},
		conditions: a.conditions + b.conditions,
		largest:    max(a.largest, b.largest),
		keys:       append(append([]string(nil), a.keys...), b.keys...),
	}
}

// compiler turns the API's filters into filters bound to a collection's field indexes.
type compiler struct {
	col        *collection
	nested     bool
	conditions int
	largest    int
	keys       []string
	prefix     string
}

// compileFilter validates and compiles. The caller holds the collection's read lock or its
// writer lock. A nil filter compiles to nil.
func compileFilter(c *collection, f *qdrant.Filter) (*filter, error) {
	if f == nil {
		return nil, nil
	}
	cm := &compiler{col: c}
	out, err := cm.filter(f, 1)
	if err != nil {
		return nil, err
	}
	out.conditions, out.largest, out.keys = cm.conditions, cm.largest, cm.keys
	return out, nil
}

func (cm *compiler) filter(f *qdrant.Filter, depth int) (*filter, error) {
	if depth > maxFilterDepth {
		return nil, status.Errorf(codes.InvalidArgument, "filter is nested deeper than %d levels", maxFilterDepth)
	}
	out := &filter{}
	var err error
	if out.should, err = cm.conds(f.GetShould(), depth); err != nil {
		return nil, err
	}
	if out.must, err = cm.conds(f.GetMust(), depth); err != nil {
		return nil, err
	}
	if out.mustNot, err = cm.conds(f.GetMustNot(), depth); err != nil {
		return nil, err
	}
	if ms := f.GetMinShould(); ms != nil {
		if ms.GetMinCount() < 1 {
			return nil, invalid("Validation error in body: [min_should.min_count: min_count must be greater than 0]")
		}
		if out.minShould, err = cm.conds(ms.GetConditions(), depth); err != nil {
			return nil, err
		}
		out.minCount = int(min(ms.GetMinCount(), math.MaxInt32))
	}
	return out, nil
}

func (cm *compiler) conds(in []*qdrant.Condition, depth int) ([]condition, error) {
	if len(in) == 0 {
		return nil, nil
	}
	out := make([]condition, 0, len(in))
	for _, c := range in {
		cc, err := cm.cond(c, depth)
		if err != nil {
			return nil, err
		}
		out = append(out, cc)
	}
	return out, nil
}

func (cm *compiler) path(key string) (jsonPath, error) {
	p, err := parsePath(key)
	if err == nil {
		cm.keys = append(cm.keys, cm.prefix+key)
	}
	return p, err
}

func (cm *compiler) cond(c *qdrant.Condition, depth int) (condition, error) {
	cm.conditions++
	switch k := c.GetConditionOneOf().(type) {
	case *qdrant.Condition_Field:
		return cm.field(k.Field)
	case *qdrant.Condition_IsEmpty:
		p, err := cm.path(k.IsEmpty.GetKey())
		return emptyCondition{p}, err
	case *qdrant.Condition_IsNull:
		p, err := cm.path(k.IsNull.GetKey())
		return nullCondition{p}, err
	case *qdrant.Condition_HasId:
		ids := make(idCondition, len(k.HasId.GetHasId()))
		for _, id := range k.HasId.GetHasId() {
			pid, err := parseID(id)
			if err != nil {
				return nil, err
			}
			ids[pid] = struct{}{}
		}
		cm.largest = max(cm.largest, len(ids))
		return ids, nil
	case *qdrant.Condition_HasVector:
		if cm.nested {
			return never{}, nil
		}
		vc := cm.col.vector(k.HasVector.GetHasVector())
		if vc == nil {
			return never{}, nil
		}
		return vectorCondition{vc}, nil
	case *qdrant.Condition_Filter:
		return cm.filter(k.Filter, depth+1)
	case *qdrant.Condition_Nested:
		if k.Nested.GetFilter() == nil {
			return nil, invalid("Nested condition has no filter")
		}
		p, err := parsePath(k.Nested.GetKey())
		if err != nil {
			return nil, err
		}
		p = p.arrayKey()
		inner := *cm
		inner.nested = true
		inner.prefix = cm.prefix + strings.TrimSuffix(k.Nested.GetKey(), "[]") + "[]."
		f, err := inner.filter(k.Nested.GetFilter(), depth+1)
		cm.conditions, cm.largest, cm.keys = inner.conditions, inner.largest, inner.keys
		return nestedCondition{p, f}, err
	default:
		return nil, invalid("Malformed Condition type")
	}
}

// field compiles a condition on one payload field. Several tests in one condition are
// alternatives, except that values_count, is_empty and is_null win over the rest: that is
// how the real server reads it.
func (cm *compiler) field(fc *qdrant.FieldCondition) (condition, error) {
	if fc.GetGeoBoundingBox() != nil || fc.GetGeoRadius() != nil || fc.GetGeoPolygon() != nil {
		return nil, unimplemented("geo conditions")
	}
	p, err := cm.path(fc.GetKey())
	if err != nil {
		return nil, err
	}
	out := &fieldCondition{path: p}
	if vc := fc.GetValuesCount(); vc != nil {
		out.count = vc
	}
	out.isEmpty, out.isNull = fc.IsEmpty, fc.IsNull
	if r := fc.GetRange(); r != nil {
		out.tests = append(out.tests, rangeTest{r.Lt, r.Gt, r.Lte, r.Gte})
	}
	if r := fc.GetDatetimeRange(); r != nil {
		t := timeTest{}
		for _, b := range []struct {
			dst *timeBound
			ts  interface {
				IsValid() bool
				AsTime() time.Time
			}
			set bool
		}{
			{&t.lt, r.GetLt(), r.Lt != nil}, {&t.gt, r.GetGt(), r.Gt != nil},
			{&t.lte, r.GetLte(), r.Lte != nil}, {&t.gte, r.GetGte(), r.Gte != nil},
		} {
			if !b.set {
				continue
			}
			if !b.ts.IsValid() {
				return nil, invalid("Validation error in body: [datetime_range: timestamp out of range]")
			}
			*b.dst = timeBound{set: true, at: b.ts.AsTime().UnixMicro()}
		}
		out.tests = append(out.tests, t)
	}
	var col *column
	if !cm.nested {
		col = cm.col.columns[fc.GetKey()]
	}
	if m := fc.GetMatch(); m != nil {
		if col != nil && col.kind == columnText {
			if c, err := newTokenCondition(col, m); c != nil || err != nil {
				return c, err
			}
		}
		t, err := cm.matchTest(m)
		if err != nil {
			return nil, err
		}
		out.tests = append(out.tests, t)
	}
	if out.count == nil && out.isEmpty == nil && out.isNull == nil && len(out.tests) == 0 {
		return nil, invalid("Validation error in body: [match: At least one field condition must be specified]")
	}
	if col != nil && col.kind != columnText {
		out.col = col
	}
	return out, nil
}

func (cm *compiler) matchTest(m *qdrant.Match) (valueTest, error) {
	strs := func(in []string) map[string]struct{} {
		cm.largest = max(cm.largest, len(in))
		s := make(map[string]struct{}, len(in))
		for _, v := range in {
			s[v] = struct{}{}
		}
		return s
	}
	ints := func(in []int64) map[int64]struct{} {
		cm.largest = max(cm.largest, len(in))
		s := make(map[int64]struct{}, len(in))
		for _, v := range in {
			s[v] = struct{}{}
		}
		return s
	}
	text := func(query string, mode textMode) valueTest {
		if mode == textAny {
			return substringAnyTest(strings.Fields(query))
		}
		return substringTest(query)
	}
	switch k := m.GetMatchValue().(type) {
	case *qdrant.Match_Keyword:
		return keywordTest(k.Keyword), nil
	case *qdrant.Match_Integer:
		return intTest(k.Integer), nil
	case *qdrant.Match_Boolean:
		return boolTest(k.Boolean), nil
	case *qdrant.Match_Keywords:
		return anyStringTest(strs(k.Keywords.GetStrings())), nil
	case *qdrant.Match_Integers:
		return anyIntTest(ints(k.Integers.GetIntegers())), nil
	case *qdrant.Match_ExceptKeywords:
		return exceptStringTest(strs(k.ExceptKeywords.GetStrings())), nil
	case *qdrant.Match_ExceptIntegers:
		return exceptIntTest(ints(k.ExceptIntegers.GetIntegers())), nil
	case *qdrant.Match_Text:
		return text(k.Text, textAll), nil
	case *qdrant.Match_TextAny:
		return text(k.TextAny, textAny), nil
	case *qdrant.Match_Phrase:
		return text(k.Phrase, textPhrase), nil
	default:
		return nil, invalid("Malformed Match condition")
	}
}

type never struct{}

func (never) match(*document) bool { return false }

type idCondition map[pointID]struct{}

func (c idCondition) match(d *document) bool {
	if d.col == nil {
		return false
	}
	_, ok := c[d.col.slotIDs.at(d.slot)]
	return ok
}

type vectorCondition struct{ vec *vectorColumn }

func (c vectorCondition) match(d *document) bool {
	return d.col != nil && c.vec.has(d.slot)
}

// emptyCondition holds when every value at the path is null or an empty list, or there is none.
type emptyCondition struct{ path jsonPath }

func (c emptyCondition) match(d *document) bool {
	empty := true
	c.path.each(d.payload, func(v value) bool {
		empty = v.kind == kindNull || v.kind == kindList && listLen(v.raw) == 0
		return empty
	})
	return empty
}

// nullCondition holds when some value at the path is null or a list with a null in it. An
// absent field is not null.
type nullCondition struct{ path jsonPath }

func (c nullCondition) match(d *document) bool {
	null := false
	c.path.each(d.payload, func(v value) bool {
		null = v.isNull()
		return !null
	})
	return null
}

func (v value) isNull() bool {
	null := v.kind == kindNull
	if v.kind == kindList {
		eachItem(v.raw, func(enc []byte) bool {
			null = decodeValue(enc).kind == kindNull
			return !null
		})
	}
	return null
}

type nestedCondition struct {
	path   jsonPath
	filter *filter
}

func (c nestedCondition) match(d *document) bool {
	found := false
	c.path.each(d.payload, func(v value) bool {
		if v.kind == kindObject {
			found = c.filter.match(&document{payload: v.raw})
		}
		return !found
	})
	return found
}

// valueTest decides about one value that is not a list, or about a list inside a list.
type valueTest interface {
	test(v value) bool
}

type fieldCondition struct {
	path    jsonPath
	col     *column
	count   *qdrant.ValuesCount
	isEmpty *bool
	isNull  *bool
	tests   []valueTest
}

func (c *fieldCondition) match(d *document) bool {
	if c.col != nil && !c.col.dropped && d.col != nil {
		switch v, state := c.col.get(d.slot); state {
		case stateAbsent:
			return c.matchAbsent()
		case stateScalar:
			return c.matchValue(v)
		}
	}
	found, ok := false, false
	c.path.each(d.payload, func(v value) bool {
		found = true
		ok = c.matchValue(v)
		return !ok
	})
	if !found {
		return c.matchAbsent()
	}
	return ok
}

// matchAbsent decides about a point without the field.
func (c *fieldCondition) matchAbsent() bool {
	switch {
	case c.count != nil:
		return inCount(c.count, 0)
	case c.isEmpty != nil:
		return *c.isEmpty
	case c.isNull != nil:
		return !*c.isNull
	default:
		return false
	}
}

func (c *fieldCondition) matchValue(v value) bool {
	switch {
	case c.count != nil:
		n := 1
		switch v.kind {
		case kindNull:
			n = 0
		case kindList:
			n = listLen(v.raw)
		}
		return inCount(c.count, n)
	case c.isEmpty != nil:
		empty := v.kind == kindNull || v.kind == kindList && listLen(v.raw) == 0
		return empty == *c.isEmpty
	case c.isNull != nil:
		return v.isNull() == *c.isNull
	}
	if v.kind != kindList {
		return c.test(v)
	}
	ok := false
	eachItem(v.raw, func(enc []byte) bool {
		ok = c.test(decodeValue(enc))
		return !ok
	})
	return ok
}

func (c *fieldCondition) test(v value) bool {
	for _, t := range c.tests {
		if t.test(v) {
			return true
		}
	}
	return false
}

func inCount(c *qdrant.ValuesCount, n int) bool {
	x := uint64(n)
	return (c.Lt == nil || x < *c.Lt) && (c.Gt == nil || x > *c.Gt) &&
		(c.Lte == nil || x <= *c.Lte) && (c.Gte == nil || x >= *c.Gte)
}

type keywordTest string

func (t keywordTest) test(v value) bool { return v.kind == kindString && string(v.raw) == string(t) }

type intTest int64

func (t intTest) test(v value) bool { return v.kind == kindInt && v.int() == int64(t) }

type boolTest bool

func (t boolTest) test(v value) bool { return v.kind == kindBool && (v.num != 0) == bool(t) }

type anyStringTest map[string]struct{}

func (t anyStringTest) test(v value) bool {
	if v.kind != kindString {
		return false
	}
	_, ok := t[string(v.raw)]
	return ok
}

type anyIntTest map[int64]struct{}

func (t anyIntTest) test(v value) bool {
	if v.kind != kindInt {
		return false
	}
	_, ok := t[v.int()]
	return ok
}

// exceptStringTest holds for every value but null and the listed strings.
type exceptStringTest map[string]struct{}

func (t exceptStringTest) test(v value) bool {
	switch v.kind {
	case kindNull:
		return false
	case kindString:
		_, listed := t[string(v.raw)]
		return !listed
	default:
		return true
	}
}

// exceptIntTest holds for every value but null and the listed integers.
type exceptIntTest map[int64]struct{}

func (t exceptIntTest) test(v value) bool {
	switch v.kind {
	case kindNull:
		return false
	case kindInt:
		_, listed := t[v.int()]
		return !listed
	default:
		return true
	}
}

// substringTest is what a text match means on a field without a text index.
type substringTest string

func (t substringTest) test(v value) bool {
	return v.kind == kindString && strings.Contains(string(v.raw), string(t))
}

type substringAnyTest []string

func (t substringAnyTest) test(v value) bool {
	if v.kind != kindString {
		return false
	}
	s := string(v.raw)
	for _, w := range t {
		if strings.Contains(s, w) {
			return true
		}
	}
	return false
}

// rangeTest compares numbers as float64, as the real server does: bounds and integers
// beyond 2^53 lose precision.
type rangeTest struct{ lt, gt, lte, gte *float64 }

func (t rangeTest) test(v value) bool {
	x, ok := v.number()
	return ok &&
		(t.lt == nil || floatLess(x, *t.lt)) && (t.gt == nil || floatLess(*t.gt, x)) &&
		(t.lte == nil || !floatLess(*t.lte, x)) && (t.gte == nil || !floatLess(x, *t.gte))
}

// floatLess orders NaN above every number.
func floatLess(a, b float64) bool {
	if math.IsNaN(a) {
		return false
	}
	return math.IsNaN(b) || a < b
}

type timeBound struct {
	set bool
	// at is in microseconds since 1970, the resolution of the real server.
	at int64
}

type timeTest struct{ lt, gt, lte, gte timeBound }

func (t timeTest) test(v value) bool {
	if v.kind != kindString {
		return false
	}
	at, ok := parseTime(string(v.raw))
	return ok &&
		(!t.lt.set || at < t.lt.at) && (!t.gt.set || at > t.gt.at) &&
		(!t.lte.set || at <= t.lte.at) && (!t.gte.set || at >= t.gte.at)
}

// timeLayouts are the spellings of a date the real server accepts. Go accepts a fraction
// after the seconds of any of them.
var timeLayouts = []string{
	time.RFC3339,
	"2006-01-02 15:04:05Z07:00",
	"2006-01-02T15:04:05Z0700",
	"2006-01-02 15:04:05Z0700",
	"2006-01-02T15:04:05Z07",
	"2006-01-02 15:04:05Z07",
	"2006-01-02T15:04:05",
	"2006-01-02 15:04:05",
	"2006-01-02T15:04",
	"2006-01-02 15:04",
	"2006-01-02",
}

// parseTime reads a date; without a zone it is UTC. The result is in microseconds.
func parseTime(s string) (int64, bool) {
	if len(s) < 8 || len(s) > 64 {
		return 0, false
	}
	for _, l := range timeLayouts {
		if t, err := time.Parse(l, s); err == nil {
			return t.UnixMicro(), true
		}
	}
	return 0, false
}

func invalid(msg string) error { return status.Error(codes.InvalidArgument, msg) }

func invalidf(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

// unimplemented answers for what the real server can do and this one cannot.
func unimplemented(what string) error {
	return status.Errorf(codes.Unimplemented, "%s: not implemented by the embedded server; use a Qdrant server", what)
}
