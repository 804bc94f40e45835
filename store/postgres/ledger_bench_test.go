package postgres_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

func benchDocs(from, n int) []corpus.PreparedDocument {
	docs := make([]corpus.PreparedDocument, n)
	for i := range docs {
		text := fmt.Sprintf("document %d: %0200d", from+i, i)
		h := corpus.HashChunk(text, nil)
		docs[i] = corpus.PreparedDocument{ExternalID: fmt.Sprintf("doc/%08d", from+i), Content: h, Metadata: corpus.Metadata{"n": int64(from + i), "lang": "en"},
			Chunks: []corpus.PreparedChunk{{Text: text, Content: h}}}
	}
	return docs
}

// BenchmarkFirstIngestion is the ledger's share of a first ingestion of one-chunk documents:
// accepting, marking and switching, a thousand to a transaction.
func BenchmarkFirstIngestion(b *testing.B) {
	ctx := context.Background()
	s := newStore(b)
	c, ix, _, err := s.EnsureCollection(ctx, "c", corpus.Settings{}, denseLayout, "m")
	if err != nil {
		b.Fatal(err)
	}
	const batch = 1000
	var accept, settle time.Duration
	n := 0
	for b.Loop() {
		docs := benchDocs(n, batch)
		n += batch
		t0 := time.Now()
		_, work, err := s.Accept(ctx, c.ID, docs, corpus.Lease{Token: corpus.ID{1}, Max: batch, For: time.Minute})
		if err != nil || len(work) != batch {
			b.Fatal(len(work), err)
		}
		accept += time.Since(t0)
		results := make([]corpus.EntryResult, len(work))
		for i, e := range work {
			results[i] = corpus.EntryResult{Chunk: e.Chunk, Document: e.Document, Token: e.Token, Meta: e.WantMeta}
		}
		t0 = time.Now()
		for i := 0; i < len(results); i += 250 {
			if _, err := s.Settle(ctx, ix, results[i:min(i+250, len(results))]); err != nil {
				b.Fatal(err)
			}
		}
		settle += time.Since(t0)
	}
	b.ReportMetric(float64(n)/(accept+settle).Seconds(), "docs/s")
	b.ReportMetric(float64(n)/accept.Seconds(), "accepted/s")
	b.ReportMetric(float64(n)/settle.Seconds(), "settled/s")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkUnchanged compares documents that did not change.
func BenchmarkUnchanged(b *testing.B) {
	ctx := context.Background()
	s := newStore(b)
	c, _, _, err := s.EnsureCollection(ctx, "c", corpus.Settings{}, denseLayout, "m")
	if err != nil {
		b.Fatal(err)
	}
	const batch = 1000
	docs := benchDocs(0, batch)
	if _, _, err := s.Accept(ctx, c.ID, docs, corpus.Lease{}); err != nil {
		b.Fatal(err)
	}
	n := 0
	for b.Loop() {
		got, err := s.Unchanged(ctx, c.ID, docs)
		if err != nil || got[0].Acceptance != corpus.Unchanged || got[batch-1].Acceptance != corpus.Unchanged {
			b.Fatal(got[0], err)
		}
		n += batch
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "docs/s")
	b.ReportMetric(0, "ns/op")
}
