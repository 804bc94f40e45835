package model

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// graphDigests are the graphs of the committed checkpoint and of the test's BERT, hashed.
// When a change of the code changes one, raise FormatVersion with it, so that models built
// before are built again, and schemeVersion too if vectors move beyond rounding. Then copy
// the digests that the test prints.
var graphDigests = struct {
	format  int
	digests map[string]string
}{3, map[string]string{
	"bert fp32":   "a83c12de7f2a70e5",
	"bert int8":   "4dc254ff1b9bb815",
	"bert fp16":   "fc7eabd55c06f6ac",
	"bge-m3 fp32": "eaf403511a3a9d50",
	"bge-m3 int8": "fb4930776f1c404b",
	"bge-m3 fp16": "7b96fcaa3c71e072",
}}

func TestGraphsChangeWithTheFormat(t *testing.T) {
	t.Parallel()
	bert := writeCheckpoint(t, bertCheckpoint(t))
	for name, want := range graphDigests.digests {
		src := bert
		if strings.HasPrefix(name, "bge-m3") {
			src = tinyM3
		}
		m := mustBuild(t, src, Options{Precision: Precision(strings.Fields(name)[1])})
		h := sha256.New()
		for _, g := range m.Graphs {
			data, err := os.ReadFile(m.Path(g.File))
			if err != nil {
				t.Fatal(err)
			}
			h.Write(data)
		}
		if got := hex.EncodeToString(h.Sum(nil))[:16]; got != want || graphDigests.format != FormatVersion {
			t.Errorf("%q: %q in format %d; recorded is %q in format %d", name, got, FormatVersion, want, graphDigests.format)
		}
	}
}

func mustBuild(t *testing.T, src string, o Options) *Manifest {
	t.Helper()
	m, err := Build(t.Context(), src, filepath.Join(t.TempDir(), "built"), o)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Verify(t.Context()); err != nil {
		t.Fatal(err)
	}
	return m
}

// contents are the digests of a directory's files.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, e := range entries {
		sum, err := fileDigest(t.Context(), filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = sum
	}
	return out
}

func TestBuildIsDeterministicAndComplete(t *testing.T) {
	t.Parallel()
	for _, p := range []Precision{FP32, Int8, FP16} {
		a, b := mustBuild(t, tinyM3, Options{Precision: p}), mustBuild(t, tinyM3, Options{Precision: p})
		ca, cb := contents(t, a.Dir()), contents(t, b.Dir())
		for name := range ca {
			if ca[name] != cb[name] {
				t.Errorf("%s: %s differs between two builds", p, name)
			}
		}
		if len(ca) != len(cb) || len(ca) != len(a.Files)+1 {
			t.Errorf("%s: %d and %d files, the manifest names %d", p, len(ca), len(cb), len(a.Files))
		}
	}
	m := mustBuild(t, tinyM3, Options{})
	spec := m.Spec("cpu")
	want := corpus.ModelSpec{Name: "tiny-m3", Fingerprint: m.Fingerprint, Heads: corpus.Dense | corpus.SparseHead | corpus.ColBERT,
		Dim: 16, ColBERTDim: 16, MaxTokens: 8192, VocabSize: 178, Precision: "fp32", Device: "cpu"}
	if spec != want {
		t.Errorf("spec %+v, want %+v", spec, want)
	}
	if m.Pooling != poolCLS || m.PositionOffset != 2 || m.Special != (SpecialTokens{CLS: 0, SEP: 2, Pad: 1, Unk: 3, Mask: 177}) {
		t.Errorf("manifest %+v", m)
	}
	// The encoder's numbers without the pooler, and the two heads': 178*16 words, 8194*16
	// positions, and so on.
	if want := int64(178*16 + 8194*16 + 16 + 32 + 2*(4*(16*16+16)+32*16+32+16*32+16+4*16) + 16 + 1 + 16*16 + 16); m.Parameters != want {
		t.Errorf("%d parameters, want %d", m.Parameters, want)
	}
	tok, err := os.ReadFile(m.Path(TokenizerFile))
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(tok, &fields); err != nil || fields["truncation"] != nil || fields["padding"] != nil {
		t.Errorf("the tokenizer truncates or pads by itself: %v", err)
	}
}

