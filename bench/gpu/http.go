package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/lockstep-db/lockstep/embedder"
	"github.com/lockstep-db/lockstep/embedder/onnx"
	"github.com/lockstep-db/lockstep/httpapi"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

// overHTTP measures POST /embed on loopback, with tokenisation and replies in bytes, and
// the engine alone on the same texts' token ids.
type overHTTP struct {
	e     *onnx.Engine
	least time.Duration
	words []string
}

// vocabulary is what texts are made of. The test checkpoints' tokenizer knows its letters.
const vocabulary = "every write is recorded first sent second and confirmed third the ledger index disagree whenever one of two writes lost readers join both"

func (o *overHTTP) all(budget, clients, perRequest int) error {
	o.words = strings.Fields(vocabulary)
	cfg := embedder.Config{BatchTokens: budget, BatchRows: 4096, Runners: 2, QueueTokens: 1 << 24, Padded: o.e.Padded()}
	log := slog.New(slog.DiscardHandler)
	reg := prometheus.NewRegistry()
	batcher := embedder.New(o.e.Spec(), o.e, o.e, cfg, log, reg)
	defer batcher.Close()
	server, err := httpapi.New(httpapi.Config{}, httpapi.Deps{Embedder: batcher, Registry: reg, Logger: log})
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	var g errgroup.Group
	g.Go(func() error { return server.Serve(ctx, ln, nil, 5*time.Second) })
	err = o.loads("http://"+ln.Addr().String()+"/embed", budget, clients, perRequest)
	stop()
	return errors.Join(err, g.Wait())
}

func (o *overHTTP) loads(url string, budget, clients, perRequest int) error {
	for _, load := range []struct {
		name   string
		n      int
		length func(*rand.Rand) int
	}{{"128 tokens", 20000, fixed(128)}, {"mixed", 20000, mixed}} {
		texts, rows, err := o.texts(load.n, load.length)
		if err != nil {
			return err
		}
		start := time.Now()
		if err := o.tokenise(texts); err != nil {
			return err
		}
		tokens := 0
		for _, r := range rows {
			tokens += len(r)
		}
		fmt.Printf("%-12s tokenisation alone %.0f tokens/s on all cores\n", load.name, float64(tokens)/time.Since(start).Seconds())
		b := bench{e: o.e, least: o.least}
		sorted := slices.Clone(rows)
		slices.SortStableFunc(sorted, func(x, y []uint32) int { return len(y) - len(x) })
		engine, err := b.measure(workload{load.name, corpus.Dense, 2, cut(sorted, budget)})
		if err != nil {
			return err
		}
		http, err := o.post(url, texts, clients, perRequest)
		if err != nil {
			return err
		}
		fmt.Printf("%-12s engine %.0f texts/s, over HTTP %.0f texts/s (%d clients, %d texts a request, batches of %d tokens): ratio %.3f\n",
			load.name, engine.PerSec, http, clients, perRequest, budget, http/engine.PerSec)
	}
	body, err := json.Marshal(map[string]any{"texts": []string{strings.Join(o.words[:8], " ")}, "output_type": "dense"})
	if err != nil {
		return err
	}
	var times []float64
	client := &http.Client{}
	for i := range 1020 {
		start := time.Now()
		if err := send(client, url, body); err != nil {
			return err
		}
		if i >= 20 {
			times = append(times, float64(time.Since(start).Microseconds())/1e3)
		}
	}
	slices.Sort(times)
	tokens, err := o.e.Encode(strings.Join(o.words[:8], " "))
	if err != nil {
		return err
	}
	fmt.Printf("one text of %d tokens over HTTP: p50 %.2f ms, p99 %.2f ms\n", len(tokens), times[len(times)/2], times[len(times)*99/100])
	return nil
}

// texts makes n texts of the given lengths in tokens, or a few less, and their token ids.
func (o *overHTTP) texts(n int, length func(*rand.Rand) int) ([]string, [][]uint32, error) {
	rng := rand.New(rand.NewPCG(seed, 2))
	cost := map[string]int{}
	for _, w := range o.words {
		ids, err := o.e.Encode(w)
		if err != nil {
			return nil, nil, err
		}
		cost[w] = len(ids) - 2
	}
	texts, rows := make([]string, n), make([][]uint32, n)
	for i := range texts {
		want, got := length(rng), 2
		var words []string
		for len(words) == 0 || got < want {
			w := o.words[rng.IntN(len(o.words))]
			words, got = append(words, w), got+cost[w]
		}
		texts[i] = strings.Join(words, " ")
	}
	var g errgroup.Group
	g.SetLimit(16)
	for i := range texts {
		g.Go(func() (err error) {
			rows[i], err = o.e.Encode(texts[i])
			return err
		})
	}
	return texts, rows, g.Wait()
}

func (o *overHTTP) tokenise(texts []string) error {
	var g errgroup.Group
	g.SetLimit(16)
	for part := range slices.Chunk(texts, 100) {
		g.Go(func() error {
			for _, t := range part {
				if _, err := o.e.Encode(t); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// post sends all texts, round and round for at least o.least, and returns texts a second.
func (o *overHTTP) post(url string, texts []string, clients, perRequest int) (float64, error) {
	var bodies [][]byte
	var sizes []int
	for part := range slices.Chunk(texts, perRequest) {
		body, err := json.Marshal(map[string]any{"texts": part, "output_type": "dense", "max_length": 2048})
		if err != nil {
			return 0, err
		}
		bodies, sizes = append(bodies, body), append(sizes, len(part))
	}
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: clients}}
	if err := send(client, url, bodies[0]); err != nil {
		return 0, err
	}
	var next, done atomic.Int64
	var g errgroup.Group
	start := time.Now()
	for range clients {
		g.Go(func() error {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(bodies) && time.Since(start) > o.least {
					return nil
				}
				if err := send(client, url, bodies[i%len(bodies)]); err != nil {
					return err
				}
				done.Add(int64(sizes[i%len(bodies)]))
			}
		})
	}
	err := g.Wait()
	return float64(done.Load()) / time.Since(start).Seconds(), err
}

func send(client *http.Client, url string, body []byte) error {
	req, err := http.NewRequest(http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/octet-stream")
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1000))
		return fmt.Errorf("%s: %s", resp.Status, text)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}
