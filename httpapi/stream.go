package httpapi

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/labstack/echo/v4"
	"golang.org/x/sync/semaphore"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

const (
	// streamBatch is the most documents of a stream that are accepted in one transaction.
	streamBatch = 128 // unmeasured
	// streamFlights is how many batches are worked on side by side, so that the model is not
	// idle while the last chunks of one batch settle.
	streamFlights = 4 // unmeasured
	// streamAhead bounds the bytes that are read ahead of what was answered, over all batches.
	// A longer line is taken alone.
	streamAhead = 8 << 20
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
//
// Three parties: readLines cuts lines, dispatch makes flights of them, and this goroutine
// answers the flights in order. It ends the other two and waits for them.
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

	st := &stream{
		s: s, collection: collection, wait: wait, body: c.Request().Body, ctl: ctl,
		lines: make(chan line, streamBatch), flights: make(chan *flight, streamFlights-1),
		ahead: semaphore.NewWeighted(streamAhead), read: make(chan struct{}), over: make(chan struct{}),
	}
	go st.readLines(ctx)
	go st.dispatch(ctx)
	defer func() {
		st.stop(cancel, 0)
		for f := range st.flights {
			<-f.done
		}
	}()

	out := &lineWriter{c: c, ctl: ctl, idle: s.cfg.StreamIdle}
	for f := range st.flights {
		<-f.done
		if f.err != nil {
			return st.end(c, out, f.err, cancel)
		}
		if err := out.write(f.batch, f.results); err != nil {
			return err
		}
	}
	// The flights are closed after the lines, which are closed after broken was set.
	switch {
	case st.broken != nil:
		return st.end(c, out, st.broken, cancel)
	case !out.started:
		return refuse(http.StatusBadRequest, "empty_input", "the stream has no documents")
	}
	return nil
}

// How long, and how much, is read and thrown away of a stream that has ended early. A caller
// who goes on sending into a closed connection would lose the reply that says why.
const (
	lingerTime  = 2 * time.Second
	lingerBytes = 256 << 20
)

// end tells the caller why the stream ends early: by an ordinary error reply while nothing
// was answered yet, else by a last line.
func (st *stream) end(c echo.Context, out *lineWriter, err error, cancel context.CancelFunc) error {
	if out.started {
		err = out.fail(err)
	} else if werr := st.s.writeProblem(c, toProblem(err)); werr != nil {
		err = errors.Join(err, werr)
	} else {
		err = &endedError{err}
	}
	if ferr := st.ctl.Flush(); ferr != nil {
		return err // nobody reads it
	}
	st.stop(cancel, lingerTime)
	return err
}

// stop ends the reader, which must be gone before the handler returns: the request's body is
// not ours afterwards. For the given time it reads on and throws away.
func (st *stream) stop(cancel context.CancelFunc, linger time.Duration) {
	cancel()
	st.once.Do(func() {
		st.linger = linger
		close(st.over)
		select {
		case <-st.read:
			return
		default:
		}
		// The reader may be waiting for the network. It looks at over after each deadline that
		// it sets itself, so the last deadline is one of ours.
		deadline(st.ctl.SetReadDeadline, 2*linger)
	})
	<-st.read
}

// stream is one request's state. lines and flights are closed by their only senders.
type stream struct {
	s          *Server
	collection string
	wait       bool
	body       io.Reader
	ctl        *http.ResponseController
	lines      chan line
	flights    chan *flight
	ahead      *semaphore.Weighted
	// over is closed when nothing more is wanted; linger is set before.
	over   chan struct{}
	once   sync.Once
	linger time.Duration
	// broken is why the body was not read to its end; it is set before lines is closed. read is
	// closed when the reader is gone.
	broken error
	read   chan struct{}
}

// flight is a batch on its way. results and err are read after done is closed.
type flight struct {
	batch   []line
	ids     map[string]bool
	done    chan struct{}
	results []corpus.DocumentResult
	err     error
}

