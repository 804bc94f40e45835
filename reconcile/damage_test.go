package reconcile_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"

	qc "github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

var (
	matrixSeed = flag.Uint64("reconcile.seed", 0, "seed of the damage matrix; 0 draws one")
	matrixSize = flag.Int("reconcile.points", 1000, "points of the collection that mixtures of damage are tried on")
)

// damage is one way to spoil one point.
type damage struct {
	name string
	kind corpus.FindingKind
	// from is the shallowest depth that promises to see it.
	from corpus.Depth
	do   func(w *world, v *victim) corpus.ID
	// restores is true where a repair brings back the point that was there.
	restores bool
}

// victim is what a damage may use: a live point of its own, one that was deleted and confirmed
// absent, and the source of random.
type victim struct {
	r    *rand.Rand
	live corpus.ID
	dead corpus.PointState
	was  corpus.PointState
}

var damages = []damage{
	{name: "missing", kind: corpus.Missing, from: corpus.Quick, restores: true, do: func(w *world, v *victim) corpus.ID {
		w.must(w.index.DeletePoints(w.ctx(), w.ix(), []corpus.ID{v.live}))
		return v.live
	}},
	{name: "unknown orphan", kind: corpus.Orphan, from: corpus.Quick, do: func(w *world, v *victim) corpus.ID {
		p := w.point(randomUUID(v.r), randomUUID(v.r), 1, v.r)
		w.must(w.index.InsertPoints(w.ctx(), w.ix(), []corpus.Point{p}))
		return p.ID
	}},
	{name: "resurrected", kind: corpus.Orphan, from: corpus.Quick, do: func(w *world, v *victim) corpus.ID {
		w.must(w.index.InsertPoints(w.ctx(), w.ix(), []corpus.Point{{ID: v.dead.ID, Vectors: *v.dead.Vectors, Payload: v.dead.Payload}}))
		return v.dead.ID
	}},
	{name: "unsigned", kind: corpus.Foreign, from: corpus.Quick, do: func(w *world, v *victim) corpus.ID {
		id := randomUUID(v.r)
		w.upsert(id, []float32{1, 2, 3, 4, 5, 6, 7, 8}, map[string]*qc.Value{"some": qc.NewValueString("thing")})
		return id
	}},
	{name: "another installation's", kind: corpus.Foreign, from: corpus.Quick, do: func(w *world, v *victim) corpus.ID {
		p := w.point(randomUUID(v.r), randomUUID(v.r), 1<<40, v.r)
		p.Payload.Owner = randomUUID(v.r)
		w.must(w.index.InsertPoints(w.ctx(), w.ix(), []corpus.Point{p}))
		return p.ID
	}},
	{name: "older metadata", kind: corpus.StalePayload, from: corpus.Deep, do: func(w *world, v *victim) corpus.ID {
		w.setPayload(v.live, corpus.KeyMetaVersion, qc.NewValueInt(0))
		w.setPayload(v.live, corpus.KeyMetadata, qc.NewValueFromFields(map[string]*qc.Value{"old": qc.NewValueBool(true)}))
		return v.live
	}, restores: true},
	{name: "newer metadata", kind: corpus.StalePayload, from: corpus.Deep, do: func(w *world, v *victim) corpus.ID {
		w.setPayload(v.live, corpus.KeyMetaVersion, qc.NewValueInt(v.was.Payload.MetaVersion+1000))
		return v.live
	}},
	{name: "metadata version is a word", kind: corpus.StalePayload, from: corpus.Deep, do: func(w *world, v *victim) corpus.ID {
		w.setPayload(v.live, corpus.KeyMetaVersion, qc.NewValueString("seven"))
		return v.live
	}, restores: true},
	{name: "another document", kind: corpus.StalePayload, from: corpus.Deep, do: func(w *world, v *victim) corpus.ID {
		w.setPayload(v.live, corpus.KeyDocument, qc.NewValueString(randomUUID(v.r).String()))
		return v.live
	}, restores: true},
	{name: "another life", kind: corpus.StalePayload, from: corpus.Deep, do: func(w *world, v *victim) corpus.ID {
		w.setPayload(v.live, corpus.KeyGen, qc.NewValueInt(v.was.Payload.Gen-1))
		return v.live
	}, restores: true},
	{name: "owner lost", kind: corpus.StalePayload, from: corpus.Quick, do: func(w *world, v *victim) corpus.ID {
		w.deletePayload(v.live, corpus.KeyOwner)
		return v.live
	}, restores: true},
	{name: "bucket lost", kind: corpus.StalePayload, from: corpus.Quick, do: func(w *world, v *victim) corpus.ID {
		w.deletePayload(v.live, corpus.KeyBucket)
		return v.live
	}, restores: true},
	{name: "vector changed", kind: corpus.CorruptVector, from: corpus.Deep, do: func(w *world, v *victim) corpus.ID {
		w.upsert(v.live, []float32{1, 2, 3, 4, 5, 6, 7, 8}, w.payloadOf(v.live))
		return v.live
	}, restores: true},
	{name: "vector zero", kind: corpus.CorruptVector, from: corpus.Deep, do: func(w *world, v *victim) corpus.ID {
		payload := w.payloadOf(v.live)
		zero := corpus.Vectors{Dense: make([]float32, 8)}
		payload[corpus.KeyChecksum] = qc.NewValueString(corpus.ChecksumVectors(&zero, ""))
		w.upsert(v.live, zero.Dense, payload)
		return v.live
	}, restores: true},
	{name: "checksum lost", kind: corpus.CorruptVector, from: corpus.Deep, do: func(w *world, v *victim) corpus.ID {
		w.deletePayload(v.live, corpus.KeyChecksum)
		return v.live
	}, restores: true},
	{name: "given up", kind: corpus.Stuck, from: corpus.Quick, do: func(w *world, v *victim) corpus.ID {
		w.exec(`UPDATE index_entries SET state = 'failed', attempts = 8, last_error = 'refused' WHERE index_id = $1 AND chunk_id = $2`, w.ix().ID, v.live)
		return v.live
	}, restores: true},
	{name: "entry lost", kind: corpus.Stuck, from: corpus.Full, do: func(w *world, v *victim) corpus.ID {
		w.exec(`DELETE FROM index_entries WHERE index_id = $1 AND chunk_id = $2`, w.ix().ID, v.live)
		return v.live
	}, restores: true},
}

