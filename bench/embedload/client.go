package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lockstep-db/lockstep/embedder/onnx"
)

// client talks to a server's POST /embed.
type client struct {
	server string
	http   http.Client
}

// embed sends the texts and reads the reply as bytes.
func (c *client) embed(ctx context.Context, texts []string) error {
	body, err := json.Marshal(map[string]any{"texts": texts})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.server+"/embed", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/octet-stream")
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		raw, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10)) // only to say more
		return fmt.Errorf("%s: %s", resp.Status, raw)
	}
	n, err := io.Copy(io.Discard, resp.Body)
	if err == nil && (n == 0 || n%int64(4*len(texts)) != 0) {
		err = fmt.Errorf("the reply has %d bytes for %d texts", n, len(texts))
	}
	return err
}

func (c *client) turn(ctx context.Context, texts []string, s settings) error {
	c.http.Transport = &http.Transport{MaxIdleConnsPerHost: s.clients}
	defer c.http.CloseIdleConnections()
	return eachPart(texts, s, func(part []string) error { return c.embed(ctx, part) })
}

// cpu is the server's CPU time in seconds, by its own metrics.
func (c *client) cpu() (float64, error) {
	resp, err := c.http.Get(c.server + "/metrics")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if v, ok := strings.CutPrefix(lines.Text(), "process_cpu_seconds_total "); ok {
			return strconv.ParseFloat(v, 64)
		}
	}
	return 0, fmt.Errorf("no CPU time in the metrics: %w", lines.Err())
}

// latency times single texts of 32 tokens, one after the other.
func (c *client) latency(ctx context.Context, e *onnx.Engine, s settings) error {
	s.n, s.tokens = s.query, 32
	texts, _, err := makeTexts(e, s)
	if err != nil {
		return err
	}
	took := make([]float64, 0, len(texts))
	for _, t := range texts {
		start := time.Now()
		if err := c.embed(ctx, []string{t}); err != nil {
			return err
		}
		took = append(took, 1e3*time.Since(start).Seconds())
	}
	slices.Sort(took)
	fmt.Printf("one text of 32 tokens over HTTP: p50 %.2f ms, p99 %.2f ms\n", took[len(took)/2], took[len(took)*99/100])
	return nil
}
