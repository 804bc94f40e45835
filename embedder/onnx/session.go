package onnx

import (
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"sync"

	ort "github.com/yalue/onnxruntime_go"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// CodeOutOfMemory is the code of the error that says a batch did not fit the device's memory.
const CodeOutOfMemory = "device_out_of_memory"

// session runs one ONNX graph. Runs may overlap.
type session struct {
	// mu is held for reading during runs, for writing while closing.
	mu sync.RWMutex
	s  *ort.DynamicAdvancedSession
	// small, if not nil, is one run that is always ready; smallMu is held during it.
	small   *bound
	smallMu sync.Mutex
}

// sessionConfig says where a graph runs.
type sessionConfig struct {
	// threads computes one operator on the CPU; 0 leaves it to ONNX Runtime (all cores).
	threads int
	// nice is added to the niceness of these threads.
	nice int
	// cuda puts the graph on a GPU, with the provider's options.
	cuda        bool
	cudaOptions map[string]string
}

var errSessionClosed = corpus.Errorf(corpus.Unavailable, "embedder_closed", "the model is closed: the service is stopping")

// openSession loads a graph, or fails if the device is not there. The library must be open.
func openSession(path string, cfg sessionConfig) (s *session, err error) {
	opts, err := ort.NewSessionOptions()
	if err != nil {
		return nil, fmt.Errorf("loading graph: %w", err)
	}
	defer func() { err = errors.Join(err, opts.Destroy()) }()
	// Patterns of memory are planned and kept for each shape; shapes here never repeat.
	set := []error{
		opts.SetMemPattern(false),
		opts.AddSessionConfigEntry("session.use_env_allocators", "1"),
	}
	if cfg.threads > 0 {
		set = append(set, opts.SetIntraOpNumThreads(cfg.threads))
	}
	if cfg.cuda {
		set = append(set, appendCUDA(opts, cfg.cudaOptions))
	}
	if err := errors.Join(set...); err != nil {
		return nil, fmt.Errorf("loading graph: %w", err)
	}
	c, err := newSession(path, opts, cfg.nice)
	if err != nil {
		if cfg.cuda {
			return nil, deviceError(err)
		}
		return nil, corpus.Wrap(corpus.Invalid, "model_unusable", "ONNX Runtime cannot load "+path+": build the model again", err)
	}
	return &session{s: c}, nil
}

// newSession loads a graph on a thread of its own, whose priority ONNX Runtime's threads inherit.
func newSession(path string, opts *ort.SessionOptions, nice int) (c *ort.DynamicAdvancedSession, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()  // for good: the thread ends with the goroutine
		_ = lowerPriority(nice) // where it is refused, Enter says so: nothing depends on it
		c, err = ort.NewDynamicAdvancedSession(path, nil, nil, opts)
	}()
	<-done
	return c, err
}

func appendCUDA(opts *ort.SessionOptions, settings map[string]string) (err error) {
	cuda, err := ort.NewCUDAProviderOptions()
	if err != nil {
		return deviceError(err)
	}
	defer func() { err = errors.Join(err, cuda.Destroy()) }()
	if err := cuda.Update(settings); err != nil {
		return fmt.Errorf("setting CUDA options: %w", err)
	}
	if err := opts.AppendExecutionProviderCUDA(cuda); err != nil {
		return deviceError(err)
	}
	return nil
}

func deviceError(err error) error {
	return corpus.Wrap(corpus.Invalid, "device_unavailable",
		"CUDA was asked for and cannot be used: it takes an NVIDIA GPU with its driver, the CUDA libraries, and ONNXRUNTIME_LIB naming the library of an onnxruntime-gpu build; or choose --device cpu", err)
}

// close waits for runs in flight and frees the graph. It may be called again.
func (s *session) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.s == nil {
		return nil
	}
	c := s.s
	s.s = nil
	var err error
	if s.small != nil {
		err = s.small.free()
	}
	return errors.Join(err, c.Destroy())
}

// input and output are named tensors over Go's memory, row by row.
type input struct {
	name  string
	shape ort.Shape
	data  []int32
}

type output struct {
	name  string
	shape ort.Shape
	data  []float32
}

