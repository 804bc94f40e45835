// Package campaign proves the consistency protocol under faults: a seeded campaign of random
// histories over a real Postgres and the embedded index, checked against a model while they
// run and when they are over, and one named test for each failure scenario of
// docs/consistency.md that no room's own tests can play.
//
// Owns: the histories, the model of what clients may see, the faults that are applied, and
// the mutants (testdata/mutants) that show the campaign is able to fail.
//
// Promises: a seed names a history; every check names the promise (P1 to P8 of the design)
// that it tests; a campaign that reached no fault or killed nobody fails.
//
// Must not: be imported.
//
// Where to look next: model_test.go (what may be seen), history_test.go (what is done),
// final_test.go (what must be left), rig_test.go (stores, faults and kills).
package campaign
