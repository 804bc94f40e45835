package httpapi

import (
	"bytes"
	"errors"
	"io"
	"mime"
	"net/http"
	"reflect"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/labstack/echo/v4"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

const (
	mediaJSON   = "application/json"
	mediaNDJSON = "application/x-ndjson"
)

// mediaType returns the body's type in lower case, without parameters, or the 415.
func mediaType(c echo.Context, accepted ...string) (string, error) {
	raw := c.Request().Header.Get("Content-Type")
	if enc := c.Request().Header.Get("Content-Encoding"); enc != "" && !strings.EqualFold(enc, "identity") {
		return "", refuse(http.StatusUnsupportedMediaType, "unsupported_encoding", "Content-Encoding %q is not accepted; send the body as it is", enc)
	}
	mt, params, err := mime.ParseMediaType(raw)
	if err == nil {
		for _, a := range accepted {
			if mt != a {
				continue
			}
			if cs := params["charset"]; cs != "" && !strings.EqualFold(cs, "utf-8") {
				return "", refuse(http.StatusUnsupportedMediaType, "unsupported_media_type", "charset %q is not accepted; JSON is UTF-8", cs)
			}
			return mt, nil
		}
	}
	given := "Content-Type " + strconv.Quote(raw) + " is not accepted here"
	if raw == "" {
		given = "the Content-Type header is missing"
	}
	return "", refuse(http.StatusUnsupportedMediaType, "unsupported_media_type", "%s; send %s", given, strings.Join(accepted, " or "))
}

// readBody returns the whole body of a JSON request, or 415 or 413. The limit is on the
// reader already (see [Server.limitBody]).
func readBody(c echo.Context) ([]byte, error) {
	if _, err := mediaType(c, mediaJSON); err != nil {
		return nil, err
	}
	r := c.Request()
	var b bytes.Buffer
	if n := r.ContentLength; n > 0 {
		// A caller may promise much and send little: believe it up to a megabyte.
		b.Grow(int(min(n, 1<<20)) + bytes.MinRead)
	}
	if _, err := b.ReadFrom(r.Body); err != nil {
		return nil, bodyReadError(err)
	}
	// The deadline was for the body. Past its end, net/http watches the connection, and would
	// take a deadline for a caller who left.
	_ = http.NewResponseController(c.Response()).SetReadDeadline(time.Time{})
	return b.Bytes(), nil
}

// bodyReadError tells a body that was too large from a caller that went away or was too slow.
func bodyReadError(err error) error {
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return err
	}
	p := refuse(http.StatusBadRequest, "body_incomplete", "the body ended before it was complete, or came too slowly")
	p.cause = err
	return p
}

// bind reads a JSON body into dst, refusing unknown fields, duplicate fields, trailing data,
// invalid UTF-8 and U+0000.
func bind(c echo.Context, dst any) error {
	body, err := readBody(c)
	if err != nil {
		return err
	}
	return decode(body, dst, strict)
}

// strictness says what becomes of fields that dst does not have.
type strictness bool

const (
	strict  strictness = true
	lenient strictness = false
)

// decode is bind without HTTP. Errors are problems with pointers.
func decode(body []byte, dst any, s strictness) error {
	if err := unmarshal(body, dst, s); err != nil {
		return err
	}
	return refuseNUL(body)
}

// unmarshal reads one JSON value and maps the decoder's errors; U+0000 passes.
func unmarshal(body []byte, dst any, s strictness) error {
	if len(bytes.TrimSpace(body)) == 0 {
		return refuse(http.StatusBadRequest, "invalid_json", "the body is empty; a JSON value was expected")
	}
	err := json.Unmarshal(body, dst, json.RejectUnknownMembers(bool(s)))
	if err != nil {
		return decodeProblem(err)
	}
	return refuseNullElements(body)
}

