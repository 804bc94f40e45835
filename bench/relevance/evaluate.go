package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode"
)

// depth of the rankings that are judged.
const depth = 100

// queriesPerCall of the batched search.
const queriesPerCall = 20

func words(text string) []string {
	return strings.FieldsFunc(strings.ToLower(text), func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) })
}

type evaluation struct {
	server, collection, key string
	client                  http.Client
}

func evaluate(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("evaluate", flag.ContinueOnError)
	e := evaluation{key: os.Getenv("LOCKSTEP_API_KEY"), client: http.Client{Timeout: time.Hour}}
	dir := flags.String("dir", "", "folder that generate wrote")
	flags.StringVar(&e.server, "server", "http://127.0.0.1:8080", "a running Lockstep")
	flags.StringVar(&e.collection, "collection", "relevance", "collection to use")
	ingest := flags.Bool("ingest", false, "ingest the corpus first")
	output := flags.String("output", "text", "text or json")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *dir == "" {
		return errors.New("evaluate: name the folder that generate wrote with -dir")
	}
	var corpus []document
	var queries []query
	if err := readLines(filepath.Join(*dir, "corpus.jsonl"), &corpus); err != nil {
		return err
	}
	if err := readLines(filepath.Join(*dir, "queries.jsonl"), &queries); err != nil {
		return err
	}
	if len(queries) == 0 {
		return errors.New("evaluate: no queries")
	}
	if *ingest {
		if err := e.ingest(ctx, corpus); err != nil {
			return err
		}
	}

	lexical := newBM25(corpus)
	baseline := make([][]string, len(queries))
	for i, q := range queries {
		baseline[i] = lexical.search(q.Text, depth)
	}
	rows := []row{judgeAll("bm25", queries, baseline)}
	for _, m := range []struct {
		name   string
		mode   string
		fusion string
	}{
		{"dense", "dense", ""}, {"sparse", "sparse", ""}, {"hybrid", "hybrid", ""},
		{"hybrid dbsf", "hybrid", "dbsf"}, {"hybrid weighted", "hybrid", "weighted"},
		{"hybrid_rerank", "hybrid_rerank", ""}, {"rerank weighted", "hybrid_rerank", "weighted"},
	} {
		rankings, err := e.search(ctx, queries, m.mode, m.fusion)
		var missing *modeUnavailable
		if errors.As(err, &missing) {
			continue
		}
		if err != nil {
			return err
		}
		rows = append(rows, judgeAll(m.name, queries, rankings))
		if m.name == "dense" {
			both := make([][]string, len(queries))
			for i := range both {
				both[i] = rrf(rankings[i], baseline[i])
			}
			rows = append(rows, judgeAll("dense + bm25", queries, both))
		}
	}
	if *output == "json" {
		return json.NewEncoder(os.Stdout).Encode(rows)
	}
	fmt.Printf("%d documents, %d queries\n\n", len(corpus), len(queries))
	fmt.Printf("%-16s %-9s %8s %8s %10s\n", "ranking", "queries", "nDCG@10", "MRR", "recall@100")
	for _, r := range rows {
		for _, source := range []string{"all", fromHeading, fromExample, fromSentence} {
			if p, ok := r.Parts[source]; ok {
				fmt.Printf("%-16s %-9s %8.4f %8.4f %10.4f   (n=%d)\n", r.Name, source, p.NDCG10, p.MRR, p.Recall100, p.Queries)
			}
		}
	}
	return nil
}

type row struct {
	Name  string          `json:"ranking"`
	Parts map[string]part `json:"parts"`
}

type part struct {
	Queries   int     `json:"queries"`
	NDCG10    float64 `json:"ndcg_10"`
	MRR       float64 `json:"mrr"`
	Recall100 float64 `json:"recall_100"`
}

func judgeAll(name string, queries []query, rankings [][]string) row {
	r := row{Name: name, Parts: map[string]part{}}
	for i, q := range queries {
		s := score(rankings[i], q.Answers)
		for _, source := range []string{"all", q.Source} {
			p := r.Parts[source]
			p.Queries++
			p.NDCG10 += s.ndcg10
			p.MRR += s.mrr
			p.Recall100 += s.recall100
			r.Parts[source] = p
		}
	}
	for source, p := range r.Parts {
		n := float64(p.Queries)
		p.NDCG10, p.MRR, p.Recall100 = p.NDCG10/n, p.MRR/n, p.Recall100/n
		r.Parts[source] = p
	}
	return r
}

