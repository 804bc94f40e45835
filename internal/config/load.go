package config

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"

	"github.com/lockstep-db/lockstep/internal/config/cachedir"
)

// Source is what [Load] reads besides the arguments.
type Source struct {
	// Getenv reads one variable.
	Getenv func(string) string
	// ReadFile reads a file; nil means os.ReadFile.
	ReadFile func(string) ([]byte, error)
	// Root is true when the process runs as root, whose home an unprivileged Postgres cannot enter.
	Root bool
}

// Flags are the arguments of a command that has a configuration.
type Flags struct {
	given map[string]string // by YAML path
	file  string
}

// AddFlags declares a flag for every setting on set, and --config.
func AddFlags(set *flag.FlagSet) *Flags {
	f := &Flags{given: map[string]string{}}
	probe := Default()
	for _, s := range settingsOf(&probe) {
		take := func(text string) error {
			if err := s.set(text); err != nil {
				return err
			}
			f.given[s.path] = text
			return nil
		}
		if _, isBool := s.value.Interface().(bool); isBool {
			set.BoolFunc(s.flag, s.help, take)
		} else {
			set.Func(s.flag, s.help, take)
		}
	}
	set.StringVar(&f.file, "config", "", "YAML file of settings; default $LOCKSTEP_CONFIG")
	return f
}

// Load merges defaults, file, variables and flags, in rising order, and validates the whole.
// The flags' set must have been parsed.
func Load(f *Flags, src Source) (Config, error) {
	if src.ReadFile == nil {
		src.ReadFile = os.ReadFile
	}
	c := Default()
	c.sources = map[string]string{}
	all := settingsOf(&c)

	file := f.file
	if file == "" {
		file = src.Getenv("LOCKSTEP_CONFIG")
	}
	if file != "" {
		raw, err := src.ReadFile(file)
		if err != nil {
			return c, fmt.Errorf("read the configuration file: %w", err)
		}
		if err := readYAML(raw, file, all, c.sources); err != nil {
			return c, err
		}
	}
	for _, s := range all {
		for _, name := range s.env {
			text := src.Getenv(name)
			if text == "" {
				continue
			}
			if err := s.set(text); err != nil {
				return c, fmt.Errorf("variable %s: %w", name, err)
			}
			c.sources[s.path] = name
			break
		}
		if text, ok := f.given[s.path]; ok {
			if err := s.set(text); err != nil {
				return c, fmt.Errorf("flag --%s: %w", s.flag, err)
			}
			c.sources[s.path] = "--" + s.flag
		}
	}
	if c.APIKeysFile != "" {
		raw, err := src.ReadFile(c.APIKeysFile)
		if err != nil {
			return c, fmt.Errorf("read the API keys: %w", err)
		}
		ks, err := parseAPIKeys(string(raw), true)
		if err != nil {
			return c, fmt.Errorf("%s: %w", c.APIKeysFile, err)
		}
		if len(ks) == 0 {
			return c, fmt.Errorf("%s has no API keys", c.APIKeysFile)
		}
		c.APIKeys = append(c.APIKeys, ks...)
	}
	if err := c.place(src); err != nil {
		return c, err
	}
	return c, c.Validate()
}

// place fills in the folders that depend on the machine.
func (c *Config) place(src Source) error {
	if c.CacheDir == "" {
		l, err := cachedir.Default(src.Getenv)
		if err != nil {
			return fmt.Errorf("%w, or set --cache-dir", err)
		}
		c.CacheDir = l.Root
	}
	if c.ONNXRuntimeLib == "" {
		c.ONNXRuntimeLib = c.Cache().ONNXRuntime(runtime.GOOS, runtime.GOARCH)
	}
	if c.DataDir == "" {
		switch xdg, home := src.Getenv("XDG_DATA_HOME"), src.Getenv("HOME"); {
		case src.Root:
			c.DataDir = "/var/lib/lockstep"
		case filepath.IsAbs(xdg):
			c.DataDir = filepath.Join(xdg, "lockstep")
		case filepath.IsAbs(home):
			c.DataDir = filepath.Join(home, ".local", "share", "lockstep")
		default:
			return errors.New("no folder for data: set --data-dir (or HOME) to an absolute path")
		}
	}
	return nil
}

// Cache is the layout of the cache folder.
func (c *Config) Cache() cachedir.Layout { return cachedir.Layout{Root: c.CacheDir} }

