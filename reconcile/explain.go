package reconcile

import (
	"context"
	"fmt"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Explain gathers everything both stores know about one chunk or document, and the verdict.
// query is a chunk's id, a document's id or a document's external id; collection may be empty.
// NotFound where neither a collection nor a document answers to it. An index that cannot be
// read is said so on its chunks, not an error.
func (s *Service) Explain(ctx context.Context, query, collection string) (corpus.Explanation, error) {
	e, err := s.ledger.ExplainLedger(ctx, query, collection)
	if err != nil {
		return e, err
	}
	groups := map[corpus.ID][]*corpus.ExplainedChunk{}
	for i := range e.Chunks {
		c := &e.Chunks[i]
		groups[c.In.ID] = append(groups[c.In.ID], c)
	}
	held, wrong := 0, 0
	for _, group := range groups {
		if err := s.explainIndex(ctx, group); err != nil {
			return e, err
		}
		for _, c := range group {
			if c.Point != nil {
				held++
			}
			wrong += len(c.Verdicts)
		}
	}
	// An id that the ledger does not know is only worth a line where an index holds it.
	if e.Document == nil {
		kept := e.Chunks[:0]
		for _, c := range e.Chunks {
			if c.Ledger != nil || c.Point != nil || c.PointError != "" {
				kept = append(kept, c)
			}
		}
		e.Chunks = kept
	}
	switch {
	case len(e.Chunks) == 0 && e.Document == nil:
		e.Verdict = "neither store knows this id"
	case wrong > 0:
		e.Verdict = fmt.Sprintf("%d differences: see the chunks", wrong)
	default:
		e.Verdict = fmt.Sprintf("the stores agree (%d points held)", held)
	}
	return e, nil
}

func (s *Service) explainIndex(ctx context.Context, group []*corpus.ExplainedChunk) error {
	ix := group[0].In
	all := make([]corpus.ID, len(group))
	for i, c := range group {
		all[i] = c.ID
	}
	rows, err := s.ledger.ReadRows(ctx, ix, all, s.cfg.Overdue)
	if err != nil {
		return err
	}
	known := make(map[corpus.ID]*corpus.LedgerRow, len(rows))
	for i := range rows {
		known[rows[i].ID] = &rows[i]
	}
	pts, err := s.index.ReadPoints(ctx, ix, all, true)
	if err != nil {
		for _, c := range group {
			c.PointError = err.Error()
		}
		return nil
	}
	found := make(map[corpus.ID]*corpus.PointState, len(pts))
	for i := range pts {
		found[pts[i].ID] = &pts[i]
	}
	facts, err := s.ledger.RollbackFacts(ctx, ix.Collection)
	if err != nil {
		return err
	}
	j := judge{index: ix, owner: s.cfg.Owner, facts: facts, payload: true, vectors: true}
	for _, c := range group {
		pt := found[c.ID]
		if pt != nil {
			c.Point = &corpus.ExplainedPoint{
				Ours: pt.HasOwner && pt.Payload.Owner == s.cfg.Owner, Document: pt.Payload.Document, Gen: pt.Payload.Gen,
				MetaVersion: pt.Payload.MetaVersion, Checksum: pt.Payload.Checksum, Unreadable: pt.Unreadable, Partial: pt.Partial,
				Vectors: "sound",
			}
			if pt.HasOwner {
				c.Point.Owner = &pt.Payload.Owner
			}
			if why := vectorDamage(ix.Layout, pt); why != "" {
				c.Point.Vectors = why
			}
		}
		if c.Ledger == nil && pt == nil {
			continue
		}
		for _, v := range j.look(known[c.ID], pt) {
			c.Verdicts = append(c.Verdicts, corpus.ExplainedVerdict{Kind: v.kind, Detail: v.detail, Repair: v.kind.Advice().Repair})
		}
	}
	return nil
}
