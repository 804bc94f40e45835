package httpapi

import (
	"net/http"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/labstack/echo/v4"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// The contract of OpenAI's embeddings. Unknown fields are ignored: its clients send their own.

type openAIJSON struct {
	Input          inputsJSON `json:"input"`
	Model          *string    `json:"model"`
	EncodingFormat *string    `json:"encoding_format"`
	Dimensions     *int       `json:"dimensions"`
}

// openAIEmbeddings refuses a longer text than the model takes, as OpenAI does; it never cuts
// in silence. Token ids are the model's own, special tokens included, and are used as they
// are: ids of another vocabulary (cl100k) give another text's vector, or are out of range.
func (s *Server) openAIEmbeddings(c echo.Context) error {
	body, err := readBody(c)
	if err != nil {
		return err
	}
	var in openAIJSON
	if err := decode(body, &in, lenient); err != nil {
		return err
	}
	spec := s.deps.Embedder.Spec()
	if in.Model != nil && *in.Model != "" && *in.Model != spec.Name {
		return modelNotFound(*in.Model, spec.Name)
	}
	if err := in.Input.check("input"); err != nil {
		return err
	}
	base64 := false
	switch deref(in.EncodingFormat, "float") {
	case "float":
	case "base64":
		base64 = true
	default:
		return invalidField("/encoding_format", "unknown_value", "encoding_format is float or base64")
	}
	// A prefix of the vector, scaled to length 1 again. Models that were not trained for it
	// lose quality; asking for it is the caller's choice.
	dim := deref(in.Dimensions, spec.Dim)
	if dim < 1 || dim > spec.Dim {
		return invalidField("/dimensions", "out_of_range", "dimensions is 1 to %d", spec.Dim)
	}
	out, err := s.embedAll(c.Request().Context(), corpus.EmbedRequest{
		Inputs: in.Input.inputs, Heads: corpus.Dense, Lane: laneFor(len(in.Input.inputs)), RefuseLong: true,
	}, "/input/")
	if err != nil {
		return err
	}
	tokens := 0
	for i := range out {
		tokens += out[i].Tokens
	}
	name, err := jsontext.AppendQuote(nil, spec.Name)
	if err != nil {
		return err
	}
	w := newReply(c)
	w.literal(`{"object":"list","data":`)
	var scratch []byte
	w.list(len(out), func(b []byte, i int) []byte {
		b = append(b, `{"object":"embedding","index":`...)
		b = strconv.AppendInt(b, int64(i), 10)
		b = append(b, `,"embedding":`...)
		row := out[i].Vectors.Dense
		if dim < len(row) {
			row = normalised(row, dim)
		}
		if base64 {
			b, scratch = appendBase64(b, scratch, row)
		} else {
			b = appendFloats(b, row)
		}
		return append(b, '}')
	})
	count := strconv.Itoa(tokens)
	w.literal(`,"model":` + string(name) + `,"usage":{"prompt_tokens":` + count + `,"total_tokens":` + count + `}}`)
	return w.end()
}

func modelNotFound(asked, have string) error {
	p := refuse(http.StatusNotFound, "model_not_found", "the model %q does not exist here; this service runs %q", asked, have)
	p.Errors = []corpus.FieldError{{Pointer: "/model", Code: p.Code, Detail: p.Detail}}
	return p
}

type openAIModelJSON struct {
	ID      string `json:"id"`
	Object  string `json:"object"`
	Created int64  `json:"created"`
	OwnedBy string `json:"owned_by"`
}

func (s *Server) model() openAIModelJSON {
	return openAIModelJSON{ID: s.deps.Embedder.Spec().Name, Object: "model", OwnedBy: "lockstep"}
}

func (s *Server) openAIModels(c echo.Context) error {
	return writeJSON(c, http.StatusOK, struct {
		Object string            `json:"object"`
		Data   []openAIModelJSON `json:"data"`
	}{"list", []openAIModelJSON{s.model()}})
}

func (s *Server) openAIModel(c echo.Context) error {
	m := s.model()
	if asked := c.Param("model"); asked != m.ID {
		return modelNotFound(asked, m.ID)
	}
	return writeJSON(c, http.StatusOK, m)
}

// writeOpenAIProblem renders OpenAI's envelope. What is 422 elsewhere is 400 here.
func (s *Server) writeOpenAIProblem(c echo.Context, p *problem) error {
	status, kind := p.Status, "invalid_request_error"
	code := p.Code
	switch {
	case status == http.StatusUnprocessableEntity:
		status = http.StatusBadRequest
	case status == http.StatusUnauthorized:
		code = "invalid_api_key"
	case status == http.StatusForbidden:
		kind = "permission_error"
	case status == http.StatusTooManyRequests:
		kind, code = "requests", "rate_limit_exceeded"
	case status >= 500:
		kind = "server_error"
	}
	var param *string
	if len(p.Errors) > 0 && p.Errors[0].Pointer != "" {
		name := openAIParam(p.Errors[0].Pointer)
		param = &name
		if p.Errors[0].Code != "" && code == "validation_failed" {
			code = p.Errors[0].Code
		}
	}
	type inner struct {
		Message string  `json:"message"`
		Type    string  `json:"type"`
		Param   *string `json:"param"`
		Code    string  `json:"code"`
	}
	return writeJSON(c, status, struct {
		Error inner `json:"error"`
	}{inner{p.plainDetail(), kind, param, code}})
}

// openAIParam turns /input/3 into input[3].
func openAIParam(pointer string) string {
	parts := strings.Split(strings.TrimPrefix(pointer, "/"), "/")
	out := parts[0]
	for _, p := range parts[1:] {
		if _, err := strconv.Atoi(p); err == nil {
			out += "[" + p + "]"
		} else {
			out += "." + p
		}
	}
	return out
}
