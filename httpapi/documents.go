package httpapi

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/labstack/echo/v4"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Limits of one request. They bound memory and the length of a transaction; loaders with more
// stream NDJSON.
const (
	maxDocuments = 1000
	maxChunks    = 10_000
	maxListPage  = 1000
)

type ingestJSON struct {
	Collection string         `json:"collection"`
	Wait       bool           `json:"wait"`
	Documents  []documentJSON `json:"documents"`
}

type documentJSON struct {
	ID       string         `json:"id"`
	Text     *string        `json:"text"`
	Chunks   []chunkJSON    `json:"chunks"`
	Metadata jsontext.Value `json:"metadata"`
}

// chunkJSON is a string, or {"text", "vectors"}.
type chunkJSON struct {
	Text    string
	Vectors *vectorsJSON
}

// UnmarshalJSONFrom reads either form.
func (c *chunkJSON) UnmarshalJSONFrom(dec *jsontext.Decoder) error {
	var object struct {
		Text    string       `json:"text"`
		Vectors *vectorsJSON `json:"vectors"`
	}
	var text string
	isText, err := stringOr(dec, &text, &object)
	if err != nil {
		return err
	}
	if isText {
		object.Text = text
	}
	c.Text, c.Vectors = object.Text, object.Vectors
	return nil
}

// document validates one document. Pointers start with at.
func (d *documentJSON) document(at string) (corpus.DocumentInput, []corpus.FieldError) {
	out := corpus.DocumentInput{ID: d.ID}
	var bad []corpus.FieldError
	fault := func(pointer, code, format string, args ...any) {
		bad = append(bad, corpus.FieldError{Pointer: at + pointer, Code: code, Detail: fmt.Sprintf(format, args...)})
	}
	if code, detail := idFault(d.ID); code != "" {
		fault("/id", code, "%s", detail)
	}
	switch {
	case d.Text != nil && d.Chunks != nil:
		fault("", "text_or_chunks", "give text or chunks, not both")
	case d.Text == nil && d.Chunks == nil:
		fault("", "text_or_chunks", "give text, or chunks that are already cut")
	case d.Text != nil:
		out.Text = *d.Text
		switch f := textFault(out.Text); {
		case f != "":
			fault("/text", "invalid_text", "%s", f)
		case strings.TrimSpace(out.Text) == "":
			fault("/text", "empty_text", "the text is empty")
		}
	case len(d.Chunks) == 0:
		fault("/chunks", "empty_text", "there are no chunks")
	case len(d.Chunks) > maxChunks:
		fault("/chunks", "too_many", "a document has at most %d chunks", maxChunks)
	default:
		out.Chunks = make([]corpus.ChunkInput, len(d.Chunks))
		for i := range d.Chunks {
			p := "/chunks/" + strconv.Itoa(i)
			ch := &d.Chunks[i]
			out.Chunks[i].Text = ch.Text
			switch f := textFault(ch.Text); {
			case f != "":
				fault(p, "invalid_text", "%s", f)
			case ch.Vectors == nil && strings.TrimSpace(ch.Text) == "":
				fault(p, "empty_text", "the chunk has neither text nor vectors")
			}
			if ch.Vectors != nil {
				v, wrong := ch.Vectors.vectors(at + p + "/vectors")
				out.Chunks[i].Vectors = v
				bad = append(bad, wrong...)
			}
			if len(bad) > maxFieldErrors {
				break
			}
		}
	}
	md, fe := metadataOf(d.Metadata)
	if fe != nil {
		fe.Pointer = at + "/metadata" + fe.Pointer
		bad = append(bad, *fe)
	}
	out.Metadata = md
	return out, bad
}

// maxFieldErrors bounds how many wrong fields one reply lists.
const maxFieldErrors = 100

func metadataOf(raw jsontext.Value) (corpus.Metadata, *corpus.FieldError) {
	if len(raw) == 0 {
		return corpus.Metadata{}, nil
	}
	return corpus.ParseMetadata(raw)
}

// idFault says what is wrong with a document's external id.
func idFault(id string) (code, detail string) {
	switch f := textFault(id); {
	case id == "":
		return "empty_id", "the id is empty or missing"
	case len(id) > corpus.MaxExternalID:
		return "id_too_long", fmt.Sprintf("the id has %d bytes; at most %d are allowed", len(id), corpus.MaxExternalID)
	case f != "":
		return "invalid_text", f
	}
	return "", ""
}

