package qdrant

import (
	"context"
	"errors"
	"fmt"
	"time"

	qc "github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Codes of errors whose cause a reader may want to tell apart.
const (
	// CodeNotFound: the Qdrant collection does not exist. Never answered by creating it.
	CodeNotFound = "index_not_found"
	// CodeRateLimited carries the server's own RetryAfter.
	CodeRateLimited = "index_rate_limited"
	// CodeStorageFull: the server is out of disk or memory; waiting alone does not help.
	CodeStorageFull = "index_storage_full"
	// CodeUnknown: a write may or may not have been applied; read back, or send it again.
	CodeUnknown = "index_write_unknown"
	// CodeRefused: the server calls the request wrong, or strict mode forbids it.
	CodeRefused = "index_refused"
	// CodeTooOld: the server ignores the guards on which the protocol stands.
	CodeTooOld = "index_too_old"
)

// retryFull is how long to leave a server alone that has run out of storage (unmeasured).
const retryFull = 30 * time.Second

// classify turns an error of the client library into the one error type of the rooms.
func classify(op string, err error) error {
	if err == nil {
		return nil
	}
	var known *corpus.Error
	if errors.As(err, &known) {
		return err
	}
	// The library's rate-limit error has no gRPC status, so it must be asked for first.
	var limited *qc.QdrantResourceExhaustedError
	if errors.As(err, &limited) {
		return &corpus.Error{
			Kind: corpus.Overloaded, Code: CodeRateLimited, Detail: "the index limits its rate of requests",
			RetryAfter: time.Duration(max(limited.RetryAfterS, 1)) * time.Second, Err: fmt.Errorf("%s: %w", op, err),
		}
	}
	wrap := func(kind corpus.Kind, code, detail string) error {
		return corpus.Wrap(kind, code, detail, fmt.Errorf("%s: %w", op, err))
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return wrap(corpus.Unavailable, "index_timeout", "the index did not answer in time")
	}
	st, ok := status.FromError(err)
	if !ok {
		return wrap(corpus.Unavailable, "index_unavailable", "the index cannot be reached")
	}
	switch st.Code() {
	case codes.InvalidArgument, codes.OutOfRange:
		return wrap(corpus.Invalid, CodeRefused, "the index refused the request")
	case codes.NotFound:
		return wrap(corpus.NotFound, CodeNotFound, "the index's collection does not exist")
	case codes.AlreadyExists:
		return wrap(corpus.Conflict, "index_exists", "the index's collection exists already")
	case codes.FailedPrecondition, codes.Aborted:
		return wrap(corpus.Unavailable, "index_locked", "the index does not accept this request at the moment")
	case codes.DeadlineExceeded, codes.Canceled:
		return wrap(corpus.Unavailable, "index_timeout", "the index did not answer in time")
	case codes.ResourceExhausted:
		// Without a retry-after this is no rate limit: the server ran out of storage.
		e := corpus.Wrap(corpus.Unavailable, CodeStorageFull, "the index is out of storage; give it disk or memory", fmt.Errorf("%s: %w", op, err))
		e.RetryAfter = retryFull
		return e
	case codes.Unauthenticated, codes.PermissionDenied:
		return wrap(corpus.Unavailable, "index_credentials", "the index refused our credentials; check the API key and its rights")
	case codes.Unimplemented:
		return wrap(corpus.Conflict, "index_unsupported", "the index server does not implement this call")
	case codes.Unavailable:
		return wrap(corpus.Unavailable, "index_unavailable", "the index cannot be reached")
	default: // Internal, DataLoss, Unknown: the server failed, not we; it may be another's turn next time.
		return wrap(corpus.Unavailable, "index_failed", "the index failed to answer")
	}
}

// completed accepts only an update that was applied. WaitTimeout and Acknowledged travel as
// success, but say only that the write may be applied at some time.
func completed(r *qc.UpdateResult) error {
	if r.GetStatus() == qc.UpdateStatus_Completed {
		return nil
	}
	return corpus.Errorf(corpus.Unavailable, CodeUnknown, "the index answered %s, not Completed: the write may or may not be applied", r.GetStatus())
}

// partly wraps the error of a write in pieces, of which done are known to be complete.
func partly(done []corpus.ID, err error) error {
	if len(done) == 0 {
		return err
	}
	return &corpus.PartialError{Done: done, Err: err}
}
