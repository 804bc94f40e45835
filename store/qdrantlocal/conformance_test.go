package qdrantlocal

import (
	"testing"

	"github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/store/storetest"
)

// TestConformance runs the suite that a real server passes.
func TestConformance(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), Options{})
	addr := serve(t, s)
	t.Run("suite", func(t *testing.T) {
		storetest.RunQdrant(t, func(t *testing.T) *qdrant.Client { return storetest.Dial(t, addr) })
	})
}
