package ingest

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"runtime"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/sync/errgroup"

	"github.com/lockstep-db/lockstep/ingest/chunk"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Limits of one document. They bound one transaction and one result, not the corpus.
const (
	// MaxChunks of a document, brought or cut.
	MaxChunks = 10_000
	// MaxDocumentBytes of texts and brought vectors together.
	MaxDocumentBytes = 64 << 20
	// MaxChunkBytes of one chunk's text: some hundred times what the longest input of a model
	// holds. What exceeds the model's own maximum of tokens is left out of the vector.
	MaxChunkBytes = 1 << 20
	// MaxDocuments of one request; callers with more send several, or stream.
	MaxDocuments = 10_000
)

// chunkRule numbers the rule by which texts are cut. A change of ingest/chunk that cuts
// elsewhere takes the next number, so that documents sent again are cut again.
const chunkRule = 1

// target is a collection as documents are prepared for it.
type target struct {
	corpus.Collection
	Index corpus.Index
}

func (t *target) external() bool { return t.Settings.Model == corpus.ExternalModel }

// fault is what is wrong with one document; it fails alone.
func fault(code, pointer, format string, args ...any) *corpus.Error {
	detail := fmt.Sprintf(format, args...)
	e := corpus.Errorf(corpus.Invalid, code, "%s", detail)
	e.Fields = []corpus.FieldError{{Pointer: pointer, Code: code, Detail: detail}}
	return e
}

// textFault says why Postgres or the model could not hold a text.
func textFault(s string) string {
	switch {
	case !utf8.ValidString(s):
		return "text must be valid UTF-8"
	case strings.ContainsRune(s, 0):
		return "text must not contain U+0000"
	}
	return ""
}

// checkRequest looks at what concerns the request as a whole.
func checkRequest(req *corpus.IngestRequest) error {
	if err := checkName(req.Collection); err != nil {
		return err
	}
	if len(req.Documents) == 0 {
		return fault("empty_request", "/documents", "the request names no document")
	}
	if len(req.Documents) > MaxDocuments {
		return fault("too_many_documents", "/documents", "the request has %d documents; at most %d are allowed", len(req.Documents), MaxDocuments)
	}
	seen := make(map[string]int, len(req.Documents))
	for i := range req.Documents {
		id := req.Documents[i].ID
		if first, ok := seen[id]; ok {
			return fault("duplicate_id", "/documents/"+strconv.Itoa(i)+"/id", "documents %d and %d of the request have the same id", first, i)
		}
		seen[id] = i
	}
	return nil
}

// checkID refuses external ids that cannot be carried byte-exactly.
func checkID(id string) *corpus.Error {
	switch {
	case id == "":
		return fault("invalid_id", "/id", "the document has no id")
	case len(id) > corpus.MaxExternalID:
		return fault("invalid_id", "/id", "the id has %d bytes; at most %d are allowed", len(id), corpus.MaxExternalID)
	}
	if f := textFault(id); f != "" {
		return fault("invalid_id", "/id", "%s", f)
	}
	return nil
}

