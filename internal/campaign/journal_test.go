package campaign

import (
	"context"
	"fmt"
	"strings"
	"sync"

	"github.com/lockstep-db/lockstep/ingest"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

// journal is what the ledger told the instances of a history about each write, to explain a
// broken promise with: a seed repeats a history's flavour, not its every step.
type journal struct {
	mu    sync.Mutex
	now   func() int64
	lines map[string][]string // by document
}

func (j *journal) begin(now func() int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.now, j.lines = now, map[string][]string{}
}

func (j *journal) note(doc, format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.now != nil {
		j.lines[doc] = append(j.lines[doc], fmt.Sprintf("  at %d: ", j.now())+fmt.Sprintf(format, args...))
	}
}

// of is all that is known of a document.
func (j *journal) of(doc string) string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return "what the ledger answered about " + doc + ":\n" + strings.Join(j.lines[doc], "\n")
}

// noted is a ledger whose answers to writes are kept.
type noted struct {
	ingest.Ledger
	j *journal
}

func (n noted) accepted(docs []corpus.PreparedDocument, how string, got []corpus.Accepted, err error) {
	for i := range docs {
		d := &docs[i]
		if err != nil {
			n.j.note(d.ExternalID, "%s of #%d: %v", how, valueOf(d.Metadata), err)
		} else if a := got[i]; how == "accept" || a.Acceptance == corpus.Unchanged {
			n.j.note(d.ExternalID, "%s of #%d: outcome %d, version %d, serving %d, metadata %d", how, valueOf(d.Metadata), a.Acceptance, a.Version, a.Serving, a.MetaVersion)
		}
	}
}

func (n noted) Unchanged(ctx context.Context, collection corpus.ID, docs []corpus.PreparedDocument) ([]corpus.Accepted, error) {
	got, err := n.Ledger.Unchanged(ctx, collection, docs)
	n.accepted(docs, "comparison", got, err)
	return got, err
}

func (n noted) Accept(ctx context.Context, collection corpus.ID, docs []corpus.PreparedDocument, lease corpus.Lease) ([]corpus.Accepted, []corpus.Entry, error) {
	got, work, err := n.Ledger.Accept(ctx, collection, docs, lease)
	n.accepted(docs, "accept", got, err)
	return got, work, err
}

func (n noted) PatchDocument(ctx context.Context, collection corpus.ID, id string, md corpus.Metadata) (corpus.Accepted, error) {
	got, err := n.Ledger.PatchDocument(ctx, collection, id, md)
	n.j.note(id, "patch to #%d: outcome %d, version %d, metadata %d, %v", valueOf(md), got.Acceptance, got.Version, got.MetaVersion, err)
	return got, err
}

func (n noted) DeleteDocument(ctx context.Context, collection corpus.ID, id string) (corpus.DocumentProgress, error) {
	got, err := n.Ledger.DeleteDocument(ctx, collection, id)
	n.j.note(id, "delete: version %d, %v", got.Target, err)
	return got, err
}
