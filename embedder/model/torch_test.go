package model

import (
	"archive/zip"
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// program writes pickles by hand, in the instructions that torch.save uses.
type program struct{ b []byte }

func newProgram() *program { return &program{b: []byte{0x80, 2}} }

func (p *program) op(b ...byte) *program { p.b = append(p.b, b...); return p }

func (p *program) text(s string) *program {
	p.b = append(binary.LittleEndian.AppendUint32(append(p.b, 'X'), uint32(len(s))), s...)
	return p
}

func (p *program) num(n int32) *program {
	p.b = binary.LittleEndian.AppendUint32(append(p.b, 'J'), uint32(n))
	return p
}

func (p *program) global(module, name string) *program {
	p.b = append(p.b, "c"+module+"\n"+name+"\n"...)
	return p
}

// tensor pushes one of shape over a storage of count numbers.
func (p *program) tensor(key, class string, count, offset int32, shape, stride []int32) *program {
	p.global("torch._utils", "_rebuild_tensor_v2").op('(')
	p.op('(').text("storage").global("torch", class).text(key).text("cpu").num(count).op('t', 'Q').num(offset)
	for _, dims := range [][]int32{shape, stride} {
		p.op('(')
		for _, d := range dims {
			p.num(d)
		}
		p.op('t')
	}
	return p.op(0x89).global("collections", "OrderedDict").op(')', 'R', 't', 'R')
}

// entry sets one entry of the dictionary on the stack.
func (p *program) entry(name string, value func(*program)) *program {
	p.text(name)
	value(p)
	return p.op('s')
}

// archive is a torch.save file of a pickle and its storages.
func archive(t testing.TB, pickle []byte, storages map[string][]byte) []byte {
	t.Helper()
	files := []zipEntry{{name: "m/data.pkl", data: pickle}, {name: "m/byteorder", data: []byte("little")}}
	for key, data := range storages {
		files = append(files, zipEntry{name: "m/data/" + key, data: data})
	}
	return zipFile(t, files)
}

type zipEntry struct {
	name   string
	data   []byte
	method uint16
	crc    *uint32
	size   *uint64 // claimed
}

func zipFile(t testing.TB, entries []zipEntry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := zip.NewWriter(&buf)
	for _, e := range entries {
		if e.method == zip.Deflate {
			f, err := w.CreateHeader(&zip.FileHeader{Name: e.name, Method: zip.Deflate})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.Write(e.data); err != nil {
				t.Fatal(err)
			}
			continue
		}
		h := &zip.FileHeader{Name: e.name, Method: zip.Store, CRC32: crc32.ChecksumIEEE(e.data),
			CompressedSize64: uint64(len(e.data)), UncompressedSize64: uint64(len(e.data))}
		if e.crc != nil {
			h.CRC32 = *e.crc
		}
		if e.size != nil {
			h.CompressedSize64, h.UncompressedSize64 = *e.size, *e.size
		}
		f, err := w.CreateRaw(h)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func oneTensor(p *program) { p.tensor("0", "FloatStorage", 4, 0, []int32{2, 2}, []int32{2, 1}) }

func storage4() map[string][]byte {
	return map[string][]byte{"0": appendFloat32s(nil, []float32{1, 2, 3, 4})}
}

func TestReadTorchReadsWhatTorchWrote(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]map[string][]int{
		"sparse_linear.pt":  {"weight": {1, 16}, "bias": {1}},
		"colbert_linear.pt": {"weight": {16, 16}, "bias": {16}},
		"pytorch_model.bin": {"embeddings.word_embeddings.weight": {178, 16}, "encoder.layer.1.output.LayerNorm.bias": {16}, "pooler.dense.weight": {16, 16}},
	} {
		data, err := os.ReadFile(filepath.Join(tinyM3, name))
		if err != nil {
			t.Fatal(err)
		}
		list, err := readTorch(name, bytes.NewReader(data), int64(len(data)))
		if err != nil {
			t.Fatal(err)
		}
		got := map[string][]int{}
		for _, x := range list {
			got[x.name] = x.shape
		}
		for n, shape := range want {
			if !slices.Equal(got[n], shape) {
				t.Errorf("%s: %s has shape %v, want %v", name, n, got[n], shape)
			}
		}
		readAll(t, list, len(data))
	}
}

func TestReadTorchValues(t *testing.T) {
	t.Parallel()
	p := newProgram().op('}')
	p.entry("whole", oneTensor)
	p.entry("part", func(p *program) { p.tensor("0", "FloatStorage", 4, 1, []int32{3, 1}, []int32{1, 9}) })
	p.entry("half", func(p *program) { p.tensor("1", "HalfStorage", 2, 0, []int32{2}, []int32{1}) })
	p.entry("parameter", func(p *program) {
		p.global("torch._utils", "_rebuild_parameter").op('(')
		oneTensor(p)
		p.op(0x88).op('}', 't', 'R')
	})
	p.op('.')
	storages := storage4()
	storages["1"] = []byte{0, 0x3c, 0, 0xc0}
	data := archive(t, p.b, storages)
	list, err := readTorch("f", bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][]float32{"whole": {1, 2, 3, 4}, "part": {2, 3, 4}, "half": {1, -2}, "parameter": {1, 2, 3, 4}}
	for _, x := range list {
		var got []float32
		if err := x.each(t.Context(), func(v []float32) error { got = append(got, v...); return nil }); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, want[x.name]) {
			t.Errorf("%s is %v, want %v", x.name, got, want[x.name])
		}
		delete(want, x.name)
	}
	if len(want) > 0 {
		t.Errorf("missing: %v", want)
	}
}

func TestHostilePickles(t *testing.T) {
	t.Parallel()
	dictOf := func(value func(*program)) []byte { return newProgram().op('}').entry("x", value).op('.').b }
	for name, c := range map[string]struct {
		pickle []byte
		want   string
	}{
		"runs a command":         {newProgram().global("os", "system").text("true").op(0x85, 'R', '.').b, "nothing was executed"},
		"by the stack":           {newProgram().text("builtins").text("eval").op(0x93, '.').b, "nothing was executed"},
		"a name that is no text": {newProgram().num(1).text("eval").op(0x93, '.').b, "not text"},
		"another of torch":       {newProgram().global("torch", "load").op('.').b, "nothing was executed"},
		"instance of a class":    {newProgram().op('(').op([]byte("ios\nsystem\n")...).op('.').b, "not used by torch.save"},
		"new object":             {newProgram().global("collections", "OrderedDict").op(')', 0x81, '.').b, "not used by torch.save"},
		"extension registry":     {newProgram().op(0x82, 1, '.').b, "not used by torch.save"},
		"old protocol":           {[]byte{0x80, 1, '.'}, "protocol 1"},
		"calls a number":         {newProgram().num(1).op(')', 'R', '.').b, "a call"},
		"calls without a tuple":  {newProgram().global("collections", "OrderedDict").num(1).op('R', '.').b, "no arguments"},
		"calls with too much":    {newProgram().global("collections", "OrderedDict").num(1).op(0x85, 'R', '.').b, "a call"},
		"calls an uncomparable":  {newProgram().op(']', ')', 'R', '.').b, "a call"},
		"calls a tuple":          {newProgram().num(1).op(0x85).op(')', 'R', '.').b, "a call"},
		"storage not a tuple":    {newProgram().num(1).op('Q', '.').b, "storage"},
		"storage of no class":    {newProgram().op('(').text("storage").text("a").text("b").text("c").num(1).op('t', 'Q', '.').b, "damaged"},
		"storage tag a tuple":    {newProgram().op('(', ')').text("a").text("b").text("c").num(1).op('t', 'Q', '.').b, "storage"},
		"key is a list":          {newProgram().op('}', ']').num(1).op('s', '.').b, "key is not text"},
		"key is a number":        {newProgram().op('}').num(1).num(1).op('s', '.').b, "key is not text"},
		"append to a number":     {newProgram().num(1).num(1).op('a', '.').b, "adds to"},
		"append to a dict":       {newProgram().op('}').num(1).op('a', '.').b, "appends to a dictionary"},
		"odd items":              {newProgram().op('}', '(').text("a").op('u', '.').b, "appends to a dictionary"},
		"entry of a list":        {newProgram().op(']').text("a").num(1).op('s', '.').b, "entry of a list"},
		"state of a number":      {newProgram().num(1).op('}', 'b', '.').b, "state"},
		"empty stack":            {newProgram().op('.').b, "stack is empty"},
		"pops a mark":            {newProgram().op('(', '.').b, "a value is missing"},
		"no mark":                {newProgram().op('t', '.').b, "mark is missing"},
		"left over":              {newProgram().op('}', '}', '.').b, "left over"},
		"unknown memo":           {newProgram().op('h', 7, '.').b, "not there"},
		"ends early":             {newProgram().op('}').b, "too early"},
		"text beyond the end":    {newProgram().op('X', 255, 255, 255, 255).b, "too early"},
		"text beyond, signed":    {newProgram().op('X', 255, 255, 255, 127).b, "too early"},
		"name without an end":    {newProgram().op([]byte("ctorch\nFloat")...).b, "too early"},
		"integer too long":       {newProgram().op(0x8a, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, '.').b, "too long"},
		"a list":                 {newProgram().op(']', '.').b, "dictionary"},
		"not a tensor":           {dictOf(func(p *program) { p.num(1) }), `"x" is not a tensor`},
		"dict in itself":         {newProgram().op('}', 'q', 0).text("x").op('h', 0, 's', '.').b, `"x" is not a tensor`},
		"beyond the storage":     {dictOf(func(p *program) { p.tensor("0", "FloatStorage", 4, 1, []int32{4}, []int32{1}) }), "beyond its storage"},
		"negative offset":        {dictOf(func(p *program) { p.tensor("0", "FloatStorage", 4, -1, []int32{4}, []int32{1}) }), "damaged"},
		"negative side":          {dictOf(func(p *program) { p.tensor("0", "FloatStorage", 4, 0, []int32{-4}, []int32{1}) }), "shape"},
		"overflowing shape": {dictOf(func(p *program) {
			p.tensor("0", "FloatStorage", 4, 0, []int32{math.MaxInt32, math.MaxInt32, math.MaxInt32}, []int32{1, 1, 1})
		}), "beyond its storage"},
		"not row by row":           {dictOf(func(p *program) { p.tensor("0", "FloatStorage", 4, 0, []int32{2, 2}, []int32{1, 2}) }), "contiguous"},
		"repeated by stride":       {dictOf(func(p *program) { p.tensor("0", "FloatStorage", 1, 0, []int32{4}, []int32{0}) }), "beyond its storage"},
		"negative storage":         {dictOf(func(p *program) { p.tensor("0", "FloatStorage", -4, 0, []int32{0}, []int32{1}) }), "damaged"},
		"shape and strides differ": {dictOf(func(p *program) { p.tensor("0", "FloatStorage", 4, 0, []int32{4}, nil) }), "damaged"},
	} {
		_, err := unpickleTensors(c.pickle)
		if !errors.Is(err, errPickle) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want it to mention %q", name, err, c.want)
		}
	}
}

