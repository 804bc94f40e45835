package httpapi

import (
	"encoding/base64"
	"encoding/binary"
	"math"
	"strconv"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Vectors are most of what this service sends, so they are rendered by hand: appended to a
// buffer that is sent as it fills, with the shortest decimal that reads back to the same
// float32. BenchmarkAppendDense holds the rates.

// appendFloat appends x as JSON. x is finite (see [finite]).
func appendFloat(b []byte, x float32) []byte {
	return strconv.AppendFloat(b, float64(x), 'g', -1, 32)
}

func appendFloats(b []byte, row []float32) []byte {
	b = append(b, '[')
	for i, x := range row {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendFloat(b, x)
	}
	return append(b, ']')
}

func appendRows(b []byte, rows [][]float32) []byte {
	b = append(b, '[')
	for i, row := range rows {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendFloats(b, row)
	}
	return append(b, ']')
}

// appendWeights appends a sparse vector as {"token_id":weight}.
func appendWeights(b []byte, s *corpus.Sparse) []byte {
	b = append(b, '{')
	for i, index := range s.Indices {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, '"')
		b = strconv.AppendUint(b, uint64(index), 10)
		b = append(b, '"', ':')
		b = appendFloat(b, s.Values[i])
	}
	return append(b, '}')
}

// appendLittleEndian appends the row's values as little-endian float32.
func appendLittleEndian(b []byte, row []float32) []byte {
	for _, x := range row {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(x))
	}
	return b
}

// appendBase64 appends rows, one after the other, as one quoted base64 string. scratch is
// reused between calls and returned.
func appendBase64(b, scratch []byte, rows ...[]float32) (out, reusable []byte) {
	scratch = scratch[:0]
	for _, row := range rows {
		scratch = appendLittleEndian(scratch, row)
	}
	b = append(b, '"')
	b = base64.StdEncoding.AppendEncode(b, scratch)
	return append(b, '"'), scratch
}

// normalised returns the first n values of row scaled to length 1, in a new slice. A row that
// is zero there stays zero.
func normalised(row []float32, n int) []float32 {
	out := make([]float32, n)
	var sum float64
	for _, x := range row[:n] {
		sum += float64(x) * float64(x)
	}
	if sum == 0 {
		return out
	}
	scale := 1 / math.Sqrt(sum)
	for i, x := range row[:n] {
		out[i] = float32(float64(x) * scale)
	}
	return out
}