// prepare validates a document and computes its content hash. A document that came as text is
// not cut yet: chunks stays nil until the ledger says that it is needed.
func prepare(t *target, in *corpus.DocumentInput) (corpus.PreparedDocument, *corpus.Error) {
	var out corpus.PreparedDocument
	if e := checkID(in.ID); e != nil {
		return out, e
	}
	if n := len(in.Metadata.JSON()); n > corpus.MaxMetadataBytes {
		return out, fault("metadata_too_large", "/metadata", "metadata has %d bytes; at most %d are allowed", n, corpus.MaxMetadataBytes)
	}
	out.ExternalID, out.Metadata = in.ID, in.Metadata
	if out.Metadata == nil {
		out.Metadata = corpus.Metadata{}
	}
	h := sha256.New()
	var n [8]byte
	number := func(v int) {
		binary.BigEndian.PutUint64(n[:], uint64(v))
		h.Write(n[:])
	}
	switch {
	case in.Text != "" && in.Chunks != nil:
		return out, fault("text_or_chunks", "", "give text or chunks, not both")
	case in.Chunks != nil:
		if len(in.Chunks) == 0 {
			return out, fault("no_chunks", "/chunks", "the document has no chunks")
		}
		if len(in.Chunks) > MaxChunks {
			return out, fault("too_many_chunks", "/chunks", "the document has %d chunks; at most %d are allowed", len(in.Chunks), MaxChunks)
		}
		size := 0
		for i := range in.Chunks {
			if e := checkChunk(t, &in.Chunks[i], "/chunks/"+strconv.Itoa(i)); e != nil {
				return out, e
			}
			if size += chunkBytes(&in.Chunks[i]); size > MaxDocumentBytes {
				return out, fault("document_too_large", "/chunks", "the document's texts and vectors exceed %d bytes", MaxDocumentBytes)
			}
		}
		out.Chunks = numbered(in.Chunks)
		h.Write([]byte("chunks"))
		number(len(out.Chunks))
		for i := range out.Chunks {
			h.Write(out.Chunks[i].Content[:])
		}
	default:
		if t.external() {
			return out, fault("vectors_required", "/chunks", "collection %q takes only chunks with vectors: it has no model of its own", t.Name)
		}
		if f := textFault(in.Text); f != "" {
			return out, fault("invalid_text", "/text", "%s", f)
		}
		if strings.TrimSpace(in.Text) == "" {
			return out, fault("empty_text", "/text", "the document has no text")
		}
		if len(in.Text) > MaxDocumentBytes {
			return out, fault("document_too_large", "/text", "the text has %d bytes; at most %d are allowed", len(in.Text), MaxDocumentBytes)
		}
		h.Write([]byte("text"))
		number(chunkRule)
		number(t.Settings.Chunking.TargetTokens)
		number(t.Settings.Chunking.OverlapTokens)
		number(len(in.Text))
		h.Write([]byte(in.Text))
	}
	h.Sum(out.Content[:0])
	return out, nil
}

// numbered hashes chunks and numbers the occurrences of equal ones.
func numbered(in []corpus.ChunkInput) []corpus.PreparedChunk {
	out := make([]corpus.PreparedChunk, len(in))
	seen := make(map[corpus.ContentHash]uint32, len(in))
	for i := range in {
		c := corpus.HashChunk(in[i].Text, in[i].Vectors)
		out[i] = corpus.PreparedChunk{Text: in[i].Text, Content: c, Occurrence: seen[c], Vectors: in[i].Vectors}
		seen[c]++
	}
	return out
}

func chunkBytes(c *corpus.ChunkInput) int {
	n := len(c.Text)
	if v := c.Vectors; v != nil {
		n += 4 * len(v.Dense)
		if v.Sparse != nil {
			n += 8 * len(v.Sparse.Indices)
		}
		for _, row := range v.ColBERT {
			n += 4 * len(row)
		}
	}
	return n
}

