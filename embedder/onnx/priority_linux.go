package onnx

import (
	"fmt"
	"syscall"
)

// lowerPriority adds nice to the niceness of the calling thread, and of those it starts. Linux
// keeps one for each thread; the system call's 0 means the calling one.
func lowerPriority(nice int) error {
	if nice <= 0 {
		return nil
	}
	// The system call answers 20 less the niceness, which cannot be negative.
	left, err := syscall.Getpriority(syscall.PRIO_PROCESS, 0)
	if err == nil {
		err = syscall.Setpriority(syscall.PRIO_PROCESS, 0, min(20-left+nice, 19))
	}
	if err != nil {
		return fmt.Errorf("lowering the priority of a thread: %w", err)
	}
	return nil
}
