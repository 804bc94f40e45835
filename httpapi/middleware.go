package httpapi

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/labstack/echo/v4"
)

const headerRequestID = "X-Request-Id"

// maxRequestID bounds a caller's own request id, which is echoed and logged.
const maxRequestID = 128

// requestID returns the caller's id when it is sane, else a random one.
func requestID(given string) string {
	if len(given) > 0 && len(given) <= maxRequestID {
		ok := true
		for i := 0; i < len(given) && ok; i++ {
			ch := given[i]
			ok = ch >= '0' && ch <= '9' || ch >= 'a' && ch <= 'z' || ch >= 'A' && ch <= 'Z' || ch == '-' || ch == '_' || ch == '.' || ch == ':'
		}
		if ok {
			return given
		}
	}
	var b [12]byte
	rand.Read(b[:]) // never fails: the runtime aborts instead
	return hex.EncodeToString(b[:])
}

// countingBody counts what was read of a body.
type countingBody struct {
	io.ReadCloser
	n atomic.Int64
}

// Read reads and counts.
func (b *countingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	return n, err
}

const (
	ctxRoute   = "lockstep.route"
	ctxFlavour = "lockstep.flavour"
)

// flavourOf is the contract that the reply has to speak. A handler that finds another
// contract in the body (POST /embed) says so with setFlavour.
func flavourOf(c echo.Context) flavour {
	if f, ok := c.Get(ctxFlavour).(flavour); ok {
		return f
	}
	if rt, ok := c.Get(ctxRoute).(*route); ok {
		return rt.flavour
	}
	return native
}

func setFlavour(c echo.Context, f flavour) { c.Set(ctxFlavour, f) }

// observe is the outermost middleware: it names the request, recovers a panic, renders the
// error that a handler returned, counts and logs. Everything about errors happens here once.
func (s *Server) observe(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) (err error) {
		began := time.Now()
		r := c.Request()
		id := requestID(r.Header.Get(headerRequestID))
		h := c.Response().Header()
		h.Set(headerRequestID, id)
		h.Set("X-Content-Type-Options", "nosniff")
		body := &countingBody{ReadCloser: r.Body}
		r.Body = body

		err = s.guard(next, c)
		var panicked *panicError
		aborted := false
		if err != nil {
			if errors.As(err, &panicked) {
				s.m.panics.Inc()
			}
			if c.Response().Committed {
				// The status is out. A reply that is cut short without its closing chunk is the
				// only way left to say that it is not complete.
				var told *endedError
				aborted = !errors.As(err, &told)
			} else if werr := s.writeProblem(c, toProblem(err)); werr != nil && r.Context().Err() == nil {
				s.log.WarnContext(r.Context(), "reply not written", "request_id", id, "err", werr)
			}
		}
		// Not the request that the handler saw: bound has ended that one's context by now.
		left := errors.Is(r.Context().Err(), context.Canceled)
		s.record(c, left, body.n.Load(), time.Since(began), err, panicked)
		if aborted {
			panic(http.ErrAbortHandler) // net/http closes the connection and logs nothing
		}
		return nil
	}
}

// panicError is a recovered panic on its way to the log.
type panicError struct {
	value any
	stack []byte
}

// Error renders the panic's value.
func (p *panicError) Error() string { return fmt.Sprintf("panic: %v", p.value) }

func (s *Server) guard(next echo.HandlerFunc, c echo.Context) (err error) {
	defer func() {
		v := recover()
		if v == nil {
			return
		}
		if e, ok := v.(error); ok && errors.Is(e, http.ErrAbortHandler) {
			panic(v)
		}
		err = &panicError{value: v, stack: debug.Stack()}
	}()
	return next(c)
}

