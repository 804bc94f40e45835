package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

//go:embed tokenizers/Cargo.toml tokenizers/Cargo.lock
var cargoFiles embed.FS

const tokenizersLib = "libtokenizers.a"

// planTokenizers finds the library or plans its build. The folder's name carries a key over
// everything the library is built from, so a change of any of it builds another.
func (s *setup) planTokenizers(ctx context.Context) (step, error) {
	const name = "build " + tokenizersLib + " with cargo (a minute or two on two cores)"
	if given := s.getenv("TOKENIZERS_LIB"); given != "" {
		dir, err := givenTokenizers(given)
		if err != nil {
			return step{}, err
		}
		s.tokenizersDir = dir
		return step{name: name, ready: func() (bool, error) { return true, nil }}, nil
	}
	version, source, err := moduleSource(ctx, tokenizersModule)
	if err != nil {
		return step{}, err
	}
	lib, err := os.ReadFile(filepath.Join(source, "src", "lib.rs"))
	if err != nil {
		return step{}, fmt.Errorf("reading the source of %s %s: %w", tokenizersModule, version, err)
	}
	files := map[string][]byte{filepath.Join("src", "lib.rs"): lib}
	sum := sha256.New()
	sum.Write(lib)
	for _, f := range []string{"Cargo.toml", "Cargo.lock"} {
		b, err := cargoFiles.ReadFile("tokenizers/" + f)
		if err != nil {
			return step{}, err
		}
		files[f] = b
		sum.Write(b)
	}
	key := strings.TrimPrefix(version, "v") + "-" + hex.EncodeToString(sum.Sum(nil))[:12]
	place := s.layout.Tokenizers(key, s.goos, s.goarch)
	s.tokenizersDir = place
	return step{
		name:  name,
		ready: func() (bool, error) { return fileReady(filepath.Join(place, tokenizersLib), -1) },
		do:    func(ctx context.Context) error { return s.buildTokenizers(ctx, key, files, place) },
	}, nil
}

// givenTokenizers takes a library or its folder and returns the folder.
func givenTokenizers(given string) (string, error) {
	path, err := filepath.Abs(given)
	if err != nil {
		return "", err
	}
	if filepath.Base(path) != tokenizersLib {
		path = filepath.Join(path, tokenizersLib)
	}
	ok, err := fileReady(path, -1)
	if err != nil {
		return "", err
	}
	if !ok {
		return "", fmt.Errorf("TOKENIZERS_LIB: %s is not there: name the %s, or its folder, or unset the variable to have it built", path, tokenizersLib)
	}
	return filepath.Dir(path), nil
}

// moduleSource returns the version that go.mod requires of a module and the folder of its
// source, fetching it if the module cache lacks it.
func moduleSource(ctx context.Context, module string) (version, dir string, err error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", module)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", "", fmt.Errorf("finding the source of %s (run from the checkout, with Go on PATH): %w: %s%s",
			module, err, stdout.String(), stderr.String())
	}
	var m struct{ Version, Dir string }
	if err := json.Unmarshal(stdout.Bytes(), &m); err != nil {
		return "", "", fmt.Errorf("reading go mod download's answer: %w", err)
	}
	return m.Version, m.Dir, nil
}

func (s *setup) buildTokenizers(ctx context.Context, key string, files map[string][]byte, place string) error {
	cargo, err := exec.LookPath("cargo")
	if err != nil {
		return errors.New("cargo is not on PATH: install Rust (see rustup.rs, or your system's package cargo, 1.80 or newer), " +
			"or set TOKENIZERS_LIB to a " + tokenizersLib + " of the same release")
	}
	for _, c := range []struct{ env, name, what string }{{"CC", "cc", "C"}, {"CXX", "c++", "C++"}} {
		name := c.name
		if v := strings.Fields(s.getenv(c.env)); len(v) > 0 {
			name = v[0]
		}
		if _, err := exec.LookPath(name); err != nil {
			return fmt.Errorf("no %s compiler (%s) on PATH: install one (Debian: apt-get install build-essential; macOS: xcode-select --install)", c.what, name)
		}
	}
	// The build folder has a fixed name, so that cargo goes on where an interrupted run stopped.
	build := filepath.Join(s.layout.Work(), "tokenizers-"+key)
	for name, content := range files {
		path := filepath.Join(build, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, content) {
			continue // An unchanged time keeps cargo from compiling again.
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return err
		}
	}
	cmd := exec.CommandContext(ctx, cargo, "build", "--release", "--locked")
	cmd.Dir = build
	cmd.Env = append(os.Environ(), "CARGO_TARGET_DIR="+filepath.Join(build, "target"), "CARGO_TERM_COLOR=never")
	if err := s.runLogged(cmd, filepath.Join(build, "cargo.log")); err != nil {
		return err
	}
	dir, remove, err := s.workDir(installWork)
	if err != nil {
		return err
	}
	defer remove()
	if err := copyFile(filepath.Join(build, "target", "release", tokenizersLib), filepath.Join(dir, tokenizersLib)); err != nil {
		return err
	}
	if err := install(dir, place); err != nil {
		return err
	}
	return os.RemoveAll(build)
}

// heartbeat is how often a silent command shows that it is alive.
const heartbeat = 15 * time.Second

// killDelay is how long an interrupted command may take to stop before it is killed.
const killDelay = 10 * time.Second

// logTail is how much of a failed command's log is shown, in bytes.
const logTail = 4 << 10

// runLogged runs cmd with its output in a file, prints a line now and then while it runs, and
// puts the end of the log into the error if it fails.
func (s *setup) runLogged(cmd *exec.Cmd, path string) error {
	log, err := os.Create(path)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	// Interrupted, cargo and pip stop what they started; killed, they leave it running.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = killDelay
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", cmd.Path, err)
	}
	started := s.now()
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	tick := time.NewTicker(heartbeat)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			fmt.Fprintf(s.out, "  %s at work for %.0f s\n", filepath.Base(cmd.Path), s.now().Sub(started).Seconds())
		case err := <-done:
			if err == nil {
				return nil
			}
			text, readErr := os.ReadFile(path)
			if readErr != nil {
				return errors.Join(err, readErr)
			}
			if len(text) > logTail {
				text = text[len(text)-logTail:]
			}
			return fmt.Errorf("%s failed: %w\n%s\n(whole output: %s; run again to go on from here)",
				filepath.Base(cmd.Path), err, bytes.TrimSpace(text), path)
		}
	}
}

// copyFile copies src to a new file dst and waits until it is on the disk.
func copyFile(src, dst string) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	return writeFile(dst, in)
}

// writeFile writes everything of r to a new file and waits until it is on the disk.
func writeFile(path string, r io.Reader) (err error) {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if _, err := io.Copy(out, r); err != nil {
		return err
	}
	return out.Sync()
}
