package model

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// dtype is the type of a stored number, by its safetensors name.
type dtype string

const (
	f64  dtype = "F64"
	f32  dtype = "F32"
	f16  dtype = "F16"
	bf16 dtype = "BF16"
)

// dtypeSize is the bytes of one number of each type that may occur in a checkpoint. Only
// the floating-point ones can be weights.
var dtypeSize = map[dtype]int64{
	f64: 8, f32: 4, f16: 2, bf16: 2,
	"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
	"U16": 2, "U32": 4, "U64": 8, "F8_E5M2": 1, "F8_E4M3": 1,
}

// tensor is one array of a checkpoint, row-major, still on disk.
type tensor struct {
	name  string
	dtype dtype
	shape []int
	src   io.ReaderAt
	off   int64
	file  string // for messages
	// crc, when not nil, is the CRC-32 of the tensor's bytes.
	crc *uint32
}

// elements is the number of numbers. Readers have checked that it does not overflow.
func (t *tensor) elements() int {
	n := 1
	for _, d := range t.shape {
		n *= d
	}
	return n
}

// elementCount multiplies a shape, refusing negative sides and more than 2^40 numbers, which
// no checkpoint of an encoder comes near.
func elementCount(shape []int) (int, bool) {
	const most = 1 << 40
	n := 1
	for _, d := range shape {
		if d < 0 || d > most || (d > 0 && n > most/d) {
			return 0, false
		}
		n *= d
	}
	return n, true
}

// chunkElements is how many numbers are read at a time: 4 MiB of float32.
const chunkElements = 1 << 20

// each reads the tensor as float32 and hands out consecutive pieces, valid until the next.
func (t *tensor) each(ctx context.Context, fn func(piece []float32) error) error {
	size, ok := dtypeSize[t.dtype]
	if !ok || !strings.Contains("F64 F32 F16 BF16", string(t.dtype)) {
		return damaged(t.file, fmt.Sprintf("stores %s as %s; weights are floating-point numbers", t.name, t.dtype), nil)
	}
	total := t.elements()
	raw := make([]byte, min(total, chunkElements)*int(size))
	piece := make([]float32, min(total, chunkElements))
	var crc uint32
	for done := 0; done < total; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		n := min(total-done, chunkElements)
		b := raw[:n*int(size)]
		if _, err := t.src.ReadAt(b, t.off+int64(done)*size); err != nil {
			return damaged(t.file, fmt.Sprintf("ends inside %s", t.name), err)
		}
		crc = crc32.Update(crc, crc32.IEEETable, b)
		decodeFloats(piece[:n], b, t.dtype)
		for _, v := range piece[:n] {
			if math.Float32bits(v)&0x7f800000 == 0x7f800000 {
				return damaged(t.file, fmt.Sprintf("has a number in %s that is not finite", t.name), nil)
			}
		}
		if err := fn(piece[:n]); err != nil {
			return err
		}
		done += n
	}
	if t.crc != nil && *t.crc != crc {
		return damaged(t.file, fmt.Sprintf("has the data of %s damaged (its checksum differs); download it again", t.name), nil)
	}
	return nil
}

