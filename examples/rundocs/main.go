// Command rundocs runs the examples of a Markdown page against a running Lockstep, in order: the
// blocks marked http, whose first line is a method and a path, and whose rest is the body.
//
//	go run ./examples/rundocs -server http://127.0.0.1:8080 docs/search.md
//
// A block must be answered with success, or with the status it names: http status=422. A block
// with a condition, http if=sparse,colbert, is left out where the server's model lacks one of
// these outputs. Collections that the page creates are deleted first.
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
	"os"
	"strconv"
	"strings"
	"time"
)

func main() {
	if err := run(context.Background(), os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "rundocs:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("rundocs", flag.ContinueOnError)
	server := flags.String("server", "http://127.0.0.1:8080", "a running Lockstep")
	outputs := flags.String("outputs", "", "the model's outputs besides dense, such as sparse,colbert")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() == 0 {
		return errors.New("name at least one page")
	}
	r := runner{server: strings.TrimSuffix(*server, "/"), has: map[string]bool{}, out: out, client: http.Client{Timeout: 5 * time.Minute}}
	for _, o := range strings.Split(*outputs, ",") {
		r.has[o] = true
	}
	for _, page := range flags.Args() {
		raw, err := os.ReadFile(page)
		if err != nil {
			return err
		}
		blocks, err := parse(string(raw))
		if err != nil {
			return fmt.Errorf("%s: %w", page, err)
		}
		if err := r.page(ctx, page, blocks); err != nil {
			return err
		}
	}
	return nil
}

// block is one example.
type block struct {
	line         int
	method, path string
	body         string
	status       int // 0: any success
	needs        []string
}

func parse(text string) ([]block, error) {
	var out []block
	var b *block
	lines := bufio.NewScanner(strings.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		switch {
		case b == nil && (line == "```http" || strings.HasPrefix(line, "```http ")):
			b = &block{line: n}
			for _, option := range strings.Fields(line)[1:] {
				name, value, _ := strings.Cut(option, "=")
				switch name {
				case "status":
					status, err := strconv.Atoi(value)
					if err != nil {
						return nil, fmt.Errorf("line %d: %w", n, err)
					}
					b.status = status
				case "if":
					b.needs = strings.Split(value, ",")
				default:
					return nil, fmt.Errorf("line %d: unknown option %q", n, option)
				}
			}
		case b == nil:
		case line == "```":
			out = append(out, *b)
			b = nil
		case b.method == "":
			var ok bool
			if b.method, b.path, ok = strings.Cut(line, " "); !ok {
				return nil, fmt.Errorf("line %d: want a method and a path", n)
			}
		default:
			b.body += line + "\n"
		}
	}
	if b != nil {
		return nil, fmt.Errorf("line %d: the block has no end", b.line)
	}
	return out, lines.Err()
}

type runner struct {
	server string
	has    map[string]bool
	client http.Client
	out    io.Writer
}

func (r *runner) page(ctx context.Context, page string, blocks []block) error {
	for _, b := range blocks {
		if b.method == http.MethodPost && b.path == "/collections" {
			var c struct {
				Name string `json:"name"`
			}
			if err := json.Unmarshal([]byte(b.body), &c); err != nil {
				return fmt.Errorf("%s:%d: %w", page, b.line, err)
			}
			if status, answer, err := r.send(ctx, http.MethodDelete, "/collections/"+c.Name, ""); err != nil || status >= 300 && status != http.StatusNotFound {
				return fmt.Errorf("deleting the collection %s: %d %s %w", c.Name, status, answer, err)
			}
		}
	}
	ran := 0
	for _, b := range blocks {
		if !r.can(b) {
			continue
		}
		status, answer, err := r.send(ctx, b.method, b.path, b.body)
		if err != nil {
			return fmt.Errorf("%s:%d: %w", page, b.line, err)
		}
		if good := status >= 200 && status < 300; b.status == 0 && !good || b.status != 0 && status != b.status {
			return fmt.Errorf("%s:%d: %s %s answered %d: %s", page, b.line, b.method, b.path, status, answer)
		}
		ran++
		fmt.Fprintf(r.out, "%s:%d: %s %s: %d\n", page, b.line, b.method, b.path, status)
	}
	fmt.Fprintf(r.out, "%s: %d of %d examples ran\n", page, ran, len(blocks))
	return nil
}

func (r *runner) can(b block) bool {
	for _, need := range b.needs {
		if !r.has[need] {
			return false
		}
	}
	return true
}

func (r *runner) send(ctx context.Context, method, path, body string) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, r.server+path, bytes.NewReader([]byte(body)))
	if err != nil {
		return 0, nil, err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	if key := os.Getenv("LOCKSTEP_API_KEY"); key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, answer, err
}
