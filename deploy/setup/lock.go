package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// lockPoll is how often a waiting set-up asks again for the lock. flock has no wait that a
// context can end; half a second is short beside any step.
const lockPoll = 500 * time.Millisecond

// lock takes the cache's lock, waiting for another set-up to finish, and clears what an
// interrupted one left. The kernel releases the lock of a process that died.
func (s *setup) lock(ctx context.Context) (unlock func(), err error) {
	if err := os.MkdirAll(s.layout.Root, 0o755); err != nil {
		return nil, fmt.Errorf("making the cache folder (set XDG_CACHE_HOME to a writable one): %w", err)
	}
	f, err := os.OpenFile(s.layout.Lock(), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("opening the set-up's lock: %w", err)
	}
	for told := false; ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", s.layout.Lock(), err)
		}
		if !told {
			told = true
			fmt.Fprintln(s.out, "set-up: another set-up is at work in this cache; waiting for it")
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(lockPoll):
		}
	}
	// Only cargo's build folders are worth going on with; they have fixed names.
	for _, pattern := range []string{wheelWork + "-*", installWork + "-*"} {
		left, err := filepath.Glob(filepath.Join(s.layout.Work(), pattern))
		for _, dir := range left {
			err = errors.Join(err, os.RemoveAll(dir))
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("clearing what an interrupted set-up left: %w", err)
		}
	}
	return func() { f.Close() }, nil
}
