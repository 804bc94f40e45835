package qdrantlocal

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/protobuf/proto"
)

// model is what a collection must hold, kept by the simplest means.
type model map[uint64]modelPoint

type modelPoint struct {
	payload map[string]any
	dense   []float32
	sparse  map[uint32]float32
}

func (m model) clone() model {
	out := model{}
	for id, p := range m {
		out[id] = modelPoint{clonePayload(p.payload), slices.Clone(p.dense), maps.Clone(p.sparse)}
	}
	return out
}

func clonePayload(m map[string]any) map[string]any {
	out := map[string]any{}
	for k, v := range m {
		out[k] = v
	}
	return out
}

// text spells the model, to compare.
func (m model) text() string {
	b, err := json.Marshal(m.plain())
	if err != nil {
		panic(err)
	}
	return string(b)
}

func (m model) plain() map[string]any {
	out := map[string]any{}
	for id, p := range m {
		out[fmt.Sprint(id)] = map[string]any{"payload": p.payload, "dense": p.dense, "sparse": p.sparse}
	}
	return out
}

// stored reads a collection back as a model.
func stored(t testing.TB, s *Server, name string) model {
	t.Helper()
	c, err := s.find(name)
	if err != nil {
		t.Fatal(err)
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	out := model{}
	c.ids.Scan(func(e idSlot) bool {
		p := modelPoint{payload: map[string]any{}}
		m, err := decodePayload(c.payloads.at(e.slot))
		if err != nil {
			t.Fatal(err)
		}
		for k, v := range m {
			p.payload[k] = plain(v)
		}
		if v, ok := c.vectors[0].get(e.slot); ok {
			p.dense = slices.Clone(v.flat)
		}
		if v, ok := c.vectors[1].get(e.slot); ok {
			p.sparse = map[uint32]float32{}
			for i, term := range v.indices {
				p.sparse[term] = v.flat[i]
			}
		}
		out[e.id.lo] = p
		return true
	})
	return out
}

func plain(v *qdrant.Value) any {
	switch k := v.GetKind().(type) {
	case *qdrant.Value_IntegerValue:
		return k.IntegerValue
	case *qdrant.Value_StringValue:
		return k.StringValue
	case *qdrant.Value_ListValue:
		out := []any{}
		for _, c := range k.ListValue.GetValues() {
			out = append(out, plain(c))
		}
		return out
	default:
		return nil
	}
}

// checkInvariants recomputes everything a collection keeps twice.
func checkInvariants(t testing.TB, s *Server, name string) {
	t.Helper()
	c, err := s.find(name)
	if err != nil {
		t.Fatal(err)
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	live := 0
	vectors := make([]int, len(c.vectors))
	for slot := range c.slots {
		for i, v := range c.vectors {
			if v.has(slot) {
				vectors[i]++
				if !c.live.at(slot) {
					t.Errorf("slot %d is free and has vector %q", slot, v.name)
				}
			}
		}
		if !c.live.at(slot) {
			if c.payloads.at(slot) != nil {
				t.Errorf("slot %d is free and has a payload", slot)
			}
			continue
		}
		live++
		id := c.slotIDs.at(slot)
		if at, ok := c.slotOf(id); !ok || at != slot {
			t.Errorf("slot %d holds %v, which is found at %d, %v", slot, id, at, ok)
		}
	}
	if live != c.ids.Len() || live+len(c.free) != int(c.slots) {
		t.Errorf("%d live slots and %d free of %d, %d ids", live, len(c.free), c.slots, c.ids.Len())
	}
	for i, v := range c.vectors {
		if v.count != vectors[i] {
			t.Errorf("vector %q: count %d, found %d", v.name, v.count, vectors[i])
		}
	}
	for key, col := range c.columns {
		fresh := newColumn(col.path, col.kind, col.text)
		for slot := range c.slots {
			fresh.grow(slot)
			if c.live.at(slot) {
				fresh.put(slot, c.payloads.at(slot))
			}
		}
		if col.points != fresh.points || len(col.counts) != len(fresh.counts) || len(col.names) != len(fresh.names) {
			t.Errorf("index %q: %d points, %d values, %d names; should be %d, %d, %d", key,
				col.points, len(col.counts), len(col.names), fresh.points, len(fresh.counts), len(fresh.names))
		}
		for n, count := range fresh.counts {
			m := n
			if col.isString() {
				m = uint64(col.names[fresh.strings[n]])
			}
			if col.counts[m] != count {
				t.Errorf("index %q: value %d counted %d times, should be %d", key, n, col.counts[m], count)
			}
		}
	}
}

// driver changes a server and a model in the same way.
type driver struct {
	t    testing.TB
	r    *rand.Rand
	ps   *pointsService
	name string
	want model
}

// newDriver makes the collection that the driver's operations fit.
func newDriver(t testing.TB, s *Server, seed uint64) *driver {
	t.Helper()
	d := &driver{t: t, r: rand.New(rand.NewPCG(seed, 7)), name: "model", want: model{}}
	d.attach(s)
	cs := &collectionsService{s: s}
	_, err := cs.Create(context.Background(), &qdrant.CreateCollection{
		CollectionName:      d.name,
		VectorsConfig:       qdrant.NewVectorsConfigMap(map[string]*qdrant.VectorParams{"dense": {Size: 3, Distance: qdrant.Distance_Dot}}),
		SparseVectorsConfig: qdrant.NewSparseVectorsConfig(map[string]*qdrant.SparseVectorParams{"sparse": {}}),
	})
	if err != nil {
		t.Fatal(err)
	}
	for f, typ := range map[string]qdrant.FieldType{"k": qdrant.FieldType_FieldTypeKeyword, "v": qdrant.FieldType_FieldTypeInteger} {
		_, err := d.ps.CreateFieldIndex(context.Background(), &qdrant.CreateFieldIndexCollection{CollectionName: d.name, FieldName: f, FieldType: typ.Enum()})
		if err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func (d *driver) attach(s *Server) { d.ps = &pointsService{s: s} }

func (d *driver) id() uint64 { return uint64(d.r.IntN(40)) }

func (d *driver) payload() map[string]any {
	p := map[string]any{}
	if d.r.IntN(4) > 0 {
		p["v"] = int64(d.r.IntN(10))
	}
	switch d.r.IntN(4) {
	case 0:
		p["k"] = []any{"a", "b", "a"}[:1+d.r.IntN(3)]
	case 1, 2:
		p["k"] = string(rune('a' + d.r.IntN(5)))
	}
	return p
}

func (d *driver) ids() (nums []uint64, sel *qdrant.PointsSelector) {
	var ids []*qdrant.PointId
	for range 1 + d.r.IntN(6) {
		n := d.id()
		nums = append(nums, n)
		ids = append(ids, qdrant.NewIDNum(n))
	}
	return nums, qdrant.NewPointsSelectorIDs(ids)
}

// existing picks ids that exist; there may be none.
func (d *driver) existing() (nums []uint64, sel *qdrant.PointsSelector) {
	nums, _ = d.ids()
	nums = slices.DeleteFunc(nums, func(n uint64) bool { _, ok := d.want[n]; return !ok })
	ids := []*qdrant.PointId{}
	for _, n := range nums {
		ids = append(ids, qdrant.NewIDNum(n))
	}
	return nums, qdrant.NewPointsSelectorIDs(ids)
}

// guard is a random filter on v, and what it means.
func (d *driver) guard() (*qdrant.Filter, func(modelPoint) bool) {
	x := float64(d.r.IntN(10))
	return &qdrant.Filter{Should: []*qdrant.Condition{qdrant.NewRange("v", &qdrant.Range{Lt: &x}), qdrant.NewIsEmpty("v")}},
		func(p modelPoint) bool {
			v, ok := p.payload["v"].(int64)
			return !ok || float64(v) < x
		}
}

// step applies one random operation to both. wait says whether to wait for the disk.
func (d *driver) step(wait bool) {
	d.t.Helper()
	ctx := context.Background()
	w := &wait
	var err error
	switch d.r.IntN(10) {
	case 0, 1, 2, 3:
		req := &qdrant.UpsertPoints{CollectionName: d.name, Wait: w, UpdateMode: qdrant.UpdateMode(d.r.IntN(3)).Enum()}
		holds := func(modelPoint) bool { return true }
		if d.r.IntN(2) == 0 {
			req.UpdateFilter, holds = d.guard()
		}
		next := map[uint64]modelPoint{}
		nums, _ := d.ids()
		for _, n := range nums {
			p := modelPoint{payload: d.payload()}
			vs := map[string]*qdrant.Vector{}
			if d.r.IntN(5) > 0 {
				p.dense = []float32{d.r.Float32(), d.r.Float32(), d.r.Float32()}
				vs["dense"] = qdrant.NewVectorDense(p.dense)
			}
			if d.r.IntN(2) == 0 {
				p.sparse = map[uint32]float32{7: d.r.Float32(), 3: d.r.Float32()}
				vs["sparse"] = qdrant.NewVectorSparse([]uint32{7, 3}, []float32{p.sparse[7], p.sparse[3]})
			}
			next[n] = p
			req.Points = append(req.Points, &qdrant.PointStruct{Id: qdrant.NewIDNum(n), Vectors: qdrant.NewVectorsMap(vs), Payload: qdrant.NewValueMap(p.payload)})
		}
		_, err = d.ps.Upsert(ctx, req)
		for n, p := range next {
			old, exists := d.want[n]
			switch {
			case !exists && req.GetUpdateMode() == qdrant.UpdateMode_UpdateOnly,
				exists && req.GetUpdateMode() == qdrant.UpdateMode_InsertOnly,
				exists && !holds(old):
			default:
				d.want[n] = p
			}
		}
	case 4:
		nums, sel := d.ids()
		_, err = d.ps.Delete(ctx, &qdrant.DeletePoints{CollectionName: d.name, Wait: w, Points: sel})
		for _, n := range nums {
			delete(d.want, n)
		}
	case 5:
		f, holds := d.guard()
		_, err = d.ps.Delete(ctx, &qdrant.DeletePoints{CollectionName: d.name, Wait: w, Points: qdrant.NewPointsSelectorFilter(f)})
		maps.DeleteFunc(d.want, func(_ uint64, p modelPoint) bool { return holds(p) })
	case 6:
		f, holds := d.guard()
		set := d.payload()
		_, err = d.ps.SetPayload(ctx, &qdrant.SetPayloadPoints{CollectionName: d.name, Wait: w, Payload: qdrant.NewValueMap(set), PointsSelector: qdrant.NewPointsSelectorFilter(f)})
		for n, p := range d.want {
			if holds(p) {
				p.payload = clonePayload(p.payload)
				maps.Copy(p.payload, set)
				d.want[n] = p
			}
		}
	case 7:
		nums, sel := d.existing()
		set := d.payload()
		_, err = d.ps.OverwritePayload(ctx, &qdrant.SetPayloadPoints{CollectionName: d.name, Wait: w, Payload: qdrant.NewValueMap(set), PointsSelector: sel})
		for _, n := range nums {
			p := d.want[n]
			p.payload = set
			d.want[n] = p
		}
	case 8:
		nums, sel := d.existing()
		_, err = d.ps.DeletePayload(ctx, &qdrant.DeletePayloadPoints{CollectionName: d.name, Wait: w, Keys: []string{"v"}, PointsSelector: sel})
		for _, n := range nums {
			p := d.want[n]
			p.payload = clonePayload(p.payload)
			delete(p.payload, "v")
			d.want[n] = p
		}
	case 9:
		nums, sel := d.existing()
		_, err = d.ps.DeleteVectors(ctx, &qdrant.DeletePointVectors{CollectionName: d.name, Wait: w, PointsSelector: sel, Vectors: &qdrant.VectorsSelector{Names: []string{"sparse"}}})
		for _, n := range nums {
			p := d.want[n]
			p.sparse = nil
			d.want[n] = p
		}
	}
	if err != nil {
		d.t.Fatal(err)
	}
}

func (d *driver) check(s *Server, what string) {
	d.t.Helper()
	if got, want := stored(d.t, s, d.name).text(), d.want.text(); got != want {
		d.t.Fatalf("%s:\ngot  %s\nwant %s", what, got, want)
	}
	checkInvariants(d.t, s, d.name)
}

func noSync(*os.File) error { return nil }

// TestModel drives random operations, compactions and restarts, and compares everything
// with the model.
func TestModel(t *testing.T) {
	t.Parallel()
	for range 4 {
		seed := uint64(time.Now().UnixNano())
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			opts := Options{fsync: noSync, LogLimitBytes: 20_000}
			s, err := Open(dir, opts)
			if err != nil {
				t.Fatal(err)
			}
			d := newDriver(t, s, seed)
			for i := range 1500 {
				d.step(d.r.IntN(2) == 0)
				if i%50 == 0 {
					d.check(s, fmt.Sprintf("after operation %d", i))
				}
				if d.r.IntN(150) == 0 {
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
					if s, err = Open(dir, opts); err != nil {
						t.Fatal(err)
					}
					d.attach(s)
					d.check(s, fmt.Sprintf("reopened after operation %d", i))
				}
			}
			files, err := os.ReadDir(filepath.Join(dir, collectionsDir))
			if err != nil || len(files) != 1 {
				t.Fatal(files, err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if size := dirSize(t, dir); size > 20*20_000 {
				t.Errorf("%d bytes on disk for %d points: compaction does not bound it", size, len(d.want))
			}
		})
	}
}

func dirSize(t testing.TB, dir string) (size int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err == nil {
			size += info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return size
}

// TestIndexedFilters: a filter answers the same from the indexes and from the payloads.
func TestFiltersAgree(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), Options{fsync: noSync})
	d := newDriver(t, s, 11)
	for range 300 {
		d.step(false)
	}
	c, err := s.find(d.name)
	if err != nil {
		t.Fatal(err)
	}
	for range 200 {
		f, _ := d.guard()
		f.Must = []*qdrant.Condition{qdrant.NewMatchExcept("k", string(rune('a'+d.r.IntN(5))))}
		with, err := compileFilter(c, f)
		if err != nil {
			t.Fatal(err)
		}
		saved := c.columns
		c.columns = nil
		without, err := compileFilter(c, proto.CloneOf(f))
		if err != nil {
			t.Fatal(err)
		}
		c.columns = saved
		if a, b := c.matching(with), c.matching(without); !slices.Equal(a, b) {
			t.Fatalf("%v: %v with the index, %v without", f, a, b)
		}
	}
}
