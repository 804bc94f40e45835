package httpapi

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"mime"
	"net/http"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/labstack/echo/v4"
	"golang.org/x/sync/semaphore"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

const (
	// streamBatch is the most documents of a stream that are accepted in one transaction.
	streamBatch = 128 // unmeasured
	// streamAhead bounds the bytes that are read ahead of what was ingested. A longer line is
	// taken alone.
	streamAhead = 4 << 20
	// streamRetry is how long a stream waits in all for a store or a queue that is full before
	// it gives up on a batch.
	streamRetry = 30 * time.Second
)

func isStream(r *http.Request) bool {
	mt, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	return err == nil && mt == mediaNDJSON
}

// line is one line of a stream: a document, or why it is none.
type line struct {
	number int
	doc    documentJSON
	fault  *problem
	weight int64
}

type lineResultJSON struct {
	Line int `json:"line"`
	resultJSON
}

// streamDocuments reads documents one a line and answers one result a line, in order, while
// it reads. Documents are batched by what has arrived while the last batch was worked on, so
// a caller who waits for each answer gets it at once, and one who does not gets throughput. A
// document whose id occurred before is a later version of it, as if sent in another request.
//
// A line that is not a document fails alone. When the stores stay away, or the stream breaks,
// the last line is {"error":...} and nothing more is read: everything unanswered may be sent
// again, because writing is idempotent.
func (s *Server) streamDocuments(c echo.Context, collection string, wait bool) error {
	ctx, cancel := context.WithCancel(c.Request().Context())
	defer cancel()
	ctl := http.NewResponseController(c.Response())
	// Without full duplex, net/http would swallow the rest of an HTTP/1 body before the first
	// byte of the reply. HTTP/2 is always duplex, and a recorder in a test does not matter.
	_ = ctl.EnableFullDuplex()
	if c.Request().ProtoMajor == 1 {
		// A stream may end before its body does, and net/http must not take the rest of it for
		// the next request. Closing also makes it wait until the caller has read the answer.
		c.Response().Header().Set("Connection", "close")
	}

	lines := make(chan line, streamBatch)
	ahead := semaphore.NewWeighted(streamAhead)
	broken := make(chan error, 1)
	go func() {
		defer close(lines)
		broken <- s.readLines(ctx, c, ctl, lines, ahead)
	}()
	// The reader must be gone before the handler returns: it touches the request's body.
	defer func() {
		cancel()
		deadline(ctl.SetReadDeadline, -time.Second)
		for range lines { //nolint:revive // only to let the reader end
		}
	}()

	out := &lineWriter{c: c, ctl: ctl, idle: s.cfg.StreamIdle}
	for {
		batch, more := takeBatch(lines)
		if len(batch) > 0 {
			results, err := s.ingestLines(ctx, c, collection, wait, batch)
			for i := range batch {
				ahead.Release(batch[i].weight)
			}
			if err != nil && !out.started {
				return err // nothing was written or accepted: an ordinary error reply
			}
			if err != nil {
				return out.fail(err)
			}
			if err := out.write(batch, results); err != nil {
				return err
			}
		}
		if !more {
			break
		}
	}
	if err := <-broken; err != nil {
		if !out.started {
			return err
		}
		return out.fail(err)
	}
	if !out.started {
		return refuse(http.StatusBadRequest, "empty_input", "the stream has no documents")
	}
	return nil
}

// takeBatch waits for one line, then takes what else is there without waiting. more is false
// at the end of the stream.
func takeBatch(lines <-chan line) (batch []line, more bool) {
	first, ok := <-lines
	if !ok {
		return nil, false
	}
	batch = append(batch, first)
	for len(batch) < streamBatch {
		select {
		case l, ok := <-lines:
			if !ok {
				return batch, false
			}
			batch = append(batch, l)
		default:
			return batch, true
		}
	}
	return batch, true
}

