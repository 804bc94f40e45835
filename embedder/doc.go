// Package embedder turns texts into vectors under load: admission, tokenisation, two lanes,
// length-sorted batches under a token budget, and one result for each input.
//
// Owns: the queue between callers and the model, and the goroutines that run batches.
//
// Promises: a request is admitted whole or refused with corpus.Overloaded and a time to
// retry; queries run before bulk and bulk is never starved; an idle model starts at once;
// a cancelled caller's rows are dropped before they run and free their weight; an input that
// the model cannot embed fails alone; every value a caller sees is finite. Memory is bounded
// by the queue's token limits.
//
// Must not: know the model's runtime (embedder/onnx is the only cgo room), nor the stores.
//
// Where to look next: embedder/onnx runs graphs, embedder/model builds them, embedder/fake
// is the deterministic twin for tests.
package embedder
