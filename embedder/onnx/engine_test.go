package onnx

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/lockstep-db/lockstep/embedder"
	"github.com/lockstep-db/lockstep/embedder/model"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

// What the batcher asks of an engine.
var (
	_ embedder.Runner    = (*Engine)(nil)
	_ embedder.Tokenizer = (*Engine)(nil)
)

func openEngine(tb testing.TB, dir string) *Engine {
	tb.Helper()
	e, err := Open(Config{Library: need(tb, "ONNXRUNTIME_LIB"), ModelDir: dir, Threads: 1})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := e.Close(); err != nil {
			tb.Error(err)
		}
	})
	return e
}

const allHeads = corpus.Dense | corpus.SparseHead | corpus.ColBERT

// handRows are ragged: one token, special tokens inside, repeated ids, ids below and above 100.
var handRows = [][]uint32{
	{0, 5, 110, 120, 110, 2},
	{300},
	{0, 2},
	{0, 90, 101, 3, 300, 1, 300, 302, 2},
}

func TestEngineFeedsAndReadsEveryForm(t *testing.T) {
	t.Parallel()
	sparse := []*corpus.Sparse{
		{Indices: []uint32{110, 120}, Values: []float32{5, 10}},
		{Indices: []uint32{300}, Values: []float32{100}},
		{Indices: []uint32{}, Values: []float32{}},
		{Indices: []uint32{101, 300, 302}, Values: []float32{0.5, 100, 101}},
	}
	for _, c := range []struct {
		form    string
		graph   []byte
		dense   [][]float32
		colbert [][]float32 // the first number of each row's vectors
	}{
		{model.Padded, paddedGraph(), [][]float32{{347, 3470}, {300, 3000}, {2, 20}, {1099, 10990}},
			[][]float32{{5, 110, 120, 110, 2}, {}, {2}, {90, 101, 3, 300, 1, 300, 302, 2}}},
		// Positions start at 2; the padding token inside the last row has position 1 and does not count.
		{model.Packed, packedGraph(), [][]float32{{0, 0}, {300, 3000}, {0, 0}, {0, 0}},
			[][]float32{{3, 4, 5, 6, 7}, {}, {3}, {3, 4, 5, 6, 1, 7, 8, 9}}},
	} {
		t.Run(c.form, func(t *testing.T) {
			t.Parallel()
			e := openEngine(t, handModel(t, c.form, c.graph, nil))
			if e.Padded() != (c.form == model.Padded) {
				t.Errorf("padded %v", e.Padded())
			}
			for _, heads := range []corpus.Heads{
				corpus.Dense, corpus.SparseHead, corpus.ColBERT, corpus.Dense | corpus.ColBERT, corpus.SparseHead | corpus.ColBERT, allHeads,
			} {
				// Batches of every prefix change both dimensions.
				for n := 1; n <= len(handRows); n++ {
					got, err := e.Run(handRows[:n], heads)
					if err != nil {
						t.Fatalf("%s, %d rows: %v", heads, n, err)
					}
					for i := range got {
						if got[i].Heads() != heads {
							t.Fatalf("row %d has the heads %s, expected %s", i, got[i].Heads(), heads)
						}
						if heads.Has(corpus.Dense) && !slices.Equal(got[i].Dense, c.dense[i]) {
							t.Errorf("%d rows, row %d: dense %v, expected %v", n, i, got[i].Dense, c.dense[i])
						}
						if want := c.dense[i][0]; heads.Has(corpus.Dense) && got[i].DenseNorm != want {
							t.Errorf("%d rows, row %d: length %v, expected %v", n, i, got[i].DenseNorm, want)
						}
						if heads.Has(corpus.SparseHead) && !reflect.DeepEqual(got[i].Sparse, sparse[i]) {
							t.Errorf("%d rows, row %d: sparse %v, expected %v", n, i, got[i].Sparse, sparse[i])
						}
						if !heads.Has(corpus.ColBERT) {
							continue
						}
						if len(got[i].ColBERT) != len(c.colbert[i]) {
							t.Fatalf("%d rows, row %d: %d token vectors, expected %d", n, i, len(got[i].ColBERT), len(c.colbert[i]))
						}
						for j, v := range got[i].ColBERT {
							if want := c.colbert[i][j]; v[0] != want || v[1] != -want {
								t.Errorf("%d rows, row %d: token vector %d is %v, expected %v and its negative", n, i, j, v, want)
							}
						}
					}
				}
			}
		})
	}
}

