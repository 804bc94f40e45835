package app

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/lockstep-db/lockstep/embedder"
	"github.com/lockstep-db/lockstep/httpapi"
	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/internal/devstack"
)

type pinger interface {
	Ping(ctx context.Context) error
}

// health asks every part once. model is nil when the embedder was replaced.
type health struct {
	ledger, index pinger
	stack         *devstack.Stack
	model         *embedder.Batcher
	warm          atomic.Bool
}

func newHealth(ledger, index pinger, stack *devstack.Stack) *health {
	return &health{ledger: ledger, index: index, stack: stack}
}

// ready says that the model is warm.
func (h *health) ready() { h.warm.Store(true) }

// stalledAfter is how long one batch may run before the device counts as dead: the longest
// batch seen, 8,192 tokens of BGE-M3 on two CPU cores, took well under a minute.
const stalledAfter = 5 * time.Minute

// Checks asks the model, Postgres and Qdrant at the same time.
func (h *health) Checks(ctx context.Context) []httpapi.Check {
	checks := []httpapi.Check{{Name: "model"}, {Name: "postgres"}, {Name: "qdrant"}}
	var group errgroup.Group
	group.Go(func() error { checks[0].Err = h.checkModel(); return nil })
	group.Go(func() error { checks[1].Err = h.ledger.Ping(ctx); return nil })
	group.Go(func() error { checks[2].Err = h.index.Ping(ctx); return nil })
	_ = group.Wait() // each check keeps its own error
	if err := h.stack.Health(); err != nil {
		checks = append(checks, httpapi.Check{Name: "embedded servers", Err: err})
	}
	return checks
}

func (h *health) checkModel() error {
	if !h.warm.Load() {
		return corpus.Errorf(corpus.Unavailable, "model_warming", "the model is being warmed up")
	}
	if h.model != nil {
		if d := h.model.Stalled(); d > stalledAfter {
			return corpus.Errorf(corpus.Unavailable, "model_stalled", "%s",
				fmt.Sprintf("a batch has been running for %s: the device may be lost; restart the service", d.Round(time.Second)))
		}
	}
	return nil
}
