// Command godoc writes the documentation of the Go standard library as JSON lines that
// "lockstep ingest" takes: one document for each package and each documented symbol.
//
//	go run ./examples/godoc > godoc.jsonl
//	go run ./examples/godoc -packages net/http,encoding > some.jsonl
//
// With -create it first creates the collection on a running server, its metadata declared for
// filters; one that exists is left as it is.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/lockstep-db/lockstep/examples/godoc/stdlib"
)

type line struct {
	ID       string   `json:"id"`
	Text     string   `json:"text"`
	Metadata metadata `json:"metadata"`
}

type metadata struct {
	Package string `json:"package"`
	Kind    string `json:"kind"`
	Symbol  string `json:"symbol,omitempty"`
	Go      string `json:"go"`
	Example bool   `json:"example"`
}

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "godoc:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	flags := flag.NewFlagSet("godoc", flag.ContinueOnError)
	root := flags.String("goroot", stdlib.GOROOT(), "the Go installation to read")
	packages := flags.String("packages", "", "only packages at or below these import paths, separated by commas")
	create := flags.String("create", "", "create this `collection` on the server first")
	server := flags.String("server", "http://127.0.0.1:8080", "the Lockstep to create it on")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *create != "" {
		if err := createCollection(*server, *create); err != nil {
			return err
		}
	}
	var prefixes []string
	if *packages != "" {
		prefixes = strings.Split(*packages, ",")
	}
	docs, err := stdlib.Read(*root, prefixes...)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(out)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	for i := range docs {
		d := &docs[i]
		if err := enc.Encode(line{ID: d.ID, Text: d.Text(), Metadata: metadata{
			Package: d.Package, Kind: d.Kind, Symbol: d.Symbol, Go: stdlib.GoVersion(), Example: len(d.Examples) > 0,
		}}); err != nil {
			return err
		}
	}
	return w.Flush()
}

// fields of the metadata that filters may name.
var fields = map[string]string{"package": "keyword", "kind": "keyword", "symbol": "keyword", "go": "keyword", "example": "boolean"}

func createCollection(server, name string) error {
	body, err := json.Marshal(map[string]any{"name": name, "fields": fields})
	if err != nil {
		return err
	}
	req, err := http.NewRequest(http.MethodPost, strings.TrimSuffix(server, "/")+"/collections", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if key := os.Getenv("LOCKSTEP_API_KEY"); key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	}
	client := http.Client{Timeout: time.Minute}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("no Lockstep answers at %s (start one with make run): %w", server, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 && resp.StatusCode != http.StatusConflict {
		return fmt.Errorf("creating the collection %s: %s: %s", name, resp.Status, answer)
	}
	return nil
}
