package httpapi

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/labstack/echo/v4"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Limits of a collection's settings.
const (
	maxFields      = 64
	maxFieldPath   = 256
	maxDenseSize   = 65_536 // Qdrant's own limit
	minChunkTokens = 16
)

type collectionJSON struct {
	Name            string                      `json:"name"`
	Model           string                      `json:"model"`
	Dense           *denseJSON                  `json:"dense"`
	Vectors         *[]string                   `json:"vectors"`
	Chunking        *chunkingJSON               `json:"chunking"`
	Fields          map[string]corpus.FieldType `json:"fields"`
	AllowUndeclared bool                        `json:"allow_undeclared"`
	Quantization    string                      `json:"quantization"`
	OnDisk          bool                        `json:"on_disk"`
	DenseType       string                      `json:"dense_type"`
}

type denseJSON struct {
	Size int `json:"size"`
}

type chunkingJSON struct {
	TargetTokens  *int `json:"target_tokens"`
	OverlapTokens *int `json:"overlap_tokens"`
}

var fieldTypes = []corpus.FieldType{corpus.Keyword, corpus.Integer, corpus.Float, corpus.Boolean, corpus.Datetime, corpus.FullText}

// settings validates what can be judged without the ledger; zero values mean the service's
// defaults.
func (in *collectionJSON) settings(spec corpus.ModelSpec) (corpus.Settings, []corpus.FieldError) {
	var bad []corpus.FieldError
	fault := func(pointer, code, format string, args ...any) {
		bad = append(bad, corpus.FieldError{Pointer: pointer, Code: code, Detail: fmt.Sprintf(format, args...)})
	}
	out := corpus.Settings{
		Model: in.Model, AllowUndeclared: in.AllowUndeclared, OnDisk: in.OnDisk, Fields: in.Fields,
	}
	external := in.Model == corpus.ExternalModel
	switch {
	case in.Model == spec.Name && in.Model != "":
		out.Model = "" // the service's own model, by name
	case in.Model != "" && !external:
		fault("/model", "unknown_model", "the model is left out, %q (the one this service runs), or %q", spec.Name, corpus.ExternalModel)
	}
	if in.Vectors != nil {
		if len(*in.Vectors) == 0 {
			fault("/vectors", "empty_input", "name at least one of dense, sparse and colbert")
		}
		for i, name := range *in.Vectors {
			h, ok := corpus.ParseHead(name)
			switch {
			case !ok:
				fault("/vectors/"+strconv.Itoa(i), "unknown_value", "vectors are dense, sparse and colbert")
			case !external && !spec.Heads.Has(h):
				fault("/vectors/"+strconv.Itoa(i), "output_unsupported", "the model %s has no %s output; it has %s", spec.Name, name, strings.Join(spec.Heads.Names(), ", "))
			}
			out.Vectors |= h
		}
	}
	switch {
	case in.Dense != nil && !external:
		fault("/dense", "not_applicable", "the size is the model's; give it only with model %q", corpus.ExternalModel)
	case in.Dense != nil && (in.Dense.Size < 1 || in.Dense.Size > maxDenseSize):
		fault("/dense/size", "out_of_range", "the size is 1 to %d", maxDenseSize)
	case in.Dense != nil:
		out.DenseSize = in.Dense.Size
		if in.Vectors == nil {
			out.Vectors = corpus.Dense
		} else if !out.Vectors.Has(corpus.Dense) {
			fault("/dense", "not_applicable", "vectors does not name dense")
		}
	case external && (in.Vectors == nil || out.Vectors.Has(corpus.Dense)):
		fault("/dense/size", "required", "a collection of model %q needs the length of its dense vectors", corpus.ExternalModel)
	}
	if ch := in.Chunking; ch != nil {
		longest := spec.MaxTokens
		if ch.TargetTokens != nil {
			out.Chunking.TargetTokens = *ch.TargetTokens
			if *ch.TargetTokens < minChunkTokens || *ch.TargetTokens > longest {
				fault("/chunking/target_tokens", "out_of_range", "a chunk has %d to %d tokens", minChunkTokens, longest)
			}
		}
		if ch.OverlapTokens != nil {
			out.Chunking.OverlapTokens = *ch.OverlapTokens
			if ch.TargetTokens == nil {
				fault("/chunking/target_tokens", "required", "give target_tokens together with overlap_tokens")
			} else if *ch.OverlapTokens < 0 || *ch.OverlapTokens > *ch.TargetTokens/2 {
				fault("/chunking/overlap_tokens", "out_of_range", "the overlap is 0 to half of target_tokens")
			}
		}
	}
	if len(in.Fields) > maxFields {
		fault("/fields", "too_many", "at most %d fields can be declared", maxFields)
	}
	for _, name := range slices.Sorted(maps.Keys(in.Fields)) {
		p := "/fields/" + pointerToken(name)
		if code := fieldPathFault(name); code != "" {
			fault(p, "invalid_name", "%s", code)
		}
		if !slices.Contains(fieldTypes, in.Fields[name]) {
			fault(p, "unknown_value", "a field's type is keyword, integer, float, boolean, datetime or text")
		}
	}
	switch in.Quantization {
	case "", "none":
	case "scalar", "binary":
		out.Quantization = in.Quantization
	default:
		fault("/quantization", "unknown_value", "quantization is none, scalar or binary")
	}
	switch in.DenseType {
	case "", "float32":
	case "float16":
		out.DenseType = in.DenseType
	default:
		fault("/dense_type", "unknown_value", "dense_type is float32 or float16")
	}
	return out, bad
}

