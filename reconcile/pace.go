package reconcile

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"golang.org/x/time/rate"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Clock is the time a Service lives in; tests inject their own.
type Clock interface {
	// Now returns the current time.
	Now() time.Time
	// Sleep blocks for d or until ctx ends, and then returns its cause.
	Sleep(ctx context.Context, d time.Duration) error
}

type systemClock struct{}

func (systemClock) Now() time.Time { return time.Now() }

func (systemClock) Sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return context.Cause(ctx)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Retries of one call to a store that is overloaded or away. With the back-off below they
// bridge about a minute; longer outages end the run, which can be resumed.
const (
	maxAttempts  = 10
	firstBackoff = 100 * time.Millisecond
	maxBackoff   = 15 * time.Second
)

// pacer bounds what a run takes from the index: points per second, and the share of the time
// in which it has a request open. One pacer is shared by all workers of a run.
type pacer struct {
	clock     Clock
	limiter   *rate.Limiter // nil: no bound
	share     float64       // 0 or 1: no bound
	throttled func()
}

func newPacer(clock Clock, perSecond int, share float64, throttled func()) *pacer {
	p := &pacer{clock: clock, share: share, throttled: throttled}
	if perSecond > 0 {
		// A burst of one page, so that a page is paid for after it was read.
		p.limiter = rate.NewLimiter(rate.Limit(perSecond), max(perSecond, scrollPage))
	}
	return p
}

// read calls f, which reads from the index, retrying while it may succeed later and waiting
// as long as the index asked to; afterwards it waits until the bounds allow the next call.
// f returns how many points it moved.
func (p *pacer) read(ctx context.Context, f func() (int, error)) error {
	began := p.clock.Now()
	n, err := f()
	for attempt := 1; err != nil; attempt++ {
		if attempt == maxAttempts || !corpus.Retryable(err) || ctx.Err() != nil {
			return err
		}
		p.throttled()
		if serr := p.clock.Sleep(ctx, backoff(attempt, err)); serr != nil {
			return serr
		}
		began = p.clock.Now()
		n, err = f()
	}
	now := p.clock.Now()
	var wait time.Duration
	if p.share > 0 && p.share < 1 {
		wait = time.Duration(float64(now.Sub(began)) * (1 - p.share) / p.share)
	}
	if p.limiter != nil && n > 0 {
		if r := p.limiter.ReserveN(now, min(n, p.limiter.Burst())); r.OK() {
			wait = max(wait, r.DelayFrom(now))
		}
	}
	if wait > 0 {
		return p.clock.Sleep(ctx, wait)
	}
	return nil
}

// retry is read without the bounds: for calls that move few points.
func (p *pacer) retry(ctx context.Context, f func() error) error {
	free := pacer{clock: p.clock, throttled: p.throttled}
	return free.read(ctx, func() (int, error) { return 0, f() })
}

// backoff honours what the store asked for; otherwise it doubles, with full jitter.
func backoff(attempt int, err error) time.Duration {
	var e *corpus.Error
	if errors.As(err, &e) && e.RetryAfter > 0 {
		return e.RetryAfter
	}
	d := min(firstBackoff<<(attempt-1), maxBackoff)
	return d/2 + rand.N(d/2+1)
}
