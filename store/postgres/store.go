package postgres

import (
	"github.com/jackc/pgx/v5/pgxpool"
)

// Store is the ledger. All methods are safe for concurrent use.
type Store struct {
	pool *pgxpool.Pool
}
