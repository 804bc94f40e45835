package qdrantlocal

import (
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// maxPayloadDepth bounds the nesting of a payload value. The real server's decoder stops at
// 100 nested messages, which is 33 to 50 levels of JSON; a little more is accepted here.
const maxPayloadDepth = 64

// valueKind is the JSON type of a payload value.
type valueKind uint8

const (
	kindNull valueKind = iota
	kindBool
	kindInt
	kindFloat
	kindString
	kindList
	kindObject
)

// value is one payload value, read in place from its protobuf encoding. raw aliases the
// encoded payload: it is valid only as long as that is.
type value struct {
	kind valueKind
	// num holds a bool (0, 1), the bits of an int64 or the bits of a float64.
	num uint64
	// raw holds the bytes of a string, of an encoded ListValue or of an encoded Struct.
	raw []byte
}

func (v value) int() int64     { return int64(v.num) }
func (v value) float() float64 { return math.Float64frombits(v.num) }

// number returns the value as a float64, as range conditions compare it.
func (v value) number() (float64, bool) {
	switch v.kind {
	case kindInt:
		return float64(v.int()), true
	case kindFloat:
		return v.float(), true
	default:
		return 0, false
	}
}

// decodeValue reads one encoded qdrant.Value. Damaged input reads as null.
func decodeValue(b []byte) value {
	v := value{}
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return value{}
		}
		b = b[n:]
		switch {
		case num == 1 && typ == protowire.VarintType:
			v = value{kind: kindNull}
		case num == 2 && typ == protowire.Fixed64Type:
			x, m := protowire.ConsumeFixed64(b)
			if m < 0 {
				return value{}
			}
			v = value{kind: kindFloat, num: x}
		case num == 3 && typ == protowire.VarintType:
			x, m := protowire.ConsumeVarint(b)
			if m < 0 {
				return value{}
			}
			v = value{kind: kindInt, num: x}
		case num == 5 && typ == protowire.VarintType:
			x, m := protowire.ConsumeVarint(b)
			if m < 0 {
				return value{}
			}
			v = value{kind: kindBool, num: x & 1}
		case typ == protowire.BytesType && (num == 4 || num == 6 || num == 7):
			raw, m := protowire.ConsumeBytes(b)
			if m < 0 {
				return value{}
			}
			v = value{raw: raw, kind: kindString}
			if num == 6 {
				v.kind = kindObject
			} else if num == 7 {
				v.kind = kindList
			}
		}
		m := protowire.ConsumeFieldValue(num, typ, b)
		if m < 0 {
			return value{}
		}
		b = b[m:]
	}
	return v
}

// eachEntry calls f for every key of an encoded Struct until f returns false. enc is the
// encoded value under the key.
func eachEntry(object []byte, f func(key, enc []byte) bool) {
	for len(object) > 0 {
		num, typ, n := protowire.ConsumeTag(object)
		if n < 0 {
			return
		}
		object = object[n:]
		if num != 1 || typ != protowire.BytesType {
			m := protowire.ConsumeFieldValue(num, typ, object)
			if m < 0 {
				return
			}
			object = object[m:]
			continue
		}
		entry, m := protowire.ConsumeBytes(object)
		if m < 0 {
			return
		}
		object = object[m:]
		var key, enc []byte
		for len(entry) > 0 {
			num, typ, n := protowire.ConsumeTag(entry)
			if n < 0 {
				return
			}
			entry = entry[n:]
			m := protowire.ConsumeFieldValue(num, typ, entry)
			if m < 0 {
				return
			}
			if typ == protowire.BytesType && (num == 1 || num == 2) {
				raw, _ := protowire.ConsumeBytes(entry)
				if num == 1 {
					key = raw
				} else {
					enc = raw
				}
			}
			entry = entry[m:]
		}
		if !f(key, enc) {
			return
		}
	}
}

// eachItem calls f for every encoded value of an encoded ListValue until f returns false.
func eachItem(list []byte, f func(enc []byte) bool) {
	for len(list) > 0 {
		num, typ, n := protowire.ConsumeTag(list)
		if n < 0 {
			return
		}
		list = list[n:]
		m := protowire.ConsumeFieldValue(num, typ, list)
		if m < 0 {
			return
		}
		if num == 1 && typ == protowire.BytesType {
			enc, _ := protowire.ConsumeBytes(list)
			if !f(enc) {
				return
			}
		}
		list = list[m:]
	}
}

// listLen counts the items of an encoded ListValue.
func listLen(list []byte) int {
	n := 0
	eachItem(list, func([]byte) bool { n++; return true })
	return n
}