// maxCollectionName bounds names, which appear in URLs, logs and metrics.
const maxCollectionName = 128

// collection returns the name, or the default for "".
func (s *Server) collection(name, pointer string) (string, error) {
	if name == "" {
		return s.cfg.DefaultCollection, nil
	}
	ok := len(name) <= maxCollectionName
	for i := 0; i < len(name) && ok; i++ {
		ch := name[i]
		alnum := ch >= '0' && ch <= '9' || ch >= 'a' && ch <= 'z' || ch >= 'A' && ch <= 'Z'
		ok = alnum || i > 0 && (ch == '-' || ch == '_' || ch == '.')
	}
	if !ok {
		return "", invalidField(pointer, "invalid_name", "a collection's name has 1 to %d letters, digits, '-', '_' and '.', and starts with a letter or digit", maxCollectionName)
	}
	return name, nil
}

func (s *Server) queryCollection(c echo.Context) (string, error) {
	return s.collection(c.QueryParam("collection"), "?collection")
}

type resultJSON struct {
	ID             string      `json:"id"`
	DocumentID     *corpus.ID  `json:"document_id,omitempty"`
	Version        int64       `json:"version,omitzero"`
	Status         string      `json:"status"`
	Chunks         int         `json:"chunks"`
	ChunksEmbedded int         `json:"chunks_embedded"`
	PointIDs       []corpus.ID `json:"point_ids"`
	Error          *errorJSON  `json:"error,omitempty"`
}

type errorJSON struct {
	Code   string              `json:"code"`
	Detail string              `json:"detail"`
	Errors []corpus.FieldError `json:"errors,omitempty"`
}

func renderResult(r *corpus.DocumentResult) resultJSON {
	out := resultJSON{
		ID: r.ID, Version: r.Version, Status: string(r.Status),
		Chunks: r.Chunks, ChunksEmbedded: r.ChunksEmbedded, PointIDs: r.PointIDs,
	}
	if !r.DocumentID.IsZero() {
		out.DocumentID = &r.DocumentID
	}
	if r.Err != nil {
		out.Error = renderError(r.Err)
	}
	return out
}

func renderError(err error) *errorJSON {
	p := toProblem(err)
	return &errorJSON{Code: p.Code, Detail: p.Detail, Errors: p.Errors}
}

// failedResult is the result of a document that did not get past validation.
func failedResult(id string, bad []corpus.FieldError) corpus.DocumentResult {
	p := invalidFields(bad)
	return corpus.DocumentResult{ID: id, Status: corpus.StatusFailed,
		Err: &corpus.Error{Kind: corpus.Invalid, Code: p.Code, Detail: p.Detail, Fields: bad}}
}

func (s *Server) postDocuments(c echo.Context) error {
	if err := refuseUnknownQuery(c, "collection", "wait"); err != nil {
		return err
	}
	mt, err := mediaType(c, mediaJSON, mediaNDJSON)
	if err != nil {
		return err
	}
	collection, err := s.queryCollection(c)
	if err != nil {
		return err
	}
	wait, err := queryBool(c, "wait")
	if err != nil {
		return err
	}
	if mt == mediaNDJSON {
		return s.streamDocuments(c, collection, wait)
	}
	body, err := readBody(c)
	if err != nil {
		return err
	}
	var in ingestJSON
	// U+0000 is looked for in each document: one with it fails alone.
	if err := unmarshal(body, &in, strict); err != nil {
		return err
	}
	if in.Collection != "" {
		if collection, err = s.collection(in.Collection, "/collection"); err != nil {
			return err
		}
	}
	switch n := len(in.Documents); {
	case n == 0:
		return invalidField("/documents", "empty_input", "give 1 to %d documents", maxDocuments)
	case n > maxDocuments:
		return invalidField("/documents", "too_many", "%d documents; at most %d are taken at once, or stream them as %s", n, maxDocuments, mediaNDJSON)
	}
	results, err := s.ingest(c, collection, wait || in.Wait, in.Documents)
	if err != nil {
		return err
	}
	return s.renderResults(c, collection, results)
}

