package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lockstep-db/lockstep/internal/cli"
)

// call runs the program in this process, with an environment of its own.
func call(t *testing.T, env map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	getenv := func(k string) string {
		if v, ok := env[k]; ok || k != "HOME" {
			return v
		}
		return "/nonexistent"
	}
	code = run(t.Context(), args, getenv, strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

func TestRunFindsItsCommands(t *testing.T) {
	t.Parallel()
	if code, _, stderr := call(t, nil); code != cli.ExitUsage || !strings.Contains(stderr, "reconcile") {
		t.Errorf("no arguments: %d %q", code, stderr)
	}
	for _, args := range [][]string{{"help"}, {"--help"}, {"-h"}} {
		code, stdout, _ := call(t, nil, args...)
		for _, c := range commands() {
			if code != 0 || !strings.Contains(stdout, c.name) || c.about == "" {
				t.Errorf("%v: exit %d lacks %s", args, code, c.name)
			}
		}
	}
	for _, args := range [][]string{{"frobnicate"}, {"model"}, {"model", "burn"}, {"serve", "extra"}, {"serve", "--nope"}, {"migrate", "x"}, {"version", "x"}, {"doctor", "x"}, {"model", "build", "a", "b"}, {"model", "inspect", "a", "b"}, {"reconcile", "--direct", "--", "extra"}} {
		if code, stdout, stderr := call(t, nil, args...); code != cli.ExitUsage || stdout != "" || stderr == "" {
			t.Errorf("%v: exit %d, stdout %q, stderr %q", args, code, stdout, stderr)
		}
	}
	for _, c := range commands() {
		code, stdout, stderr := call(t, nil, append(strings.Fields(c.name), "--help")...)
		if code != 0 || !strings.Contains(stdout, "Usage: lockstep "+c.name) || stderr != "" {
			t.Errorf("%s --help: exit %d, stdout %.80q, stderr %q", c.name, code, stdout, stderr)
		}
	}
}

func TestServeRefusesABadConfiguration(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		env  map[string]string
		args []string
		want string
	}{
		{args: []string{"--listen", "0.0.0.0:80"}, want: "no API keys"},
		{env: map[string]string{"LOCKSTEP_LISTEN": "nonsense"}, want: "listen"},
		{env: map[string]string{"LOCKSTEP_CONFIG": "/nonexistent/lockstep.yaml"}, want: "configuration file"},
		{args: []string{"--http-timeout", "x"}, want: "duration"},
	} {
		if code, _, stderr := call(t, c.env, append([]string{"serve"}, c.args...)...); code != cli.ExitUsage || !strings.Contains(stderr, c.want) {
			t.Errorf("%v %v: exit %d, %q", c.env, c.args, code, stderr)
		}
	}
}

func TestPrintConfig(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "lockstep.yaml")
	if err := os.WriteFile(file, []byte("model: bge-m3\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"QDRANT_URL": "http://q:6334", "QDRANT_API_KEY": "hunter2", "DATABASE_URL": "postgres://u:hunter2@h/d"}
	code, stdout, stderr := call(t, env, "serve", "--print-config", "--config", file, "--listen", "127.0.0.1:1")
	if code != 0 || stderr != "" || strings.Contains(stdout, "hunter2") {
		t.Errorf("exit %d %q:\n%s", code, stderr, stdout)
	}
	for _, want := range []string{"listen: 127.0.0.1:1  # --listen", "model: bge-m3  # " + file + ":1", "qdrant_url: http://q:6334  # QDRANT_URL", "postgres://u:***@h/d", "scrub: on  # default"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("%q is missing:\n%s", want, stdout)
		}
	}
}

func TestCommandsSayWhenNoServerAnswers(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, errs bytes.Buffer
	getenv := func(k string) string { return map[string]string{"LOCKSTEP_SERVER": "http://127.0.0.1:1"}[k] }
	if code := run(ctx, []string{"search", "x"}, getenv, nil, &out, &errs); code != cli.ExitCancelled {
		t.Errorf("cancelled: exit %d", code)
	}
	if code, _, stderr := call(t, map[string]string{"LOCKSTEP_SERVER": "http://127.0.0.1:1"}, "search", "x"); code != cli.ExitFailed || !strings.Contains(stderr, "lockstep serve") {
		t.Errorf("exit %d, %q", code, stderr)
	}
}
