package onnx

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"

	ort "github.com/yalue/onnxruntime_go"

	"github.com/lockstep-db/lockstep/embedder/model"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Config says which model to run and where.
type Config struct {
	// Library is the path of the ONNX Runtime shared library. One process can use one.
	Library string
	// ModelDir is a folder that embedder/model built.
	ModelDir string
	// CUDA runs on a GPU, the one numbered DeviceID; without it the model runs on the CPU.
	CUDA     bool
	DeviceID int
	// Threads compute one batch on the CPU; 0 takes one for each core.
	Threads int
	// Nice lowers the priority of the threads that compute, as nice(1) does; see [Engine.Enter].
	// Linux only, elsewhere it does nothing.
	Nice int
	// DeviceMemory bounds the GPU memory of each graph's arena, weights included, in bytes; 0 is
	// no bound. What CUDA and its libraries take comes on top.
	DeviceMemory int64
}

// Engine is one model, loaded: a tokenizer and its graphs. It is safe for concurrent use; runs
// that overlap share the device.
type Engine struct {
	*Tokenizer
	manifest *model.Manifest
	spec     corpus.ModelSpec
	nice     int
	// main runs every batch; long, where the model has it, those of long texts.
	main, long *graph
	// close frees graphs, tokenizer and library once, in this order.
	close func() error
}

// graph is one of the model's graphs, loaded.
type graph struct {
	*session
	form string
	// gated is true for graphs that are told which heads to compute.
	gated bool
}

// close frees the graph if there is one.
func (g *graph) close() error {
	if g == nil {
		return nil
	}
	return g.session.close()
}

// Open loads the model. The caller closes the engine. It blocks for as long as reading the
// weights takes. A device that was asked for and is absent is corpus.Invalid with code
// device_unavailable.
func Open(cfg Config) (*Engine, error) {
	manifest, err := model.Open(cfg.ModelDir)
	if err != nil {
		return nil, err
	}
	class, device := model.DeviceCPU, "cpu"
	sc := sessionConfig{threads: cfg.Threads, nice: cfg.Nice}
	if cfg.CUDA {
		class, device = model.DeviceCUDA, "cuda:"+strconv.Itoa(cfg.DeviceID)
		sc.cuda, sc.cudaOptions = true, cudaOptions(cfg.DeviceID, cfg.DeviceMemory)
	}
	main, long := pickGraphs(manifest, class)
	if main == nil {
		return nil, corpus.Errorf(corpus.Invalid, "model_device", "the model in %s was built in %s, which has no graph for %s: build it again for that device",
			cfg.ModelDir, manifest.Precision, class)
	}

	e := &Engine{manifest: manifest, spec: manifest.Spec(device), nice: cfg.Nice}
	var closers []func() error
	e.close = sync.OnceValue(func() error {
		var err error
		for i := len(closers) - 1; i >= 0; i-- {
			err = errors.Join(err, closers[i]())
		}
		return err
	})
	for _, open := range []func() (func() error, error){
		func() (func() error, error) { return closeLibrary, openLibrary(cfg.Library) },
		func() (func() error, error) {
			t, err := OpenTokenizer(manifest.Path(model.TokenizerFile))
			e.Tokenizer = t
			return t.Close, err
		},
		func() (func() error, error) {
			g, err := e.openGraph(main, sc)
			e.main = g
			return g.close, err
		},
		func() (func() error, error) {
			g, err := e.openGraph(long, sc)
			e.long = g
			return g.close, err
		},
	} {
		closer, err := open()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("opening model %s: %w", cfg.ModelDir, err), e.close())
		}
		closers = append(closers, closer)
	}
	if e.Tokenizer.VocabSize() > manifest.VocabSize {
		return nil, errors.Join(corpus.Errorf(corpus.Invalid, "model_damaged", "the tokenizer in %s knows %d tokens and the model %d: they do not belong together",
			cfg.ModelDir, e.Tokenizer.VocabSize(), manifest.VocabSize), e.close())
	}
	return e, nil
}

// pickGraphs returns the first graph of the device class in a form that runs any batch, and the
// one for long texts beside a packed one; nil where there is none.
func pickGraphs(m *model.Manifest, class string) (main, long *model.Graph) {
	for i, g := range m.Graphs {
		if g.Device == class && (g.Form == model.Padded || g.Form == model.Packed) {
			main = &m.Graphs[i]
			break
		}
	}
	if main == nil || main.Form != model.Packed {
		return main, nil
	}
	if g, ok := m.Graph(class, model.PaddedLengths); ok {
		long = &g
	}
	return main, long
}

