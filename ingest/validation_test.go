package ingest_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

func TestBadDocumentsFailAloneAndLeaveNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, c := range []struct {
		name string
		s    corpus.Settings
	}{
		{"ext", corpus.Settings{Model: corpus.ExternalModel, DenseSize: 2}},
		{"multi", corpus.Settings{Model: corpus.ExternalModel, DenseSize: 1024, Vectors: corpus.Dense | corpus.SparseHead | corpus.ColBERT}},
	} {
		if _, err := b.svc.CreateCollection(b.ctx(), c.name, c.s); err != nil {
			t.Fatal(err)
		}
	}
	nan, inf := float32(math.NaN()), float32(math.Inf(1))
	dense := make([]float32, 1024)
	dense[0] = 1
	vec := func(v corpus.Vectors) corpus.DocumentInput {
		return corpus.DocumentInput{ID: "bad", Chunks: []corpus.ChunkInput{{Text: "x", Vectors: &v}}}
	}
	for _, tc := range []struct {
		name, collection string
		in               corpus.DocumentInput
		code, pointer    string
	}{
		{"no id", "c", corpus.DocumentInput{Text: "x"}, "invalid_id", "/id"},
		{"id of 513 bytes", "c", corpus.DocumentInput{ID: strings.Repeat("x", 513), Text: "x"}, "invalid_id", "/id"},
		{"id with NUL", "c", corpus.DocumentInput{ID: "a\x00b", Text: "x"}, "invalid_id", "/id"},
		{"id not UTF-8", "c", corpus.DocumentInput{ID: "a\xff", Text: "x"}, "invalid_id", "/id"},
		{"no text", "c", corpus.DocumentInput{ID: "bad"}, "empty_text", "/text"},
		{"white space", "c", corpus.DocumentInput{ID: "bad", Text: " \n\t"}, "empty_text", "/text"},
		{"text with NUL", "c", corpus.DocumentInput{ID: "bad", Text: "a\x00"}, "invalid_text", "/text"},
		{"text not UTF-8", "c", corpus.DocumentInput{ID: "bad", Text: "a\xc3\x28"}, "invalid_text", "/text"},
		{"text and chunks", "c", corpus.DocumentInput{ID: "bad", Text: "a", Chunks: []corpus.ChunkInput{{Text: "a"}}}, "text_or_chunks", ""},
		{"no chunks", "c", corpus.DocumentInput{ID: "bad", Chunks: []corpus.ChunkInput{}}, "no_chunks", "/chunks"},
		{"too many chunks", "c", corpus.DocumentInput{ID: "bad", Chunks: make([]corpus.ChunkInput, 10_001)}, "too_many_chunks", "/chunks"},
		{"empty chunk", "c", corpus.DocumentInput{ID: "bad", Chunks: []corpus.ChunkInput{{Text: "a"}, {}}}, "empty_text", "/chunks/1/text"},
		{"huge chunk", "c", corpus.DocumentInput{ID: "bad", Chunks: []corpus.ChunkInput{{Text: strings.Repeat("x", 1<<20+1)}}}, "chunk_too_large", "/chunks/0/text"},
		{"chunk with NUL", "c", corpus.DocumentInput{ID: "bad", Chunks: []corpus.ChunkInput{{Text: "\x00"}}}, "invalid_text", "/chunks/0/text"},
		{"metadata too large", "c", corpus.DocumentInput{ID: "bad", Text: "x", Metadata: corpus.Metadata{"k": strings.Repeat("x", 70_000)}}, "metadata_too_large", "/metadata"},
		{"text without a model", "ext", corpus.DocumentInput{ID: "bad", Text: "x"}, "vectors_required", "/chunks"},
		{"chunk without vectors", "ext", corpus.DocumentInput{ID: "bad", Chunks: []corpus.ChunkInput{{Text: "x"}}}, "vectors_required", "/chunks/0/vectors"},
		{"wrong size", "ext", vec(corpus.Vectors{Dense: []float32{1, 2, 3}}), "wrong_size", "/chunks/0/vectors/dense"},
		{"NaN", "ext", vec(corpus.Vectors{Dense: []float32{1, nan}}), "not_finite", "/chunks/0/vectors"},
		{"infinite", "ext", vec(corpus.Vectors{Dense: []float32{1, inf}}), "not_finite", "/chunks/0/vectors"},
		{"zero", "ext", vec(corpus.Vectors{Dense: []float32{0, 0}}), "zero_vector", "/chunks/0/vectors/dense"},
		{"a head that is not stored", "ext", vec(corpus.Vectors{Dense: []float32{1, 0}, Sparse: &corpus.Sparse{}}), "unknown_vector", "/chunks/0/vectors"},
		{"a head that is missing", "multi", vec(corpus.Vectors{Dense: dense}), "vectors_required", "/chunks/0/vectors"},
		{"sparse lengths", "multi", vec(corpus.Vectors{Dense: dense, Sparse: &corpus.Sparse{Indices: []uint32{1}}, ColBERT: [][]float32{dense}}), "wrong_size", "/chunks/0/vectors/sparse"},
		{"sparse order", "multi", vec(corpus.Vectors{Dense: dense, Sparse: &corpus.Sparse{Indices: []uint32{2, 2}, Values: []float32{1, 1}}, ColBERT: [][]float32{dense}}), "unsorted_indices", "/chunks/0/vectors/sparse/indices"},
		{"no rows", "multi", vec(corpus.Vectors{Dense: dense, Sparse: &corpus.Sparse{}, ColBERT: [][]float32{}}), "wrong_size", "/chunks/0/vectors/colbert"},
		{"ragged rows", "multi", vec(corpus.Vectors{Dense: dense, Sparse: &corpus.Sparse{}, ColBERT: [][]float32{dense, {1}}}), "wrong_size", "/chunks/0/vectors/colbert/1"},
		{"too many rows", "multi", vec(corpus.Vectors{Dense: dense, Sparse: &corpus.Sparse{}, ColBERT: make([][]float32, 1025)}), "vector_too_large", "/chunks/0/vectors/colbert"},
	} {
		good := texts("good "+tc.name, "fine")
		if tc.collection == "ext" {
			good = corpus.DocumentInput{ID: "good " + tc.name, Chunks: []corpus.ChunkInput{{Text: "fine", Vectors: &corpus.Vectors{Dense: []float32{3, 4}}}}}
		}
		out, err := b.svc.Ingest(b.ctx(), corpus.IngestRequest{Collection: tc.collection, Documents: []corpus.DocumentInput{tc.in, good}, Wait: tc.collection != "multi"})
		if err != nil {
			t.Errorf("%s: the request failed: %v", tc.name, err)
			continue
		}
		r := out[0]
		if r.Status != corpus.StatusFailed || r.Err == nil || r.Err.Kind != corpus.Invalid || r.Err.Code != tc.code ||
			len(r.Err.Fields) != 1 || r.Err.Fields[0].Pointer != tc.pointer {
			t.Errorf("%s: %s, %+v; want %s at %s", tc.name, r.Status, r.Err, tc.code, tc.pointer)
		}
		if tc.collection != "multi" && out[1].Status != corpus.StatusIndexed {
			t.Errorf("%s: its neighbour: %+v", tc.name, out[1])
		}
		if _, err := b.svc.Document(b.ctx(), tc.collection, "bad"); corpus.KindOf(err) != corpus.NotFound {
			t.Errorf("%s: something was written: %v", tc.name, err)
		}
	}
}

