package httpapi

import (
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/labstack/echo/v4"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// The contract of text-embeddings-inference (TEI), as its clients use it. Unknown fields are
// ignored, as they are there; errors are {"error","error_type"}, always as JSON.

// inputsJSON is a string, a list of token ids, or a list of either: one input or many.
type inputsJSON struct {
	inputs []corpus.EmbedInput
	given  bool
}

// UnmarshalJSONFrom reads any of the forms. [1,2] is one input; [[1],[2]] are two.
func (in *inputsJSON) UnmarshalJSONFrom(dec *jsontext.Decoder) error {
	in.given = true
	raw, err := dec.ReadValue()
	if err != nil {
		return err
	}
	one := func(v jsontext.Value) (corpus.EmbedInput, error) {
		switch v.Kind() {
		case jsontext.KindString:
			var s string
			if err := json.Unmarshal(v, &s); err != nil {
				return corpus.EmbedInput{}, err
			}
			return corpus.EmbedInput{Text: s}, nil
		case jsontext.KindBeginArray:
			ids := []uint32{}
			if err := json.Unmarshal(v, &ids); err != nil {
				return corpus.EmbedInput{}, &fieldRefusal{"wrong_type", "token ids are integers from 0"}
			}
			return corpus.EmbedInput{Tokens: ids}, nil
		}
		return corpus.EmbedInput{}, &fieldRefusal{"wrong_type", "an input is a string or a list of token ids"}
	}
	if raw.Kind() != jsontext.KindBeginArray {
		i, err := one(raw)
		in.inputs = []corpus.EmbedInput{i}
		return err
	}
	var items []jsontext.Value
	if err := json.Unmarshal(raw, &items); err != nil {
		return err
	}
	if len(items) > 0 && items[0].Kind() == jsontext.KindNumber {
		i, err := one(raw)
		in.inputs = []corpus.EmbedInput{i}
		return err
	}
	in.inputs = make([]corpus.EmbedInput, len(items))
	for k, item := range items {
		if in.inputs[k], err = one(item); err != nil {
			return &fieldRefusal{"wrong_type", "input " + strconv.Itoa(k) + ": " + err.Error()}
		}
	}
	return nil
}

// check returns what is wrong with the inputs as a whole: none, too many, or empty ones. name
// is the field's, for pointers.
func (in *inputsJSON) check(name string) error {
	switch n := len(in.inputs); {
	case !in.given:
		return invalidField("/"+name, "required", "%s is missing", name)
	case n == 0:
		return emptyInput("/"+name, "%s cannot be empty", name)
	case n > maxForeignInputs:
		return invalidField("/"+name, "too_many", "batch size %d > maximum allowed batch size %d", n, maxForeignInputs)
	}
	for i := range in.inputs {
		if in.inputs[i].Text == "" && len(in.inputs[i].Tokens) == 0 {
			return emptyInput("/"+name+"/"+strconv.Itoa(i), "%s[%d] is empty; every input needs at least one character or token", name, i)
		}
	}
	return nil
}

func emptyInput(pointer, format string, args ...any) error {
	p := invalidField(pointer, "empty_input", format, args...)
	p.Status, p.Code = http.StatusBadRequest, "empty_input"
	return p
}

type teiJSON struct {
	Inputs     inputsJSON `json:"inputs"`
	Truncate   *bool      `json:"truncate"`
	Side       *string    `json:"truncation_direction"`
	PromptName *string    `json:"prompt_name"`
	Normalize  *bool      `json:"normalize"`
	Dimensions *int       `json:"dimensions"`
}

func (s *Server) teiRequest(in *teiJSON, heads corpus.Heads) (corpus.EmbedRequest, error) {
	spec := s.deps.Embedder.Spec()
	var none corpus.EmbedRequest
	if err := in.Inputs.check("inputs"); err != nil {
		return none, err
	}
	if !spec.Heads.Has(heads) {
		p := refuse(http.StatusFailedDependency, "output_unsupported", "the model %s has no %s output; it has %s", spec.Name, heads, strings.Join(spec.Heads.Names(), ", "))
		return none, p
	}
	if in.PromptName != nil {
		return none, invalidField("/prompt_name", "unknown_value", "the model has no prompt of that name")
	}
	side := strings.ToLower(deref(in.Side, "right"))
	if side != "right" && side != "left" {
		return none, invalidField("/truncation_direction", "unknown_value", "truncation_direction is Left or Right")
	}
	if d := in.Dimensions; d != nil && (*d < 1 || *d > spec.Dim) {
		return none, invalidField("/dimensions", "out_of_range", "dimensions is 1 to %d", spec.Dim)
	}
	return corpus.EmbedRequest{
		Inputs: in.Inputs.inputs, Heads: heads, Lane: laneFor(len(in.Inputs.inputs)),
		KeepEnd: side == "left", RefuseLong: !deref(in.Truncate, true),
	}, nil
}

// teiRun decodes, embeds and reports what TEI reports in headers.
func (s *Server) teiRun(c echo.Context, body []byte, heads corpus.Heads) ([]corpus.Embedding, *teiJSON, error) {
	began := time.Now()
	var in teiJSON
	if err := decode(body, &in, lenient); err != nil {
		return nil, nil, err
	}
	req, err := s.teiRequest(&in, heads)
	if err != nil {
		return nil, nil, err
	}
	characters := 0
	for i := range req.Inputs {
		characters += utf8.RuneCountInString(req.Inputs[i].Text)
	}
	out, err := s.embedAll(c.Request().Context(), req, "/inputs/")
	if err != nil {
		return nil, nil, err
	}
	tokens := 0
	for i := range out {
		tokens += out[i].Tokens
	}
	h := c.Response().Header()
	h.Set("X-Compute-Type", computeType(s.deps.Embedder.Spec().Device))
	h.Set("X-Compute-Characters", strconv.Itoa(characters))
	h.Set("X-Compute-Tokens", strconv.Itoa(tokens))
	h.Set("X-Total-Time", strconv.FormatInt(time.Since(began).Milliseconds(), 10))
	return out, &in, nil
}

func computeType(device string) string {
	if device == "" || device == "cpu" {
		return "cpu"
	}
	return "gpu+" + device
}

func (s *Server) teiEmbed(c echo.Context, body []byte) error {
	out, in, err := s.teiRun(c, body, corpus.Dense)
	raw := err == nil && !deref(in.Normalize, true)
	if raw {
		err = denormalise(out, "/inputs/", 0)
	}
	if err != nil {
		return err
	}
	w := newReply(c)
	w.list(len(out), func(b []byte, i int) []byte {
		row := out[i].Vectors.Dense
		switch {
		case in.Dimensions == nil || *in.Dimensions >= len(row):
		case raw:
			row = row[:*in.Dimensions]
		default:
			row = normalised(row, *in.Dimensions)
		}
		return appendFloats(b, row)
	})
	return w.end()
}

// teiEmbedAll answers one vector a token. TEI sends raw hidden states; this service has the
// model's ColBERT head, which was trained for the purpose and leaves the first token out.
func (s *Server) teiEmbedAll(c echo.Context) error {
	body, err := readBody(c)
	if err != nil {
		return err
	}
	var in teiJSON
	if err := decode(body, &in, lenient); err != nil {
		return err
	}
	req, err := s.teiRequest(&in, corpus.ColBERT)
	if err != nil {
		return err
	}
	spec := s.deps.Embedder.Spec()
	ctx := c.Request().Context()
	w := newReply(c)
	w.literal("[")
	// Group after group, so that memory does not grow with the reply.
	for from := 0; from < len(req.Inputs); {
		to := groupEnd(req, from, maxBatchSize, spec.MaxTokens)
		part := req
		part.Inputs = append([]corpus.EmbedInput(nil), req.Inputs[from:to]...)
		out, err := s.embedAll(ctx, part, "/inputs/")
		if err != nil {
			return err
		}
		for i := range out {
			if from+i > 0 {
				w.literal(",")
			}
			w.append(func(b []byte) []byte { return appendRows(b, out[i].Vectors.ColBERT) })
		}
		if w.err != nil {
			return w.err
		}
		from = to
	}
	w.literal("]")
	return w.end()
}

func (s *Server) teiEmbedSparse(c echo.Context) error {
	body, err := readBody(c)
	if err != nil {
		return err
	}
	out, _, err := s.teiRun(c, body, corpus.SparseHead)
	if err != nil {
		return err
	}
	w := newReply(c)
	w.list(len(out), func(b []byte, i int) []byte {
		v := out[i].Vectors.Sparse
		b = append(b, '[')
		for k := range v.Indices {
			if k > 0 {
				b = append(b, ',')
			}
			b = append(b, `{"index":`...)
			b = strconv.AppendUint(b, uint64(v.Indices[k]), 10)
			b = append(b, `,"value":`...)
			b = appendFloat(b, v.Values[k])
			b = append(b, '}')
		}
		return append(b, ']')
	})
	return w.end()
}

type teiTokenJSON struct {
	ID      uint32 `json:"id"`
	Text    string `json:"text"`
	Special bool   `json:"special"`
	Start   *int   `json:"start"`
	Stop    *int   `json:"stop"`
}

func (s *Server) teiTokenize(c echo.Context) error {
	body, err := readBody(c)
	if err != nil {
		return err
	}
	var in struct {
		Inputs           oneOrMany `json:"inputs"`
		AddSpecialTokens *bool     `json:"add_special_tokens"`
		PromptName       *string   `json:"prompt_name"`
	}
	if err := decode(body, &in, lenient); err != nil {
		return err
	}
	switch n := len(in.Inputs); {
	case n == 0:
		return emptyInput("/inputs", "inputs cannot be empty")
	case n > maxForeignInputs:
		return invalidField("/inputs", "too_many", "batch size %d > maximum allowed batch size %d", n, maxForeignInputs)
	case in.PromptName != nil:
		return invalidField("/prompt_name", "unknown_value", "the model has no prompt of that name")
	}
	out := make([][]teiTokenJSON, len(in.Inputs))
	for i, text := range in.Inputs {
		if text == "" {
			return emptyInput("/inputs/"+strconv.Itoa(i), "inputs[%d] is empty", i)
		}
		if out[i], err = s.tokensOf(c, text, deref(in.AddSpecialTokens, true)); err != nil {
			return err
		}
	}
	return writeJSON(c, http.StatusOK, out)
}

// tokensOf lists a text's tokens with their places, counted in characters as TEI counts them.
func (s *Server) tokensOf(c echo.Context, text string, special bool) ([]teiTokenJSON, error) {
	ctx := c.Request().Context()
	ids, err := s.deps.Embedder.Tokenize(ctx, text)
	if err != nil {
		return nil, err
	}
	spans, err := s.deps.Embedder.Tokens(ctx, text)
	if err != nil {
		return nil, err
	}
	// Encoders of the families this service runs put as many special tokens before a text as
	// after it, or one more before.
	extra := len(ids) - len(spans)
	if extra < 0 {
		return nil, corpus.Errorf(corpus.Internal, "tokenizer_mismatch", "the tokenizer gave %d tokens but %d places", len(ids), len(spans))
	}
	opening := (extra + 1) / 2
	out := make([]teiTokenJSON, 0, len(ids))
	// Spans ascend, so characters are counted once over the text; a span that steps back
	// (byte fallback repeats one) starts over from the nearest known place.
	at, chars := 0, 0
	charsTo := func(b int) int {
		if b < at {
			at, chars = 0, 0
		}
		chars += utf8.RuneCountInString(text[at:b])
		at = b
		return chars
	}
	for i, id := range ids {
		k := i - opening
		if k < 0 || k >= len(spans) {
			if special {
				out = append(out, teiTokenJSON{ID: id, Special: true})
			}
			continue
		}
		start, stop := charsTo(spans[k].Start), charsTo(spans[k].End)
		out = append(out, teiTokenJSON{ID: id, Text: strings.ToValidUTF8(text[spans[k].Start:spans[k].End], "\uFFFD"), Start: &start, Stop: &stop})
	}
	return out, nil
}

func (s *Server) teiInfo(c echo.Context) error {
	spec := s.deps.Embedder.Spec()
	workers := s.cfg.TokenizerWorkers
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	dtype := spec.Precision
	switch dtype {
	case "fp32":
		dtype = "float32"
	case "fp16":
		dtype = "float16"
	}
	type embeddingModel struct {
		Pooling string `json:"pooling,omitempty"`
	}
	info := struct {
		ModelID      string `json:"model_id"`
		ModelSHA     string `json:"model_sha"`
		ModelDtype   string `json:"model_dtype"`
		ServedName   string `json:"served_model_name"`
		ModelType    any    `json:"model_type"`
		MaxRequests  int    `json:"max_concurrent_requests"`
		MaxInput     int    `json:"max_input_length"`
		MaxTokens    int    `json:"max_batch_tokens"`
		MaxBatch     *int   `json:"max_batch_requests"`
		MaxClient    int    `json:"max_client_batch_size"`
		AutoTruncate bool   `json:"auto_truncate"`
		Workers      int    `json:"tokenization_workers"`
		Version      string `json:"version"`
		SHA          string `json:"sha,omitempty"`
		// What TEI does not tell.
		Device     string   `json:"device"`
		Outputs    []string `json:"outputs"`
		Dimensions int      `json:"dimensions"`
	}{
		ModelID: spec.Name, ModelSHA: spec.Fingerprint, ModelDtype: dtype, ServedName: spec.Name,
		ModelType:   map[string]embeddingModel{"embedding": {}},
		MaxRequests: s.cfg.MaxRequests, MaxInput: spec.MaxTokens, MaxTokens: s.cfg.MaxBatchTokens,
		MaxClient: maxForeignInputs, AutoTruncate: true, Workers: workers, Version: s.cfg.Version,
		Device: spec.Device, Outputs: spec.Heads.Names(), Dimensions: spec.Dim,
	}
	return writeJSON(c, http.StatusOK, &info)
}

// writeTEIProblem renders {"error","error_type"}.
func (s *Server) writeTEIProblem(c echo.Context, p *problem) error {
	kind := "Backend"
	switch p.Status {
	case http.StatusUnprocessableEntity, http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType, http.StatusNotFound, http.StatusMethodNotAllowed:
		kind = "Validation"
	case http.StatusBadRequest:
		kind = "Validation"
		if p.Code == "empty_input" {
			kind = "Empty"
		}
	case http.StatusUnauthorized, http.StatusForbidden:
		kind = "Unauthorized"
	case http.StatusTooManyRequests:
		kind = "Overloaded"
	case http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		kind = "Unhealthy"
	}
	return writeJSON(c, p.Status, struct {
		Error     string `json:"error"`
		ErrorType string `json:"error_type"`
		Code      string `json:"code"`
		RequestID string `json:"request_id"`
	}{p.plainDetail(), kind, p.Code, p.RequestID})
}
