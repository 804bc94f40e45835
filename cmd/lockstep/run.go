package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/lockstep-db/lockstep/internal/cli"
	"github.com/lockstep-db/lockstep/internal/config"
)

// command is one subcommand. run returns the exit code.
type command struct {
	name, about string
	run         func(ctx context.Context, e *cli.Env) int
}

// commands in the order in which help lists them.
func commands() []command {
	return []command{
		{"serve", "run the service", serve},
		{"ingest", "send documents from files, folders or stdin to a server", cli.Ingest},
		{"search", "search a collection of a server", cli.Search},
		{"reconcile", "compare Postgres with the index, and repair", reconcile},
		{"migrate", "bring the schema of the ledger up to date", migrate},
		{"model build", "build an ONNX model from a checkpoint", modelBuild},
		{"model pull", "fetch a checkpoint from a model hub", cli.ModelPull},
		{"model inspect", "describe a built model", modelInspect},
		{"doctor", "check everything that serving needs, and say what to do", doctor},
		{"version", "print the versions of Lockstep and what it runs on", versions},
	}
}

// run finds the command and gives it the rest of the arguments.
func run(ctx context.Context, args []string, getenv func(string) string, stdin io.Reader, stdout, stderr io.Writer) int {
	e := &cli.Env{Getenv: getenv, Stdin: stdin, Stdout: stdout, Stderr: stderr}
	if len(args) == 0 {
		help(stderr)
		return cli.ExitUsage
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		help(stdout)
		return cli.ExitOK
	case "-v", "-version", "--version":
		args = append([]string{"version"}, args[1:]...)
	}
	for _, c := range commands() {
		words := strings.Fields(c.name)
		if len(args) < len(words) || strings.Join(args[:len(words)], " ") != c.name {
			continue
		}
		e.Args = args[len(words):]
		return c.run(ctx, e)
	}
	fmt.Fprintf(stderr, "lockstep: there is no command %q; see: lockstep help\n", strings.Join(args[:min(2, len(args))], " "))
	return cli.ExitUsage
}

func help(w io.Writer) {
	fmt.Fprint(w, "Lockstep owns the write path into a vector index and proves that it agrees with Postgres.\n\nUsage: lockstep COMMAND [flags]\n\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-14s %s\n", c.name, c.about)
	}
	fmt.Fprint(w, "\nlockstep COMMAND --help lists a command's flags. Settings come from flags, then LOCKSTEP_*\nvariables (and DATABASE_URL, QDRANT_URL, QDRANT_API_KEY), then a YAML file (--config).\n")
}

// configured parses the arguments of a command that has the service's configuration. extra
// may declare flags of the command's own. ok is false when the command is done, with its code.
func configured(e *cli.Env, name, about string, extra func(*flag.FlagSet)) (cfg config.Config, operands []string, code int, ok bool) {
	set := flag.NewFlagSet(name, flag.ContinueOnError)
	set.SetOutput(io.Discard)
	helped := false
	set.Usage = func() {}
	flags := config.AddFlags(set)
	if extra != nil {
		extra(set)
	}
	set.BoolVar(&helped, "help", false, "list the settings")
	set.BoolVar(&helped, "h", false, "list the settings")
	fail := func(err error) (config.Config, []string, int, bool) {
		fmt.Fprintf(e.Stderr, "lockstep %s: %s\n", name, err)
		return config.Config{}, nil, cli.ExitUsage, false
	}
	operands, err := cli.ParseFlags(set, e.Args)
	if err != nil {
		return fail(err)
	}
	if helped {
		fmt.Fprintf(e.Stdout, "Usage: lockstep %s [flags]\n\n%s\n\nSettings, as flags (and as variables, and in the file of --config):\n", name, about)
		config.Usage(e.Stdout)
		return config.Config{}, nil, cli.ExitOK, false
	}
	cfg, err = config.Load(flags, config.Source{Getenv: e.Getenv, Root: os.Geteuid() == 0})
	if err != nil {
		return fail(fmt.Errorf("configuration: %w", err))
	}
	return cfg, operands, cli.ExitOK, true
}

// noOperands refuses what a command does not take.
func noOperands(e *cli.Env, name string, operands []string) bool {
	if len(operands) == 0 {
		return true
	}
	fmt.Fprintf(e.Stderr, "lockstep %s: unexpected argument %q\n", name, operands[0])
	return false
}

// readableDuration writes 1.5s where JSON would get bare nanoseconds.
func readableDuration(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.StringValue(a.Value.Duration().String())
	}
	return a
}

// logger writes to stderr: text for a person, JSON for a collector.
func logger(cfg config.Config, stderr io.Writer) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.Log.Level)); err != nil {
		level = slog.LevelInfo // validated before
	}
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: readableDuration}
	text := cfg.Log.Format == "text" || cfg.Log.Format == "auto" && cli.IsTerminal(stderr)
	if text {
		return slog.New(slog.NewTextHandler(stderr, options))
	}
	return slog.New(slog.NewJSONHandler(stderr, options))
}
