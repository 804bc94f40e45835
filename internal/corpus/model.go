package corpus

import (
	"encoding/binary"
	"errors"
	"math"
	"strings"
)

// Heads is a set of a model's outputs, and of the named vectors of an index.
type Heads uint8

// The heads of BGE-M3. Most encoders have only the dense one.
const (
	// Dense is one L2-normalised vector a text.
	Dense Heads = 1 << iota
	// SparseHead is one weight for each distinct token of a text.
	SparseHead
	// ColBERT is one L2-normalised vector a token.
	ColBERT
)

// Has reports whether all heads of want are in h.
func (h Heads) Has(want Heads) bool { return h&want == want }

// Names lists the heads as the contract names them, in the order dense, sparse, colbert.
func (h Heads) Names() []string {
	var out []string
	for _, n := range []struct {
		h Heads
		s string
	}{{Dense, "dense"}, {SparseHead, "sparse"}, {ColBERT, "colbert"}} {
		if h.Has(n.h) {
			out = append(out, n.s)
		}
	}
	return out
}

// String joins the names with a plus sign.
func (h Heads) String() string { return strings.Join(h.Names(), "+") }

// ParseHead returns the head of that name, and false when there is none.
func ParseHead(name string) (Heads, bool) {
	switch name {
	case "dense":
		return Dense, true
	case "sparse":
		return SparseHead, true
	case "colbert":
		return ColBERT, true
	}
	return 0, false
}

// ModelSpec says what a loaded model is and can do.
type ModelSpec struct {
	// Name is what people call it, such as "minilm" or "bge-m3".
	Name string
	// Fingerprint names weights, tokenizer, pooling and precision class; it stands wherever
	// a vector is stored. Vectors of two fingerprints are never compared.
	Fingerprint string
	// Heads the model has.
	Heads Heads
	// Dim is the length of a dense vector; ColBERTDim that of one token vector (0 without the head).
	Dim, ColBERTDim int
	// MaxTokens is the longest input in tokens, special tokens included.
	MaxTokens int
	// VocabSize bounds token ids: 0 <= id < VocabSize.
	VocabSize int
	// Precision is what the weights compute in: fp32, fp16 or int8.
	Precision string
	// Device is where it runs: cpu or cuda:N.
	Device string
}

// Sparse is a sparse vector: Indices strictly ascending, Values of the same length.
type Sparse struct {
	Indices []uint32
	Values  []float32
}

// Vectors is one text's embedding. A nil field means the head was not asked for or is absent.
type Vectors struct {
	Dense   []float32
	Sparse  *Sparse
	ColBERT [][]float32
	// DenseNorm is the dense vector's length before it was normalised, so that a caller who
	// asks for raw values can have them; 0 when not known. It is neither stored nor hashed.
	DenseNorm float32
}

// Heads returns the heads that are present.
func (v *Vectors) Heads() Heads {
	var h Heads
	if v.Dense != nil {
		h |= Dense
	}
	if v.Sparse != nil {
		h |= SparseHead
	}
	if v.ColBERT != nil {
		h |= ColBERT
	}
	return h
}

// Finite reports whether every value is a finite number.
func (v *Vectors) Finite() bool {
	ok := finite(v.Dense) && finite([]float32{v.DenseNorm})
	if v.Sparse != nil {
		ok = ok && finite(v.Sparse.Values)
	}
	for _, row := range v.ColBERT {
		ok = ok && finite(row)
	}
	return ok
}

func finite(row []float32) bool {
	for _, x := range row {
		// An exponent of all ones is an infinity or a NaN.
		if math.Float32bits(x)&0x7f800000 == 0x7f800000 {
			return false
		}
	}
	return true
}

