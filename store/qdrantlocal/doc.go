// Package qdrantlocal is an in-process server of Qdrant's gRPC API, for the calls that
// Lockstep makes. It stands in for a Qdrant server where none is configured: evaluation,
// tests, small corpora. The client is the ordinary go-client; nothing above this package
// knows which server answers.
package qdrantlocal
