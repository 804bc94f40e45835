package devstack

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// attributes of a child: a process group of its own, so that Ctrl-C on the terminal reaches
// Lockstep alone, which stops its children in order; the user to run as; and the signal the
// kernel sends when Lockstep is gone.
func attributes(as *identity, onDeath syscall.Signal) *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: onDeath}
	if as != nil {
		a.Credential = &syscall.Credential{Uid: as.uid, Gid: as.gid}
	}
	return a
}

// isProcess reports whether pid runs the program with dir as its working directory.
func isProcess(pid int, program, dir string) (bool, error) {
	proc := fmt.Sprintf("/proc/%d", pid)
	// A zombie has no links to read; it is as good as gone.
	exe, err := os.Readlink(filepath.Join(proc, "exe"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return false, nil
	}
	if errors.Is(err, fs.ErrPermission) {
		return false, nil // another user's process: the pid was reused
	}
	if err != nil {
		return false, err
	}
	if filepath.Base(strings.TrimSuffix(exe, " (deleted)")) != program {
		return false, nil
	}
	cwd, err := os.Readlink(filepath.Join(proc, "cwd"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) || errors.Is(err, fs.ErrPermission) {
		return false, nil
	}
	return cwd == dir, err
}