// sees is the table of docs/reconcile.md: which depth sees what.
func sees(at corpus.Depth, d damage) bool {
	order := map[corpus.Depth]int{corpus.Quick: 0, corpus.Full: 1, corpus.Deep: 2}
	switch d.name {
	case "owner lost", "bucket lost":
		// Full reads ids alone; quick meets the count of a bucket, deep the payload.
		return at != corpus.Full
	case "entry lost":
		// Quick counts entries, and the point is there: one more than expected.
		return true
	}
	return order[at] >= order[d.from]
}

// hidden names the damage that quick cannot see because of what else happened in its bucket:
// one more and one less than expected cancel, and what is not settled may be there or not.
func hidden(w *world, want map[corpus.ID]damage) map[corpus.ID]bool {
	type bucket struct {
		points, settled, unsettled int
		ids                        []corpus.ID
	}
	buckets := map[uint32]*bucket{}
	for id, d := range want {
		n := corpus.Bucket(w.ix().Salt, id)
		b := buckets[n]
		if b == nil {
			b = &bucket{}
			buckets[n] = b
		}
		switch d.name {
		case "missing":
			b.points--
		case "unknown orphan", "resurrected":
			b.points++
		case "owner lost", "bucket lost":
			b.points--
			continue // found among the points that no bucket counts
		case "given up":
			b.settled--
			b.unsettled++
			continue // found in the queue
		case "entry lost":
			b.settled--
		default:
			continue
		}
		b.ids = append(b.ids, id)
	}
	out := map[corpus.ID]bool{}
	for _, b := range buckets {
		if more := b.points - b.settled; more >= 0 && more <= b.unsettled {
			for _, id := range b.ids {
				out[id] = true
			}
		}
	}
	return out
}

