// Package onnx runs models: it turns texts into token ids and token ids into vectors, through
// two native libraries, Hugging Face tokenizers and ONNX Runtime.
//
// Owns: everything that C holds (tokenizer, runtime environment, sessions, tensors) and the
// code of Lockstep's only cgo room. [Engine] is the whole of it for one built model.
//
// Promises: no call returns before the C code it started has; every tensor is released on
// every path; Close waits for calls in flight and may be repeated. Token ids are those of
// Hugging Face tokenizers. A device that was asked for and is absent is an error, never a
// silent change to another. Outputs that were not asked for are not copied.
//
// Must not: queue, batch, retry, time out or log: its callers do. It keeps no goroutines.
//
// Where to look next: embedder forms the batches this room runs; embedder/model writes the
// graphs and the manifest it reads.
package onnx
