package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Config of the ledger's connections.
type Config struct {
	// URL in libpq's URL or keyword form.
	URL string
	// MaxConns bounds the pool; 0 means 16 (unmeasured: workers, accepts and searches of one
	// instance rarely hold more at once).
	MaxConns int
	// ConnectTimeout bounds one connection attempt; 0 means 5 s.
	ConnectTimeout time.Duration
}

// minServer is the oldest PostgreSQL that is tested: 14, as server_version_num.
const minServer = 140000

// Store is the ledger. All methods are safe for concurrent use; each blocks until Postgres
// answered or its context ended, and returns corpus error kinds.
type Store struct {
	pool *pgxpool.Pool
	log  *slog.Logger
}

// Open connects, and refuses a server that could lose what was acknowledged: fsync = off, a
// standby, or one too old. It does not migrate; see [Store.Migrate].
func Open(ctx context.Context, cfg Config, log *slog.Logger) (*Store, error) {
	pc, err := pgxpool.ParseConfig(cfg.URL)
	if err != nil {
		// The cause may quote the URL with its password; it is not passed on.
		return nil, corpus.Errorf(corpus.Invalid, "invalid_database_url", "the database URL cannot be read; expected postgres://user:password@host:port/database")
	}
	pc.MaxConns = 16
	if cfg.MaxConns > 0 {
		pc.MaxConns = int32(min(cfg.MaxConns, 10000))
	}
	pc.ConnConfig.ConnectTimeout = 5 * time.Second
	if cfg.ConnectTimeout > 0 {
		pc.ConnConfig.ConnectTimeout = cfg.ConnectTimeout
	}
	for k, v := range map[string]string{
		"application_name":   "lockstep",
		"search_path":        "lockstep",
		"synchronous_commit": "on",
		"TimeZone":           "UTC",
		// A worker that stops between two statements must not hold a document's lock for ever.
		"idle_in_transaction_session_timeout": "60000",
		// Compiling set-based statements that run for milliseconds costs more than it saves.
		"jit": "off",
	} {
		pc.ConnConfig.RuntimeParams[k] = v
	}
	pool, err := pgxpool.NewWithConfig(ctx, pc)
	if err != nil {
		return nil, wrap("opening the database pool", err)
	}
	s := &Store{pool: pool, log: log}
	if err := s.inspect(ctx); err != nil {
		pool.Close()
		return nil, err
	}
	return s, nil
}

func (s *Store) inspect(ctx context.Context) error {
	var fsync, commit, encoding string
	var version int
	var standby bool
	err := s.pool.QueryRow(ctx, `SELECT current_setting('fsync'), current_setting('synchronous_commit'),
		current_setting('server_version_num')::int, pg_is_in_recovery(), current_setting('server_encoding')`).Scan(&fsync, &commit, &version, &standby, &encoding)
	if err != nil {
		return wrap("inspecting the database server", err)
	}
	switch {
	case fsync != "on":
		return corpus.Errorf(corpus.Conflict, "fsync_off", "the database runs with fsync = off and could lose acknowledged writes: set fsync = on in postgresql.conf and restart it")
	case commit != "on":
		return corpus.Errorf(corpus.Conflict, "synchronous_commit_off", "the database refuses synchronous_commit = on for this session (it says %q): remove the override of the role or the pooler", commit)
	case version < minServer:
		return corpus.Errorf(corpus.Conflict, "database_too_old", "the database server is version %d; %d or later is needed", version/10000, minServer/10000)
	case encoding != "UTF8":
		return corpus.Errorf(corpus.Conflict, "database_encoding", "the database's encoding is %s; create one with ENCODING 'UTF8'", encoding)
	case standby:
		return corpus.Errorf(corpus.Conflict, "database_is_standby", "the database is a read-only standby: connect to the primary (target_session_attrs=read-write)")
	}
	return nil
}

// Close waits for connections in use and closes the pool.
func (s *Store) Close() { s.pool.Close() }

// Ping reports whether Postgres answers.
func (s *Store) Ping(ctx context.Context) error {
	return wrap("pinging the database", s.pool.Ping(ctx))
}

// maxTries bounds how often a transaction that Postgres aborted for the sake of another one
// is run again. Locks are taken in one order, so more than one abort is rare.
const maxTries = 5

// inTx runs do in a READ COMMITTED transaction and commits. What Postgres aborted (deadlock,
// serialization) and what was never sent (a pooled connection had died) is run again, because
// nothing of it happened; a connection lost at commit is not, because the outcome is unknown.
// Nor is pgconn.SafeToRetry believed then: pgx 5.12 peeks at the answer of a simple query,
// forgets that error, and calls the lost answer "conn closed", which it says is safe.
func (s *Store) inTx(ctx context.Context, doing string, do func(tx pgx.Tx) error) error {
	// After a restart of Postgres every pooled connection may be dead; each try finds one of them.
	dead := int(s.pool.Stat().MaxConns()) + 1
	for tries := 1; ; {
		began, committing := false, false
		err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
			began = true
			err := do(tx)
			committing = err == nil
			return err
		})
		var refused *pgconn.ConnectError
		switch {
		case aborted(err) && tries < maxTries:
			tries++
		case err != nil && !committing && (!began || pgconn.SafeToRetry(err)) && !errors.As(err, &refused) && dead > 0 && ctx.Err() == nil:
			dead--
		default:
			return wrap(doing, err)
		}
	}
}

// uuids converts ids for use as a uuid[] parameter without copying the bytes one by one.
func uuids(ids []corpus.ID) [][16]byte {
	out := make([][16]byte, len(ids))
	for i, id := range ids {
		out[i] = id
	}
	return out
}

// scanIDs collects a single uuid column.
func scanIDs(rows pgx.Rows, err error) ([]corpus.ID, error) {
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (corpus.ID, error) {
		var id [16]byte
		err := row.Scan(&id)
		return id, err
	})
}

func micros(d time.Duration) string { return fmt.Sprintf("%d microseconds", d.Microseconds()) }
