package postgres

import "github.com/jackc/pgx/v5/pgxpool"

// JoinSQL and JoinContextSQL let a test look at their plans.
var (
	JoinSQL        = joinSQL
	JoinContextSQL = joinContextSQL
)

// Pool lets a test ask the very sessions that the store works with.
func (s *Store) Pool() *pgxpool.Pool { return s.pool }
