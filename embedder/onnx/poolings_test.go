package onnx

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/lockstep-db/lockstep/embedder/model"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

// TestPoolingsAgreeWithSentenceTransformers builds the small XLM-RoBERTa as an ordinary encoder
// with each pooling, and compares rows alone and in one batch.
func TestPoolingsAgreeWithSentenceTransformers(t *testing.T) {
	t.Parallel()
	testdata := filepath.Join("..", "model", "testdata")
	data, err := os.ReadFile(filepath.Join(testdata, "pooling_goldens.json"))
	if err != nil {
		t.Fatal(err)
	}
	var g struct {
		Tolerance struct {
			MaxAbs float64 `json:"max_abs"`
		}
		IDs   [][]uint32
		Dense map[string][]string
	}
	if err := json.Unmarshal(data, &g); err != nil {
		t.Fatal(err)
	}
	if len(g.IDs) < 10 || len(g.Dense) != 4 || g.Tolerance.MaxAbs > 1e-5 {
		t.Fatalf("%d rows, %d poolings, tolerance %g: too few or too loose", len(g.IDs), len(g.Dense), g.Tolerance.MaxAbs)
	}
	for pooling, want := range g.Dense {
		t.Run(pooling, func(t *testing.T) {
			t.Parallel()
			checkpoint := t.TempDir()
			if err := os.CopyFS(checkpoint, os.DirFS(filepath.Join(testdata, "tiny-m3"))); err != nil {
				t.Fatal(err)
			}
			for _, head := range []string{"sparse_linear.pt", "colbert_linear.pt"} {
				if err := os.Remove(filepath.Join(checkpoint, head)); err != nil {
					t.Fatal(err)
				}
			}
			config := fmt.Appendf(nil, `{"pooling_mode":%q}`, pooling)
			if err := os.WriteFile(filepath.Join(checkpoint, "1_Pooling", "config.json"), config, 0o644); err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(t.TempDir(), "built")
			if _, err := model.Build(t.Context(), checkpoint, dir, model.Options{}); err != nil {
				t.Fatal(err)
			}
			e := openEngine(t, dir)
			if e.Spec().Heads != corpus.Dense {
				t.Fatalf("heads %s", e.Spec().Heads)
			}
			batch, err := e.Run(g.IDs, corpus.Dense)
			if err != nil {
				t.Fatal(err)
			}
			for i, row := range g.IDs {
				alone, err := e.Run([][]uint32{row}, corpus.Dense)
				if err != nil {
					t.Fatal(err)
				}
				expected := decodeFloats(t, want[i])
				for name, got := range map[string][]float32{"alone": alone[0].Dense, "in a batch": batch[i].Dense} {
					if _, diff := distance(got, expected); !(diff <= g.Tolerance.MaxAbs) {
						t.Errorf("row %d %s: difference %.2g", i, name, diff)
					}
				}
			}
		})
	}
}
