package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Client speaks to one server. It is safe for concurrent use.
type Client struct {
	base *url.URL
	key  string
	http *http.Client
}

// NewClient checks the address. key may be empty.
func NewClient(server, key string) (*Client, error) {
	u, err := url.Parse(server)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, fmt.Errorf("the server's address %q is not a URL such as %s", server, DefaultServer)
	}
	u.Path = strings.TrimSuffix(u.Path, "/")
	return &Client{base: u, key: key, http: &http.Client{
		Transport: &http.Transport{
			Proxy:       http.ProxyFromEnvironment,
			DialContext: (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
			// Replies of a stream begin when the first documents are indexed.
			ResponseHeaderTimeout: 10 * time.Minute,
			ForceAttemptHTTP2:     true,
			IdleConnTimeout:       time.Minute,
		},
	}}, nil
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// APIError is an error reply of the server.
type APIError struct {
	Status     int
	Code       string              `json:"code"`
	Detail     string              `json:"detail"`
	RequestID  string              `json:"request_id"`
	Errors     []corpus.FieldError `json:"errors"`
	RetryAfter time.Duration       `json:"-"`
}

// Error renders what a person needs.
func (e *APIError) Error() string {
	s := e.Detail
	if s == "" {
		s = http.StatusText(e.Status)
	}
	if e.Code != "" {
		s += " (" + e.Code + ")"
	}
	for i, f := range e.Errors {
		if i == 0 && len(e.Errors) == 1 {
			break // the detail says the same
		}
		s += "\n  " + f.Pointer + ": " + f.Detail
	}
	if e.Status >= 500 && e.RequestID != "" {
		s += " [request " + e.RequestID + "]"
	}
	return s
}

// Temporary reports whether the same request may succeed later.
func (e *APIError) Temporary() bool {
	return e.Status == http.StatusTooManyRequests || e.Status == http.StatusServiceUnavailable ||
		e.Status == http.StatusBadGateway || e.Status == http.StatusGatewayTimeout
}

// unreachable is a failure to speak to the server at all.
type unreachable struct {
	server string
	err    error
}

// Error says what to do.
func (u *unreachable) Error() string {
	return fmt.Sprintf("no Lockstep answers at %s: %s\nstart one with `lockstep serve`, or name another with --server or LOCKSTEP_SERVER", u.server, rootCause(u.err))
}

// Unwrap returns the cause.
func (u *unreachable) Unwrap() error { return u.err }

func rootCause(err error) string {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err.Error()
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		return ue.Err.Error()
	}
	return err.Error()
}

// isUnreachable reports whether no server answered.
func isUnreachable(err error) bool {
	var u *unreachable
	return errors.As(err, &u)
}

func (c *Client) request(ctx context.Context, method, path string, body io.Reader, contentType string) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base.String()+path, body)
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	if c.key != "" {
		req.Header.Set("Authorization", "Bearer "+c.key)
	}
	return req, nil
}

// send performs one request; an error reply becomes an *APIError.
func (c *Client) send(req *http.Request) (*http.Response, error) {
	res, err := c.http.Do(req)
	if err != nil {
		if req.Context().Err() != nil {
			return nil, context.Cause(req.Context())
		}
		return nil, &unreachable{c.base.Redacted(), err}
	}
	if res.StatusCode < 300 {
		return res, nil
	}
	defer res.Body.Close()
	return nil, readAPIError(res)
}

// maxErrorBody bounds what is read of an error reply.
const maxErrorBody = 1 << 20

func readAPIError(res *http.Response) *APIError {
	e := &APIError{Status: res.StatusCode, RequestID: res.Header.Get("X-Request-Id")}
	raw, err := io.ReadAll(io.LimitReader(res.Body, maxErrorBody))
	mt, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type"))
	if err == nil && strings.HasSuffix(mt, "json") {
		_ = json.Unmarshal(raw, e) // what cannot be read stays empty: the status says enough
		e.Status = res.StatusCode
	}
	if e.Detail == "" {
		e.Detail = fmt.Sprintf("the server answered %s", res.Status)
	}
	if n, err := strconv.Atoi(res.Header.Get("Retry-After")); err == nil && n >= 0 {
		e.RetryAfter = time.Duration(n) * time.Second
	}
	return e
}

