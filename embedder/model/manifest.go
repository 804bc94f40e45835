package model

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// ManifestFile is the manifest's name inside a built model directory; TokenizerFile the
// tokenizer's.
const (
	ManifestFile  = "manifest.json"
	TokenizerFile = "tokenizer.json"
)

// FormatVersion numbers the layout of a built directory and of the graphs in it. A build
// made under another number is made again.
const FormatVersion = 3

// schemeVersion numbers everything between the checkpoint's numbers and a vector that is
// not in the checkpoint: pooling rules, quantisation, normalisation. It is part of the
// fingerprint: raise it whenever a change moves vectors beyond rounding.
const schemeVersion = 1

// Precision is what the weights compute in.
type Precision string

// The precisions a model can be built in.
const (
	FP32 Precision = "fp32" // padded graphs for CPU
	Int8 Precision = "int8" // padded graphs for CPU, quantised weights, dynamic activations
	FP16 Precision = "fp16" // packed and padded graphs for CUDA
)

// The device classes a graph is written for.
const (
	DeviceCPU  = "cpu"
	DeviceCUDA = "cuda"
)

// The forms of a graph, which say what its inputs are. All inputs are int32 and all outputs
// float32. B is the number of texts, S the longest text in tokens, T the tokens of all
// texts, D and C the widths of a dense and of a ColBERT vector.
const (
	// Padded: input_ids [B,S] and attention_mask [B,S] (1 for a token, 0 for padding; padding
	// on the right). Outputs: dense [B,D], sparse [B,S], colbert [B,S-1,C]; the sparse
	// weights and ColBERT rows of padding are zero.
	Padded = "padded"
	// PaddedLengths is Padded with sequence_lengths [B], the tokens of each text, in place of
	// the mask.
	PaddedLengths = "padded_lengths"
	// Packed: texts follow one another without padding. input_ids [T]; position_ids [T] (see
	// [Manifest.PositionOffset]); token_offset [B,S] (for each text the places of its tokens
	// in an unpacked [B,S] grid, then all places of padding; the fast kernels read only its
	// shape); cumulative_sequence_length [B+1] (0, then the running sum of lengths).
	// Outputs: dense [B,D], sparse [T], colbert [T,C]; the ColBERT row of a text's first
	// token is present and has to be left out.
	Packed = "packed"
)

// The names of graph inputs and outputs.
const (
	InputIDs         = "input_ids"
	InputMask        = "attention_mask"
	InputLengths     = "sequence_lengths"
	InputPositions   = "position_ids"
	InputTokenOffset = "token_offset"
	InputCumulative  = "cumulative_sequence_length"
	// InputHeads, [1], is present when the graph has more than the dense head: a
	// [corpus.Heads] of what is asked. Other heads are not computed and come back with no
	// elements; dense is always computed.
	InputHeads = "heads"

	OutputDense   = "dense"
	OutputSparse  = "sparse"
	OutputColBERT = "colbert"
	// OutputDenseNorm, [B,1], is the length of each dense vector before it was normalised.
	OutputDenseNorm = "dense_norm"
)

// Graph is one ONNX file of a built model.
type Graph struct {
	// File is the graph's name in the model directory; its weights lie beside it.
	File string `json:"file"`
	// Device is the device class it is written for: cpu or cuda.
	Device string `json:"device"`
	// Form says what the inputs are: see [Padded], [PaddedLengths] and [Packed].
	Form string `json:"form"`
	// Inputs and Outputs are names, in the graph's order.
	Inputs  []string `json:"inputs"`
	Outputs []string `json:"outputs"`
}

// SpecialTokens are the ids of a tokenizer's special tokens. Mask is -1 if there is none.
type SpecialTokens struct {
	CLS  int `json:"cls"`
	SEP  int `json:"sep"`
	Pad  int `json:"pad"`
	Unk  int `json:"unk"`
	Mask int `json:"mask"`
}

