package model

import (
	"context"
	"fmt"
	"slices"
)

// writeWeights writes every array that the graphs of one precision need, in a fixed order.
func writeWeights(ctx context.Context, w *weightsWriter, ck *checkpoint, d *description, p Precision) error {
	h, inter := d.cfg.HiddenSize, d.cfg.IntermediateSize
	e := weightsPlan{ctx: ctx, w: w, ck: ck, precision: p}

	// Half precision loses nothing beside int8 and halves the largest array.
	w.half = p == FP16 || p == Int8
	e.copy("words", "embeddings.word_embeddings.weight", d.cfg.VocabSize, h)
	w.half = p == FP16
	e.positions(d)
	e.norm("embed", "embeddings.LayerNorm", h)
	for i := range d.cfg.NumHiddenLayers {
		in, out := fmt.Sprintf("encoder.layer.%d.", i), layerName(i)
		e.attention(out, in, h)
		e.norm(out+"attention", in+"attention.output.LayerNorm", h)
		e.matrix(out+"up", in+"intermediate.dense.weight", inter, h)
		e.copy(out+"up.bias", in+"intermediate.dense.bias", inter)
		e.matrix(out+"down", in+"output.dense.weight", h, inter)
		e.copy(out+"down.bias", in+"output.dense.bias", h)
		e.norm(out+"output", in+"output.LayerNorm", h)
	}
	if d.m3 {
		e.floatMatrix("heads.sparse", sparseWeight, 1, h)
		e.copy("heads.sparse.bias", sparseBias, 1)
		e.floatMatrix("heads.colbert", colbertWeight, d.colbertDim, h)
		e.copy("heads.colbert.bias", colbertBias, d.colbertDim)
	}
	return e.err
}

// weightsPlan writes arrays until the first error.
type weightsPlan struct {
	ctx       context.Context
	w         *weightsWriter
	ck        *checkpoint
	precision Precision
	err       error
}

// load reads one tensor into memory.
func (e *weightsPlan) load(name string, shape ...int) []float32 {
	if e.err != nil {
		return nil
	}
	t, err := e.ck.get(name, shape...)
	if err != nil {
		e.err = err
		return nil
	}
	v, err := e.ck.load(e.ctx, t)
	e.err = err
	return v
}

// copy writes a tensor as it is.
func (e *weightsPlan) copy(out, in string, shape ...int) {
	if e.err != nil {
		return
	}
	t, err := e.ck.get(in, shape...)
	if err != nil {
		e.err = err
		return
	}
	e.err = e.w.copy(e.ctx, e.ck, out, t)
}

// put writes an array that is in memory.
func (e *weightsPlan) put(out string, v []float32, dims ...int) {
	if e.err == nil {
		e.err = e.w.put(out, v, dims...)
	}
}

// matrix writes a linear layer's weight, [rows,cols] in the checkpoint, in the form that
// [encoder.linear] multiplies by: quantised, or as [cols,rows] floats.
func (e *weightsPlan) matrix(out, in string, rows, cols int) {
	if e.precision != Int8 {
		e.floatMatrix(out, in, rows, cols)
		return
	}
	v := e.load(in, rows, cols)
	if e.err != nil {
		return
	}
	q, scales := quantise(v, rows, cols)
	blocks := len(scales) / rows
	e.err = e.w.putQuantised(out, q, cols, rows, blocks, blockSize)
	e.put(out+".scales", scales, rows, blocks)
}

// floatMatrix writes a linear layer's weight as [cols,rows] floats in any precision.
func (e *weightsPlan) floatMatrix(out, in string, rows, cols int) {
	v := e.load(in, rows, cols)
	if e.err == nil {
		e.put(out, transpose(v, rows, cols), cols, rows)
	}
}

func (e *weightsPlan) norm(out, in string, h int) {
	e.copy(out+".gamma", in+".weight", h)
	e.copy(out+".beta", in+".bias", h)
}

// positions writes the position table with the only token type that embeddings use, 0,
// added to every row.
func (e *weightsPlan) positions(d *description) {
	h := d.cfg.HiddenSize
	pos := e.load("embeddings.position_embeddings.weight", d.cfg.MaxPositionEmbeddings, h)
	typ := e.load("embeddings.token_type_embeddings.weight", d.cfg.TypeVocabSize, h)
	if e.err != nil {
		return
	}
	for i := range pos {
		pos[i] += typ[i%h]
	}
	e.put("positions", pos, d.cfg.MaxPositionEmbeddings, h)
}

// attention writes the three input projections and the output projection.
func (e *weightsPlan) attention(out, in string, h int) {
	self := in + "attention.self."
	for _, part := range []string{"query", "key", "value"} {
		e.matrix(out+part, self+part+".weight", h, h)
	}
	q, k, v := e.load(self+"query.bias", h), e.load(self+"key.bias", h), e.load(self+"value.bias", h)
	mix := in + "attention.output.dense"
	if e.precision != FP16 {
		e.put(out+"qkv.bias", slices.Concat(q, k, v), 3*h)
		e.matrix(out+"mix", mix+".weight", h, h)
		e.copy(out+"mix.bias", mix+".bias", h)
		return
	}
	// On a GPU each bias is a pass over memory. The key's adds the same number to all scores
	// of a query, which the softmax does not see. The value's comes out of the attention
	// unchanged, since its weights sum to one, so the output projection's bias takes it over.
	e.put(out+"query.bias", q, h)
	w, b := e.load(mix+".weight", h, h), e.load(mix+".bias", h)
	if e.err != nil {
		return
	}
	for i := range b {
		sum := float64(b[i])
		for j, x := range v {
			sum += float64(w[i*h+j]) * float64(x)
		}
		b[i] = float32(sum)
	}
	e.put(out+"mix", transpose(w, h, h), h, h)
	e.put(out+"mix.bias", b, h)
}
