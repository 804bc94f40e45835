package onnx

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/lockstep-db/lockstep/embedder/model"
)

// The tests below run graphs small enough to compute by hand. protoMsg writes ONNX's protobuf
// fields; the numbers are those of onnx.proto.
type protoMsg []byte

func (m protoMsg) bytes(field protowire.Number, v []byte) protoMsg {
	return protowire.AppendBytes(protowire.AppendTag(m, field, protowire.BytesType), v)
}

func (m protoMsg) str(field protowire.Number, v string) protoMsg { return m.bytes(field, []byte(v)) }

func (m protoMsg) int(field protowire.Number, v int64) protoMsg {
	return protowire.AppendVarint(protowire.AppendTag(m, field, protowire.VarintType), uint64(v))
}

// Element types of ONNX.
const (
	onnxFloat = 1
	onnxInt32 = 6
	onnxInt64 = 7
)

// node is one operator; attrs are integers.
func node(op string, in, out []string, attrs map[string]int64) []byte {
	var m protoMsg
	for _, s := range in {
		m = m.str(1, s)
	}
	for _, s := range out {
		m = m.str(2, s)
	}
	m = m.str(4, op)
	for name, v := range attrs {
		m = m.bytes(5, protoMsg{}.str(1, name).int(3, v).int(20, 2))
	}
	return m
}

func floats(name string, dims []int64, values ...float32) []byte {
	var raw []byte
	for _, v := range values {
		raw = binary.LittleEndian.AppendUint32(raw, math.Float32bits(v))
	}
	return constant(name, onnxFloat, dims, raw)
}

func ints(name string, values ...int64) []byte {
	var raw []byte
	for _, v := range values {
		raw = binary.LittleEndian.AppendUint64(raw, uint64(v))
	}
	return constant(name, onnxInt64, []int64{int64(len(values))}, raw)
}

func constant(name string, kind int64, dims []int64, raw []byte) []byte {
	var m protoMsg
	for _, d := range dims {
		m = m.int(1, d)
	}
	return m.int(2, kind).str(8, name).bytes(9, raw)
}

// value declares an input or output with named dimensions.
func value(name string, kind int64, dims ...string) []byte {
	var shape protoMsg
	for _, d := range dims {
		shape = shape.bytes(1, protoMsg{}.str(2, d))
	}
	tensor := protoMsg{}.int(1, kind).bytes(2, shape)
	return protoMsg{}.str(1, name).bytes(2, protoMsg{}.bytes(1, tensor))
}

// onnxModel puts a graph into a file of IR 8, opset 17.
func onnxModel(nodes, constants, inputs, outputs [][]byte) []byte {
	var g protoMsg
	for _, n := range nodes {
		g = g.bytes(1, n)
	}
	g = g.str(2, "test")
	for _, c := range constants {
		g = g.bytes(5, c)
	}
	for _, v := range inputs {
		g = g.bytes(11, v)
	}
	for _, v := range outputs {
		g = g.bytes(12, v)
	}
	return protoMsg{}.int(1, 8).bytes(7, g).bytes(8, protoMsg{}.str(1, "").int(2, 17))
}

// The hand-made model has D = 2 and C = 2. With id the number of a token:
//
//	dense[b]      = (sum of the text's ids, 10 * the same)      padded
//	              = (the text's first id, 10 * the same)        packed
//	dense_norm[b] = dense[b][0]
//	sparse[t]     = (id - 100) / 2
//	colbert[t]    = (id, -id)                                   padded
//	              = (position, -position)                       packed
const (
	handDim   = 2
	handVocab = 400
)