// refuseNullElements points at a null in a list. As a field it counts as left out, but the
// decoder would read it as zero in a list: encoders write NaN so, and a vector with a silent
// zero is worse than none. Metadata may hold what it likes.
func refuseNullElements(body []byte) error {
	if !bytes.Contains(body, []byte("null")) {
		return nil
	}
	dec := jsontext.NewDecoder(bytes.NewReader(body))
	for {
		tok, err := dec.ReadToken()
		if err != nil {
			return nil //nolint:nilerr // the end; anything else was found when the body was decoded
		}
		if tok.Kind() != jsontext.KindNull {
			continue
		}
		if kind, _ := dec.StackIndex(dec.StackDepth()); kind != jsontext.KindBeginArray {
			continue
		}
		at := dec.StackPointer()
		var path []string
		for t := range at.Tokens() {
			path = append(path, t)
		}
		if path[0] != "metadata" && (len(path) < 3 || path[2] != "metadata") {
			return invalidField(string(at), "wrong_type", "null is not accepted in a list")
		}
	}
}

// fieldRefusal is what the decoders of single fields return; the decoder adds the pointer.
type fieldRefusal struct {
	code, detail string
}

// Error returns the detail.
func (f *fieldRefusal) Error() string { return f.detail }

func decodeProblem(err error) *problem {
	var own *fieldRefusal
	var syn *jsontext.SyntacticError
	var sem *json.SemanticError
	var p *problem
	switch {
	case errors.As(err, &p):
		return p
	case errors.As(err, &syn):
		// A syntactic error may be wrapped in a semantic one: the inner has the exact place.
		return syntaxProblem(syn)
	case errors.As(err, &sem):
		pointer := string(sem.JSONPointer)
		switch {
		case errors.As(sem.Err, &own):
			return invalidField(pointer, own.code, "%s", own.detail)
		case errors.Is(sem.Err, json.ErrUnknownName):
			p := refuse(http.StatusBadRequest, "unknown_field", "%s: there is no such field", pointer)
			p.Errors = []corpus.FieldError{{Pointer: pointer, Code: "unknown_field", Detail: "there is no such field"}}
			return p
		case errors.Is(sem.Err, strconv.ErrRange), sem.JSONKind == jsontext.KindNumber && sem.Err != nil && isNumber(sem):
			return invalidField(pointer, "number_out_of_range", "the number is out of range, or not an integer where one is needed")
		}
		return invalidField(pointer, "wrong_type", "%s is not accepted here%s", kindName(sem.JSONKind), wanted(sem))
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return refuse(http.StatusBadRequest, "invalid_json", "the JSON ends too early")
	}
	return refuse(http.StatusBadRequest, "invalid_json", "the body is not valid JSON")
}

func syntaxProblem(e *jsontext.SyntacticError) *problem {
	pointer := string(e.JSONPointer)
	at := "at byte " + strconv.FormatInt(e.ByteOffset, 10)
	if pointer != "" {
		at += " (" + pointer + ")"
	}
	var p *problem
	switch {
	case errors.Is(e.Err, jsontext.ErrDuplicateName):
		p = refuse(http.StatusBadRequest, "duplicate_field", "%s: the field occurs twice", pointer)
	case errors.Is(e.Err, io.ErrUnexpectedEOF):
		p = refuse(http.StatusBadRequest, "invalid_json", "the JSON ends too early, %s", at)
	case strings.Contains(e.Err.Error(), "UTF-8"), strings.Contains(e.Err.Error(), "surrogate"):
		p = refuse(http.StatusBadRequest, "invalid_utf8", "text that is not valid UTF-8 %s", at)
	case strings.Contains(e.Err.Error(), "depth"):
		p = refuse(http.StatusBadRequest, "too_deep", "the JSON is nested too deep %s", at)
	default:
		p = refuse(http.StatusBadRequest, "invalid_json", "not valid JSON %s", at)
	}
	if pointer != "" {
		p.Errors = []corpus.FieldError{{Pointer: pointer, Code: p.Code, Detail: p.Detail}}
	}
	return p
}

func isNumber(e *json.SemanticError) bool {
	if e.GoType == nil {
		return false
	}
	switch e.GoType.Kind() {
	case reflect.Int, reflect.Int64, reflect.Uint32, reflect.Float32, reflect.Float64:
		return true
	}
	return false
}

