// Package qdrantlocal is an in-process server of Qdrant's gRPC API, for the calls that
// Lockstep makes. It stands in for a Qdrant server where none is configured: evaluation,
// tests, small corpora. The client is the ordinary go-client; nothing above this package
// knows which server answers.
//
// # Owns
//
// One data directory: collections of points with named dense, sparse and multivectors,
// their payloads, payload indexes and aliases. [Open] reads it, [Server.Serve] answers on a
// listener, [Server.Close] ends both. One process has a directory at a time ([LockedError]).
//
// # Promises
//
// A call answers as Qdrant 1.19 would for one shard and one replica, or with Unimplemented.
// It never answers something plausible instead: a request with a field that is newer than
// [Version] is refused too. store/storetest's suite, which is written for a real server, is
// run here with every change. Where the answer is not obvious (filters with and without
// indexes, payload paths, selectors, text indexes, fusion, thresholds, half precision, NaN)
// it was compared with Qdrant's own engine, in the build published for Python.
//
//   - Implemented: collections (create, update of strict mode and of settings without effect
//     here, info, exists, list, delete), aliases; upsert with update_mode and update_filter,
//     delete, get, scroll in id order, count, facet, set, overwrite, delete and clear
//     payload, update and delete vectors, update_batch; query (nearest to a vector or to a
//     point, prefetch to any depth, RRF with k and weights, DBSF) and query_batch; field
//     indexes of all types but geo; the health check.
//   - Unimplemented: snapshots, clusters, shard keys, groups, recommend, discover, order_by,
//     sampling, formulas, MMR, lookup_from, geo conditions, inference, the IDF modifier,
//     uint8 vectors, text indexes with stemming, stop words or a multilingual tokenizer, and
//     the strict mode limits other than max_query_limit, upsert_max_batchsize,
//     search_max_hnsw_ef, search_allow_exact, unindexed_filtering_retrieve and _update,
//     filter_max_conditions and condition_max_size.
//   - Search is exact, whatever HNSW, quantization or search parameters say; they are kept
//     and shown. Equal scores stand in id order, where Qdrant promises no order. Counts and
//     facets are exact. Consistency and ordering options are accepted: there is one copy.
//   - A text match on a field without a text index looks for a substring; a null inside a
//     list makes its field null. Qdrant's versions differ in both.
//
// Durability: wait=true answers Completed after the change is on disk (fsync, shared by
// those that wait at the same time): it survives kill -9 and a loss of power. What a reader
// has seen survives kill -9. wait=false answers Acknowledged after the change was handed to
// the system, and reaches the disk within a fraction of a second. After a failed fsync a
// collection refuses writes until it is opened again. A torn end of the log is dropped and
// reported to the logger, it was never promised; any other damage is a [CorruptionError],
// the server does not start and changes nothing. A point is written whole or not at all; of
// a batch a reader may see a part.
//
// Bounds: a request of 320 MiB, an answer of 1 GiB, 1,048,575 floats in a multivector, a
// payload 64 levels deep, a filter 48 deep, 1,000 queries in a batch. Everything is held in
// memory: 4 bytes per float, and per point its encoded payload and about 240 bytes with four
// payload indexes (measured at 2,000,000 points of 8 floats: 972 MiB of heap, of which the
// payloads are half). On disk a collection takes its snapshot and a log of at most four
// times its size, twice that while it is compacted.
//
// # When to move to Qdrant
//
// Search reads every vector. Measured through go-client on 2 shared cores of an AMD EPYC,
// k = 10: 100,000 vectors of 1,024 floats take 9 ms (12 ms with a filter on an indexed
// field, 29 ms on another field), 10,000 of 384 floats 0.9 ms; it grows in proportion. On
// the same machine: upserts of 256 points of 1,024 floats with wait=true 33,000 points/s
// from one client; a scroll of 200,000 ids 1.1 to 1.4 million ids/s, with one payload field
// 0.4 million/s; a facet of 4,096 buckets over 200,000 points 2 ms, filtered 27 ms; opening
// 100,000 points of 8 floats 0.3 s, of 1,024 floats 1.9 s.
//
// Move to Qdrant at 300,000 chunks of 1,024 floats (1.2 GiB, 30 ms of both cores per
// search), at ten searches a second on more than 100,000 chunks, or as soon as more than one
// instance of Lockstep is to run: this index lives inside one process.
//
// # Must not
//
// Be the only copy of anything: Postgres is the source of truth, and reconcile rebuilds an
// index that was lost. Know Lockstep: payload keys and collection names mean nothing here.
//
// # Where to look next
//
// server.go for the life of the process; write.go, read.go and query.go for the calls;
// collection.go for the state in memory and how a log record changes it; wal.go and store.go
// for the files; filter.go, value.go and column.go for conditions, payloads and indexes.
package qdrantlocal
