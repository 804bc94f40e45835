// Package model turns a Hugging Face checkpoint directory into what the embedder runs: an
// ONNX graph in ONNX Runtime's fused operators, its weights, the tokenizer and a manifest.
//
// Owns: the readers of checkpoint files (safetensors, PyTorch's zip archives), the graph
// writer, the layout of a built model directory and the model's fingerprint.
//
// Promises: the same checkpoint and options give the same bytes. Weights stream: building
// needs little more memory than the largest tensor that has to be transposed. A built
// directory appears whole or not at all. Nothing in a checkpoint is executed, and a
// checkpoint that is damaged, incomplete or of an unsupported kind is refused with a
// [corpus.Error] that says what is wrong; no weight is ever made up.
//
// Must not: run the graph (embedder/onnx does), use cgo, or download anything.
//
// Where to look next: embedder/onnx loads what [Open] describes; embedder batches for it.
package model
