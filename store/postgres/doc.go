// Package postgres is the ledger: the only room that speaks SQL.
//
// Owns: the lockstep schema, its migrations' application, and every transaction.
//
// Promises: SQLSTATEs become corpus error kinds here; no pgx type leaves the room. Sessions
// run with synchronous_commit = on, and a server with fsync = off is refused.
//
// Must not: import store/qdrant, or decide anything the protocol does not say.
//
// Where to look next: ingest (writing), search (the join), reconcile (the walk).
package postgres
