package model

import (
	"context"
	"fmt"
)

// writeWeights writes every array that the graphs of one precision need, in a fixed order.
func writeWeights(ctx context.Context, w *weightsWriter, ck *checkpoint, d *description, p Precision) error {
	h, inter := d.cfg.HiddenSize, d.cfg.IntermediateSize
	e := weightsPlan{ctx: ctx, w: w, ck: ck, precision: p}

	e.copy("words", "embeddings.word_embeddings.weight", d.cfg.VocabSize, h)
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
		e.matrix("heads.sparse", sparseWeight, 1, h)
		e.copy("heads.sparse.bias", sparseBias, 1)
		e.matrix("heads.colbert", colbertWeight, d.colbertDim, h)
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

// matrix writes a linear layer's weight, [rows,cols] in the checkpoint, as [cols,rows].
func (e *weightsPlan) matrix(out, in string, rows, cols int) {
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
	var bias []float32
	for _, part := range []string{"query", "key", "value"} {
		e.matrix(out+part, in+"attention.self."+part+".weight", h, h)
		bias = append(bias, e.load(in+"attention.self."+part+".bias", h)...)
	}
	e.put(out+"qkv.bias", bias, 3*h)
	e.matrix(out+"mix", in+"attention.output.dense.weight", h, h)
	e.copy(out+"mix.bias", in+"attention.output.dense.bias", h)
}
