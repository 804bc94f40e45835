package model

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Progress says how far a build is. Bytes are those of the checkpoint's weights while
// hashing and of the built weights while writing.
type Progress struct {
	// Stage is "checking", "writing" or "done".
	Stage       string
	Done, Total int64
}

// Options of a build.
type Options struct {
	// Name is what people call the model; the checkpoint directory's base name if empty.
	Name string
	// Precision to build in; FP32 if empty.
	Precision Precision
	// Progress, when not nil, is called from the building goroutine, often.
	Progress func(Progress)
}

// Build makes dst a built model from the checkpoint directory src, and returns it opened.
// When dst already holds what the same checkpoint and options give, it is left as it is.
// dst appears whole: an interrupted build leaves only dst + ".building", which the next one
// removes. Two builds of one dst wait for each other. A damaged or unsupported checkpoint is
// a [corpus.Invalid] error.
func Build(ctx context.Context, src, dst string, o Options) (*Manifest, error) {
	if o.Precision == "" {
		o.Precision = FP32
	}
	if o.Name == "" {
		abs, err := filepath.Abs(src)
		if err != nil {
			return nil, fmt.Errorf("building model: %w", err)
		}
		o.Name = filepath.Base(abs)
	}
	if o.Progress == nil {
		o.Progress = func(Progress) {}
	}
	if graphWriters[o.Precision] == nil {
		return nil, corpus.Errorf(corpus.Invalid, "precision", "precision %q is unknown; use fp32, int8 or fp16", o.Precision)
	}
	m, err := build(ctx, src, dst, o)
	if err != nil {
		return nil, fmt.Errorf("building model: %w", err)
	}
	return m, nil
}

func build(ctx context.Context, src, dst string, o Options) (*Manifest, error) {
	files := &source{dir: src}
	d, err := describe(files)
	if err != nil {
		return nil, err
	}
	ck, err := openCheckpoint(files, d)
	if err != nil {
		return nil, err
	}
	defer ck.Close()

	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, dst+".lock")
	if err != nil {
		return nil, err
	}
	defer unlock()

	digest, err := sourceDigest(ctx, files, o.Progress)
	if err != nil {
		return nil, err
	}
	if old, err := Open(dst); err == nil && old.SourceDigest == digest && old.Precision == o.Precision && old.Name == o.Name {
		o.Progress(Progress{Stage: "done", Done: 1, Total: 1})
		return old, nil
	}

	work := dst + ".building"
	if err := os.RemoveAll(work); err != nil {
		return nil, err
	}
	if err := os.Mkdir(work, 0o755); err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	m := &Manifest{Format: FormatVersion, Name: o.Name, Precision: o.Precision, SourceDigest: digest}
	if err := write(ctx, work, ck, d, m, o.Progress); err != nil {
		return nil, err
	}
	if err := swap(work, dst); err != nil {
		return nil, err
	}
	o.Progress(Progress{Stage: "done", Done: 1, Total: 1})
	return Open(dst)
}

// graphWriters are the graphs of each precision, the preferred first.
var graphWriters = map[Precision][]func(*description, map[string]stored) (*onnxGraph, Graph){
	FP32: {paddedGraph},
	Int8: {paddedGraph},
	FP16: {packedGraph, lengthsGraph},
}

// write fills the directory of a new model and the manifest.
func write(ctx context.Context, dir string, ck *checkpoint, d *description, m *Manifest, progress func(Progress)) error {
	var done int64
	total := ck.bytes(m.Precision)
	w, err := newWeightsWriter(dir, "weights.bin", func(n int64) {
		done += n
		progress(Progress{Stage: "writing", Done: min(done, total), Total: total})
	})
	if err != nil {
		return err
	}
	err = writeWeights(ctx, w, ck, d, m.Precision)
	entry, cerr := w.close()
	if err != nil {
		return err
	}
	if cerr != nil {
		return cerr
	}
	m.Files = append(m.Files, entry)

	put := func(name string, data []byte) error {
		sum := sha256.Sum256(data)
		m.Files = append(m.Files, File{Name: name, Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:])})
		return writeSynced(filepath.Join(dir, name), data)
	}
	for _, write := range graphWriters[m.Precision] {
		g, entry := write(d, w.all)
		entry.File = entry.Form + ".onnx"
		if err := put(entry.File, g.encodeModel()); err != nil {
			return err
		}
		m.Graphs = append(m.Graphs, entry)
	}
	if err := put(TokenizerFile, d.tokenizer); err != nil {
		return err
	}
	slices.SortFunc(m.Files, func(a, b File) int { return strings.Compare(a.Name, b.Name) })

	sum := sha256.Sum256(d.tokenizer)
	m.TokenizerDigest = hex.EncodeToString(sum[:])
	m.WeightsDigest = ck.digest()
	m.Architecture = d.arch
	m.Layers, m.HiddenSize = d.cfg.NumHiddenLayers, d.cfg.HiddenSize
	m.AttentionHeads, m.IntermediateSize = d.cfg.NumAttentionHeads, d.cfg.IntermediateSize
	m.VocabSize, m.Parameters = d.cfg.VocabSize, ck.params
	heads := corpus.Dense
	if d.m3 {
		heads |= corpus.SparseHead | corpus.ColBERT
	}
	m.Heads, m.Dim, m.ColBERTDim = heads.Names(), d.cfg.HiddenSize, d.colbertDim
	m.MaxTokens, m.MaxTokensFrom = d.maxTokens, d.maxTokensFrom
	m.PositionOffset, m.Pooling, m.Special = d.posOffset, d.pooling, d.special
	m.Fingerprint = fingerprint(m)

	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return writeSynced(filepath.Join(dir, ManifestFile), append(data, '\n'))
}

