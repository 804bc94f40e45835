package storetest

import (
	"testing"

	"github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/store/qdranttest"
)

// TestQdrant runs the suite on a real server. It is skipped where there is none;
// store/qdrantlocal always runs the suite.
func TestQdrant(t *testing.T) {
	addr := qdranttest.Real(t)
	if addr == "" {
		t.Skipf("no real server: %s is not set and there is no qdrant on PATH", qdranttest.EnvURL)
	}
	t.Run("suite", func(t *testing.T) {
		RunQdrant(t, func(t *testing.T) *qdrant.Client { return Dial(t, addr) })
	})
}