// record counts and logs a request. left says that the caller went away before the answer.
func (s *Server) record(c echo.Context, left bool, in int64, took time.Duration, err error, panicked *panicError) {
	r := c.Request()
	template, method := "unmatched", "other"
	rt, matched := c.Get(ctxRoute).(*route)
	if matched {
		template, method = rt.path, r.Method
	}
	status := c.Response().Status
	if left && err != nil {
		status = statusClientLeft
	}
	s.m.requests.WithLabelValues(template, method, strconv.Itoa(status)).Inc()
	s.m.seconds.WithLabelValues(template).Observe(took.Seconds())
	s.m.received.Add(float64(in))
	s.m.sent.Add(float64(c.Response().Size))

	level := slog.LevelInfo
	switch {
	case status >= 500:
		level = slog.LevelError
		if toProblem(err).Status != http.StatusInternalServerError {
			level = slog.LevelWarn // a store is away: expected, and named in the reply
		}
	case matched && rt.quiet:
		level = slog.LevelDebug
	}
	if !s.log.Enabled(r.Context(), level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("request_id", c.Response().Header().Get(headerRequestID)),
		slog.String("method", r.Method),
		slog.String("route", template),
		slog.Int("status", status),
		slog.Int64("bytes_in", in),
		slog.Int64("bytes_out", c.Response().Size),
		slog.Duration("duration", took),
		slog.String("remote", r.RemoteAddr),
	}
	if name, ok := c.Get(ctxKeyName).(string); ok {
		attrs = append(attrs, slog.String("key", name))
	}
	if err != nil && (status >= 400 || c.Response().Committed) {
		attrs = append(attrs, slog.String("err", err.Error()))
	}
	if panicked != nil {
		attrs = append(attrs, slog.String("stack", string(panicked.stack)))
	}
	s.log.LogAttrs(r.Context(), level, "request", attrs...)
}

// admit bounds how many requests are worked on at once. A full service says so at once
// rather than letting callers time out in a queue.
func (s *Server) admit(rt *route) echo.MiddlewareFunc {
	return func(next echo.HandlerFunc) echo.HandlerFunc {
		if rt.quiet {
			return next
		}
		return func(c echo.Context) error {
			select {
			case s.slots <- struct{}{}:
			default:
				s.m.rejected.WithLabelValues("overloaded").Inc()
				return refuse(http.StatusTooManyRequests, "overloaded", "%d requests are being worked on, the most this service takes at once; retry after the given time", cap(s.slots))
			}
			s.m.inFlight.Inc()
			defer func() {
				s.m.inFlight.Dec()
				<-s.slots
			}()
			return next(c)
		}
	}
}

// bound gives a request its deadlines and its body limit. Streams set their own.
func (s *Server) bound(rt *route) echo.MiddlewareFunc {
	return func(next echo.HandlerFunc) echo.HandlerFunc {
		return func(c echo.Context) error {
			if rt.stream && isStream(c.Request()) {
				return next(c)
			}
			r := c.Request()
			timeout := rt.timeout(s.cfg)
			ctx, cancel := context.WithTimeout(r.Context(), timeout)
			defer cancel()
			c.SetRequest(r.WithContext(ctx))
			s.limitBody(c)
			// A slow sender or reader must not hold a slot for ever. A large reply renews its
			// deadline as it goes (see reply.send).
			ctl := http.NewResponseController(c.Response())
			if r.ContentLength != 0 {
				deadline(ctl.SetReadDeadline, timeout) // ended by readBody
			}
			deadline(ctl.SetWriteDeadline, timeout+writeTime)
			return next(c)
		}
	}
}

// writeTime is what a reply has beyond the time for its work.
const writeTime = time.Minute

// deadline sets one if the connection has any: an in-process recorder has none.
func deadline(set func(time.Time) error, after time.Duration) {
	_ = set(time.Now().Add(after))
}

// limitBody refuses a body that says it is too large before reading it, and stops reading one
// that turns out to be.
func (s *Server) limitBody(c echo.Context) {
	r := c.Request()
	r.Body = http.MaxBytesReader(c.Response(), r.Body, s.cfg.MaxBodyBytes)
	if r.ContentLength > s.cfg.MaxBodyBytes {
		r.Body = errorBody{Closer: r.Body, err: &http.MaxBytesError{Limit: s.cfg.MaxBodyBytes}}
	}
}

// errorBody fails every read.
type errorBody struct {
	io.Closer
	err error
}

// Read returns the error.
func (b errorBody) Read([]byte) (int, error) { return 0, b.err }
