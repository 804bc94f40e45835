package qdrantlocal

import (
	"math"
	"slices"

	"github.com/qdrant/go-client/qdrant"
)

// Points live in numbered slots; everything known of a point is found by its slot in one of
// the chunked arrays below. A chunk never moves once made, so growing a collection copies
// nothing and the arrays may be scanned chunk by chunk.
const (
	chunkShift = 8
	// chunkSlots is the unit of a scan: of 1,024 floats it is 1 MiB, which a core reads in
	// about 0.1 ms, the time for which a scan holds the read lock.
	chunkSlots = 1 << chunkShift
	chunkMask  = chunkSlots - 1
)

// chunked is an array of T by slot. Its zero value is empty and ready.
type chunked[T any] struct{ chunks [][]T }

// grow makes slot valid.
func (c *chunked[T]) grow(slot uint32) {
	for int(slot>>chunkShift) >= len(c.chunks) {
		c.chunks = append(c.chunks, make([]T, chunkSlots))
	}
}

func (c *chunked[T]) at(slot uint32) T     { return c.chunks[slot>>chunkShift][slot&chunkMask] }
func (c *chunked[T]) set(slot uint32, v T) { c.chunks[slot>>chunkShift][slot&chunkMask] = v }

// vectorShape is how a named vector is stored.
type vectorShape uint8

const (
	shapeDense vectorShape = iota
	shapeSparse
	shapeMulti
)

// vectorSpec is one named vector of a collection, from its configuration.
type vectorSpec struct {
	name     string
	shape    vectorShape
	dim      int
	distance qdrant.Distance
	// half rounds every component to a float16 on write.
	half bool
}

// vectorData is one point's value of a named vector. flat holds the dense vector, or the
// rows of a multivector, or the weights of a sparse vector whose terms are in indices.
type vectorData struct {
	flat    []float32
	indices []uint32
}

// vectorColumn holds one named vector of all points.
type vectorColumn struct {
	vectorSpec
	present chunked[bool]
	// dense holds chunkSlots*dim floats per chunk, made when the chunk gets its first vector.
	dense [][]float32
	other chunked[vectorData]
	count int
}

func (v *vectorColumn) grow(slot uint32) {
	v.present.grow(slot)
	if v.shape != shapeDense {
		v.other.grow(slot)
		return
	}
	for int(slot>>chunkShift) >= len(v.dense) {
		v.dense = append(v.dense, nil)
	}
}

func (v *vectorColumn) has(slot uint32) bool { return v.present.at(slot) }

// row is the dense vector in slot; it aliases the store.
func (v *vectorColumn) row(slot uint32) []float32 {
	i := int(slot&chunkMask) * v.dim
	return v.dense[slot>>chunkShift][i : i+v.dim : i+v.dim]
}

// get returns the vector in slot, aliasing the store.
func (v *vectorColumn) get(slot uint32) (vectorData, bool) {
	switch {
	case !v.has(slot):
		return vectorData{}, false
	case v.shape == shapeDense:
		return vectorData{flat: v.row(slot)}, true
	default:
		return v.other.at(slot), true
	}
}

// set stores data, taking ownership of it unless dense.
func (v *vectorColumn) set(slot uint32, data vectorData) {
	if !v.has(slot) {
		v.present.set(slot, true)
		v.count++
	}
	if v.shape != shapeDense {
		v.other.set(slot, data)
		return
	}
	if v.dense[slot>>chunkShift] == nil {
		v.dense[slot>>chunkShift] = make([]float32, chunkSlots*v.dim)
	}
	copy(v.row(slot), data.flat)
}

func (v *vectorColumn) clear(slot uint32) {
	if !v.has(slot) {
		return
	}
	v.present.set(slot, false)
	v.count--
	if v.shape != shapeDense {
		v.other.set(slot, vectorData{})
	}
}

// prepare brings a vector of a request into the stored form: cosine vectors are normalised,
// sparse ones sorted by term, half precision rounded. data is changed in place.
func (s *vectorSpec) prepare(data vectorData) {
	if s.shape == shapeSparse {
		if !slices.IsSorted(data.indices) {
			sortSparse(data)
		}
		return
	}
	if s.distance == qdrant.Distance_Cosine {
		for i := 0; i+s.dim <= len(data.flat); i += s.dim {
			normalise(data.flat[i : i+s.dim])
		}
	}
	if s.half {
		for i, x := range data.flat {
			data.flat[i] = roundHalf(x)
		}
	}
}

// normalise scales v to length 1. A vector of length zero stays, as does one that is close
// enough to 1 already, so that normalising twice changes nothing.
func normalise(v []float32) {
	var sum float32
	for _, x := range v {
		sum += x * x
	}
	if sum < epsilon32 || math.Abs(float64(sum)-1) <= 1e-6 {
		return
	}
	length := float32(math.Sqrt(float64(sum)))
	for i := range v {
		v[i] /= length
	}
}

// epsilon32 is the distance from 1 to the next float32.
const epsilon32 = 1.0 / (1 << 23)

// roundHalf rounds to the nearest float16, ties to even, and back.
func roundHalf(x float32) float32 {
	b := math.Float32bits(x)
	exp := int(b>>23&0xff) - 127
	switch {
	case exp == 128: // infinities and NaN
		return x
	case exp >= -14:
		b += 0xfff + b>>13&1
		b &^= 0x1fff
		y := math.Float32frombits(b)
		if y > 65504 || y < -65504 {
			return float32(math.Inf(int(math.Copysign(1, float64(x)))))
		}
		return y
	default: // subnormal in half precision: a multiple of 2^-24
		const unit = 1.0 / (1 << 24)
		return float32(math.RoundToEven(float64(x)/unit) * unit)
	}
}

// sortSparse orders terms and weights together by term.
func sortSparse(d vectorData) {
	order := make([]int, len(d.indices))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		if d.indices[a] < d.indices[b] {
			return -1
		}
		return 1
	})
	idx, val := slices.Clone(d.indices), slices.Clone(d.flat)
	for i, o := range order {
		d.indices[i], d.flat[i] = idx[o], val[o]
	}
}
