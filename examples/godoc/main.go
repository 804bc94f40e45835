// Command godoc writes the documentation of the Go standard library as JSON lines that
// "lockstep ingest" takes: one document for each package and each documented symbol.
//
//	go run ./examples/godoc > godoc.jsonl
//	go run ./examples/godoc -packages net/http,encoding > some.jsonl
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

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
	if err := flags.Parse(args); err != nil {
		return err
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
