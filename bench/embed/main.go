// Command embed measures a running server's POST /embed over HTTP against
// sentence-transformers in process, on the same texts, in turns, and prints the ratios of
// each turn and their median. Give both the same number of threads. CPU time is compared
// beside the rates: on a machine that others use, it is the steadier of the two.
//
// usage: go run ./bench/embed -server http://127.0.0.1:8080 -python python3 -checkpoint DIR
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench/embed:", err)
		os.Exit(1)
	}
}

type peer struct {
	in  io.WriteCloser
	out *bufio.Scanner
	cmd *exec.Cmd
}

type reply struct {
	Seconds float64   `json:"seconds"`
	CPU     float64   `json:"cpu"`
	First   []float32 `json:"first"`
	Torch   string    `json:"torch"`
}

func (p *peer) read() (reply, error) {
	var r reply
	if !p.out.Scan() {
		return r, fmt.Errorf("the peer ended: %w", p.cmd.Wait())
	}
	return r, json.Unmarshal(p.out.Bytes(), &r)
}

func run() error {
	server := flag.String("server", "http://127.0.0.1:8080", "the running server")
	python := flag.String("python", "python3", "a Python with sentence-transformers")
	checkpoint := flag.String("checkpoint", "", "the checkpoint directory the server's model was built from")
	threads := flag.Int("threads", 2, "threads of the peer; start the server with as many")
	count := flag.Int("n", 1000, "texts in a turn")
	rounds := flag.Int("rounds", 3, "turns")
	seed := flag.Uint64("seed", 1, "seed of the texts")
	batch := flag.Int("batch", 32, "batch size of the peer")
	clients := flag.Int("clients", 2, "concurrent requests to the server")
	perRequest := flag.Int("per-request", 250, "texts in a request")
	latency := flag.Int("latency", 100, "single queries for the latency comparison")
	flag.Parse()

	texts := makeTexts(*count, *seed)
	cmd := exec.Command(*python, "bench/embed/peer.py", *checkpoint, fmt.Sprint(*threads))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", *python, err)
	}
	p := &peer{in: in, out: bufio.NewScanner(out), cmd: cmd}
	p.out.Buffer(nil, 1<<20)
	hello, err := p.read()
	if err != nil {
		return err
	}
	fmt.Printf("%d texts of 10 to 200 words' tokens, seed %d; peer: torch %s, batch %d, %d threads\n", *count, *seed, hello.Torch, *batch, *threads)

	ask := func(texts []string) (reply, error) {
		line, err := json.Marshal(map[string]any{"texts": texts, "batch": *batch})
		if err != nil {
			return reply{}, err
		}
		if _, err := p.in.Write(append(line, '\n')); err != nil {
			return reply{}, err
		}
		return p.read()
	}
	// One short turn of each first, uncounted.
	if _, err := ask(texts[:min(64, len(texts))]); err != nil {
		return err
	}
	ours, err := embed(*server, texts[:1])
	if err != nil {
		return err
	}
	theirs, err := ask(texts[:1])
	if err != nil {
		return err
	}
	fmt.Printf("cosine of the first text's two vectors: %.7f\n", cosine(ours, theirs.First))
	var ratios []float64
	for round := range *rounds {
		before, err := serverCPU(*server)
		if err != nil {
			return err
		}
		start := time.Now()
		if err := throughput(*server, texts, *clients, *perRequest); err != nil {
			return err
		}
		mine := float64(len(texts)) / time.Since(start).Seconds()
		after, err := serverCPU(*server)
		if err != nil {
			return err
		}
		r, err := ask(texts)
		if err != nil {
			return err
		}
		other := float64(len(texts)) / r.Seconds
		ratios = append(ratios, mine/other)
		fmt.Printf("turn %d: lockstep %.1f texts/s, sentence-transformers %.1f texts/s, ratio %.2f; CPU %.1f and %.1f ms a text, ratio %.2f\n",
			round+1, mine, other, mine/other, 1e3*(after-before)/float64(len(texts)), 1e3*r.CPU/float64(len(texts)), r.CPU/(after-before))
	}
	slices.Sort(ratios)
	fmt.Printf("texts/s ratio: median %.2f (min %.2f, max %.2f)\n", ratios[len(ratios)/2], ratios[0], ratios[len(ratios)-1])

	var a, b []float64
	for i := range *latency {
		one := texts[i%len(texts) : i%len(texts)+1]
		start := time.Now()
		if _, err := embed(*server, one); err != nil {
			return err
		}
		a = append(a, time.Since(start).Seconds())
		r, err := ask(one)
		if err != nil {
			return err
		}
		b = append(b, r.Seconds)
	}
	if len(a) > 0 {
		slices.Sort(a)
		slices.Sort(b)
		mid := len(a) / 2
		fmt.Printf("one text: lockstep p50 %.1f ms over HTTP, sentence-transformers p50 %.1f ms in process, ratio %.2f\n", 1e3*a[mid], 1e3*b[mid], a[mid]/b[mid])
	}
	if err := p.in.Close(); err != nil {
		return err
	}
	return cmd.Wait()
}

// makeTexts writes sentences of common words, 10 to 200 words long, evenly spread.
func makeTexts(n int, seed uint64) []string {
	rng := rand.New(rand.NewPCG(seed, 0))
	words := strings.Fields(`the a of to and in is that for it with as was on are by this be from or have an they which one
		you had not but what all were when we there can more if out so said about up its into than them only other new some
		could time these two may then do first any my now such like our over man me even most made after also did many before
		must through back years where much your way well down should because each just those people too how little state good
		very make world still own see men work long get here between both life being under never day same another know while
		last might us great old year off come since against go came right used take three index vector document search query
		consistency repair store metadata payload embedding transaction ledger chunk version`)
	out := make([]string, n)
	for i := range out {
		var b strings.Builder
		for range 8 + rng.IntN(190) {
			b.WriteString(words[rng.IntN(len(words))])
			b.WriteByte(' ')
		}
		out[i] = strings.TrimSpace(b.String())
	}
	return out
}

func embed(server string, texts []string) ([]float32, error) {
	body, err := json.Marshal(map[string]any{"texts": texts, "max_length": 256, "batch_size": 128})
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequest(http.MethodPost, server+"/embed", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/octet-stream")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", resp.Status, raw)
	}
	row := make([]float32, len(raw)/4/len(texts))
	for i := range row {
		row[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[4*i:]))
	}
	return row, nil
}

// serverCPU is the server's CPU time in seconds, by its own metrics.
func serverCPU(server string) (float64, error) {
	resp, err := http.Get(server + "/metrics")
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

func throughput(server string, texts []string, clients, perRequest int) error {
	jobs := make(chan []string, len(texts)/perRequest+1)
	for part := range slices.Chunk(texts, perRequest) {
		jobs <- part
	}
	close(jobs)
	var group sync.WaitGroup
	failed := make(chan error, clients)
	for range clients {
		group.Go(func() {
			for part := range jobs {
				if _, err := embed(server, part); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	group.Wait()
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}

func cosine(a, b []float32) float64 {
	var dot, x, y float64
	for i := range min(len(a), len(b)) {
		dot += float64(a[i]) * float64(b[i])
		x += float64(a[i]) * float64(a[i])
		y += float64(b[i]) * float64(b[i])
	}
	return dot / math.Sqrt(x*y)
}
