// Package ingest is the write path: what callers send becomes document versions in the ledger,
// and what the ledger says becomes points in the index, in an order that no crash, delay or
// repetition can turn into a lie.
//
// Owns: validation of documents, their cutting into chunks, the acceptance of many requests in
// shared transactions, and the workers that settle index entries, delete dead points, purge
// tombstones and bring indexes to life and to their end.
//
// Promises: P2 (a version is visible all at once), P3 (nothing acknowledged is lost), P4 (no
// order of index requests harms a live point) and P5 (once faults stop, every entry settles)
// of docs/consistency.md. One bad document fails alone. Everything is bounded.
//
// Must not: speak SQL or gRPC, create an index's Qdrant collection once it has existed, or
// believe a point to be there without the index having said so.
//
// Where to look next: ports.go (what it needs), accept.go (the shared transactions), work.go
// (the workers), store/postgres (the ledger), reconcile (what checks all this from outside).
package ingest
