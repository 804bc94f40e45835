// Package reconcile answers, at any time and any size, whether the ledger and the index agree
// on the same ids; names every difference; and, when asked, repairs it without ever making it
// worse.
//
// Owns: the streaming merge join of the two stores, the second look that turns a suspect into
// a finding, the order of repairs, the brake's arithmetic, background scrubbing, read-repair
// hints, and the reports about all of that.
//
// Promises: memory does not grow with the collection; a healthy point is never reported and a
// live point never deleted, whatever is ingested meanwhile; what is missing is written again
// before anything is deleted; nothing is deleted that the ledger has not declared dead, and
// nothing at all where the ledger's history is in doubt; a repair counts only after the index
// was read back.
//
// Must not: speak SQL or gRPC, write points itself (the workers of ingest settle entries), or
// decide anything from a single read.
//
// Where to look next: judge.go (what counts as a difference), merge.go (the join), run.go (the
// stages of a run), docs/reconcile.md (for the operator).
package reconcile
