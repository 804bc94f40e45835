//go:build unix && !linux

package devstack

import (
	"errors"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// attributes of a child. No kernel but Linux tells a child that its parent is gone: what a
// killed Lockstep leaves here is stopped by its next start.
func attributes(as *identity, _ syscall.Signal) *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Setpgid: true}
	if as != nil {
		a.Credential = &syscall.Credential{Uid: as.uid, Gid: as.gid}
	}
	return a
}

// isProcess reports whether pid runs the program with dir among its arguments or as its
// working directory (untested: see the README).
func isProcess(pid int, program, dir string) (bool, error) {
	out, err := exec.Command("ps", "-o", "command=", "-p", strconv.Itoa(pid)).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return false, nil // no such process
	}
	if err != nil {
		return false, err
	}
	line := strings.TrimSpace(string(out))
	first, _, _ := strings.Cut(line, " ")
	return filepath.Base(first) == program && strings.Contains(line, dir), nil
}