// AppendBinary appends the canonical encoding of v, little-endian: one byte of [Heads], then
// for each present head in order: dense: uint32 length, float32 values; sparse: uint32
// length, uint32 indices, float32 values; colbert: uint32 rows, uint32 columns, float32 values.
// It is the form in which callers' vectors are hashed and kept in Postgres.
func (v *Vectors) AppendBinary(b []byte) []byte {
	b = append(b, byte(v.Heads()))
	if v.Dense != nil {
		b = binary.LittleEndian.AppendUint32(b, uint32(len(v.Dense)))
		b = appendFloats(b, v.Dense)
	}
	if v.Sparse != nil {
		b = binary.LittleEndian.AppendUint32(b, uint32(len(v.Sparse.Indices)))
		for _, i := range v.Sparse.Indices {
			b = binary.LittleEndian.AppendUint32(b, i)
		}
		b = appendFloats(b, v.Sparse.Values)
	}
	if v.ColBERT != nil {
		cols := 0
		if len(v.ColBERT) > 0 {
			cols = len(v.ColBERT[0])
		}
		b = binary.LittleEndian.AppendUint32(b, uint32(len(v.ColBERT)))
		b = binary.LittleEndian.AppendUint32(b, uint32(cols))
		for _, row := range v.ColBERT {
			b = appendFloats(b, row)
		}
	}
	return b
}

func appendFloats(b []byte, row []float32) []byte {
	for _, x := range row {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(x))
	}
	return b
}

var errVectorEncoding = errors.New("corpus: damaged vector encoding")

// DecodeVectors reads what [Vectors.AppendBinary] wrote. It refuses trailing or missing bytes.
func DecodeVectors(b []byte) (*Vectors, error) {
	if len(b) == 0 {
		return nil, errVectorEncoding
	}
	heads := Heads(b[0])
	b = b[1:]
	u32 := func() (int, bool) {
		if len(b) < 4 {
			return 0, false
		}
		n := binary.LittleEndian.Uint32(b)
		b = b[4:]
		return int(n), true
	}
	floats := func(n int) ([]float32, bool) {
		if n < 0 || n > len(b)/4 {
			return nil, false
		}
		out := make([]float32, n)
		for i := range out {
			out[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
		}
		b = b[4*n:]
		return out, true
	}
	v := &Vectors{}
	if heads.Has(Dense) {
		n, ok := u32()
		if ok {
			v.Dense, ok = floats(n)
		}
		if !ok {
			return nil, errVectorEncoding
		}
	}
	if heads.Has(SparseHead) {
		n, ok := u32()
		if !ok || n > len(b)/8 {
			return nil, errVectorEncoding
		}
		s := &Sparse{Indices: make([]uint32, n)}
		for i := range s.Indices {
			s.Indices[i] = binary.LittleEndian.Uint32(b[4*i:])
		}
		b = b[4*n:]
		s.Values, _ = floats(n)
		v.Sparse = s
	}
	if heads.Has(ColBERT) {
		rows, ok1 := u32()
		cols, ok2 := u32()
		if !ok1 || !ok2 || rows > 0 && cols == 0 || cols > 0 && rows > len(b)/4/cols {
			return nil, errVectorEncoding
		}
		v.ColBERT = make([][]float32, rows)
		for i := range v.ColBERT {
			v.ColBERT[i], _ = floats(cols)
		}
	}
	if len(b) != 0 || heads&^(Dense|SparseHead|ColBERT) != 0 {
		return nil, errVectorEncoding
	}
	return v, nil
}

// Lane tells the embedder who is waiting.
type Lane uint8

// The lanes.
const (
	// Bulk is ingestion: throughput matters.
	Bulk Lane = iota
	// Query is a person waiting: served before bulk, which is never starved.
	Query
)

// EmbedInput is one text, or one list of token ids of the model itself (Text empty).
type EmbedInput struct {
	Text string
	// Tokens, when not nil, are used as they are, special tokens included.
	Tokens []uint32
}

// EmbedRequest asks for embeddings. The embedder owns Inputs until it answers.
type EmbedRequest struct {
	Inputs []EmbedInput
	Heads  Heads
	Lane   Lane
	// MaxTokens cuts each input to that many tokens, special tokens included; 0 is the model's maximum.
	MaxTokens int
	// KeepEnd cuts from the left instead of the right.
	KeepEnd bool
	// RefuseLong makes a longer input an error of its own instead of cutting it.
	RefuseLong bool
}

// Embedding is the result for one input.
type Embedding struct {
	Vectors Vectors
	// Tokens that were embedded; OriginalTokens before truncation. They differ if it was cut.
	Tokens, OriginalTokens int
	// Err is why this input alone failed; Vectors is then empty.
	Err error
}

// Truncated reports whether the input was cut.
func (e *Embedding) Truncated() bool { return e.Tokens < e.OriginalTokens }

// TokenSpan is one token's place in a text: byte offsets, Start <= End. Special tokens have none.
type TokenSpan struct{ Start, End int }
