package model

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// tinyM3 is the committed checkpoint in BGE-M3's layout.
const tinyM3 = "testdata/tiny-m3"

// array is a tensor for a test's checkpoint.
type array struct {
	shape []int
	data  []float32
}

// safetensorsFile encodes tensors as float32, in the order of their names.
func safetensorsFile(t *testing.T, arrays map[string]array) []byte {
	t.Helper()
	names := make([]string, 0, len(arrays))
	for n := range arrays {
		names = append(names, n)
	}
	slices.Sort(names)
	header := map[string]any{"__metadata__": map[string]string{"format": "pt"}}
	var body []byte
	for _, n := range names {
		start := len(body)
		body = appendFloat32s(body, arrays[n].data)
		header[n] = map[string]any{"dtype": "F32", "shape": arrays[n].shape, "data_offsets": []int{start, len(body)}}
	}
	h, err := json.Marshal(header)
	if err != nil {
		t.Fatal(err)
	}
	return slices.Concat(binary.LittleEndian.AppendUint64(nil, uint64(len(h))), h, body)
}

// bertArrays are random weights of a BERT with 2 layers, hidden size 8, 20 words, 16 positions.
func bertArrays() map[string]array {
	rng := rand.New(rand.NewPCG(1, 2))
	out := map[string]array{}
	add := func(name string, shape ...int) {
		n, _ := elementCount(shape)
		data := make([]float32, n)
		for i := range data {
			data[i] = float32(rng.NormFloat64())
		}
		out[name] = array{shape, data}
	}
	pair := func(name string, rows, cols int) {
		add(name+".weight", rows, cols)
		add(name+".bias", rows)
	}
	norm := func(name string) {
		add(name+".weight", 8)
		add(name+".bias", 8)
	}
	add("embeddings.word_embeddings.weight", 20, 8)
	add("embeddings.position_embeddings.weight", 16, 8)
	add("embeddings.token_type_embeddings.weight", 2, 8)
	norm("embeddings.LayerNorm")
	for i := range 2 {
		p := fmt.Sprintf("encoder.layer.%d.", i)
		for _, part := range []string{"query", "key", "value"} {
			pair(p+"attention.self."+part, 8, 8)
		}
		pair(p+"attention.output.dense", 8, 8)
		norm(p + "attention.output.LayerNorm")
		pair(p+"intermediate.dense", 12, 8)
		pair(p+"output.dense", 8, 12)
		norm(p + "output.LayerNorm")
	}
	return out
}

// bertFiles are the small files of that checkpoint.
func bertFiles() map[string]string {
	return map[string]string{
		"config.json": `{"architectures":["BertModel"],"model_type":"bert","hidden_size":8,"num_hidden_layers":2,
			"num_attention_heads":2,"intermediate_size":12,"hidden_act":"gelu","layer_norm_eps":1e-12,
			"max_position_embeddings":16,"type_vocab_size":2,"vocab_size":20,"pad_token_id":0}`,
		"modules.json": `[{"path":"","type":"sentence_transformers.models.Transformer"},
			{"path":"1_Pooling","type":"sentence_transformers.models.Pooling"},
			{"path":"2_Normalize","type":"sentence_transformers.models.Normalize"}]`,
		"1_Pooling/config.json":     `{"word_embedding_dimension":8,"pooling_mode_cls_token":false,"pooling_mode_mean_tokens":true}`,
		"sentence_bert_config.json": `{"max_seq_length":12}`,
		"tokenizer.json": `{"version":"1.0","truncation":{"max_length":4},"padding":{"strategy":{"Fixed":4}},
			"added_tokens":[{"id":0,"content":"[PAD]"},{"id":1,"content":"[UNK]"},{"id":2,"content":"[CLS]"},
			{"id":3,"content":"[SEP]"},{"id":4,"content":"[MASK]"}],"model":{"type":"WordPiece","vocab":{}}}`,
	}
}

