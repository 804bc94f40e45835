package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
)

const (
	// window is the most documents that are sent and not answered: they are what is sent again
	// after a broken connection.
	window = 512
	// windowBytes bounds their size.
	windowBytes = 32 << 20
	// maxFaultsShown bounds the failures that are printed; all are counted.
	maxFaultsShown = 50
)

// Ingest is `lockstep ingest`.
func Ingest(ctx context.Context, e *Env) int {
	set := e.flags("ingest", "[flags] FILE|FOLDER|-...",
		"Sends documents to a running server: JSONL (one {\"id\",\"text\",\"metadata\"} a line), plain text,\nMarkdown and HTML files, folders of them, or JSONL on stdin (-). It may be run again at any\ntime: what is there already is recognised and neither embedded nor written again.")
	server := e.serverFlag(set)
	output := outputFlag(set)
	collection := set.String("collection", "", "collection to write to; created on first use (default: the server's)")
	format := set.String("format", "auto", "format of all files: auto (by ending), jsonl, text, markdown or html")
	prefix := set.String("id-prefix", "", "what ids made from file names begin with")
	wait := set.Bool("wait", true, "wait until each document is searchable")
	quiet := set.Bool("quiet", false, "draw no progress")
	retry := set.Duration("retry", 5*time.Minute, "how long to keep trying while the server is away or busy and nothing gets through")
	maxFile := set.Int64("max-file", 8<<20, "largest text, Markdown or HTML file, in bytes")
	md := map[string]string{}
	set.Func("metadata", "key=value added to the metadata of documents made from files; may be repeated", func(s string) error {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return errors.New("want key=value")
		}
		md[k] = v
		return nil
	})
	operands, code, ok := e.parse(set)
	switch {
	case !ok:
		return code
	case len(operands) == 0:
		return e.usage("ingest", "name at least one file or folder, or - for stdin")
	case !oneOf(*format, "auto", "jsonl", "text", "markdown", "html"):
		return e.usage("ingest", "--format is auto, jsonl, text, markdown or html")
	case !oneOf(*output, "text", "json"):
		return e.usage("ingest", "--output is text or json")
	case *retry < 0 || *maxFile < 1:
		return e.usage("ingest", "--retry and --max-file must be positive")
	}
	client, err := NewClient(*server, e.Getenv("LOCKSTEP_API_KEY"))
	if err != nil {
		return e.usage("ingest", "%s", err)
	}
	defer client.Close()
	in := &ingestion{
		e: e, client: client, retry: *retry,
		path: "/documents?" + url.Values{"wait": {fmt.Sprint(*wait)}, "collection": {*collection}}.Encode(),
		src:  &source{format: *format, prefix: *prefix, metadata: md, stdin: e.Stdin, maxFile: *maxFile},
		bar:  e.progress(*quiet), begin: e.now(),
	}
	if *collection == "" {
		in.path = "/documents?" + url.Values{"wait": {fmt.Sprint(*wait)}}.Encode()
	}
	err = in.run(ctx, operands)
	in.bar.clear()
	in.summary(*output == "json", err)
	switch {
	case err != nil:
		return e.failure(ctx, "ingest", err)
	case in.sum.Failed > 0:
		return ExitFailed
	}
	return ExitOK
}

// ingestSummary is the result on stdout.
type ingestSummary struct {
	Documents      int64   `json:"documents"`
	Indexed        int64   `json:"indexed"`
	Accepted       int64   `json:"accepted"`
	Unchanged      int64   `json:"unchanged"`
	Superseded     int64   `json:"superseded"`
	Failed         int64   `json:"failed"`
	Unanswered     int64   `json:"unanswered"`
	Chunks         int64   `json:"chunks"`
	ChunksEmbedded int64   `json:"chunks_embedded"`
	Seconds        float64 `json:"seconds"`
	// Error says why not all of the input was sent; empty when it was.
	Error string `json:"error,omitempty"`
}

// ingestion is one run of the command. The reader goroutine owns src; the rest belongs to the
// goroutine of run, but for what mu guards.
type ingestion struct {
	e      *Env
	client *Client
	retry  time.Duration
	path   string
	src    *source
	bar    *progress
	begin  time.Time

	total, done int64
	sum         ingestSummary

	mu      sync.Mutex // guards what follows and sum.Failed, which both goroutines count
	pending []item     // sent or about to be, in order, not answered
	held    int64      // their bytes
	room    chan struct{}
	shown   int
	ended   bool // the source has no more
}

