package model

// paddedGraph writes the form for CPU: rows of equal length, attention under a key mask.
func paddedGraph(d *description, weights map[string]stored) (*onnxGraph, Graph) {
	e := newEncoder(Padded, d, weights)
	entry := Graph{Device: DeviceCPU, Form: Padded, Inputs: []string{InputIDs, InputMask}}
	e.input(InputIDs, onnxInt32, "batch", "sequence")
	e.input(InputMask, onnxInt32, "batch", "sequence")

	// Whether no row has padding, and the mask as float32.
	full := e.node("Cast", []string{e.node("ReduceMin", []string{InputMask}, attr{"keepdims", 0})}, attr{"to", onnxBool})
	mask := e.node("Cast", []string{InputMask}, attr{"to", onnxFloat})
	layer := func(e *encoder, q, x, name string) string { return e.maskedLayer(q, x, name, full) }

	x := e.embedRows()
	for i := range d.cfg.NumHiddenLayers - 1 {
		x = layer(e, x, x, layerName(i))
	}
	f := rowsForm(mask)
	f.layer = func(e *encoder, x, name string) string { return layer(e, x, x, name) }
	f.first = func(e *encoder, x, name string) string {
		first := e.node("Gather", []string{x, e.int32s([]int{1}, 0)}, attr{"axis", 1})
		return e.node("Squeeze", []string{layer(e, first, x, name), e.ints(1)})
	}
	e.finish(x, f, &entry)
	return e.onnxGraph, entry
}

// rowsForm is what the padded forms have in common; mask [B,S] is float32.
func rowsForm(mask string) form {
	return form{
		firstOf: func(e *encoder, x string) string {
			return e.node("Gather", []string{x, e.int32s(nil, 0)}, attr{"axis", 1})
		},
		pool: func(e *encoder, x string) string { return e.pool(x, mask) },
		sparse: func(e *encoder, x string) string {
			return e.node("Mul", []string{e.sparseWeights(x), mask})
		},
		colbert: func(e *encoder, x string) string {
			from, to, axis := e.ints(1), e.ints(maxSlice), e.ints(1)
			x = e.node("Slice", []string{x, from, to, axis})
			keep := e.node("Unsqueeze", []string{e.node("Slice", []string{mask, from, to, axis}), e.ints(2)})
			unit, _ := e.normalise(e.node("Mul", []string{e.colbertVectors(x), keep}))
			return unit
		},
		sparseDims:  []any{"sparse_batch", "sparse_sequence"},
		colbertDims: []any{"colbert_batch", "colbert_sequence", "colbert_dim"},
	}
}

// maxSlice is an end beyond every axis: to the end.
const maxSlice = 1<<31 - 1

// embedRows looks up words and positions. Positions follow the rules of each architecture in
// transformers: BERT counts columns; XLM-RoBERTa counts tokens that are not padding.
func (e *encoder) embedRows() string {
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
	return e.skipNorm(e.words(InputIDs), positions, "embed", "")
}

// maskedLayer is one transformer layer over x for the tokens of q, which are x or some of it.
func (e *encoder) maskedLayer(q, x, layer, full string) string {
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
