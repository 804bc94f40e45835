package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is the Env of one command with its output kept, and no waiting.
type world struct {
	*Env
	out, err bytes.Buffer
	mu       sync.Mutex
	slept    []time.Duration
}

func newWorld(server string, args ...string) *world {
	w := &world{}
	clock := time.Unix(1_000_000, 0)
	w.Env = &Env{
		Args: args, Stdout: &w.out, Stderr: &w.err, Stdin: strings.NewReader(""), Width: 80,
		Getenv: func(k string) string {
			switch k {
			case "LOCKSTEP_SERVER":
				return server
			case "LOCKSTEP_API_KEY":
				return "the-key"
			}
			return ""
		},
		Now: func() time.Time {
			w.mu.Lock()
			defer w.mu.Unlock()
			return clock
		},
		Sleep: func(ctx context.Context, d time.Duration) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			clock = clock.Add(d)
			w.slept = append(w.slept, d)
			return ctx.Err()
		},
	}
	return w
}

// server answers like Lockstep, as far as a test needs it.
type server struct {
	*httptest.Server
	mu   sync.Mutex
	docs map[string]json.RawMessage
	// lines are the ids of every line read, in order.
	lines []string
	auth  []string
	query []string
	// intercept may answer a request instead; n counts requests of its path from 1.
	intercept func(n int, w http.ResponseWriter, r *http.Request) bool
	// after each result, the stream ends as it says: "" goes on.
	cut   func(total int) string
	count int
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{docs: map[string]json.RawMessage{}}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /documents", s.ingest)
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.count++
		n := s.count
		s.auth = append(s.auth, r.Header.Get("Authorization"))
		s.query = append(s.query, r.URL.RawQuery)
		s.mu.Unlock()
		if s.intercept != nil && s.intercept(n, w, r) {
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *server) ingest(w http.ResponseWriter, r *http.Request) {
	ctl := http.NewResponseController(w)
	if err := ctl.EnableFullDuplex(); err != nil {
		panic(err)
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Connection", "close")
	dec := json.NewDecoder(r.Body)
	for {
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return
		}
		var d struct{ ID, Text string }
		if err := json.Unmarshal(raw, &d); err != nil {
			panic(err)
		}
		s.mu.Lock()
		_, known := s.docs[d.ID]
		s.docs[d.ID] = raw
		s.lines = append(s.lines, d.ID)
		total := len(s.lines)
		s.mu.Unlock()
		how := ""
		if s.cut != nil {
			how = s.cut(total)
		}
		switch how {
		case "drop": // the write happened, the answer is lost
			panic(http.ErrAbortHandler)
		case "error":
			fmt.Fprintln(w, `{"error":{"code":"index_unavailable","detail":"the index does not answer"}}`)
			return
		case "broken":
			fmt.Fprintln(w, `{"error":{"code":"internal","detail":"defect"}}`)
			return
		}
		status := "indexed"
		if known {
			status = "unchanged"
		}
		if d.Text == "bad" {
			fmt.Fprintf(w, "{\"line\":1,\"id\":%q,\"status\":\"failed\",\"chunks\":0,\"chunks_embedded\":0,\"point_ids\":[],\"error\":{\"code\":\"validation_failed\",\"detail\":\"no good\"}}\n", d.ID)
		} else {
			fmt.Fprintf(w, "{\"line\":1,\"id\":%q,\"status\":%q,\"chunks\":2,\"chunks_embedded\":1,\"point_ids\":[]}\n", d.ID, status)
		}
		if err := ctl.Flush(); err != nil {
			return
		}
	}
}

func write(t *testing.T, dir, name, content string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func jsonl(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "{\"id\":\"d%d\",\"text\":\"text %d\"}\n", i, i)
	}
	return b.String()
}