// dispatch starts a flight for each batch, in order. A flight that repeats an id of one that
// is still under way waits for it: a document's versions are taken in the order of the lines.
func (st *stream) dispatch(ctx context.Context) {
	defer close(st.flights)
	var under []*flight
	for more := true; more; {
		var f flight
		f.batch, more = takeBatch(st.lines)
		if len(f.batch) == 0 {
			return
		}
		f.ids, f.done = make(map[string]bool, len(f.batch)), make(chan struct{})
		for i := range f.batch {
			f.ids[f.batch[i].doc.ID] = true
		}
		under = slices.DeleteFunc(under, func(u *flight) bool {
			if u.overlaps(&f) {
				<-u.done
			}
			return u.landed()
		})
		select {
		case st.flights <- &f: // waits while enough are under way
		case <-ctx.Done():
			return
		}
		under = append(under, &f)
		go func() {
			defer close(f.done)
			f.results, f.err = st.ingestLines(ctx, f.batch)
			for i := range f.batch {
				st.ahead.Release(f.batch[i].weight)
			}
		}()
	}
}

func (f *flight) overlaps(other *flight) bool {
	for id := range other.ids {
		if f.ids[id] {
			return true
		}
	}
	return false
}

func (f *flight) landed() bool {
	select {
	case <-f.done:
		return true
	default:
		return false
	}
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

// readLines cuts the body into lines and decodes them, until its end or until nothing more is
// wanted.
func (st *stream) readLines(ctx context.Context) {
	defer close(st.read)
	r := bufio.NewReaderSize(st.body, 64<<10)
	st.broken = st.cutLines(ctx, r)
	close(st.lines)
	if st.broken == nil {
		// At the end of the body. From here on, net/http watches the connection: a deadline that
		// was meant for lines must not look like a caller who left.
		_ = st.ctl.SetReadDeadline(time.Time{})
		return
	}
	<-st.over
	if st.linger > 0 {
		st.throwAway(r)
	}
}

// throwAway reads on while the caller sends, up to the limits. It ends between two reads, not
// by a deadline, which is why the deadline is twice as far: net/http closes a connection
// gently, after a pause, only when it finds that more of the body is there to be read, and
// cannot look after a read has failed.
func (st *stream) throwAway(r io.Reader) {
	deadline(st.ctl.SetReadDeadline, 2*st.linger)
	buf := make([]byte, 64<<10)
	start := time.Now()
	for n := 0; n < lingerBytes && time.Since(start) < st.linger; {
		m, err := r.Read(buf)
		if err != nil {
			return
		}
		n += m
	}
}

// cutLines returns nil at the end of the body.
func (st *stream) cutLines(ctx context.Context, r *bufio.Reader) error {
	var buf []byte
	for number := 1; ; number++ {
		deadline(st.ctl.SetReadDeadline, st.s.cfg.StreamIdle)
		select {
		case <-st.over:
			return context.Canceled
		default:
		}
		raw, tooLong, err := readLine(r, buf[:0], st.s.cfg.MaxLineBytes)
		buf = raw
		if err != nil && !errors.Is(err, io.EOF) {
			return bodyReadError(err)
		}
		if tooLong || len(bytes.TrimSpace(raw)) > 0 {
			l := decodeLine(raw, tooLong, st.s.cfg.MaxLineBytes)
			l.number = number
			l.weight = min(int64(len(raw)), streamAhead)
			if err := st.ahead.Acquire(ctx, l.weight); err != nil {
				return err
			}
			select {
			case st.lines <- l:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err != nil {
			return nil //nolint:nilerr // the end of the body; other errors returned above
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
func (st *stream) ingestLines(ctx context.Context, batch []line) ([]corpus.DocumentResult, error) {
	results := make([]corpus.DocumentResult, len(batch))
	var docs []corpus.DocumentInput
	var place []int
	seen := map[string]bool{}
	flush := func() error {
		if len(docs) == 0 {
			return nil
		}
		answered, err := st.ingestPatiently(ctx, corpus.IngestRequest{Collection: st.collection, Documents: docs, Wait: st.wait})
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
func (st *stream) ingestPatiently(ctx context.Context, req corpus.IngestRequest) ([]corpus.DocumentResult, error) {
	pause := 100 * time.Millisecond
	until := time.Now().Add(streamRetry)
	for {
		attempt, cancel := context.WithTimeout(ctx, st.s.cfg.IngestTimeout)
		answered, err := st.s.deps.Ingester.Ingest(attempt, req)
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