// lookup finds the value under key in an encoded Struct.
func lookup(object []byte, key string) (value, bool) {
	var v value
	found := false
	eachEntry(object, func(k, enc []byte) bool {
		if string(k) != key {
			return true
		}
		v, found = decodeValue(enc), true
		return false
	})
	return v, found
}

// encodePayload turns a request's payload into the stored form: an encoded Struct with
// sorted keys, nil when empty. Numbers that JSON cannot hold and too deep nesting are
// refused as the real server refuses them.
func encodePayload(m map[string]*qdrant.Value) ([]byte, error) {
	if len(m) == 0 {
		return nil, nil
	}
	for _, v := range m {
		if err := checkValue(v, 1); err != nil {
			return nil, err
		}
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(&qdrant.Struct{Fields: m})
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "payload cannot be encoded: %v", err)
	}
	return b, nil
}

func checkValue(v *qdrant.Value, depth int) error {
	if depth > maxPayloadDepth {
		return status.Errorf(codes.InvalidArgument, "payload is nested deeper than %d levels", maxPayloadDepth)
	}
	switch k := v.GetKind().(type) {
	case *qdrant.Value_DoubleValue:
		if math.IsNaN(k.DoubleValue) || math.IsInf(k.DoubleValue, 0) {
			return status.Error(codes.InvalidArgument, "cannot convert to json number")
		}
	case *qdrant.Value_StructValue:
		for _, c := range k.StructValue.GetFields() {
			if err := checkValue(c, depth+1); err != nil {
				return err
			}
		}
	case *qdrant.Value_ListValue:
		for _, c := range k.ListValue.GetValues() {
			if err := checkValue(c, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// decodePayload returns a payload as the API sends it; never nil.
func decodePayload(enc []byte) (map[string]*qdrant.Value, error) {
	if len(enc) == 0 {
		return map[string]*qdrant.Value{}, nil
	}
	var s qdrant.Struct
	if err := proto.Unmarshal(enc, &s); err != nil {
		return nil, status.Errorf(codes.Internal, "stored payload cannot be read: %v", err)
	}
	for k, v := range s.Fields {
		s.Fields[k] = plainValue(v)
	}
	return s.Fields, nil
}

// plainValue makes an absent value an explicit null, as the real server returns it.
func plainValue(v *qdrant.Value) *qdrant.Value {
	if v.GetKind() == nil {
		return qdrant.NewValueNull()
	}
	return v
}

// jsonPath addresses values inside a payload: a.b, a[0].b, a[].b, "quoted key".c.
type jsonPath struct {
	text  string
	first string
	rest  []pathItem
}

type pathItemKind uint8

const (
	itemKey pathItemKind = iota
	itemIndex
	itemWildcard
)

type pathItem struct {
	kind  pathItemKind
	key   string
	index int
}

// parsePath reads a path in Qdrant's grammar.
func parsePath(s string) (jsonPath, error) {
	bad := func() (jsonPath, error) {
		return jsonPath{}, status.Errorf(codes.InvalidArgument, "Invalid json path: '%s'", s)
	}
	p := jsonPath{text: s}
	first, rest, ok := pathKey(s)
	if !ok {
		return bad()
	}
	p.first = first
	for rest != "" {
		switch rest[0] {
		case '.':
			key, after, ok := pathKey(rest[1:])
			if !ok {
				return bad()
			}
			p.rest = append(p.rest, pathItem{kind: itemKey, key: key})
			rest = after
		case '[':
			end := strings.IndexByte(rest, ']')
			if end < 0 {
				return bad()
			}
			inner := rest[1:end]
			rest = rest[end+1:]
			if inner == "" {
				p.rest = append(p.rest, pathItem{kind: itemWildcard})
				continue
			}
			for _, c := range []byte(inner) {
				if c < '0' || c > '9' {
					return bad()
				}
			}
			i, err := strconv.Atoi(inner)
			if err != nil {
				return bad()
			}
			p.rest = append(p.rest, pathItem{kind: itemIndex, index: i})
		default:
			return bad()
		}
	}
	return p, nil
}

// pathKey reads one key, bare or quoted, from the front of s.
func pathKey(s string) (key, rest string, ok bool) {
	if strings.HasPrefix(s, `"`) {
		end := strings.IndexAny(s[1:], `\"`)
		if end < 0 || s[1+end] == '\\' {
			return "", "", false
		}
		return s[1 : 1+end], s[2+end:], true
	}
	i := 0
	for i < len(s) {
		r, n := utf8.DecodeRuneInString(s[i:])
		if r == utf8.RuneError && n <= 1 {
			return "", "", false
		}
		if r != '_' && r != '-' && !unicode.IsLetter(r) && !unicode.IsNumber(r) {
			break
		}
		i += n
	}
	if i == 0 {
		return "", "", false
	}
	return s[:i], s[i:], true
}

// each calls f for every value at the path until f returns false.
func (p *jsonPath) each(object []byte, f func(value) bool) {
	v, ok := lookup(object, p.first)
	if ok {
		eachAt(p.rest, v, f)
	}
}

func eachAt(items []pathItem, v value, f func(value) bool) bool {
	if len(items) == 0 {
		return f(v)
	}
	it := items[0]
	switch {
	case it.kind == itemKey && v.kind == kindObject:
		if c, ok := lookup(v.raw, it.key); ok {
			return eachAt(items[1:], c, f)
		}
	case it.kind == itemIndex && v.kind == kindList:
		i := 0
		more := true
		eachItem(v.raw, func(enc []byte) bool {
			if i == it.index {
				more = eachAt(items[1:], decodeValue(enc), f)
				return false
			}
			i++
			return true
		})
		return more
	case it.kind == itemWildcard && v.kind == kindList:
		more := true
		eachItem(v.raw, func(enc []byte) bool {
			more = eachAt(items[1:], decodeValue(enc), f)
			return more
		})
		return more
	}
	return true
}

// arrayKey is the path with [] appended unless it ends so already; nested filters walk it.
func (p jsonPath) arrayKey() jsonPath {
	if n := len(p.rest); n > 0 && p.rest[n-1].kind == itemWildcard {
		return p
	}
	q := p
	q.rest = append(slices.Clone(p.rest), pathItem{kind: itemWildcard})
	return q
}

// mergeInto copies src's keys into dst; a null removes the key, as the real server does.
func mergeInto(dst, src map[string]*qdrant.Value) {
	for k, v := range src {
		if isNull(v) {
			delete(dst, k)
		} else {
			dst[k] = v
		}
	}
}

func isNull(v *qdrant.Value) bool {
	switch v.GetKind().(type) {
	case nil, *qdrant.Value_NullValue:
		return true
	default:
		return false
	}
}

// setAt merges src into the objects at path, making objects on the way where there are none.
func setAt(dst map[string]*qdrant.Value, p *jsonPath, src map[string]*qdrant.Value) {
	dst[p.first] = setValue(dst[p.first], p.rest, src)
}

func setValue(v *qdrant.Value, items []pathItem, src map[string]*qdrant.Value) *qdrant.Value {
	if len(items) == 0 || items[0].kind == itemKey {
		s := v.GetStructValue()
		if s == nil {
			s = &qdrant.Struct{}
		}
		if s.Fields == nil {
			s.Fields = map[string]*qdrant.Value{}
		}
		if len(items) == 0 {
			mergeInto(s.Fields, src)
		} else {
			s.Fields[items[0].key] = setValue(s.Fields[items[0].key], items[1:], src)
		}
		return &qdrant.Value{Kind: &qdrant.Value_StructValue{StructValue: s}}
	}
	l := v.GetListValue()
	if l == nil {
		l = &qdrant.ListValue{}
	}
	if items[0].kind == itemWildcard {
		for i := range l.Values {
			l.Values[i] = setValue(l.Values[i], items[1:], src)
		}
	} else if i := items[0].index; i < len(l.Values) {
		l.Values[i] = setValue(l.Values[i], items[1:], src)
	}
	return &qdrant.Value{Kind: &qdrant.Value_ListValue{ListValue: l}}
}

// removeAt deletes what lies at path. A single item of a list is left alone, as in the real
// server: removing by position would not be idempotent.
func removeAt(m map[string]*qdrant.Value, p *jsonPath) {
	if len(p.rest) == 0 {
		delete(m, p.first)
		return
	}
	if v, ok := m[p.first]; ok {
		removeIn(v, p.rest)
	}
}

func removeIn(v *qdrant.Value, items []pathItem) {
	it, last := items[0], len(items) == 1
	switch it.kind {
	case itemKey:
		s := v.GetStructValue()
		if s == nil {
			return
		}
		if last {
			delete(s.Fields, it.key)
		} else if c, ok := s.Fields[it.key]; ok {
			removeIn(c, items[1:])
		}
	case itemIndex:
		l := v.GetListValue()
		if l == nil || it.index >= len(l.Values) {
			return
		}
		if !last {
			removeIn(l.Values[it.index], items[1:])
		}
	case itemWildcard:
		l := v.GetListValue()
		if l == nil {
			return
		}
		if last {
			l.Values = nil
			return
		}
		for _, c := range l.Values {
			removeIn(c, items[1:])
		}
	}
}
