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

// niceness reads it from the stat file of a thread in /proc.
func niceness(t *testing.T, stat string) (n int, ok bool) {
	t.Helper()
	raw, err := os.ReadFile(stat)
	if err != nil {
		return 0, false // the thread has ended
	}
	// The name, in parentheses, may hold spaces; niceness is field 19, the 17th after it.
	n, err = strconv.Atoi(strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))[16])
	if err != nil {
		t.Fatalf("%s: %v", stat, err)
	}
	return n, true
}

func TestComputingThreadsStandBack(t *testing.T) {
	const threads, lower = 4, 7
	thread := func() int {
		n, ok := niceness(t, "/proc/thread-self/stat")
		if !ok {
			t.Fatal("this thread is not in /proc")
		}
		return n
	}
	base := thread() // the tests themselves may run under nice(1)
	nice := min(base+lower, 19)
	if nice == base {
		t.Fatalf("the tests run at niceness %d: there is nothing below it", base)
	}
	dir := handModel(t, model.Padded, paddedGraph(), nil)
	e, err := Open(Config{Library: need(t, "ONNXRUNTIME_LIB"), ModelDir: dir, Threads: threads, Nice: lower})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	all, err := filepath.Glob("/proc/self/task/*/stat")
	if err != nil {
		t.Fatal(err)
	}
	count := map[int]int{}
	for _, stat := range all {
		if n, ok := niceness(t, stat); ok {
			count[n]++
		}
	}
	// ONNX Runtime starts one fewer: the caller's own thread computes too, once it has entered.
	if count[nice] < threads-1 || count[base] == 0 {
		t.Errorf("threads by niceness %v, want %d of %d and others as they were", count, threads-1, nice)
	}
	entered := make(chan int)
	go func() {
		defer close(entered)
		runtime.LockOSThread() // for good
		if err := e.Enter(); err != nil {
			t.Error(err)
			return
		}
		entered <- thread()
	}()
	if got := <-entered; got != nice {
		t.Errorf("a thread that entered has niceness %d, want %d", got, nice)
	}
}
