//go:build !linux

package onnx

// lowerPriority does nothing: only Linux keeps a priority for each thread of a process.
func lowerPriority(int) error { return nil }