func TestHostileArchives(t *testing.T) {
	t.Parallel()
	good := newProgram().op('}').entry("x", oneTensor).op('.').b
	withKey := func(key string) []byte {
		return newProgram().op('}').entry("x", func(p *program) { p.tensor(key, "FloatStorage", 4, 0, []int32{4}, []int32{1}) }).op('.').b
	}
	data := appendFloat32s(nil, []float32{1, 2, 3, 4})
	huge, wrong := uint64(1)<<40, uint32(1)
	for name, c := range map[string]struct {
		file []byte
		want string
	}{
		"not a zip":                 {[]byte("\x80\x02}q\x00."), "zip format"},
		"empty":                     {nil, "zip format"},
		"no pickle":                 {zipFile(t, []zipEntry{{name: "m/data/0", data: data}}), "no pickle"},
		"pickle too deep":           {zipFile(t, []zipEntry{{name: "m/n/data.pkl", data: good}}), "no pickle"},
		"two pickles":               {zipFile(t, []zipEntry{{name: "a/data.pkl", data: good}, {name: "b/data.pkl", data: good}}), "two pickles"},
		"two of one name":           {zipFile(t, []zipEntry{{name: "m/data.pkl", data: good}, {name: "m/data.pkl", data: good}}), "two entries"},
		"bomb as pickle":            {zipFile(t, []zipEntry{{name: "m/data.pkl", data: make([]byte, 1<<20), method: zip.Deflate}}), "compressed"},
		"bomb as storage":           {zipFile(t, []zipEntry{{name: "m/data.pkl", data: good}, {name: "m/data/0", data: data, method: zip.Deflate}}), "compressed"},
		"claims a terabyte":         {zipFile(t, []zipEntry{{name: "m/data.pkl", data: good, size: &huge}}), "bytes"},
		"storage claims a terabyte": {zipFile(t, []zipEntry{{name: "m/data.pkl", data: good}, {name: "m/data/0", data: data, size: &huge}}), "wrong size"},
		"pickle damaged":            {zipFile(t, []zipEntry{{name: "m/data.pkl", data: good, crc: &wrong}}), "damaged"},
		"no storage":                {archive(t, good, nil), "no data"},
		"storage too small":         {archive(t, good, map[string][]byte{"0": data[:12]}), "wrong size"},
		"storage too large":         {archive(t, good, map[string][]byte{"0": append(data, 0)}), "wrong size"},
		"path upwards":              {archive(t, withKey("../../etc/passwd"), storage4()), "no data"},
		"absolute path":             {archive(t, withKey("/etc/passwd"), storage4()), "no data"},
		"big-endian":                {zipFile(t, []zipEntry{{name: "m/data.pkl", data: good}, {name: "m/byteorder", data: []byte("big")}, {name: "m/data/0", data: data}}), "big-endian"},
		"code in the pickle":        {archive(t, newProgram().global("posix", "system").text("id").op(0x85, 'R', '.').b, nil), "nothing was executed"},
	} {
		_, err := readTorch("f", bytes.NewReader(c.file), int64(len(c.file)))
		if corpus.KindOf(err) != corpus.Invalid || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want it to mention %q", name, err, c.want)
		}
	}

	// A damaged storage shows when it is read.
	file := zipFile(t, []zipEntry{{name: "m/data.pkl", data: good}, {name: "m/data/0", data: data, crc: &wrong}})
	list, err := readTorch("f", bytes.NewReader(file), int64(len(file)))
	if err != nil {
		t.Fatal(err)
	}
	wantInvalid(t, list[0].each(t.Context(), func([]float32) error { return nil }), "checksum")
}