// What settles a device that ran out of memory is a run like any other, whatever ran before.
func TestSmallRunIsReady(t *testing.T) {
	t.Parallel()
	for form, graph := range map[string][]byte{model.Padded: paddedGraph(), model.Packed: packedGraph()} {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			e := openEngine(t, handModel(t, form, graph, nil))
			if err := e.main.settle(); err != nil {
				t.Errorf("with nothing ready: %v", err)
			}
			inputs, outputs := e.smallest(e.main)
			if err := e.main.keepSmall(inputs, outputs); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if _, err := e.Run(handRows, allHeads); err != nil {
					t.Fatal(err)
				}
				for i := range outputs[0].data {
					outputs[0].data[i] = -7
				}
				if err := e.main.settle(); err != nil {
					t.Fatal(err)
				}
				want, err := e.Run([][]uint32{{uint32(e.manifest.Special.CLS)}}, corpus.Dense)
				if err != nil {
					t.Fatal(err)
				}
				if !slices.Equal(outputs[0].data, want[0].Dense) {
					t.Errorf("%s is %v, expected %v", outputs[0].name, outputs[0].data, want[0].Dense)
				}
			}
		})
	}
}

func TestPackedPlaces(t *testing.T) {
	t.Parallel()
	e := openEngine(t, handModel(t, model.Packed, packedGraph(), nil))
	rows := [][]uint32{{0, 7, 2}, {9}, {0, 2}}
	inputs, _ := e.tensors(batch{rows: rows, heads: corpus.Dense, longest: 3, tokens: 6}, model.Packed)
	want := map[string][]int32{
		model.InputIDs:         {0, 7, 2, 9, 0, 2},
		model.InputPositions:   {2, 3, 4, 2, 2, 3},
		model.InputTokenOffset: {0, 1, 2, 3, 6, 7, 4, 5, 8},
		model.InputCumulative:  {0, 3, 4, 6},
	}
	for _, in := range inputs {
		if !slices.Equal(in.data, want[in.name]) {
			t.Errorf("%s %v, expected %v", in.name, in.data, want[in.name])
		}
	}
}

func TestLargeBatchesAreCut(t *testing.T) {
	t.Parallel()
	lengths := func(form string, rows ...int) [][]int {
		e := &Engine{main: &graph{form: form}, manifest: &model.Manifest{AttentionHeads: 16}}
		in := make([][]uint32, len(rows))
		for i, n := range rows {
			in[i] = make([]uint32, n)
		}
		var cut [][]int
		for b := range e.batches(in, corpus.Dense) {
			var part []int
			longest, tokens := 0, 0
			for _, row := range b.rows {
				part, longest, tokens = append(part, len(row)), max(longest, len(row)), tokens+len(row)
			}
			if b.longest != longest || b.tokens != tokens || b.heads != corpus.Dense {
				t.Errorf("batch of %v says longest %d, tokens %d", part, b.longest, b.tokens)
			}
			cut = append(cut, part)
		}
		return cut
	}
	for _, c := range []struct {
		form string
		rows []int
		want [][]int
	}{
		{model.Padded, []int{1}, [][]int{{1}}},
		{model.Padded, []int{8192, 8192}, [][]int{{8192}, {8192}}},
		{model.Padded, []int{4096, 3, 4096, 5, 5}, [][]int{{4096}, {3}, {4096}, {5, 5}}},
		{model.Padded, slices.Repeat([]int{2048}, 9), [][]int{{2048, 2048, 2048, 2048}, {2048, 2048, 2048, 2048}, {2048}}},
		{model.Packed, []int{8192, 8192, 3}, [][]int{{8192, 8192, 3}}},
	} {
		if got := lengths(c.form, c.rows...); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s %v cut into %v, expected %v", c.form, c.rows, got, c.want)
		}
	}
}

func TestPaddingIsThePaddingToken(t *testing.T) {
	t.Parallel()
	e := openEngine(t, handModel(t, model.Padded, paddedGraph(), nil))
	inputs, _ := e.tensors(batch{rows: [][]uint32{{9}, {0, 7, 2}}, heads: corpus.Dense, longest: 3, tokens: 4}, model.Padded)
	if want := []int32{9, 1, 1, 0, 7, 2}; !slices.Equal(inputs[0].data, want) {
		t.Errorf("ids %v, expected %v", inputs[0].data, want)
	}
	if want := []int32{1, 0, 0, 1, 1, 1}; !slices.Equal(inputs[1].data, want) {
		t.Errorf("mask %v, expected %v", inputs[1].data, want)
	}
}

