package onnx

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/lockstep-db/lockstep/embedder"
	"github.com/lockstep-db/lockstep/embedder/model"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

// m3Goldens is what embedder/model/testdata/make_tiny_m3.py writes with FlagEmbedding.
type m3Goldens struct {
	Tolerance struct {
		Cosine float64
		MaxAbs float64 `json:"max_abs"`
	}
	Texts []struct {
		Text        string
		IDs         []uint32
		Dense       string
		Norm        float64 // with normalize_embeddings=False
		Sparse      map[string]float64
		ColBERTRows int `json:"colbert_rows"`
		// ColBERT holds all rows; for long texts there is their mean alone.
		ColBERT     string `json:"colbert"`
		ColBERTMean string `json:"colbert_mean"`
	}
}

// TestTinyM3AgreesWithFlagEmbedding checks the three heads of a small random model in BGE-M3's
// layout, alone and in one batch, for every set of heads that can be asked for.
func TestTinyM3AgreesWithFlagEmbedding(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile(filepath.Join("..", "model", "testdata", "m3_goldens.json"))
	if err != nil {
		t.Fatal(err)
	}
	var g m3Goldens
	if err := json.Unmarshal(data, &g); err != nil {
		t.Fatal(err)
	}
	if len(g.Texts) < 20 || g.Tolerance.Cosine < 0.99999 || g.Tolerance.MaxAbs > 1e-5 {
		t.Fatalf("%d goldens with tolerance %+v are too few or too loose", len(g.Texts), g.Tolerance)
	}
	e := openEngine(t, tinyM3.from(t, filepath.Join("..", "model", "testdata", "tiny-m3"), model.FP32))
	if e.Spec().Heads != allHeads {
		t.Fatalf("heads %s", e.Spec().Heads)
	}
	rows := make([][]uint32, len(g.Texts))
	for i, c := range g.Texts {
		ids, err := e.Encode(c.Text)
		if err != nil {
			t.Fatalf("%q: %v", c.Text, err)
		}
		rows[i] = embedder.Truncate(ids, e.Spec().MaxTokens, 1, 1, false)
		if !slices.Equal(rows[i], c.IDs) {
			t.Errorf("%.40q: ids %v, expected %v", c.Text, rows[i], c.IDs)
		}
	}
	var worst struct{ dense, sparse, colbert float64 }
	check := func(i int, heads corpus.Heads, v corpus.Vectors) {
		t.Helper()
		c := g.Texts[i]
		if v.Heads() != heads || !v.Finite() {
			t.Fatalf("%.40q: heads %s, finite %v, expected %s", c.Text, v.Heads(), v.Finite(), heads)
		}
		if heads.Has(corpus.Dense) {
			if off := math.Abs(float64(v.DenseNorm)/c.Norm - 1); !(off <= g.Tolerance.MaxAbs) {
				t.Errorf("%.40q: length %v, expected %v", c.Text, v.DenseNorm, c.Norm)
			}
			cosine, diff := distance(v.Dense, decodeFloats(t, c.Dense))
			worst.dense = max(worst.dense, diff)
			if !(cosine >= g.Tolerance.Cosine) || !(diff <= g.Tolerance.MaxAbs) {
				t.Errorf("%.40q: dense: cosine %.8f, difference %.2g", c.Text, cosine, diff)
			}
		}
		if heads.Has(corpus.SparseHead) {
			if len(v.Sparse.Indices) != len(c.Sparse) || !slices.IsSorted(v.Sparse.Indices) {
				t.Fatalf("%.40q: sparse %v, expected %v", c.Text, v.Sparse, c.Sparse)
			}
			for k, id := range v.Sparse.Indices {
				want, ok := c.Sparse[strconv.Itoa(int(id))]
				diff := math.Abs(float64(v.Sparse.Values[k]) - want)
				worst.sparse = max(worst.sparse, diff)
				if !ok || !(diff <= g.Tolerance.MaxAbs) {
					t.Errorf("%.40q: sparse weight of %d is %v, expected %v (there: %v)", c.Text, id, v.Sparse.Values[k], want, ok)
				}
			}
		}
		if heads.Has(corpus.ColBERT) {
			if len(v.ColBERT) != c.ColBERTRows {
				t.Fatalf("%.40q: %d token vectors, expected %d", c.Text, len(v.ColBERT), c.ColBERTRows)
			}
			rows, want := v.ColBERT, decodeFloats(t, c.ColBERT)
			if c.ColBERT == "" {
				rows, want = [][]float32{mean(rows)}, decodeFloats(t, c.ColBERTMean)
			}
			for j, row := range rows {
				cosine, diff := distance(row, want[j*len(row):(j+1)*len(row)])
				worst.colbert = max(worst.colbert, diff)
				if !(cosine >= g.Tolerance.Cosine) || !(diff <= g.Tolerance.MaxAbs) {
					t.Errorf("%.40q: token vector %d: cosine %.8f, difference %.2g", c.Text, j, cosine, diff)
				}
			}
		}
	}
	for heads := corpus.Heads(1); heads <= allHeads; heads++ {
		together, err := e.Run(rows, heads)
		if err != nil {
			t.Fatalf("%s: %v", heads, err)
		}
		for i := range rows {
			check(i, heads, together[i])
			alone, err := e.Run(rows[i:i+1], heads)
			if err != nil {
				t.Fatalf("%s: %v", heads, err)
			}
			check(i, heads, alone[0])
		}
	}
	t.Logf("%d texts: largest differences: dense %.3g, sparse %.3g, colbert %.3g", len(g.Texts), worst.dense, worst.sparse, worst.colbert)
}

func mean(rows [][]float32) []float32 {
	out := make([]float32, len(rows[0]))
	for k := range out {
		sum := 0.0
		for _, row := range rows {
			sum += float64(row[k])
		}
		out[k] = float32(sum / float64(len(rows)))
	}
	return out
}