// run reads and sends until everything is answered, over as many connections as it takes.
func (in *ingestion) run(ctx context.Context, operands []string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	jobs, faults := in.src.plan(operands)
	for _, f := range faults {
		in.fault(f)
	}
	for _, j := range jobs {
		in.total += j.size
	}
	in.room = make(chan struct{}, 1)
	items := make(chan item, 64)
	var reader sync.WaitGroup
	reader.Go(func() {
		defer close(items)
		for _, j := range jobs {
			if in.src.read(ctx, j, items, in.fault) != nil {
				return
			}
		}
	})
	// A reader that waits on a terminal's stdin cannot be woken; it ends with the process.
	if !readsTerminal(jobs, in.src.stdin) {
		defer reader.Wait()
	}
	defer cancel()

	var b backoff
	stuckSince := in.e.now()
	for {
		answered, err := in.session(ctx, items)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if answered > 0 {
			b, stuckSince = backoff{}, in.e.now()
		}
		if !temporary(err) || in.e.now().Sub(stuckSince) >= in.retry {
			return err
		}
		if serr := in.e.sleep(ctx, b.next(err)); serr != nil {
			return serr
		}
	}
}

func readsTerminal(jobs []job, stdin any) bool {
	for _, j := range jobs {
		if j.path == "-" {
			return IsTerminal(stdin)
		}
	}
	return false
}