// ingest validates, sends what is valid on, and answers a result for each document in order.
func (s *Server) ingest(c echo.Context, collection string, wait bool, docs []documentJSON) ([]corpus.DocumentResult, error) {
	results := make([]corpus.DocumentResult, len(docs))
	var valid []corpus.DocumentInput
	var place []int
	var twice []corpus.FieldError
	seen := make(map[string]bool, len(docs))
	for i := range docs {
		at := "/documents/" + strconv.Itoa(i)
		if id := docs[i].ID; id != "" && seen[id] {
			twice = append(twice, corpus.FieldError{Pointer: at + "/id", Code: "duplicate_id", Detail: "an earlier document of this request has the same id"})
		} else {
			seen[id] = true
		}
		d, bad := docs[i].document(at)
		if len(bad) > 0 {
			results[i] = failedResult(docs[i].ID, bad)
			continue
		}
		valid = append(valid, d)
		place = append(place, i)
	}
	if len(twice) > 0 {
		p := invalidFields(twice[:min(len(twice), maxFieldErrors)])
		p.Code = "duplicate_id"
		return nil, p
	}
	if len(valid) > 0 {
		answered, err := s.deps.Ingester.Ingest(c.Request().Context(), corpus.IngestRequest{Collection: collection, Documents: valid, Wait: wait})
		if err != nil {
			return nil, err
		}
		if len(answered) != len(valid) {
			return nil, fmt.Errorf("ingest answered %d results for %d documents", len(answered), len(valid))
		}
		for k, i := range place {
			results[i] = answered[k]
		}
	}
	return results, nil
}

// renderResults answers 200, 202, or 422 when no document of the request was acceptable.
func (s *Server) renderResults(c echo.Context, collection string, results []corpus.DocumentResult) error {
	if p := allInvalid(results); p != nil {
		return p
	}
	status := http.StatusOK
	out := struct {
		Collection string       `json:"collection"`
		Results    []resultJSON `json:"results"`
	}{collection, make([]resultJSON, len(results))}
	accepted, failed := false, false
	for i := range results {
		out.Results[i] = renderResult(&results[i])
		accepted = accepted || results[i].Status == corpus.StatusAccepted
		failed = failed || results[i].Status == corpus.StatusFailed
	}
	if accepted && !failed {
		status = http.StatusAccepted
	}
	return writeJSON(c, status, &out)
}

// allInvalid returns the 422 for a request of which every document was refused for its input.
func allInvalid(results []corpus.DocumentResult) *problem {
	code := ""
	var fields []corpus.FieldError
	for i := range results {
		e := results[i].Err
		if e == nil || e.Kind != corpus.Invalid {
			return nil
		}
		if code == "" {
			code = e.Code
		} else if code != e.Code {
			code = "validation_failed"
		}
		if len(e.Fields) > 0 {
			fields = append(fields, e.Fields...)
		} else {
			fields = append(fields, corpus.FieldError{Pointer: "/documents/" + strconv.Itoa(i), Code: e.Code, Detail: e.Detail})
		}
	}
	p := invalidFields(fields[:min(len(fields), maxFieldErrors)])
	p.Code = code
	return p
}

// pathID returns the document id of the path, byte for byte: percent-decoded once, with
// slashes and dots left as they are.
func pathID(c echo.Context) (string, error) {
	id := strings.TrimPrefix(c.Request().URL.Path, "/documents/")
	if code, detail := idFault(id); code != "" {
		return "", invalidField("", code, "the id in the path: %s", detail)
	}
	return id, nil
}

// target reads what all routes of one document have: its collection and its id.
func (s *Server) target(c echo.Context, parameters ...string) (collection, id string, err error) {
	if err = refuseUnknownQuery(c, append(parameters, "collection")...); err != nil {
		return "", "", err
	}
	if id, err = pathID(c); err != nil {
		return "", "", err
	}
	collection, err = s.queryCollection(c)
	return collection, id, err
}

type chunkViewJSON struct {
	ID          corpus.ID `json:"id"`
	Ordinal     int       `json:"ordinal"`
	Text        string    `json:"text"`
	State       string    `json:"state"`
	Occurrence  uint32    `json:"occurrence"`
	Incarnation uint32    `json:"incarnation"`
	LastError   string    `json:"last_error,omitempty"`
}

type documentViewJSON struct {
	ID               string          `json:"id"`
	DocumentID       corpus.ID       `json:"document_id"`
	Version          int64           `json:"version"`
	TargetVersion    int64           `json:"target_version"`
	ServingVersion   int64           `json:"serving_version"`
	Metadata         jsontext.Value  `json:"metadata"`
	ChunkCount       int             `json:"chunk_count"`
	IncarnationFloor uint32          `json:"incarnation_floor"`
	CreatedAt        time.Time       `json:"created_at,omitzero"`
	UpdatedAt        time.Time       `json:"updated_at,omitzero"`
	Chunks           []chunkViewJSON `json:"chunks,omitzero"`
}