// call sends in as JSON and decodes the reply into out; either may be nil.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	contentType := ""
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode the request: %w", err)
		}
		body, contentType = bytes.NewReader(raw), "application/json"
	}
	req, err := c.request(ctx, method, path, body, contentType)
	if err != nil {
		return err
	}
	res, err := c.send(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		return fmt.Errorf("read the reply: %w", err)
	}
	if out == nil || len(raw) == 0 {
		return nil
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return fmt.Errorf("%s does not answer as Lockstep does: %w", c.base.Redacted(), err)
	}
	return nil
}

// Start begins a reconcile run.
func (c *Client) Start(ctx context.Context, r corpus.ReconcileRequest) (corpus.ID, error) {
	in := map[string]any{"collection": r.Collection, "depth": r.Depth, "repair": r.Repair, "force": r.Force, "resume": r.Resume}
	if r.MaxDeletes > 0 {
		in["max_deletes"] = r.MaxDeletes
	}
	if r.DeleteForeign != "" {
		in["delete_foreign"] = r.DeleteForeign
	}
	var out struct {
		RunID corpus.ID `json:"run_id"`
	}
	err := c.call(ctx, http.MethodPost, "/admin/reconcile", in, &out)
	return out.RunID, err
}

// Run returns a run's progress or result.
func (c *Client) Run(ctx context.Context, id corpus.ID) (corpus.RunReport, error) {
	var out corpus.RunReport
	err := c.call(ctx, http.MethodGet, "/admin/reconcile/"+id.String(), nil, &out)
	return out, err
}

// Cancel stops a run.
func (c *Client) Cancel(ctx context.Context, id corpus.ID) error {
	return c.call(ctx, http.MethodDelete, "/admin/reconcile/"+id.String(), nil, nil)
}

// Explain asks for everything both stores know about one id.
func (c *Client) Explain(ctx context.Context, query, collection string) (corpus.Explanation, error) {
	q := url.Values{"id": {query}}
	if collection != "" {
		q.Set("collection", collection)
	}
	var out corpus.Explanation
	err := c.call(ctx, http.MethodGet, "/admin/explain?"+q.Encode(), nil, &out)
	return out, err
}

// AdoptRollback makes the restored Postgres the truth for the collection.
func (c *Client) AdoptRollback(ctx context.Context, collection string) error {
	return c.rollback(ctx, collection, "adopt")
}

// DiscardRollback has the collection's index built again.
func (c *Client) DiscardRollback(ctx context.Context, collection string) error {
	return c.rollback(ctx, collection, "discard")
}

func (c *Client) rollback(ctx context.Context, collection, decision string) error {
	return c.call(ctx, http.MethodPost, "/admin/rollback", map[string]string{"collection": collection, "decision": decision}, nil)
}

// backoff says how long to wait before the next attempt.
type backoff struct{ n int }

// maxBackoff bounds one wait.
const maxBackoff = 15 * time.Second

// next prefers what the server asked for.
func (b *backoff) next(err error) time.Duration {
	d := min(maxBackoff, 250*time.Millisecond<<min(b.n, 10))
	b.n++
	var e *APIError
	if errors.As(err, &e) && e.RetryAfter > 0 {
		return min(e.RetryAfter, time.Minute)
	}
	return d
}

// temporary reports whether an attempt is worth repeating.
func temporary(err error) bool {
	var e *APIError
	if errors.As(err, &e) {
		return e.Temporary()
	}
	return true // the connection broke, or nothing answers yet
}

// patiently repeats op while its error is temporary, at most attempts times in all.
func (e *Env) patiently(ctx context.Context, attempts int, op func() error) error {
	var b backoff
	for n := 1; ; n++ {
		err := op()
		if err == nil || n >= attempts || !temporary(err) || ctx.Err() != nil {
			return err
		}
		if serr := e.sleep(ctx, b.next(err)); serr != nil {
			return err
		}
	}
}
