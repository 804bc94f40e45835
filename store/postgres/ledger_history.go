package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// GenStride is how far the sequence jumps, at the least, when the history of this Postgres is
// in doubt. A jump also leads at least to the number of seconds since jumpEpoch times the stride:
// two histories that part from one backup would otherwise jump alike, and the later one would
// hand out again what the lost one did after its own restarts. As long as fewer than a stride of
// numbers are taken per second, a jump passes all that any earlier history handed out.
const GenStride = 1 << 20

// jumpEpoch is 2020-01-01 in Unix seconds: 2^53 numbers then last 272 years.
const jumpEpoch = 1_577_836_800

// seqLogValues is how many numbers Postgres logs ahead of those it hands out (SEQ_LOG_VALS):
// after a crash or a restore the sequence stands up to that far above the last one used.
const seqLogValues = 32

// marksQuery tells one life of one Postgres from any other: another server, a promoted
// standby, a restart (every restore needs one), a recreated sequence. It works in any schema
// search path that finds gen.
const marksQuery = `SELECT c.system_identifier::text AS system_identifier,
	('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint AS timeline,
	pg_postmaster_start_time() AS postmaster_start, 'gen'::regclass::oid AS sequence_oid
	FROM pg_control_system() c`

// sameHistory is true when this Postgres is the one that last handed out a gen.
const sameHistory = `SELECT (i.system_identifier, i.timeline, i.postmaster_start, i.sequence_oid)
	= (m.system_identifier, m.timeline, m.postmaster_start, m.sequence_oid)
	FROM installation i, (` + marksQuery + `) m`

// errMoved means that the transaction runs on a Postgres other than the one recorded: it must
// not take a gen before the sequence has jumped.
var errMoved = errors.New("postgres: the recorded history is of another server life")

// inGenTx is inTx for transactions that take a gen. The first statement checks that this is the
// Postgres the last gen came from; if not, the sequence jumps first, in a transaction of its own.
func (s *Store) inGenTx(ctx context.Context, doing string, do func(tx pgx.Tx) error) error {
	for range maxTries {
		err := s.inTx(ctx, doing, func(tx pgx.Tx) error {
			var same bool
			if err := tx.QueryRow(ctx, sameHistory).Scan(&same); err != nil {
				return err
			}
			if !same {
				return errMoved
			}
			return do(tx)
		})
		if !errors.Is(err, errMoved) {
			return err
		}
		if err := s.moveHistory(ctx, "another Postgres, or another life of it, than the one that handed out the last number", false); err != nil {
			return err
		}
	}
	return corpus.Errorf(corpus.Unavailable, codeUnavailable, "the database keeps restarting; try again")
}

// JumpSequence moves the gen sequence past anything a lost history may have handed out and
// records the range as never issued. It is for evidence that the marks of the server do not
// show, such as a stamp that does not fit; why is kept with the range.
func (s *Store) JumpSequence(ctx context.Context, why string) error {
	return s.moveHistory(ctx, why, true)
}

func (s *Store) moveHistory(ctx context.Context, why string, force bool) error {
	return s.inTx(ctx, "jumping the gen sequence", func(tx pgx.Tx) error {
		// One instance at a time; those that come later find the marks renewed.
		if _, err := tx.Exec(ctx, "SELECT 1 FROM installation FOR UPDATE"); err != nil {
			return err
		}
		var same bool
		if err := tx.QueryRow(ctx, sameHistory).Scan(&same); err != nil {
			return err
		}
		if same && !force {
			return nil
		}
		// A change that changes nothing waits for every transaction that has taken a number and
		// holds off others, so that no number inside the range is in anybody's hands.
		if _, err := tx.Exec(ctx, "ALTER SEQUENCE gen CACHE 1"); err != nil {
			return err
		}
		var next int64
		if err := tx.QueryRow(ctx, "SELECT last_value + is_called::int FROM gen").Scan(&next); err != nil {
			return err
		}
		to := max(next+GenStride, (time.Now().Unix()-jumpEpoch)*GenStride)
		if to >= maxRaise {
			return corpus.Errorf(corpus.Conflict, "sequence_exhausted", "the gen sequence stands at %d and cannot jump any more; is the clock right?", next)
		}
		// What was logged ahead and is not used here may have been used in the lost time.
		if err := tx.QueryRow(ctx, "SELECT greatest($1::bigint - $2, 1 + coalesce((SELECT max(gen) FROM chunks WHERE gen >= $1::bigint - $2), 0))",
			next, seqLogValues).Scan(&next); err != nil {
			return err
		}
		next = max(next, 1)
		if _, err := tx.Exec(ctx, "INSERT INTO gen_gaps (lo, hi, reason) VALUES ($1, $2, $3)", next, to-1, why); err != nil {
			return err
		}
		// Unlike setval, RESTART is undone with its transaction: never a jump without its record.
		if _, err := tx.Exec(ctx, fmt.Sprintf("ALTER SEQUENCE gen RESTART WITH %d", to)); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `UPDATE installation SET (system_identifier, timeline, postmaster_start, sequence_oid) = (`+marksQuery+`)`)
		if err == nil {
			s.log.WarnContext(ctx, "gen sequence jumped", "reason", why, "from", next, "to", to)
		}
		return err
	})
}

// raiseSequence makes sure that the next gen is above floor, which a point was seen to hold.
// It must run inside inGenTx.
func raiseSequence(ctx context.Context, tx pgx.Tx, floor int64) error {
	const next = "SELECT last_value + is_called::int FROM gen"
	var n int64
	// It only ever grows, so a look without a lock suffices in the usual case.
	if err := tx.QueryRow(ctx, next).Scan(&n); err != nil || n > floor {
		return err
	}
	if _, err := tx.Exec(ctx, "SELECT 1 FROM installation FOR UPDATE"); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, "ALTER SEQUENCE gen CACHE 1"); err != nil {
		return err
	}
	if err := tx.QueryRow(ctx, next).Scan(&n); err != nil || n > floor {
		return err
	}
	if _, err := tx.Exec(ctx, "INSERT INTO gen_gaps (lo, hi, reason) VALUES ($1, $2, 'a point held a higher meta_version')", n, floor); err != nil {
		return err
	}
	_, err := tx.Exec(ctx, fmt.Sprintf("ALTER SEQUENCE gen RESTART WITH %d", floor+1))
	return err
}

// takeGens takes n numbers in ascending order. Only inside inGenTx, and under the locks of the
// rows that the numbers order.
func takeGens(ctx context.Context, tx pgx.Tx, n int) ([]int64, error) {
	if n == 0 {
		return nil, nil
	}
	rows, err := tx.Query(ctx, "SELECT nextval('gen') FROM generate_series(1, $1::int)", n)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[int64])
}