func TestFingerprint(t *testing.T) {
	t.Parallel()
	build := func(edit func(map[string]string), o Options) string {
		f := bertCheckpoint(t)
		if edit != nil {
			edit(f)
		}
		return mustBuild(t, writeCheckpoint(t, f), o).Fingerprint
	}
	base := build(nil, Options{Name: "one"})
	arrays := bertArrays()
	prefixed := map[string]array{}
	first, second := map[string]array{}, map[string]array{}
	for name, a := range arrays {
		prefixed["bert."+name] = a
		if len(name)%2 == 0 {
			first[name] = a
		} else {
			second[name] = a
		}
	}
	for name, same := range map[string]string{
		"another name": build(nil, Options{Name: "two"}),
		"with a prefix": build(func(f map[string]string) {
			f["model.safetensors"] = string(safetensorsFile(t, prefixed))
		}, Options{}),
		"in two parts": build(func(f map[string]string) {
			delete(f, "model.safetensors")
			f["model-1.safetensors"], f["model-2.safetensors"] = string(safetensorsFile(t, first)), string(safetensorsFile(t, second))
			index := map[string]any{}
			for n := range first {
				index[n] = "model-1.safetensors"
			}
			for n := range second {
				index[n] = "model-2.safetensors"
			}
			f["model.safetensors.index.json"] = marshal(t, map[string]map[string]any{"weight_map": index})
		}, Options{}),
		"another limit": build(func(f map[string]string) { f["sentence_bert_config.json"] = `{"max_seq_length":9}` }, Options{}),
	} {
		if same != base {
			t.Errorf("%s changes the fingerprint", name)
		}
	}
	arrays["encoder.layer.1.output.LayerNorm.bias"].data[3] += 1e-3
	seen := map[string]string{base: "the checkpoint"}
	for name, other := range map[string]string{
		"one weight":    build(func(f map[string]string) { f["model.safetensors"] = string(safetensorsFile(t, arrays)) }, Options{}),
		"the tokenizer": build(func(f map[string]string) { f["tokenizer.json"] += " " }, Options{}),
		"the pooling":   build(func(f map[string]string) { f["1_Pooling/config.json"] = `{"pooling_mode_cls_token":true}` }, Options{}),
		"int8":          build(nil, Options{Precision: Int8}),
		"fp16":          build(nil, Options{Precision: FP16}),
	} {
		if was, ok := seen[other]; ok {
			t.Errorf("%s does not change the fingerprint of %s", name, was)
		}
		seen[other] = name
	}
}

