package devstack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// child is a server process that is kept running.
type child struct {
	name string
	// command makes a fresh command for each start.
	command func() *exec.Cmd
	// polite asks for a clean stop, urgent for a quick one; SIGKILL follows.
	polite, urgent syscall.Signal
	// pidFile, if set, is where each start writes the process's number.
	pidFile string
	log     *logFile
	logger  *slog.Logger

	stopping chan struct{} // closed by stop
	ended    chan struct{} // closed when the supervising goroutine has returned
	once     sync.Once

	mu     sync.Mutex
	proc   *os.Process // nil while none runs
	starts int
	exit   string // how the last one ended
	since  time.Time
}

// The pause before a start after a failure, doubling; a child that ran for calm starts afresh.
const (
	pauseFirst = 200 * time.Millisecond
	pauseMost  = 30 * time.Second
	calm       = time.Minute
)

// supervise starts the child and keeps it running until stop. It returns at once.
func (c *child) supervise() {
	c.stopping, c.ended = make(chan struct{}), make(chan struct{})
	go c.run()
}

func (c *child) run() {
	defer close(c.ended)
	// The kernel sends the parent-death signal when the thread that forked ends, not the
	// process: this goroutine keeps its thread until the child is gone. The thread is not
	// reused after (no unlock), which costs nothing.
	runtime.LockOSThread()
	pause := pauseFirst
	for {
		started := time.Now()
		err := c.runOnce()
		select {
		case <-c.stopping:
			return
		default:
		}
		if time.Since(started) > calm {
			pause = pauseFirst
		}
		c.logger.Error("embedded server ended; starting it again", "server", c.name, "err", err, "pause", pause)
		select {
		case <-c.stopping:
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, pauseMost)
	}
}

// runOnce starts the process and waits for its end.
func (c *child) runOnce() error {
	cmd := c.command()
	cmd.Stdout, cmd.Stderr = c.log.file, c.log.file
	c.mu.Lock()
	select {
	case <-c.stopping:
		c.mu.Unlock()
		return errors.New("stopping")
	default:
	}
	err := cmd.Start()
	c.starts++
	c.since = time.Now()
	if err == nil {
		c.proc = cmd.Process
	} else {
		c.exit = err.Error()
	}
	c.mu.Unlock()
	if err != nil {
		return err
	}
	if c.pidFile != "" {
		if err := writeFile(c.pidFile, fmt.Appendf(nil, "%d\n", cmd.Process.Pid), 0o600); err != nil {
			c.logger.Warn("process number of an embedded server not noted", "server", c.name, "err", err)
		}
	}
	quit := make(chan struct{})
	var trims sync.WaitGroup
	trims.Go(func() { c.trimLoop(quit) })
	err = cmd.Wait()
	c.mu.Lock()
	c.proc = nil
	c.since = time.Now()
	c.exit = cmd.ProcessState.String()
	c.mu.Unlock()
	close(quit)
	trims.Wait()
	if err == nil {
		err = errors.New("it ended by itself")
	}
	return err
}

func (c *child) trimLoop(quit <-chan struct{}) {
	t := time.NewTicker(5 * time.Second)
	defer t.Stop()
	for {
		if err := c.log.trim(); err != nil {
			c.logger.Warn("log of an embedded server not trimmed", "server", c.name, "err", err)
		}
		select {
		case <-quit:
			return
		case <-t.C:
		}
	}
}

// down says how the child is down, or "".
func (c *child) down() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.proc != nil {
		return ""
	}
	return fmt.Sprintf("is down since %s (%s)", c.since.Format(time.TimeOnly), c.exit)
}

// waitReady calls ready until it succeeds. It gives up when ctx ends or when the child has
// ended: the error then holds the end of its log.
func (c *child) waitReady(ctx context.Context, ready func(context.Context) error) error {
	pause := 20 * time.Millisecond
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		c.mu.Lock()
		ended := c.starts > 0 && (c.proc == nil || c.starts > 1)
		exit := c.exit
		c.mu.Unlock()
		if ended {
			return unavailable("%s ended at once (%s); the end of its log %s:\n%s", c.name, exit, c.log.file.Name(), c.log.tail())
		}
		select {
		case <-ctx.Done():
			return unavailable("%s did not answer in time (%v); the end of its log %s:\n%s", c.name, err, c.log.file.Name(), c.log.tail())
		case <-time.After(pause):
		}
		pause = min(2*pause, 250*time.Millisecond)
	}
}

// stop ends the child and waits: cleanly until ctx ends, then quickly, then by force.
func (c *child) stop(ctx context.Context) error {
	c.once.Do(func() { close(c.stopping) })
	err := c.end(ctx)
	return errors.Join(err, c.log.close())
}

func (c *child) end(ctx context.Context) error {
	c.signal(c.polite)
	select {
	case <-c.ended:
		return nil
	case <-ctx.Done():
	}
	c.logger.Warn("embedded server does not stop; insisting", "server", c.name)
	// Two seconds each: a quick stop does no work worth waiting for (unmeasured).
	for _, sig := range []syscall.Signal{c.urgent, syscall.SIGKILL} {
		c.signal(sig)
		select {
		case <-c.ended:
			return nil
		case <-time.After(2 * time.Second):
		}
	}
	<-c.ended // SIGKILL is not refused; what delays it is the kernel
	return nil
}

// signal reaches the running process, if any; os.Process never signals a reused pid.
func (c *child) signal(sig syscall.Signal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.proc == nil {
		return
	}
	if err := c.proc.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		c.logger.Warn("embedded server not signalled", "server", c.name, "signal", sig.String(), "err", err)
	}
}

// runTool runs a short-lived program to its end and returns its output in the error.
func runTool(ctx context.Context, cmd *exec.Cmd) error {
	done := make(chan error, 1)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	go func() {
		runtime.LockOSThread() // see child.run
		err := cmd.Start()
		if err == nil {
			stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
			err = cmd.Wait()
			stop()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return unavailable("%s failed: %v\n%s", cmd.Path, err, strings.TrimSpace(out.String()))
	}
	return nil
}

// environment of the children: theirs alone, so that no PG* variable misleads them and no
// secret of ours reaches them.
func environment(home string) []string {
	return []string{"PATH=/usr/local/bin:/usr/bin:/bin", "HOME=" + home, "LC_ALL=C", "TZ=UTC"}
}

// stopOrphan ends a process that an earlier Lockstep left behind, if pid is one: a process
// of that program whose working directory is dir. Anything else is left alone.
func stopOrphan(ctx context.Context, pid int, program, dir string, polite, urgent syscall.Signal, logger *slog.Logger) error {
	if pid <= 1 || pid == os.Getpid() {
		return nil
	}
	ours, err := isProcess(pid, program, dir)
	if err != nil || !ours {
		return err
	}
	logger.WarnContext(ctx, "stopping a server that an earlier run left behind", "server", program, "pid", pid)
	for _, step := range []struct {
		sig  syscall.Signal
		wait time.Duration
	}{{polite, 20 * time.Second}, {urgent, 5 * time.Second}, {syscall.SIGKILL, 5 * time.Second}} {
		if err := syscall.Kill(pid, step.sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			return unavailable("process %d (%s) of an earlier run cannot be stopped: %v; end it by hand", pid, program, err)
		}
		deadline := time.Now().Add(step.wait)
		for time.Now().Before(deadline) {
			if ours, err := isProcess(pid, program, dir); err != nil || !ours {
				return err
			}
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return unavailable("process %d (%s) of an earlier run does not end; end it by hand", pid, program)
}
