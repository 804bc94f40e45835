package httpapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

func jsonMarshal(v any) ([]byte, error) { return json.Marshal(v) }

const ndjson = "application/x-ndjson"

func lines(t *testing.T, body []byte) []map[string]any {
	t.Helper()
	var out []map[string]any
	sc := bufio.NewScanner(bytes.NewReader(body))
	sc.Buffer(nil, 1<<24)
	for sc.Scan() {
		var v map[string]any
		if err := json.Unmarshal(sc.Bytes(), &v); err != nil {
			t.Fatalf("not a line of JSON: %q", sc.Bytes())
		}
		out = append(out, v)
	}
	return out
}

func TestStreamAnswersEachLine(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config, _ *bench) { c.MaxLineBytes = 200; c.MaxBodyBytes = 300 })
	body := strings.Join([]string{
		`{"id":"a","text":"x"}`,
		``,
		`{"id":"b"`,
		`{"id":"c","text":"x","nope":1}`,
		`{"id":"d","text":"` + strings.Repeat("x", 300) + `"}`,
		`  {"id":"e","text":"x"}` + "\r",
		"{\"id\":\"f\",\"text\":\"\xff\"}",
		`{"id":"a","text":"y"}`,
		`{"id":"g","text":""}`,
		`{"id":"h","text":"no newline at the end"}`,
	}, "\n")
	a := b.do("POST", "/documents?wait=true", body, "Content-Type", ndjson)
	if a.status != 200 || a.header.Get("Content-Type") != ndjson {
		t.Fatalf("%d %s", a.status, a.body)
	}
	var got []string
	for _, l := range lines(t, a.body) {
		s := fmt.Sprint(l["line"], " ", l["id"], " ", l["status"])
		if e, ok := l["error"].(map[string]any); ok {
			s += " " + e["code"].(string)
		}
		got = append(got, s)
	}
	expected := []string{
		"1 a indexed", "3 b failed invalid_json", "4 c failed unknown_field", "5  failed line_too_long", "6 e indexed",
		"7 f failed invalid_utf8", "8 a indexed", "9 g failed validation_failed", "10 h indexed",
	}
	// What was decoded of a broken line's id is not promised.
	for i := range got {
		if i < len(expected) && strings.Contains(expected[i], "failed") {
			f := strings.Fields(got[i])
			x := strings.Fields(expected[i])
			if f[0] != x[0] || f[len(f)-1] != x[len(x)-1] {
				t.Errorf("line %d: %q, expected %q", i, got[i], expected[i])
			}
			continue
		}
		if i >= len(expected) || got[i] != expected[i] {
			t.Errorf("line %d: %q", i, got[i])
		}
	}
	if len(got) != len(expected) {
		t.Errorf("%d answers, expected %d", len(got), len(expected))
	}
	if v := b.ledger.docs["default"]["a"]; v.TargetVersion != 2 || v.Chunks[0].Text != "y" {
		t.Errorf("a repeated id is a later version: %+v", v)
	}
}

// TestStreamIsInterleaved sends a line, waits for its answer, sends the next: a client that
// works in step must never wait for a batch to fill.
func TestStreamIsInterleaved(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	pr, pw := io.Pipe()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "POST", b.url+"/documents", pr)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", ndjson)
	go fmt.Fprintln(pw, `{"id":"0","text":"x"}`)
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	sc := bufio.NewScanner(res.Body)
	for i := range 5 {
		if !sc.Scan() {
			t.Fatalf("no answer to line %d: %v", i, sc.Err())
		}
		if !strings.Contains(sc.Text(), fmt.Sprintf(`"id":"%d"`, i)) {
			t.Fatalf("answer %q", sc.Text())
		}
		fmt.Fprintf(pw, "{\"id\":\"%d\",\"text\":\"x\"}\n", i+1)
	}
	_ = pw.Close()
	if !sc.Scan() || sc.Scan() || sc.Err() != nil {
		t.Errorf("the stream did not end well: %v", sc.Err())
	}
}

// endless makes n documents without holding them.
type endless struct {
	n, size int
	buf     bytes.Buffer
	made    atomic.Int64
}

func (e *endless) Read(p []byte) (int, error) {
	if e.buf.Len() == 0 {
		i := e.made.Add(1)
		if int(i) > e.n {
			return 0, io.EOF
		}
		fmt.Fprintf(&e.buf, "{\"id\":\"doc-%d\",\"text\":\"", i)
		for e.buf.Len() < e.size {
			e.buf.WriteString("lorem ipsum dolor ")
		}
		e.buf.WriteString("\"}\n")
	}
	return e.buf.Read(p)
}

