package model

import (
	"math"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
)

// The numbers ONNX gives to element types.
const (
	onnxFloat = 1
	onnxUint8 = 2
	onnxInt32 = 6
	onnxInt64 = 7
	onnxBool  = 9
	onnxHalf  = 10
)

// msDomain is the domain of ONNX Runtime's own operators.
const msDomain = "com.microsoft"

// opsetVersion and irVersion are the ONNX levels the graphs are written at: BitwiseAnd came
// with opset 18.
const (
	opsetVersion = 18
	irVersion    = 9
)

// onnxGraph collects the parts of a graph, and writes them as ONNX's protobuf messages. It
// is our own writer of the few messages needed: output is deterministic, and big weights are
// references into the external file, never in memory.
type onnxGraph struct {
	name         string
	nodes        [][]byte
	initializers [][]byte
	inputs       [][]byte
	outputs      [][]byte
	counter      int
	prefix       string // of generated names; subgraphs differ so that names stay unique
}

// fresh returns a new unique value name.
func (g *onnxGraph) fresh(hint string) string {
	g.counter++
	return g.prefix + hint + "_" + strconv.Itoa(g.counter)
}

// attr is one attribute of a node.
type attr struct {
	name  string
	value any // int, float32, []int, *onnxGraph
}

// node adds an operator of ONNX's own domain with one output and returns the output's name.
func (g *onnxGraph) node(op string, inputs []string, attrs ...attr) string {
	out := g.fresh(op)
	g.add("", op, inputs, []string{out}, attrs...)
	return out
}

// ms adds an operator of ONNX Runtime with one output and returns the output's name.
func (g *onnxGraph) ms(op string, inputs []string, attrs ...attr) string {
	out := g.fresh(op)
	g.add(msDomain, op, inputs, []string{out}, attrs...)
	return out
}

// add adds an operator. An empty input name is an input left out.
func (g *onnxGraph) add(domain, op string, inputs, outputs []string, attrs ...attr) {
	var b []byte
	for _, in := range inputs {
		b = appendString(b, 1, in)
	}
	for _, out := range outputs {
		b = appendString(b, 2, out)
	}
	b = appendString(b, 3, outputs[0])
	b = appendString(b, 4, op)
	for _, a := range attrs {
		b = appendMessage(b, 5, a.encode())
	}
	if domain != "" {
		b = appendString(b, 7, domain)
	}
	g.nodes = append(g.nodes, b)
}

func (a attr) encode() []byte {
	b := appendString(nil, 1, a.name)
	var kind uint64
	switch v := a.value.(type) {
	case float32:
		b = protowire.AppendTag(b, 2, protowire.Fixed32Type)
		b = protowire.AppendFixed32(b, math.Float32bits(v))
		kind = 1
	case int:
		b = appendVarint(b, 3, uint64(v))
		kind = 2
	case *onnxGraph:
		b = appendMessage(b, 6, v.encode())
		kind = 5
	case []int:
		for _, n := range v {
			b = appendVarint(b, 8, uint64(n))
		}
		kind = 7
	default:
		panic("model: attribute of an unknown type")
	}
	return appendVarint(b, 20, kind)
}

// constant adds a small initialiser that lives inside the graph file.
func (g *onnxGraph) constant(hint string, elem int, dims []int, raw []byte) string {
	name := g.fresh(hint)
	b := tensorHead(name, elem, dims)
	b = appendMessage(b, 9, raw)
	g.initializers = append(g.initializers, b)
	return name
}

// ints adds a one-dimensional int64 constant, the type that shapes and axes have.
func (g *onnxGraph) ints(values ...int) string {
	var raw []byte
	for _, v := range values {
		raw = protowire.AppendFixed64(raw, uint64(int64(v)))
	}
	return g.constant("ints", onnxInt64, []int{len(values)}, raw)
}

// int32s adds an int32 constant of the given shape.
func (g *onnxGraph) int32s(dims []int, values ...int32) string {
	var raw []byte
	for _, v := range values {
		raw = protowire.AppendFixed32(raw, uint32(v))
	}
	return g.constant("int32s", onnxInt32, dims, raw)
}

// scalar adds a float32 constant of shape [1].
func (g *onnxGraph) scalar(v float32) string {
	return g.constant("scalar", onnxFloat, []int{1}, appendFloat32s(nil, []float32{v}))
}

// external adds an initialiser whose bytes lie in the weights file.
func (g *onnxGraph) external(w stored) {
	b := tensorHead(w.name, w.elem, w.dims)
	for _, kv := range [][2]string{
		{"location", w.file},
		{"offset", strconv.FormatInt(w.offset, 10)},
		{"length", strconv.FormatInt(w.length, 10)},
	} {
		b = appendMessage(b, 13, appendString(appendString(nil, 1, kv[0]), 2, kv[1]))
	}
	b = appendVarint(b, 14, 1)
	g.initializers = append(g.initializers, b)
}

func tensorHead(name string, elem int, dims []int) []byte {
	var b []byte
	for _, d := range dims {
		b = appendVarint(b, 1, uint64(d))
	}
	b = appendVarint(b, 2, uint64(elem))
	return appendString(b, 8, name)
}

// input and output declare the graph's ends; a dimension is an int or a name.
func (g *onnxGraph) input(name string, elem int, dims ...any) {
	g.inputs = append(g.inputs, valueInfo(name, elem, dims))
}

func (g *onnxGraph) output(name string, elem int, dims ...any) {
	g.outputs = append(g.outputs, valueInfo(name, elem, dims))
}

// valueInfo declares a value; elem 0 leaves its type to be inferred, as a branch's output may.
func valueInfo(name string, elem int, dims []any) []byte {
	if elem == 0 {
		return appendString(nil, 1, name)
	}
	var shape []byte
	for _, d := range dims {
		var dim []byte
		switch v := d.(type) {
		case int:
			dim = appendVarint(nil, 1, uint64(v))
		case string:
			dim = appendString(nil, 2, v)
		}
		shape = appendMessage(shape, 1, dim)
	}
	tensorType := appendMessage(appendVarint(nil, 1, uint64(elem)), 2, shape)
	return appendMessage(appendString(nil, 1, name), 2, appendMessage(nil, 1, tensorType))
}

// encode writes a GraphProto.
func (g *onnxGraph) encode() []byte {
	var b []byte
	for _, n := range g.nodes {
		b = appendMessage(b, 1, n)
	}
	b = appendString(b, 2, g.name)
	for _, t := range g.initializers {
		b = appendMessage(b, 5, t)
	}
	for _, v := range g.inputs {
		b = appendMessage(b, 11, v)
	}
	for _, v := range g.outputs {
		b = appendMessage(b, 12, v)
	}
	return b
}

// encodeModel writes a ModelProto around the graph.
func (g *onnxGraph) encodeModel() []byte {
	b := appendVarint(nil, 1, irVersion)
	b = appendString(b, 2, "lockstep")
	b = appendMessage(b, 7, g.encode())
	for _, o := range []struct {
		domain  string
		version uint64
	}{{"", opsetVersion}, {msDomain, 1}} {
		b = appendMessage(b, 8, appendVarint(appendString(nil, 1, o.domain), 2, o.version))
	}
	return b
}

func appendString(b []byte, field protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, field, protowire.BytesType), s)
}

func appendMessage(b []byte, field protowire.Number, m []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), m)
}

func appendVarint(b []byte, field protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), v)
}
