// Package app builds every room in order, runs them, and stops them in reverse.
//
// Owns: the wiring, the order of start and stop, and the guards that hold each adapter to
// the interfaces of its readers.
//
// Promises: Serve returns only when everything it started has stopped. What was accepted is
// finished or left in the ledger for the next start; nothing is lost by stopping.
//
// Must not: hold logic of its own. What decides, lives in a room.
//
// Where to look next: the room table in the README.
package app
