package ingest_test

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// fakeIndex is an index in memory that honours insert_only and the guards, and a network in
// front of it that a test can make lose, delay, repeat and reorder requests.
type fakeIndex struct {
	mu          sync.Mutex
	collections map[string]map[corpus.ID]corpus.Point
	stamps      map[string]corpus.Stamp
	created     map[string]int // how often each name was created

	// fault, when not nil, is asked before each request.
	fault func(op string, ids []corpus.ID) fault
	// late requests are applied when the test delivers them, in any order, any number of times.
	late []lateRequest

	inserts, rewrites, metas, deletes int // points sent, by kind
	calls                             map[string]int
}

type lateRequest struct {
	op    string
	apply func()
}

// fault is what happens to one request.
type fault struct {
	lose      bool  // no effect
	late      bool  // the effect may happen later, too
	half      bool  // only the first half of the ids takes effect
	err       error // the answer, after whatever effect there is
	loseReply bool  // the effect happens, the caller sees Unavailable
	pretend   bool  // no effect, and the caller is told Completed
}

var errLost = corpus.Errorf(corpus.Unavailable, "index_unavailable", "the index cannot be reached")

func newFakeIndex() *fakeIndex {
	return &fakeIndex{collections: map[string]map[corpus.ID]corpus.Point{}, stamps: map[string]corpus.Stamp{}, created: map[string]int{}, calls: map[string]int{}}
}

func (f *fakeIndex) notFound(ix corpus.Index) error {
	return corpus.Errorf(corpus.NotFound, "index_not_found", "the collection %s does not exist", ix.QdrantName)
}

// do runs one write under the fault that the test chose. apply works on the ids given.
func (f *fakeIndex) do(ctx context.Context, op string, ix corpus.Index, ids []corpus.ID, apply func(points map[corpus.ID]corpus.Point, ids []corpus.ID)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls[op]++
	var ft fault
	if f.fault != nil {
		ft = f.fault(op, ids)
	}
	effect := func(ids []corpus.ID) bool {
		points, ok := f.collections[ix.QdrantName]
		if ok {
			apply(points, ids)
		}
		return ok
	}
	if ft.late && op != "read" { // nobody takes a late answer
		f.late = append(f.late, lateRequest{op, func() { effect(ids) }})
	}
	if ft.lose {
		if ft.err != nil {
			return ft.err
		}
		return errLost
	}
	if ft.pretend {
		return nil
	}
	done := ids
	if ft.half {
		done = ids[:len(ids)/2]
	}
	if !effect(done) {
		return f.notFound(ix)
	}
	switch {
	case ft.err != nil:
		return ft.err
	case ft.loseReply:
		return errLost
	case ft.half && len(done) > 0:
		return &corpus.PartialError{Done: slices.Clone(done), Err: errLost}
	case ft.half:
		return errLost
	}
	return nil
}

func index(pts []corpus.Point) (map[corpus.ID]corpus.Point, []corpus.ID) {
	by := make(map[corpus.ID]corpus.Point, len(pts))
	ids := make([]corpus.ID, len(pts))
	for i, p := range pts {
		by[p.ID], ids[i] = p, p.ID
	}
	return by, ids
}

func (f *fakeIndex) InsertPoints(ctx context.Context, ix corpus.Index, pts []corpus.Point) error {
	by, ids := index(pts)
	return f.do(ctx, "insert", ix, ids, func(points map[corpus.ID]corpus.Point, ids []corpus.ID) {
		for _, id := range ids {
			f.inserts++
			if _, ok := points[id]; !ok {
				points[id] = by[id]
			}
		}
	})
}

func (f *fakeIndex) RewritePoints(ctx context.Context, ix corpus.Index, pts []corpus.Point) error {
	by, ids := index(pts)
	return f.do(ctx, "rewrite", ix, ids, func(points map[corpus.ID]corpus.Point, ids []corpus.ID) {
		for _, id := range ids {
			f.rewrites++
			if old, ok := points[id]; !ok || old.Payload.MetaVersion <= by[id].Payload.MetaVersion {
				points[id] = by[id]
			}
		}
	})
}

func (f *fakeIndex) SetMetadata(ctx context.Context, ix corpus.Index, writes []corpus.MetadataWrite) error {
	by := map[corpus.ID]corpus.MetadataWrite{}
	var ids []corpus.ID
	for _, w := range writes {
		for _, id := range w.Points {
			by[id] = w
			ids = append(ids, id)
		}
	}
	return f.do(ctx, "metadata", ix, ids, func(points map[corpus.ID]corpus.Point, ids []corpus.ID) {
		for _, id := range ids {
			f.metas++
			if p, ok := points[id]; ok && p.Payload.MetaVersion < by[id].MetaVersion {
				p.Payload.MetaVersion, p.Payload.Metadata = by[id].MetaVersion, by[id].Metadata
				points[id] = p
			}
		}
	})
}

func (f *fakeIndex) DeletePoints(ctx context.Context, ix corpus.Index, ids []corpus.ID) error {
	ids = slices.Clone(ids)
	return f.do(ctx, "delete", ix, ids, func(points map[corpus.ID]corpus.Point, ids []corpus.ID) {
		for _, id := range ids {
			f.deletes++
			delete(points, id)
		}
	})
}

func (f *fakeIndex) ReadPoints(ctx context.Context, ix corpus.Index, ids []corpus.ID, _ bool) ([]corpus.PointState, error) {
	var out []corpus.PointState
	err := f.do(ctx, "read", ix, ids, func(points map[corpus.ID]corpus.Point, ids []corpus.ID) {
		for _, id := range ids {
			if p, ok := points[id]; ok {
				out = append(out, corpus.PointState{ID: id, Payload: p.Payload, HasOwner: !p.Payload.Owner.IsZero()})
			}
		}
	})
	return out, err
}

func (f *fakeIndex) CreateIndex(ctx context.Context, ix corpus.Index) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls["create"]++
	if f.fault != nil {
		if ft := f.fault("create", nil); ft.lose {
			return errLost
		}
	}
	if f.collections[ix.QdrantName] == nil {
		f.collections[ix.QdrantName] = map[corpus.ID]corpus.Point{}
		f.created[ix.QdrantName]++
	}
	return ctx.Err()
}

func (f *fakeIndex) DropIndex(ctx context.Context, ix corpus.Index) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls["drop"]++
	delete(f.collections, ix.QdrantName)
	return ctx.Err()
}

func (f *fakeIndex) ReadStamp(_ context.Context, ix corpus.Index) (corpus.Stamp, bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	st, ok := f.stamps[ix.QdrantName]
	return st, ok, nil
}

// deliver applies one late request, and keeps it for another time in half of the cases.
func (f *fakeIndex) deliver(r *rand.Rand) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.late) == 0 {
		return
	}
	i := r.IntN(len(f.late))
	f.late[i].apply()
	if r.IntN(2) == 0 {
		f.late = slices.Delete(f.late, i, i+1)
	}
}

// set replaces the fault plan.
func (f *fakeIndex) set(plan func(op string, ids []corpus.ID) fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault = plan
}

// points returns a copy of what a collection holds.
func (f *fakeIndex) points(ix corpus.Index) map[corpus.ID]corpus.Point {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.collections[ix.QdrantName])
}

// put places points behind everybody's back.
func (f *fakeIndex) put(ix corpus.Index, pts ...corpus.Point) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range pts {
		f.collections[ix.QdrantName][p.ID] = p
	}
}

func (f *fakeIndex) counts() (inserts, rewrites, metas, deletes int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.inserts, f.rewrites, f.metas, f.deletes
}
