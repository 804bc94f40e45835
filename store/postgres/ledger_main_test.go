package postgres_test

import (
	"context"
	"log/slog"
	"testing"

	"go.uber.org/goleak"

	"github.com/lockstep-db/lockstep/store/postgres"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/lockstep-db/lockstep/store/postgres/pgtest.(*Server).spawn.func1"))
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// open returns a migrated ledger on a database of the test's own.
func open(t testing.TB, url string) *postgres.Store {
	t.Helper()
	ctx := context.Background()
	s, err := postgres.Open(ctx, postgres.Config{URL: url}, discard())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	if _, err := s.Migrate(ctx); err != nil {
		t.Fatal(err)
	}
	return s
}

func newStore(t testing.TB) *postgres.Store { return open(t, pgtest.New(t)) }
