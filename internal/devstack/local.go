package devstack

import (
	"context"
	"log/slog"
)

// localIndex is the embedded index, served on a loopback port of this process.
type localIndex struct{ url string }

func startLocalIndex(dir *dataDir, log *slog.Logger) (*localIndex, string, error) {
	return nil, "", unavailable("not yet")
}
func (l *localIndex) failed() error                  { return nil }
func (l *localIndex) stop(ctx context.Context) error { return nil }
