package faults

import (
	"maps"
	"slices"
	"sync"
	"time"
)

// Clock is simulated time: it moves when a test moves it.
type Clock struct {
	mu      sync.Mutex
	now     time.Time
	watches []func(time.Time)
}

// NewClock returns a clock that stands at start.
func NewClock(start time.Time) *Clock { return &Clock{now: start} }

// Now is the simulated time.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// Advance moves the clock and delivers what has become due, before it returns.
func (c *Clock) Advance(d time.Duration) {
	c.mu.Lock()
	c.now = c.now.Add(d)
	now, watches := c.now, slices.Clone(c.watches)
	c.mu.Unlock()
	for _, w := range watches {
		w(now)
	}
}

func (c *Clock) watch(f func(time.Time)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watches = append(c.watches, f)
}

// late holds requests that arrive later than they were sent.
type late struct {
	clock *Clock

	mu     sync.Mutex
	held   []*heldRequest
	closed bool
}

type heldRequest struct {
	due     time.Time // zero: until released
	deliver func()    // runs to the end of the effect
}

func newLate(clock *Clock) *late {
	l := &late{clock: clock}
	if clock != nil {
		clock.watch(l.release)
	}
	return l
}

// add reports false when the proxy is closed and nothing will ever be delivered.
func (l *late) add(after time.Duration, deliver func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	h := &heldRequest{deliver: deliver}
	if after > 0 && l.clock != nil {
		h.due = l.clock.Now().Add(after)
	}
	l.held = append(l.held, h)
	return true
}

// release delivers what is due, in the order of due times.
func (l *late) release(now time.Time) {
	l.mu.Lock()
	var due []*heldRequest
	l.held = slices.DeleteFunc(l.held, func(h *heldRequest) bool {
		if h.due.IsZero() || h.due.After(now) {
			return false
		}
		due = append(due, h)
		return true
	})
	l.mu.Unlock()
	slices.SortStableFunc(due, func(a, b *heldRequest) int { return a.due.Compare(b.due) })
	for _, h := range due {
		h.deliver()
	}
}

// take removes the i-th held request; nil when there is none.
func (l *late) take(i int) *heldRequest {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i < 0 || i >= len(l.held) {
		return nil
	}
	h := l.held[i]
	l.held = slices.Delete(l.held, i, i+1)
	return h
}

func (l *late) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.held)
}

func (l *late) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed, l.held = true, nil
}

// counts of faults that took effect.
type counts struct {
	mu sync.Mutex
	n  map[Kind]int
}

func (c *counts) add(k Kind) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == nil {
		c.n = map[Kind]int{}
	}
	c.n[k]++
}

func (c *counts) all() map[Kind]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.n)
}
