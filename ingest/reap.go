package ingest

import (
	"context"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// reapBatch is how many dead points one round deletes: some 20 kB of ids (unmeasured).
const reapBatch = 1000

// reapLoop deletes the points of dead entries, confirms their absence, and after the grace
// period purges their tombstones.
func (s *Service) reapLoop(ctx, drain context.Context) {
	timer := time.NewTimer(s.cfg.Poll)
	defer timer.Stop()
	var lastPurge time.Time
	for {
		live, err := s.cfg.Ledger.Indexes(ctx)
		if err != nil && ctx.Err() == nil {
			s.log.WarnContext(ctx, "listing indexes", "err", err)
		}
		purge := time.Since(lastPurge) >= s.purgeEvery()
		if purge && err == nil {
			lastPurge = time.Now()
		}
		for _, l := range live {
			if !l.Ready || l.Stopped || s.pauses.left(l.ID) > 0 {
				continue
			}
			for l.Dead && ctx.Err() == nil && s.reap(drain, l.Index) {
			}
			for purge && ctx.Err() == nil && s.purge(drain, l.Index) {
			}
		}
		timer.Reset(s.cfg.Poll)
		select {
		case <-ctx.Done():
			return
		case <-s.reapNow:
		case <-timer.C:
		}
	}
}

// purgeEvery looks for ripe tombstones ten times in a grace period, at most every minute.
func (s *Service) purgeEvery() time.Duration {
	return max(s.cfg.Poll, min(time.Minute, s.cfg.Grace/10))
}

// reap deletes one batch of dead points and confirms by reading that they are gone. It reports
// whether more may wait.
func (s *Service) reap(ctx context.Context, ix corpus.Index) bool {
	lease := corpus.Lease{Token: newToken(), Max: reapBatch, For: s.cfg.Lease}
	ids, err := s.cfg.Ledger.ClaimDead(ctx, ix.ID, lease)
	if err != nil || len(ids) == 0 {
		s.reapFailed(ctx, "claiming dead points", err)
		return false
	}
	// Whose word is it? A ledger that the index's stamp contradicts deletes nothing (P8).
	if why, err := s.contradicted(ctx, ix); err != nil || why != "" {
		if why == "" {
			why = describe(err)
		}
		s.confirm(ctx, ix, lease.Token, nil, ids, max(retryAfter(err), s.pauses.failed(ix.ID, 0)), why)
		return false
	}
	if err := s.cfg.Index.DeletePoints(ctx, ix, ids); err != nil {
		s.reapFailed(ctx, "deleting dead points", err)
		// Even those that are known to be done are looked at again: only a read tells.
		s.confirm(ctx, ix, lease.Token, nil, ids, s.pauses.failed(ix.ID, retryAfter(err)), describe(err))
		return false
	}
	s.at(StepDeleted)
	absent, present, err := s.absent(ctx, ix, ids)
	if err != nil {
		s.reapFailed(ctx, "confirming deletes", err)
		s.confirm(ctx, ix, lease.Token, nil, ids, s.pauses.failed(ix.ID, retryAfter(err)), describe(err))
		return false
	}
	s.pauses.worked(ix.ID)
	s.confirm(ctx, ix, lease.Token, absent, present, backoff(1, s.cfg.Pause, s.cfg.Pause), "the point was deleted and is still there")
	s.metrics.deleted.Add(float64(len(absent)))
	return len(ids) == lease.Max
}

func (s *Service) reapFailed(ctx context.Context, doing string, err error) {
	if err != nil && ctx.Err() == nil {
		s.log.WarnContext(ctx, "deleting from the index failed", "doing", doing, "err", err)
	}
}

// contradicted says why the index's stamp does not fit this ledger, or "".
func (s *Service) contradicted(ctx context.Context, ix corpus.Index) (string, error) {
	st, ok, err := s.cfg.Index.ReadStamp(ctx, ix)
	if err != nil || !ok {
		return "", err
	}
	why, err := s.cfg.Ledger.StampFits(ctx, ix, st)
	if why != "" {
		s.log.ErrorContext(ctx, "nothing is deleted: the index contradicts the ledger", "index", ix.QdrantName, "reason", why)
	}
	return why, err
}

// absent splits ids by whether the index holds a point of that id.
func (s *Service) absent(ctx context.Context, ix corpus.Index, ids []corpus.ID) (absent, present []corpus.ID, err error) {
	states, err := s.cfg.Index.ReadPoints(ctx, ix, ids, false)
	if err != nil {
		return nil, nil, err
	}
	there := make(map[corpus.ID]bool, len(states))
	for i := range states {
		there[states[i].ID] = true
	}
	for _, id := range ids {
		if there[id] {
			present = append(present, id)
		} else {
			absent = append(absent, id)
		}
	}
	return absent, present, nil
}

// confirm records what was read, detached from stopping. Where that fails, the lease runs out.
func (s *Service) confirm(ctx context.Context, ix corpus.Index, token corpus.ID, absent, again []corpus.ID, delay time.Duration, why string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	docs, err := s.cfg.Ledger.Confirm(ctx, ix.ID, token, absent, again, delay, why)
	if err != nil {
		s.log.WarnContext(ctx, "recording absence", "err", err)
		return
	}
	s.at(StepConfirmed)
	progress := make([]corpus.DocumentProgress, len(docs))
	for i := range docs {
		progress[i].Document = docs[i]
	}
	s.waiting.notify(progress)
}

// purge reads ripe tombstones' points once more and removes those that are absent still. A
// point that came back, from a write that was very late, is deleted again. It reports whether
// more may wait.
func (s *Service) purge(ctx context.Context, ix corpus.Index) bool {
	lease := corpus.Lease{Token: newToken(), Max: reapBatch, For: s.cfg.Lease}
	ids, err := s.cfg.Ledger.ClaimTombs(ctx, ix.ID, s.cfg.Grace, lease)
	if err != nil || len(ids) == 0 {
		s.reapFailed(ctx, "claiming tombstones", err)
		return false
	}
	absent, present, err := s.absent(ctx, ix, ids)
	if err != nil {
		s.reapFailed(ctx, "reading tombstones' points", err)
		return false // the lease runs out, and they are looked at again
	}
	if len(present) > 0 {
		s.confirm(ctx, ix, lease.Token, nil, present, 0, "a late write brought the point back")
		signal(s.reapNow)
	}
	record, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	n, err := s.cfg.Ledger.Purge(record, ix, lease.Token, absent)
	if err != nil {
		s.reapFailed(ctx, "purging tombstones", err)
		return false
	}
	s.at(StepPurged)
	s.metrics.purged.Add(float64(n))
	return len(ids) == lease.Max
}