func paddedGraph() []byte {
	return onnxModel([][]byte{
		node("Cast", []string{"input_ids"}, []string{"ids"}, map[string]int64{"to": onnxFloat}),
		node("Cast", []string{"attention_mask"}, []string{"mask"}, map[string]int64{"to": onnxFloat}),
		node("Mul", []string{"ids", "mask"}, []string{"kept"}, nil),
		node("ReduceSum", []string{"kept", "axis1"}, []string{"sum"}, map[string]int64{"keepdims": 1}),
		node("MatMul", []string{"sum", "one_ten"}, []string{"dense"}, nil),
		node("Identity", []string{"sum"}, []string{"dense_norm"}, nil),
		node("Sub", []string{"ids", "hundred"}, []string{"above"}, nil),
		node("Mul", []string{"above", "half"}, []string{"halved"}, nil),
		node("Mul", []string{"halved", "mask"}, []string{"sparse"}, nil),
		node("Slice", []string{"kept", "axis1", "end", "axis1"}, []string{"rest"}, nil),
		node("Unsqueeze", []string{"rest", "axis2"}, []string{"column"}, nil),
		node("MatMul", []string{"column", "one_minus"}, []string{"colbert"}, nil),
	}, [][]byte{
		ints("axis1", 1), ints("axis2", 2), ints("end", math.MaxInt32),
		floats("one_ten", []int64{1, 2}, 1, 10), floats("one_minus", []int64{1, 2}, 1, -1),
		floats("hundred", []int64{1}, 100), floats("half", []int64{1}, 0.5),
	}, [][]byte{
		value("input_ids", onnxInt32, "B", "S"), value("attention_mask", onnxInt32, "B", "S"),
	}, [][]byte{
		value("dense", onnxFloat, "B", "D"), value("dense_norm", onnxFloat, "B", "N"), value("sparse", onnxFloat, "B", "S"), value("colbert", onnxFloat, "B", "R", "C"),
	})
}

func packedGraph() []byte {
	return onnxModel([][]byte{
		node("Cast", []string{"input_ids"}, []string{"ids"}, map[string]int64{"to": onnxFloat}),
		node("Cast", []string{"position_ids"}, []string{"positions"}, map[string]int64{"to": onnxFloat}),
		node("Slice", []string{"cumulative_sequence_length", "zero", "minus1"}, []string{"starts"}, nil),
		node("Gather", []string{"ids", "starts"}, []string{"first"}, map[string]int64{"axis": 0}),
		node("Unsqueeze", []string{"first", "axis1"}, []string{"first_column"}, nil),
		node("MatMul", []string{"first_column", "one_ten"}, []string{"dense"}, nil),
		node("Identity", []string{"first_column"}, []string{"dense_norm"}, nil),
		// The grid's places are used, so that the input stays: the sum of a row times zero.
		node("Cast", []string{"token_offset"}, []string{"places"}, map[string]int64{"to": onnxFloat}),
		node("ReduceSum", []string{"places"}, []string{"all_places"}, map[string]int64{"keepdims": 0}),
		node("Mul", []string{"all_places", "nought"}, []string{"nothing"}, nil),
		node("Sub", []string{"ids", "hundred"}, []string{"above"}, nil),
		node("Mul", []string{"above", "half"}, []string{"halved"}, nil),
		node("Add", []string{"halved", "nothing"}, []string{"sparse"}, nil),
		node("Unsqueeze", []string{"positions", "axis1"}, []string{"column"}, nil),
		node("MatMul", []string{"column", "one_minus"}, []string{"colbert"}, nil),
	}, [][]byte{
		ints("zero", 0), ints("minus1", -1), ints("axis1", 1),
		floats("one_ten", []int64{1, 2}, 1, 10), floats("one_minus", []int64{1, 2}, 1, -1),
		floats("hundred", []int64{1}, 100), floats("half", []int64{1}, 0.5), floats("nought", []int64{1}, 0),
	}, [][]byte{
		value("input_ids", onnxInt32, "T"), value("position_ids", onnxInt32, "T"),
		value("token_offset", onnxInt32, "B", "S"), value("cumulative_sequence_length", onnxInt32, "E"),
	}, [][]byte{
		value("dense", onnxFloat, "B", "D"), value("dense_norm", onnxFloat, "B", "N"), value("sparse", onnxFloat, "T"), value("colbert", onnxFloat, "T", "C"),
	})
}