func kindName(k jsontext.Kind) string {
	switch k {
	case jsontext.KindNull:
		return "null"
	case jsontext.KindTrue, jsontext.KindFalse:
		return "a boolean"
	case jsontext.KindString:
		return "a string"
	case jsontext.KindNumber:
		return "a number"
	case jsontext.KindBeginObject:
		return "an object"
	case jsontext.KindBeginArray:
		return "a list"
	default:
		return "this value"
	}
}

// wanted names what the field takes, from the Go type that could not take the value.
func wanted(e *json.SemanticError) string {
	if e.GoType == nil {
		return ""
	}
	t := e.GoType
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch t.Kind() {
	case reflect.String:
		return "; a string is needed"
	case reflect.Bool:
		return "; true or false is needed"
	case reflect.Slice:
		return "; a list is needed"
	case reflect.Struct, reflect.Map:
		return "; an object is needed"
	case reflect.Int, reflect.Int64, reflect.Uint32:
		return "; an integer is needed"
	case reflect.Float32, reflect.Float64:
		return "; a number is needed"
	}
	return ""
}

var escapedNUL = []byte(`\u0000`)

// refuseNUL points at the first string that contains U+0000, which Postgres cannot hold. The
// raw byte is not valid JSON, so only the escape has to be looked for.
func refuseNUL(body []byte) error {
	if !bytes.Contains(body, escapedNUL) {
		return nil
	}
	dec := jsontext.NewDecoder(bytes.NewReader(body))
	for {
		tok, err := dec.ReadToken()
		if err != nil {
			return nil //nolint:nilerr // the end; anything else was found when the body was decoded
		}
		if tok.Kind() == jsontext.KindString && strings.ContainsRune(tok.String(), 0) {
			return invalidField(string(dec.StackPointer()), "invalid_text", "text must not contain U+0000")
		}
	}
}

// textFault says what is wrong with text that did not come through JSON (paths, queries), or
// that must be judged alone; "" when nothing is.
func textFault(s string) string {
	switch {
	case !utf8.ValidString(s):
		return "text must be valid UTF-8"
	case strings.ContainsRune(s, 0):
		return "text must not contain U+0000"
	}
	return ""
}

// queryBool reads an optional boolean query parameter.
func queryBool(c echo.Context, name string) (bool, error) {
	switch v := c.QueryParam(name); v {
	case "", "false", "0":
		return false, nil
	case "true", "1":
		return true, nil
	default:
		return false, invalidQuery(name, "%s must be true or false", name)
	}
}

// queryInt reads an optional integer query parameter within bounds.
func queryInt(c echo.Context, name string, fallback, lo, hi int) (int, error) {
	v := c.QueryParam(name)
	if v == "" {
		return fallback, nil
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < lo || n > hi {
		return 0, invalidQuery(name, "%s must be an integer from %d to %d", name, lo, hi)
	}
	return n, nil
}

// queryText reads an optional text query parameter.
func queryText(c echo.Context, name, fallback string) (string, error) {
	v := c.QueryParam(name)
	if v == "" {
		return fallback, nil
	}
	if fault := textFault(v); fault != "" {
		return "", invalidQuery(name, "%s", fault)
	}
	return v, nil
}

// invalidQuery makes the 422 for a query parameter. Parameters have no JSON pointer; the
// pointer names them as a fragment of the query.
func invalidQuery(name, format string, args ...any) *problem {
	return invalidField("?"+name, "invalid_parameter", format, args...)
}

// refuseUnknownQuery refuses parameters that the route does not have, so that a misspelt
// ?colection= never acts on the default collection.
func refuseUnknownQuery(c echo.Context, known ...string) error {
	for name := range c.QueryParams() {
		ok := false
		for _, k := range known {
			ok = ok || k == name
		}
		if !ok {
			return refuse(http.StatusBadRequest, "unknown_parameter", "there is no parameter %q here; known are: %s", name, strings.Join(known, ", "))
		}
	}
	return nil
}
