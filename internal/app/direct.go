package app

import (
	"context"
	"errors"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lockstep-db/lockstep/internal/config"
	"github.com/lockstep-db/lockstep/reconcile"
)

// Reconciler is the room that compares the stores.
type Reconciler = reconcile.Service

// Direct opens the stores without serving, hands the room that compares them to do, and closes
// everything again. Repairing needs the model and the workers, which are started for repair
// only. Other instances may be running on the same stores: work is leased. Beside a server
// that runs the embedded stores, it fails: they belong to one process.
func Direct(ctx context.Context, cfg config.Config, log *slog.Logger, opts Options, repair bool, do func(context.Context, *Reconciler) error) (err error) {
	a := &App{cfg: cfg, log: log.With("component", "app")}
	defer func() { err = errors.Join(err, a.Close()) }()
	reg := prometheus.NewRegistry()
	if _, err := a.openStores(ctx, reg, log); err != nil {
		return err
	}
	if !repair {
		owner, err := a.ledger.Installation(ctx)
		if err != nil {
			return err
		}
		a.openReconcile(owner, func() {}, reg, log)
		return do(ctx, a.recon)
	}
	emb := opts.Embedder
	if emb == nil {
		batcher, err := a.openModel(ctx, reg, log)
		if err != nil {
			return err
		}
		emb = batcher
	}
	if err := a.openRooms(ctx, emb, reg, log, opts.Version); err != nil {
		return err
	}
	// The workers outlive do's context: what they hold is recorded.
	working, stop := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan error, 1)
	go func() { done <- a.ingest.Run(working) }()
	err = do(ctx, a.recon)
	stop()
	return errors.Join(err, ended(<-done))
}
