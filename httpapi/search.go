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

// Limits of one query. They bound what the join has to fetch.
const (
	maxSearchLimit  = 1000
	maxSearchOffset = 10_000
	maxContext      = 20
	maxQueries      = 100
	maxQueryBytes   = 64 << 10
	maxTimeoutMS    = 300_000
	maxRRFK         = 10_000
)

// searchJSON is one query. Every field is optional in the type, so that a query of a batch
// can take what it leaves out from the request around it.
type searchJSON struct {
	Collection     *string      `json:"collection"`
	Query          *string      `json:"query"`
	Vector         *[]float32   `json:"vector"`
	Vectors        *vectorsJSON `json:"vectors"`
	Like           *string      `json:"like"`
	Limit          *int         `json:"limit"`
	Offset         *int         `json:"offset"`
	Mode           *string      `json:"mode"`
	Fusion         *fusionJSON  `json:"fusion"`
	Filter         *filterJSON  `json:"filter"`
	ScoreThreshold *float64     `json:"score_threshold"`
	GroupBy        *string      `json:"group_by"`
	Include        *[]string    `json:"include"`
	Context        *int         `json:"context"`
	Highlight      *bool        `json:"highlight"`
	Explain        *bool        `json:"explain"`
	TimeoutMS      *int         `json:"timeout_ms"`
}

type searchBatchJSON struct {
	searchJSON
	Queries *[]batchItemJSON `json:"queries"`
}

// batchItemJSON is a string (the query), or an object.
type batchItemJSON struct{ searchJSON }

// UnmarshalJSONFrom reads either form.
func (b *batchItemJSON) UnmarshalJSONFrom(dec *jsontext.Decoder) error {
	var text string
	isText, err := stringOr(dec, &text, &b.searchJSON)
	if isText && err == nil {
		b.Query = &text
	}
	return err
}

// fusionJSON is a method's name, or {"method","k","weights"}.
type fusionJSON struct {
	Method  string
	K       *int
	Weights []float64
}

// UnmarshalJSONFrom reads either form.
func (f *fusionJSON) UnmarshalJSONFrom(dec *jsontext.Decoder) error {
	var object struct {
		Method  string    `json:"method"`
		K       *int      `json:"k"`
		Weights []float64 `json:"weights"`
	}
	var name string
	isText, err := stringOr(dec, &name, &object)
	if isText {
		object.Method = name
	}
	f.Method, f.K, f.Weights = object.Method, object.K, object.Weights
	return err
}

// inherit fills what q leaves out from outer. What is searched for (query, vector, vectors,
// like) is q's own.
func (q *searchJSON) inherit(outer *searchJSON) {
	take(&q.Collection, outer.Collection)
	take(&q.Limit, outer.Limit)
	take(&q.Offset, outer.Offset)
	take(&q.Mode, outer.Mode)
	take(&q.Fusion, outer.Fusion)
	take(&q.Filter, outer.Filter)
	take(&q.ScoreThreshold, outer.ScoreThreshold)
	take(&q.GroupBy, outer.GroupBy)
	take(&q.Include, outer.Include)
	take(&q.Context, outer.Context)
	take(&q.Highlight, outer.Highlight)
	take(&q.Explain, outer.Explain)
	take(&q.TimeoutMS, outer.TimeoutMS)
}

func take[T any](to **T, from *T) {
	if *to == nil {
		*to = from
	}
}

func deref[T any](p *T, fallback T) T {
	if p == nil {
		return fallback
	}
	return *p
}

