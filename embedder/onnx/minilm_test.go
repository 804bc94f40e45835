package onnx

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/lockstep-db/lockstep/embedder"
	"github.com/lockstep-db/lockstep/embedder/model"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

// builtModel is a model built from its checkpoint once for all tests of the package.
type builtModel struct {
	once sync.Once
	dir  string
	err  error
}

var miniLM, miniLMInt8, tinyM3 builtModel

// from builds the checkpoint on first use and returns the built folder.
func (m *builtModel) from(tb testing.TB, checkpoint string, precision model.Precision) string {
	tb.Helper()
	m.once.Do(func() {
		var tmp string
		//nolint:usetesting // it outlives the first test; TestMain removes it
		if tmp, m.err = os.MkdirTemp("", "lockstep-model-"); m.err != nil {
			return
		}
		m.dir = filepath.Join(tmp, "model")
		_, m.err = model.Build(context.Background(), checkpoint, m.dir, model.Options{Precision: precision})
	})
	if m.err != nil {
		tb.Fatal(m.err)
	}
	return m.dir
}

func (m *builtModel) remove() error {
	if m.dir == "" {
		return nil
	}
	return os.RemoveAll(filepath.Dir(m.dir))
}

func miniLMDir(tb testing.TB) string {
	tb.Helper()
	return miniLM.from(tb, need(tb, "LOCKSTEP_MINILM"), model.FP32)
}

// vectorGoldens is what embedder/model/testdata/make_goldens.py writes.
type vectorGoldens struct {
	Tolerance struct {
		Cosine float64
		MaxAbs float64 `json:"max_abs"`
	}
	MaxTokens int `json:"max_tokens"`
	Dim       int
	Texts     []struct {
		Text                   string
		IDs                    []uint32
		TokensBeforeTruncation int `json:"tokens_before_truncation"`
		Dense                  string
		Norm                   float64 // the vector's length before the last module made it 1
	}
}

func readVectorGoldens(t *testing.T) vectorGoldens {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "model", "testdata", "minilm_goldens.json"))
	if err != nil {
		t.Fatal(err)
	}
	var g vectorGoldens
	if err := json.Unmarshal(data, &g); err != nil {
		t.Fatal(err)
	}
	if len(g.Texts) < 50 || g.Tolerance.Cosine < 0.99999 || g.Tolerance.MaxAbs > 1e-5 {
		t.Fatalf("%d goldens with tolerance %+v are too few or too loose", len(g.Texts), g.Tolerance)
	}
	return g
}

func decodeFloats(t *testing.T, s string) []float32 {
	t.Helper()
	raw, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	out := make([]float32, len(raw)/4)
	for i := range out {
		out[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[4*i:]))
	}
	return out
}

// distance returns the cosine of two vectors and their largest difference.
func distance(a, b []float32) (cosine, worst float64) {
	var dot, na, nb float64
	for i := range a {
		x, y := float64(a[i]), float64(b[i])
		dot, na, nb = dot+x*y, na+x*x, nb+y*y
		worst = max(worst, math.Abs(x-y))
	}
	return dot / math.Sqrt(na*nb), worst
}

// TestMiniLMAgreesWithSentenceTransformers is the proof of the whole path from text to vector:
// token ids exactly, vectors within the tolerance, each text alone and all in one batch.
func TestMiniLMAgreesWithSentenceTransformers(t *testing.T) {
	t.Parallel()
	e := openEngine(t, miniLMDir(t))
	g := readVectorGoldens(t)
	opening, closing := e.Specials()
	rows := make([][]uint32, len(g.Texts))
	for i, c := range g.Texts {
		ids, err := e.Encode(c.Text)
		if err != nil {
			t.Fatalf("%q: %v", c.Text, err)
		}
		if len(ids) != c.TokensBeforeTruncation {
			t.Errorf("%q: %d tokens, expected %d", c.Text, len(ids), c.TokensBeforeTruncation)
		}
		rows[i] = embedder.Truncate(ids, g.MaxTokens, opening, closing, false)
		if !slices.Equal(rows[i], c.IDs) {
			t.Errorf("%q: ids %v, expected %v", c.Text, rows[i], c.IDs)
		}
	}
	together, err := e.Run(rows, corpus.Dense)
	if err != nil {
		t.Fatal(err)
	}
	worstCosine, worstDiff := 1.0, 0.0
	for i, c := range g.Texts {
		want := decodeFloats(t, c.Dense)
		alone, err := e.Run(rows[i:i+1], corpus.Dense)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range []corpus.Vectors{alone[0], together[i]} {
			if off := math.Abs(float64(v.DenseNorm)/c.Norm - 1); !(off <= g.Tolerance.MaxAbs) {
				t.Errorf("%q: length %v, expected %v", c.Text, v.DenseNorm, c.Norm)
			}
			got := v.Dense
			if len(got) != g.Dim || len(want) != g.Dim {
				t.Fatalf("%q: %d numbers, expected %d", c.Text, len(got), g.Dim)
			}
			cosine, diff := distance(got, want)
			worstCosine, worstDiff = min(worstCosine, cosine), max(worstDiff, diff)
			if !(cosine >= g.Tolerance.Cosine) || !(diff <= g.Tolerance.MaxAbs) {
				t.Errorf("%q: cosine %.8f, difference %.2g", c.Text, cosine, diff)
			}
		}
	}
	t.Logf("%d texts: worst cosine %.9f, largest difference %.3g", len(g.Texts), worstCosine, worstDiff)
}

// int8Cosine is the least likeness of an int8 vector to sentence-transformers' fp32 one.
// Measured on an AMD EPYC with VNNI: 0.9964 at worst.
const int8Cosine = 0.995