// TestLongTextsTakeTheirGraph runs a model with a packed graph and one for long texts, which
// give different numbers here, so that results tell which one ran.
func TestLongTextsTakeTheirGraph(t *testing.T) {
	t.Parallel()
	dir := handModel(t, model.Packed, packedGraph(), func(m *model.Manifest) {
		m.MaxTokens = 8192
		m.Graphs = append(m.Graphs, model.Graph{File: "long.onnx", Device: model.DeviceCPU, Form: model.PaddedLengths})
	}, handFile{"long.onnx", lengthsGraph()})
	e := openEngine(t, dir)
	if e.Padded() {
		t.Error("a packed model says that it pads")
	}
	row := func(n int) []uint32 { return slices.Repeat([]uint32{7}, n) }
	for _, c := range []struct {
		name  string
		rows  [][]uint32
		dense []float32 // the first number: 7 from the packed graph, the text's length from the other
	}{
		{"short", [][]uint32{row(3), row(100)}, []float32{7, 7}},
		{"long", [][]uint32{row(8192), row(8000), row(7700)}, []float32{8192, 8000, 7700}},
		{"long, rounded up to the maximum", [][]uint32{row(8190)}, []float32{8190}},
		{"one is short", [][]uint32{row(8192), row(4095)}, []float32{7, 7}},
		{"too ragged", [][]uint32{row(8192), row(4096)}, []float32{7, 7}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := e.Run(c.rows, allHeads)
			if err != nil {
				t.Fatal(err)
			}
			for i, v := range got {
				if v.Dense[0] != c.dense[i] {
					t.Errorf("row %d: dense %v, expected %v first", i, v.Dense, c.dense[i])
				}
				if len(v.ColBERT) != len(c.rows[i])-1 {
					t.Errorf("row %d: %d token vectors for %d tokens", i, len(v.ColBERT), len(c.rows[i]))
				}
			}
		})
	}
}

func TestAggregateKeepsWhatIsNotFinite(t *testing.T) {
	t.Parallel()
	e := openEngine(t, handModel(t, model.Padded, paddedGraph(), nil))
	nan := float32(math.NaN())
	v := corpus.Vectors{Sparse: e.aggregate([]uint32{0, 10, 11, 10, 12, 2}, []float32{9, 1, float32(math.Inf(1)), nan, -1, 9})}
	if v.Finite() {
		t.Errorf("weights that are not finite became %v", v.Sparse)
	}
}

func TestRunRefusesBadRows(t *testing.T) {
	t.Parallel()
	e := openEngine(t, handModel(t, model.Padded, paddedGraph(), nil))
	long := make([]uint32, 33)
	for _, c := range []struct {
		name  string
		rows  [][]uint32
		heads corpus.Heads
		code  string
	}{
		{"no heads", handRows, 0, "output_unsupported"},
		{"empty row", [][]uint32{{1}, {}}, corpus.Dense, "input_length"},
		{"row too long", [][]uint32{long}, corpus.Dense, "input_length"},
		{"id outside", [][]uint32{{0, handVocab, 2}}, corpus.Dense, "token_out_of_range"},
		{"id far outside", [][]uint32{{math.MaxUint32}}, corpus.Dense, "token_out_of_range"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, err := e.Run(c.rows, c.heads)
			if corpus.KindOf(err) != corpus.Invalid || corpus.CodeOf(err) != c.code {
				t.Fatalf("error %v, expected invalid, %s", err, c.code)
			}
		})
	}
	if got, err := e.Run(nil, corpus.Dense); got != nil || err != nil {
		t.Errorf("no rows gave %v, %v", got, err)
	}
	dense := openEngine(t, handModel(t, model.Padded, paddedGraph(), func(m *model.Manifest) { m.Heads = []string{"dense"} }))
	if _, err := dense.Run(handRows, allHeads); corpus.CodeOf(err) != "output_unsupported" {
		t.Errorf("a missing head: error %v", err)
	}
}

