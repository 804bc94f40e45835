package model

import (
	"fmt"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// encoder writes one graph over the arrays of one weights file. Its methods append operators
// to the graph and return the names of values.
type encoder struct {
	*onnxGraph
	root    *onnxGraph // where weights and constants of the whole graph are declared
	d       *description
	weights map[string]stored
	used    map[string]bool
}

func newEncoder(name string, d *description, weights map[string]stored) *encoder {
	g := &onnxGraph{name: name}
	return &encoder{onnxGraph: g, root: g, d: d, weights: weights, used: map[string]bool{}}
}

// branch returns an encoder that writes a branch of an If. It sees every value of the
// graph around it.
func (e *encoder) branch(name string) *encoder {
	b := *e
	b.onnxGraph = &onnxGraph{name: e.prefix + name, prefix: e.fresh(name) + "_"}
	return &b
}

// weight names an array of the weights file, declaring it on first use.
func (e *encoder) weight(name string) string {
	s, ok := e.weights[name]
	if !ok {
		panic("model: graph refers to an array that was not written: " + name)
	}
	if !e.used[name] {
		e.used[name] = true
		e.root.external(s)
	}
	return name
}

// has reports whether the weights file has an array of that name.
func (e *encoder) has(name string) bool {
	_, ok := e.weights[name]
	return ok
}

// skipNorm adds input, skip and bias and normalises the sum.
func (e *encoder) skipNorm(input, skip, norm, bias string) string {
	in := []string{input, skip, e.weight(norm + ".gamma"), e.weight(norm + ".beta")}
	if bias != "" {
		in = append(in, e.weight(bias))
	}
	return e.ms("SkipLayerNormalization", in, attr{"epsilon", float32(e.d.cfg.LayerNormEps)})
}

// linear multiplies by a weight matrix, without a bias.
func (e *encoder) linear(x, weight string) string {
	return e.node("MatMul", []string{x, e.weight(weight)})
}

// feedForward is the second half of a layer.
func (e *encoder) feedForward(x, layer string) string {
	y := e.linear(x, layer+"up")
	y = e.ms("BiasGelu", []string{y, e.weight(layer + "up.bias")})
	y = e.linear(y, layer+"down")
	return e.skipNorm(y, x, layer+"output", layer+"down.bias")
}

// afterAttention is a layer's output projection and feed-forward half; x is the layer's
// input and a the attention's result, for the same tokens.
func (e *encoder) afterAttention(a, x, layer string) string {
	a = e.linear(a, layer+"mix")
	return e.feedForward(e.skipNorm(a, x, layer+"attention", layer+"mix.bias"), layer)
}

// choose writes an If. Each branch returns the values that become outs.
func (e *encoder) choose(cond string, outs []string, then, otherwise func(b *encoder) []string) {
	branches := make([]*onnxGraph, 2)
	for i, write := range []func(*encoder) []string{then, otherwise} {
		b := e.branch([]string{"then", "else"}[i])
		for _, v := range write(b) {
			// A branch's output must be a value of its own, which a captured one is not.
			b.outputs = append(b.outputs, valueInfo(b.node("Identity", []string{v}), 0, nil))
		}
		branches[i] = b.onnxGraph
	}
	e.add("", "If", []string{cond}, outs, attr{"then_branch", branches[0]}, attr{"else_branch", branches[1]})
}

// asked is a boolean: whether the caller wants any of the heads.
func (e *encoder) asked(h corpus.Heads) string {
	bits := e.node("BitwiseAnd", []string{InputHeads, e.int32s([]int{1}, int32(h))})
	return e.node("Cast", []string{bits}, attr{"to", onnxBool})
}

// none is an output of the given rank without elements, for a head that was not asked for.
func (e *encoder) none(rank int) string {
	return e.node("ConstantOfShape", []string{e.ints(make([]int, rank)...)})
}

// normalise divides the last axis by its Euclidean length, at least 1e-12 as torch does. It
// takes float32.
func (e *encoder) normalise(v string) string {
	length := e.node("ReduceL2", []string{v, e.ints(-1)}, attr{"keepdims", 1})
	return e.node("Div", []string{v, e.node("Max", []string{length, e.scalar(1e-12)})})
}

// name gives a value the name of an output and declares it.
func (e *encoder) name(v, out string, dims ...any) {
	e.add("", "Identity", []string{v}, []string{out})
	e.output(out, onnxFloat, dims...)
}

// layerName is the prefix of a layer's arrays.
func layerName(i int) string { return fmt.Sprintf("layer%d.", i) }