// run computes the outputs, and only those, into their memory. It returns after C has.
func (s *session) run(inputs []input, outputs []output) (err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.s == nil {
		return errSessionClosed
	}
	b, err := s.bind(inputs, outputs)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.free()) }()
	if err := s.s.RunWithBinding(b.io); err != nil {
		err = runError(err)
		if corpus.CodeOf(err) == CodeOutOfMemory {
			_ = s.settle() // when it fails, too, the caller's next try is no worse off
		}
		return err
	}
	return nil
}

// keepSmall binds a run that needs next to nothing, for [session.settle].
func (s *session) keepSmall(inputs []input, outputs []output) error {
	b, err := s.bind(inputs, outputs)
	s.small = b
	return err
}

// settle makes the memory that a run on this thread held free for others, after it failed. ONNX
// Runtime (1.31) gives it to the thread's stream, and takes it back only when a run on that stream
// ends well; until then no other thread finds any, not even for 256 bytes. The small run's inputs
// are on the device since the graph was loaded, because those of a new one might find no place.
func (s *session) settle() error {
	if s.small == nil {
		return nil
	}
	s.smallMu.Lock()
	defer s.smallMu.Unlock()
	return s.s.RunWithBinding(s.small.io)
}

// bound are the tensors of a run, over Go's memory, which C sees until they are freed.
type bound struct {
	pin     runtime.Pinner
	io      *ort.IoBinding
	tensors []ort.Value
}

func (s *session) bind(inputs []input, outputs []output) (_ *bound, err error) {
	io, err := s.s.CreateIoBinding()
	if err != nil {
		return nil, fmt.Errorf("binding tensors: %w", err)
	}
	b := &bound{io: io}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.free())
		}
	}()
	for _, in := range inputs {
		t, err := newTensor(&b.pin, in.shape, in.data)
		if err != nil {
			return nil, fmt.Errorf("input %s: %w", in.name, err)
		}
		b.tensors = append(b.tensors, t)
		if err := io.BindInput(in.name, t); err != nil { // copies it to the device
			return nil, runError(fmt.Errorf("input %s: %w", in.name, err))
		}
	}
	for _, out := range outputs {
		t, err := newTensor(&b.pin, out.shape, out.data)
		if err != nil {
			return nil, fmt.Errorf("output %s: %w", out.name, err)
		}
		b.tensors = append(b.tensors, t)
		if err := io.BindOutput(out.name, t); err != nil {
			return nil, runError(fmt.Errorf("output %s: %w", out.name, err))
		}
	}
	return b, nil
}

// free lets the tensors go, Go's memory last.
func (b *bound) free() error {
	err := b.io.Destroy()
	for _, t := range b.tensors {
		err = errors.Join(err, t.Destroy())
	}
	b.pin.Unpin()
	return err
}

func newTensor[T int32 | float32](pin *runtime.Pinner, shape ort.Shape, data []T) (*ort.Tensor[T], error) {
	if want := shape.FlattenedSize(); int64(len(data)) != want {
		return nil, fmt.Errorf("shape %s takes %d values, not %d", shape, want, len(data))
	}
	if len(data) > 0 {
		pin.Pin(&data[0])
	}
	return ort.NewTensor(shape, data)
}

// runError recognises a device that has too little memory for the batch. ONNX Runtime has no
// code for it; these are its allocators' texts in 1.27 to 1.31 and CUDA's own.
func runError(err error) error {
	text := strings.ToLower(err.Error())
	for _, sign := range []string{"failed to allocate memory", "out of memory", "bad_alloc", "alloc_failed", "available memory of"} {
		if strings.Contains(text, sign) {
			return corpus.Wrap(corpus.Unavailable, CodeOutOfMemory, "the device has too little memory for this batch", err)
		}
	}
	return corpus.Wrap(corpus.Internal, "embedding_failed", "the model failed on this batch", err)
}

// cudaOptions are the provider's options for one GPU. limit bounds its arena in bytes, 0 is none.
//
// The arena grows by powers of two, by 1 GiB at most. It never joins what it took at different
// times: growing by what is asked for, one region a tensor, it kept taking more as lengths varied.
// On an H200 the device then had 9,575 MiB in use after 16 s and 11,363 after 124; growing by
// powers of two, 9,741 after 16 and 9,745 from 97 to 450 (bench/gpu).
func cudaOptions(device int, limit int64) map[string]string {
	o := map[string]string{
		"device_id":             strconv.Itoa(device),
		"arena_extend_strategy": "kNextPowerOfTwo",
	}
	if limit > 0 {
		o["gpu_mem_limit"] = strconv.FormatInt(limit, 10)
	}
	return o
}
