package qdrantlocal

import (
	"fmt"
	"sync"

	"github.com/tidwall/btree"
)

// applyPoints is how many points are changed under one hold of the write lock. It is the
// real server's figure too: a reader may see half of a big upsert, never half of a point.
const applyPoints = 32

// idSlot is an entry of the id order.
type idSlot struct {
	id   pointID
	slot uint32
}

// collection is one collection's state in memory and its log.
//
// Writers serialise on writer, which fixes the order of the log and of its effects. They
// change the state under mu; readers hold mu for reading, for a chunk or a page at a time.
type collection struct {
	name string
	spec *collectionSpec
	dir  string

	writer sync.Mutex
	log    *store
	// seq numbers the records of the log. Guarded by writer.
	seq uint64
	// scratch holds the record being built. Guarded by writer.
	scratch []byte

	mu       sync.RWMutex
	ids      *btree.BTreeG[idSlot]
	slotIDs  chunked[pointID]
	live     chunked[bool]
	versions chunked[uint64]
	payloads chunked[[]byte]
	vectors  []*vectorColumn
	columns  map[string]*column
	// free lists slots to use again; slots is how many were ever in use.
	free  []uint32
	slots uint32
	// dropped is set when the collection is deleted, for calls that still hold it.
	dropped bool
}

func newCollection(name, dir string, spec *collectionSpec) *collection {
	c := &collection{
		name: name, dir: dir, spec: spec,
		ids: btree.NewBTreeGOptions(func(a, b idSlot) bool { return a.id.compare(b.id) < 0 },
			btree.Options{NoLocks: true}),
		columns: map[string]*column{},
	}
	for _, v := range spec.vectors {
		c.vectors = append(c.vectors, &vectorColumn{vectorSpec: v})
	}
	return c
}

// vector finds a named vector, or nil.
func (c *collection) vector(name string) *vectorColumn {
	for _, v := range c.vectors {
		if v.name == name {
			return v
		}
	}
	return nil
}

func (c *collection) vectorNumber(name string) int {
	for i, v := range c.vectors {
		if v.name == name {
			return i
		}
	}
	return -1
}

// slotOf finds the slot of an id.
func (c *collection) slotOf(id pointID) (uint32, bool) {
	e, ok := c.ids.Get(idSlot{id: id})
	return e.slot, ok
}

func (c *collection) document(slot uint32) document {
	return document{col: c, slot: slot, payload: c.payloads.at(slot)}
}

// newSlot makes room for a point.
func (c *collection) newSlot() uint32 {
	if n := len(c.free); n > 0 {
		s := c.free[n-1]
		c.free = c.free[:n-1]
		return s
	}
	s := c.slots
	c.slots++
	c.slotIDs.grow(s)
	c.live.grow(s)
	c.versions.grow(s)
	c.payloads.grow(s)
	for _, v := range c.vectors {
		v.grow(s)
	}
	for _, col := range c.columns {
		col.grow(s)
	}
	return s
}

// setPayload replaces the payload of a slot and its index entries. payload is kept.
func (c *collection) setPayload(slot uint32, payload []byte) {
	old := c.payloads.at(slot)
	for _, col := range c.columns {
		col.remove(slot, old)
		col.put(slot, payload)
	}
	c.payloads.set(slot, payload)
}

// apply reads a record into memory. It is the only way state changes, live and at start-up
// alike, so that what a log reads back to is what was served. During start-up lock is false.
func (c *collection) apply(rec logRecord, lock bool) error {
	d := decoder{b: rec.body}
	var step func()
	var vec []float32
	switch rec.kind {
	case recordPoints:
		step = func() { c.applyPoint(&d, rec.seq, &vec) }
	case recordDelete:
		step = func() { c.applyDelete(d.id()) }
	case recordPayloads:
		step = func() { c.applyPayload(&d, rec.seq) }
	case recordVectors:
		step = func() { c.applyVectors(&d, rec.seq, &vec) }
	default:
		return fmt.Errorf("record of unknown kind %d: written by a newer version?", rec.kind)
	}
	n := d.count(1)
	for done := 0; done < n && d.err == nil; {
		end := min(n, done+applyPoints)
		if lock {
			c.mu.Lock()
		}
		for ; done < end && d.err == nil; done++ {
			step()
		}
		if lock {
			c.mu.Unlock()
		}
	}
	if d.err == nil && len(d.b) != 0 {
		return fmt.Errorf("record of kind %d has %d bytes too many", rec.kind, len(d.b))
	}
	return d.err
}

