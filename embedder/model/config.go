package model

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// The architectures that can be built.
const (
	archBERT = "bert"
	archXLMR = "xlm-roberta"
)

// The poolings that can be built, as the manifest names them.
const (
	poolCLS     = "cls"
	poolMean    = "mean"
	poolMax     = "max"
	poolSqrtLen = "mean_sqrt_len"
)

// maxSmallFile bounds the JSON files of a checkpoint. XLM-RoBERTa's tokenizer.json has 17 MB.
const maxSmallFile = 256 << 20

// readSmall reads a file that is held in memory whole.
func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSmallFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxSmallFile {
		return nil, damaged(filepath.Base(path), fmt.Sprintf("has more than %d bytes", maxSmallFile), nil)
	}
	return data, nil
}

// source is a checkpoint directory and the files of it that were used.
type source struct {
	dir  string
	used []string
}

// json reads one JSON file into v; found is false when there is no such file.
func (s *source) json(name string, v any) (found bool, err error) {
	data, found, err := s.bytes(name)
	if err != nil || !found {
		return found, err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return true, damaged(name, "is not the JSON that is expected there", err)
	}
	return true, nil
}

func (s *source) bytes(name string) (data []byte, found bool, err error) {
	data, err = readSmall(filepath.Join(s.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, true, fmt.Errorf("reading %s: %w", name, err)
	}
	s.use(name)
	return data, true, nil
}

func (s *source) use(name string) {
	if !slices.Contains(s.used, name) {
		s.used = append(s.used, name)
	}
}

// encoderConfig is the part of config.json that shapes the graph.
type encoderConfig struct {
	Architectures         []string `json:"architectures"`
	ModelType             string   `json:"model_type"`
	HiddenSize            int      `json:"hidden_size"`
	NumHiddenLayers       int      `json:"num_hidden_layers"`
	NumAttentionHeads     int      `json:"num_attention_heads"`
	IntermediateSize      int      `json:"intermediate_size"`
	HiddenAct             string   `json:"hidden_act"`
	LayerNormEps          float64  `json:"layer_norm_eps"`
	MaxPositionEmbeddings int      `json:"max_position_embeddings"`
	PositionEmbeddingType string   `json:"position_embedding_type"`
	TypeVocabSize         int      `json:"type_vocab_size"`
	VocabSize             int      `json:"vocab_size"`
	PadTokenID            *int     `json:"pad_token_id"`
	IsDecoder             bool     `json:"is_decoder"`
	AddCrossAttention     bool     `json:"add_cross_attention"`
}

// description is everything about a checkpoint but its weights.
type description struct {
	cfg           encoderConfig
	arch          string
	padID         int // for positions
	posOffset     int
	pooling       string
	maxTokens     int
	maxTokensFrom string
	special       SpecialTokens
	tokenizer     []byte
	m3            bool // has BGE-M3's sparse and ColBERT heads
	colbertDim    int
}

// describe reads a checkpoint's configuration.
func describe(src *source) (*description, error) {
	d := &description{}
	found, err := src.json("config.json", &d.cfg)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, corpus.Errorf(corpus.NotFound, "checkpoint_not_found",
			"%s holds no checkpoint (no config.json); name the directory of a Hugging Face model", src.dir)
	}
	for _, step := range []func(*source) error{
		d.readArchitecture, d.readHeads, d.readPooling, d.readTokenizer, d.readMaxTokens,
	} {
		if err := step(src); err != nil {
			return nil, err
		}
	}
	return d, nil
}

