package corpus

import (
	"crypto/sha256"
	"encoding/hex"
	"math"
)

// ChecksumVectors returns 16 hex digits over the vectors as an index of the given storage
// type keeps them: SHA-256 over their canonical encoding, each dense and ColBERT value
// rounded to float16 first when denseType is "float16". It travels in the point's own payload,
// so a reader can tell a damaged vector from one that another machine computed.
func ChecksumVectors(v *Vectors, denseType string) string {
	if denseType == "float16" {
		r := Vectors{Dense: roundHalf(v.Dense), Sparse: v.Sparse}
		if v.ColBERT != nil {
			r.ColBERT = make([][]float32, len(v.ColBERT))
			for i, row := range v.ColBERT {
				r.ColBERT[i] = roundHalf(row)
			}
		}
		v = &r
	}
	sum := sha256.Sum256(v.AppendBinary(nil))
	return hex.EncodeToString(sum[:8])
}

func roundHalf(row []float32) []float32 {
	if row == nil {
		return nil
	}
	out := make([]float32, len(row))
	for i, x := range row {
		out[i] = HalfToFloat(FloatToHalf(x))
	}
	return out
}

// FloatToHalf converts to IEEE 754 binary16, rounding to nearest even; overflow becomes infinity.
func FloatToHalf(x float32) uint16 {
	b := math.Float32bits(x)
	sign := uint16(b >> 16 & 0x8000)
	exp := int(b>>23&0xff) - 127 + 15
	man := b & 0x7fffff
	switch {
	case b&0x7fffffff > 0x7f800000:
		return sign | 0x7e00
	case exp >= 31:
		return sign | 0x7c00
	case exp <= 0:
		if exp < -10 {
			return sign
		}
		man |= 0x800000
		shift := uint(14 - exp)
		half := man >> shift
		rest := man & (1<<shift - 1)
		if mid := uint32(1) << (shift - 1); rest > mid || rest == mid && half&1 == 1 {
			half++
		}
		return sign | uint16(half)
	}
	half := uint32(exp)<<10 | man>>13
	if rest := man & 0x1fff; rest > 0x1000 || rest == 0x1000 && half&1 == 1 {
		half++ // may carry into the exponent, up to infinity, which is right
	}
	return sign | uint16(half)
}

// HalfToFloat converts from IEEE 754 binary16.
func HalfToFloat(h uint16) float32 {
	sign := uint32(h&0x8000) << 16
	exp := uint32(h >> 10 & 0x1f)
	man := uint32(h & 0x3ff)
	switch {
	case exp == 0x1f:
		return math.Float32frombits(sign | 0x7f800000 | man<<13)
	case exp != 0:
		return math.Float32frombits(sign | (exp+112)<<23 | man<<13)
	case man == 0:
		return math.Float32frombits(sign)
	}
	f := float32(man) / (1 << 24)
	return math.Float32frombits(sign | math.Float32bits(f))
}
