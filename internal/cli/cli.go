package cli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
)

// Exit codes of the contract. Code 2 is also what Go's own panic exits with, so it is never a
// verdict.
const (
	ExitOK          = 0
	ExitFailed      = 1
	ExitUsage       = 2
	ExitDifferences = 3
	ExitRemaining   = 4
	ExitBraked      = 5
	ExitCancelled   = 130
)

// Env is the world of one command.
type Env struct {
	// Args after the command's name.
	Args   []string
	Getenv func(string) string
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	// Now and Sleep are the clock; nil means the real one. Sleep ends early with ctx.
	Now   func() time.Time
	Sleep func(ctx context.Context, d time.Duration) error
	// Width of the terminal on stdout; 0 asks it.
	Width int
}

func (e *Env) now() time.Time {
	if e.Now != nil {
		return e.Now()
	}
	return time.Now()
}

func (e *Env) sleep(ctx context.Context, d time.Duration) error {
	if e.Sleep != nil {
		return e.Sleep(ctx, d)
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// fallbackWidth is used where nobody looks at columns.
const fallbackWidth = 100

func (e *Env) width() int {
	if e.Width > 0 {
		return e.Width
	}
	if f, ok := e.Stdout.(*os.File); ok {
		if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 20 {
			return w
		}
	}
	return fallbackWidth
}

// IsTerminal reports whether a person watches w.
func IsTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

func (e *Env) printf(format string, args ...any) { fmt.Fprintf(e.Stdout, format, args...) }
func (e *Env) warnf(format string, args ...any)  { fmt.Fprintf(e.Stderr, format+"\n", args...) }

// usage reports wrong arguments.
func (e *Env) usage(command, format string, args ...any) int {
	e.warnf("lockstep %s: %s", command, fmt.Sprintf(format, args...))
	e.warnf("see: lockstep %s --help", command)
	return ExitUsage
}

// failure reports err and returns the code that it stands for.
func (e *Env) failure(ctx context.Context, command string, err error) int {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) || errors.Is(context.Cause(ctx), context.Canceled) {
		e.warnf("lockstep %s: cancelled", command)
		return ExitCancelled
	}
	e.warnf("lockstep %s: %s", command, err)
	return ExitFailed
}

// flags makes a flag set whose help has a synopsis. Errors are returned, not printed.
func (e *Env) flags(command, synopsis, about string) *flag.FlagSet {
	set := flag.NewFlagSet(command, flag.ContinueOnError)
	set.SetOutput(io.Discard)
	set.Usage = func() {
		set.SetOutput(e.Stdout)
		defer set.SetOutput(io.Discard)
		fmt.Fprintf(e.Stdout, "Usage: lockstep %s %s\n\n%s\n\nFlags:\n", command, synopsis, about)
		set.PrintDefaults()
	}
	return set
}

// parse reads the arguments. ok is false when the command is done already (help, or wrong
// usage), with its code.
func (e *Env) parse(set *flag.FlagSet) (operands []string, code int, ok bool) {
	help := set.Usage
	set.Usage = func() {} // flag calls it for errors too, where it would hide them
	operands, err := ParseFlags(set, e.Args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		help()
		return nil, ExitOK, false
	case err != nil:
		return nil, e.usage(set.Name(), "%s", strings.TrimPrefix(err.Error(), "flag provided but ")), false
	}
	return operands, ExitOK, true
}

// ParseFlags reads flags wherever they stand between the operands, and returns the operands;
// "--" ends the flags.
func ParseFlags(set *flag.FlagSet, args []string) (operands []string, err error) {
	for {
		if err := set.Parse(args); err != nil {
			return nil, err
		}
		rest := set.Args()
		if len(rest) == 0 {
			return operands, nil
		}
		// flag stops at the first operand, or after "--".
		if used := len(args) - len(rest); used > 0 && args[used-1] == "--" {
			return append(operands, rest...), nil
		}
		operands = append(operands, rest[0])
		args = rest[1:]
	}
}

// DefaultServer is where `lockstep serve` listens unless told otherwise.
const DefaultServer = "http://127.0.0.1:8080"

// serverFlag declares --server.
func (e *Env) serverFlag(set *flag.FlagSet) *string {
	fallback := e.Getenv("LOCKSTEP_SERVER")
	if fallback == "" {
		fallback = DefaultServer
	}
	return set.String("server", fallback, "address of the server; the default is $LOCKSTEP_SERVER. Its API key comes from $LOCKSTEP_API_KEY")
}

// outputFlag declares --output.
func outputFlag(set *flag.FlagSet) *string {
	return set.String("output", "text", "text or json")
}

func oneOf(v string, accepted ...string) bool {
	for _, a := range accepted {
		if v == a {
			return true
		}
	}
	return false
}