// File is one file of a built model and its digest.
type File struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// Manifest describes a built model directory.
type Manifest struct {
	// Format is the layout's number.
	Format int `json:"format"`
	// Name is what people call the model. It is not part of the fingerprint.
	Name string `json:"name"`
	// Fingerprint names weights, tokenizer, pooling and precision class.
	Fingerprint string `json:"fingerprint"`
	// Architecture is bert or xlm-roberta.
	Architecture string `json:"architecture"`
	// Shape of the encoder.
	Layers           int `json:"layers"`
	HiddenSize       int `json:"hidden_size"`
	AttentionHeads   int `json:"attention_heads"`
	IntermediateSize int `json:"intermediate_size"`
	VocabSize        int `json:"vocab_size"`
	// Parameters counts the numbers in the checkpoint's tensors that the graph uses.
	Parameters int64 `json:"parameters"`
	// Heads lists the outputs by name: dense, and for BGE-M3 sparse and colbert.
	Heads []string `json:"heads"`
	// Dim and ColBERTDim are the widths of the outputs (0 without the head).
	Dim        int `json:"dim"`
	ColBERTDim int `json:"colbert_dim,omitempty"`
	// MaxTokens is the longest input in tokens, special tokens included.
	MaxTokens int `json:"max_tokens"`
	// MaxTokensFrom names the file of the checkpoint that sets MaxTokens.
	MaxTokensFrom string `json:"max_tokens_from"`
	// PositionOffset is the position id of a text's first token: 2 for XLM-RoBERTa, 0 for
	// BERT. XLM-RoBERTa gives a token whose id is Special.Pad the position Special.Pad and does
	// not count it; packed callers follow that rule (see [Manifest.Positions]).
	PositionOffset int `json:"position_offset"`
	// Pooling is how token vectors become the dense one: cls, mean, max or mean_sqrt_len.
	Pooling string `json:"pooling"`
	// Precision is what the weights compute in.
	Precision Precision `json:"precision"`
	// Special token ids.
	Special SpecialTokens `json:"special_tokens"`
	// Graphs, in the order of preference within a device.
	Graphs []Graph `json:"graphs"`
	// Files of the directory except the manifest, by name.
	Files []File `json:"files"`
	// SourceDigest names the checkpoint's files; WeightsDigest the numbers in its tensors,
	// independent of the file format; TokenizerDigest the tokenizer as built.
	SourceDigest    string `json:"source_digest"`
	WeightsDigest   string `json:"weights_digest"`
	TokenizerDigest string `json:"tokenizer_digest"`

	dir string
}

// Dir is the directory that the manifest was opened from.
func (m *Manifest) Dir() string { return m.dir }

// Path is the full path of one of the directory's files.
func (m *Manifest) Path(name string) string { return filepath.Join(m.dir, name) }

// HeadSet is Heads as a set.
func (m *Manifest) HeadSet() corpus.Heads {
	var set corpus.Heads
	for _, name := range m.Heads {
		h, _ := corpus.ParseHead(name)
		set |= h
	}
	return set
}

// Spec is what the other rooms know of the model; device is where it was loaded.
func (m *Manifest) Spec(device string) corpus.ModelSpec {
	return corpus.ModelSpec{
		Name: m.Name, Fingerprint: m.Fingerprint, Heads: m.HeadSet(),
		Dim: m.Dim, ColBERTDim: m.ColBERTDim,
		MaxTokens: m.MaxTokens, VocabSize: m.VocabSize,
		Precision: string(m.Precision), Device: device,
	}
}

// Graph returns the directory's graph for a device class and form, and false if it has none.
func (m *Manifest) Graph(device, form string) (Graph, bool) {
	for _, g := range m.Graphs {
		if g.Device == device && g.Form == form {
			return g, true
		}
	}
	return Graph{}, false
}

