package reconcile

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"go.uber.org/goleak"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// The Postgres for tests is shared and lives as long as the process.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/lockstep-db/lockstep/store/postgres/pgtest.(*Server).spawn.func1"))
}

// seeded returns a random source and prints its seed.
func seeded(t testing.TB) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 7))
}

func randomID(r *rand.Rand) corpus.ID {
	var id corpus.ID
	binary.BigEndian.PutUint64(id[:8], r.Uint64())
	binary.BigEndian.PutUint64(id[8:], r.Uint64())
	return id
}

// pages serves a sorted slice in pages of random size, sometimes empty ones.
func pages[T any](seeds *rand.Rand, all []T) fetchFunc[T] {
	at, r := 0, rand.New(rand.NewPCG(seeds.Uint64(), 1)) // its own: it is read ahead in a goroutine
	return func(_ context.Context, buf []T) ([]T, bool, error) {
		n := min(r.IntN(7), len(all)-at)
		buf = append(buf, all[at:at+n]...)
		at += n
		return buf, at == len(all), nil
	}
}

func TestMergeFindsExactlyTheDifferences(t *testing.T) {
	t.Parallel()
	r := seeded(t)
	states := []corpus.EntryState{corpus.EntryNone, corpus.EntryPending, corpus.EntryIndexed, corpus.EntryIndexed, corpus.EntryIndexed, corpus.EntryFailed, corpus.EntryDead}
	for range 300 {
		var rows []corpus.LedgerRow
		var pts []corpus.PointState
		want := map[corpus.ID]corpus.FindingKind{}
		var expected, compared int64
		for range r.IntN(60) {
			id := randomID(r)
			if r.IntN(5) == 0 { // neighbours, to meet equal prefixes
				id = corpus.ID{15: byte(r.IntN(256))}
			}
			if slices.ContainsFunc(rows, func(x corpus.LedgerRow) bool { return x.ID == id }) || slices.ContainsFunc(pts, func(x corpus.PointState) bool { return x.ID == id }) {
				continue
			}
			compared++
			inLedger, inIndex := r.IntN(4) > 0, r.IntN(4) > 0
			if !inLedger && !inIndex {
				inIndex = true
			}
			var row *corpus.LedgerRow
			if inLedger {
				rows = append(rows, corpus.LedgerRow{ID: id, State: states[r.IntN(len(states))], Died: r.IntN(2) == 0})
				row = &rows[len(rows)-1]
				if row.State == corpus.EntryIndexed {
					expected++
				}
			}
			if inIndex {
				pts = append(pts, corpus.PointState{ID: id, Partial: r.IntN(10) == 0})
			}
			switch {
			case row == nil:
				want[id] = corpus.Orphan
			case row.State == corpus.EntryIndexed && (!inIndex || pts[len(pts)-1].Partial):
				want[id] = corpus.Missing
			case row.State == corpus.EntryNone && !row.Died:
				want[id] = corpus.Missing
			case (row.State == corpus.EntryDead || row.State == corpus.EntryNone) && inIndex:
				want[id] = corpus.Orphan
			}
		}
		slices.SortFunc(rows, func(a, b corpus.LedgerRow) int { return a.ID.Compare(b.ID) })
		slices.SortFunc(pts, func(a, b corpus.PointState) int { return a.ID.Compare(b.ID) })

		ctx := context.Background()
		left, right := newStream(ctx, pages(r, rows)), newStream(ctx, pages(r, pts))
		got := map[corpus.ID]corpus.FindingKind{}
		var sum tally
		last := corpus.ID{}
		err := merge(ctx, left, right, false, func(st step) error {
			if kind, ok := suspicion(st.row, st.pt); ok {
				got[st.id] = kind
			}
			return nil
		}, func(next corpus.ID, tl tally) error {
			if next.Compare(last) < 0 {
				t.Errorf("the cursor went back from %s to %s", last, next)
			}
			last = next
			sum.compared += tl.compared
			sum.expected += tl.expected
			sum.points += tl.points
			return nil
		})
		left.close()
		right.close()
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != len(want) {
			t.Fatalf("found %v, want %v", got, want)
		}
		for id, k := range want {
			if got[id] != k {
				t.Fatalf("%s: found %q, want %q", id, got[id], k)
			}
		}
		if sum.compared != compared || sum.expected != expected || sum.points != int64(len(pts)) {
			t.Fatalf("counted %+v, want %d compared, %d expected, %d points", sum, compared, expected, len(pts))
		}
	}
}