func (d *description) readArchitecture(*source) error {
	c := &d.cfg
	switch {
	case len(c.Architectures) == 1 && c.Architectures[0] == "BertModel" && c.ModelType == "bert":
		d.arch = archBERT
	case len(c.Architectures) == 1 && c.Architectures[0] == "XLMRobertaModel" && c.ModelType == "xlm-roberta":
		d.arch = archXLMR
	default:
		return unsupported("config.json declares architecture %q of type %q; BertModel (bert) and XLMRobertaModel (xlm-roberta) can be built",
			strings.Join(c.Architectures, ", "), c.ModelType)
	}
	if c.TypeVocabSize == 0 && d.arch == archBERT {
		c.TypeVocabSize = 2
	}
	if c.TypeVocabSize == 0 {
		c.TypeVocabSize = 1
	}
	for _, f := range []struct {
		name string
		v    int
		most int
	}{
		{"hidden_size", c.HiddenSize, 1 << 14},
		{"num_hidden_layers", c.NumHiddenLayers, 1 << 10},
		{"num_attention_heads", c.NumAttentionHeads, 1 << 10},
		{"intermediate_size", c.IntermediateSize, 1 << 17},
		{"max_position_embeddings", c.MaxPositionEmbeddings, 1 << 20},
		{"type_vocab_size", c.TypeVocabSize, 1 << 10},
		{"vocab_size", c.VocabSize, 1 << 24},
	} {
		if f.v < 1 || f.v > f.most {
			return damaged("config.json", fmt.Sprintf("has %s %d, which is not between 1 and %d", f.name, f.v, f.most), nil)
		}
	}
	switch {
	case c.HiddenSize%c.NumAttentionHeads != 0:
		return damaged("config.json", "has a hidden_size that its attention heads do not divide", nil)
	case c.HiddenAct != "gelu":
		return unsupported("config.json declares hidden_act %q; gelu (the exact one) can be built", c.HiddenAct)
	case c.PositionEmbeddingType != "" && c.PositionEmbeddingType != "absolute":
		return unsupported("config.json declares position_embedding_type %q; absolute positions can be built", c.PositionEmbeddingType)
	case c.IsDecoder || c.AddCrossAttention:
		return unsupported("config.json declares a decoder; encoders can be built")
	}
	if c.LayerNormEps == 0 {
		c.LayerNormEps = 1e-12 // transformers' default for BERT and XLM-RoBERTa
	}
	if !(c.LayerNormEps > 0 && c.LayerNormEps < 1) {
		return damaged("config.json", "has a layer_norm_eps that is not between 0 and 1", nil)
	}
	if d.arch == archXLMR {
		d.padID = 1 // transformers' default
		if c.PadTokenID != nil {
			d.padID = *c.PadTokenID
		}
		if d.padID < 0 || d.padID >= c.VocabSize || d.padID+1 >= c.MaxPositionEmbeddings {
			return damaged("config.json", fmt.Sprintf("has pad_token_id %d, which leaves no positions", d.padID), nil)
		}
		d.posOffset = d.padID + 1
	}
	return nil
}

// The files of BGE-M3's two further heads.
const (
	sparseFile  = "sparse_linear.pt"
	colbertFile = "colbert_linear.pt"

	sparseWeight  = headPrefix + sparseFile + ".weight"
	sparseBias    = headPrefix + sparseFile + ".bias"
	colbertWeight = headPrefix + colbertFile + ".weight"
	colbertBias   = headPrefix + colbertFile + ".bias"
)

// readHeads decides whether this is a BGE-M3. Half of its heads is a damaged download.
func (d *description) readHeads(src *source) error {
	var there []string
	for _, f := range []string{sparseFile, colbertFile} {
		if _, err := os.Stat(filepath.Join(src.dir, f)); err == nil {
			there = append(there, f)
		}
	}
	if len(there) == 1 {
		return damaged("the checkpoint", fmt.Sprintf("has %s but not the other head; BGE-M3 has both %s and %s: download it again", there[0], sparseFile, colbertFile), nil)
	}
	d.m3 = len(there) == 2
	return nil
}

// readColBERTWidth takes the width of ColBERT vectors from the head itself, as the reference
// does: it need not be the hidden size.
func (d *description) readColBERTWidth(ck *checkpoint) error {
	t := ck.tensors[colbertWeight]
	if t == nil {
		return missingTensor("weight in " + colbertFile)
	}
	if len(t.shape) != 2 || t.shape[0] < 1 || t.shape[0] > 1<<14 || t.shape[1] != d.cfg.HiddenSize {
		return damaged(colbertFile, fmt.Sprintf("has a weight of shape %v for a hidden size of %d", t.shape, d.cfg.HiddenSize), nil)
	}
	d.colbertDim = t.shape[0]
	return nil
}

