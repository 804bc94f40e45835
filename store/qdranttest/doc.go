// Package qdranttest gives tests a server that speaks Qdrant's API: a real one where there is one,
// else the embedded one.
//
// Promises: what it starts listens on loopback alone, keeps its data in the test's own folder and
// ends with the test.
//
// Must not: be imported outside tests.
//
// Where to look next: store/storetest, the suite that both kinds of server pass.
package qdranttest
