package search

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

func key(text string) cacheKey {
	return cacheKey{fingerprint: "f", heads: corpus.Dense, text: text}
}

// computed answers each key with a vector of its text's length, and records what it was asked.
type computed struct {
	mu    sync.Mutex
	asked []string
	wait  func(ctx context.Context) error
}

func (c *computed) embed(ctx context.Context, keys []cacheKey) ([]corpus.Embedding, error) {
	c.mu.Lock()
	for _, k := range keys {
		c.asked = append(c.asked, k.text)
	}
	c.mu.Unlock()
	if c.wait != nil {
		if err := c.wait(ctx); err != nil {
			return nil, err
		}
	}
	out := make([]corpus.Embedding, len(keys))
	for i, k := range keys {
		if strings.HasPrefix(k.text, "bad") {
			out[i].Err = errors.New("bad text")
			continue
		}
		out[i].Vectors.Dense = []float32{float32(len(k.text))}
	}
	return out, nil
}

func (c *computed) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.asked)
}

func TestCacheKeepsAndForgets(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	now := time.Unix(0, 0)
	c := newCache(1<<20, time.Minute, func() time.Time { return now })
	var e computed
	for range 2 {
		got, errs, err := c.get(ctx, []cacheKey{key("a"), key("bb"), key("a"), key("bad")}, e.embed)
		if err != nil || errs[0] != nil || errs[3] == nil {
			t.Fatal(err, errs)
		}
		if got[0].Dense[0] != 1 || got[1].Dense[0] != 2 || got[2] != got[0] || got[3] != nil {
			t.Fatalf("wrong vectors: %+v", got)
		}
	}
	// "a" and "bb" once; a failure is not kept.
	if e.count() != 4 {
		t.Errorf("computed %v", e.asked)
	}
	now = now.Add(2 * time.Minute)
	if _, _, err := c.get(ctx, []cacheKey{key("a")}, e.embed); err != nil || e.count() != 5 {
		t.Errorf("an expired entry was used: %v, %v", e.asked, err)
	}
	other := cacheKey{fingerprint: "g", heads: corpus.Dense, text: "a"}
	if _, _, err := c.get(ctx, []cacheKey{other}, e.embed); err != nil || e.count() != 6 {
		t.Errorf("another model's entry was used: %v, %v", e.asked, err)
	}
}

func TestCacheIsBoundedByBytes(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	const limit = 64 << 10
	c := newCache(limit, time.Hour, time.Now)
	var e computed
	for i := range 2000 {
		text := strings.Repeat("x", i%50) + string(rune('a'+i%26))
		if _, _, err := c.get(ctx, []cacheKey{key(text), key(strings.Repeat("long", 1<<12))}, e.embed); err != nil {
			t.Fatal(err)
		}
		if c.bytes > limit || c.bytes < 0 {
			t.Fatalf("%d bytes of %d", c.bytes, limit)
		}
	}
	for c.lru.Len() > 0 {
		c.lru.RemoveOldest()
	}
	if c.bytes != 0 {
		t.Errorf("an empty cache counts %d bytes", c.bytes)
	}
	off := newCache(-1, time.Hour, time.Now)
	before := e.count()
	for range 2 {
		if _, _, err := off.get(ctx, []cacheKey{key("a")}, e.embed); err != nil {
			t.Fatal(err)
		}
	}
	if e.count() != before+2 {
		t.Error("a cache that is off keeps entries")
	}
}

func TestConcurrentQueriesAreComputedOnce(t *testing.T) {
	t.Parallel()
	c := newCache(1<<20, time.Hour, time.Now)
	started, release := make(chan struct{}, 16), make(chan struct{})
	e := computed{wait: func(context.Context) error { started <- struct{}{}; <-release; return nil }}
	var wg sync.WaitGroup
	shared := make(chan struct{}, 64)
	c.shared = func() { shared <- struct{}{} }
	for range 8 {
		wg.Go(func() {
			got, _, err := c.get(context.Background(), []cacheKey{key("same")}, e.embed)
			if err != nil || got[0].Dense[0] != 4 {
				t.Error(got, err)
			}
		})
	}
	<-started
	for range 7 {
		<-shared // all others wait for the first
	}
	close(release)
	wg.Wait()
	if e.count() != 1 {
		t.Errorf("computed %d times", e.count())
	}
}

// TestALeavingCallerTakesNobodyAlong: the one who computes leaves; who waits computes anew.
func TestALeavingCallerTakesNobodyAlong(t *testing.T) {
	t.Parallel()
	c := newCache(1<<20, time.Hour, time.Now)
	shared := make(chan struct{}, 1)
	c.shared = func() { shared <- struct{}{} }
	started := make(chan struct{}, 1)
	leaving := computed{wait: func(ctx context.Context) error { started <- struct{}{}; <-ctx.Done(); return ctx.Err() }}
	staying := computed{}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, _, err := c.get(ctx, []cacheKey{key("q")}, leaving.embed); !errors.Is(err, context.Canceled) {
			t.Errorf("the leaving caller got %v", err)
		}
	})
	<-started
	wg.Go(func() {
		got, _, err := c.get(context.Background(), []cacheKey{key("q")}, staying.embed)
		if err != nil || got[0].Dense[0] != 1 {
			t.Errorf("the staying caller got %v, %v", got, err)
		}
	})
	<-shared
	cancel()
	wg.Wait()
	// A waiter whose own time is up leaves as well.
	release := make(chan struct{})
	block := computed{wait: func(context.Context) error { started <- struct{}{}; <-release; return nil }}
	wg.Go(func() { _, _, _ = c.get(context.Background(), []cacheKey{key("slow")}, block.embed) })
	<-started
	ctx, cancel = context.WithCancel(context.Background())
	wg.Go(func() { <-shared; cancel() })
	if _, _, err := c.get(ctx, []cacheKey{key("slow")}, staying.embed); !errors.Is(err, context.Canceled) {
		t.Errorf("a waiter without time got %v", err)
	}
	close(release)
	wg.Wait()
}

func TestAPanicLandsItsFlights(t *testing.T) {
	t.Parallel()
	c := newCache(1<<20, time.Hour, time.Now)
	func() {
		defer func() { _ = recover() }()
		_, _, _ = c.get(context.Background(), []cacheKey{key("q")}, func(context.Context, []cacheKey) ([]corpus.Embedding, error) { panic("boom") })
	}()
	var e computed
	if _, _, err := c.get(context.Background(), []cacheKey{key("q")}, e.embed); err != nil || e.count() != 1 {
		t.Errorf("after a panic: %v, %d", err, e.count())
	}
}