// decodeFloats converts len(dst) little-endian numbers of type d.
func decodeFloats(dst []float32, b []byte, d dtype) {
	switch d {
	case f64:
		for i := range dst {
			dst[i] = float32(math.Float64frombits(binary.LittleEndian.Uint64(b[8*i:])))
		}
	case f32:
		for i := range dst {
			dst[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
		}
	case f16:
		for i := range dst {
			dst[i] = halfToFloat(binary.LittleEndian.Uint16(b[2*i:]))
		}
	case bf16:
		for i := range dst {
			dst[i] = math.Float32frombits(uint32(binary.LittleEndian.Uint16(b[2*i:])) << 16)
		}
	}
}

// halfToFloat widens an IEEE half-precision number; exact.
func halfToFloat(h uint16) float32 {
	sign := uint32(h&0x8000) << 16
	exp := uint32(h>>10) & 0x1f
	frac := uint32(h & 0x3ff)
	switch {
	case exp == 0x1f:
		return math.Float32frombits(sign | 0x7f800000 | frac<<13)
	case exp == 0:
		// Subnormal: frac * 2^-24, exact in float32.
		v := float32(frac) * (1.0 / (1 << 24))
		if sign != 0 {
			v = -v
		}
		return v
	}
	return math.Float32frombits(sign | (exp+112)<<23 | frac<<13)
}

// maxHalf is the largest finite half-precision number.
const maxHalf = 65504

// floatToHalf rounds to the nearest half, ties to even. The caller has checked the range.
func floatToHalf(f float32) uint16 {
	b := math.Float32bits(f)
	sign := uint16(b>>16) & 0x8000
	b &= 0x7fffffff
	if b < 0x38800000 { // below 2^-14: subnormal or zero
		return sign | uint16(math.RoundToEven(float64(math.Float32frombits(b))*(1<<24)))
	}
	b += 0xfff + (b>>13)&1
	return sign | uint16((b-0x38000000)>>13)
}

// checkpoint is the set of a checkpoint's tensors, and remembers what was read of them.
type checkpoint struct {
	tensors map[string]*tensor
	prefix  string // such as "bert." before every encoder name
	digests map[string]string
	params  int64
	closers []io.Closer
}

func (c *checkpoint) Close() error {
	var first error
	for _, cl := range c.closers {
		if err := cl.Close(); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// tensorReader lists the tensors of one weight file.
type tensorReader func(file string, r io.ReaderAt, size int64) ([]*tensor, error)

// open lists one weight file's tensors and keeps the file open. Their names get the prefix.
func (c *checkpoint) open(files *source, name, prefix string, read tensorReader) error {
	f, err := os.Open(filepath.Join(files.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return damaged("the checkpoint", fmt.Sprintf("has no %s", name), err)
	}
	if err != nil {
		return err
	}
	c.closers = append(c.closers, f)
	st, err := f.Stat()
	if err != nil {
		return err
	}
	list, err := read(name, f, st.Size())
	if err != nil {
		return err
	}
	files.use(name)
	for _, t := range list {
		t.name = prefix + t.name
	}
	return c.add(list)
}

// bytes estimates the size of the weights when built, for progress.
func (c *checkpoint) bytes(p Precision) int64 {
	var n int64
	for _, t := range c.tensors {
		n += int64(t.elements())
	}
	if p == FP16 {
		return 2 * n
	}
	return 4 * n
}

// headPrefix marks the tensors of BGE-M3's further heads, whose files name them all alike.
const headPrefix = "head."

// add joins the tensors of one more file, refusing a name that is already there.
func (c *checkpoint) add(list []*tensor) error {
	for _, t := range list {
		if old, ok := c.tensors[t.name]; ok {
			return damaged(t.file, fmt.Sprintf("has %s, which %s has too", t.name, old.file), nil)
		}
		c.tensors[t.name] = t
	}
	return nil
}

// get finds an encoder tensor of the given shape. Names are without the prefix; older
// checkpoints say gamma and beta for a layer norm's weight and bias.
func (c *checkpoint) get(name string, shape ...int) (*tensor, error) {
	full := c.prefix + name
	if strings.HasPrefix(name, headPrefix) {
		full = name
	}
	t := c.tensors[full]
	if t == nil && strings.Contains(name, "LayerNorm.") {
		t = c.tensors[c.prefix+strings.NewReplacer("LayerNorm.weight", "LayerNorm.gamma", "LayerNorm.bias", "LayerNorm.beta").Replace(name)]
	}
	if t == nil {
		return nil, missingTensor(full)
	}
	if !slices.Equal(t.shape, shape) {
		return nil, damaged(t.file, fmt.Sprintf("has %s with shape %v where config.json means %v", t.name, t.shape, shape), nil)
	}
	return t, nil
}

func missingTensor(name string) error {
	return damaged("the checkpoint", fmt.Sprintf("has no tensor %s; it is incomplete or of another architecture than config.json says", name), nil)
}

// stream reads a tensor whole, in pieces, and takes its digest the first time.
func (c *checkpoint) stream(ctx context.Context, t *tensor, fn func([]float32) error) error {
	if _, ok := c.digests[t.name]; ok {
		return t.each(ctx, fn)
	}
	h := sha256.New()
	fmt.Fprintf(h, "%s\x00%v\x00", strings.TrimPrefix(t.name, c.prefix), t.shape)
	raw := make([]byte, 0, 4*min(t.elements(), chunkElements))
	err := t.each(ctx, func(piece []float32) error {
		raw = appendFloat32s(raw[:0], piece)
		h.Write(raw)
		return fn(piece)
	})
	if err != nil {
		return err
	}
	c.digests[t.name] = hex.EncodeToString(h.Sum(nil))
	c.params += int64(t.elements())
	return nil
}

// load reads a tensor into memory.
func (c *checkpoint) load(ctx context.Context, t *tensor) ([]float32, error) {
	out := make([]float32, 0, t.elements())
	err := c.stream(ctx, t, func(piece []float32) error {
		out = append(out, piece...)
		return nil
	})
	return out, err
}

// digest names all numbers read so far, whatever the format and order of their files.
func (c *checkpoint) digest() string {
	names := make([]string, 0, len(c.digests))
	for n := range c.digests {
		names = append(names, n)
	}
	slices.SortFunc(names, func(a, b string) int {
		return strings.Compare(strings.TrimPrefix(a, c.prefix), strings.TrimPrefix(b, c.prefix))
	})
	h := sha256.New()
	for _, n := range names {
		fmt.Fprintf(h, "%s\n", c.digests[n])
	}
	return hex.EncodeToString(h.Sum(nil))
}

func appendFloat32s(b []byte, v []float32) []byte {
	for _, x := range v {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(x))
	}
	return b
}
