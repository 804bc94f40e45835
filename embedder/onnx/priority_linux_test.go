package onnx

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/lockstep-db/lockstep/embedder/model"
)

// niceness counts the threads of this process by theirs, without the main one: Go parks that one
// for good where it would end another, so a goroutine that lowered it leaves it behind.
func niceness(t *testing.T) map[int]int {
	t.Helper()
	stats, err := filepath.Glob("/proc/self/task/*/stat")
	if err != nil || len(stats) == 0 {
		t.Fatalf("no threads are listed: %v", err)
	}
	found := map[int]int{}
	for _, name := range stats {
		if filepath.Base(filepath.Dir(name)) == strconv.Itoa(os.Getpid()) {
			continue
		}
		raw, err := os.ReadFile(name)
		if err != nil {
			continue // the thread has ended
		}
		// The name, in parentheses, may hold spaces; niceness is field 19, the 17th after it.
		fields := strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))
		n, err := strconv.Atoi(fields[16])
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		found[n]++
	}
	return found
}

func TestComputingThreadsStandBack(t *testing.T) {
	const threads, nice = 4, 7
	dir := handModel(t, model.Padded, paddedGraph(), nil)
	e, err := Open(Config{Library: need(t, "ONNXRUNTIME_LIB"), ModelDir: dir, Threads: threads, Nice: nice})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	// ONNX Runtime starts one fewer: the caller's own thread computes too, once it has entered.
	loaded := niceness(t)
	if loaded[nice] < threads-1 {
		t.Errorf("threads by niceness %v, want %d of %d", loaded, threads-1, nice)
	}
	entered := make(chan error)
	var during map[int]int
	go func() {
		defer close(entered)
		runtime.LockOSThread()
		if err := e.Enter(); err != nil {
			entered <- err
			return
		}
		during = niceness(t)
	}()
	for err := range entered {
		t.Fatal(err)
	}
	if during[nice] < threads || during[0] == 0 {
		t.Errorf("threads by niceness %v, want %d of %d and others as they were", during, threads, nice)
	}
}