// ruin prepares n victims and applies each damage to its own.
func ruin(w *world, r *rand.Rand, live []corpus.ID, dead []corpus.PointState, which []damage) (want map[corpus.ID]damage, spoiled map[corpus.ID]bool) {
	w.t.Helper()
	want, spoiled = map[corpus.ID]damage{}, map[corpus.ID]bool{}
	before := w.points()
	for i, d := range which {
		v := &victim{r: r, live: live[i], was: before[live[i]], dead: dead[i]}
		id := d.do(w, v)
		want[id], spoiled[id] = d, true
	}
	return want, spoiled
}

// tombs makes n points that were deleted and confirmed absent, as they were.
func (w *world) tombs(n int) []corpus.PointState {
	w.t.Helper()
	ids := w.fill(1_000_000, n)
	all := w.points()
	for i := range n {
		_, err := w.write.Delete(w.ctx(), name, fmt.Sprintf("doc/%d", 1_000_000+i), true)
		w.must(err)
	}
	w.settled()
	out := make([]corpus.PointState, n)
	for i, id := range ids {
		out[i] = all[id]
	}
	return out
}

// check compares a report with what was done, at a depth.
func check(t testing.TB, at corpus.Depth, want map[corpus.ID]damage, rep corpus.RunReport, found []corpus.Finding) {
	t.Helper()
	if rep.State != corpus.RunDone && rep.State != corpus.RunBraked {
		t.Fatalf("the run ended as %s: %s", rep.State, rep.Error)
	}
	expected := map[corpus.ID]corpus.FindingKind{}
	for id, d := range want {
		if sees(at, d) {
			expected[id] = d.kind
		}
	}
	for _, f := range found {
		k, ok := expected[f.ID]
		switch {
		case !ok:
			t.Errorf("%s: false finding %s of %s (%s): %s", at, f.Kind, f.ID, want[f.ID].name, f.Detail)
		case k != f.Kind:
			t.Errorf("%s: %s (%s) found as %s: %s", at, f.ID, want[f.ID].name, f.Kind, f.Detail)
		}
		delete(expected, f.ID)
	}
	for id := range expected {
		t.Errorf("%s: %q of %s was not found", at, want[id].name, id)
	}
}

func clean(t testing.TB, rep corpus.RunReport, found []corpus.Finding) {
	t.Helper()
	if rep.State != corpus.RunDone {
		t.Fatalf("the run ended as %s: %s", rep.State, rep.Error)
	}
	for _, f := range found {
		t.Errorf("a clean run found %s of %s: %s", f.Kind, f.ID, f.Detail)
	}
	for _, c := range rep.Collections {
		if c.Status != corpus.Consistent {
			t.Errorf("collection %s is %s", c.Collection, c.Status)
		}
	}
}

