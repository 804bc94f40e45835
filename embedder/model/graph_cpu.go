package model

import "fmt"

// encoder writes graphs over the arrays of one weights file.
type encoder struct {
	*onnxGraph
	d       *description
	weights map[string]stored
	used    map[string]bool
}

// weight names an array of the weights file, declaring it on first use.
func (e *encoder) weight(name string) string {
	s, ok := e.weights[name]
	if !ok {
		panic("model: graph refers to an array that was not written: " + name)
	}
	if !e.used[name] {
		e.used[name] = true
		e.external(s)
	}
	return name
}

func (e *encoder) eps() attr {
	return attr{"epsilon", float32(e.d.cfg.LayerNormEps)}
}

// skipNorm adds input, skip and bias and normalises the sum.
func (e *encoder) skipNorm(input, skip, norm, bias string) string {
	in := []string{input, skip, e.weight(norm + ".gamma"), e.weight(norm + ".beta")}
	if bias != "" {
		in = append(in, e.weight(bias))
	}
	return e.ms("SkipLayerNormalization", in, e.eps())
}

// paddedGraph writes the form for CPU: attention under a key mask.
func paddedGraph(d *description, weights map[string]stored) (*onnxGraph, Graph) {
	e := &encoder{onnxGraph: &onnxGraph{name: "padded"}, d: d, weights: weights, used: map[string]bool{}}
	e.input(InputIDs, onnxInt32, "batch", "sequence")
	e.input(InputMask, onnxInt32, "batch", "sequence")

	x := e.embed()
	for i := range d.cfg.NumHiddenLayers {
		x = e.layer(x, fmt.Sprintf("layer%d.", i))
	}
	e.pool(x)
	return e.onnxGraph, Graph{Device: DeviceCPU, Form: Padded,
		Inputs: []string{InputIDs, InputMask}, Outputs: []string{OutputDense}}
}

// embed looks up words and positions. Positions follow the rules of each architecture in
// transformers: BERT counts columns; XLM-RoBERTa counts tokens that are not padding.
func (e *encoder) embed() string {
	words := e.node("Gather", []string{e.weight("words"), InputIDs}, attr{"axis", 0})
	var positions string
	if e.d.arch == archXLMR {
		pad := e.int32s([]int{1}, int32(e.d.padID))
		real := e.node("Cast", []string{e.node("Not", []string{e.node("Equal", []string{InputIDs, pad})})}, attr{"to", onnxInt32})
		count := e.node("CumSum", []string{real, e.constant("axis", onnxInt32, nil, []byte{1, 0, 0, 0})})
		ids := e.node("Add", []string{e.node("Mul", []string{count, real}), pad})
		positions = e.node("Gather", []string{e.weight("positions"), ids}, attr{"axis", 0})
	} else {
		shape := e.node("Shape", []string{InputIDs}, attr{"start", 1}, attr{"end", 2})
		rows := e.node("Slice", []string{e.weight("positions"), e.ints(0), shape, e.ints(0)})
		positions = e.node("Unsqueeze", []string{rows, e.ints(0)})
	}
	return e.skipNorm(words, positions, "embed", "")
}

// layer is one transformer layer.
func (e *encoder) layer(x, name string) string {
	qkv := make([]string, 3)
	for i, part := range []string{"query", "key", "value"} {
		qkv[i] = e.node("MatMul", []string{x, e.weight(name + part)})
	}
	heads := attr{"num_heads", e.d.cfg.NumAttentionHeads}
	a := e.ms("MultiHeadAttention", []string{qkv[0], qkv[1], qkv[2], e.weight(name + "qkv.bias"), InputMask}, heads)
	a = e.node("MatMul", []string{a, e.weight(name + "mix")})
	x = e.skipNorm(a, x, name+"attention", name+"mix.bias")
	y := e.node("MatMul", []string{x, e.weight(name + "up")})
	y = e.ms("BiasGelu", []string{y, e.weight(name + "up.bias")})
	y = e.node("MatMul", []string{y, e.weight(name + "down")})
	return e.skipNorm(y, x, name+"output", name+"down.bias")
}

// pool makes the dense output from the last layer, as sentence-transformers does.
func (e *encoder) pool(x string) {
	var v string
	if e.d.pooling == poolCLS {
		v = e.node("Gather", []string{x, e.int32s(nil, 0)}, attr{"axis", 1})
	} else {
		mask := e.node("Cast", []string{InputMask}, attr{"to", onnxFloat})
		v = e.poolTokens(x, mask)
	}
	e.normalise(v, OutputDense)
	e.output(OutputDense, onnxFloat, "batch", e.d.cfg.HiddenSize)
}

// poolTokens pools over all tokens that the mask keeps.
func (e *encoder) poolTokens(x, mask string) string {
	if e.d.pooling == poolMax {
		keep := e.node("Cast", []string{e.node("Unsqueeze", []string{mask, e.ints(2)})}, attr{"to", onnxBool})
		low := e.node("Where", []string{keep, x, e.scalar(-1e9)})
		return e.node("ReduceMax", []string{low, e.ints(1)}, attr{"keepdims", 0})
	}
	// A row of mask times the tokens is their sum: one small matrix product.
	row := e.node("Unsqueeze", []string{mask, e.ints(1)})
	sum := e.node("Squeeze", []string{e.node("MatMul", []string{row, x}), e.ints(1)})
	count := e.node("Max", []string{e.node("ReduceSum", []string{mask, e.ints(1)}, attr{"keepdims", 1}), e.scalar(1e-9)})
	if e.d.pooling == poolSqrtLen {
		count = e.node("Sqrt", []string{count})
	}
	return e.node("Div", []string{sum, count})
}

// normalise divides the last axis by its Euclidean length, at least 1e-12 as torch does.
func (e *encoder) normalise(v, out string) {
	length := e.node("ReduceL2", []string{v, e.ints(-1)}, attr{"keepdims", 1})
	e.add("", "Div", []string{v, e.node("Max", []string{length, e.scalar(1e-12)})}, []string{out})
}