// session sends over one connection: first what an earlier one left unanswered, then new
// documents. It returns nil when the source has ended and everything is answered.
func (in *ingestion) session(ctx context.Context, items <-chan item) (answered int, err error) {
	first, ok := in.first(ctx, items)
	if !ok {
		return 0, ctx.Err() // nothing left
	}
	ctx, cancel := context.WithCancel(ctx)
	pr, pw := io.Pipe()
	req, err := in.client.request(ctx, http.MethodPost, in.path, pr, "application/x-ndjson")
	if err != nil {
		cancel()
		return 0, err
	}
	var writer sync.WaitGroup
	writer.Go(func() { pw.CloseWithError(in.write(ctx, pw, first, items)) })
	defer func() {
		cancel()
		pr.CloseWithError(context.Canceled)
		writer.Wait()
	}()
	res, err := in.client.send(req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	return in.readResults(res.Body)
}

// first returns what is to be sent first. It waits for the source, so that no connection is
// opened before there is something to send.
func (in *ingestion) first(ctx context.Context, items <-chan item) ([]item, bool) {
	in.mu.Lock()
	pending := append([]item(nil), in.pending...)
	ended := in.ended
	in.mu.Unlock()
	if len(pending) > 0 || ended {
		return pending, len(pending) > 0
	}
	select {
	case it, ok := <-items:
		if !ok {
			in.mu.Lock()
			in.ended = true
			in.mu.Unlock()
			return nil, false
		}
		in.admit(it)
		return []item{it}, true
	case <-ctx.Done():
		return nil, false
	}
}

func (in *ingestion) admit(it item) {
	in.mu.Lock()
	in.pending = append(in.pending, it)
	in.held += int64(len(it.line))
	in.mu.Unlock()
}

// write sends lines until the source ends; then the body ends. An error means that the
// connection is of no use any more; what was sent stays pending.
func (in *ingestion) write(ctx context.Context, to io.Writer, first []item, items <-chan item) error {
	w := bufio.NewWriterSize(to, 64<<10)
	line := func(it item) error {
		if _, err := w.Write(it.line); err != nil {
			return err
		}
		return w.WriteByte('\n')
	}
	for _, it := range first {
		if err := line(it); err != nil {
			return err
		}
	}
	for {
		for in.full() {
			if err := w.Flush(); err != nil {
				return err
			}
			select {
			case <-in.room:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		var it item
		var ok bool
		select {
		case it, ok = <-items:
		default:
			// Nothing at hand: what is written so far should not wait for more.
			if err := w.Flush(); err != nil {
				return err
			}
			select {
			case it, ok = <-items:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if !ok {
			in.mu.Lock()
			in.ended = true
			in.mu.Unlock()
			return w.Flush()
		}
		in.admit(it)
		if err := line(it); err != nil {
			return err
		}
	}
}

func (in *ingestion) full() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return len(in.pending) >= window || in.held >= windowBytes && len(in.pending) > 0
}

// resultLine is one line of the server's answer.
type resultLine struct {
	ID             string    `json:"id"`
	Status         string    `json:"status"`
	Chunks         int64     `json:"chunks"`
	ChunksEmbedded int64     `json:"chunks_embedded"`
	Error          *APIError `json:"error"`
}

func (in *ingestion) readResults(body io.Reader) (answered int, err error) {
	dec := json.NewDecoder(body)
	for {
		var r resultLine
		if err := dec.Decode(&r); errors.Is(err, io.EOF) {
			in.mu.Lock()
			left, ended := len(in.pending), in.ended
			in.mu.Unlock()
			if left == 0 && ended {
				return answered, nil
			}
			return answered, fmt.Errorf("the server ended the stream with %s unanswered", plural(int64(left), "document"))
		} else if err != nil {
			return answered, fmt.Errorf("read the server's answers: %w", err)
		}
		if r.Status == "" && r.Error != nil {
			// The server gave up; its code says whether trying again makes sense.
			r.Error.Status = http.StatusServiceUnavailable
			if r.Error.Code == "internal" {
				r.Error.Status = http.StatusInternalServerError
			}
			return answered, r.Error
		}
		it, ok := in.settle()
		if !ok {
			return answered, errors.New("the server answered more documents than were sent")
		}
		answered++
		in.tally(it, &r)
	}
}

// settle takes the oldest unanswered document: results come in order.
func (in *ingestion) settle() (item, bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.pending) == 0 {
		return item{}, false
	}
	it := in.pending[0]
	in.pending[0] = item{}
	in.pending = in.pending[1:]
	in.held -= int64(len(it.line))
	select {
	case in.room <- struct{}{}:
	default:
	}
	return it, true
}

func (in *ingestion) tally(it item, r *resultLine) {
	in.done += it.bytes
	in.mu.Lock()
	in.sum.Documents++
	in.sum.Chunks += r.Chunks
	in.sum.ChunksEmbedded += r.ChunksEmbedded
	switch r.Status {
	case "indexed":
		in.sum.Indexed++
	case "accepted":
		in.sum.Accepted++
	case "unchanged":
		in.sum.Unchanged++
	case "superseded":
		in.sum.Superseded++
	}
	n := in.sum.Documents
	in.mu.Unlock()
	if r.Status == "failed" {
		var err error = &APIError{Detail: "refused"}
		if r.Error != nil {
			err = r.Error
		}
		origin := it.origin
		if r.ID != "" && r.ID != it.origin {
			origin += " (id " + r.ID + ")"
		}
		in.fault(fileFault{origin, err})
	}
	took := in.e.now().Sub(in.begin).Seconds()
	rate := ""
	if took > 0 {
		rate = fmt.Sprintf(", %.0f/s", float64(n)/took)
	}
	in.bar.show(float64(in.done), float64(in.total), plural(n, "document")+rate)
}

// fault counts a failure and prints the first ones.
func (in *ingestion) fault(f fileFault) {
	in.mu.Lock()
	in.sum.Failed++
	in.shown++
	shown := in.shown
	in.mu.Unlock()
	switch {
	case shown <= maxFaultsShown:
		in.bar.clear()
		in.e.warnf("%s: %s", f.origin, f.err)
	case shown == maxFaultsShown+1:
		in.bar.clear()
		in.e.warnf("more failures are only counted")
	}
}

func (in *ingestion) summary(asJSON bool, err error) {
	in.mu.Lock()
	s := in.sum
	s.Unanswered = int64(len(in.pending))
	in.mu.Unlock()
	took := in.e.now().Sub(in.begin)
	s.Seconds = took.Seconds()
	if err != nil {
		s.Error = err.Error()
	}
	if asJSON {
		raw, merr := json.Marshal(s)
		if merr != nil {
			in.e.warnf("lockstep ingest: %s", merr)
			return
		}
		in.e.printf("%s\n", raw)
		return
	}
	var parts []string
	for _, p := range []struct {
		n    int64
		what string
	}{{s.Indexed, "indexed"}, {s.Accepted, "accepted"}, {s.Unchanged, "unchanged"}, {s.Superseded, "superseded"}, {s.Failed, "failed"}, {s.Unanswered, "not answered"}} {
		if p.n > 0 {
			parts = append(parts, count(p.n)+" "+p.what)
		}
	}
	if len(parts) == 0 {
		parts = []string{"nothing to send"}
	}
	rate := ""
	if sec := took.Seconds(); sec > 0 && s.Documents > 0 {
		rate = fmt.Sprintf(" (%.0f documents/s)", float64(s.Documents)/sec)
	}
	in.e.printf("%s: %s; %s, %s embedded; in %s%s\n", plural(s.Documents, "document"), strings.Join(parts, ", "),
		plural(s.Chunks, "chunk"), count(s.ChunksEmbedded), short(took), rate)
	if err != nil {
		in.e.printf("Not everything was sent. Run the same command again: what is there already is skipped.\n")
	}
}