// Positions appends the position ids of one text's tokens to dst, for packed graphs.
func (m *Manifest) Positions(dst, ids []int32) []int32 {
	next := int32(m.PositionOffset)
	for _, id := range ids {
		if m.Architecture == archXLMR && int(id) == m.Special.Pad {
			dst = append(dst, id)
			continue
		}
		dst = append(dst, next)
		next++
	}
	return dst
}

// IsBuilt reports whether dir looks like a built model, as opposed to a checkpoint.
func IsBuilt(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, ManifestFile))
	return err == nil
}

// Open reads the manifest of a built model directory and checks that every file it names is
// there with its recorded size. It reads no weights: see [Manifest.Verify].
func Open(dir string) (*Manifest, error) {
	data, err := readSmall(filepath.Join(dir, ManifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, corpus.Wrap(corpus.NotFound, "model_not_built",
			fmt.Sprintf("%s holds no built model (no %s); build one from a checkpoint with \"lockstep model build\"", dir, ManifestFile), err)
	}
	if err != nil {
		return nil, fmt.Errorf("opening model: %w", err)
	}
	m := &Manifest{dir: dir}
	if err := json.Unmarshal(data, m); err != nil {
		return nil, damaged(ManifestFile, "is not a manifest", err)
	}
	if m.Format != FormatVersion {
		return nil, corpus.Errorf(corpus.Conflict, "model_format",
			"the model in %s was built in format %d and this version reads format %d; build it again from its checkpoint", dir, m.Format, FormatVersion)
	}
	listed := map[string]bool{}
	for _, f := range m.Files {
		if !localName(f.Name) {
			return nil, damaged(ManifestFile, fmt.Sprintf("names a file outside the directory: %q", f.Name), nil)
		}
		listed[f.Name] = true
		st, err := os.Stat(m.Path(f.Name))
		if err != nil {
			return nil, damaged(f.Name, "is missing; build the model again", err)
		}
		if st.Size() != f.Size {
			return nil, damaged(f.Name, fmt.Sprintf("has %d bytes and %d were written; build the model again", st.Size(), f.Size), nil)
		}
	}
	for _, g := range m.Graphs {
		if !listed[g.File] {
			return nil, damaged(ManifestFile, fmt.Sprintf("has a graph without a file: %q", g.File), nil)
		}
	}
	switch {
	case m.Fingerprint == "", m.Dim <= 0, m.MaxTokens <= 0, m.VocabSize <= 0, len(m.Graphs) == 0,
		!listed[TokenizerFile], !m.HeadSet().Has(corpus.Dense):
		return nil, damaged(ManifestFile, "is incomplete; build the model again", nil)
	}
	return m, nil
}

// Verify reads every file of the model and compares it with its recorded digest.
func (m *Manifest) Verify(ctx context.Context) error {
	for _, f := range m.Files {
		sum, err := fileDigest(ctx, m.Path(f.Name))
		if err != nil {
			return fmt.Errorf("verifying model: %w", err)
		}
		if sum != f.SHA256 {
			return damaged(f.Name, "does not have the content that was built; build the model again", nil)
		}
	}
	return nil
}

// damaged is the error for a file that cannot be what it claims to be.
func damaged(file, what string, cause error) error {
	return &corpus.Error{Kind: corpus.Invalid, Code: "model_damaged", Detail: file + " " + what, Err: cause}
}

// unsupported is the error for a checkpoint of a kind that cannot be built.
func unsupported(format string, args ...any) error {
	return corpus.Errorf(corpus.Invalid, "model_unsupported", format, args...)
}

// localName reports whether name is a plain file name.
func localName(name string) bool {
	return name != "" && filepath.IsLocal(name) && !strings.ContainsAny(name, `/\`)
}

// fileDigest hashes a file, giving up when ctx ends.
func fileDigest(ctx context.Context, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.CopyBuffer(h, &ctxReader{ctx: ctx, r: f}, make([]byte, 1<<20)); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// ctxReader ends a long read when its context ends.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}