// writeCheckpoint lays a checkpoint out in a new directory.
func writeCheckpoint(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// bertCheckpoint is the whole checkpoint as files.
func bertCheckpoint(t *testing.T) map[string]string {
	t.Helper()
	files := bertFiles()
	files["model.safetensors"] = string(safetensorsFile(t, bertArrays()))
	return files
}

// wantInvalid checks that err is a corpus.Invalid one that mentions what is wrong.
func wantInvalid(t *testing.T, err error, mention string) {
	t.Helper()
	if corpus.KindOf(err) != corpus.Invalid {
		t.Fatalf("error %v has kind %q, want invalid", err, corpus.KindOf(err))
	}
	if !bytes.Contains([]byte(err.Error()), []byte(mention)) {
		t.Fatalf("error %q does not mention %q", err, mention)
	}
}

func TestHalfPrecision(t *testing.T) {
	t.Parallel()
	for h := range 1 << 16 {
		f := halfToFloat(uint16(h))
		if math.IsNaN(float64(f)) || math.IsInf(float64(f), 0) {
			continue
		}
		if got := floatToHalf(f); got != uint16(h) {
			t.Fatalf("half %#04x is %g and comes back as %#04x", h, f, got)
		}
	}
	// Between two neighbours the nearest wins, and an even one on a tie.
	for h := uint16(0); h < 0x7bff; h++ {
		lo, hi := float64(halfToFloat(h)), float64(halfToFloat(h+1))
		mid := (lo + hi) / 2
		even := h + h&1
		for _, c := range []struct {
			v    float64
			want uint16
		}{{mid, even}, {lo + (mid-lo)*0.999, h}, {mid + (hi-mid)*0.001, h + 1}} {
			if got := floatToHalf(float32(c.v)); got != c.want && float64(float32(c.v)) == c.v {
				t.Fatalf("%g between %#04x and %#04x becomes %#04x, want %#04x", c.v, h, h+1, got, c.want)
			}
		}
	}
}

func TestDecodeFloats(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		d    dtype
		in   []byte
		want float32
	}{
		{f64, binary.LittleEndian.AppendUint64(nil, math.Float64bits(-1.5)), -1.5},
		{f32, binary.LittleEndian.AppendUint32(nil, math.Float32bits(0.1)), 0.1},
		{f16, []byte{0x00, 0xc0}, -2},
		{f16, []byte{0x01, 0x80}, -float32(1.0 / (1 << 24))},
		{bf16, []byte{0xc0, 0x3f}, 1.5},
	} {
		got := make([]float32, 1)
		decodeFloats(got, c.in, c.d)
		if got[0] != c.want {
			t.Errorf("%s of % x is %g, want %g", c.d, c.in, got[0], c.want)
		}
	}
}

func TestTranspose(t *testing.T) {
	t.Parallel()
	const rows, cols = 37, 65
	v := make([]float32, rows*cols)
	for i := range v {
		v[i] = float32(i)
	}
	out := transpose(v, rows, cols)
	for r := range rows {
		for c := range cols {
			if out[c*rows+r] != v[r*cols+c] {
				t.Fatalf("element %d,%d is lost", r, c)
			}
		}
	}
}

func TestQuantise(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(3, 4))
	const rows, cols = 5, 2*blockSize + 7
	v := make([]float32, rows*cols)
	for i := range v {
		v[i] = float32(rng.NormFloat64())
	}
	clear(v[cols : cols+blockSize]) // a block of zeros
	q, scales := quantise(v, rows, cols)
	if len(q) != rows*3*blockSize || len(scales) != rows*3 {
		t.Fatalf("got %d numbers and %d scales", len(q), len(scales))
	}
	for r := range rows {
		for c := range 3 * blockSize {
			scale := scales[r*3+c/blockSize]
			back := (float32(q[r*3*blockSize+c]) - 128) * scale
			want := float32(0)
			if c < cols {
				want = v[r*cols+c]
			}
			if diff := math.Abs(float64(back - want)); diff > float64(scale)/2*1.0001 {
				t.Fatalf("%g at %d,%d comes back as %g, further than half a step of %g", want, r, c, back, scale)
			}
		}
	}
}

func TestWithoutFields(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ in, want string }{
		{`{"a":1,"truncation":{"x":[1,{"padding":2}]},"b":{"padding":3}}`, `{"a":1,"truncation":null,"b":{"padding":3}}`},
		{"{\n \"padding\" : [1] ,\"truncation\":null}", "{\n \"padding\" : null ,\"truncation\":null}"},
		{`{"z":"}\"","padding":"\u0000"}`, `{"z":"}\"","padding":null}`},
		{`{}`, `{}`},
	} {
		got, err := withoutFields([]byte(c.in), "truncation", "padding")
		if err != nil || string(got) != c.want {
			t.Errorf("%s becomes %s (%v), want %s", c.in, got, err, c.want)
		}
	}
	for _, bad := range []string{``, `[]`, `{"a":1`, `{"a":}`, `{"padding":{}`} {
		if got, err := withoutFields([]byte(bad), "padding"); err == nil {
			t.Errorf("%q becomes %s", bad, got)
		}
	}
}

