// Package search answers queries: it embeds them, asks the index for candidates, and shows
// what the ledger says of those.
//
// Owns: modes, scores, fusion, grouping and widening; the cache of query embeddings.
//
// Promises: a result is a chunk of the serving version of a live document (P1); everything a
// response shows was read in one statement, so it never mixes two versions (P2); points
// nobody knows and points that are gone cost a slot that is filled again, never an error, and
// change no score (P7). Ranks, fusion and groups are computed here, over the candidates the
// ledger confirmed, for that reason. A search is bounded in time, in candidates and in memory,
// and starts no goroutine.
//
// Must not: write anything, trust a payload, or show what the last join did not return.
//
// Where to look next: store/postgres (the join), store/qdrant (the candidates), docs/search.md
// (what modes and scores mean), reconcile (where hints go).
package search