// TestStreamHoldsLittle sends much more than it may hold. The ledger forgets, so what grows
// would be ours.
func TestStreamHoldsLittle(t *testing.T) {
	b := setup(t, nil)
	forgetful := &forgetfulLedger{ledger: b.ledger}
	b.server.deps.Ingester = forgetful
	src := &endless{n: 2000, size: 64 << 10} // 125 MB
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "POST", b.url+"/documents", src)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", ndjson)
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	sc := bufio.NewScanner(res.Body)
	n := 0
	for sc.Scan() {
		n++
	}
	if n != src.n || sc.Err() != nil {
		t.Fatalf("%d answers, %v", n, sc.Err())
	}
	// A batch of 128 lines of 64 KiB, decoded, beside streamAhead: far below the 125 MB sent.
	if peak := forgetful.peak.Load(); peak > 96<<20 {
		t.Errorf("the heap grew to %d MiB", peak>>20)
	}
	t.Logf("peak heap in use %d MiB for %d MiB sent", forgetful.peak.Load()>>20, int64(src.n)*int64(src.size)>>20)
}

type forgetfulLedger struct {
	*ledger
	peak  atomic.Int64
	calls atomic.Int64
}

func (f *forgetfulLedger) Ingest(_ context.Context, req corpus.IngestRequest) ([]corpus.DocumentResult, error) {
	if f.calls.Add(1)%8 == 0 {
		runtime.GC() // so that what is counted is held, not garbage
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		if got := int64(m.HeapInuse); got > f.peak.Load() {
			f.peak.Store(got)
		}
	}
	out := make([]corpus.DocumentResult, len(req.Documents))
	for i := range out {
		out[i] = corpus.DocumentResult{ID: req.Documents[i].ID, Status: corpus.StatusAccepted}
	}
	return out, nil
}

func TestStreamErrorsBeforeAndAfterTheFirstAnswer(t *testing.T) {
	t.Parallel()
	b := setup(t, func(_ *Config, b *bench) {
		n := 0
		b.ledger.fail = func(string) error {
			n++
			if n > 1 {
				return corpus.Errorf(corpus.Conflict, "collection_stopped", "stopped")
			}
			return nil
		}
	})
	// The first batch passes, the second does not.
	pr, pw := io.Pipe()
	req, err := http.NewRequestWithContext(t.Context(), "POST", b.url+"/documents", pr)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", ndjson)
	go fmt.Fprintln(pw, `{"id":"0","text":"x"}`)
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	sc := bufio.NewScanner(res.Body)
	if !sc.Scan() {
		t.Fatal("no first answer")
	}
	fmt.Fprintln(pw, `{"id":"1","text":"x"}`)
	if !sc.Scan() || !strings.Contains(sc.Text(), `"error":{"code":"collection_stopped"`) || strings.Contains(sc.Text(), "line") {
		t.Errorf("last line %q", sc.Text())
	}
	if sc.Scan() || sc.Err() != nil {
		t.Errorf("the stream should end cleanly after the error: %v", sc.Err())
	}
	_ = pw.Close()
	// Now every call fails: an ordinary error reply.
	b.want(b.do("POST", "/documents", `{"id":"0","text":"x"}`, "Content-Type", ndjson), 409, "collection_stopped", "")
	b.want(b.do("POST", "/documents", "\n\n", "Content-Type", ndjson), 400, "empty_input", "")
}

// TestStreamThatEndsEarlyIsStillRead: the caller goes on sending and has to see the reason,
// whether the end comes by what is read on or, of a slower caller, by the time.
func TestStreamThatEndsEarlyIsStillRead(t *testing.T) {
	t.Parallel()
	for name, body := range map[string]io.Reader{
		"fast": &endless{n: 1 << 30, size: 200},
		"slow": &paced{Reader: &endless{n: 1 << 30, size: 64 << 10}, pace: time.Tick(time.Millisecond)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testStreamThatEndsEarly(t, body)
		})
	}
}

// paced is a reader at a steady rate.
type paced struct {
	io.Reader
	pace <-chan time.Time
}

func (p *paced) Read(b []byte) (int, error) {
	<-p.pace
	return p.Reader.Read(b)
}

// stoppingLedger takes the stream's first document and, whatever overtakes it, nothing after.
type stoppingLedger struct{ *ledger }

func (l *stoppingLedger) Ingest(ctx context.Context, req corpus.IngestRequest) ([]corpus.DocumentResult, error) {
	if req.Documents[0].ID != "doc-1" {
		return nil, corpus.Errorf(corpus.Conflict, "collection_stopped", "stopped")
	}
	return l.ledger.Ingest(ctx, req)
}

