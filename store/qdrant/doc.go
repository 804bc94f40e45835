// Package qdrant is the vector index: it speaks Qdrant's gRPC API through the official client.
//
// Owns: how an index is laid out in Qdrant (named vectors, payload indexes, the stamp point),
// the guards under which points are written, the translation of filters, and the mapping of
// the server's answers to the error kinds of corpus.
//
// Promises: a nil error of a write means that the server answered Completed for all of it;
// anything else is an error, and what is unknown is called unknown. Inserts never touch a
// point that exists; rewrites and metadata writes never replace a higher meta_version,
// however late or often a request arrives. The stamp point appears in no scroll, count,
// facet or query. No secret and no document text is logged.
//
// Must not: decide what should exist (ingest and reconcile do), read the ledger, or retry on
// its own account: callers own the schedule.
//
// Where to look next: write.go for the guards, read.go for what proves presence and absence,
// store/qdrantlocal for the embedded server that answers the same calls.
package qdrant