// lengthsGraph is the form for long texts: dense is (the text's length, 10 * the same), the
// other heads are as in the padded form, without its mask.
func lengthsGraph() []byte {
	return onnxModel([][]byte{
		node("Cast", []string{"input_ids"}, []string{"ids"}, map[string]int64{"to": onnxFloat}),
		node("Cast", []string{"sequence_lengths"}, []string{"lengths"}, map[string]int64{"to": onnxFloat}),
		node("Unsqueeze", []string{"lengths", "axis1"}, []string{"length_column"}, nil),
		node("MatMul", []string{"length_column", "one_ten"}, []string{"dense"}, nil),
		node("Identity", []string{"length_column"}, []string{"dense_norm"}, nil),
		node("Mul", []string{"ids", "half"}, []string{"sparse"}, nil),
		node("Slice", []string{"ids", "axis1", "end", "axis1"}, []string{"rest"}, nil),
		node("Unsqueeze", []string{"rest", "axis2"}, []string{"column"}, nil),
		node("MatMul", []string{"column", "one_minus"}, []string{"colbert"}, nil),
	}, [][]byte{
		ints("axis1", 1), ints("axis2", 2), ints("end", math.MaxInt32), floats("half", []int64{1}, 0.5),
		floats("one_ten", []int64{1, 2}, 1, 10), floats("one_minus", []int64{1, 2}, 1, -1),
	}, [][]byte{
		value("input_ids", onnxInt32, "B", "S"), value("sequence_lengths", onnxInt32, "B"),
	}, [][]byte{
		value("dense", onnxFloat, "B", "D"), value("dense_norm", onnxFloat, "B", "N"), value("sparse", onnxFloat, "B", "S"), value("colbert", onnxFloat, "B", "R", "C"),
	})
}

// handFile is one more file of a hand-made model.
type handFile struct {
	name    string
	content []byte
}

// handModel writes a built model's folder around a graph, with the small Unigram tokenizer,
// and lets change touch the manifest.
func handModel(tb testing.TB, form string, graph []byte, change func(*model.Manifest), more ...handFile) string {
	tb.Helper()
	dir := tb.TempDir()
	tokenizer, err := os.ReadFile(filepath.Join("testdata", "unigram.json"))
	if err != nil {
		tb.Fatal(err)
	}
	m := &model.Manifest{
		Format: model.FormatVersion, Name: "hand-made", Fingerprint: "hand-made-1", Architecture: "xlm-roberta",
		Layers: 1, HiddenSize: handDim, AttentionHeads: 1, IntermediateSize: 1, VocabSize: handVocab,
		Heads: []string{"dense", "sparse", "colbert"}, Dim: handDim, ColBERTDim: handDim,
		MaxTokens: 32, PositionOffset: 2, Pooling: "mean", Precision: model.FP32,
		Special: model.SpecialTokens{CLS: 0, SEP: 2, Pad: 1, Unk: 3, Mask: -1},
		Graphs:  []model.Graph{{File: "model.onnx", Device: model.DeviceCPU, Form: form}},
	}
	for _, f := range append(more, handFile{"model.onnx", graph}, handFile{model.TokenizerFile, tokenizer}) {
		if err := os.WriteFile(filepath.Join(dir, f.name), f.content, 0o600); err != nil {
			tb.Fatal(err)
		}
		sum := sha256.Sum256(f.content)
		m.Files = append(m.Files, model.File{Name: f.name, Size: int64(len(f.content)), SHA256: hex.EncodeToString(sum[:])})
	}
	if change != nil {
		change(m)
	}
	data, err := json.Marshal(m)
	if err != nil {
		tb.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, model.ManifestFile), data, 0o600); err != nil {
		tb.Fatal(err)
	}
	return dir
}