// openGraph loads one graph of the model, or nothing if there is none.
func (e *Engine) openGraph(g *model.Graph, sc sessionConfig) (*graph, error) {
	if g == nil {
		return nil, nil
	}
	s, err := openSession(e.manifest.Path(g.File), sc)
	if err != nil {
		return nil, err
	}
	loaded := &graph{session: s, form: g.Form, gated: slices.Contains(g.Inputs, model.InputHeads)}
	if sc.cuda {
		if err := loaded.keepSmall(e.smallest(loaded)); err != nil {
			return nil, errors.Join(err, loaded.close())
		}
	}
	return loaded, nil
}

// smallest are inputs and outputs of a run of one token, which a graph for long texts does not round up.
func (e *Engine) smallest(g *graph) ([]input, []output) {
	b := batch{rows: [][]uint32{{uint32(e.manifest.Special.CLS)}}, heads: corpus.Dense, longest: 1, tokens: 1}
	if g.form == model.PaddedLengths {
		ids, out := e.padded(b, 1)
		return g.gate([]input{ids, intInput(model.InputLengths, []int32{1}, 1)}, b), out.bound()
	}
	inputs, out := e.tensors(b, g.form)
	return g.gate(inputs, b), out.bound()
}

// gate adds which heads to compute, for a graph that asks.
func (g *graph) gate(inputs []input, b batch) []input {
	if g.gated {
		inputs = append(inputs, input{name: model.InputHeads, shape: ort.NewShape(1), data: []int32{int32(b.heads)}})
	}
	return inputs
}

// Close waits for calls in flight and frees everything. It may be called again.
func (e *Engine) Close() error { return e.close() }

// Enter gives the calling thread the priority of those that compute. The caller has locked its
// goroutine to the thread and leaves it locked, for the priority cannot be raised again.
func (e *Engine) Enter() error { return lowerPriority(e.nice) }

// Spec says what the model is and where it runs.
func (e *Engine) Spec() corpus.ModelSpec { return e.spec }

// Padded reports whether a batch costs its longest row times its rows, rather than its tokens.
func (e *Engine) Padded() bool { return e.main.form != model.Packed }

// Run embeds rows of token ids, special tokens included, and returns the heads asked for, one
// result a row. The results are the caller's; those of one call share memory. It blocks until
// the device is done. A row that the model cannot take is corpus.Invalid; a batch that does not
// fit the device's memory has the code [CodeOutOfMemory].
func (e *Engine) Run(rows [][]uint32, heads corpus.Heads) ([]corpus.Vectors, error) {
	if len(rows) == 0 {
		return nil, nil
	}
	if heads == 0 || !e.spec.Heads.Has(heads) {
		return nil, corpus.Errorf(corpus.Invalid, "output_unsupported", "the model %s has the outputs %s, not %s", e.spec.Name, e.spec.Heads, heads)
	}
	for i, row := range rows {
		if err := e.checkRow(i, row); err != nil {
			return nil, err
		}
	}
	results := make([]corpus.Vectors, 0, len(rows))
	for b := range e.batches(rows, heads) {
		part, err := e.runBatch(b)
		if err != nil {
			return nil, err
		}
		results = append(results, part...)
	}
	return results, nil
}

func (e *Engine) runBatch(b batch) ([]corpus.Vectors, error) {
	g := e.main
	if e.long != nil && b.isLong() {
		g = e.long
	}
	inputs, out := e.tensors(b, g.form)
	if err := g.run(g.gate(inputs, b), out.bound()); err != nil {
		return nil, err
	}
	return e.results(b, out), nil
}

// checkRow refuses what would fail, or read beside the weights, inside the graph.
func (e *Engine) checkRow(i int, row []uint32) error {
	if len(row) == 0 || len(row) > e.spec.MaxTokens {
		return corpus.Errorf(corpus.Invalid, "input_length", "row %d has %d tokens; the model takes 1 to %d", i, len(row), e.spec.MaxTokens)
	}
	for at, id := range row {
		if int64(id) >= int64(e.spec.VocabSize) {
			return corpus.Errorf(corpus.Invalid, "token_out_of_range", "token %d of row %d is %d; the model's ids are 0 to %d", at, i, id, e.spec.VocabSize-1)
		}
	}
	return nil
}
