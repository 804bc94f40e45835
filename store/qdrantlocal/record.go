package qdrantlocal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"unsafe"
)

// The log holds what changed, not what was asked: filters and update modes are resolved
// before a record is written, so that reading a log again never depends on how a filter is
// evaluated. Every record sets absolute state, so that reading it twice, or over a newer
// snapshot, ends in the same state.
type recordKind uint8

const (
	// recordPoints: whole points, each replacing what was there.
	recordPoints recordKind = 1
	// recordDelete: ids that are gone.
	recordDelete recordKind = 2
	// recordPayloads: the whole payload of points; ids that do not exist are skipped.
	recordPayloads recordKind = 3
	// recordVectors: some named vectors of points; ids that do not exist are skipped.
	recordVectors recordKind = 4
	// recordSynced carries nothing: its header says how far the log is known durable.
	recordSynced recordKind = 9
	// recordEnd closes a snapshot and counts its points.
	recordEnd recordKind = 10
)

// point is a point on its way into a collection, in stored form.
type point struct {
	id      pointID
	version uint64
	payload []byte
	// vectors by number of the collection's vector columns.
	vectors []numberedVector
}

type numberedVector struct {
	number  int
	removed bool
	data    vectorData
}

var errShortRecord = errors.New("record ends early")

func appendID(b []byte, id pointID) []byte {
	if !id.uuid {
		return binary.LittleEndian.AppendUint64(append(b, 0), id.lo)
	}
	b = append(b, 1)
	b = binary.BigEndian.AppendUint64(b, id.hi)
	return binary.BigEndian.AppendUint64(b, id.lo)
}

func appendFloats(b []byte, v []float32) []byte {
	n := len(b)
	b = append(b, make([]byte, 4*len(v))...)
	out := b[n:]
	for i, x := range v {
		binary.LittleEndian.PutUint32(out[4*i:], math.Float32bits(x))
	}
	return b
}

// appendVector writes a vector; dense ones without a length, which the column knows.
func appendVector(b []byte, s *vectorSpec, v numberedVector) []byte {
	b = binary.AppendUvarint(b, uint64(v.number))
	if v.removed {
		return append(b, 1)
	}
	b = append(b, 0)
	switch s.shape {
	case shapeSparse:
		b = binary.AppendUvarint(b, uint64(len(v.data.indices)))
		for _, x := range v.data.indices {
			b = binary.LittleEndian.AppendUint32(b, x)
		}
	case shapeMulti:
		b = binary.AppendUvarint(b, uint64(len(v.data.flat)/s.dim))
	}
	return appendFloats(b, v.data.flat)
}

func appendPoint(b []byte, cols []*vectorColumn, p *point) []byte {
	b = appendID(b, p.id)
	b = binary.AppendUvarint(b, p.version)
	b = binary.AppendUvarint(b, uint64(len(p.payload)))
	b = append(b, p.payload...)
	b = binary.AppendUvarint(b, uint64(len(p.vectors)))
	for _, v := range p.vectors {
		b = appendVector(b, &cols[v.number].vectorSpec, v)
	}
	return b
}

// decoder reads a record's body. After an error every read returns zero.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) fail() {
	if d.err == nil {
		d.err = errShortRecord
	}
	d.b = nil
}

func (d *decoder) take(n uint64) []byte {
	if uint64(len(d.b)) < n {
		d.fail()
		return nil
	}
	out := d.b[:n:n]
	d.b = d.b[n:]
	return out
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail()
		return 0
	}
	d.b = d.b[n:]
	return v
}

// count reads a number of items that take at least size bytes each.
func (d *decoder) count(size uint64) int {
	n := d.uvarint()
	if n > uint64(len(d.b))/size {
		d.fail()
		return 0
	}
	return int(n)
}

func (d *decoder) byte() byte {
	b := d.take(1)
	if b == nil {
		return 0
	}
	return b[0]
}

func (d *decoder) id() pointID {
	if d.byte() == 0 {
		b := d.take(8)
		if b == nil {
			return pointID{}
		}
		return pointID{lo: binary.LittleEndian.Uint64(b)}
	}
	b := d.take(16)
	if b == nil {
		return pointID{}
	}
	return uuidID([16]byte(b))
}

func (d *decoder) floats(n int, reuse []float32) []float32 {
	b := d.take(4 * uint64(n))
	if b == nil {
		return nil
	}
	out := reuse
	if cap(out) < n {
		out = make([]float32, n)
	}
	out = out[:n]
	for i := range out {
		out[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
	}
	return out
}

// vector reads one vector. scratch is used for dense ones, which the store copies.
func (d *decoder) vector(cols []*vectorColumn, scratch *[]float32) numberedVector {
	number := d.uvarint()
	if d.err == nil && number >= uint64(len(cols)) {
		d.err = fmt.Errorf("record names vector %d of %d", number, len(cols))
	}
	if d.err != nil {
		return numberedVector{}
	}
	v := numberedVector{number: int(number), removed: d.byte() != 0}
	if v.removed {
		return v
	}
	s := &cols[number].vectorSpec
	switch s.shape {
	case shapeDense:
		v.data.flat = d.floats(s.dim, *scratch)
		if v.data.flat != nil {
			*scratch = v.data.flat
		}
	case shapeSparse:
		n := d.count(8)
		b := d.take(4 * uint64(n))
		if d.err != nil {
			return v
		}
		v.data.indices = make([]uint32, n)
		for i := range v.data.indices {
			v.data.indices[i] = binary.LittleEndian.Uint32(b[4*i:])
		}
		v.data.flat = d.floats(n, nil)
	case shapeMulti:
		n := d.count(4 * uint64(s.dim))
		v.data.flat = d.floats(n*s.dim, nil)
	}
	return v
}

// stringBytes views a string's bytes, which must not be changed.
func stringBytes(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }

// countSize is the room of a count that is put in later.
const countSize = 5

// putCount writes n as a varint of exactly countSize bytes.
func putCount(b []byte, n int) {
	for i := range countSize - 1 {
		b[i] = 0x80 | byte(n>>(7*i))&0x7f
	}
	b[countSize-1] = byte(n >> (7 * (countSize - 1)))
}

func appendCount(b []byte, n int) []byte { return binary.AppendUvarint(b, uint64(n)) }
