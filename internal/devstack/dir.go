package devstack

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// format numbers the layout of the data directory. It grows when an older Lockstep could not
// use what a newer one wrote.
const format = 1

// dataDir is the locked data directory.
type dataDir struct {
	path string // absolute, without symbolic links
	lock *os.File
}

// openDataDir makes and locks the directory and checks whose it is.
func openDataDir(path string) (_ *dataDir, err error) {
	if path == "" {
		return nil, corpus.Errorf(corpus.Invalid, "data_dir", "no data directory was given; set --data-dir")
	}
	if path, err = filepath.Abs(path); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	// Others may pass through but not list: as root, Postgres runs as another user.
	if err := os.MkdirAll(path, 0o711); err != nil {
		return nil, corpus.Wrap(corpus.Unavailable, "data_dir", "the data directory cannot be made; choose another with --data-dir", err)
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(path, "LOCK"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, corpus.Wrap(corpus.Unavailable, "data_dir", "the data directory cannot be written; choose another with --data-dir", err)
	}
	d := &dataDir{path: path, lock: lock}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	// The lock goes with the process, however that ends; the file's content is for people.
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, corpus.Wrap(corpus.Unavailable, "data_dir", "the data directory cannot be locked; it must lie on a local file system", err)
		}
		holder, _ := os.ReadFile(lock.Name())
		return nil, corpus.Errorf(corpus.Conflict, "data_dir_in_use",
			"another Lockstep (process %s) uses the data directory %s; stop it, or choose another directory with --data-dir", strings.TrimSpace(string(holder)), path)
	}
	if err := lock.Truncate(0); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if _, err := lock.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	return d, d.checkVersion()
}

func (d *dataDir) checkVersion() error {
	name := d.join("VERSION")
	raw, err := os.ReadFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		for _, sub := range []string{"postgres", "qdrant", "index"} {
			if _, err := os.Lstat(d.join(sub)); err == nil {
				return corpus.Errorf(corpus.Conflict, "data_dir_foreign",
					"%s holds %q but no VERSION file: Lockstep did not make it; choose another directory with --data-dir", d.path, sub)
			}
		}
		return writeFile(name, fmt.Appendf(nil, "%d\n", format), 0o644)
	case err != nil:
		return fmt.Errorf("data directory: %w", err)
	}
	v, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	switch {
	case err != nil:
		return corpus.Errorf(corpus.Conflict, "data_dir_foreign", "%s is not a version of Lockstep's data directory; choose another directory with --data-dir", name)
	case v > format:
		return corpus.Errorf(corpus.Conflict, "data_dir_newer",
			"the data directory %s has format %d and this Lockstep knows %d: a newer Lockstep made it; run that one, or choose another directory with --data-dir", d.path, v, format)
	}
	return nil
}

func (d *dataDir) close() error {
	// Unlocking before closing: a process being forked at this moment still holds a copy of
	// the descriptor. The file stays: removing it would race with the next holder.
	return errors.Join(unix.Flock(int(d.lock.Fd()), unix.LOCK_UN), d.lock.Close())
}

// secret reads a generated secret, or makes it on first use.
func (d *dataDir) secret(name string) (string, error) {
	raw, err := os.ReadFile(d.join(name))
	if err == nil && len(strings.TrimSpace(string(raw))) >= 16 {
		return strings.TrimSpace(string(raw)), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	var b [24]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", err
	}
	s := hex.EncodeToString(b[:])
	return s, writeFile(d.join(name), []byte(s+"\n"), 0o600)
}

// writeFile replaces a file at once: a crash leaves the old one or the new one.
func writeFile(name string, data []byte, perm os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(name), ".tmp-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // gone already when all went well
	if _, err = tmp.Write(data); err == nil {
		err = tmp.Chmod(perm)
	}
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), name)
}
