package config

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const secret = "0123456789abcdef"

// load runs [Load] with flags, variables and a file's text.
func load(t *testing.T, args []string, env map[string]string, file string) (Config, error) {
	t.Helper()
	set := flag.NewFlagSet("test", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	f := AddFlags(set)
	if err := set.Parse(args); err != nil {
		return Config{}, err
	}
	if file != "" {
		f.file = "lockstep.yaml"
	}
	return Load(f, Source{
		Getenv: func(k string) string {
			if v, ok := env[k]; ok || k != "HOME" {
				return v
			}
			return "/home/u"
		},
		ReadFile: func(name string) ([]byte, error) {
			switch name {
			case "lockstep.yaml":
				return []byte(file), nil
			case "keys":
				return []byte("# loaders\nloader:write:" + secret + "\n\nops:admin:" + secret + "2\n"), nil
			}
			return nil, os.ErrNotExist
		},
	})
}

func TestDefaultsAreValid(t *testing.T) {
	t.Parallel()
	c, err := load(t, nil, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	if c.Listen != "127.0.0.1:8080" || c.Model != "minilm" || !c.Scrub {
		t.Errorf("unexpected defaults: %+v", c)
	}
	if c.DataDir != "/home/u/.local/share/lockstep" || c.CacheDir != "/home/u/.cache/lockstep" {
		t.Errorf("folders %q and %q", c.DataDir, c.CacheDir)
	}
	if !strings.HasPrefix(c.ONNXRuntimeLib, c.CacheDir) {
		t.Errorf("library %q is not in the cache", c.ONNXRuntimeLib)
	}
}

func TestPrecedence(t *testing.T) {
	t.Parallel()
	file := "listen: 127.0.0.1:1\nmodel: file\ndevice: cpu\nhttp:\n  max_body: 2MiB\n"
	env := map[string]string{"LOCKSTEP_LISTEN": "127.0.0.1:2", "LOCKSTEP_MODEL": "env", "LOCKSTEP_SCRUB": "off", "QDRANT_URL": "http://q:6334"}
	c, err := load(t, []string{"--listen", "127.0.0.1:3", "--http-timeout=20s"}, env, file)
	if err != nil {
		t.Fatal(err)
	}
	if c.Listen != "127.0.0.1:3" || c.Model != "env" || c.Device != "cpu" || c.HTTP.MaxBody != 2<<20 ||
		c.Scrub || c.QdrantURL != "http://q:6334" || c.HTTP.Timeout != 20*time.Second {
		t.Errorf("wrong precedence: %+v", c)
	}
	// The service's own variable wins over the shared one.
	c, err = load(t, nil, map[string]string{"DATABASE_URL": "postgres://a/b", "LOCKSTEP_DATABASE_URL": "postgres://c/d"}, "")
	if err != nil || c.DatabaseURL != "postgres://c/d" {
		t.Errorf("DatabaseURL %q, %v", string(c.DatabaseURL), err)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	key := "k:read:" + secret
	cases := []struct {
		name     string
		args     []string
		env      map[string]string
		file     string
		expected string
	}{
		{name: "reachable without keys", args: []string{"--listen", "0.0.0.0:8080"}, expected: "no API keys"},
		{name: "all interfaces without keys", args: []string{"--listen", ":8080"}, expected: "no API keys"},
		{name: "listen without port", args: []string{"--listen", "127.0.0.1"}, expected: "listen: "},
		{name: "port out of range", args: []string{"--listen", "127.0.0.1:70000"}, expected: "is not a port"},
		{name: "unknown flag", args: []string{"--lisen", "x"}, expected: "not defined"},
		{name: "flag does not parse", args: []string{"--http-timeout", "soon"}, expected: "not a duration"},
		{name: "variable does not parse", env: map[string]string{"LOCKSTEP_SCRUB": "maybe"}, expected: "LOCKSTEP_SCRUB"},
		{name: "unknown key", file: "lisen: x\n", expected: "did you mean listen?"},
		{name: "unknown nested key", file: "http:\n  max_bdy: 1\n", expected: "lockstep.yaml:2: http.max_bdy is not a setting; did you mean http.max_body?"},
		{name: "key twice", file: "model: a\nmodel: b\n", expected: "twice"},
		{name: "file is a list", file: "- a\n", expected: "key: value"},
		{name: "group is a scalar", file: "http: 5\n", expected: "key: value"},
		{name: "value is a list", file: "model: [a]\n", expected: "single value"},
		{name: "two documents", file: "model: a\n---\nmodel: b\n", expected: "one YAML document"},
		{name: "broken YAML", file: "model: [a\n", expected: "lockstep.yaml"},
		{name: "file value does not parse", file: "http:\n  max_requests: many\n", expected: "lockstep.yaml:2: http.max_requests: \"many\" is not an integer"},
		{name: "fp16 on a CPU", args: []string{"--precision", "fp16", "--device", "cpu"}, expected: "precision"},
		{name: "int8 on a GPU", args: []string{"--precision", "int8", "--device", "cuda:1"}, expected: "precision"},
		{name: "unknown device", args: []string{"--device", "tpu"}, expected: "device"},
		{name: "device number", args: []string{"--device", "cuda:x"}, expected: "device"},
		{name: "batch larger than queue", args: []string{"--embedder-batch-tokens", "2000", "--embedder-queue-tokens", "1000"}, expected: "never fits"},
		{name: "qdrant HTTP port", env: map[string]string{"QDRANT_URL": "http://q:6333"}, expected: "gRPC"},
		{name: "qdrant URL without scheme", env: map[string]string{"QDRANT_URL": "q:6334"}, expected: "qdrant_url"},
		{name: "qdrant key without server", env: map[string]string{"QDRANT_API_KEY": "x"}, expected: "qdrant_api_key"},
		{name: "database URL of another kind", env: map[string]string{"DATABASE_URL": "mysql://u:hunter2@h/d"}, expected: "database_url"},
		{name: "workers take all connections", args: []string{"--ingest-workers", "16"}, expected: "max_conns"},
		{name: "search longer than a request", args: []string{"--search-timeout", "10m"}, expected: "search.timeout"},
		{name: "brake of zero", args: []string{"--reconcile-max-deletes", "0"}, expected: "reconcile.max_deletes"},
		{name: "brake that is no number", args: []string{"--reconcile-max-deletes", "NaN"}, expected: "reconcile.max_deletes"},
		{name: "rate without keys", args: []string{"--http-rate-per-key", "5"}, expected: "rate_per_key"},
		{name: "TLS half", args: []string{"--tls-cert-file", "/nonexistent"}, expected: "tls"},
		{name: "missing keys file", env: map[string]string{"LOCKSTEP_API_KEYS_FILE": "nowhere"}, expected: "read the API keys"},
		{name: "key of wrong form", env: map[string]string{"LOCKSTEP_API_KEYS": secret}, expected: "name:scope+scope:secret"},
		{name: "unknown scope", env: map[string]string{"LOCKSTEP_API_KEYS": "k:root:" + secret}, expected: `"root"`},
		{name: "short secret", env: map[string]string{"LOCKSTEP_API_KEYS": "k:read:short"}, expected: "at least 16"},
		{name: "two keys of one name", env: map[string]string{"LOCKSTEP_API_KEYS": key + " k:write:" + secret + "x"}, expected: "two keys"},
		{name: "one secret twice", env: map[string]string{"LOCKSTEP_API_KEYS": key + " l:write:" + secret}, expected: "secret of another"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, err := load(t, c.args, c.env, c.file)
			if err == nil || !strings.Contains(err.Error(), c.expected) {
				t.Fatalf("error %v, expected %q", err, c.expected)
			}
			if strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error repeats a secret: %v", err)
			}
		})
	}
}

func TestAPIKeys(t *testing.T) {
	t.Parallel()
	env := map[string]string{"LOCKSTEP_API_KEYS": "web:read:" + secret + ":with:colons, both:read+write:" + secret + "3", "LOCKSTEP_API_KEYS_FILE": "keys"}
	c, err := load(t, []string{"--listen", "0.0.0.0:80"}, env, "")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, k := range c.APIKeys {
		names = append(names, k.Name+"/"+strings.Join(k.Scopes, "+"))
	}
	if got := strings.Join(names, " "); got != "web/read both/read+write loader/write ops/admin" {
		t.Errorf("keys %q", got)
	}
	if c.APIKeys[0].Secret != secret+":with:colons" {
		t.Error("a secret may contain colons")
	}
	list, err := load(t, nil, nil, "api_keys:\n  - a:read:"+secret+"\n  - b:write:"+secret+"b\n")
	if err != nil || len(list.APIKeys) != 2 {
		t.Errorf("a YAML list gave %v, %v", list.APIKeys, err)
	}
}

// TestSecretsNeverPrint formats a configuration in every way somebody might.
func TestSecretsNeverPrint(t *testing.T) {
	t.Parallel()
	env := map[string]string{
		"LOCKSTEP_API_KEYS": "web:read:" + secret, "QDRANT_API_KEY": "qdrant-hunter2", "QDRANT_URL": "https://q:6334",
		"DATABASE_URL": "postgres://user:pg-hunter2@db/x?sslmode=disable",
	}
	c, err := load(t, nil, env, "")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := c.Print(&out); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&out, "%v %+v %#v %s", c, c, c, c.APIKeys)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "config", c, "url", c.DatabaseURL)
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "config", c, "keys", c.APIKeys)
	for _, s := range []string{secret, "hunter2"} {
		if strings.Contains(out.String(), s) {
			t.Errorf("a secret was printed:\n%s", out.String())
		}
	}
	for _, s := range []string{"user:***@db/x", "web:read:***", "# DATABASE_URL", "# default"} {
		if !strings.Contains(out.String(), s) {
			t.Errorf("%q is missing:\n%s", s, out.String())
		}
	}
}