// modeUnavailable says that the collection has no vectors for a mode.
type modeUnavailable struct{ detail string }

func (m *modeUnavailable) Error() string { return m.detail }

func (e *evaluation) search(ctx context.Context, queries []query, mode, fusion string) ([][]string, error) {
	var out [][]string
	for start := 0; start < len(queries); start += queriesPerCall {
		var texts []string
		for _, q := range queries[start:min(start+queriesPerCall, len(queries))] {
			texts = append(texts, q.Text)
		}
		body := map[string]any{
			"collection": e.collection, "queries": texts, "mode": mode, "limit": depth,
			"group_by": "document", "include": []string{}, "timeout_ms": 120_000,
		}
		if fusion != "" {
			body["fusion"] = fusion
		}
		raw, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		var reply struct {
			Responses []struct {
				Results []struct {
					Document string `json:"document"`
				} `json:"results"`
			} `json:"responses"`
		}
		if err := e.call(ctx, "/search", "application/json", bytes.NewReader(raw), func(r io.Reader) error {
			return json.NewDecoder(r).Decode(&reply)
		}); err != nil {
			return nil, err
		}
		if len(reply.Responses) != len(texts) {
			return nil, fmt.Errorf("%d responses for %d queries", len(reply.Responses), len(texts))
		}
		for _, r := range reply.Responses {
			ranking := []string{}
			for _, hit := range r.Results {
				ranking = append(ranking, hit.Document)
			}
			out = append(out, ranking)
		}
	}
	return out, nil
}

// ingest streams the corpus and waits until all of it is searchable.
func (e *evaluation) ingest(ctx context.Context, corpus []document) error {
	body, w := io.Pipe()
	go func() { // ends with the pipe: either all is written, or the reader closed it
		enc := json.NewEncoder(w)
		var err error
		for i := range corpus {
			if err = enc.Encode(&corpus[i]); err != nil {
				break
			}
		}
		w.CloseWithError(err)
	}()
	defer body.Close()
	began := time.Now()
	chunks, failed := 0, 0
	path := "/documents?" + url.Values{"collection": {e.collection}, "wait": {"true"}}.Encode()
	err := e.call(ctx, path, "application/x-ndjson", body, func(r io.Reader) error {
		lines := bufio.NewScanner(r)
		lines.Buffer(nil, 16<<20)
		for lines.Scan() {
			var result struct {
				ID     string `json:"id"`
				Status string `json:"status"`
				Chunks int    `json:"chunks"`
			}
			if err := json.Unmarshal(lines.Bytes(), &result); err != nil {
				return err
			}
			chunks += result.Chunks
			if result.Status == "failed" {
				failed++
				fmt.Fprintf(os.Stderr, "%s failed: %s\n", result.ID, lines.Text())
			}
		}
		return lines.Err()
	})
	if err != nil {
		return err
	}
	if failed > 0 {
		return fmt.Errorf("%d documents failed", failed)
	}
	took := time.Since(began)
	fmt.Fprintf(os.Stderr, "ingested %d documents, %d chunks in %.1f s (%.0f chunks/s)\n", len(corpus), chunks, took.Seconds(), float64(chunks)/took.Seconds())
	return nil
}

func (e *evaluation) call(ctx context.Context, path, kind string, body io.Reader, read func(io.Reader) error) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(e.server, "/")+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", kind)
	if e.key != "" {
		req.Header.Set("Authorization", "Bearer "+e.key)
	}
	resp, err := e.client.Do(req)
	if err != nil {
		return fmt.Errorf("no answer from %s (start one with make run): %w", e.server, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		answer, _ := io.ReadAll(io.LimitReader(resp.Body, 16<<10))
		if bytes.Contains(answer, []byte("mode_unavailable")) {
			return &modeUnavailable{string(answer)}
		}
		return fmt.Errorf("%s: %s: %s", path, resp.Status, answer)
	}
	return read(resp.Body)
}

func readLines[T any](name string, into *[]T) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	for dec := json.NewDecoder(bufio.NewReader(f)); ; {
		var v T
		err := dec.Decode(&v)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		*into = append(*into, v)
	}
}