func source(t testing.TB) *rand.Rand {
	t.Helper()
	seed := *matrixSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// TestDamageMatrix: each damage alone and random mixtures of all, on collections of several
// sizes: exactly what was done is found at the depths that promise to see it, the healthy
// points stay byte for byte, a repairing run repairs it, and the next finds nothing.
func TestDamageMatrix(t *testing.T) {
	sizes := []int{len(damages), 1000}
	for _, size := range sizes {
		t.Run(fmt.Sprintf("each alone, %d points", size), func(t *testing.T) {
			w := newWorld(t)
			live := w.fill(0, size)
			dead := w.tombs(len(damages))
			for i, d := range damages {
				t.Run(d.name, func(t *testing.T) {
					w := w.in(t)
					r := source(t)
					before := w.points()
					want, spoiled := ruin(w, r, []corpus.ID{live[i]}, []corpus.PointState{dead[i]}, []damage{d})
					prove(w, before, want, spoiled)
				})
			}
		})
	}
	t.Run("mixtures", func(t *testing.T) {
		w := newWorld(t)
		const rounds, most = 4, 60
		live := w.fill(0, *matrixSize)
		dead := w.tombs(rounds * most)
		for round := range rounds {
			t.Run(fmt.Sprint(round), func(t *testing.T) {
				w := w.in(t)
				r := source(t)
				before := w.points()
				n := 1 + r.IntN(most)
				which := make([]damage, n)
				for i := range which {
					which[i] = damages[r.IntN(len(damages))]
				}
				r.Shuffle(len(live), func(i, j int) { live[i], live[j] = live[j], live[i] })
				want, spoiled := ruin(w, r, live, dead[round*most:], which)
				prove(w, before, want, spoiled)
			})
		}
	})
	t.Run("empty", func(t *testing.T) {
		w := newWorld(t)
		w.fill(0, 1)
		_, err := w.write.Delete(w.ctx(), name, "doc/0", true)
		w.must(err)
		w.settled()
		for _, depth := range []corpus.Depth{corpus.Quick, corpus.Full, corpus.Deep} {
			rep, found := w.run(corpus.ReconcileRequest{Collection: name, Depth: depth})
			clean(t, rep, found)
		}
	})
}

// in is the same world under a subtest.
func (w *world) in(t testing.TB) *world {
	c := *w
	c.t = t
	return &c
}

// prove detects at every depth, repairs, and checks that nothing else was touched.
func prove(w *world, before map[corpus.ID]corpus.PointState, want map[corpus.ID]damage, spoiled map[corpus.ID]bool) {
	w.t.Helper()
	spoilt := w.points()
	found := map[corpus.Depth]bool{}
	blind := hidden(w, want)
	for _, depth := range []corpus.Depth{corpus.Quick, corpus.Full, corpus.Deep} {
		rep, got := w.run(corpus.ReconcileRequest{Collection: name, Depth: depth})
		// What a shallower run found is looked at again by every later one.
		reach := map[corpus.ID]damage{}
		for id, d := range want {
			seen := sees(depth, d) && !(depth == corpus.Quick && blind[id])
			for earlier := range found {
				seen = seen || sees(earlier, d) && !(earlier == corpus.Quick && blind[id])
			}
			if seen {
				d.name, d.from = "", corpus.Quick
				reach[id] = d
			}
		}
		check(w.t, depth, reach, rep, got)
		found[depth] = true
	}
	sameExcept(w.t, spoilt, w.points(), nil)

	rep, _ := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep, Repair: true, MaxDeletes: 1})
	for _, c := range rep.Collections {
		for k, n := range c.Findings {
			if k != corpus.Foreign && c.Repaired[k] != n {
				w.t.Errorf("%s: %d of %d repaired", k, c.Repaired[k], n)
				for _, f := range c.Sample {
					if f.Kind == k && !f.Repaired {
						w.t.Errorf("  %s: %s", f.ID, f.Detail)
					}
				}
			}
		}
	}
	foreign := false
	for _, d := range want {
		foreign = foreign || d.kind == corpus.Foreign
	}
	if foreign {
		w.forget(want)
	}
	w.settled()
	rep, got := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Deep})
	clean(w.t, rep, got)
	after := w.points()
	sameExcept(w.t, before, after, spoiled)
	for id, d := range want {
		is, there := after[id]
		switch {
		case d.kind == corpus.Orphan && there:
			w.t.Errorf("%s: orphan %s is still there", d.name, id)
		case d.restores && !there:
			w.t.Errorf("%s: point %s did not come back", d.name, id)
		case d.restores && is.Payload.Metadata["n"] == nil:
			w.t.Errorf("%s: point %s came back without its metadata: %+v", d.name, id, is.Payload)
		}
	}
}

// forget deletes foreign points by naming each owner.
func (w *world) forget(want map[corpus.ID]damage) {
	w.t.Helper()
	owners := map[string]bool{}
	pts := w.points()
	for id, d := range want {
		if d.kind != corpus.Foreign {
			continue
		}
		p, ok := pts[id]
		if !ok {
			w.t.Errorf("foreign point %s was deleted without being named", id)
			continue
		}
		if p.HasOwner {
			owners[p.Payload.Owner.String()] = true
		} else {
			owners["none"] = true
		}
	}
	for owner := range owners {
		rep, _ := w.run(corpus.ReconcileRequest{Collection: name, Depth: corpus.Full, Repair: true, MaxDeletes: 1, DeleteForeign: owner})
		if rep.State != corpus.RunDone {
			w.t.Fatalf("deleting foreign points: %s %s", rep.State, rep.Error)
		}
	}
}
