// Package storetest holds the suites that every implementation of a store must pass.
//
// Owns: [RunQdrant], the conformance suite of Qdrant's API as Lockstep uses it.
//
// Promises: the suite asks only for what a real Qdrant server does; an implementation that
// passes it may stand in for one. Tests use collections of their own and may run at the same
// time on a server that holds others.
//
// Must not: be imported by anything but tests, nor know an implementation.
//
// Where to look next: store/qdrantlocal runs the suite on the embedded server; the tests of
// this package run it on a real one, when QDRANT_URL names it or a qdrant binary is on PATH.
package storetest