func TestRunAndCloseTogether(t *testing.T) {
	t.Parallel()
	e, err := Open(Config{Library: need(t, "ONNXRUNTIME_LIB"), ModelDir: handModel(t, model.Padded, paddedGraph(), nil), Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	started := make(chan struct{}, 4)
	for range 4 {
		group.Go(func() {
			for first := true; ; first = false {
				out, err := e.Run(handRows, allHeads)
				if first {
					started <- struct{}{}
				}
				if err != nil {
					if corpus.KindOf(err) != corpus.Unavailable {
						t.Errorf("error %v after closing", err)
					}
					return
				}
				if out[0].Dense[1] != 3470 {
					t.Errorf("dense %v", out[0].Dense)
					return
				}
			}
		})
	}
	for range 4 {
		<-started
	}
	for range 3 {
		group.Go(func() {
			if err := e.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if _, err := e.Encode("text"); corpus.KindOf(err) != corpus.Unavailable {
		t.Errorf("a closed engine's tokenizer: %v", err)
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	lib := need(t, "ONNXRUNTIME_LIB")
	good := handModel(t, model.Padded, paddedGraph(), nil)
	// Held open, so that the library stays loaded and another path is a conflict.
	openEngine(t, good)
	other := filepath.Join(t.TempDir(), filepath.Base(lib))
	if err := os.Symlink(lib, other); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		cfg    Config
		code   string
		detail string
	}{
		{"no model", Config{Library: lib, ModelDir: t.TempDir()}, "model_not_built", "model build"},
		{"another library", Config{Library: other, ModelDir: good}, "runtime_conflict", lib},
		{"no cuda graph", Config{Library: lib, ModelDir: good, CUDA: true}, "model_device", "cuda"},
		{"no cuda", Config{Library: lib, CUDA: true, ModelDir: handModel(t, model.Packed, packedGraph(), func(m *model.Manifest) {
			m.Graphs[0].Device = model.DeviceCUDA
		})}, "device_unavailable", "--device cpu"},
		{"damaged graph", Config{Library: lib, ModelDir: handModel(t, model.Padded, []byte("no graph at all"), nil)}, "model_unusable", "build the model again"},
		{"foreign tokenizer", Config{Library: lib, ModelDir: handModel(t, model.Padded, paddedGraph(), func(m *model.Manifest) { m.VocabSize = 10 })}, "model_damaged", "belong together"},
		{"unknown form", Config{Library: lib, ModelDir: handModel(t, "sideways", paddedGraph(), nil)}, "model_device", "cpu"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, err := Open(c.cfg)
			if err == nil {
				err = errors.Join(errors.New("it opened"), e.Close())
			}
			if corpus.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.detail) {
				t.Fatalf("error %v, expected %s, naming %q", err, c.code, c.detail)
			}
		})
	}
}

func TestRunError(t *testing.T) {
	t.Parallel()
	for text, code := range map[string]string{
		"Non-zero status code returned while running MatMul node. Failed to allocate memory for requested buffer of size 8589934592": CodeOutOfMemory,
		"CUDA failure 2: out of memory ; GPU=0":                              CodeOutOfMemory,
		"bfc_arena.cc:358 Available memory of 123 is smaller than requested": CodeOutOfMemory,
		"std::bad_alloc":                         CodeOutOfMemory,
		"Invalid rank for input: attention_mask": "embedding_failed",
	} {
		if got := corpus.CodeOf(runError(errors.New(text))); got != code {
			t.Errorf("%q is %s, expected %s", text, got, code)
		}
	}
	if CodeOutOfMemory != embedder.CodeOutOfMemory {
		t.Errorf("the batcher waits for %s, runs report %s", embedder.CodeOutOfMemory, CodeOutOfMemory)
	}
}

func TestAFailedRunHarmsNothing(t *testing.T) {
	t.Parallel()
	e := openEngine(t, handModel(t, model.Padded, paddedGraph(), nil))
	bad := []input{intInput("input_ids", []int32{1, 2}, 1, 2), intInput("attention_mask", []int32{1, 1, 1}, 1, 3)}
	if err := e.main.run(bad, []output{newOutput("dense", 1, 2)}); corpus.CodeOf(err) != "embedding_failed" {
		t.Errorf("shapes that do not fit: %v", err)
	}
	good := []input{intInput("input_ids", []int32{1, 2}, 1, 2), intInput("attention_mask", []int32{1, 1}, 1, 2)}
	for name, out := range map[string]output{"unknown name": newOutput("nonsense", 1, 2), "wrong shape": newOutput("dense", 2, 2)} {
		if err := e.main.run(good, []output{out}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := e.main.run([]input{{name: "input_ids", shape: []int64{1, 2}, data: []int32{1}}}, nil); err == nil {
		t.Error("a tensor shorter than its shape: no error")
	}
	if _, err := e.Run(handRows, allHeads); err != nil {
		t.Errorf("a run after failures: %v", err)
	}
}

func TestRuntimeVersion(t *testing.T) {
	t.Parallel()
	lib := need(t, "ONNXRUNTIME_LIB")
	v, err := RuntimeVersion(lib)
	if err != nil {
		t.Fatal(err)
	}
	if major, _, _ := strings.Cut(v, "."); major != "1" {
		t.Errorf("version %q", v)
	}
	if _, err := RuntimeVersion(filepath.Join(t.TempDir(), "absent.so")); err == nil {
		t.Error("an absent library loads")
	}
}
