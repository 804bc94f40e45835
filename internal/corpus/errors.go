package corpus

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Kind classifies an error by what its receiver can do about it. The set is closed.
type Kind string

// The kinds. Anything that carries none of them is [Internal].
const (
	// Invalid: the input is wrong; the same call will fail again.
	Invalid Kind = "invalid"
	// NotFound: what was named does not exist.
	NotFound Kind = "not_found"
	// Conflict: the state forbids it (already exists, a run is going on, a stopped collection).
	Conflict Kind = "conflict"
	// Overloaded: a bound was met; try again after RetryAfter.
	Overloaded Kind = "overloaded"
	// Unavailable: a store, the model or the process cannot answer now; try again.
	Unavailable Kind = "unavailable"
	// Internal: a defect or an unknown failure.
	Internal Kind = "internal"
)

// FieldError points at one wrong field of a request.
type FieldError struct {
	// Pointer is a JSON pointer (RFC 6901) into the request body, such as /documents/3/id.
	Pointer string `json:"pointer"`
	// Code is a stable machine-readable reason.
	Code string `json:"code,omitempty"`
	// Detail says what is wrong and what is accepted.
	Detail string `json:"detail"`
}

// Error is the one error type that crosses rooms. Detail is safe to show to a caller: it
// never carries document text, credentials or SQL. Err is for the log.
type Error struct {
	Kind Kind
	// Code is stable and machine readable, such as collection_not_found.
	Code string
	// Detail tells a person what happened and what to do.
	Detail string
	// Fields lists the fields of the input that are wrong, if that is what happened.
	Fields []FieldError
	// RetryAfter, when positive, is how long the caller should wait.
	RetryAfter time.Duration
	// Err is the cause, or nil.
	Err error
}

// Error renders kind-independent text: the detail, then the cause.
func (e *Error) Error() string {
	switch {
	case e.Err != nil && e.Detail != "":
		return e.Detail + ": " + e.Err.Error()
	case e.Err != nil:
		return e.Code + ": " + e.Err.Error()
	case e.Detail != "":
		return e.Detail
	default:
		return e.Code
	}
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an error of the given kind and code without a cause.
func Errorf(kind Kind, code, format string, args ...any) *Error {
	return &Error{Kind: kind, Code: code, Detail: fmt.Sprintf(format, args...)}
}

// Wrap gives cause a kind, a code and a detail for people.
func Wrap(kind Kind, code, detail string, cause error) *Error {
	return &Error{Kind: kind, Code: code, Detail: detail, Err: cause}
}

// KindOf returns the kind of the first [Error] in err's chain. A deadline or a cancellation
// without one is [Unavailable]; anything else, [Internal]. KindOf(nil) is "".
func KindOf(err error) Kind {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return Unavailable
	}
	return Internal
}

// CodeOf returns the code of the first [Error] in err's chain, or "".
func CodeOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// Retryable reports whether the same call may succeed later without change.
func Retryable(err error) bool {
	switch KindOf(err) {
	case Overloaded, Unavailable:
		return true
	default:
		return false
	}
}
