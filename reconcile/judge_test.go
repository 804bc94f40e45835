package reconcile

import (
	"context"
	"errors"
	"math"
	"testing"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

var (
	us   = corpus.ID{0: 1}
	them = corpus.ID{0: 2}
	doc  = corpus.ID{0: 3}
	id   = corpus.ID{0: 4}
)

func testIndex() corpus.Index {
	return corpus.Index{ID: corpus.ID{0: 9}, Salt: corpus.ID{0: 9}, Layout: corpus.Layout{Vectors: corpus.Dense, Dim: 3}}
}

// healthy returns two sides that agree.
func healthy() (corpus.LedgerRow, corpus.PointState) {
	ix := testIndex()
	v := corpus.Vectors{Dense: []float32{1, 0, 0}}
	row := corpus.LedgerRow{ID: id, Document: doc, Gen: 10, State: corpus.EntryIndexed, MetaVersion: 11, WantMeta: 11, Version: 1}
	pt := corpus.PointState{ID: id, HasOwner: true, Vectors: &v, Payload: corpus.Payload{
		Owner: us, Document: doc, Gen: 10, MetaVersion: 11, Bucket: corpus.Bucket(ix.Salt, id), Checksum: corpus.ChecksumVectors(&v, ""),
	}}
	return row, pt
}

func TestLook(t *testing.T) {
	t.Parallel()
	type sides struct {
		row *corpus.LedgerRow
		pt  *corpus.PointState
	}
	for _, c := range []struct {
		name   string
		change func(s *sides)
		want   []corpus.FindingKind
		action corpus.RepairAction
	}{
		{"healthy", func(*sides) {}, nil, 0},
		{"missing", func(s *sides) { s.pt = nil }, []corpus.FindingKind{corpus.Missing}, corpus.RepairRewrite},
		{"on some replicas only", func(s *sides) { s.pt.Partial = true }, []corpus.FindingKind{corpus.Missing}, corpus.RepairRewrite},
		{"pending and absent", func(s *sides) { s.row.State = corpus.EntryPending; s.pt = nil }, nil, 0},
		{"pending and present", func(s *sides) { s.row.State = corpus.EntryPending }, nil, 0},
		{"no entry, live, absent", func(s *sides) { s.row.State = corpus.EntryNone; s.pt = nil }, []corpus.FindingKind{corpus.Missing}, corpus.RepairRewrite},
		{"no entry, live, present", func(s *sides) { s.row.State = corpus.EntryNone }, []corpus.FindingKind{corpus.Stuck}, corpus.RepairRewrite},
		{"no entry, dead, absent", func(s *sides) { s.row.State = corpus.EntryNone; s.row.Died = true; s.pt = nil }, nil, 0},
		{"no entry, dead, present", func(s *sides) { s.row.State = corpus.EntryNone; s.row.Died = true }, []corpus.FindingKind{corpus.Orphan}, corpus.RepairDelete},
		{"dropped, but still serving", func(s *sides) { s.row.Died = true }, nil, 0},
		{"unknown", func(s *sides) { s.row = nil }, []corpus.FindingKind{corpus.Orphan}, corpus.RepairDelete},
		{"unknown and unsigned", func(s *sides) { s.row = nil; s.pt.HasOwner = false }, []corpus.FindingKind{corpus.Foreign}, corpus.RepairDelete},
		{"unknown and signed by another", func(s *sides) { s.row = nil; s.pt.Payload.Owner = them }, []corpus.FindingKind{corpus.Foreign}, corpus.RepairDelete},
		{"unknown, gen above the sequence", func(s *sides) { s.row = nil; s.pt.Payload.Gen = 101 }, []corpus.FindingKind{corpus.RolledBack}, corpus.RepairNone},
		{"unknown, gen in a gap", func(s *sides) { s.row = nil; s.pt.Payload.Gen = 55 }, []corpus.FindingKind{corpus.RolledBack}, corpus.RepairNone},
		{"live, gen in a gap", func(s *sides) { s.pt.Payload.Gen = 50 }, []corpus.FindingKind{corpus.RolledBack}, corpus.RepairNone},
		{"dead, gen in a gap", func(s *sides) { s.row.State = corpus.EntryDead; s.pt.Payload.Gen = 60 }, []corpus.FindingKind{corpus.RolledBack}, corpus.RepairNone},
		{"another's gen means nothing", func(s *sides) { s.row = nil; s.pt.Payload.Owner = them; s.pt.Payload.Gen = 999 }, []corpus.FindingKind{corpus.Foreign}, corpus.RepairDelete},
		{"dead and present", func(s *sides) { s.row.State = corpus.EntryDead }, []corpus.FindingKind{corpus.Orphan}, corpus.RepairDelete},
		{"dead, its deletion on the way", func(s *sides) { s.row.State = corpus.EntryDead; s.row.Scheduled = true }, nil, 0},
		{"dead, its deletion given up on", func(s *sides) { s.row.State = corpus.EntryDead; s.row.Scheduled = true; s.row.Stuck = true }, []corpus.FindingKind{corpus.Stuck}, corpus.RepairRearm},
		{"dead and absent", func(s *sides) { s.row.State = corpus.EntryDead; s.pt = nil }, nil, 0},
		{"resurrected", func(s *sides) { s.row.State = corpus.EntryDead; s.row.Absent = true }, []corpus.FindingKind{corpus.Orphan}, corpus.RepairDelete},
		{"older metadata", func(s *sides) { s.pt.Payload.MetaVersion = 5 }, []corpus.FindingKind{corpus.StalePayload}, corpus.RepairMetadata},
		{"older metadata, known to the queue", func(s *sides) { s.pt.Payload.MetaVersion = 5; s.row.MetaVersion = 5 }, nil, 0},
		{"newer metadata", func(s *sides) { s.pt.Payload.MetaVersion = 12 }, []corpus.FindingKind{corpus.StalePayload}, corpus.RepairRewrite},
		{"metadata version gone", func(s *sides) { s.pt.Payload.MetaVersion = 0; s.pt.Unreadable = []string{corpus.KeyMetaVersion} }, []corpus.FindingKind{corpus.StalePayload}, corpus.RepairRewrite},
		{"another document", func(s *sides) { s.pt.Payload.Document = them }, []corpus.FindingKind{corpus.StalePayload}, corpus.RepairRewrite},
		{"another document and older metadata", func(s *sides) { s.pt.Payload.Document = them; s.pt.Payload.MetaVersion = 5 }, []corpus.FindingKind{corpus.StalePayload}, corpus.RepairRewrite},
		{"another life", func(s *sides) { s.pt.Payload.Gen = 9 }, []corpus.FindingKind{corpus.StalePayload}, corpus.RepairRewrite},
		{"live, owner gone", func(s *sides) { s.pt.HasOwner = false }, []corpus.FindingKind{corpus.StalePayload}, corpus.RepairRewrite},
		{"live, another's signature", func(s *sides) { s.pt.Payload.Owner = them }, []corpus.FindingKind{corpus.StalePayload}, corpus.RepairRewrite},
		{"wrong bucket", func(s *sides) { s.pt.Payload.Bucket++ }, []corpus.FindingKind{corpus.StalePayload}, corpus.RepairRewrite},
		{"wrong size", func(s *sides) { s.pt.Vectors.Dense = []float32{1} }, []corpus.FindingKind{corpus.CorruptVector}, corpus.RepairRewrite},
		{"no vector", func(s *sides) { s.pt.Vectors = nil }, []corpus.FindingKind{corpus.CorruptVector}, corpus.RepairRewrite},
		{"not finite", func(s *sides) { s.pt.Vectors.Dense = []float32{1, float32(math.NaN()), 0} }, []corpus.FindingKind{corpus.CorruptVector}, corpus.RepairRewrite},
		{"zero", func(s *sides) {
			s.pt.Vectors.Dense = []float32{0, 0, 0}
			s.pt.Payload.Checksum = corpus.ChecksumVectors(s.pt.Vectors, "")
		}, []corpus.FindingKind{corpus.CorruptVector}, corpus.RepairRewrite},
		{"checksum", func(s *sides) { s.pt.Vectors.Dense = []float32{0, 1, 0} }, []corpus.FindingKind{corpus.CorruptVector}, corpus.RepairRewrite},
		{"checksum gone", func(s *sides) { s.pt.Unreadable = []string{corpus.KeyChecksum} }, []corpus.FindingKind{corpus.CorruptVector}, corpus.RepairRewrite},
		{"stale and corrupt", func(s *sides) { s.pt.Payload.MetaVersion = 5; s.pt.Vectors.Dense = []float32{1} }, []corpus.FindingKind{corpus.StalePayload, corpus.CorruptVector}, corpus.RepairMetadata},
		{"failed", func(s *sides) { s.row.State = corpus.EntryFailed; s.row.Stuck = true; s.pt = nil }, []corpus.FindingKind{corpus.Stuck}, corpus.RepairRearm},
		{"lease ran out", func(s *sides) { s.row.State = corpus.EntryPending; s.row.Stuck = true }, []corpus.FindingKind{corpus.Stuck}, corpus.RepairRearm},
		{"neither side", func(s *sides) { s.row, s.pt = nil, nil }, nil, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			row, pt := healthy()
			s := sides{&row, &pt}
			c.change(&s)
			j := judge{index: testIndex(), owner: us, payload: true, vectors: true, facts: corpus.RollbackFacts{LastGen: 100, Gaps: [][2]int64{{50, 60}}}}
			got := j.look(s.row, s.pt)
			if len(got) != len(c.want) {
				t.Fatalf("got %v, want %v", got, c.want)
			}
			for i, v := range got {
				if v.kind != c.want[i] || v.detail == "" {
					t.Errorf("got %s (%s), want %s", v.kind, v.detail, c.want[i])
				}
				if i == 0 && v.action != c.action {
					t.Errorf("%s: action %d, want %d", v.kind, v.action, c.action)
				}
			}
		})
	}
}