func TestUnpickleBoundsItsMemory(t *testing.T) {
	t.Parallel()
	// A list put into a list again and again would double if it were copied.
	p := newProgram().op(']', 'q', 0)
	for range 100_000 {
		p.op('h', 0, 'h', 0, 0x86, 'q', 0)
	}
	p.op('.')
	if _, err := unpickleTensors(p.b); !errors.Is(err, errPickle) {
		t.Fatal(err)
	}
}

func FuzzUnpickle(f *testing.F) {
	f.Add(newProgram().op('}').entry("x", oneTensor).op('.').b)
	data, err := os.ReadFile(filepath.Join(tinyM3, sparseFile))
	if err != nil {
		f.Fatal(err)
	}
	zr, err := zip.NewReader(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		f.Fatal(err)
	}
	pickle, err := readEntry(sparseFile, zr.File[0], maxPickle)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(pickle)
	f.Fuzz(func(t *testing.T, program []byte) {
		refs, err := unpickleTensors(program)
		if err != nil && !errors.Is(err, errPickle) {
			t.Fatal(err)
		}
		for name, r := range refs {
			if n, ok := elementCount(r.shape); !ok || r.offset < 0 || int64(n) > r.storage.count-r.offset {
				t.Fatalf("%q reaches beyond its storage: %+v", name, r)
			}
		}
	})
}

func FuzzReadTorch(f *testing.F) {
	f.Add(archive(f, newProgram().op('}').entry("x", oneTensor).op('.').b, storage4()))
	for _, name := range []string{sparseFile, colbertFile} {
		data, err := os.ReadFile(filepath.Join(tinyM3, name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := readTorch("f", bytes.NewReader(data), int64(len(data)))
		if err != nil {
			if corpus.KindOf(err) != corpus.Invalid {
				t.Fatal(err)
			}
			return
		}
		readAll(t, list, len(data))
	})
}