func TestPositions(t *testing.T) {
	t.Parallel()
	ids := []int32{0, 7, 1, 8, 1, 1, 2}
	m3 := &Manifest{Architecture: archXLMR, PositionOffset: 2, Special: SpecialTokens{Pad: 1}}
	if got, want := m3.Positions([]int32{9}, ids), []int32{9, 2, 3, 1, 4, 1, 1, 5}; !slices.Equal(got, want) {
		t.Errorf("XLM-RoBERTa: %v, want %v", got, want)
	}
	bert := &Manifest{Architecture: archBERT, Special: SpecialTokens{Pad: 1}}
	if got, want := bert.Positions(nil, ids), []int32{0, 1, 2, 3, 4, 5, 6}; !slices.Equal(got, want) {
		t.Errorf("BERT: %v, want %v", got, want)
	}
}

func TestDescribe(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		edit func(files map[string]string)
		want func(d *description) bool
		err  string
	}{
		{name: "as it is", want: func(d *description) bool {
			return d.arch == archBERT && d.pooling == poolMean && d.maxTokens == 12 && d.maxTokensFrom == "sentence_bert_config.json" &&
				d.special == SpecialTokens{CLS: 2, SEP: 3, Pad: 0, Unk: 1, Mask: 4} && !d.m3
		}},
		{name: "the tokenizer's limit", edit: func(f map[string]string) {
			delete(f, "sentence_bert_config.json")
			f["tokenizer_config.json"] = `{"model_max_length":10}`
		}, want: func(d *description) bool { return d.maxTokens == 10 && d.maxTokensFrom == "tokenizer_config.json" }},
		{name: "no limit but the positions", edit: func(f map[string]string) {
			delete(f, "sentence_bert_config.json")
			f["tokenizer_config.json"] = `{"model_max_length":1000000000000000019884624838656}`
		}, want: func(d *description) bool { return d.maxTokens == 16 && d.maxTokensFrom == "config.json" }},
		{name: "a limit beyond the positions", edit: func(f map[string]string) {
			f["sentence_bert_config.json"] = `{"max_seq_length":512}`
		}, want: func(d *description) bool { return d.maxTokens == 16 }},
		{name: "special tokens by other names", edit: func(f map[string]string) {
			f["special_tokens_map.json"] = `{"unk_token":{"content":"[MASK]"},"mask_token":"none"}`
		}, want: func(d *description) bool { return d.special.Unk == 4 && d.special.Mask == -1 }},
		{name: "pooling by one field", edit: func(f map[string]string) {
			f["1_Pooling/config.json"] = `{"pooling_mode":"max"}`
		}, want: func(d *description) bool { return d.pooling == poolMax }},
		{name: "no checkpoint", edit: func(f map[string]string) { delete(f, "config.json") }, err: "no config.json"},
		{name: "config is not JSON", edit: func(f map[string]string) { f["config.json"] = "{" }, err: "config.json is not the JSON"},
		{name: "another architecture", edit: replace("config.json", `"BertModel"`, `"LlamaModel"`), err: "LlamaModel"},
		{name: "a task head", edit: replace("config.json", `"BertModel"`, `"BertForMaskedLM"`), err: "BertForMaskedLM"},
		{name: "another activation", edit: replace("config.json", `"gelu"`, `"gelu_new"`), err: "gelu_new"},
		{name: "relative positions", edit: replace("config.json", `"vocab_size":20`, `"vocab_size":20,"position_embedding_type":"relative_key"`), err: "relative_key"},
		{name: "a decoder", edit: replace("config.json", `"vocab_size":20`, `"vocab_size":20,"is_decoder":true`), err: "decoder"},
		{name: "heads that do not divide", edit: replace("config.json", `"num_attention_heads":2`, `"num_attention_heads":3`), err: "divide"},
		{name: "no layers", edit: replace("config.json", `"num_hidden_layers":2`, `"num_hidden_layers":0`), err: "num_hidden_layers"},
		{name: "absurd size", edit: replace("config.json", `"vocab_size":20`, `"vocab_size":2000000000`), err: "vocab_size"},
		{name: "no pooling declared", edit: func(f map[string]string) { delete(f, "modules.json") }, err: "does not say how to pool"},
		{name: "pooling file missing", edit: func(f map[string]string) { delete(f, "1_Pooling/config.json") }, err: "1_Pooling/config.json is missing"},
		{name: "two poolings", edit: replace("1_Pooling/config.json", `"pooling_mode_cls_token":false`, `"pooling_mode_cls_token":true`), err: "2 poolings (cls, mean)"},
		{name: "unknown pooling", edit: func(f map[string]string) { f["1_Pooling/config.json"] = `{"pooling_mode_lasttoken":true}` }, err: "pooling_mode_lasttoken"},
		{name: "a dense module", edit: replace("modules.json", "models.Normalize", "models.Dense"), err: "models.Dense"},
		{name: "a path outside", edit: replace("modules.json", `"1_Pooling"`, `"../1_Pooling"`), err: "outside the checkpoint"},
		{name: "no tokenizer", edit: func(f map[string]string) { delete(f, "tokenizer.json") }, err: "no tokenizer.json"},
		{name: "tokenizer without a special token", edit: replace("tokenizer.json", "[SEP]", "[OTHER]"), err: "sep_token"},
		{name: "special token beyond the vocabulary", edit: replace("tokenizer.json", `"id":4`, `"id":20`), err: "vocabulary has 20 rows"},
		{name: "no room for a token", edit: func(f map[string]string) { f["sentence_bert_config.json"] = `{"max_seq_length":2}` }, err: "max_seq_length 2"},
		{name: "half of BGE-M3's heads", edit: func(f map[string]string) { f["sparse_linear.pt"] = "x" }, err: "not the other head"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			files := bertFiles()
			if c.edit != nil {
				c.edit(files)
			}
			d, err := describe(&source{dir: writeCheckpoint(t, files)})
			switch {
			case c.err == "" && (err != nil || !c.want(d)):
				t.Fatalf("got %+v, %v", d, err)
			case c.err != "" && c.name == "no checkpoint":
				if corpus.KindOf(err) != corpus.NotFound {
					t.Fatalf("got %v", err)
				}
			case c.err != "":
				wantInvalid(t, err, c.err)
			}
		})
	}
}