// readLines cuts the body into lines and decodes them. It returns nil at the end of the body.
func (s *Server) readLines(ctx context.Context, c echo.Context, ctl *http.ResponseController, lines chan<- line, ahead *semaphore.Weighted) error {
	r := bufio.NewReaderSize(c.Request().Body, 64<<10)
	var buf []byte
	for number := 1; ; number++ {
		deadline(ctl.SetReadDeadline, s.cfg.StreamIdle)
		// Looked at after the deadline was set: whoever cancels sets a deadline in the past
		// afterwards, so one of the two ends the read.
		if ctx.Err() != nil {
			return ctx.Err()
		}
		raw, tooLong, err := readLine(r, buf[:0], s.cfg.MaxLineBytes)
		buf = raw
		if err != nil && !errors.Is(err, io.EOF) {
			return bodyReadError(err)
		}
		if tooLong || len(bytes.TrimSpace(raw)) > 0 {
			l := decodeLine(raw, tooLong, s.cfg.MaxLineBytes)
			l.number = number
			l.weight = min(int64(len(raw)), streamAhead)
			if ahead.Acquire(ctx, l.weight) != nil {
				return ctx.Err()
			}
			select {
			case lines <- l:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err != nil {
			return nil
		}
	}
}

// readLine appends one line without its end to buf. A line over limit is read to its end
// without being kept.
func readLine(r *bufio.Reader, buf []byte, limit int) (line []byte, tooLong bool, err error) {
	for {
		part, err := r.ReadSlice('\n')
		if !tooLong {
			buf = append(buf, part...)
			if len(bytes.TrimRight(buf, "\r\n")) > limit {
				tooLong, buf = true, buf[:0]
			}
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err != nil:
			return buf, tooLong, err
		}
		return bytes.TrimRight(buf, "\r\n"), tooLong, nil
	}
}

func decodeLine(raw []byte, tooLong bool, limit int) line {
	var l line
	if tooLong {
		l.fault = refuse(http.StatusRequestEntityTooLarge, "line_too_long", "the line is longer than %d bytes", limit)
		return l
	}
	if err := unmarshal(raw, &l.doc, strict); err != nil {
		l.fault = toProblem(err)
	}
	return l
}

// ingestLines answers a result for each line. Runs without a repeated id are sent together.
func (s *Server) ingestLines(ctx context.Context, c echo.Context, collection string, wait bool, batch []line) ([]corpus.DocumentResult, error) {
	results := make([]corpus.DocumentResult, len(batch))
	var docs []corpus.DocumentInput
	var place []int
	seen := map[string]bool{}
	flush := func() error {
		if len(docs) == 0 {
			return nil
		}
		answered, err := s.ingestPatiently(ctx, c, corpus.IngestRequest{Collection: collection, Documents: docs, Wait: wait})
		if err != nil {
			return err
		}
		for k, i := range place {
			results[i] = answered[k]
		}
		docs, place = nil, nil
		clear(seen)
		return nil
	}
	for i := range batch {
		l := &batch[i]
		if l.fault != nil {
			results[i] = corpus.DocumentResult{ID: l.doc.ID, Status: corpus.StatusFailed,
				Err: &corpus.Error{Kind: corpus.Invalid, Code: l.fault.Code, Detail: l.fault.Detail, Fields: l.fault.Errors}}
			continue
		}
		d, bad := l.doc.document("")
		if len(bad) > 0 {
			results[i] = failedResult(l.doc.ID, bad)
			continue
		}
		if seen[d.ID] {
			if err := flush(); err != nil {
				return nil, err
			}
		}
		seen[d.ID] = true
		docs = append(docs, d)
		place = append(place, i)
	}
	return results, flush()
}

// ingestPatiently lets a full queue or a store that is away for a moment slow the stream down
// instead of breaking it: not reading on is how a stream says "wait".
func (s *Server) ingestPatiently(ctx context.Context, c echo.Context, req corpus.IngestRequest) ([]corpus.DocumentResult, error) {
	pause := 100 * time.Millisecond
	until := time.Now().Add(streamRetry)
	for {
		attempt, cancel := context.WithTimeout(ctx, s.cfg.IngestTimeout)
		answered, err := s.deps.Ingester.Ingest(attempt, req)
		cancel()
		if err == nil && len(answered) != len(req.Documents) {
			return nil, errors.New("ingest answered " + strconv.Itoa(len(answered)) + " results for " + strconv.Itoa(len(req.Documents)) + " documents")
		}
		if err == nil || !corpus.Retryable(err) || ctx.Err() != nil {
			return answered, err
		}
		wait := pause
		var ce *corpus.Error
		if errors.As(err, &ce) && ce.RetryAfter > 0 {
			wait = ce.RetryAfter
		}
		if time.Now().Add(wait).After(until) {
			return nil, err
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, context.Cause(ctx)
		}
		pause = min(2*pause, 2*time.Second)
	}
}

// lineWriter sends results as they come.
type lineWriter struct {
	c       echo.Context
	ctl     *http.ResponseController
	idle    time.Duration
	started bool
	buf     bytes.Buffer
}

func (w *lineWriter) start() {
	if !w.started {
		w.started = true
		w.c.Response().Header().Set("Content-Type", mediaNDJSON)
		w.c.Response().WriteHeader(http.StatusOK)
	}
}

func (w *lineWriter) write(batch []line, results []corpus.DocumentResult) error {
	w.start()
	w.buf.Reset()
	for i := range batch {
		if err := json.MarshalWrite(&w.buf, lineResultJSON{Line: batch[i].number, resultJSON: renderResult(&results[i])}); err != nil {
			return err
		}
		w.buf.WriteByte('\n')
	}
	return w.flush()
}

func (w *lineWriter) flush() error {
	deadline(w.ctl.SetWriteDeadline, w.idle)
	if _, err := w.c.Response().Write(w.buf.Bytes()); err != nil {
		return err
	}
	return w.ctl.Flush()
}

// fail ends a stream that has begun: the last line says why, the error goes to the log.
func (w *lineWriter) fail(err error) error {
	w.buf.Reset()
	end := struct {
		Error *errorJSON `json:"error"`
	}{renderError(err)}
	if werr := json.MarshalWrite(&w.buf, end); werr != nil {
		return werr
	}
	w.buf.WriteByte('\n')
	if werr := w.flush(); werr != nil {
		return errors.Join(err, werr)
	}
	return &endedError{err}
}

// endedError is a failure that a reply under way has already told its caller about: it is
// logged, and the connection is left whole.
type endedError struct{ err error }

// Error renders the cause.
func (e *endedError) Error() string { return "stream ended early: " + e.err.Error() }

// Unwrap returns the cause.
func (e *endedError) Unwrap() error { return e.err }
