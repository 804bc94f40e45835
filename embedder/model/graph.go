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
	if s, ok := e.weights[weight]; ok && s.elem == onnxUint8 {
		return e.ms("MatMulNBits", []string{x, e.weight(weight), e.weight(weight + ".scales")},
			attr{"K", s.inner}, attr{"N", s.dims[0]}, attr{"bits", 8}, attr{"block_size", blockSize},
			attr{"accuracy_level", 4}) // 4: activations in int8, quantised block by block
	}
	return e.node("MatMul", []string{x, e.weight(weight)})
}

// feedForward is the second half of a layer.
func (e *encoder) feedForward(x, layer string) string {
	y := e.linear(x, layer+"up")
	y = e.ms("BiasGelu", []string{y, e.weight(layer + "up.bias")})
	y = e.linear(y, layer+"down")
	return e.skipNorm(y, x, layer+"output", layer+"down.bias")
}

// words looks up the word vectors of token ids, in the precision that layers compute in.
func (e *encoder) words(ids string) string {
	v := e.node("Gather", []string{e.weight("words"), ids}, attr{"axis", 0})
	if e.weights["words"].elem != e.weights["positions"].elem {
		v = e.node("Cast", []string{v}, attr{"to", e.weights["positions"].elem})
	}
	return v
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

// float32 casts a value that layers computed; it is one already where they compute in it.
func (e *encoder) float32(v string) string {
	if e.weights["positions"].elem == onnxFloat {
		return v
	}
	return e.node("Cast", []string{v}, attr{"to", onnxFloat})
}

// normalise divides the last axis by its Euclidean length, at least 1e-12 as torch does, in
// float32. length is what it was.
func (e *encoder) normalise(v string) (unit, length string) {
	v = e.float32(v)
	length = e.node("ReduceL2", []string{v, e.ints(-1)}, attr{"keepdims", 1})
	return e.node("Div", []string{v, e.node("Max", []string{length, e.scalar(1e-12)})}), length
}

// pool pools [B,S,H] over the tokens that mask [B,S], float32, keeps, as
// sentence-transformers does.
func (e *encoder) pool(x, mask string) string {
	x = e.float32(x)
	if e.d.pooling == poolMax {
		keep := e.node("Cast", []string{e.node("Unsqueeze", []string{mask, e.ints(2)})}, attr{"to", onnxBool})
		low := e.node("Where", []string{keep, x, e.scalar(-1e9)})
		return e.node("ReduceMax", []string{low, e.ints(1)}, attr{"keepdims", 0})
	}
	// A row of the mask times its tokens is their sum: one small matrix product.
	row := e.node("Unsqueeze", []string{mask, e.ints(1)})
	sum := e.node("Squeeze", []string{e.node("MatMul", []string{row, x}), e.ints(1)})
	count := e.node("Max", []string{e.node("ReduceSum", []string{mask, e.ints(1)}, attr{"keepdims", 1}), e.scalar(1e-9)})
	if e.d.pooling == poolSqrtLen {
		count = e.node("Sqrt", []string{count})
	}
	return e.node("Div", []string{sum, count})
}

// sparseWeights is the sparse head: a weight for every token of x [...,H].
func (e *encoder) sparseWeights(x string) string {
	v := e.node("Add", []string{e.linear(x, "heads.sparse"), e.weight("heads.sparse.bias")})
	return e.float32(e.node("Squeeze", []string{e.node("Relu", []string{v}), e.ints(-1)}))
}

// colbertVectors is the ColBERT head before normalisation: a vector for every token.
func (e *encoder) colbertVectors(x string) string {
	return e.float32(e.node("Add", []string{e.linear(x, "heads.colbert"), e.weight("heads.colbert.bias")}))
}

// form is what differs between the forms of a graph, for [encoder.finish].
type form struct {
	// layer is the whole last layer of x; first the same for first tokens alone, [B,H].
	layer func(e *encoder, x, name string) string
	first func(e *encoder, x, name string) string
	// firstOf picks first tokens, [B,H], from the last layer; pool pools all tokens.
	firstOf func(e *encoder, x string) string
	pool    func(e *encoder, x string) string
	sparse  func(e *encoder, x string) string
	colbert func(e *encoder, x string) string
	// Dimensions of the outputs sparse and colbert.
	sparseDims, colbertDims []any
}

// finish writes the last layer and the heads over x, the layers before it. Where only first
// tokens are asked for, the last layer is computed for them alone.
func (e *encoder) finish(x string, f form, entry *Graph) {
	last := layerName(e.d.cfg.NumHiddenLayers - 1)
	entry.Outputs = []string{OutputDense, OutputDenseNorm}
	dense := func(unit, length string) {
		e.name(unit, OutputDense, "batch", e.d.cfg.HiddenSize)
		e.name(length, OutputDenseNorm, "batch", 1)
	}
	if !e.d.m3 {
		if e.d.pooling == poolCLS {
			dense(e.normalise(f.first(e, x, last)))
		} else {
			dense(e.normalise(f.pool(e, f.layer(e, x, last))))
		}
		return
	}
	e.input(InputHeads, onnxInt32, 1)
	entry.Inputs = append(entry.Inputs, InputHeads)
	entry.Outputs = append(entry.Outputs, OutputSparse, OutputColBERT)
	outs := []string{e.fresh("dense"), e.fresh("dense_norm"), e.fresh("sparse"), e.fresh("colbert")}
	e.choose(e.asked(corpus.SparseHead|corpus.ColBERT), outs, func(b *encoder) []string {
		y := f.layer(b, x, last)
		sparse, colbert := b.fresh("sparse"), b.fresh("colbert")
		b.choose(b.asked(corpus.SparseHead), []string{sparse},
			func(b *encoder) []string { return []string{f.sparse(b, y)} },
			func(b *encoder) []string { return []string{b.none(len(f.sparseDims))} })
		b.choose(b.asked(corpus.ColBERT), []string{colbert},
			func(b *encoder) []string { return []string{f.colbert(b, y)} },
			func(b *encoder) []string { return []string{b.none(len(f.colbertDims))} })
		unit, length := b.normalise(f.firstOf(b, y))
		return []string{unit, length, sparse, colbert}
	}, func(b *encoder) []string {
		unit, length := b.normalise(f.first(b, x, last))
		return []string{unit, length, b.none(len(f.sparseDims)), b.none(len(f.colbertDims))}
	})
	dense(outs[0], outs[1])
	e.name(outs[2], OutputSparse, f.sparseDims...)
	e.name(outs[3], OutputColBERT, f.colbertDims...)
}

// name gives a value the name of an output and declares it.
func (e *encoder) name(v, out string, dims ...any) {
	e.add("", "Identity", []string{v}, []string{out})
	e.output(out, onnxFloat, dims...)
}

// layerName is the prefix of a layer's arrays.
func layerName(i int) string { return fmt.Sprintf("layer%d.", i) }