// request validates one query. Pointers start with at.
func (s *Server) searchRequest(q *searchJSON, at string) (corpus.SearchRequest, []corpus.FieldError) {
	var bad []corpus.FieldError
	fault := func(pointer, code, format string, args ...any) {
		bad = append(bad, corpus.FieldError{Pointer: at + pointer, Code: code, Detail: fmt.Sprintf(format, args...)})
	}
	within := func(p *int, name string, fallback, lo, hi int) int {
		n := deref(p, fallback)
		if n < lo || n > hi {
			fault("/"+name, "out_of_range", "%s is %d to %d", name, lo, hi)
		}
		return n
	}
	out := corpus.SearchRequest{
		Limit:          within(q.Limit, "limit", 10, 1, maxSearchLimit),
		Offset:         within(q.Offset, "offset", 0, 0, maxSearchOffset),
		Context:        within(q.Context, "context", 0, 0, maxContext),
		ScoreThreshold: q.ScoreThreshold,
		Highlight:      deref(q.Highlight, false),
		Explain:        deref(q.Explain, false),
		Timeout:        time.Duration(within(q.TimeoutMS, "timeout_ms", 0, 0, maxTimeoutMS)) * time.Millisecond,
	}
	if q.TimeoutMS != nil && *q.TimeoutMS == 0 {
		fault("/timeout_ms", "out_of_range", "timeout_ms is 1 to %d", maxTimeoutMS)
	}
	name, err := s.collection(deref(q.Collection, ""), at+"/collection")
	if err != nil {
		bad = append(bad, toProblem(err).Errors...)
	}
	out.Collection = name

	sources := 0
	if q.Query != nil {
		sources++
		out.Query = *q.Query
		switch {
		case strings.TrimSpace(out.Query) == "":
			fault("/query", "empty_text", "the query is empty")
		case len(out.Query) > maxQueryBytes:
			fault("/query", "too_large", "the query has %d bytes; at most %d are allowed", len(out.Query), maxQueryBytes)
		}
	}
	if q.Vector != nil {
		sources++
		v, wrong := (&vectorsJSON{Dense: *q.Vector}).vectors("")
		for _, w := range wrong {
			fault("/vector", w.Code, "%s", w.Detail)
		}
		out.Vectors = v
	}
	if q.Vectors != nil {
		sources++
		v, wrong := q.Vectors.vectors(at + "/vectors")
		bad = append(bad, wrong...)
		out.Vectors = v
	}
	if q.Like != nil {
		sources++
		out.Like = *q.Like
		if code, detail := idFault(out.Like); code != "" {
			fault("/like", code, "%s", detail)
		}
	}
	if sources != 1 {
		fault("", "one_query", "give exactly one of query, vector, vectors and like; this has %d", sources)
	}

	switch m := corpus.SearchMode(deref(q.Mode, "")); m {
	case "", corpus.ModeDense, corpus.ModeSparse, corpus.ModeHybrid, corpus.ModeHybridRerank:
		out.Mode = m
	default:
		fault("/mode", "unknown_value", "mode is dense, sparse, hybrid or hybrid_rerank")
	}
	if f := q.Fusion; f != nil {
		out.Fusion = corpus.Fusion{Method: f.Method, K: deref(f.K, 0), Weights: f.Weights}
		switch f.Method {
		case "", "rrf", "dbsf", "weighted":
		default:
			fault("/fusion/method", "unknown_value", "the method is rrf, dbsf or weighted")
		}
		if f.K != nil && (*f.K < 1 || *f.K > maxRRFK) {
			fault("/fusion/k", "out_of_range", "k is 1 to %d", maxRRFK)
		}
		if f.Weights != nil && (len(f.Weights) < 2 || len(f.Weights) > 3) {
			fault("/fusion/weights", "length_mismatch", "weights are of dense, sparse and, for weighted, colbert")
		}
		sum := 0.0
		for i, w := range f.Weights {
			sum += w
			if w < 0 {
				fault("/fusion/weights/"+strconv.Itoa(i), "out_of_range", "a weight is not negative")
			}
		}
		if f.Weights != nil && sum == 0 {
			fault("/fusion/weights", "out_of_range", "at least one weight is above zero")
		}
	}
	filter, wrong := q.Filter.filter(at + "/filter")
	bad = append(bad, wrong...)
	out.Filter = filter

	switch deref(q.GroupBy, "none") {
	case "none":
	case "document":
		out.GroupByDocument = true
	default:
		fault("/group_by", "unknown_value", "group_by is document or none")
	}
	if q.Include == nil {
		out.IncludeText, out.IncludeMetadata = true, true
	} else {
		for i, what := range *q.Include {
			switch what {
			case "text":
				out.IncludeText = true
			case "metadata":
				out.IncludeMetadata = true
			case "vector":
				out.IncludeVector = true
			default:
				fault("/include/"+strconv.Itoa(i), "unknown_value", "include names text, metadata and vector")
			}
		}
	}
	return out, bad
}

type searchResponseJSON struct {
	Results     []hitJSON       `json:"results"`
	Mode        string          `json:"mode"`
	Fusion      *usedFusionJSON `json:"fusion,omitempty"`
	Consistency consistencyJSON `json:"consistency"`
	TimingsMS   timingsJSON     `json:"timings_ms"`
}

type usedFusionJSON struct {
	Method  string    `json:"method"`
	K       int       `json:"k,omitzero"`
	Weights []float64 `json:"weights,omitempty"`
}

type consistencyJSON struct {
	Filtered  int  `json:"filtered"`
	Widened   int  `json:"widened"`
	Truncated bool `json:"truncated"`
}

