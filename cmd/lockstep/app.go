package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"

	"github.com/lockstep-db/lockstep/internal/app"
	"github.com/lockstep-db/lockstep/internal/cli"
	"github.com/lockstep-db/lockstep/internal/config"
)

// The commands that need the service's own rooms, and so its configuration.

func serve(ctx context.Context, e *cli.Env) int {
	printConfig := false
	cfg, operands, code, ok := configured(e, "serve", "Runs the service until it is told to stop. Without DATABASE_URL and QDRANT_URL it runs its own\nstores under --data-dir.", func(set *flag.FlagSet) {
		set.BoolVar(&printConfig, "print-config", false, "print the effective settings with secrets masked, and end")
	})
	if !ok {
		return code
	}
	if !noOperands(e, "serve", operands) {
		return cli.ExitUsage
	}
	if printConfig {
		if err := cfg.Print(e.Stdout); err != nil {
			return failed(ctx, e, "serve", err)
		}
		return cli.ExitOK
	}
	if err := app.Serve(ctx, cfg, logger(cfg, e.Stderr), app.Options{Version: version}); err != nil {
		return failed(ctx, e, "serve", err)
	}
	return cli.ExitOK
}

func migrate(ctx context.Context, e *cli.Env) int {
	cfg, operands, code, ok := configured(e, "migrate", "Applies the schema steps that the ledger lacks, under a lock. `serve` does the same at start.", nil)
	if !ok {
		return code
	}
	if !noOperands(e, "migrate", operands) {
		return cli.ExitUsage
	}
	applied, err := app.Migrate(ctx, cfg, logger(quieter(cfg), e.Stderr))
	if err != nil {
		return failed(ctx, e, "migrate", err)
	}
	fmt.Fprintf(e.Stdout, "%d schema steps applied\n", applied)
	return cli.ExitOK
}

func modelBuild(ctx context.Context, e *cli.Env) int {
	var req app.BuildRequest
	cfg, operands, code, ok := configured(e, "model build", "Builds the model that --model names, or the one named as argument, into the cache or --output.", func(set *flag.FlagSet) {
		set.StringVar(&req.Destination, "output", "", "folder to write (default: the cache)")
	})
	if !ok {
		return code
	}
	if len(operands) > 1 {
		noOperands(e, "model build", operands[1:])
		return cli.ExitUsage
	}
	if len(operands) == 1 {
		req.Source = operands[0]
	}
	req.Precision = cfg.Precision
	m, err := app.BuildModel(ctx, cfg, req, logger(cfg, e.Stderr))
	if err != nil {
		return failed(ctx, e, "model build", err)
	}
	return show(ctx, e, "model build", m)
}

func modelInspect(ctx context.Context, e *cli.Env) int {
	cfg, operands, code, ok := configured(e, "model inspect", "Describes the built model that --model names, or the folder named as argument.", nil)
	if !ok {
		return code
	}
	name := ""
	switch len(operands) {
	case 0:
	case 1:
		name = operands[0]
	default:
		noOperands(e, "model inspect", operands[1:])
		return cli.ExitUsage
	}
	m, err := app.InspectModel(cfg, name)
	if err != nil {
		return failed(ctx, e, "model inspect", err)
	}
	return show(ctx, e, "model inspect", m)
}

// show prints v as JSON for people and programs.
func show(ctx context.Context, e *cli.Env, name string, v any) int {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return failed(ctx, e, name, err)
	}
	fmt.Fprintf(e.Stdout, "%s\n", raw)
	return cli.ExitOK
}

func versions(ctx context.Context, e *cli.Env) int {
	asJSON := false
	cfg, operands, code, ok := configured(e, "version", "Prints the versions of Lockstep and of what it runs on.", func(set *flag.FlagSet) {
		set.BoolVar(&asJSON, "json", false, "print JSON")
	})
	if !ok {
		return code
	}
	if !noOperands(e, "version", operands) {
		return cli.ExitUsage
	}
	parts := append([]app.Part{{Name: "lockstep", Version: version}}, app.Versions(cfg)...)
	if asJSON {
		return show(ctx, e, "version", parts)
	}
	for _, p := range parts {
		fmt.Fprintf(e.Stdout, "%-12s %s\n", p.Name, p.Version)
	}
	return cli.ExitOK
}

func doctor(ctx context.Context, e *cli.Env) int {
	server := e.Getenv("LOCKSTEP_SERVER")
	if server == "" {
		server = cli.DefaultServer
	}
	cfg, operands, code, ok := configured(e, "doctor", "Checks configuration, libraries, model, stores and a running server, and says what to do.", func(set *flag.FlagSet) {
		set.StringVar(&server, "server", server, "address of the server to ask")
	})
	if !ok {
		return code
	}
	if !noOperands(e, "doctor", operands) {
		return cli.ExitUsage
	}
	all := []cli.Diagnosis{{Name: "configuration", Detail: "valid; `lockstep serve --print-config` shows it"}}
	running, ready := cli.AskServer(ctx, e, server)
	all = append(all, running)
	embedded := cfg.DatabaseURL == "" || cfg.QdrantURL == ""
	for _, d := range app.Doctor(ctx, cfg, logger(quieter(cfg), e.Stderr)) {
		one := cli.Diagnosis{Name: d.Name, Detail: d.Detail}
		switch {
		case d.Err != "" && d.Name == "embedded servers" && ready && embedded:
			one.Detail += " belongs to the server that answered; its readiness speaks for them"
		case d.Err != "":
			one.Err = errors.New(d.Err)
		}
		all = append(all, one)
	}
	return cli.WriteDiagnoses(e, all)
}

// reconcile talks to a server, or with --direct to the stores themselves.
func reconcile(ctx context.Context, e *cli.Env) int {
	o, code, ok := cli.ParseReconcile(e)
	if !ok {
		return code
	}
	if !o.Direct {
		return cli.RemoteReconcile(ctx, e, o)
	}
	own := *e
	own.Args = o.DirectArgs
	cfg, operands, code, ok := configured(&own, "reconcile --direct --", "The settings of a reconcile without a server.", nil)
	if !ok {
		return code
	}
	if !noOperands(e, "reconcile", operands) {
		return cli.ExitUsage
	}
	err := app.Direct(ctx, cfg, logger(quieter(cfg), e.Stderr), app.Options{Version: version}, o.Request.Repair, func(ctx context.Context, r *app.Reconciler) error {
		code = cli.Reconcile(ctx, e, r, o)
		return nil
	})
	if err != nil {
		return failed(ctx, e, "reconcile", err)
	}
	return code
}

// quieter is for commands whose result is what they say: of the log, only what is wrong.
// --log-level debug still shows all.
func quieter(cfg config.Config) config.Config {
	if cfg.Log.Level == "info" {
		cfg.Log.Level = "warn"
	}
	return cfg
}

// failed reports what ended a command.
func failed(ctx context.Context, e *cli.Env, name string, err error) int {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		fmt.Fprintf(e.Stderr, "lockstep %s: cancelled\n", name)
		return cli.ExitCancelled
	}
	fmt.Fprintf(e.Stderr, "lockstep %s: %s\n", name, err)
	return cli.ExitFailed
}