// fingerprint names what decides a vector: not the device, the graph's form or its name.
func fingerprint(m *Manifest) string {
	h := sha256.New()
	for _, part := range []string{
		fmt.Sprint(schemeVersion), m.Architecture, m.WeightsDigest, m.TokenizerDigest, m.Pooling, string(m.Precision),
	} {
		fmt.Fprintf(h, "%d:%s", len(part), part)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// sourceDigest hashes every file of the checkpoint that was used.
func sourceDigest(ctx context.Context, files *source, progress func(Progress)) (string, error) {
	names := slices.Sorted(slices.Values(files.used))
	var total, done int64
	for _, n := range names {
		st, err := os.Stat(filepath.Join(files.dir, n))
		if err != nil {
			return "", err
		}
		total += st.Size()
	}
	h := sha256.New()
	for _, n := range names {
		progress(Progress{Stage: "checking", Done: done, Total: total})
		sum, err := fileDigest(ctx, filepath.Join(files.dir, n))
		if err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%s\x00%s\n", n, sum)
		if st, err := os.Stat(filepath.Join(files.dir, n)); err == nil {
			done += st.Size()
		}
	}
	progress(Progress{Stage: "checking", Done: total, Total: total})
	return hex.EncodeToString(h.Sum(nil)), nil
}

// weightFormats are the weight files of a checkpoint, the preferred first.
var weightFormats = []struct {
	single string
	read   tensorReader
}{
	{"model.safetensors", readSafetensors},
	{"pytorch_model.bin", readTorch},
}

// openCheckpoint opens the weight files: one, or the set that an index names, and the heads.
func openCheckpoint(files *source, d *description) (_ *checkpoint, err error) {
	ck := &checkpoint{tensors: map[string]*tensor{}, digests: map[string]string{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, ck.Close())
		}
	}()
	names, read, err := weightFiles(files)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if err := ck.open(files, name, "", read); err != nil {
			return nil, err
		}
	}
	for _, p := range []string{"", "bert.", "roberta."} {
		if _, ok := ck.tensors[p+"embeddings.word_embeddings.weight"]; ok {
			ck.prefix = p
		}
	}
	if d.m3 {
		for _, h := range []string{sparseFile, colbertFile} {
			if err := ck.open(files, h, headPrefix+h+".", readTorch); err != nil {
				return nil, err
			}
		}
		if err := d.readColBERTWidth(ck); err != nil {
			return nil, err
		}
	}
	return ck, nil
}

// weightFiles finds the encoder's weight files and how to read them.
func weightFiles(files *source) ([]string, tensorReader, error) {
	for _, format := range weightFormats {
		if _, err := os.Stat(filepath.Join(files.dir, format.single)); err == nil {
			return []string{format.single}, format.read, nil
		}
		var index struct {
			WeightMap map[string]string `json:"weight_map"`
		}
		name := format.single + ".index.json"
		found, err := files.json(name, &index)
		if err != nil {
			return nil, nil, err
		}
		if !found {
			continue
		}
		shards := map[string]bool{}
		for _, f := range index.WeightMap {
			if !localName(f) {
				return nil, nil, damaged(name, fmt.Sprintf("names a file outside the checkpoint: %q", f), nil)
			}
			shards[f] = true
		}
		return slices.Sorted(maps.Keys(shards)), format.read, nil
	}
	return nil, nil, damaged("the checkpoint", "has no weights: neither model.safetensors nor pytorch_model.bin, whole or in parts", nil)
}

// swap puts the finished directory in place of dst.
func swap(work, dst string) error {
	old := dst + ".old"
	if err := os.RemoveAll(old); err != nil {
		return err
	}
	if _, err := os.Stat(dst); err == nil {
		if err := os.Rename(dst, old); err != nil {
			return err
		}
	}
	if err := os.Rename(work, dst); err != nil {
		return err
	}
	return os.RemoveAll(old)
}

// writeSynced writes a small file that survives a crash.
func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = bytes.NewReader(data).WriteTo(f)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}
