package postgres

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/migrations"
)

// migrationLock is the advisory lock that serialises migrations ("lockstep" as ASCII).
const migrationLock int64 = 0x6c6f636b73746570

// migrationWait bounds the wait for another instance that migrates.
const migrationWait = 2 * time.Minute

type migration struct {
	version  int
	name     string
	sql      string
	checksum string
}

// Migrate brings the schema to this binary's version and draws the installation's identity
// on first use. Instances that start together take turns. It returns how many files it
// applied, and refuses a schema that a newer binary made or a file that was edited after it
// was applied.
func (s *Store) Migrate(ctx context.Context) (applied int, err error) {
	files, err := loadMigrations(migrations.FS)
	if err != nil {
		return 0, err
	}
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return 0, wrap("connecting to migrate", err)
	}
	defer conn.Release()
	lockCtx, cancel := context.WithTimeout(ctx, migrationWait)
	defer cancel()
	if _, err := conn.Exec(lockCtx, "SELECT pg_advisory_lock($1)", migrationLock); err != nil {
		return 0, wrap("waiting for another instance's migration (advisory lock "+strconv.FormatInt(migrationLock, 10)+")", err)
	}
	defer func() {
		// The session outlives this call, so the lock must be given back even when ctx ended.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if _, uerr := conn.Exec(ctx, "SELECT pg_advisory_unlock($1)", migrationLock); uerr != nil {
			_ = conn.Conn().Close(ctx) // ends the session, and the lock with it
		}
	}()
	_, err = conn.Exec(ctx, `CREATE SCHEMA IF NOT EXISTS lockstep;
		CREATE TABLE IF NOT EXISTS lockstep.schema_migrations (
			version    integer PRIMARY KEY,
			name       text NOT NULL,
			checksum   text NOT NULL,
			applied_at timestamptz NOT NULL DEFAULT now())`)
	if err != nil {
		return 0, wrap("preparing the schema", err)
	}
	done, err := appliedMigrations(ctx, conn.Conn())
	if err != nil {
		return 0, err
	}
	known := 0
	for _, f := range files {
		known = max(known, f.version)
		if have, ok := done[f.version]; ok {
			if have != f.checksum {
				return applied, corpus.Errorf(corpus.Conflict, "migration_changed",
					"migration %04d_%s differs from the one that was applied to this database: run the binary that made this schema", f.version, f.name)
			}
			continue
		}
		err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, f.sql); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, "INSERT INTO schema_migrations (version, name, checksum) VALUES ($1, $2, $3)", f.version, f.name, f.checksum)
			return err
		})
		if err != nil {
			return applied, wrap(fmt.Sprintf("applying migration %04d_%s", f.version, f.name), err)
		}
		applied++
	}
	for v := range done {
		if v > known {
			return applied, corpus.Errorf(corpus.Conflict, "schema_too_new",
				"the schema is at version %d and this binary knows %d: run a newer lockstep", v, known)
		}
	}
	return applied, drawInstallation(ctx, conn.Conn())
}

// loadMigrations reads NNNN_name.sql files in order.
func loadMigrations(fsys fs.FS) ([]migration, error) {
	names, err := fs.Glob(fsys, "*.sql")
	if err != nil {
		return nil, err
	}
	sort.Strings(names)
	var out []migration
	for _, n := range names {
		number, rest, ok := strings.Cut(strings.TrimSuffix(n, ".sql"), "_")
		v, err := strconv.Atoi(number)
		if !ok || err != nil || v <= 0 || len(out) > 0 && out[len(out)-1].version >= v {
			return nil, fmt.Errorf("migration file %q: expected NNNN_name.sql with increasing numbers", n)
		}
		raw, err := fs.ReadFile(fsys, n)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(raw)
		out = append(out, migration{version: v, name: rest, sql: string(raw), checksum: hex.EncodeToString(sum[:])})
	}
	return out, nil
}

func appliedMigrations(ctx context.Context, conn *pgx.Conn) (map[int]string, error) {
	rows, err := conn.Query(ctx, "SELECT version, checksum FROM schema_migrations")
	if err != nil {
		return nil, wrap("reading applied migrations", err)
	}
	out := map[int]string{}
	var v int
	var sum string
	_, err = pgx.ForEachRow(rows, []any{&v, &sum}, func() error {
		out[v] = sum
		return nil
	})
	return out, wrap("reading applied migrations", err)
}

// drawInstallation gives a new ledger its identity and notes the Postgres it runs on.
func drawInstallation(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, `INSERT INTO installation (id, system_identifier, timeline, postmaster_start, sequence_oid)
		SELECT $1, m.* FROM (`+marksQuery+`) m ON CONFLICT (singleton) DO NOTHING`, newID())
	return wrap("drawing the installation's identity", err)
}

// Installation returns this ledger's identity: the owner written on every point.
func (s *Store) Installation(ctx context.Context) (corpus.ID, error) {
	var id [16]byte
	err := s.pool.QueryRow(ctx, "SELECT id FROM installation").Scan(&id)
	if errors.Is(err, pgx.ErrNoRows) {
		return corpus.ID{}, corpus.Errorf(corpus.Conflict, "not_migrated", "the ledger has no identity yet: run lockstep migrate")
	}
	return id, wrap("reading the installation's identity", err)
}

// newID draws a random (version 4) UUID.
func newID() corpus.ID {
	var id corpus.ID
	_, _ = rand.Read(id[:]) // never fails: crypto/rand aborts the program instead
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	return id
}
