// Package corpus holds the nouns every room of Lockstep shares: collections, documents,
// chunks, point ids, vectors, filters, the model's specification and the error kinds.
//
// Owns: the identity rule of a chunk (see [PointID]), the meaning of metadata filters
// (see [Filter.Matches]) and the closed set of error kinds (see [Kind]).
//
// Promises: values here are plain data. Deriving an id, matching a filter and classifying
// an error are pure functions of their arguments, the same in every release that carries
// the same scheme number.
//
// Must not: perform I/O, start goroutines, or import anything outside the standard library.
//
// Where to look next: ingest writes documents, search reads them, reconcile proves that the
// two stores agree; store/postgres and store/qdrant hold them.
package corpus
