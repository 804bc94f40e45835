package reconcile

import (
	"context"
	"encoding/binary"
	"sync"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// fetchFunc reads the next page of one side into buf, whose backing array it may reuse. It
// returns last = true with the final page, which may be empty.
type fetchFunc[T any] func(ctx context.Context, buf []T) (page []T, last bool, err error)

type fetched[T any] struct {
	page []T
	last bool
	err  error
}

// stream reads one side of the join ahead by one page, so that the two stores work while the
// other page is compared. It holds three buffers and no more: one compared, one ready, one
// being read.
type stream[T any] struct {
	pages  chan fetched[T]
	free   chan []T
	cancel context.CancelFunc
	done   sync.WaitGroup
	page   []T
	held   bool // page holds one of the three buffers
	at     int
	last   bool
}

func newStream[T any](ctx context.Context, fetch fetchFunc[T]) *stream[T] {
	ctx, cancel := context.WithCancel(ctx)
	s := &stream[T]{pages: make(chan fetched[T]), free: make(chan []T, 3), cancel: cancel}
	for range cap(s.free) {
		s.free <- nil
	}
	s.done.Go(func() {
		for {
			var f fetched[T]
			select {
			case buf := <-s.free:
				f.page, f.last, f.err = fetch(ctx, buf[:0])
			case <-ctx.Done():
				return
			}
			select {
			case s.pages <- f:
			case <-ctx.Done():
				return
			}
			if f.last || f.err != nil {
				return
			}
		}
	})
	return s
}

// close stops reading ahead and waits for the reader. It must be called once.
func (s *stream[T]) close() {
	s.cancel()
	s.done.Wait()
}

// fill makes the current page non-empty unless the side is exhausted.
func (s *stream[T]) fill(ctx context.Context) error {
	for s.at == len(s.page) && !s.last {
		select {
		case f := <-s.pages:
			if f.err != nil {
				return f.err
			}
			if s.held {
				s.free <- s.page
			}
			s.page, s.held, s.at, s.last = f.page, true, 0, f.last
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// step is what the join found at one id that is not plainly the same on both sides.
type step struct {
	id  corpus.ID
	row *corpus.LedgerRow  // nil: not in the ledger; owned by the join, valid during the call
	pt  *corpus.PointState // nil: not in the index; likewise
}

// tally counts what a join read.
type tally struct {
	compared, expected, points int64
}

// merge joins two sides that are sorted by id. It calls see for every id where the two sides
// disagree about presence, and, when every is set, also where both have it. After each page
// it calls pause with the next id to read and what was counted since the last call; merge is
// done when both sides are. Errors of the callbacks end it.
func merge(ctx context.Context, ledger *stream[corpus.LedgerRow], index *stream[corpus.PointState], every bool,
	see func(step) error, pause func(next corpus.ID, t tally) error) error {
	var t tally
	var next corpus.ID
	for {
		if err := ledger.fill(ctx); err != nil {
			return err
		}
		if err := index.fill(ctx); err != nil {
			return err
		}
		rows, pts := ledger.page[ledger.at:], index.page[index.at:]
		if len(rows) == 0 && len(pts) == 0 {
			return nil
		}
		i, j := 0, 0
		for {
			// A side that has run out of its page waits for the next one, unless there is none.
			moreRows, morePts := i < len(rows), j < len(pts)
			if !moreRows && !ledger.last || !morePts && !index.last || !moreRows && !morePts {
				break
			}
			var c int
			switch {
			case !moreRows:
				c = 1
			case !morePts:
				c = -1
			default:
				c = compareIDs(&rows[i].ID, &pts[j].ID)
			}
			t.compared++
			var st step
			switch {
			case c < 0:
				st = step{id: rows[i].ID, row: &rows[i]}
				i++
			case c > 0:
				st = step{id: pts[j].ID, pt: &pts[j]}
				j++
			default:
				st = step{id: rows[i].ID, row: &rows[i], pt: &pts[j]}
				i, j = i+1, j+1
			}
			next = st.id
			if st.pt != nil {
				t.points++
			}
			if st.row != nil && st.row.State == corpus.EntryIndexed {
				t.expected++
				if st.pt != nil && !every && !st.pt.Partial {
					continue // the healthy case, and the only hot one
				}
			}
			if err := see(st); err != nil {
				return err
			}
		}
		ledger.at += i
		index.at += j
		if t.compared == 0 {
			continue
		}
		after, ok := next.Next()
		if !ok {
			after = corpus.MaxID // the very last id; reading it twice is harmless
		}
		if err := pause(after, t); err != nil {
			return err
		}
		t = tally{}
	}
}

// compareIDs is bytes.Compare over 16 bytes, by two words.
func compareIDs(a, b *corpus.ID) int {
	x, y := binary.BigEndian.Uint64(a[:8]), binary.BigEndian.Uint64(b[:8])
	if x == y {
		x, y = binary.BigEndian.Uint64(a[8:]), binary.BigEndian.Uint64(b[8:])
	}
	switch {
	case x < y:
		return -1
	case x > y:
		return 1
	default:
		return 0
	}
}
