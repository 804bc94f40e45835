// Command soak puts a mixed load of ever-changing shapes on a running server (embedding,
// ingestion and deletion within a fixed set of documents, search) and prints the server's
// resident memory as it goes. It ends with an error when memory in the last quarter of the
// time is above that of the second quarter by more than -growth, or when a request failed
// otherwise than by being told to come again later. The first quarter fills caches.
//
// usage: go run ./bench/soak -server http://127.0.0.1:8080 -for 10m
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

type soak struct {
	server    string
	documents int
	done      [4]atomic.Int64 // by operation
	refused   atomic.Int64
	failed    atomic.Int64
	lastError atomic.Value
}

func run(ctx context.Context) error {
	server := flag.String("server", "http://127.0.0.1:8080", "the running server")
	length := flag.Duration("for", 10*time.Minute, "how long")
	every := flag.Duration("every", 15*time.Second, "time between two lines")
	clients := flag.Int("clients", 4, "concurrent requests")
	documents := flag.Int("documents", 500, "documents that are written again and again")
	growth := flag.Float64("growth", 0.1, "growth of memory from the second to the last quarter that is an error")
	seed := flag.Uint64("seed", 1, "seed of the load")
	flag.Parse()

	s := &soak{server: *server, documents: *documents}
	if _, err := s.memory(ctx); err != nil {
		return err
	}
	err := s.call(ctx, http.MethodPost, "/collections", "application/json", map[string]any{"name": "soak", "fields": map[string]any{"n": "integer"}})
	if err != nil {
		return err
	}
	fmt.Printf("%s of load on %s, %d clients, %d documents, seed %d\n", *length, *server, *clients, *documents, *seed)
	load, cancel := context.WithTimeout(ctx, *length)
	defer cancel()
	var group errgroup.Group
	for i := range *clients {
		rng := rand.New(rand.NewPCG(*seed, uint64(i)))
		group.Go(func() error {
			for load.Err() == nil {
				s.one(load, rng)
			}
			return nil
		})
	}
	var rss []float64
	start := time.Now()
	tick := time.NewTicker(*every)
	defer tick.Stop()
	for load.Err() == nil {
		select {
		case <-load.Done():
		case <-tick.C:
			m, err := s.memory(ctx)
			if err != nil {
				return err
			}
			rss = append(rss, m["process_resident_memory_bytes"])
			fmt.Printf("%6.0f s  resident %7.1f MB  Go heap %6.1f MB  goroutines %4.0f ", time.Since(start).Seconds(),
				m["process_resident_memory_bytes"]/1e6, m["go_memstats_heap_inuse_bytes"]/1e6, m["go_goroutines"])
			for k, op := range operations {
				fmt.Printf(" %s %d", op.name, s.done[k].Load())
			}
			fmt.Printf(" later %d failed %d\n", s.refused.Load(), s.failed.Load())
		}
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if n := s.failed.Load(); n > 0 {
		return fmt.Errorf("%d requests failed, the last with: %v", n, s.lastError.Load())
	}
	if len(rss) < 8 {
		fmt.Println("too few lines to tell growth")
		return nil
	}
	quarter := len(rss) / 4
	early, late := median(rss[quarter:2*quarter]), median(rss[len(rss)-quarter:])
	fmt.Printf("resident memory: median %.1f MB in the second quarter, %.1f MB in the last: %+.1f %%\n", early/1e6, late/1e6, 100*(late/early-1))
	if late > early*(1+*growth) {
		return fmt.Errorf("memory grew by more than %.0f %%", 100**growth)
	}
	return nil
}

func median(v []float64) float64 {
	v = slices.Clone(v)
	slices.Sort(v)
	return v[len(v)/2]
}

// operations are what a client picks from; weights add up to 100.
var operations = [...]struct {
	name   string
	weight int
	do     func(*soak, context.Context, *rand.Rand) error
}{
	{"embed", 40, (*soak).embed},
	{"ingest", 25, (*soak).ingest},
	{"search", 30, (*soak).search},
	{"delete", 5, (*soak).delete},
}

func (s *soak) one(ctx context.Context, rng *rand.Rand) {
	pick := rng.IntN(100)
	for k, op := range operations {
		if pick -= op.weight; pick >= 0 {
			continue
		}
		err := op.do(s, ctx, rng)
		switch {
		case err == nil:
			s.done[k].Add(1)
		case ctx.Err() != nil:
		default:
			s.failed.Add(1)
			s.lastError.Store(fmt.Errorf("%s: %w", op.name, err))
		}
		return
	}
}

// embed sends 1 to 64 texts, most of them few, in one of the forms of the reply.
func (s *soak) embed(ctx context.Context, rng *rand.Rand) error {
	n := 1 << rng.IntN(7)
	texts := make([]string, n)
	for i := range texts {
		texts[i] = words(rng, 1+rng.IntN(1+800/n))
	}
	accept := []string{"application/json", "application/octet-stream"}[rng.IntN(2)]
	return s.call(ctx, http.MethodPost, "/embed", accept, map[string]any{"texts": texts})
}

func (s *soak) ingest(ctx context.Context, rng *rand.Rand) error {
	var docs []map[string]any
	for _, i := range rng.Perm(s.documents)[:1+rng.IntN(8)] {
		docs = append(docs, map[string]any{"id": fmt.Sprint("soak/", i), "text": words(rng, 5+rng.IntN(400)), "metadata": map[string]any{"n": i}})
	}
	return s.call(ctx, http.MethodPost, "/documents", "application/json", map[string]any{"collection": "soak", "wait": rng.IntN(2) == 0, "documents": docs})
}

func (s *soak) search(ctx context.Context, rng *rand.Rand) error {
	body := map[string]any{"collection": "soak", "query": words(rng, 1+rng.IntN(40)), "limit": 1 + rng.IntN(50), "include": []string{"text", "metadata"}}
	if rng.IntN(3) == 0 {
		body["filter"] = map[string]any{"must": []any{map[string]any{"key": "n", "range": map[string]any{"gte": rng.IntN(s.documents)}}}}
	}
	return s.call(ctx, http.MethodPost, "/search", "application/json", body)
}

func (s *soak) delete(ctx context.Context, rng *rand.Rand) error {
	id := url.PathEscape(fmt.Sprint("soak/", rng.IntN(s.documents)))
	return s.call(ctx, http.MethodDelete, "/documents/"+id+"?collection=soak", "application/json", nil)
}

func (s *soak) call(ctx context.Context, method, path, accept string, in any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.server+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", accept)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return err
	case resp.StatusCode < 300, resp.StatusCode == http.StatusNotFound, path == "/collections" && resp.StatusCode == http.StatusConflict:
		return nil // what is not there, or there already, is an answer
	case resp.StatusCode == http.StatusTooManyRequests:
		s.refused.Add(1)
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
		return nil
	}
	return fmt.Errorf("%s: %.500s", resp.Status, raw)
}

// memory reads the gauges of the server's metrics that are its own.
func (s *soak) memory(ctx context.Context) (map[string]float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.server+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	out := map[string]float64{}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if name, value, ok := strings.Cut(lines.Text(), " "); ok && (strings.HasPrefix(name, "process_") || strings.HasPrefix(name, "go_")) {
			if v, err := strconv.ParseFloat(value, 64); err == nil {
				out[name] = v
			}
		}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if out["process_resident_memory_bytes"] == 0 {
		return nil, fmt.Errorf("%s/metrics does not tell resident memory", s.server)
	}
	return out, nil
}

var vocabulary = strings.Fields(`the a of to and in is that for it with as was on are by this be from or have an they which one
	index vector document search query consistency repair store metadata payload embedding transaction ledger chunk version
	zebra quilt ocean harbour lantern maple copper violin winter thunder`)

func words(rng *rand.Rand, n int) string {
	var b strings.Builder
	for i := range n {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(vocabulary[rng.IntN(len(vocabulary))])
	}
	return b.String()
}