func TestBuildSkipsAndReplaces(t *testing.T) {
	t.Parallel()
	src, dst := writeCheckpoint(t, bertCheckpoint(t)), filepath.Join(t.TempDir(), "deep", "built")
	var stages []string
	o := Options{Name: "m", Progress: func(p Progress) {
		if len(stages) == 0 || stages[len(stages)-1] != p.Stage {
			stages = append(stages, p.Stage)
		}
		if p.Done < 0 || p.Done > p.Total {
			t.Errorf("progress %+v", p)
		}
	}}
	first, err := Build(t.Context(), src, dst, o)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"checking", "writing", "done"}; !slices.Equal(stages, want) {
		t.Errorf("stages %v, want %v", stages, want)
	}
	before := modTime(t, dst)
	stages = nil
	if _, err := Build(t.Context(), src, dst, o); err != nil {
		t.Fatal(err)
	}
	if modTime(t, dst) != before || !slices.Equal(stages, []string{"checking", "done"}) {
		t.Errorf("the same checkpoint was built again: %v", stages)
	}

	for name, edit := range map[string]func(){
		"another checkpoint": func() { write1(t, filepath.Join(src, "sentence_bert_config.json"), `{"max_seq_length":9}`) },
		"another name":       func() { o.Name = "n" },
		"another precision":  func() { o.Precision = Int8 },
		"a damaged model":    func() { write1(t, filepath.Join(dst, first.Graphs[0].File), "x") },
		"a missing file":     func() { os.Remove(filepath.Join(dst, TokenizerFile)) },
		"another format":     func() { write1(t, filepath.Join(dst, ManifestFile), `{"format":0}`) },
		"an interrupted build": func() {
			if err := errors.Join(os.Rename(dst, dst+".old"), os.MkdirAll(dst+".building", 0o755)); err != nil {
				t.Error(err)
			}
			write1(t, filepath.Join(dst+".building", "weights.bin"), "half")
		},
	} {
		edit()
		stages = nil
		m, err := Build(t.Context(), src, dst, o)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !slices.Contains(stages, "writing") || m.Verify(t.Context()) != nil {
			t.Errorf("%s: not built again: %v", name, stages)
		}
	}
	left, err := os.ReadDir(filepath.Dir(dst))
	if err != nil || len(left) != 2 { // the model and its lock
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func modTime(t *testing.T, path string) time.Time {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.ModTime()
}

func write1(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestBuildRefusals(t *testing.T) {
	t.Parallel()
	m3 := func(edit func(dir string)) string {
		dir := t.TempDir()
		if err := os.CopyFS(dir, os.DirFS(tinyM3)); err != nil {
			t.Fatal(err)
		}
		edit(dir)
		return dir
	}
	bert := func(edit func(map[string]array)) string {
		files, arrays := bertFiles(), bertArrays()
		edit(arrays)
		files["model.safetensors"] = string(safetensorsFile(t, arrays))
		return writeCheckpoint(t, files)
	}
	half := func(path string) {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		write1(t, path, string(data[:len(data)/2]))
	}
	for _, c := range []struct {
		name, src, want string
		precision       Precision
	}{
		{name: "a missing head", src: m3(func(d string) { os.Remove(filepath.Join(d, colbertFile)) }), want: "not the other head"},
		{name: "a damaged head", src: m3(func(d string) { half(filepath.Join(d, sparseFile)) }), want: sparseFile},
		{name: "an empty head", src: m3(func(d string) { write1(t, filepath.Join(d, colbertFile), "") }), want: colbertFile},
		{name: "a head of the other kind", src: m3(func(d string) {
			data, _ := os.ReadFile(filepath.Join(d, sparseFile))
			write1(t, filepath.Join(d, colbertFile), string(data))
			data, _ = os.ReadFile(filepath.Join(tinyM3, colbertFile))
			write1(t, filepath.Join(d, sparseFile), string(data))
		}), want: "shape"},
		{name: "damaged weights", src: m3(func(d string) { half(filepath.Join(d, "pytorch_model.bin")) }), want: "pytorch_model.bin"},
		{name: "one bit", src: m3(func(d string) {
			path := filepath.Join(d, "pytorch_model.bin")
			data, _ := os.ReadFile(path)
			data[len(data)/2] ^= 1
			write1(t, path, string(data))
		}), want: "checksum"},
		{name: "no weights", src: m3(func(d string) { os.Remove(filepath.Join(d, "pytorch_model.bin")) }), want: "no weights"},
		{name: "a tensor is missing", src: bert(func(a map[string]array) { delete(a, "encoder.layer.1.output.dense.bias") }), want: "encoder.layer.1.output.dense.bias"},
		{name: "a layer too few", src: bert(func(a map[string]array) {
			for n := range a {
				if strings.HasPrefix(n, "encoder.layer.1.") {
					delete(a, n)
				}
			}
		}), want: "encoder.layer.1."},
		{name: "another shape", src: bert(func(a map[string]array) {
			a["embeddings.LayerNorm.bias"] = array{[]int{2, 4}, make([]float32, 8)}
		}), want: "embeddings.LayerNorm.bias with shape [2 4]"},
		{name: "not a number", src: bert(func(a map[string]array) {
			zero := float32(0)
			a["embeddings.LayerNorm.bias"].data[2] = zero / zero
		}), want: "not finite"},
		{name: "too large for half precision", precision: FP16, src: bert(func(a map[string]array) {
			a["encoder.layer.0.output.dense.weight"].data[5] = 70000
		}), want: "half precision"},
		{name: "a part outside", src: func() string {
			files := bertFiles()
			files["model.safetensors.index.json"] = `{"weight_map":{"a":"../model.safetensors"}}`
			return writeCheckpoint(t, files)
		}(), want: "outside the checkpoint"},
		{name: "a part is missing", src: func() string {
			files := bertFiles()
			files["model.safetensors.index.json"] = `{"weight_map":{"a":"model-1.safetensors"}}`
			return writeCheckpoint(t, files)
		}(), want: "model-1.safetensors"},
		{name: "unknown precision", precision: "fp8", src: tinyM3, want: "fp8"},
	} {
		dst := filepath.Join(t.TempDir(), "built")
		_, err := Build(t.Context(), c.src, dst, Options{Precision: c.precision})
		if corpus.KindOf(err) != corpus.Invalid || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want it to mention %q", c.name, err, c.want)
		}
		for _, path := range []string{dst, dst + ".building"} {
			if _, err := os.Stat(path); err == nil {
				t.Errorf("%s: left %s", c.name, path)
			}
		}
	}
}

func TestBuildStopsWithItsContext(t *testing.T) {
	t.Parallel()
	stop := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	dst := filepath.Join(t.TempDir(), "built")
	_, err := Build(ctx, tinyM3, dst, Options{Progress: func(p Progress) {
		if p.Stage == "writing" {
			cancel(stop)
		}
	}})
	if !errors.Is(err, stop) {
		t.Fatalf("got %v", err)
	}
	if IsBuilt(dst) {
		t.Error("a stopped build left a model")
	}
}

func TestBuildsOfOneModelWait(t *testing.T) {
	t.Parallel()
	dst := filepath.Join(t.TempDir(), "built")
	results := make(chan error, 4)
	for range cap(results) {
		go func() {
			_, err := Build(t.Context(), tinyM3, dst, Options{})
			results <- err
		}()
	}
	for range cap(results) {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	unlock, err := lock(t.Context(), dst+".lock")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 2*lockPoll)
	defer cancel()
	if _, err := Build(ctx, tinyM3, dst, Options{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a build of a locked model gives %v", err)
	}
}

func cut(t *testing.T, name string, size int64) {
	t.Helper()
	if err := os.Truncate(name, size); err != nil {
		t.Fatal(err)
	}
}

func marshal(t *testing.T, v any) string {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestOpenRefusesDamage(t *testing.T) {
	t.Parallel()
	if _, err := Open(t.TempDir()); corpus.KindOf(err) != corpus.NotFound {
		t.Errorf("an empty directory: %v", err)
	}
	for name, c := range map[string]struct {
		harm func(m *Manifest)
		want corpus.Kind
	}{
		"manifest is not JSON": {func(m *Manifest) { write1(t, m.Path(ManifestFile), "{") }, corpus.Invalid},
		"manifest is empty":    {func(m *Manifest) { write1(t, m.Path(ManifestFile), fmt.Sprintf(`{"format":%d}`, FormatVersion)) }, corpus.Invalid},
		"another format":       {func(m *Manifest) { write1(t, m.Path(ManifestFile), `{"format":99}`) }, corpus.Conflict},
		"weights cut":          {func(m *Manifest) { cut(t, m.Path("weights.bin"), 100) }, corpus.Invalid},
		"no graph":             {func(m *Manifest) { os.Remove(m.Path(m.Graphs[0].File)) }, corpus.Invalid},
		"a path outside": {func(m *Manifest) {
			m.Files[0].Name = "../x"
			write1(t, m.Path(ManifestFile), marshal(t, m))
		}, corpus.Invalid},
		"a graph without a file": {func(m *Manifest) {
			m.Graphs[0].File = "other.onnx"
			write1(t, m.Path(ManifestFile), marshal(t, m))
		}, corpus.Invalid},
	} {
		m := mustBuild(t, tinyM3, Options{})
		c.harm(m)
		if _, err := Open(m.Dir()); corpus.KindOf(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
	m := mustBuild(t, tinyM3, Options{})
	data, err := os.ReadFile(m.Path("weights.bin"))
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	write1(t, m.Path("weights.bin"), string(data))
	m, err = Open(m.Dir())
	if err != nil {
		t.Fatal(err)
	}
	wantInvalid(t, m.Verify(t.Context()), "weights.bin")
}

func TestGraphsOfEachPrecision(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		p     Precision
		graph Graph
	}{
		{FP32, Graph{"padded.onnx", DeviceCPU, Padded, []string{InputIDs, InputMask, InputHeads}, []string{OutputDense, OutputDenseNorm, OutputSparse, OutputColBERT}}},
		{Int8, Graph{"padded.onnx", DeviceCPU, Padded, []string{InputIDs, InputMask, InputHeads}, []string{OutputDense, OutputDenseNorm, OutputSparse, OutputColBERT}}},
		{FP16, Graph{"packed.onnx", DeviceCUDA, Packed, []string{InputIDs, InputPositions, InputTokenOffset, InputCumulative, InputHeads}, []string{OutputDense, OutputDenseNorm, OutputSparse, OutputColBERT}}},
		{FP16, Graph{"padded_lengths.onnx", DeviceCUDA, PaddedLengths, []string{InputIDs, InputLengths, InputHeads}, []string{OutputDense, OutputDenseNorm, OutputSparse, OutputColBERT}}},
	} {
		m := mustBuild(t, tinyM3, Options{Precision: c.p})
		g, ok := m.Graph(c.graph.Device, c.graph.Form)
		if !ok || g.File != c.graph.File || !slices.Equal(g.Inputs, c.graph.Inputs) || !slices.Equal(g.Outputs, c.graph.Outputs) {
			t.Errorf("%s: %+v, want %+v", c.p, g, c.graph)
		}
	}
	if _, ok := mustBuild(t, tinyM3, Options{}).Graph(DeviceCUDA, Packed); ok {
		t.Error("fp32 has a graph for CUDA")
	}
}
