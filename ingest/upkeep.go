package ingest

import (
	"context"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// sweepBatch is how many unswitched documents of a collection one round tests (unmeasured).
const sweepBatch = 1000

// upkeepLoop brings indexes to life, switches those that are complete, drops retired ones, and
// sweeps documents whose switch nobody made.
func (s *Service) upkeepLoop(ctx context.Context) {
	cursors := map[corpus.ID]corpus.ID{}
	timer := time.NewTimer(s.cfg.Upkeep)
	defer timer.Stop()
	for {
		s.upkeep(ctx, cursors)
		timer.Reset(s.cfg.Upkeep)
		select {
		case <-ctx.Done():
			return
		case <-s.upkeepNow:
		case <-timer.C:
		}
	}
}

func (s *Service) upkeep(ctx context.Context, cursors map[corpus.ID]corpus.ID) {
	warn := func(doing string, err error) {
		if err != nil && ctx.Err() == nil {
			s.log.WarnContext(ctx, "upkeep failed", "doing", doing, "err", err)
		}
	}
	live, err := s.cfg.Ledger.Indexes(ctx)
	if err != nil {
		warn("listing indexes", err)
		return
	}
	for _, l := range live {
		if !l.Ready {
			warn("creating an index", s.bringUp(ctx, l.Index))
			continue
		}
		if l.State == corpus.IndexBuilding && l.Oldest.IsZero() {
			switched, err := s.cfg.Ledger.SwitchIndex(ctx, l.Index)
			warn("switching indexes", err)
			if switched {
				s.log.InfoContext(ctx, "an index took over", "collection", l.CollectionName, "index", l.QdrantName)
				s.names.forget(l.CollectionName)
			}
		}
		if l.State == corpus.IndexServing {
			moved, next, err := s.cfg.Ledger.Sweep(ctx, l.Collection, cursors[l.Collection], sweepBatch)
			warn("sweeping unswitched documents", err)
			if next.IsZero() {
				delete(cursors, l.Collection)
			} else {
				cursors[l.Collection] = next
			}
			s.waiting.notify(moved)
		}
	}
	retired, err := s.cfg.Ledger.RetiredIndexes(ctx)
	warn("listing retired indexes", err)
	for _, ix := range retired {
		// Names are never used twice, so a drop that is late or repeated hits nothing else.
		if err := s.cfg.Index.DropIndex(ctx, ix); err != nil {
			warn("dropping a retired index", err)
			continue
		}
		s.at(StepIndexDropped)
		warn("forgetting a retired index", s.cfg.Ledger.ForgetIndex(ctx, ix.ID))
	}
	warn("clearing deleted collections", s.cfg.Ledger.ClearCollections(ctx))
}

// bringUp creates the Qdrant collection of an index that never had one. It is never called for
// one that did: what is gone then was lost, and is built again under a new name.
func (s *Service) bringUp(ctx context.Context, ix corpus.Index) error {
	if err := s.cfg.Index.CreateIndex(ctx, ix); err != nil {
		return err
	}
	s.at(StepIndexCreated)
	if err := s.cfg.Ledger.IndexReady(ctx, ix.ID); err != nil {
		return err
	}
	signal(s.claimNow)
	return nil
}