func TestBadRequestsAreRefusedAsAWhole(t *testing.T) {
	t.Parallel()
	b := setup(t)
	doc := texts("a", "one")
	for _, tc := range []struct {
		name string
		req  corpus.IngestRequest
		code string
	}{
		{"no documents", corpus.IngestRequest{Collection: "c"}, "empty_request"},
		{"duplicate id", corpus.IngestRequest{Collection: "c", Documents: []corpus.DocumentInput{doc, texts("b", "x"), doc}}, "duplicate_id"},
		{"no collection", corpus.IngestRequest{Documents: []corpus.DocumentInput{doc}}, "invalid_name"},
		{"slash in the name", corpus.IngestRequest{Collection: "a/b", Documents: []corpus.DocumentInput{doc}}, "invalid_name"},
		{"long name", corpus.IngestRequest{Collection: strings.Repeat("x", 256), Documents: []corpus.DocumentInput{doc}}, "invalid_name"},
		{"NUL in the name", corpus.IngestRequest{Collection: "a\x00", Documents: []corpus.DocumentInput{doc}}, "invalid_name"},
	} {
		out, err := b.svc.Ingest(b.ctx(), tc.req)
		if corpus.CodeOf(err) != tc.code || corpus.KindOf(err) != corpus.Invalid || out != nil {
			t.Errorf("%s: %v, %v; want %s", tc.name, out, err, tc.code)
		}
	}
	all, err := b.svc.Collections(b.ctx())
	if err != nil || len(all) != 0 {
		t.Errorf("refused requests left %v, %v", all, err)
	}
}