type timingsJSON struct {
	Embed float64 `json:"embed"`
	Index float64 `json:"index"`
	Join  float64 `json:"join"`
}

type hitJSON struct {
	ID         corpus.ID                   `json:"id"`
	DocumentID corpus.ID                   `json:"document_id"`
	Document   string                      `json:"document"`
	Version    int64                       `json:"version"`
	Ordinal    int                         `json:"ordinal"`
	Score      float64                     `json:"score"`
	Text       *string                     `json:"text,omitzero"`
	Metadata   jsontext.Value              `json:"metadata,omitzero"`
	Vector     []float32                   `json:"vector,omitempty"`
	Vectors    *vectorsJSON                `json:"vectors,omitempty"`
	ChunkCount int                         `json:"chunk_count,omitzero"`
	Before     []corpus.Neighbour          `json:"before,omitempty"`
	After      []corpus.Neighbour          `json:"after,omitempty"`
	Highlights []string                    `json:"highlights,omitempty"`
	Heads      map[string]corpus.HeadScore `json:"heads,omitempty"`
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func renderSearch(req *corpus.SearchRequest, r *corpus.SearchResponse) searchResponseJSON {
	out := searchResponseJSON{
		Results:     make([]hitJSON, len(r.Results)),
		Mode:        string(r.Mode),
		Consistency: consistencyJSON{r.Filtered, r.Widened, r.Truncated},
		TimingsMS:   timingsJSON{milliseconds(r.Embed), milliseconds(r.Index), milliseconds(r.Join)},
	}
	if f := r.Fusion; f.Method != "" {
		out.Fusion = &usedFusionJSON{f.Method, f.K, f.Weights}
	}
	for i := range r.Results {
		h := &r.Results[i]
		o := hitJSON{
			ID: h.ID, DocumentID: h.DocumentID, Document: h.ExternalID, Version: h.Version, Ordinal: h.Ordinal,
			Score: h.Score, ChunkCount: h.ChunkCount, Before: h.Before, After: h.After,
			Highlights: h.Highlights, Heads: h.Heads,
		}
		if req.IncludeText {
			o.Text = &h.Text
		}
		if req.IncludeMetadata {
			o.Metadata = h.Metadata.JSON()
		}
		if req.IncludeVector && h.Vectors != nil {
			o.Vector = h.Vectors.Dense
			o.Vectors = renderVectors(h.Vectors)
		}
		out.Results[i] = o
	}
	return out
}

func (s *Server) search(c echo.Context) error {
	if err := refuseUnknownQuery(c); err != nil {
		return err
	}
	var in searchBatchJSON
	if err := bind(c, &in); err != nil {
		return err
	}
	ctx := c.Request().Context()
	if in.Queries == nil {
		req, bad := s.searchRequest(&in.searchJSON, "")
		if len(bad) > 0 {
			return invalidFields(bad)
		}
		r, err := s.deps.Searcher.Search(ctx, req)
		if err != nil {
			return err
		}
		out := renderSearch(&req, &r)
		return writeJSON(c, http.StatusOK, &out)
	}
	if in.Query != nil || in.Vector != nil || in.Vectors != nil || in.Like != nil {
		return invalidField("/queries", "one_query", "give queries, or one query, vector, vectors or like beside no queries")
	}
	queries := *in.Queries
	if n := len(queries); n < 1 || n > maxQueries {
		return invalidField("/queries", "out_of_range", "give 1 to %d queries; these are %d", maxQueries, n)
	}
	reqs := make([]corpus.SearchRequest, len(queries))
	var bad []corpus.FieldError
	for i := range queries {
		queries[i].inherit(&in.searchJSON)
		req, wrong := s.searchRequest(&queries[i].searchJSON, "/queries/"+strconv.Itoa(i))
		reqs[i] = req
		if len(bad) < maxFieldErrors {
			bad = append(bad, wrong...)
		}
	}
	if len(bad) > 0 {
		return invalidFields(bad)
	}
	rs, err := s.deps.Searcher.SearchBatch(ctx, reqs)
	if err != nil {
		return err
	}
	if len(rs) != len(reqs) {
		return fmt.Errorf("search answered %d responses for %d queries", len(rs), len(reqs))
	}
	out := struct {
		Responses []searchResponseJSON `json:"responses"`
	}{make([]searchResponseJSON, len(rs))}
	for i := range rs {
		out.Responses[i] = renderSearch(&reqs[i], &rs[i])
	}
	return writeJSON(c, http.StatusOK, &out)
}

var _ json.UnmarshalerFrom = (*batchItemJSON)(nil)