// manual is a clock that moves only when somebody sleeps on it.
type manual struct{ now time.Time }

func (m *manual) Now() time.Time { return m.now }

func (m *manual) Sleep(ctx context.Context, d time.Duration) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	m.now = m.now.Add(d)
	return nil
}

func TestPacerHonoursWhatTheIndexAsks(t *testing.T) {
	t.Parallel()
	clock := &manual{now: time.Unix(0, 0)}
	retries := 0
	p := newPacer(clock, 0, 1, func() { retries++ })
	calls := 0
	err := p.read(context.Background(), func() (int, error) {
		if calls++; calls < 3 {
			return 0, &corpus.Error{Kind: corpus.Overloaded, Code: "rate_limited", RetryAfter: 7 * time.Second}
		}
		return 1, nil
	})
	if err != nil || calls != 3 || retries != 2 || clock.now.Unix() != 14 {
		t.Fatalf("err %v after %d calls, %d retries, %d s; want success after 3 calls and 14 s", err, calls, retries, clock.now.Unix())
	}
}

func TestPacerGivesUp(t *testing.T) {
	t.Parallel()
	clock := &manual{now: time.Unix(0, 0)}
	p := newPacer(clock, 0, 1, func() {})
	away := corpus.Errorf(corpus.Unavailable, "index_unavailable", "away")
	calls := 0
	err := p.retry(context.Background(), func() error { calls++; return away })
	if !errors.Is(err, away) || calls != maxAttempts {
		t.Fatalf("got %v after %d calls, want the error after %d", err, calls, maxAttempts)
	}
	calls = 0
	broken := corpus.Errorf(corpus.Internal, "x", "broken")
	if err := p.retry(context.Background(), func() error { calls++; return broken }); !errors.Is(err, broken) || calls != 1 {
		t.Fatalf("an error that will not pass was tried %d times", calls)
	}
}

