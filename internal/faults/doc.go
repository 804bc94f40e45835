// Package faults breaks the connections of tests: a gRPC proxy in front of the index and a
// wire proxy in front of Postgres lose, delay, repeat, reorder, halve and refuse requests as a
// plan says.
//
// Owns: the kinds of faults, the plans that choose them (a [Script] for one schedule, a
// [Random] for a campaign; both can be replayed), simulated time, and the count of faults that
// took effect.
//
// Promises: a fault is counted when it was done, not when it was chosen, so a test can assert
// that its target was reached; what a proxy passes, it passes unchanged; Close leaves no
// goroutine and no held request.
//
// Must not: be imported outside tests and test programs.
//
// Where to look next: index.go and postgres.go for what each kind means on each side.
package faults
