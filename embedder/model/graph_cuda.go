package model

// packedGraph writes the form for CUDA without padding: the tokens of all texts in one row,
// attention by its packed operator.
func packedGraph(d *description, weights map[string]stored) (*onnxGraph, Graph) {
	e := newEncoder(Packed, d, weights)
	entry := Graph{Device: DeviceCUDA, Form: Packed, Inputs: []string{InputIDs, InputPositions, InputTokenOffset, InputCumulative}}
	e.input(InputIDs, onnxInt32, "tokens")
	e.input(InputPositions, onnxInt32, "tokens")
	e.input(InputTokenOffset, onnxInt32, "batch", "sequence")
	e.input(InputCumulative, onnxInt32, "batch_plus_one")

	starts := e.node("Slice", []string{InputCumulative, e.ints(0), e.ints(-1), e.ints(0)})
	positions := e.node("Gather", []string{e.weight("positions"), InputPositions}, attr{"axis", 0})
	x := e.skipNorm(e.words(InputIDs), positions, "embed", "")

	attend := func(e *encoder, x, name string) string {
		qkv := e.projections(x, name)
		return e.ms("PackedMultiHeadAttention", append(qkv, "", InputTokenOffset, InputCumulative),
			attr{"num_heads", e.d.cfg.NumAttentionHeads})
	}
	layer := func(e *encoder, x, name string) string { return e.afterAttention(attend(e, x, name), x, name) }
	firstOf := func(e *encoder, x string) string { return e.node("Gather", []string{x, starts}, attr{"axis", 0}) }
	for i := range d.cfg.NumHiddenLayers - 1 {
		x = layer(e, x, layerName(i))
	}
	e.finish(x, form{
		layer: layer,
		first: func(e *encoder, x, name string) string {
			return e.afterAttention(firstOf(e, attend(e, x, name)), firstOf(e, x), name)
		},
		firstOf: firstOf,
		pool: func(e *encoder, x string) string {
			ends := e.node("Slice", []string{InputCumulative, e.ints(1), e.ints(maxSlice), e.ints(0)})
			mask := e.lengthsMask(InputTokenOffset, e.node("Sub", []string{ends, starts}))
			return e.pool(e.ms("RestorePadding", []string{x, InputTokenOffset}), mask)
		},
		sparse: (*encoder).sparseWeights,
		colbert: func(e *encoder, x string) string {
			unit, _ := e.normalise(e.colbertVectors(x))
			return unit
		},
		sparseDims:  []any{"sparse_tokens"},
		colbertDims: []any{"colbert_tokens", "colbert_dim"},
	}, &entry)
	return e.onnxGraph, entry
}

// lengthsGraph writes the form for CUDA with rows of equal length and padding on the right.
// Its plain attention has faster kernels than the packed one for long texts.
func lengthsGraph(d *description, weights map[string]stored) (*onnxGraph, Graph) {
	e := newEncoder(PaddedLengths, d, weights)
	entry := Graph{Device: DeviceCUDA, Form: PaddedLengths, Inputs: []string{InputIDs, InputLengths}}
	e.input(InputIDs, onnxInt32, "batch", "sequence")
	e.input(InputLengths, onnxInt32, "batch")

	mask := e.lengthsMask(InputIDs, InputLengths)
	attend := func(e *encoder, x, name string) string {
		return e.ms("MultiHeadAttention", append(e.projections(x, name), "", InputLengths),
			attr{"num_heads", e.d.cfg.NumAttentionHeads})
	}
	layer := func(e *encoder, x, name string) string { return e.afterAttention(attend(e, x, name), x, name) }
	x := e.embedRows()
	for i := range d.cfg.NumHiddenLayers - 1 {
		x = layer(e, x, layerName(i))
	}
	f := rowsForm(mask)
	f.layer = layer
	f.first = func(e *encoder, x, name string) string {
		firstOf := func(v string) string { return e.node("Gather", []string{v, e.int32s([]int{1}, 0)}, attr{"axis", 1}) }
		y := e.afterAttention(firstOf(attend(e, x, name)), firstOf(x), name)
		return e.node("Squeeze", []string{y, e.ints(1)})
	}
	e.finish(x, f, &entry)
	return e.onnxGraph, entry
}

// projections are query, key and value. The key has no bias and the value's is part of the
// output projection's: see [weightsPlan.attention].
func (e *encoder) projections(x, layer string) []string {
	q := e.node("Add", []string{e.linear(x, layer+"query"), e.weight(layer + "query.bias")})
	return []string{q, e.linear(x, layer+"key"), e.linear(x, layer+"value")}
}

// lengthsMask is the float32 mask [B,S] of rows with the given lengths [B], for a grid [B,S].
func (e *encoder) lengthsMask(grid, lengths string) string {
	columns := e.node("Squeeze", []string{e.node("Shape", []string{grid}, attr{"start", 1}, attr{"end", 2})})
	zero, one := e.constant("zero", onnxInt64, nil, make([]byte, 8)), e.constant("one", onnxInt64, nil, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	places := e.node("Cast", []string{e.node("Range", []string{zero, columns, one})}, attr{"to", onnxInt32})
	inside := e.node("Less", []string{places, e.node("Unsqueeze", []string{lengths, e.ints(1)})})
	return e.node("Cast", []string{inside}, attr{"to", onnxFloat})
}
