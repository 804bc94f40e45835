package onnx

import (
	"iter"
	"math"
	"slices"

	ort "github.com/yalue/onnxruntime_go"

	"github.com/lockstep-db/lockstep/embedder/model"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

// batch is what one run embeds.
type batch struct {
	rows  [][]uint32
	heads corpus.Heads
	// longest row and sum of all, in tokens.
	longest, tokens int
}

// maxScores bounds rows × attention heads × length² of one padded run. Where rows have padding,
// ONNX Runtime's CPU attention holds a float32 for each: 1 GiB here, 27 GB for 25 rows of up to
// 8,192 tokens with 4 heads. The bound itself is unmeasured.
const maxScores = 1 << 28

// batches cuts rows, in order, into runs that the graph can take; nearly always one.
func (e *Engine) batches(rows [][]uint32, heads corpus.Heads) iter.Seq[batch] {
	return func(yield func(batch) bool) {
		b := batch{heads: heads}
		for i, row := range rows {
			longest := max(b.longest, len(row))
			scores := (len(b.rows) + 1) * e.manifest.AttentionHeads * longest * longest
			if e.Padded() && len(b.rows) > 0 && scores > maxScores {
				if !yield(b) {
					return
				}
				b = batch{heads: heads}
			}
			b.rows = rows[i-len(b.rows) : i+1]
			b.longest = max(b.longest, len(row))
			b.tokens += len(row)
		}
		yield(b)
	}
}

// outputs are the tensors of one run; those not asked for have no name. sparseAt and colbertAt
// say where a row's token values begin.
type outputs struct {
	dense, norm, sparse, colbert output
	sparseAt, colbertAt          []int
}

// bound lists what the run has to compute.
func (o *outputs) bound() []output {
	var list []output
	for _, out := range []output{o.dense, o.norm, o.sparse, o.colbert} {
		if out.name != "" {
			list = append(list, out)
		}
	}
	return list
}

func newOutput(name string, dims ...int) output {
	shape := make(ort.Shape, len(dims))
	for i, d := range dims {
		shape[i] = int64(d)
	}
	return output{name: name, shape: shape, data: make([]float32, shape.FlattenedSize())}
}

func intInput(name string, data []int32, dims ...int64) input {
	return input{name: name, shape: ort.NewShape(dims...), data: data}
}

// Bounds of batches for the graph of long texts. It reaches cuDNN's attention, which was 1.29
// times as fast as the packed one at 8,192 tokens and 1.05 times at 512 on an H100, but takes
// 0.1 to 0.5 s to plan each new shape: lengths are rounded up, and only texts take it that are
// long enough for few rows a batch, so that there are few shapes. Where between the two
// lengths it begins to pay is unmeasured.
const (
	longText  = 4096
	longRound = 512
	// longWaste is how many padded tokens may stand for a real one.
	longWaste = 1.1
)

// isLong reports whether the batch is one for the graph of long texts.
func (b *batch) isLong() bool {
	for _, row := range b.rows {
		if len(row) < longText {
			return false
		}
	}
	return float64(len(b.rows)*roundUp(b.longest, longRound)) <= longWaste*float64(b.tokens)
}

func roundUp(n, step int) int { return (n + step - 1) / step * step }

// tensors are the inputs of a form of graph, without the heads, and the outputs asked for.
func (e *Engine) tensors(b batch, form string) ([]input, outputs) {
	switch form {
	case model.Packed:
		return e.packed(b)
	case model.PaddedLengths:
		ids, out := e.padded(b, min(roundUp(b.longest, longRound), e.spec.MaxTokens))
		lengths := make([]int32, len(b.rows))
		for i, row := range b.rows {
			lengths[i] = int32(len(row))
		}
		return []input{ids, intInput(model.InputLengths, lengths, int64(len(lengths)))}, out
	default:
		ids, out := e.padded(b, b.longest)
		mask := make([]int32, len(ids.data))
		cols := int(ids.shape[1])
		for i, row := range b.rows {
			for j := range row {
				mask[i*cols+j] = 1
			}
		}
		return []input{ids, {name: model.InputMask, shape: ids.shape, data: mask}}, out
	}
}

// padded lays rows out in a grid of cols columns or a few more, padding on the right.
func (e *Engine) padded(b batch, cols int) (input, outputs) {
	// A graph with token vectors leaves the first of each row out; with two columns there is
	// always one left, and no shape with a zero in it.
	cols = max(cols, 2)
	rows := len(b.rows)
	ids := make([]int32, rows*cols)
	if pad := int32(e.manifest.Special.Pad); pad > 0 {
		for i := range ids {
			ids[i] = pad
		}
	}
	for i, row := range b.rows {
		for j, id := range row {
			ids[i*cols+j] = int32(id)
		}
	}
	var out outputs
	if b.heads.Has(corpus.Dense) {
		out.dense = newOutput(model.OutputDense, rows, e.spec.Dim)
		out.norm = newOutput(model.OutputDenseNorm, rows, 1)
	}
	if b.heads.Has(corpus.SparseHead) {
		out.sparse = newOutput(model.OutputSparse, rows, cols)
		out.sparseAt = steps(rows, cols)
	}
	if b.heads.Has(corpus.ColBERT) {
		out.colbert = newOutput(model.OutputColBERT, rows, cols-1, e.spec.ColBERTDim)
		out.colbertAt = steps(rows, cols-1)
	}
	return intInput(model.InputIDs, ids, int64(rows), int64(cols)), out
}

// steps returns n multiples of size, from 0.
func steps(n, size int) []int {
	at := make([]int, n)
	for i := range at {
		at[i] = i * size
	}
	return at
}

// packed lays rows out one after another.
func (e *Engine) packed(b batch) ([]input, outputs) {
	rows, cols := len(b.rows), b.longest
	ids := make([]int32, 0, b.tokens)
	positions := make([]int32, 0, b.tokens)
	ends := make([]int32, 1, rows+1)
	starts := make([]int, 0, rows)
	// Places in the unpacked grid: first those of tokens, then those of padding.
	places := make([]int32, 0, rows*cols)
	for i, row := range b.rows {
		start := len(ids)
		starts = append(starts, start)
		for j, id := range row {
			ids = append(ids, int32(id))
			places = append(places, int32(i*cols+j))
		}
		positions = e.manifest.Positions(positions, ids[start:])
		ends = append(ends, int32(len(ids)))
	}
	for i, row := range b.rows {
		for j := len(row); j < cols; j++ {
			places = append(places, int32(i*cols+j))
		}
	}
	var out outputs
	if b.heads.Has(corpus.Dense) {
		out.dense = newOutput(model.OutputDense, rows, e.spec.Dim)
		out.norm = newOutput(model.OutputDenseNorm, rows, 1)
	}
	if b.heads.Has(corpus.SparseHead) {
		out.sparse = newOutput(model.OutputSparse, b.tokens)
		out.sparseAt = starts
	}
	if b.heads.Has(corpus.ColBERT) {
		out.colbert = newOutput(model.OutputColBERT, b.tokens, e.spec.ColBERTDim)
		out.colbertAt = make([]int, rows)
		for i, at := range starts {
			out.colbertAt[i] = at + 1 // a text's first token has no vector
		}
	}
	t := int64(b.tokens)
	return []input{
		intInput(model.InputIDs, ids, t),
		intInput(model.InputPositions, positions, t),
		intInput(model.InputTokenOffset, places, int64(rows), int64(cols)),
		intInput(model.InputCumulative, ends, int64(rows+1)),
	}, out
}

// results cuts the tensors into one result a row.
func (e *Engine) results(b batch, out outputs) []corpus.Vectors {
	results := make([]corpus.Vectors, len(b.rows))
	for i, row := range b.rows {
		v := &results[i]
		if d := e.spec.Dim; out.dense.name != "" {
			v.Dense = out.dense.data[i*d : (i+1)*d : (i+1)*d]
			v.DenseNorm = out.norm.data[i]
		}
		if out.sparse.name != "" {
			v.Sparse = e.aggregate(row, out.sparse.data[out.sparseAt[i]:])
		}
		if d := e.spec.ColBERTDim; out.colbert.name != "" {
			v.ColBERT = make([][]float32, len(row)-1)
			for j := range v.ColBERT {
				at := (out.colbertAt[i] + j) * d
				v.ColBERT[j] = out.colbert.data[at : at+d : at+d]
			}
		}
	}
	return results
}

// aggregate makes a sparse vector of a row's token weights as BGE-M3's reference does: the
// largest weight of each token id, only weights above zero, without the special tokens cls,
// sep, pad and unk. Weights that are not finite stay, so that whoever checks sees them.
func (e *Engine) aggregate(row []uint32, weights []float32) *corpus.Sparse {
	special := &e.manifest.Special
	// Id and weight in one number: the bits of positive floats are ordered as the floats are.
	keys := make([]uint64, 0, len(row))
	for i, id := range row {
		w := weights[i]
		if w <= 0 {
			continue
		}
		switch int(id) {
		case special.CLS, special.SEP, special.Pad, special.Unk:
			continue
		}
		keys = append(keys, uint64(id)<<32|uint64(math.Float32bits(w)))
	}
	slices.Sort(keys)
	s := &corpus.Sparse{Indices: make([]uint32, 0, len(keys)), Values: make([]float32, 0, len(keys))}
	for i, k := range keys {
		if i+1 < len(keys) && keys[i+1]>>32 == k>>32 {
			continue
		}
		s.Indices = append(s.Indices, uint32(k>>32))
		s.Values = append(s.Values, math.Float32frombits(uint32(k)))
	}
	return s
}
