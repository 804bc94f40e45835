// Package pgtest runs real PostgreSQL for tests: one server per test process, built from the
// system's binaries, and a fresh database for each test.
//
// Promises: fsync and synchronous_commit stay on, as Lockstep demands of any server; the
// server and its data are gone when the test process is, however that ends.
//
// Must not: be imported outside tests.
//
// Where to look next: store/postgres, whose tests use it most.
package pgtest