// checkChunk validates a chunk that came cut, and the vectors that came with it.
func checkChunk(t *target, c *corpus.ChunkInput, at string) *corpus.Error {
	if f := textFault(c.Text); f != "" {
		return fault("invalid_text", at+"/text", "%s", f)
	}
	if len(c.Text) > MaxChunkBytes {
		return fault("chunk_too_large", at+"/text", "the chunk has %d bytes; at most %d are allowed: send the document as text to have it cut", len(c.Text), MaxChunkBytes)
	}
	v := c.Vectors
	if v == nil {
		switch {
		case t.external():
			return fault("vectors_required", at+"/vectors", "collection %q takes only chunks with vectors: it has no model of its own", t.Name)
		case strings.TrimSpace(c.Text) == "":
			return fault("empty_text", at+"/text", "the chunk has neither text nor vectors")
		}
		return nil
	}
	at += "/vectors"
	l := &t.Index.Layout
	if extra := v.Heads() &^ l.Vectors; extra != 0 {
		return fault("unknown_vector", at, "collection %q stores %s vectors, not %s", t.Name, l.Vectors, extra)
	}
	missing := l.Vectors &^ v.Heads()
	if missing != 0 && (t.external() || strings.TrimSpace(c.Text) == "") {
		return fault("vectors_required", at, "the %s vector is missing and cannot be computed", missing)
	}
	if !v.Finite() {
		return fault("not_finite", at, "every value must be a finite number")
	}
	if v.Dense != nil {
		if len(v.Dense) != l.Dim {
			return fault("wrong_size", at+"/dense", "the dense vector has %d values; this collection's have %d", len(v.Dense), l.Dim)
		}
		if length(v.Dense) == 0 {
			return fault("zero_vector", at+"/dense", "a vector of zeros has no direction")
		}
	}
	if s := v.Sparse; s != nil {
		if len(s.Indices) != len(s.Values) {
			return fault("wrong_size", at+"/sparse", "there are %d indices and %d values", len(s.Indices), len(s.Values))
		}
		for i := 1; i < len(s.Indices); i++ {
			if s.Indices[i] <= s.Indices[i-1] {
				return fault("unsorted_indices", at+"/sparse/indices", "indices must ascend and differ; number %d does not", i)
			}
		}
	}
	if v.ColBERT != nil {
		if len(v.ColBERT) == 0 {
			return fault("wrong_size", at+"/colbert", "there is no row")
		}
		// Checked before the rows, so that a huge one is refused by its size.
		if n := len(v.ColBERT) * l.ColBERTDim; n > corpus.MaxColBERTValues {
			return fault("vector_too_large", at+"/colbert", "%d rows of %d values exceed the %d values that one point can hold; cut the chunk smaller",
				len(v.ColBERT), l.ColBERTDim, corpus.MaxColBERTValues)
		}
		for i, row := range v.ColBERT {
			if len(row) != l.ColBERTDim {
				return fault("wrong_size", at+"/colbert/"+strconv.Itoa(i), "the row has %d values; this collection's have %d", len(row), l.ColBERTDim)
			}
			if length(row) == 0 {
				return fault("zero_vector", at+"/colbert/"+strconv.Itoa(i), "a row of zeros has no direction")
			}
		}
	}
	return nil
}

// length is the Euclidean norm, computed in float64 so that it neither overflows nor vanishes.
func length(v []float32) float64 {
	var sum float64
	for _, x := range v {
		sum += float64(x) * float64(x)
	}
	return math.Sqrt(sum)
}

// unitTolerance is how far from 1 the length of a vector may be that is stored as it came:
// the rounding of float32 at 4,096 values stays below it.
const unitTolerance = 1e-4

// unit returns v with length 1; the index scores by the dot product. v itself is not changed.
func unit(v []float32) []float32 {
	n := length(v)
	if n == 0 || math.Abs(n-1) <= unitTolerance {
		return v
	}
	out := make([]float32, len(v))
	for i, x := range v {
		out[i] = float32(float64(x) / n)
	}
	return out
}

// cut makes the chunks of documents that came as text, on all cores. Where the embedder cannot
// count tokens now, the whole call fails; a text that cuts to nothing fails alone.
func (s *Service) cut(ctx context.Context, t *target, docs []*pendingDoc) error {
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, d := range docs {
		g.Go(func() error {
			spans, err := s.cfg.Embedder.Tokens(ctx, d.in.Text)
			if err != nil {
				if corpus.KindOf(err) == corpus.Invalid {
					d.fail(err)
					return nil
				}
				return fmt.Errorf("counting tokens: %w", err)
			}
			texts := chunk.Split(d.in.Text, spans, t.Settings.Chunking)
			switch {
			case len(texts) == 0:
				d.fail(fault("empty_text", "/text", "the document has no text"))
				return nil
			case len(texts) > MaxChunks:
				d.fail(fault("too_many_chunks", "/text", "the text has %d chunks; at most %d are allowed", len(texts), MaxChunks))
				return nil
			}
			chunks := make([]corpus.ChunkInput, len(texts))
			for i := range texts {
				chunks[i].Text = texts[i]
			}
			d.doc.Chunks = numbered(chunks)
			return nil
		})
	}
	return g.Wait()
}