func (c *collection) applyPoint(d *decoder, seq uint64, vec *[]float32) {
	id := d.id()
	version := d.uvarint()
	if version == 0 {
		version = seq
	}
	payload := d.take(uint64(d.count(1)))
	n := d.count(2)
	if d.err != nil {
		return
	}
	var own []byte
	if len(payload) > 0 {
		own = append(make([]byte, 0, len(payload)), payload...)
	}
	slot, ok := c.slotOf(id)
	if !ok {
		slot = c.newSlot()
		c.slotIDs.set(slot, id)
		c.live.set(slot, true)
		c.ids.Set(idSlot{id, slot})
	} else {
		for _, v := range c.vectors {
			v.clear(slot)
		}
	}
	c.versions.set(slot, version)
	c.setPayload(slot, own)
	for range n {
		v := d.vector(c.vectors, vec)
		if d.err != nil {
			return
		}
		c.vectors[v.number].set(slot, v.data)
	}
}

func (c *collection) applyDelete(id pointID) {
	e, ok := c.ids.Delete(idSlot{id: id})
	if !ok {
		return
	}
	c.setPayload(e.slot, nil)
	for _, v := range c.vectors {
		v.clear(e.slot)
	}
	c.live.set(e.slot, false)
	c.free = append(c.free, e.slot)
}

func (c *collection) applyPayload(d *decoder, seq uint64) {
	id := d.id()
	payload := d.take(uint64(d.count(1)))
	slot, ok := c.slotOf(id)
	if d.err != nil || !ok {
		return
	}
	var own []byte
	if len(payload) > 0 {
		own = append(make([]byte, 0, len(payload)), payload...)
	}
	c.setPayload(slot, own)
	c.versions.set(slot, seq)
}

func (c *collection) applyVectors(d *decoder, seq uint64, vec *[]float32) {
	id := d.id()
	slot, ok := c.slotOf(id)
	for range d.count(2) {
		v := d.vector(c.vectors, vec)
		if d.err != nil || !ok {
			continue
		}
		if v.removed {
			c.vectors[v.number].clear(slot)
		} else {
			c.vectors[v.number].set(slot, v.data)
		}
	}
	if ok && d.err == nil {
		c.versions.set(slot, seq)
	}
}

// commit logs the record in scratch, applies it and returns what to wait for to have it on
// disk. The caller holds writer.
//
// The record reaches the operating system before anyone can see its effect: what a reader
// saw survives a kill of the process.
func (c *collection) commit() (ticket, error) {
	seq := c.seq + 1
	t, err := c.log.append(c.scratch, seq)
	if err != nil {
		return ticket{}, err
	}
	c.seq = seq
	rec := logRecord{kind: recordKind(c.scratch[recordHeader]), seq: seq, body: c.scratch[recordHeader+1:]}
	if err := c.apply(rec, true); err != nil {
		return ticket{}, fmt.Errorf("applying a record that was just encoded: %w", err)
	}
	if cap(c.scratch) > keepScratch {
		c.scratch = nil
	}
	return t, nil
}

// keepScratch is the largest record buffer kept between writes: a batch of 256 points of
// 1,024 floats takes a little over 1 MiB.
const keepScratch = 8 << 20

// begin starts a record in scratch. The number of its items, which done puts in, is not
// known yet. The caller holds writer.
func (c *collection) begin(kind recordKind) {
	c.scratch = append(beginRecord(c.scratch, kind), make([]byte, countSize)...)
}

// snapshotChunk appends live points in id order, from the id on, to buf as the body of a
// recordPoints until buf holds limit bytes. It returns the id to continue at; done is set
// when there is none.
func (c *collection) snapshotChunk(buf []byte, from pointID, limit int) (out []byte, next pointID, points int, done bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	head := len(buf)
	buf = append(buf, make([]byte, countSize)...)
	done = true
	c.ids.Ascend(idSlot{id: from}, func(e idSlot) bool {
		if len(buf) >= limit {
			next, done = e.id, false
			return false
		}
		p := point{id: e.id, version: c.versions.at(e.slot), payload: c.payloads.at(e.slot)}
		for i, v := range c.vectors {
			if data, ok := v.get(e.slot); ok {
				p.vectors = append(p.vectors, numberedVector{number: i, data: data})
			}
		}
		buf = appendPoint(buf, c.vectors, &p)
		points++
		return true
	})
	putCount(buf[head:], points)
	return buf, next, points, done
}

// addColumn builds a payload index over the stored points. The caller holds writer.
func (c *collection) addColumn(key string, col *column) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.columns[key]; old != nil {
		old.dropped = true
	}
	for s := range c.slots {
		col.grow(s)
		if c.live.at(s) {
			col.put(s, c.payloads.at(s))
		}
	}
	c.columns[key] = col
}

// dropColumn removes a payload index. The caller holds writer.
func (c *collection) dropColumn(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.columns[key]; old != nil {
		old.dropped = true
		delete(c.columns, key)
	}
}