func TestMaskURL(t *testing.T) {
	t.Parallel()
	for in, expected := range map[string]string{
		"": "", "postgres://u:p@h/d": "postgres://u:***@h/d", "postgres://u@h/d": "postgres://u@h/d",
		"postgres://h/d?password=p": "postgres://h/d?password=%2A%2A%2A", "host=h password=p": "***",
		"postgres://u:p@x@h/d": "postgres://u:***@h/d",
	} {
		if got := maskURL(in); got != expected {
			t.Errorf("maskURL(%q) = %q, expected %q", in, got, expected)
		}
	}
}

// TestPrintedFormIsAFile reads back what Print wrote.
func TestPrintedFormIsAFile(t *testing.T) {
	t.Parallel()
	c, err := load(t, []string{"--http-max-body", "3MiB", "--scrub=off", "--log-level", "debug"}, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := c.Print(&out); err != nil {
		t.Fatal(err)
	}
	again, err := load(t, nil, nil, out.String())
	if err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	c.sources, again.sources = nil, nil
	if fmt.Sprintf("%#v", c) != fmt.Sprintf("%#v", again) {
		t.Errorf("read back differently:\n%#v\n%#v", c, again)
	}
}

// TestEverySettingIsDescribed also fails when a field has no yaml tag or a type nothing parses.
func TestEverySettingIsDescribed(t *testing.T) {
	t.Parallel()
	c := Default()
	seen := map[string]bool{}
	for _, s := range settingsOf(&c) {
		if s.help == "" {
			t.Errorf("%s has no help", s.path)
		}
		if seen[s.flag] {
			t.Errorf("two settings have the flag --%s", s.flag)
		}
		seen[s.flag] = true
		func() {
			defer func() {
				if v := recover(); v != nil {
					t.Error(v)
				}
			}()
			_ = s.set("1") // only that it has a parser
		}()
	}
	var usage bytes.Buffer
	Usage(&usage)
	if !strings.Contains(usage.String(), "--http-max-body") || !strings.Contains(usage.String(), "LOCKSTEP_DATABASE_URL, DATABASE_URL") {
		t.Errorf("usage:\n%s", usage.String())
	}
}

var update = flag.Bool("update", false, "rewrite the golden files")

// TestDocumentation keeps docs/configuration.md what the code says.
func TestDocumentation(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	b.WriteString(`# Configuration

<!-- Written by "go test ./internal/config -run TestDocumentation -update"; edit the code. -->

Every setting has three names: a flag, a variable and a path in a YAML file. Flags win over
variables, variables over the file (` + "`--config FILE` or `LOCKSTEP_CONFIG`" + `), the file over the default.
` + "`lockstep serve --print-config`" + ` shows what holds and where each value came from, secrets masked;
its output is a configuration file. An unknown flag or path, or a value that does not parse, is
refused before anything is opened, and so are values that do not fit each other.

Durations are written 500ms, 30s, 5m; sizes 1048576, 16MiB, 1GB; switches on and off.

API keys have the form ` + "`name:scope+scope:secret`" + `, several separated by spaces or commas, or one a line
in a file (where # begins a comment). The scopes are read, write and admin; admin includes the
others. A secret has at least 16 characters, such as ` + "`openssl rand -hex 24`" + ` makes. The name appears
in access logs, the secret nowhere. Without keys the service listens on loopback only.

    LOCKSTEP_API_KEYS="web:read:SECRET1 loader:read+write:SECRET2 ops:admin:SECRET3"

The commands that speak to a server read two more variables: ` + "`LOCKSTEP_SERVER`" + ` (its address) and
` + "`LOCKSTEP_API_KEY`" + ` (the secret alone). ` + "`lockstep model pull`" + ` reads ` + "`LOCKSTEP_HUB_URL`" + ` and ` + "`HF_TOKEN`" + `.

| Flag | Variable | YAML path | Default | Meaning |
| --- | --- | --- | --- | --- |
`)
	c := Default()
	for _, s := range settingsOf(&c) {
		value := s.text()
		if value != "" {
			value = "`" + value + "`"
		}
		fmt.Fprintf(&b, "| `--%s` | `%s` | `%s` | %s | %s |\n", s.flag, strings.Join(s.env, "`, `"), s.path, value, s.help)
	}
	path := filepath.Join("..", "..", "docs", "configuration.md")
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != b.String() {
		t.Error("docs/configuration.md is not what the code says; run with -update")
	}
}

func FuzzYAML(f *testing.F) {
	f.Add([]byte("listen: 127.0.0.1:1\nhttp:\n  max_body: 2MiB\napi_keys: [a:read:0123456789abcdef]\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("<<: {listen: x}\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c := Default()
		if readYAML(raw, "f", settingsOf(&c), map[string]string{}) == nil {
			_ = c.Validate()
			_ = c.Print(io.Discard)
		}
	})
}

func FuzzAPIKeys(f *testing.F) {
	f.Add("a:read:0123456789abcdef b:read+write:0123456789abcdefg")
	f.Fuzz(func(t *testing.T, text string) {
		ks, err := parseAPIKeys(text, true)
		if err != nil {
			return
		}
		for _, k := range ks {
			if k.Name == "" || len(k.Scopes) == 0 || len(k.Secret) < minSecret {
				t.Fatalf("accepted %q: %+v", text, k)
			}
		}
	})
}
