#!/usr/bin/env bash
# Ingests the documentation of the Go standard library into a running Lockstep and asks it some
# questions. It may be run again at any time: what is there already is recognised.
#
#   LOCKSTEP_SERVER    where Lockstep answers (http://127.0.0.1:8080; start it with make run)
#   DEMO_COLLECTION    collection to use (go-docs)
#   DEMO_PACKAGES      only these import paths and what is below them, separated by commas (all)
set -euo pipefail
cd "$(dirname "$0")/.."

lockstep=${LOCKSTEP_BIN:-bin/lockstep}
export LOCKSTEP_SERVER=${LOCKSTEP_SERVER:-http://127.0.0.1:8080}
collection=${DEMO_COLLECTION:-go-docs}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { printf '\n== %s\n' "$*"; }

say "Reading the documentation of $(go env GOVERSION) from $(go env GOROOT)"
go run ./examples/godoc -server "$LOCKSTEP_SERVER" -create "$collection" -packages "${DEMO_PACKAGES:-}" > "$work/godoc.jsonl"
printf '%s documents, %s bytes\n' "$(wc -l < "$work/godoc.jsonl")" "$(wc -c < "$work/godoc.jsonl")"

say "Ingesting it into the collection $collection (again, nothing is embedded twice)"
"$lockstep" ingest --collection "$collection" "$work/godoc.jsonl"

ask() {
	say "$1"
	shift
	"$lockstep" search --collection "$collection" --limit 3 --group "$@"
}

ask 'How do I give an HTTP request a time limit?' 'how do I give an HTTP request a time limit'
ask 'Read a file line by line' 'read a file line by line'
ask 'Which error was wrapped inside another?' 'find out which error was wrapped inside another'
ask 'Run some code when a test has finished' 'run some code when a test has finished'
ask 'Wait until several goroutines are done' 'wait until several goroutines are done'
ask 'Shuffle a slice: only functions and methods' --filter '{"must":[{"key":"kind","any":["func","method"]}]}' 'put the elements of a slice in random order'
ask 'Time zones: only in the package time' --filter '{"must":[{"key":"package","match":"time"}]}' 'convert a time to another time zone'

say "Do Postgres and the index hold the same points?"
"$lockstep" reconcile --collection "$collection" --depth full
