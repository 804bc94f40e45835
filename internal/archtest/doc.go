// Package archtest holds the import rules of the rooms as a test: which packages a room may
// reach, and why not the others. The table in the test is the room table of the README.
package archtest
