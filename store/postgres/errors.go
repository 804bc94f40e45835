package postgres

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Codes of the errors this room makes.
const (
	codeUnavailable        = "database_unavailable"
	codeCollectionNotFound = "collection_not_found"
	codeDocumentNotFound   = "document_not_found"
)

// wrap gives a failed statement its kind and says what was being done. It is the only place
// where SQLSTATEs are read. A nil error stays nil; a corpus error keeps its kind.
func wrap(doing string, err error) error {
	if err == nil {
		return nil
	}
	var known *corpus.Error
	if errors.As(err, &known) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	cause := fmt.Errorf("%s: %w", doing, err)
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return corpus.Wrap(corpus.Unavailable, codeUnavailable, "the database did not answer in time", cause)
	}
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		switch {
		case aborted(err), strings.HasPrefix(pg.Code, "08"), strings.HasPrefix(pg.Code, "57P"), pg.Code == "57014", pg.Code == "25006":
			// Aborted by a deadlock, connection failures, shutdown and start-up, a cancelled
			// statement, a server that became a read-only standby.
			return corpus.Wrap(corpus.Unavailable, codeUnavailable, "the database cannot answer now; try again", cause)
		case strings.HasPrefix(pg.Code, "53"), pg.Code == "55P03":
			return corpus.Wrap(corpus.Overloaded, "database_overloaded", "the database has no room for this now; try again", cause)
		case strings.HasPrefix(pg.Code, "22"):
			return corpus.Wrap(corpus.Invalid, "invalid_data", "the database cannot hold this value", cause)
		case pg.Code == "23505":
			return corpus.Wrap(corpus.Conflict, "already_exists", "it exists already", cause)
		case pg.Code == "42P01", pg.Code == "3F000":
			return corpus.Wrap(corpus.Internal, "not_migrated", "the schema is missing: run lockstep migrate", cause)
		}
		return corpus.Wrap(corpus.Internal, "database_error", "", cause)
	}
	var nerr net.Error
	var cerr *pgconn.ConnectError
	if errors.As(err, &nerr) || errors.As(err, &cerr) || pgconn.SafeToRetry(err) || lostConnection(err) {
		return corpus.Wrap(corpus.Unavailable, codeUnavailable, "the database cannot be reached", cause)
	}
	return corpus.Wrap(corpus.Internal, "database_error", "", cause)
}

// aborted reports that Postgres itself undid the transaction for the sake of another one:
// nothing of it happened, and the same transaction may be tried again.
func aborted(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && (pg.Code == "40001" || pg.Code == "40P01")
}

// lostConnection recognises a connection that ended under a statement.
func lostConnection(err error) bool {
	return errors.Is(err, net.ErrClosed) || strings.Contains(err.Error(), "unexpected EOF") ||
		strings.Contains(err.Error(), "conn closed") || strings.Contains(err.Error(), "closed pool") ||
		errors.Is(err, pgx.ErrTxClosed)
}

func collectionNotFound(name string) error {
	return corpus.Errorf(corpus.NotFound, codeCollectionNotFound, "there is no collection named %q", name)
}
