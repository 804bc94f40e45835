// Package devstack runs the servers that were not configured: with no DATABASE_URL a real
// Postgres as a child process, with no QDRANT_URL a qdrant binary if one is on PATH, else the
// embedded index in this process. Everything lies under one data directory.
//
// Owns: the data directory's layout, its lock and its VERSION file; finding or fetching
// binaries; the children's lives, from initdb to a clean stop.
//
// Promises: one instance a directory; loopback only, with a generated password for Postgres;
// no process left behind when Lockstep stops or is killed (on Linux the kernel tells the
// children; elsewhere the next start stops what was left, after checking that it is ours); a
// child that dies is reported by [Stack.Health] and started again with a growing pause; logs
// are files of bounded size without document text.
//
// Must not: be used in production, listen beyond loopback, or touch a directory that another
// program or a newer Lockstep made.
//
// Where to look next: internal/app, which starts this before the stores; store/qdrantlocal,
// the embedded index.
package devstack
