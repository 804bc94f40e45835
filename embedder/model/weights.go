package model

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"math"
	"os"
	"path/filepath"
)

// stored is an array in the weights file.
type stored struct {
	name   string
	elem   int
	dims   []int
	file   string
	offset int64
	length int64
	// inner is the length of a quantised matrix's rows without their filling.
	inner int
}

// weightsWriter writes the external weights file: arrays one after the other, each at a
// multiple of alignment, hashed as they are written.
type weightsWriter struct {
	file  string
	f     *os.File
	buf   *bufio.Writer
	sum   hash.Hash
	at    int64
	all   map[string]stored
	order []string
	half  bool // floats are stored in half precision from here on
	onAdd func(bytes int64)
}

// alignment lets the runtime map each array from the file: a page.
const alignment = 4096

func newWeightsWriter(dir, file string, onAdd func(int64)) (*weightsWriter, error) {
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	w := &weightsWriter{file: file, f: f, sum: sha256.New(), all: map[string]stored{}, onAdd: onAdd}
	w.buf = bufio.NewWriterSize(io.MultiWriter(f, w.sum), 1<<20)
	return w, nil
}

// begin starts an array; its bytes follow by write until end.
func (w *weightsWriter) begin(name string, elem int, dims ...int) error {
	if _, ok := w.all[name]; ok {
		return fmt.Errorf("weight %s written twice", name)
	}
	if pad := (alignment - w.at%alignment) % alignment; pad > 0 {
		if err := w.write(make([]byte, pad)); err != nil {
			return err
		}
	}
	w.all[name] = stored{name: name, elem: elem, dims: dims, file: w.file, offset: w.at}
	w.order = append(w.order, name)
	return nil
}

func (w *weightsWriter) write(b []byte) error {
	n, err := w.buf.Write(b)
	w.at += int64(n)
	return err
}

// end checks that the array got the bytes its shape means.
func (w *weightsWriter) end(name string) error {
	s := w.all[name]
	s.length = w.at - s.offset
	width := map[int]int64{onnxFloat: 4, onnxHalf: 2, onnxUint8: 1}[s.elem]
	n, _ := elementCount(s.dims)
	if s.length != int64(n)*width {
		return fmt.Errorf("weight %s has %d bytes and its shape %v means %d", name, s.length, s.dims, int64(n)*width)
	}
	w.all[name] = s
	w.onAdd(s.length)
	return nil
}

// floatElem is the type floats are stored in.
func (w *weightsWriter) floatElem() int {
	if w.half {
		return onnxHalf
	}
	return onnxFloat
}

// floats appends numbers in the file's precision.
func (w *weightsWriter) floats(name string, v []float32) error {
	if !w.half {
		return w.write(appendFloat32s(make([]byte, 0, 4*len(v)), v))
	}
	b := make([]byte, 0, 2*len(v))
	for _, x := range v {
		if math.Abs(float64(x)) > maxHalf {
			return unsupported("%s has a weight of %g, beyond half precision (65504); build this model in fp32", name, x)
		}
		b = binary.LittleEndian.AppendUint16(b, floatToHalf(x))
	}
	return w.write(b)
}

// put writes an array that is in memory.
func (w *weightsWriter) put(name string, v []float32, dims ...int) error {
	if err := w.begin(name, w.floatElem(), dims...); err != nil {
		return err
	}
	if err := w.floats(name, v); err != nil {
		return err
	}
	return w.end(name)
}

// putQuantised writes a quantised matrix with rows of inner numbers.
func (w *weightsWriter) putQuantised(name string, v []byte, inner int, dims ...int) error {
	if err := w.begin(name, onnxUint8, dims...); err != nil {
		return err
	}
	s := w.all[name]
	s.inner = inner
	w.all[name] = s
	if err := w.write(v); err != nil {
		return err
	}
	return w.end(name)
}

// copy streams a tensor as it is.
func (w *weightsWriter) copy(ctx context.Context, ck *checkpoint, name string, t *tensor) error {
	if err := w.begin(name, w.floatElem(), t.shape...); err != nil {
		return err
	}
	if err := ck.stream(ctx, t, func(piece []float32) error { return w.floats(name, piece) }); err != nil {
		return err
	}
	return w.end(name)
}

// close flushes to the disk and returns the file's entry for the manifest.
func (w *weightsWriter) close() (File, error) {
	err := w.buf.Flush()
	if err == nil {
		err = w.f.Sync()
	}
	if cerr := w.f.Close(); err == nil {
		err = cerr
	}
	return File{Name: w.file, Size: w.at, SHA256: hex.EncodeToString(w.sum.Sum(nil))}, err
}

// transpose turns a row-major [rows,cols] array around. Linear layers are stored [out,in];
// a MatMul wants [in,out].
func transpose(v []float32, rows, cols int) []float32 {
	const tile = 32 // keeps both sides in the first cache
	out := make([]float32, len(v))
	for r0 := 0; r0 < rows; r0 += tile {
		for c0 := 0; c0 < cols; c0 += tile {
			for r := r0; r < min(r0+tile, rows); r++ {
				for c := c0; c < min(c0+tile, cols); c++ {
					out[c*rows+r] = v[r*cols+c]
				}
			}
		}
	}
	return out
}