func TestInt8StaysClose(t *testing.T) {
	t.Parallel()
	e := openEngine(t, miniLMInt8.from(t, need(t, "LOCKSTEP_MINILM"), model.Int8))
	if e.Spec().Precision != "int8" {
		t.Errorf("precision %s", e.Spec().Precision)
	}
	worst := 1.0
	for _, c := range readVectorGoldens(t).Texts {
		got, err := e.Run([][]uint32{c.IDs}, corpus.Dense)
		if err != nil {
			t.Fatal(err)
		}
		cosine, _ := distance(got[0].Dense, decodeFloats(t, c.Dense))
		worst = min(worst, cosine)
		if !(cosine >= int8Cosine) {
			t.Errorf("%q: cosine %.6f", c.Text, cosine)
		}
	}
	t.Logf("worst cosine %.6f", worst)
}

// batchDrift is how far a number of a vector may move with the batch its text runs in, for
// fp32 on the CPU. Measured on an AMD EPYC: 3e-8.
const batchDrift = 2e-6

// TestBatchMatesDoNotMatter runs a text in batches of many shapes and places.
func TestBatchMatesDoNotMatter(t *testing.T) {
	t.Parallel()
	e := openEngine(t, miniLMDir(t))
	const seed = 11
	rng := rand.New(rand.NewPCG(seed, seed))
	row := func(n int) []uint32 {
		ids := make([]uint32, n)
		for i := range ids {
			ids[i] = uint32(1000 + rng.IntN(20000))
		}
		ids[0], ids[n-1] = 101, 102
		return ids
	}
	worst := 0.0
	// Lengths around multiples of 32, where other servers' masks broke.
	for _, n := range []int{2, 3, 31, 32, 33, 64, 127, 128, 256} {
		text := row(n)
		want, err := e.Run([][]uint32{text}, corpus.Dense)
		if err != nil {
			t.Fatal(err)
		}
		for _, mates := range []int{1, 9} {
			for _, longest := range []int{n, min(n+1, 256), 256} {
				rows := make([][]uint32, mates+1)
				for i := range rows {
					rows[i] = row(2 + rng.IntN(longest-1))
				}
				rows[0] = row(longest)
				at := 1 + rng.IntN(mates)
				rows[at] = text
				got, err := e.Run(rows, corpus.Dense)
				if err != nil {
					t.Fatal(err)
				}
				_, diff := distance(got[at].Dense, want[0].Dense)
				worst = max(worst, diff)
				if !(diff <= batchDrift) {
					t.Errorf("%d tokens among %d rows of up to %d (seed %d): moved by %.2g", n, mates, longest, seed, diff)
				}
			}
		}
	}
	t.Logf("largest move %.3g", worst)
}

// residentBytes reads how much memory the process holds.
func residentBytes(tb testing.TB) int64 {
	tb.Helper()
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		tb.Skip("no /proc here")
	}
	pages, err := strconv.ParseInt(strings.Fields(string(data))[1], 10, 64)
	if err != nil {
		tb.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

// TestMemoryIsFlatOverVaryingShapes guards what other servers suffer from: memory that grows
// with every new shape. After shapes up to the largest were seen once, hundreds of others must
// not add more than an allowance for fragments.
func TestMemoryIsFlatOverVaryingShapes(t *testing.T) {
	if testing.Short() {
		t.Skip("half a minute of computing")
	}
	e := openEngine(t, miniLMDir(t))
	const (
		seed      = 5
		budget    = 2048 // padded tokens a batch, the order of the batcher's default
		warm      = 20
		runs      = 80
		allowance = 64 << 20
	)
	rng := rand.New(rand.NewPCG(seed, seed))
	run := func(rows, cols int) {
		batch := make([][]uint32, rows)
		for i := range batch {
			batch[i] = make([]uint32, cols)
			for j := range batch[i] {
				batch[i][j] = uint32(1000 + rng.IntN(20000))
			}
		}
		if _, err := e.Run(batch, corpus.Dense); err != nil {
			t.Fatal(err)
		}
	}
	shape := func() (int, int) {
		cols := 2 + rng.IntN(255)
		return 1 + rng.IntN(max(1, budget/cols)), cols
	}
	run(budget/256, 256)
	run(budget/8, 8)
	for range warm {
		run(shape())
	}
	before := residentBytes(t)
	for range runs {
		run(shape())
	}
	grown := residentBytes(t) - before
	t.Logf("resident %d MB after %d shapes, %+d MB after %d more (seed %d)", before>>20, warm+2, grown>>20, runs, seed)
	if grown > allowance {
		t.Errorf("memory grew by %d MB", grown>>20)
	}
}

func BenchmarkMiniLM(b *testing.B) {
	e, err := Open(Config{Library: need(b, "ONNXRUNTIME_LIB"), ModelDir: miniLMDir(b)})
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := e.Close(); err != nil {
			b.Error(err)
		}
	}()
	for _, shape := range []struct{ rows, cols int }{{1, 16}, {1, 128}, {8, 128}, {16, 128}, {64, 16}} {
		b.Run(strconv.Itoa(shape.rows)+"x"+strconv.Itoa(shape.cols), func(b *testing.B) {
			rows := make([][]uint32, shape.rows)
			for i := range rows {
				rows[i] = make([]uint32, shape.cols)
				for j := range rows[i] {
					rows[i][j] = uint32(1000 + i + j)
				}
			}
			for b.Loop() {
				if _, err := e.Run(rows, corpus.Dense); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(shape.rows*b.N)/b.Elapsed().Seconds(), "texts/s")
		})
	}
}
