package httpapi

import (
	"bytes"
	"context"
	"fmt"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/labstack/echo/v4"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Limits of the contract.
const (
	maxEmbedTexts = 1000
	maxBatchSize  = 128
	// maxForeignInputs is for the contracts of other products: OpenAI's own limit.
	maxForeignInputs = 2048
	// groupTokens bounds the token vectors that are held while a ColBERT reply is streamed:
	// 16,384 tokens of 1,024 values are 64 MiB, and two groups are held at most.
	groupTokens = 16_384
)

type embedJSON struct {
	Texts      []string  `json:"texts"`
	OutputType oneOrMany `json:"output_type"`
	Normalize  *bool     `json:"normalize"`
	MaxLength  *int      `json:"max_length"`
	BatchSize  *int      `json:"batch_size"`
	Encoding   string    `json:"encoding"`
	// Truncate false makes a longer text an error; Side says where to cut.
	Truncate *bool  `json:"truncate"`
	Side     string `json:"truncation_direction"`
}

const mediaBytes = "application/octet-stream"

// embed is the native contract, or, with inputs instead of texts, that of
// text-embeddings-inference.
func (s *Server) embed(c echo.Context) error {
	if err := refuseUnknownQuery(c); err != nil {
		return err
	}
	body, err := readBody(c)
	if err != nil {
		return err
	}
	if firstOf(body, "inputs", "texts") == "inputs" {
		setFlavour(c, tei)
		return s.teiEmbed(c, body)
	}
	var in embedJSON
	if err := decode(body, &in, strict); err != nil {
		return err
	}
	binary := wantsBytes(c.Request().Header.Get("Accept"))
	job, err := s.embedJob(&in, binary)
	if err != nil {
		return err
	}
	if job.heads.Has(corpus.ColBERT) {
		return s.streamEmbeddings(c, job)
	}
	out, err := s.embedAll(c.Request().Context(), job.request, "/texts/")
	if err == nil && job.raw {
		err = denormalise(out, "/texts/", 0)
	}
	if err != nil {
		return err
	}
	if binary {
		return writeBytes(c, out, s.deps.Embedder.Spec().Dim)
	}
	w := newReply(c)
	w.literal(`{`)
	if job.heads.Has(corpus.Dense) {
		w.key("embeddings")
		w.list(len(out), func(b []byte, i int) []byte { return job.appendVector(b, out[i].Vectors.Dense) })
	}
	if job.heads.Has(corpus.SparseHead) {
		w.key("sparse")
		w.list(len(out), func(b []byte, i int) []byte { return appendWeights(b, out[i].Vectors.Sparse) })
	}
	return s.finishEmbeddings(w, out)
}

// embedJob is a validated request.
type embedJob struct {
	request corpus.EmbedRequest
	heads   corpus.Heads
	batch   int
	base64  bool
	// raw asks for dense vectors as they were before they got length 1.
	raw     bool
	scratch []byte
}

func (j *embedJob) appendVector(b []byte, row []float32) []byte {
	if !j.base64 {
		return appendFloats(b, row)
	}
	b, j.scratch = appendBase64(b, j.scratch, row)
	return b
}

func (j *embedJob) appendMatrix(b []byte, rows [][]float32) []byte {
	if !j.base64 {
		return appendRows(b, rows)
	}
	b, j.scratch = appendBase64(b, j.scratch, rows...)
	return b
}

func (s *Server) embedJob(in *embedJSON, binary bool) (*embedJob, error) {
	spec := s.deps.Embedder.Spec()
	var bad []corpus.FieldError
	fault := func(pointer, code, format string, args ...any) {
		if len(bad) < maxFieldErrors {
			bad = append(bad, corpus.FieldError{Pointer: pointer, Code: code, Detail: fmt.Sprintf(format, args...)})
		}
	}
	switch n := len(in.Texts); {
	case n == 0:
		fault("/texts", "empty_input", "give 1 to %d texts", maxEmbedTexts)
	case n > maxEmbedTexts:
		fault("/texts", "too_many", "%d texts; at most %d are taken at once", n, maxEmbedTexts)
	}
	for i, text := range in.Texts {
		if text == "" {
			fault("/texts/"+strconv.Itoa(i), "empty_text", "the text is empty")
		}
	}
	job := &embedJob{batch: deref(in.BatchSize, 32)}
	if in.OutputType == nil {
		job.heads = corpus.Dense
	} else if len(in.OutputType) == 0 {
		fault("/output_type", "empty_input", "name at least one of dense, sparse and colbert")
	}
	for i, name := range in.OutputType {
		at := "/output_type"
		if len(in.OutputType) > 1 {
			at += "/" + strconv.Itoa(i)
		}
		h, ok := corpus.ParseHead(name)
		switch {
		case !ok:
			fault(at, "unknown_value", "output_type names dense, sparse and colbert")
		case !spec.Heads.Has(h):
			fault(at, "output_unsupported", "the model %s has no %s output; it has %s", spec.Name, name, strings.Join(spec.Heads.Names(), ", "))
		}
		job.heads |= h
	}
	if n := deref(in.MaxLength, spec.MaxTokens); n < 1 || n > spec.MaxTokens {
		fault("/max_length", "out_of_range", "max_length is 1 to %d, the model's maximum", spec.MaxTokens)
	}
	if job.batch < 1 || job.batch > maxBatchSize {
		fault("/batch_size", "out_of_range", "batch_size is 1 to %d", maxBatchSize)
	}
	job.raw = !deref(in.Normalize, true)
	switch in.Encoding {
	case "", "float":
	case "base64":
		job.base64 = true
	default:
		fault("/encoding", "unknown_value", "encoding is float or base64")
	}
	switch in.Side {
	case "", "right", "left":
	default:
		fault("/truncation_direction", "unknown_value", "truncation_direction is right or left")
	}
	if binary && job.heads != corpus.Dense {
		fault("/output_type", "not_applicable", "%s carries dense vectors only", mediaBytes)
	}
	if len(bad) > 0 {
		return nil, invalidFields(bad)
	}
	job.request = corpus.EmbedRequest{
		Inputs: make([]corpus.EmbedInput, len(in.Texts)), Heads: job.heads, Lane: laneFor(len(in.Texts)),
		MaxTokens: deref(in.MaxLength, 0), KeepEnd: in.Side == "left", RefuseLong: !deref(in.Truncate, true),
	}
	for i, text := range in.Texts {
		job.request.Inputs[i].Text = text
	}
	return job, nil
}

// laneFor guesses who waits: a handful of texts is a query, more is a load.
func laneFor(texts int) corpus.Lane {
	if texts <= 4 { // unmeasured
		return corpus.Query
	}
	return corpus.Bulk
}

// wantsBytes reports whether the caller prefers octets to JSON.
func wantsBytes(accept string) bool {
	for part := range strings.SplitSeq(accept, ",") {
		mt, params, err := mime.ParseMediaType(strings.TrimSpace(part))
		if err != nil {
			continue
		}
		switch mt {
		case mediaBytes:
			return params["q"] != "0"
		case mediaJSON:
			return false
		}
	}
	return false
}

// firstOf returns which of the names is the first member of the object, or "". It reads no
// further than that, and leaves complaints about the JSON to the decoder.
func firstOf(body []byte, names ...string) string {
	dec := jsontext.NewDecoder(bytes.NewReader(body))
	if tok, err := dec.ReadToken(); err != nil || tok.Kind() != jsontext.KindBeginObject {
		return ""
	}
	for {
		tok, err := dec.ReadToken()
		if err != nil || tok.Kind() != jsontext.KindString {
			return ""
		}
		if name := tok.String(); slices.Contains(names, name) {
			return name
		}
		if dec.SkipValue() != nil {
			return ""
		}
	}
}

// embedAll computes every input and turns the failure of one into that of the request: these
// contracts have no place for an error beside vectors. Pointers are at plus the index.
func (s *Server) embedAll(ctx context.Context, req corpus.EmbedRequest, at string) ([]corpus.Embedding, error) {
	out, err := s.deps.Embedder.Embed(ctx, req)
	if err != nil {
		return nil, err
	}
	if len(out) != len(req.Inputs) {
		return nil, fmt.Errorf("the embedder answered %d embeddings for %d inputs", len(out), len(req.Inputs))
	}
	return out, checkEmbeddings(out, req.Heads, at, 0)
}

// checkEmbeddings refuses to send anything that is not a number, or lacks what was asked for.
func checkEmbeddings(out []corpus.Embedding, heads corpus.Heads, at string, first int) error {
	for i := range out {
		pointer := at + strconv.Itoa(first+i)
		if err := out[i].Err; err != nil {
			p := toProblem(err)
			if len(p.Errors) == 0 {
				p.Errors = []corpus.FieldError{{Pointer: pointer, Code: p.Code, Detail: p.Detail}}
			}
			p.Detail = pointer + ": " + p.Detail
			p.cause = err
			return p
		}
		if v := &out[i].Vectors; v.Heads()&heads != heads || !v.Finite() {
			return badEmbedding(pointer, fmt.Errorf("embedding %s lacks %s or is not finite", pointer, heads))
		}
	}
	return nil
}

func badEmbedding(pointer string, cause error) *problem {
	p := refuse(http.StatusInternalServerError, "bad_embedding", "%s: the model's answer for this text is not usable", pointer)
	p.Errors = []corpus.FieldError{{Pointer: pointer, Code: p.Code, Detail: "no usable vectors"}}
	p.cause = cause
	return p
}

// denormalise gives dense vectors back the lengths they had before they were normalised, in
// place: an embedding belongs to whoever asked for it.
func denormalise(out []corpus.Embedding, at string, first int) error {
	for i := range out {
		v := &out[i].Vectors
		if v.DenseNorm == 0 && !zero(v.Dense) {
			pointer := at + strconv.Itoa(first+i)
			return badEmbedding(pointer, fmt.Errorf("embedding %s does not tell its length before normalisation", pointer))
		}
		for k := range v.Dense {
			v.Dense[k] *= v.DenseNorm
		}
	}
	return nil
}

// writeBytes sends dense rows as little-endian float32.
func writeBytes(c echo.Context, out []corpus.Embedding, dim int) error {
	h := c.Response().Header()
	h.Set("X-Embedding-Shape", strconv.Itoa(len(out))+","+strconv.Itoa(dim))
	h.Set("Content-Length", strconv.Itoa(4*dim*len(out)))
	w := newReply(c)
	w.contentType = mediaBytes
	for i := range out {
		if len(out[i].Vectors.Dense) != dim {
			return fmt.Errorf("row %d has %d values, not %d", i, len(out[i].Vectors.Dense), dim)
		}
		w.append(func(b []byte) []byte { return appendLittleEndian(b, out[i].Vectors.Dense) })
	}
	return w.end()
}

// finishEmbeddings appends what follows the vectors and ends the reply.
func (s *Server) finishEmbeddings(w *reply, out []corpus.Embedding) error {
	spec := s.deps.Embedder.Spec()
	w.key("tokens")
	w.list(len(out), func(b []byte, i int) []byte { return strconv.AppendInt(b, int64(out[i].Tokens), 10) })
	w.key("original_tokens")
	w.list(len(out), func(b []byte, i int) []byte { return strconv.AppendInt(b, int64(out[i].OriginalTokens), 10) })
	w.key("truncated")
	w.list(len(out), func(b []byte, i int) []byte {
		return strconv.AppendBool(b, out[i].Tokens < out[i].OriginalTokens)
	})
	w.key("model")
	w.append(func(b []byte) []byte {
		b, err := jsontext.AppendQuote(b, spec.Name)
		if err != nil {
			return append(b, `""`...)
		}
		return b
	})
	w.key("dimensions")
	w.append(func(b []byte) []byte { return strconv.AppendInt(b, int64(spec.Dim), 10) })
	w.literal("}\n")
	return w.end()
}

// streamEmbeddings answers a request for token vectors group by group: the next group is
// computed while the last is sent, and at most two are held. What is small (dense, sparse,
// counts) follows at the end. An error after the first group cuts the reply short, which a
// client sees as a broken transfer, never as a complete answer.
func (s *Server) streamEmbeddings(c echo.Context, job *embedJob) error {
	ctx, cancel := context.WithCancel(c.Request().Context())
	defer cancel()
	type group struct {
		out []corpus.Embedding
		err error
	}
	groups := make(chan group)
	spec := s.deps.Embedder.Spec()
	all := job.request
	go func() {
		defer close(groups)
		for from := 0; from < len(all.Inputs); {
			to := groupEnd(all, from, job.batch, spec.MaxTokens)
			part := all
			part.Inputs = slices.Clone(all.Inputs[from:to])
			out, err := s.deps.Embedder.Embed(ctx, part)
			if err == nil {
				if len(out) != to-from {
					err = fmt.Errorf("the embedder answered %d embeddings for %d inputs", len(out), to-from)
				} else {
					err = checkEmbeddings(out, job.heads, "/texts/", from)
				}
				if err == nil && job.raw {
					err = denormalise(out, "/texts/", from)
				}
			}
			select {
			case groups <- group{out, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
			from = to
		}
	}()
	defer func() {
		cancel()
		for range groups { //nolint:revive // waits until the goroutine has ended
		}
	}()

	w := newReply(c)
	w.literal(`{"colbert":[`)
	w.more = true
	small := make([]corpus.Embedding, 0, len(all.Inputs))
	for g := range groups {
		if g.err != nil {
			return g.err
		}
		for i := range g.out {
			if len(small) > 0 {
				w.literal(",")
			}
			w.append(func(b []byte) []byte { return job.appendMatrix(b, g.out[i].Vectors.ColBERT) })
			g.out[i].Vectors.ColBERT = nil
			small = append(small, g.out[i])
		}
		if w.err != nil {
			return w.err
		}
	}
	if len(small) != len(all.Inputs) {
		return context.Cause(ctx)
	}
	w.literal("]")
	if job.heads.Has(corpus.Dense) {
		w.key("embeddings")
		w.list(len(small), func(b []byte, i int) []byte { return job.appendVector(b, small[i].Vectors.Dense) })
	}
	if job.heads.Has(corpus.SparseHead) {
		w.key("sparse")
		w.list(len(small), func(b []byte, i int) []byte { return appendWeights(b, small[i].Vectors.Sparse) })
	}
	return s.finishEmbeddings(w, small)
}

// groupEnd returns where the group that starts at from ends: at most batch texts and about
// groupTokens tokens, at least one text. A token has at least about two bytes on average in
// any language; what is longer is cut to the limit anyway.
func groupEnd(req corpus.EmbedRequest, from, batch, modelMax int) int {
	limit := modelMax
	if req.MaxTokens > 0 {
		limit = req.MaxTokens
	}
	tokens := 0
	to := from
	for to < len(req.Inputs) && to-from < batch {
		tokens += min(len(req.Inputs[to].Text)/2+3, limit)
		if to > from && tokens > groupTokens {
			break
		}
		to++
	}
	return to
}

// reply builds a large reply in a buffer that is sent whenever it is full, so that memory
// does not grow with the reply. Nothing is sent before the first sendAt bytes, so an early
// error still gets a status of its own. The first error sticks and ends all work.
type reply struct {
	c           echo.Context
	buf         []byte
	contentType string
	more        bool // a member was written: the next key needs a comma
	sent        bool
	err         error
}

// sendAt is when the buffer is sent. 64 KiB and 1 MiB gave the same rate; 256 KiB holds a
// usual reply whole.
const sendAt = 256 << 10

func newReply(c echo.Context) *reply { return &reply{c: c, contentType: mediaJSON} }

func (w *reply) append(add func([]byte) []byte) {
	if w.err != nil {
		return
	}
	w.buf = add(w.buf)
	if len(w.buf) >= sendAt {
		w.send()
	}
}

func (w *reply) literal(s string) {
	w.append(func(b []byte) []byte { return append(b, s...) })
}

func (w *reply) key(name string) {
	if w.more {
		w.literal(",")
	}
	w.more = true
	w.literal(`"` + name + `":`)
}

func (w *reply) list(n int, item func(b []byte, i int) []byte) {
	w.literal("[")
	for i := range n {
		w.append(func(b []byte) []byte {
			if i > 0 {
				b = append(b, ',')
			}
			return item(b, i)
		})
	}
	w.literal("]")
}

func (w *reply) send() {
	r := w.c.Response()
	if !w.sent {
		w.sent = true
		r.Header().Set("Content-Type", w.contentType)
		r.WriteHeader(http.StatusOK)
	}
	// A reader that takes this long for one buffer is gone.
	deadline(http.NewResponseController(r).SetWriteDeadline, writeTime)
	_, w.err = r.Write(w.buf)
	w.buf = w.buf[:0]
}

// end sends the rest.
func (w *reply) end() error {
	if w.err == nil && (len(w.buf) > 0 || !w.sent) {
		w.send()
	}
	return w.err
}

var _ json.UnmarshalerFrom = (*oneOrMany)(nil)
