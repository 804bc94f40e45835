// Command relevance measures how well searches find what people look for, on a judged set made
// from the Go standard library's documentation.
//
//	go run ./bench/relevance generate -out DIR
//	go run ./bench/relevance evaluate -dir DIR -server http://127.0.0.1:8080 -ingest
//
// generate writes corpus.jsonl (what is ingested) and queries.jsonl. Each query is a phrase that
// stood in the documentation and was removed from the text that is indexed: a heading, the comment
// or the name of an example, a comment's first sentence. Its answer is the document it stood in. The
// rules are in queries.go; they were fixed before the first evaluation, and no query was
// chosen, changed or dropped by its result.
//
// evaluate ingests the corpus into a running Lockstep if asked to, runs every query in every mode
// that the collection offers, and prints nDCG@10, MRR and recall@100 beside a BM25 baseline
// computed here, and beside the baseline fused with dense search.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "relevance:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 {
		switch args[0] {
		case "generate":
			return generate(args[1:])
		case "evaluate":
			return evaluate(ctx, args[1:])
		}
	}
	return fmt.Errorf("usage: relevance generate|evaluate [flags]")
}
