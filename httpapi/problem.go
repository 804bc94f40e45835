package httpapi

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/labstack/echo/v4"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// problem is an error reply (RFC 9457) before it is rendered in the contract of its route.
// It is also the error that handlers return for what only HTTP knows.
type problem struct {
	Type      string              `json:"type"`
	Title     string              `json:"title"`
	Status    int                 `json:"status"`
	Code      string              `json:"code"`
	Detail    string              `json:"detail"`
	RequestID string              `json:"request_id,omitempty"`
	Errors    []corpus.FieldError `json:"errors,omitempty"`
	// Limit is the bound that was exceeded (413).
	Limit int64 `json:"limit,omitzero"`
	// Checks names what is ready and what is not (readyz).
	Checks []checkJSON `json:"checks,omitempty"`

	retryAfter time.Duration
	// cause is for the log, never for the reply.
	cause error
}

// Error renders the problem for the log.
func (p *problem) Error() string {
	if p.cause != nil {
		return p.Code + ": " + p.cause.Error()
	}
	return p.Code + ": " + p.Detail
}

// Unwrap returns the cause.
func (p *problem) Unwrap() error { return p.cause }

// refuse makes a problem with a status of its own.
func refuse(status int, code, format string, args ...any) *problem {
	return &problem{Status: status, Code: code, Detail: fmt.Sprintf(format, args...)}
}

// invalidField makes the 422 for one field.
func invalidField(pointer, code, format string, args ...any) *problem {
	return invalidFields([]corpus.FieldError{{Pointer: pointer, Code: code, Detail: fmt.Sprintf(format, args...)}})
}

// invalidFields makes the 422 for some fields. The detail repeats the first, because that is
// what people see in a log.
func invalidFields(fields []corpus.FieldError) *problem {
	detail := fields[0].Detail
	if fields[0].Pointer != "" {
		detail = fields[0].Pointer + ": " + detail
	}
	if n := len(fields) - 1; n > 0 {
		detail += fmt.Sprintf(" (and %d more)", n)
	}
	return &problem{Status: http.StatusUnprocessableEntity, Code: "validation_failed", Detail: detail, Errors: fields}
}

// statusOfKind is the only table from error kind to status.
func statusOfKind(k corpus.Kind) int {
	switch k {
	case corpus.Invalid:
		return http.StatusUnprocessableEntity
	case corpus.NotFound:
		return http.StatusNotFound
	case corpus.Conflict:
		return http.StatusConflict
	case corpus.Overloaded:
		return http.StatusTooManyRequests
	case corpus.Unavailable:
		return http.StatusServiceUnavailable
	default:
		return http.StatusInternalServerError
	}
}

// codeOfStatus names what net/http and Echo refuse before a handler sees it.
func codeOfStatus(status int) string {
	switch status {
	case http.StatusNotFound:
		return "route_not_found"
	case http.StatusMethodNotAllowed:
		return "method_not_allowed"
	case http.StatusRequestEntityTooLarge:
		return "body_too_large"
	case http.StatusUnsupportedMediaType:
		return "unsupported_media_type"
	case http.StatusBadRequest:
		return "bad_request"
	default:
		return "internal"
	}
}

// statusClientLeft is logged (never sent: nobody listens) when the caller went away.
const statusClientLeft = 499

// toProblem turns any error into the reply it deserves. Only the details of corpus errors and
// problems are shown: any other text may carry SQL, paths or addresses.
func toProblem(err error) *problem {
	var p *problem
	var ce *corpus.Error
	var he *echo.HTTPError
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &p):
		q := *p
		p = &q
	case errors.As(err, &tooLarge):
		p = bodyTooLarge(tooLarge.Limit)
	case errors.As(err, &ce):
		p = &problem{Status: statusOfKind(ce.Kind), Code: ce.Code, Detail: ce.Detail, Errors: ce.Fields, retryAfter: ce.RetryAfter, cause: err}
		if ce.Kind == corpus.Unavailable && errors.Is(err, context.DeadlineExceeded) {
			p.Status = http.StatusGatewayTimeout
		}
		if p.Code == "" {
			p.Code = string(corpus.KindOf(err))
		}
		if p.Detail == "" {
			p.Detail = genericDetail(p.Status)
		}
	case errors.As(err, &he):
		p = &problem{Status: he.Code, Code: codeOfStatus(he.Code), Detail: genericDetail(he.Code), cause: he.Internal}
	case errors.Is(err, context.DeadlineExceeded):
		p = &problem{Status: http.StatusGatewayTimeout, Code: "timeout", Detail: "the request ran out of time; send less at once or retry later", cause: err}
	case errors.Is(err, context.Canceled):
		p = &problem{Status: http.StatusServiceUnavailable, Code: "cancelled", Detail: "the request was cancelled before it was answered", cause: err}
	default:
		p = &problem{Status: http.StatusInternalServerError, Code: "internal", Detail: genericDetail(http.StatusInternalServerError), cause: err}
	}
	if p.Type == "" {
		p.Type = "urn:lockstep:error:" + p.Code
	}
	if p.Title == "" {
		p.Title = http.StatusText(p.Status)
	}
	if p.retryAfter <= 0 && (p.Status == http.StatusTooManyRequests || p.Status == http.StatusServiceUnavailable) {
		p.retryAfter = time.Second
	}
	return p
}

func genericDetail(status int) string {
	switch status {
	case http.StatusNotFound:
		return "no such route; GET /openapi.json lists them all"
	case http.StatusMethodNotAllowed:
		return "this route does not answer that method; see the Allow header"
	case http.StatusInternalServerError:
		return "internal error; the log has more under this request_id"
	default:
		return http.StatusText(status)
	}
}

func bodyTooLarge(limit int64) *problem {
	p := refuse(http.StatusRequestEntityTooLarge, "body_too_large", "the body is larger than %d bytes; send less at once, or stream documents as application/x-ndjson", limit)
	p.Limit = limit
	return p
}

// plainDetail is the detail for contracts that have no place for pointers in their messages.
func (p *problem) plainDetail() string {
	if len(p.Errors) == 1 {
		return strings.TrimPrefix(p.Detail, p.Errors[0].Pointer+": ")
	}
	return p.Detail
}

// retryAfterSeconds renders a wait for the header, in whole seconds, at least one.
func retryAfterSeconds(d time.Duration) string {
	return strconv.Itoa(max(1, int(math.Ceil(d.Seconds()))))
}

// flavour is whose contract a route speaks; it shapes errors.
type flavour int

const (
	native flavour = iota
	tei
	openAI
	page
)

// writeProblem renders p in the contract of the route. It is called once for a request.
func (s *Server) writeProblem(c echo.Context, p *problem) error {
	h := c.Response().Header()
	if p.retryAfter > 0 {
		h.Set("Retry-After", retryAfterSeconds(p.retryAfter))
	}
	p.RequestID = h.Get(headerRequestID)
	if c.Request().Method == http.MethodHead {
		return c.NoContent(p.Status)
	}
	switch flavourOf(c) {
	case tei:
		return s.writeTEIProblem(c, p)
	case openAI:
		return s.writeOpenAIProblem(c, p)
	case page:
		return s.writePageProblem(c, p)
	}
	body, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("render problem: %w", err)
	}
	return c.Blob(p.Status, "application/problem+json", body)
}
