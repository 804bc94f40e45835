package postgres

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// JoinSQL and JoinContextSQL let a test look at their plans.
var (
	JoinSQL        = joinSQL
	JoinContextSQL = joinContextSQL
)

// Pool lets a test ask the very sessions that the store works with.
func (s *Store) Pool() *pgxpool.Pool { return s.pool }

// InTx lets a test count how often a transaction is run.
func (s *Store) InTx(ctx context.Context, do func(tx pgx.Tx) error) error {
	return s.inTx(ctx, "testing", do)
}