// fieldPathFault says what is wrong with the path of a metadata field.
func fieldPathFault(path string) string {
	switch {
	case path == "":
		return "the field's path is empty"
	case len(path) > maxFieldPath:
		return fmt.Sprintf("the field's path has more than %d bytes", maxFieldPath)
	case slices.Contains(strings.Split(path, "."), ""):
		return "a part of the field's path is empty; keys are joined by single dots"
	case strings.ContainsAny(path, "[]\"") || textFault(path) != "":
		return "the field's path must not contain brackets, quotes or U+0000; lists are entered without them"
	}
	return ""
}

var pointerEscape = strings.NewReplacer("~", "~0", "/", "~1")

func pointerToken(s string) string { return pointerEscape.Replace(s) }

type collectionViewJSON struct {
	Name            string                      `json:"name"`
	ID              corpus.ID                   `json:"id"`
	Model           string                      `json:"model"`
	Fingerprint     string                      `json:"fingerprint,omitempty"`
	Vectors         []string                    `json:"vectors"`
	Dimensions      int                         `json:"dimensions,omitzero"`
	Chunking        corpus.Chunking             `json:"chunking"`
	Fields          map[string]corpus.FieldType `json:"fields"`
	AllowUndeclared bool                        `json:"allow_undeclared"`
	Quantization    string                      `json:"quantization"`
	OnDisk          bool                        `json:"on_disk"`
	DenseType       string                      `json:"dense_type"`
	Index           string                      `json:"index,omitempty"`
	Documents       int64                       `json:"documents"`
	Chunks          int64                       `json:"chunks"`
	Pending         int64                       `json:"pending"`
	Failed          int64                       `json:"failed"`
	CreatedAt       time.Time                   `json:"created_at,omitzero"`
}

func (s *Server) renderCollection(v *corpus.CollectionView) collectionViewJSON {
	set := v.Settings
	out := collectionViewJSON{
		Name: v.Name, ID: v.ID, Model: set.Model, Fingerprint: v.Index.Fingerprint,
		Vectors: set.Vectors.Names(), Dimensions: v.Index.Layout.Dim, Chunking: set.Chunking, Fields: set.Fields,
		AllowUndeclared: set.AllowUndeclared, Quantization: set.Quantization, OnDisk: set.OnDisk,
		DenseType: set.DenseType, Index: v.Index.QdrantName,
		Documents: v.Documents, Chunks: v.Chunks, Pending: v.Pending, Failed: v.Failed, CreatedAt: v.CreatedAt.UTC(),
	}
	if out.Model == "" {
		out.Model = s.deps.Embedder.Spec().Name
	}
	if out.Quantization == "" {
		out.Quantization = "none"
	}
	if out.DenseType == "" {
		out.DenseType = "float32"
	}
	return out
}

func (s *Server) createCollection(c echo.Context) error {
	if err := refuseUnknownQuery(c); err != nil {
		return err
	}
	named := c.Param("name")
	var in collectionJSON
	// PUT-like form: the name in the path, and the settings, if any, in the body.
	if named == "" || c.Request().ContentLength != 0 {
		if err := bind(c, &in); err != nil {
			return err
		}
	}
	switch {
	case named == "" && in.Name == "":
		return invalidField("/name", "required", "the collection needs a name")
	case named != "" && in.Name != "" && in.Name != named:
		return invalidField("/name", "not_applicable", "the body names another collection than the path")
	case named == "":
		named = in.Name
	}
	name, err := s.collection(named, "/name")
	if err != nil {
		return err
	}
	settings, bad := in.settings(s.deps.Embedder.Spec())
	if len(bad) > 0 {
		return invalidFields(bad)
	}
	v, err := s.deps.Ingester.CreateCollection(c.Request().Context(), name, settings)
	if err != nil {
		return err
	}
	c.Response().Header().Set("Location", "/collections/"+name)
	out := s.renderCollection(&v)
	return writeJSON(c, http.StatusCreated, &out)
}

func (s *Server) listCollections(c echo.Context) error {
	if err := refuseUnknownQuery(c); err != nil {
		return err
	}
	views, err := s.deps.Ingester.Collections(c.Request().Context())
	if err != nil {
		return err
	}
	out := struct {
		Collections []collectionViewJSON `json:"collections"`
	}{make([]collectionViewJSON, len(views))}
	for i := range views {
		out.Collections[i] = s.renderCollection(&views[i])
	}
	return writeJSON(c, http.StatusOK, &out)
}

func (s *Server) getCollection(c echo.Context) error {
	name, err := s.collection(c.Param("name"), "")
	if err != nil {
		return err
	}
	v, err := s.deps.Ingester.Collection(c.Request().Context(), name)
	if err != nil {
		return err
	}
	out := s.renderCollection(&v)
	return writeJSON(c, http.StatusOK, &out)
}

func (s *Server) deleteCollection(c echo.Context) error {
	name, err := s.collection(c.Param("name"), "")
	if err != nil {
		return err
	}
	if err := s.deps.Ingester.DeleteCollection(c.Request().Context(), name); err != nil {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}

// oneOrMany reads a string or a list of strings.
type oneOrMany []string

// UnmarshalJSONFrom reads either form.
func (o *oneOrMany) UnmarshalJSONFrom(dec *jsontext.Decoder) error {
	if dec.PeekKind() == jsontext.KindString {
		var one string
		if err := json.UnmarshalDecode(dec, &one); err != nil {
			return err
		}
		*o = oneOrMany{one}
		return nil
	}
	var many []string
	if err := json.UnmarshalDecode(dec, &many); err != nil {
		return err
	}
	*o = many
	return nil
}