func TestPacerBoundsRateAndShare(t *testing.T) {
	t.Parallel()
	clock := &manual{now: time.Unix(0, 0)}
	p := newPacer(clock, 20_000, 1, func() {})
	for range 10 {
		if err := p.read(context.Background(), func() (int, error) { return 10_000, nil }); err != nil {
			t.Fatal(err)
		}
	}
	// 100,000 points at 20,000 a second, less the burst.
	if got := clock.now.Sub(time.Unix(0, 0)); got < 3900*time.Millisecond || got > 5*time.Second {
		t.Errorf("took %s, want 4 to 5 s", got)
	}
	clock = &manual{now: time.Unix(0, 0)}
	p = newPacer(clock, 0, 0.1, func() {})
	for range 10 {
		if err := p.read(context.Background(), func() (int, error) { clock.now = clock.now.Add(time.Second); return 1, nil }); err != nil {
			t.Fatal(err)
		}
	}
	if got := clock.now.Sub(time.Unix(0, 0)); got != 100*time.Second {
		t.Errorf("10 s of reading took %s at a share of a tenth, want 100 s", got)
	}
}

func TestHintQueueIsBoundedAndDistinct(t *testing.T) {
	t.Parallel()
	q := newHintQueue(3)
	a, b := corpus.Index{ID: corpus.ID{0: 1}}, corpus.Index{ID: corpus.ID{0: 2}}
	for i, want := range []struct {
		ix  corpus.Index
		id  byte
		put string
	}{{a, 1, "queued"}, {b, 1, "queued"}, {a, 1, "known"}, {a, 2, "queued"}, {a, 3, "dropped"}} {
		if got := q.put(want.ix, corpus.ID{0: want.id}); got != want.put {
			t.Errorf("hint %d was %s, want %s", i, got, want.put)
		}
	}
	ix, ids := q.take(10)
	if ix.ID != a.ID || len(ids) != 2 {
		t.Errorf("took %d hints of %s, want the 2 of the index that was first", len(ids), ix.ID)
	}
	if ix, ids = q.take(10); ix.ID != b.ID || len(ids) != 1 {
		t.Errorf("then took %d hints of %s", len(ids), ix.ID)
	}
	if _, ids = q.take(10); len(ids) != 0 || len(q.indexes) != 0 {
		t.Error("the queue is not empty")
	}
}