func testStreamThatEndsEarly(t *testing.T, body io.Reader) {
	b := setup(t, nil)
	b.server.deps.Ingester = &stoppingLedger{ledger: b.ledger}
	a := b.send("POST", "/documents", body, "Content-Type", ndjson)
	all := lines(t, a.body)
	if last := all[len(all)-1]; a.status != 200 || last["error"] == nil || last["status"] != nil {
		t.Errorf("%d, last line %v", a.status, last)
	}
}

func TestStreamWaitsOutAFullQueue(t *testing.T) {
	t.Parallel()
	left := 2
	b := setup(t, func(_ *Config, b *bench) {
		b.ledger.fail = func(string) error {
			if left > 0 {
				left--
				return &corpus.Error{Kind: corpus.Overloaded, Code: "overloaded", RetryAfter: time.Millisecond}
			}
			return nil
		}
	})
	a := b.do("POST", "/documents", `{"id":"0","text":"x"}`, "Content-Type", ndjson)
	if a.status != 200 || left != 0 {
		t.Errorf("%d %s", a.status, a.body)
	}
}

func TestStreamOfACallerWhoLeaves(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	pr, pw := io.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, "POST", b.url+"/documents", pr)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", ndjson)
	go fmt.Fprintln(pw, `{"id":"0","text":"x"}`)
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(res.Body).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	cancel()
	res.Body.Close()
	pw.CloseWithError(errors.New("gone"))
	// goleak and the server's Close in cleanup see that nothing hangs.
}

// TestLongWaitAfterTheBodyIsNoLeaving: the deadline for lines has passed long before the
// answer comes, and the caller is still there.
func TestLongWaitAfterTheBodyIsNoLeaving(t *testing.T) {
	t.Parallel()
	gate := make(chan struct{})
	b := setup(t, func(c *Config, b *bench) { c.StreamIdle = 200 * time.Millisecond; b.ledger.gate = gate })
	timer := time.AfterFunc(time.Second, func() { close(gate) })
	defer timer.Stop()
	a := b.do("POST", "/documents", `{"id":"a","text":"x"}`, "Content-Type", ndjson)
	if a.status != 200 || lines(t, a.body)[0]["status"] != "accepted" {
		t.Errorf("%d %s", a.status, a.body)
	}
}

// TestStreamKeepsTheOrderOfVersions lets batches overtake each other and expects the last line
// of each document to win.
func TestStreamKeepsTheOrderOfVersions(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	slow := &slowLedger{ledger: b.ledger}
	b.server.deps.Ingester = slow
	var body strings.Builder
	for i := range 2000 {
		fmt.Fprintf(&body, "{\"id\":\"d%d\",\"text\":\"%d\"}\n", i%300, i)
	}
	a := b.do("POST", "/documents", body.String(), "Content-Type", ndjson)
	got := lines(t, a.body)
	for i, l := range got {
		if l["line"] != float64(i+1) || l["id"] != fmt.Sprintf("d%d", i%300) {
			t.Fatalf("answer %d is %v", i, l)
		}
	}
	for i := 1700; i < 2000; i++ {
		if v := b.ledger.docs["default"][fmt.Sprintf("d%d", i%300)]; v.Chunks[0].Text != fmt.Sprint(i) {
			t.Fatalf("document d%d holds %s, the last line said %d", i%300, v.Chunks[0].Text, i)
		}
	}
	if slow.most.Load() < 2 {
		t.Error("no two batches were under way at once")
	}
}

// slowLedger takes its time, less and less, so that later calls would overtake earlier ones.
type slowLedger struct {
	*ledger
	calls, inside, most atomic.Int64
}

func (l *slowLedger) Ingest(ctx context.Context, req corpus.IngestRequest) ([]corpus.DocumentResult, error) {
	n := l.inside.Add(1)
	defer l.inside.Add(-1)
	for old := l.most.Load(); n > old && !l.most.CompareAndSwap(old, n); old = l.most.Load() {
	}
	timer := time.NewTimer(time.Duration(max(1, 20-5*(l.calls.Add(1)%4))) * time.Millisecond)
	<-timer.C
	return l.ledger.Ingest(ctx, req)
}

func TestIdleStreamIsCut(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config, _ *bench) { c.StreamIdle = 50 * time.Millisecond })
	pr, pw := io.Pipe()
	defer pw.Close()
	a := b.send("POST", "/documents", pr, "Content-Type", ndjson)
	b.want(a, 400, "body_incomplete", "")
}