// readYAML sets what the file names. Every key must be a setting, once.
func readYAML(raw []byte, file string, all []*setting, sources map[string]string) error {
	var doc yaml.Node
	dec := yaml.NewDecoder(strings.NewReader(string(raw)))
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil
	} else if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	var extra yaml.Node
	if err := dec.Decode(&extra); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: one YAML document is expected", file)
	}
	byPath := map[string]*setting{}
	groups := map[string]bool{}
	for _, s := range all {
		byPath[s.path] = s
		for i := range s.path {
			if s.path[i] == '.' {
				groups[s.path[:i]] = true
			}
		}
	}
	seen := map[string]bool{}
	var walk func(n *yaml.Node, prefix string) error
	walk = func(n *yaml.Node, prefix string) error {
		if n.Kind != yaml.MappingNode {
			return fmt.Errorf("%s:%d: settings are expected as key: value", file, n.Line)
		}
		for i := 0; i+1 < len(n.Content); i += 2 {
			key, value := n.Content[i], n.Content[i+1]
			path := prefix + key.Value
			at := fmt.Sprintf("%s:%d: %s", file, key.Line, path)
			if seen[path] {
				return fmt.Errorf("%s occurs twice", at)
			}
			seen[path] = true
			if value.Kind == yaml.ScalarNode && value.Tag == "!!null" {
				continue // an empty value is the default
			}
			if groups[path] {
				if err := walk(value, path+"."); err != nil {
					return err
				}
				continue
			}
			s, ok := byPath[path]
			if !ok {
				return fmt.Errorf("%s is not a setting%s", at, nearest(path, all))
			}
			text, err := scalar(value, s)
			if err == nil {
				err = s.set(text)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", at, err)
			}
			sources[path] = file + ":" + strconv.Itoa(key.Line)
		}
		return nil
	}
	root := &doc
	if root.Kind == yaml.DocumentNode && len(root.Content) == 1 {
		root = root.Content[0]
	}
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil
	}
	return walk(root, "")
}

// scalar returns the value's text; a list is accepted where several values are.
func scalar(n *yaml.Node, s *setting) (string, error) {
	switch n.Kind {
	case yaml.ScalarNode:
		return n.Value, nil
	case yaml.SequenceNode:
		if _, many := s.value.Interface().(APIKeys); !many {
			break
		}
		var parts []string
		for _, item := range n.Content {
			if item.Kind != yaml.ScalarNode {
				return "", errors.New("a list of text is expected")
			}
			parts = append(parts, item.Value)
		}
		return strings.Join(parts, " "), nil
	}
	return "", errors.New("a single value is expected")
}

// nearest suggests the setting that a misspelt one was meant to be.
func nearest(path string, all []*setting) string {
	best, at := 4, ""
	for _, s := range all {
		if d := distance(path, s.path); d < best {
			best, at = d, s.path
		}
	}
	if at == "" {
		return ""
	}
	return "; did you mean " + at + "?"
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		last := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := last
			if a[i] != b[j] {
				cost = 1 + min(last, row[j], row[j+1])
			}
			last, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}

// Print writes the effective settings as YAML with secrets masked, each with where it came
// from. Without the masked values, it is a configuration file.
func (c Config) Print(w io.Writer) error {
	var b strings.Builder
	group := ""
	for _, s := range settingsOf(&c) {
		name := s.path
		indent := ""
		if g, leaf, ok := strings.Cut(s.path, "."); ok {
			if g != group {
				fmt.Fprintf(&b, "%s:\n", g)
			}
			group, name, indent = g, leaf, "  "
		}
		value := s.text()
		if s.isText() {
			q, err := yaml.Marshal(value)
			if err != nil {
				return fmt.Errorf("print %s: %w", s.path, err)
			}
			value = strings.TrimSuffix(string(q), "\n")
		}
		source := c.sources[s.path]
		if source == "" {
			source = "default"
		}
		fmt.Fprintf(&b, "%s%s: %s  # %s\n", indent, name, value, source)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Usage writes one entry for each setting: flag, variables, YAML path, default, meaning.
func Usage(w io.Writer) {
	c := Default()
	for _, s := range settingsOf(&c) {
		value := s.text()
		if value == "" {
			value = "none"
		}
		fmt.Fprintf(w, "  --%s\n        %s\n        (%s; in a file %s; default %s)\n", s.flag, s.help, strings.Join(s.env, ", "), s.path, value)
	}
}

// exists reports whether a file is there and can be opened.
func exists(path string) error {
	f, err := os.Open(path)
	if err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			return pe.Err
		}
		return err
	}
	return f.Close()
}