func TestMergeEndsWithTheFirstError(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	fail := func(context.Context, []corpus.LedgerRow) ([]corpus.LedgerRow, bool, error) { return nil, true, boom }
	endless := func(_ context.Context, buf []corpus.PointState) ([]corpus.PointState, bool, error) {
		return append(buf, corpus.PointState{}), false, nil
	}
	ctx := context.Background()
	left, right := newStream(ctx, fail), newStream(ctx, endless)
	defer left.close()
	defer right.close()
	err := merge(ctx, left, right, false, func(step) error { return nil }, func(corpus.ID, tally) error { return nil })
	if !errors.Is(err, boom) {
		t.Fatalf("got %v, want the reader's error", err)
	}
}

func TestMergeStopsWhenCancelled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(context.Background())
	block := func(ctx context.Context, _ []corpus.LedgerRow) ([]corpus.LedgerRow, bool, error) {
		cancel()
		<-ctx.Done()
		return nil, true, ctx.Err()
	}
	left := newStream(ctx, block)
	right := newStream(ctx, pages(rand.New(rand.NewPCG(1, 1)), []corpus.PointState{{}}))
	defer left.close()
	defer right.close()
	err := merge(ctx, left, right, false, func(step) error { return nil }, func(corpus.ID, tally) error { return nil })
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want the cancellation", err)
	}
}

func TestSplitCoversEverythingOnce(t *testing.T) {
	t.Parallel()
	lo, hi := sliceBounds(200)
	for _, c := range []struct {
		lo, hi corpus.ID
		n      int
	}{{corpus.ID{}, corpus.MaxID, 1}, {corpus.ID{}, corpus.MaxID, 2}, {corpus.ID{}, corpus.MaxID, 3}, {corpus.ID{}, corpus.MaxID, 4096}, {lo, hi, 1}, {lo, hi, 7}} {
		got := split(c.lo, c.hi, c.n)
		if len(got) != c.n || got[0][0] != c.lo || got[len(got)-1][1] != c.hi {
			t.Fatalf("split into %d: %d ranges from %s to %s", c.n, len(got), got[0][0], got[len(got)-1][1])
		}
		for i := 1; i < len(got); i++ {
			if next, ok := got[i-1][1].Next(); !ok || next != got[i][0] {
				t.Fatalf("split into %d: range %d ends at %s, the next begins at %s", c.n, i-1, got[i-1][1], got[i][0])
			}
			if got[i][0].Compare(got[i][1]) > 0 {
				t.Fatalf("split into %d: range %d is empty", c.n, i)
			}
		}
	}
}

// BenchmarkMerge is the join alone, on healthy sides: what it adds to the slower of two reads.
func BenchmarkMerge(b *testing.B) {
	const n = 200_000
	rows, pts := make([]corpus.LedgerRow, n), make([]corpus.PointState, n)
	for i := range n {
		binary.BigEndian.PutUint64(rows[i].ID[:8], uint64(i)<<40)
		rows[i].State = corpus.EntryIndexed
		pts[i].ID = rows[i].ID
	}
	b.ReportAllocs()
	for b.Loop() {
		ctx := context.Background()
		i, j := 0, 0
		left := newStream(ctx, func(_ context.Context, _ []corpus.LedgerRow) ([]corpus.LedgerRow, bool, error) {
			i += scrollPage
			return rows[i-scrollPage : i : i], i == n, nil
		})
		right := newStream(ctx, func(_ context.Context, _ []corpus.PointState) ([]corpus.PointState, bool, error) {
			j += scrollPage
			return pts[j-scrollPage : j : j], j == n, nil
		})
		if err := merge(ctx, left, right, false, func(step) error { return nil }, func(corpus.ID, tally) error { return nil }); err != nil {
			b.Fatal(err)
		}
		left.close()
		right.close()
	}
	b.ReportMetric(float64(n*b.N)/b.Elapsed().Seconds(), "ids/s")
}