func replace(file, old, with string) func(map[string]string) {
	return func(f map[string]string) {
		changed := string(bytes.Replace([]byte(f[file]), []byte(old), []byte(with), 1))
		if changed == f[file] {
			panic("test: " + file + " has no " + old)
		}
		f[file] = changed
	}
}

func TestSafetensors(t *testing.T) {
	t.Parallel()
	arrays := map[string]array{
		"a": {[]int{2, 3}, []float32{1, 2, 3, 4, 5, 6}},
		"b": {[]int{}, []float32{7}},
		"c": {[]int{0, 4}, nil},
	}
	data := safetensorsFile(t, arrays)
	list, err := readSafetensors("f", bytes.NewReader(data), int64(len(data)))
	if err != nil || len(list) != 3 {
		t.Fatalf("%d tensors, %v", len(list), err)
	}
	for _, tensor := range list {
		var got []float32
		err := tensor.each(t.Context(), func(p []float32) error { got = append(got, p...); return nil })
		if err != nil || !slices.Equal(got, arrays[tensor.name].data) || !slices.Equal(tensor.shape, arrays[tensor.name].shape) {
			t.Errorf("%s is %v %v, %v", tensor.name, tensor.shape, got, err)
		}
	}
	header := func(h string, body int) []byte {
		return slices.Concat(binary.LittleEndian.AppendUint64(nil, uint64(len(h))), []byte(h), make([]byte, body))
	}
	for name, bad := range map[string][]byte{
		"empty":              {},
		"short":              {1, 2, 3},
		"header too long":    {255, 255, 255, 255, 255, 255, 255, 127},
		"header beyond file": binary.LittleEndian.AppendUint64(nil, 100),
		"not JSON":           header("{]", 0),
		"not an object":      header("[]", 0),
		"unknown type":       header(`{"a":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}}`, 4),
		"wrong length":       header(`{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}`, 4),
		"beyond the file":    header(`{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}`, 4),
		"negative":           header(`{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}`, 4),
		"backwards":          header(`{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}`, 4),
		"overflow":           header(`{"a":{"dtype":"F32","shape":[4611686018427387905,4],"data_offsets":[0,16]}}`, 16),
		"overlap":            header(`{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}`, 12),
		"one offset":         header(`{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}`, 4),
	} {
		if _, err := readSafetensors("f", bytes.NewReader(bad), int64(len(bad))); corpus.KindOf(err) != corpus.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzSafetensors(f *testing.F) {
	f.Add([]byte("\x02\x00\x00\x00\x00\x00\x00\x00{}"))
	f.Add([]byte("\x3a\x00\x00\x00\x00\x00\x00\x00" + `{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}    ` + "\x00\x00\x80?"))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := readSafetensors("f", bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return
		}
		readAll(t, list, len(data))
	})
}

// readAll reads every tensor that was admitted: none may reach beyond the file or be larger.
func readAll(t *testing.T, list []*tensor, size int) {
	for _, x := range list {
		if int64(x.elements())*dtypeSize[x.dtype] > int64(size) {
			t.Fatalf("%s has %d numbers in a file of %d bytes", x.name, x.elements(), size)
		}
		err := x.each(t.Context(), func([]float32) error { return nil })
		if err != nil && corpus.KindOf(err) != corpus.Invalid {
			t.Fatal(err)
		}
	}
}