func TestIDsAreCarriedByteExactly(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := []string{"a", "A", "a/b", "a//b", "../a", "a%2Fb", " a ", "\u00e9", "e\u0301", "日本", "\n", "'; DROP TABLE documents; --", strings.Repeat("x", 512), "\U0010ffff"}
	var docs []corpus.DocumentInput
	for i, id := range ids {
		docs = append(docs, texts(id, fmt.Sprintf("text %d", i)))
	}
	b.ingest(true, docs...)
	for i, id := range ids {
		v, err := b.svc.Document(b.ctx(), "c", id)
		if err != nil || v.ExternalID != id || v.Chunks[0].Text != fmt.Sprintf("text %d", i) {
			t.Errorf("%q: %+v, %v", id, v, err)
		}
	}
	var listed []string
	for after := ""; ; {
		page, next, err := b.svc.Documents(b.ctx(), "c", 3, after)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range page {
			if len(listed) > 0 && v.ExternalID <= listed[len(listed)-1] {
				t.Errorf("%q is listed after %q", v.ExternalID, listed[len(listed)-1])
			}
			listed = append(listed, v.ExternalID)
		}
		if after = next; next == "" {
			break
		}
	}
	if len(listed) != len(ids) {
		t.Errorf("listed %q", listed)
	}
	if _, err := b.svc.Delete(b.ctx(), "c", "a/b", false); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a", "a//b", "a%2Fb"} {
		if _, err := b.svc.Document(b.ctx(), "c", id); err != nil {
			t.Errorf("deleting a/b took %q along: %v", id, err)
		}
	}
}

func TestTextIsCutAndRecognised(t *testing.T) {
	t.Parallel()
	b := setup(t)
	if _, err := b.svc.CreateCollection(b.ctx(), "c", corpus.Settings{Chunking: corpus.Chunking{TargetTokens: 16, OverlapTokens: 2}}); err != nil {
		t.Fatal(err)
	}
	text := strings.Repeat("Sentence number one is here. Another one follows it.\n\n", 8)
	in := corpus.DocumentInput{ID: "t", Text: text, Metadata: corpus.Metadata{"v": int64(1)}}
	first := b.ingest(true, in)[0]
	if first.Status != corpus.StatusIndexed || first.Chunks < 3 {
		t.Fatalf("%+v", first)
	}
	if again := b.ingest(true, in)[0]; again.Status != corpus.StatusUnchanged || again.Version != 1 {
		t.Errorf("same text: %+v", again)
	}
	in.Metadata = corpus.Metadata{"v": int64(2)}
	if meta := b.ingest(true, in)[0]; meta.Status != corpus.StatusIndexed || meta.Version != 1 || meta.ChunksEmbedded != 0 {
		t.Errorf("other metadata: %+v", meta)
	}
	in.Text = "One more. " + text
	if changed := b.ingest(true, in)[0]; changed.Status != corpus.StatusIndexed || changed.Version != 2 {
		t.Errorf("other text: %+v", changed)
	}
}

func TestAnUpdateOfOneChunkCostsOneEmbeddingAndOneWrite(t *testing.T) {
	t.Parallel()
	b := setup(t)
	chunks := make([]string, 1000)
	for i := range chunks {
		chunks[i] = fmt.Sprintf("chunk %d", i)
	}
	b.ingest(true, texts("big", chunks...))
	_, before := b.model.Counts()
	inserts, rewrites, metas, deletes := b.index.counts()
	chunks[500] = "changed"
	if r := b.ingest(true, texts("big", chunks...))[0]; r.ChunksEmbedded != 1 || r.Status != corpus.StatusIndexed {
		t.Errorf("%+v", r)
	}
	b.settled()
	_, after := b.model.Counts()
	i2, r2, m2, d2 := b.index.counts()
	if after-before != 1 || i2-inserts != 1 || r2 != rewrites || m2 != metas || d2-deletes > 1 {
		t.Errorf("%d embedded, %d inserted, %d rewritten, %d metadata writes, %d deleted; want 1, 1, 0, 0, at most 1",
			after-before, i2-inserts, r2-rewrites, m2-metas, d2-deletes)
	}
}

func TestConcurrentWritersOfOneDocumentSerialise(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.ingest(true, texts("x", "makes the collection"))
	var wg sync.WaitGroup
	var mu sync.Mutex
	versions := map[int64]int{}
	for i := range 16 {
		wg.Go(func() {
			out, err := b.svc.Ingest(context.Background(), corpus.IngestRequest{Collection: "c", Documents: []corpus.DocumentInput{texts("a", fmt.Sprintf("text %d", i))}, Wait: true})
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			versions[out[0].Version]++
		})
	}
	wg.Wait()
	if len(versions) != 16 {
		t.Errorf("16 writers of different texts got versions %v", versions)
	}
	b.settled()
	if got, _ := b.visible("a"); len(got) != 1 {
		t.Errorf("visible: %q", got)
	}
}

func TestACollectionIsDeletedAndMadeAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	first := b.ingest(true, texts("a", "one"))[0]
	_, old := b.collection()
	if err := b.svc.DeleteCollection(b.ctx(), "c"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.svc.Document(b.ctx(), "c", "a"); corpus.CodeOf(err) != "collection_not_found" {
		t.Errorf("after the deletion: %v", err)
	}
	if err := b.svc.DeleteCollection(b.ctx(), "c"); corpus.CodeOf(err) != "collection_not_found" {
		t.Errorf("second deletion: %v", err)
	}
	second := b.ingest(true, texts("a", "one"))[0]
	if second.Version != 1 || second.PointIDs[0] == first.PointIDs[0] || second.DocumentID == first.DocumentID {
		t.Errorf("the new collection shares something with the old: %+v, %+v", first, second)
	}
	b.eventually("the old collection is cleared", func() error {
		var n int
		b.one(`SELECT (SELECT count(*) FROM lockstep.collections WHERE deleted_at IS NOT NULL) + (SELECT count(*) FROM lockstep.chunks WHERE collection_id = $1)
			+ (SELECT count(*) FROM lockstep.documents WHERE collection_id = $1)`, []any{[16]byte(old.Collection)}, &n)
		if n != 0 || b.index.points(old) != nil {
			return errors.New("not yet")
		}
		return nil
	})
	if got, _ := b.visible("a"); !same(got, []string{"one"}) {
		t.Errorf("the new collection: %q", got)
	}
}

func TestCollectionSettings(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, tc := range []struct {
		name string
		s    corpus.Settings
		code string
	}{
		{"defaults", corpus.Settings{}, ""},
		{"unknown model", corpus.Settings{Model: "other"}, "invalid_settings"},
		{"external without size", corpus.Settings{Model: corpus.ExternalModel}, "invalid_settings"},
		{"external too large", corpus.Settings{Model: corpus.ExternalModel, DenseSize: 70_000}, "invalid_settings"},
		{"another size than the model's", corpus.Settings{DenseSize: 9}, "invalid_settings"},
		{"a head the model lacks", corpus.Settings{Vectors: corpus.Dense | corpus.ColBERT}, "invalid_settings"},
		{"no dense vector", corpus.Settings{Model: corpus.ExternalModel, DenseSize: 4, Vectors: corpus.SparseHead}, "invalid_settings"},
		{"chunks too small", corpus.Settings{Chunking: corpus.Chunking{TargetTokens: 1}}, "invalid_settings"},
		{"chunks too large", corpus.Settings{Chunking: corpus.Chunking{TargetTokens: 100_000}}, "invalid_settings"},
		{"overlap too large", corpus.Settings{Chunking: corpus.Chunking{TargetTokens: 100, OverlapTokens: 90}}, "invalid_settings"},
		{"unknown quantization", corpus.Settings{Quantization: "magic"}, "invalid_settings"},
		{"unknown storage", corpus.Settings{DenseType: "float8"}, "invalid_settings"},
		{"unknown field type", corpus.Settings{Fields: map[string]corpus.FieldType{"a": "colour"}}, "invalid_settings"},
		{"empty field", corpus.Settings{Fields: map[string]corpus.FieldType{"": corpus.Keyword}}, "invalid_settings"},
	} {
		v, err := b.svc.CreateCollection(b.ctx(), tc.name, tc.s)
		if corpus.CodeOf(err) != tc.code {
			t.Errorf("%s: %v; want %q", tc.name, err, tc.code)
		}
		if err == nil && (v.Index.Layout.Dim != 8 || v.Settings.Chunking.TargetTokens == 0 || v.Settings.Vectors != corpus.Dense) {
			t.Errorf("%s: %+v", tc.name, v)
		}
	}
	if _, err := b.svc.CreateCollection(b.ctx(), "defaults", corpus.Settings{}); err != nil {
		t.Errorf("the same again: %v", err)
	}
	if _, err := b.svc.CreateCollection(b.ctx(), "defaults", corpus.Settings{Quantization: "scalar"}); corpus.CodeOf(err) != "collection_exists" {
		t.Errorf("with other settings: %v", err)
	}
}