// readPooling follows modules.json: an encoder, one pooling, perhaps a normalisation.
func (d *description) readPooling(src *source) error {
	var modules []struct {
		Path string `json:"path"`
		Type string `json:"type"`
	}
	found, err := src.json("modules.json", &modules)
	if err != nil {
		return err
	}
	if !found {
		if d.m3 { // FlagEmbedding's own rule, which needs no modules.json.
			d.pooling = poolCLS
			return nil
		}
		return unsupported("the checkpoint does not say how to pool (it has no modules.json); take it from a sentence-transformers model, or add modules.json and 1_Pooling/config.json")
	}
	for i, m := range modules {
		kind := m.Type[strings.LastIndexByte(m.Type, '.')+1:]
		switch {
		case i == 0 && kind == "Transformer" && m.Path == "":
		case i > 0 && kind == "Pooling" && d.pooling == "":
			if !filepath.IsLocal(m.Path) {
				return damaged("modules.json", fmt.Sprintf("names a path outside the checkpoint: %q", m.Path), nil)
			}
			if err := d.readPoolingConfig(src, filepath.ToSlash(filepath.Join(m.Path, "config.json"))); err != nil {
				return err
			}
		case i > 0 && kind == "Normalize" && d.pooling != "":
			// Vectors are normalised in any case.
		default:
			return unsupported("modules.json declares module %d of type %q; Transformer, Pooling and Normalize, in this order, can be built", i, m.Type)
		}
	}
	if d.pooling == "" {
		return unsupported("modules.json declares no pooling")
	}
	if d.m3 && d.pooling != poolCLS {
		return damaged("the checkpoint", fmt.Sprintf("has BGE-M3's heads but declares %s pooling; BGE-M3 pools by its first token", d.pooling), nil)
	}
	return nil
}

func (d *description) readPoolingConfig(src *source, name string) error {
	var fields map[string]any
	found, err := src.json(name, &fields)
	if err != nil {
		return err
	}
	if !found {
		return damaged(name, "is missing, and modules.json names it", nil)
	}
	known := map[string]string{
		"pooling_mode_cls_token":            poolCLS,
		"pooling_mode_mean_tokens":          poolMean,
		"pooling_mode_max_tokens":           poolMax,
		"pooling_mode_mean_sqrt_len_tokens": poolSqrtLen,
	}
	var modes []string
	for key, v := range fields {
		if on, isBool := v.(bool); !isBool || !on || !strings.HasPrefix(key, "pooling_mode_") {
			continue
		}
		mode, ok := known[key]
		if !ok {
			return unsupported("%s declares %s; cls, mean, max and mean_sqrt_len pooling can be built", name, key)
		}
		modes = append(modes, mode)
	}
	// Newer files name the mode in one field.
	if mode, ok := fields["pooling_mode"].(string); ok {
		if !slices.Contains([]string{poolCLS, poolMean, poolMax, poolSqrtLen}, mode) {
			return unsupported("%s declares pooling %q; cls, mean, max and mean_sqrt_len can be built", name, mode)
		}
		if !slices.Contains(modes, mode) {
			modes = append(modes, mode)
		}
	}
	if len(modes) != 1 {
		slices.Sort(modes)
		return unsupported("%s declares %d poolings (%s); exactly one can be built", name, len(modes), strings.Join(modes, ", "))
	}
	d.pooling = modes[0]
	return nil
}