func renderDocument(v *corpus.DocumentView, chunks bool) documentViewJSON {
	out := documentViewJSON{
		ID: v.ExternalID, DocumentID: v.DocumentID,
		Version: v.TargetVersion, TargetVersion: v.TargetVersion, ServingVersion: v.ServingVersion,
		Metadata: v.Metadata.JSON(), ChunkCount: v.ChunkCount, IncarnationFloor: v.IncarnationFloor,
		CreatedAt: v.CreatedAt.UTC(), UpdatedAt: v.UpdatedAt.UTC(),
	}
	if chunks {
		out.ChunkCount = max(v.ChunkCount, len(v.Chunks))
		out.Chunks = make([]chunkViewJSON, len(v.Chunks))
		for i := range v.Chunks {
			out.Chunks[i] = chunkViewJSON(v.Chunks[i])
		}
	}
	return out
}

func (s *Server) getDocument(c echo.Context) error {
	collection, id, err := s.target(c)
	if err != nil {
		return err
	}
	v, err := s.deps.Ingester.Document(c.Request().Context(), collection, id)
	if err != nil {
		return err
	}
	out := renderDocument(&v, true)
	return writeJSON(c, http.StatusOK, &out)
}

func (s *Server) listDocuments(c echo.Context) error {
	if err := refuseUnknownQuery(c, "collection", "limit", "after"); err != nil {
		return err
	}
	collection, err := s.queryCollection(c)
	if err != nil {
		return err
	}
	limit, err := queryInt(c, "limit", 100, 1, maxListPage)
	if err != nil {
		return err
	}
	after, err := queryText(c, "after", "")
	if err != nil {
		return err
	}
	views, next, err := s.deps.Ingester.Documents(c.Request().Context(), collection, limit, after)
	if err != nil {
		return err
	}
	out := struct {
		Documents []documentViewJSON `json:"documents"`
		Next      string             `json:"next,omitempty"`
	}{make([]documentViewJSON, len(views)), next}
	for i := range views {
		out.Documents[i] = renderDocument(&views[i], false)
	}
	return writeJSON(c, http.StatusOK, &out)
}

func (s *Server) patchDocument(c echo.Context) error {
	collection, id, err := s.target(c, "wait")
	if err != nil {
		return err
	}
	wait, err := queryBool(c, "wait")
	if err != nil {
		return err
	}
	body, err := readBody(c)
	if err != nil {
		return err
	}
	var in struct {
		Metadata jsontext.Value `json:"metadata"`
		Wait     bool           `json:"wait"`
	}
	if err := unmarshal(body, &in, strict); err != nil {
		return err
	}
	// A null is no order to forget the metadata; {} is.
	if len(in.Metadata) == 0 || in.Metadata.Kind() == jsontext.KindNull {
		return invalidField("/metadata", "required", "give the new metadata; it replaces the old as a whole")
	}
	md, fe := metadataOf(in.Metadata)
	if fe != nil {
		fe.Pointer = "/metadata" + fe.Pointer
		return invalidFields([]corpus.FieldError{*fe})
	}
	r, err := s.deps.Ingester.Patch(c.Request().Context(), collection, id, md, wait || in.Wait)
	if err != nil {
		return err
	}
	return renderOne(c, &r)
}

func (s *Server) deleteDocument(c echo.Context) error {
	collection, id, err := s.target(c, "wait")
	if err != nil {
		return err
	}
	wait, err := queryBool(c, "wait")
	if err != nil {
		return err
	}
	r, err := s.deps.Ingester.Delete(c.Request().Context(), collection, id, wait)
	if err != nil {
		return err
	}
	return renderOne(c, &r)
}

// renderOne answers for a request about a single document.
func renderOne(c echo.Context, r *corpus.DocumentResult) error {
	if r.Err != nil {
		return r.Err
	}
	status := http.StatusOK
	if r.Status == corpus.StatusAccepted {
		status = http.StatusAccepted
	}
	out := renderResult(r)
	return writeJSON(c, status, &out)
}

// writeJSON renders v whole and sends it.
func writeJSON(c echo.Context, status int, v any) error {
	body, err := json.Marshal(v, json.Deterministic(true))
	if err != nil {
		return fmt.Errorf("render reply: %w", err)
	}
	return c.Blob(status, mediaJSON, body)
}
