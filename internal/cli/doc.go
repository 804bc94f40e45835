// Package cli is what `lockstep ingest`, `search`, `reconcile`, `model pull` and `doctor` do:
// the commands of people and scripts, spoken to a running server over its public contract.
//
// Owns: the HTTP client, reading documents from files, progress, the text of reports, and the
// exit codes of the contract.
//
// Promises: results go to stdout and everything else to stderr; progress is drawn only on a
// terminal. Nothing reads the environment or exits; each command is a function that returns
// its exit code, so tests call it. A command that is cancelled leaves nothing half done that
// running it again would not complete.
//
// Must not: open a store or a model; import a room.
//
// Where to look next: httpapi is the other end, cmd/lockstep the dispatcher.
package cli