// readMaxTokens takes the first limit declared, as sentence-transformers does, and never
// more than the model has positions for.
func (d *description) readMaxTokens(src *source) error {
	positions := d.cfg.MaxPositionEmbeddings - d.posOffset
	d.maxTokens, d.maxTokensFrom = positions, "config.json"
	var sbert struct {
		MaxSeqLength *int `json:"max_seq_length"`
	}
	if _, err := src.json("sentence_bert_config.json", &sbert); err != nil {
		return err
	}
	var tok struct {
		ModelMaxLength *float64 `json:"model_max_length"`
	}
	if _, err := src.json("tokenizer_config.json", &tok); err != nil {
		return err
	}
	switch {
	case sbert.MaxSeqLength != nil:
		if *sbert.MaxSeqLength < 3 {
			return damaged("sentence_bert_config.json", fmt.Sprintf("has max_seq_length %d; there must be room for a token between the special ones", *sbert.MaxSeqLength), nil)
		}
		if *sbert.MaxSeqLength < positions {
			d.maxTokens, d.maxTokensFrom = *sbert.MaxSeqLength, "sentence_bert_config.json"
		}
	case tok.ModelMaxLength != nil && *tok.ModelMaxLength >= 3 && *tok.ModelMaxLength < float64(positions):
		// transformers writes 1e30 for "no limit".
		d.maxTokens, d.maxTokensFrom = int(*tok.ModelMaxLength), "tokenizer_config.json"
	}
	if d.maxTokens < 3 {
		return damaged("config.json", fmt.Sprintf("leaves %d positions", d.maxTokens), nil)
	}
	return nil
}

// readTokenizer takes tokenizer.json without its own truncation and padding, which the
// embedder decides for each request, and finds the special tokens.
func (d *description) readTokenizer(src *source) error {
	data, found, err := src.bytes(TokenizerFile)
	if err != nil {
		return err
	}
	if !found {
		return unsupported("the checkpoint has no tokenizer.json; convert its tokenizer with transformers' save_pretrained (fast tokenizer)")
	}
	if d.tokenizer, err = withoutFields(data, "truncation", "padding"); err != nil {
		return damaged(TokenizerFile, "is not a tokenizer", err)
	}
	var tok struct {
		AddedTokens []struct {
			ID      int    `json:"id"`
			Content string `json:"content"`
		} `json:"added_tokens"`
	}
	if err := json.Unmarshal(data, &tok); err != nil {
		return damaged(TokenizerFile, "is not a tokenizer", err)
	}
	ids := map[string]int{}
	for _, t := range tok.AddedTokens {
		if t.ID < 0 || t.ID >= d.cfg.VocabSize {
			return damaged(TokenizerFile, fmt.Sprintf("gives a special token id %d and the model's vocabulary has %d rows", t.ID, d.cfg.VocabSize), nil)
		}
		ids[t.Content] = t.ID
	}
	names := map[string]string{"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
	if d.arch == archXLMR {
		names = map[string]string{"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
	}
	for _, file := range []string{"special_tokens_map.json", "tokenizer_config.json"} {
		var fields map[string]any
		if _, err := src.json(file, &fields); err != nil {
			return err
		}
		for key := range names {
			switch v := fields[key].(type) {
			case string:
				names[key] = v
			case map[string]any:
				if s, ok := v["content"].(string); ok {
					names[key] = s
				}
			}
		}
	}
	for _, s := range []struct {
		key      string
		id       *int
		optional bool
	}{
		{"cls_token", &d.special.CLS, false}, {"sep_token", &d.special.SEP, false},
		{"pad_token", &d.special.Pad, false}, {"unk_token", &d.special.Unk, false},
		{"mask_token", &d.special.Mask, true},
	} {
		id, ok := ids[names[s.key]]
		switch {
		case ok:
			*s.id = id
		case s.optional:
			*s.id = -1
		default:
			return damaged(TokenizerFile, fmt.Sprintf("has no added token %q for %s", names[s.key], s.key), nil)
		}
	}
	if d.arch == archXLMR && d.special.Pad != d.padID {
		return damaged(TokenizerFile, fmt.Sprintf("pads with id %d and config.json with %d", d.special.Pad, d.padID), nil)
	}
	return nil
}

// withoutFields sets top-level fields of a JSON object to null and keeps every other byte.
func withoutFields(data []byte, fields ...string) ([]byte, error) {
	dec := json.NewDecoder(strings.NewReader(string(data)))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	var out []byte
	kept := 0
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, err
		}
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return nil, err
		}
		if name, _ := key.(string); slices.Contains(fields, name) {
			end := int(dec.InputOffset())
			out = append(out, data[kept:end-len(raw)]...)
			out = append(out, "null"...)
			kept = end
		}
	}
	if _, err := dec.Token(); err != nil {
		return nil, err
	}
	return append(out, data[kept:]...), nil
}
