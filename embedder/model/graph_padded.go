package model

import "github.com/lockstep-db/lockstep/internal/corpus"

// paddedGraph writes the form for CPU: rows of equal length, attention under a key mask.
func paddedGraph(d *description, weights map[string]stored) (*onnxGraph, Graph) {
	e := newEncoder(Padded, d, weights)
	entry := Graph{Device: DeviceCPU, Form: Padded, Inputs: []string{InputIDs, InputMask}, Outputs: []string{OutputDense}}
	e.input(InputIDs, onnxInt32, "batch", "sequence")
	e.input(InputMask, onnxInt32, "batch", "sequence")

	full := e.fullRows()
	x := e.embedRows()
	last := d.cfg.NumHiddenLayers - 1
	for i := range last {
		x = e.rowsLayer(x, x, layerName(i), full)
	}
	switch {
	case d.m3:
		e.input(InputHeads, onnxInt32, 1)
		entry.Inputs = append(entry.Inputs, InputHeads)
		entry.Outputs = append(entry.Outputs, OutputSparse, OutputColBERT)
		outs := []string{e.fresh("dense"), e.fresh("sparse"), e.fresh("colbert")}
		e.choose(e.asked(corpus.SparseHead|corpus.ColBERT), outs, func(b *encoder) []string {
			y := b.rowsLayer(x, x, layerName(last), full)
			first := b.node("Gather", []string{y, b.int32s(nil, 0)}, attr{"axis", 1})
			sparse, colbert := b.fresh("sparse"), b.fresh("colbert")
			b.choose(b.asked(corpus.SparseHead), []string{sparse},
				func(b *encoder) []string { return []string{b.sparseRows(y)} },
				func(b *encoder) []string { return []string{b.none(2)} })
			b.choose(b.asked(corpus.ColBERT), []string{colbert},
				func(b *encoder) []string { return []string{b.colbertRows(y)} },
				func(b *encoder) []string { return []string{b.none(3)} })
			return []string{b.normalise(first), sparse, colbert}
		}, func(b *encoder) []string {
			return []string{b.normalise(b.firstOfRows(x, layerName(last), full)), b.none(2), b.none(3)}
		})
		e.name(outs[0], OutputDense, "batch", d.cfg.HiddenSize)
		e.name(outs[1], OutputSparse, "sparse_batch", "sparse_sequence")
		e.name(outs[2], OutputColBERT, "colbert_batch", "colbert_sequence", "colbert_dim")
	case d.pooling == poolCLS:
		e.name(e.normalise(e.firstOfRows(x, layerName(last), full)), OutputDense, "batch", d.cfg.HiddenSize)
	default:
		x = e.rowsLayer(x, x, layerName(last), full)
		e.name(e.normalise(e.poolRows(x)), OutputDense, "batch", d.cfg.HiddenSize)
	}
	return e.onnxGraph, entry
}

// fullRows is a boolean: whether no row has padding.
func (e *encoder) fullRows() string {
	least := e.node("ReduceMin", []string{InputMask}, attr{"keepdims", 0})
	return e.node("Cast", []string{least}, attr{"to", onnxBool})
}

// floatMask is the mask as float32.
func (e *encoder) floatMask() string {
	return e.node("Cast", []string{InputMask}, attr{"to", onnxFloat})
}

// embedRows looks up words and positions. Positions follow the rules of each architecture in
// transformers: BERT counts columns; XLM-RoBERTa counts tokens that are not padding.
func (e *encoder) embedRows() string {
	words := e.node("Gather", []string{e.weight("words"), InputIDs}, attr{"axis", 0})
	var positions string
	if e.d.arch == archXLMR {
		pad := e.int32s([]int{1}, int32(e.d.padID))
		isToken := e.node("Cast", []string{e.node("Not", []string{e.node("Equal", []string{InputIDs, pad})})}, attr{"to", onnxInt32})
		count := e.node("CumSum", []string{isToken, e.int32s(nil, 1)})
		ids := e.node("Add", []string{e.node("Mul", []string{count, isToken}), pad})
		positions = e.node("Gather", []string{e.weight("positions"), ids}, attr{"axis", 0})
	} else {
		length := e.node("Shape", []string{InputIDs}, attr{"start", 1}, attr{"end", 2})
		rows := e.node("Slice", []string{e.weight("positions"), e.ints(0), length, e.ints(0)})
		positions = e.node("Unsqueeze", []string{rows, e.ints(0)})
	}
	return e.skipNorm(words, positions, "embed", "")
}

// rowsLayer is one transformer layer over x for the tokens of q, which are x or some of it.
func (e *encoder) rowsLayer(q, x, layer, full string) string {
	qkv := []string{e.linear(q, layer+"query"), e.linear(x, layer+"key"), e.linear(x, layer+"value"), e.weight(layer + "qkv.bias")}
	heads := attr{"num_heads", e.d.cfg.NumAttentionHeads}
	// Without a mask the runtime has a kernel whose memory does not grow with the square of the
	// length; one long text alone always takes it.
	out := e.fresh("attention")
	e.choose(full, []string{out},
		func(b *encoder) []string { return []string{b.ms("MultiHeadAttention", qkv, heads)} },
		func(b *encoder) []string { return []string{b.ms("MultiHeadAttention", append(qkv, InputMask), heads)} })
	return e.afterAttention(out, q, layer)
}

// firstOfRows computes the last layer for the first token of each row alone.
func (e *encoder) firstOfRows(x, layer, full string) string {
	first := e.node("Gather", []string{x, e.int32s([]int{1}, 0)}, attr{"axis", 1})
	return e.node("Squeeze", []string{e.rowsLayer(first, x, layer, full), e.ints(1)})
}

// poolRows pools over the tokens of each row, as sentence-transformers does.
func (e *encoder) poolRows(x string) string {
	mask := e.floatMask()
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

// sparseRows is the weight of every token, [B,S].
func (e *encoder) sparseRows(x string) string {
	v := e.node("Add", []string{e.node("MatMul", []string{x, e.weight("heads.sparse")}), e.weight("heads.sparse.bias")})
	v = e.node("Squeeze", []string{e.node("Relu", []string{v}), e.ints(-1)})
	return e.node("Mul", []string{v, e.floatMask()})
}

// colbertRows is the vector of every token but the first, [B,S-1,C].
func (e *encoder) colbertRows(x string) string {
	from, to, axis := e.ints(1), e.ints(maxSlice), e.ints(1)
	x = e.node("Slice", []string{x, from, to, axis})
	mask := e.node("Unsqueeze", []string{e.node("Slice", []string{e.floatMask(), from, to, axis}), e.ints(2)})
	v := e.node("Add", []string{e.node("MatMul", []string{x, e.weight("heads.colbert")}), e.weight("heads.colbert.bias")})
	return e.normalise(e.node("Mul", []string{v, mask}))
}

// maxSlice is an end beyond every axis: to the end.
const maxSlice = 1<<31 - 1
