package ingest

import (
	"context"
	"errors"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Ingest records documents of one collection and answers one result for each, in order. An
// error means that the request as a whole was refused, or that nothing is known to be accepted
// (Unavailable: sending it again is harmless). Without Wait it returns once the documents are
// durable; with Wait once each version, or a later one, serves, was superseded or failed. When
// ctx ends during that wait the rest is reported as accepted.
func (s *Service) Ingest(ctx context.Context, req corpus.IngestRequest) ([]corpus.DocumentResult, error) {
	if err := checkRequest(&req); err != nil {
		return nil, err
	}
	out, err := s.ingest(ctx, &req)
	if corpus.CodeOf(err) == "collection_not_found" {
		// Deleted by another instance since it was looked up. Its name is free: begin again.
		s.names.forget(req.Collection)
		out, err = s.ingest(ctx, &req)
	}
	return out, err
}

func (s *Service) ingest(ctx context.Context, req *corpus.IngestRequest) ([]corpus.DocumentResult, error) {
	t, err := s.ensure(ctx, req.Collection)
	if err != nil {
		return nil, err
	}
	out := make([]corpus.DocumentResult, len(req.Documents))
	valid := make([]*pendingDoc, 0, len(req.Documents))
	for i := range req.Documents {
		in := &req.Documents[i]
		out[i].ID = in.ID
		doc, bad := prepare(t, in)
		if bad != nil {
			out[i].Status, out[i].Err = corpus.StatusFailed, bad
			s.metrics.documents.WithLabelValues("invalid").Inc()
			continue
		}
		valid = append(valid, &pendingDoc{in: in, place: i, t: t, doc: doc})
	}
	s.at(StepValidated)
	var c *watch
	if req.Wait {
		ids := make([]corpus.ID, len(valid))
		for i, d := range valid {
			ids[i] = corpus.DocumentID(t.ID, d.doc.ExternalID)
		}
		c = s.waiting.add(ids)
		defer s.waiting.remove(c)
	}
	if err := s.decide(ctx, t, valid); err != nil {
		return nil, err
	}
	var failed error
	accepted := 0
	for _, d := range valid {
		if r := &out[d.place]; d.err != nil {
			failed = d.err
			r.Status, r.Err = corpus.StatusFailed, asError(d.err)
		} else {
			accepted++
			r.DocumentID, r.Version, r.PointIDs = d.got.Document, d.got.Version, d.got.PointIDs
			r.Chunks, r.ChunksEmbedded = len(d.got.PointIDs), d.got.NewChunks
			r.Status = corpus.StatusAccepted
			if d.got.Acceptance == corpus.Unchanged {
				r.Status = corpus.StatusUnchanged
			}
		}
	}
	if accepted == 0 && failed != nil && corpus.KindOf(failed) != corpus.Invalid {
		return nil, failed // nothing was accepted, and not for a fault of the documents
	}
	if req.Wait {
		s.await(ctx, t.ID, c, valid, out)
	}
	return out, nil
}

// decide brings documents to the ledger: first by a comparison without locks, which settles
// what did not change, then the rest through shared transactions, texts cut by then.
func (s *Service) decide(ctx context.Context, t *target, docs []*pendingDoc) error {
	if len(docs) == 0 {
		return nil
	}
	prepared := make([]corpus.PreparedDocument, len(docs))
	for i, d := range docs {
		prepared[i] = d.doc
	}
	got, err := s.cfg.Ledger.Unchanged(ctx, t.ID, prepared)
	if err != nil {
		return err
	}
	var send, uncut []*pendingDoc
	for i, d := range docs {
		switch got[i].Acceptance {
		case corpus.Unchanged:
			d.got = got[i]
			s.metrics.documents.WithLabelValues("unchanged").Inc()
			continue
		case corpus.NeedsChunks:
			if d.doc.Chunks == nil {
				uncut = append(uncut, d)
			}
		}
		send = append(send, d)
	}
	// A text whose content is known needs no chunks, unless it changes before it is accepted.
	for round := 0; len(send) > 0 && round < 2; round++ {
		if err := s.cut(ctx, t, uncut); err != nil {
			return err
		}
		ready := send[:0:0]
		for _, d := range send {
			if d.err == nil {
				ready = append(ready, d)
			}
		}
		if err := s.accept.submit(ctx, ready); err != nil {
			return err
		}
		send, uncut = nil, nil
		for _, d := range ready {
			if d.err == nil && d.got.Acceptance == corpus.NeedsChunks {
				send, uncut = append(send, d), append(uncut, d)
			}
		}
	}
	for _, d := range send {
		d.fail(corpus.Errorf(corpus.Internal, "not_accepted", "the ledger asked twice for the chunks of one document"))
	}
	return nil
}

// Patch replaces a document's metadata; nothing is embedded. With wait it returns once the
// points carry it. NotFound document_not_found or collection_not_found.
func (s *Service) Patch(ctx context.Context, collection, id string, md corpus.Metadata, wait bool) (corpus.DocumentResult, error) {
	r := corpus.DocumentResult{ID: id}
	if bad := checkID(id); bad != nil {
		return r, bad
	}
	if n := len(md.JSON()); n > corpus.MaxMetadataBytes {
		return r, fault("metadata_too_large", "/metadata", "metadata has %d bytes; at most %d are allowed", n, corpus.MaxMetadataBytes)
	}
	if md == nil {
		md = corpus.Metadata{}
	}
	var got corpus.Accepted
	t, err := s.within(ctx, collection, func(t *target) (err error) {
		got, err = s.cfg.Ledger.PatchDocument(ctx, t.ID, id, md)
		return err
	})
	if err != nil {
		return r, err
	}
	s.at(StepAccepted)
	signal(s.claimNow)
	s.metrics.documents.WithLabelValues(acceptanceLabel(got.Acceptance)).Inc()
	r.DocumentID, r.Version, r.PointIDs, r.Chunks = got.Document, got.Version, got.PointIDs, len(got.PointIDs)
	r.Status = corpus.StatusAccepted
	if got.Acceptance == corpus.Unchanged {
		r.Status = corpus.StatusUnchanged
	}
	if wait {
		out := []corpus.DocumentResult{r}
		c := s.waiting.add([]corpus.ID{got.Document})
		defer s.waiting.remove(c)
		// The first look asks the ledger: it may have been settled before.
		s.waiting.notify([]corpus.DocumentProgress{{Document: got.Document}})
		s.await(ctx, t.ID, c, []*pendingDoc{{got: got, patched: true}}, out)
		r = out[0]
	}
	return r, nil
}

// Delete makes a document invisible: when it returns, nothing finds it, and its text is gone
// from the ledger. With wait it returns once its points are known to be gone too. Deleting a
// document again succeeds as long as the ledger remembers it; then NotFound document_not_found.
func (s *Service) Delete(ctx context.Context, collection, id string, wait bool) (corpus.DocumentResult, error) {
	r := corpus.DocumentResult{ID: id}
	if bad := checkID(id); bad != nil {
		return r, bad
	}
	var p corpus.DocumentProgress
	t, err := s.within(ctx, collection, func(t *target) (err error) {
		p, err = s.cfg.Ledger.DeleteDocument(ctx, t.ID, id)
		return err
	})
	if err != nil {
		return r, err
	}
	s.at(StepAccepted)
	signal(s.reapNow)
	s.waiting.notify([]corpus.DocumentProgress{p})
	s.metrics.documents.WithLabelValues("deleted").Inc()
	r.DocumentID, r.Version, r.Status = p.Document, p.Target, corpus.StatusAccepted
	if wait && s.awaitGone(ctx, t.ID, p.Document, p.Target) {
		r.Status = corpus.StatusIndexed
	}
	return r, nil
}

// Document returns a live document with the chunks of its target version.
func (s *Service) Document(ctx context.Context, collection, id string) (corpus.DocumentView, error) {
	if bad := checkID(id); bad != nil {
		return corpus.DocumentView{}, bad
	}
	var v corpus.DocumentView
	_, err := s.within(ctx, collection, func(t *target) (err error) {
		v, err = s.cfg.Ledger.Document(ctx, t.ID, id)
		return err
	})
	return v, err
}

// maxPage bounds one page of Documents.
const maxPage = 1000

// Documents lists live documents by external id, bytewise, up to limit (at most 1,000) after
// the given id; next is empty on the last page.
func (s *Service) Documents(ctx context.Context, collection string, limit int, after string) (page []corpus.DocumentView, next string, err error) {
	if f := textFault(after); f != "" {
		return nil, "", fault("invalid_id", "/after", "%s", f)
	}
	// Not from memory: a page of a collection that is gone would just be empty.
	s.names.forget(collection)
	t, err := s.resolve(ctx, collection)
	if err != nil {
		return nil, "", err
	}
	return s.cfg.Ledger.Documents(ctx, t.ID, max(1, min(limit, maxPage)), after)
}

// asError returns what the caller may see of err.
func asError(err error) *corpus.Error {
	var e *corpus.Error
	if errors.As(err, &e) {
		return e
	}
	return corpus.Wrap(corpus.KindOf(err), "internal", "the document could not be accepted", err)
}
