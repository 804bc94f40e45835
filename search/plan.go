package search

import (
	"fmt"
	"math"
	"slices"
	"strconv"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Methods of fusion, as the contract names them.
const (
	fuseRRF      = "rrf"
	fuseDBSF     = "dbsf"
	fuseWeighted = "weighted"
	// defaultK of reciprocal rank fusion is the constant of the paper that introduced it
	// (Cormack et al. 2009); Qdrant's own default is 2.
	defaultK = 60
)

// plan checks one request against the collection, the index and the model, and lays out what
// to ask of the index. Pointers of the field errors are relative to the request.
func plan(req *corpus.SearchRequest, coll corpus.Collection, ix corpus.Index, model corpus.ModelSpec) (*query, []corpus.FieldError) {
	var bad []corpus.FieldError
	fault := func(pointer, code, format string, args ...any) {
		bad = append(bad, corpus.FieldError{Pointer: pointer, Code: code, Detail: fmt.Sprintf(format, args...)})
	}
	q := &query{req: req, filter: req.Filter, live: map[corpus.ID]*corpus.JoinedChunk{}, junk: map[corpus.ID]bool{},
		excluded: map[corpus.ID]bool{}}

	limit := req.Limit
	if limit == 0 {
		limit = defaultLimit
	}
	switch {
	case limit < 0 || req.Offset < 0 || limit+req.Offset > maxWindow:
		fault("/limit", "out_of_range", "limit and offset are not negative, and together at most %d", maxWindow)
	case req.Context < 0 || req.Context > maxContext:
		fault("/context", "out_of_range", "context is 0 to %d", maxContext)
	}
	q.offset, q.limit = req.Offset, limit
	if t := req.ScoreThreshold; t != nil && (math.IsNaN(*t) || math.IsInf(*t, 0)) {
		fault("/score_threshold", "not_finite", "score_threshold is a finite number")
	}

	q.mode = req.Mode
	stored := ix.Layout.Vectors
	if q.mode == "" {
		q.mode = corpus.ModeDense
		given := stored
		if req.Vectors != nil {
			given &= req.Vectors.Heads()
		}
		switch {
		case given.Has(corpus.Dense | corpus.SparseHead):
			q.mode = corpus.ModeHybrid
		case given.Has(corpus.SparseHead) && !given.Has(corpus.Dense):
			q.mode = corpus.ModeSparse
		}
	}
	needs, known := headsOf(q.mode)
	switch {
	case !known:
		fault("/mode", "unknown_value", "mode is dense, sparse, hybrid or hybrid_rerank")
	case !stored.Has(needs):
		fault("/mode", "mode_unavailable", "mode %s needs %s vectors; the collection stores %s", q.mode, needs, stored)
	}
	q.heads = needs
	bad = append(bad, q.planFusion()...)

	sources := 0
	external := coll.Settings.Model == corpus.ExternalModel
	if req.Query != "" {
		sources++
		if external {
			fault("/query", "vectors_required", "the collection %q takes only vectors its callers bring: search with vectors instead of a text", coll.Name)
		}
	}
	if req.Vectors != nil {
		sources++
		v, wrong := checkVectors(req.Vectors, needs, ix.Layout, external, model.VocabSize)
		q.vecs = v
		bad = append(bad, wrong...)
	}
	if req.Like != "" {
		sources++
		if q.mode == corpus.ModeHybridRerank {
			fault("/mode", "mode_unavailable", "a document as the query has no ColBERT vectors of its own: use mode hybrid, dense or sparse")
		}
	}
	if sources != 1 {
		fault("", "one_query", "give exactly one of query, vectors and like; this has %d", sources)
	}
	if req.Highlight && !stored.Has(corpus.SparseHead) {
		fault("/highlight", "mode_unavailable", "highlights come from sparse vectors; the collection stores %s", stored)
	}
	if req.Highlight && external {
		fault("/highlight", "mode_unavailable", "highlights need the model's own tokens; the collection's vectors come from another")
	}
	bad = append(bad, checkFields(req.Filter, coll.Settings, "/filter")...)
	if len(bad) > 0 {
		return nil, bad
	}
	q.planLists()
	return q, nil
}

// headsOf returns the heads a mode needs.
func headsOf(mode corpus.SearchMode) (corpus.Heads, bool) {
	switch mode {
	case corpus.ModeDense:
		return corpus.Dense, true
	case corpus.ModeSparse:
		return corpus.SparseHead, true
	case corpus.ModeHybrid:
		return corpus.Dense | corpus.SparseHead, true
	case corpus.ModeHybridRerank:
		return corpus.Dense | corpus.SparseHead | corpus.ColBERT, true
	}
	return 0, false
}

func (q *query) planFusion() []corpus.FieldError {
	f := q.req.Fusion
	switch f.Method {
	case "":
		f.Method = fuseRRF
	case fuseRRF, fuseDBSF, fuseWeighted:
	default:
		return []corpus.FieldError{{Pointer: "/fusion/method", Code: "unknown_value", Detail: "the method is rrf, dbsf or weighted"}}
	}
	if f.K == 0 {
		f.K = defaultK
	}
	if f.K < 0 {
		return []corpus.FieldError{{Pointer: "/fusion/k", Code: "out_of_range", Detail: "k is at least 1"}}
	}
	if f.Weights == nil {
		f.Weights = []float64{1, 1, 1}
	}
	// The heads that take part: all three only where ColBERT's score is added to the others'.
	parts := 2
	if q.mode == corpus.ModeHybridRerank && f.Method == fuseWeighted {
		parts = 3
	}
	if n := len(f.Weights); n < parts || n > 3 {
		return []corpus.FieldError{{Pointer: "/fusion/weights", Code: "length_mismatch",
			Detail: fmt.Sprintf("%d weights are given; this needs %d, in the order dense, sparse, colbert", n, parts)}}
	}
	sum := 0.0
	for i, w := range f.Weights {
		if math.IsNaN(w) || math.IsInf(w, 0) || w < 0 {
			return []corpus.FieldError{{Pointer: "/fusion/weights/" + strconv.Itoa(i), Code: "out_of_range", Detail: "a weight is finite and not negative"}}
		}
		if i < parts {
			sum += w
		}
	}
	if sum == 0 || math.IsInf(sum, 0) {
		return []corpus.FieldError{{Pointer: "/fusion/weights", Code: "out_of_range",
			Detail: fmt.Sprintf("the first %d weights must add up to a finite number above zero", parts)}}
	}
	q.fusion = f
	return nil
}

// planLists decides which lists of candidates to fetch, and how deep.
//
// A mode of one head needs one list as deep as the page. A fused mode needs a list of each
// head; weighted sums need every candidate's score under both, so each list is also scored
// under the other head; reranking scores both lists under ColBERT. All of it is one batch.
func (q *query) planLists() {
	window := q.offset + q.limit
	if q.mode == corpus.ModeDense || q.mode == corpus.ModeSparse {
		depth := window
		if q.req.GroupByDocument {
			depth *= groupFactor
		}
		q.lists = []*list{newList(q.heads, depth)}
		if t := q.req.ScoreThreshold; t != nil {
			// The index compares in float32, and drops what only meets its threshold: ask a hair
			// more, and decide here.
			below := float64(math.Nextafter32(float32(*t), float32(math.Inf(-1))))
			q.lists[0].threshold = &below
		}
		return
	}
	depth := fusedDepth
	for depth < 2*window {
		depth *= 2
	}
	dense, sparse := newList(corpus.Dense, depth), newList(corpus.SparseHead, depth)
	q.lists = []*list{dense, sparse}
	if q.fusion.Method == fuseWeighted {
		q.lists = append(q.lists, newRescore(corpus.Dense, sparse), newRescore(corpus.SparseHead, dense))
	}
	if q.mode == corpus.ModeHybridRerank {
		q.lists = append(q.lists, newRescore(corpus.ColBERT, dense, sparse))
	}
}

// checkVectors validates a caller's own embedding and returns it ready for the index: only the
// heads the mode needs, dense and ColBERT rows scaled to length 1 (the model's own are, and
// the length of a query changes no order), sparse terms sorted and without zeros.
func checkVectors(v *corpus.Vectors, needs corpus.Heads, layout corpus.Layout, external bool, vocabulary int) (*corpus.Vectors, []corpus.FieldError) {
	var bad []corpus.FieldError
	fault := func(pointer, code, format string, args ...any) {
		bad = append(bad, corpus.FieldError{Pointer: "/vectors" + pointer, Code: code, Detail: fmt.Sprintf(format, args...)})
	}
	if missing := needs &^ v.Heads(); missing != 0 {
		fault("", "vectors_required", "the mode needs %s; %s is missing", needs, missing)
		return nil, bad
	}
	out := &corpus.Vectors{}
	unit := func(row []float32, dim int, pointer string) []float32 {
		if len(row) != dim {
			fault(pointer, "length_mismatch", "the vector has %d values; the collection's have %d", len(row), dim)
			return nil
		}
		norm := 0.0
		for _, x := range row {
			norm += float64(x) * float64(x)
		}
		norm = math.Sqrt(norm)
		if math.IsNaN(norm) || math.IsInf(norm, 0) || norm < 1e-12 {
			fault(pointer, "not_finite", "the vector must be finite and longer than zero")
			return nil
		}
		scaled := make([]float32, len(row))
		for i, x := range row {
			scaled[i] = float32(float64(x) / norm)
		}
		return scaled
	}
	if needs.Has(corpus.Dense) {
		out.Dense = unit(v.Dense, layout.Dim, "/dense")
	}
	if needs.Has(corpus.SparseHead) {
		out.Sparse = &corpus.Sparse{Indices: []uint32{}, Values: []float32{}}
		in := v.Sparse
		if len(in.Indices) != len(in.Values) {
			fault("/sparse", "length_mismatch", "%d indices, but %d values", len(in.Indices), len(in.Values))
			return nil, bad
		}
		order := make([]int, len(in.Indices))
		for i := range order {
			order[i] = i
		}
		slices.SortFunc(order, func(a, b int) int {
			switch {
			case in.Indices[a] < in.Indices[b]:
				return -1
			case in.Indices[a] > in.Indices[b]:
				return 1
			}
			return 0
		})
		for k, i := range order {
			index, value := in.Indices[i], in.Values[i]
			switch {
			case k > 0 && in.Indices[order[k-1]] == index:
				fault("/sparse/indices/"+strconv.Itoa(i), "duplicate", "the index %d is given twice", index)
			case !external && vocabulary > 0 && int64(index) >= int64(vocabulary):
				fault("/sparse/indices/"+strconv.Itoa(i), "out_of_range", "the model's vocabulary has %d tokens", vocabulary)
			case math.IsNaN(float64(value)) || math.IsInf(float64(value), 0):
				fault("/sparse/values/"+strconv.Itoa(i), "not_finite", "the value is not a finite number")
			case value != 0:
				out.Sparse.Indices = append(out.Sparse.Indices, index)
				out.Sparse.Values = append(out.Sparse.Values, value)
			}
			if len(bad) > 8 {
				return nil, bad // the rest would say the same
			}
		}
	}
	if needs.Has(corpus.ColBERT) {
		if len(v.ColBERT) == 0 {
			fault("/colbert", "empty", "at least one token vector is needed")
		}
		for i, row := range v.ColBERT {
			out.ColBERT = append(out.ColBERT, unit(row, layout.ColBERTDim, "/colbert/"+strconv.Itoa(i)))
			if len(bad) > 8 {
				return nil, bad
			}
		}
	}
	return out, bad
}

// checkFields refuses filters on fields the collection did not declare, unless it allows the
// scan they cost, and tests that a declared field's type cannot answer.
func checkFields(f *corpus.Filter, s corpus.Settings, pointer string) []corpus.FieldError {
	if f == nil {
		return nil
	}
	var bad []corpus.FieldError
	for _, clause := range []struct {
		name       string
		conditions []corpus.Condition
	}{{"must", f.Must}, {"should", f.Should}, {"must_not", f.MustNot}} {
		for i := range clause.conditions {
			c := &clause.conditions[i]
			at := pointer + "/" + clause.name + "/" + strconv.Itoa(i)
			if c.Filter != nil {
				bad = append(bad, checkFields(c.Filter, s, at+"/filter")...)
				continue
			}
			kind, declared := s.Fields[c.Key]
			switch {
			case !declared && c.Text != "":
				bad = append(bad, corpus.FieldError{Pointer: at + "/key", Code: "field_not_declared",
					Detail: fmt.Sprintf("text conditions need a field declared as text; %q is not declared", c.Key)})
			case !declared && !s.AllowUndeclared:
				bad = append(bad, corpus.FieldError{Pointer: at + "/key", Code: "field_not_declared",
					Detail: fmt.Sprintf("the collection does not declare the field %q for filters (declared: %s); declare it, or create the collection with allow_undeclared",
						c.Key, fieldNames(s.Fields))})
			case declared && c.Text != "" && kind != corpus.FullText:
				bad = append(bad, corpus.FieldError{Pointer: at + "/text", Code: "wrong_type",
					Detail: fmt.Sprintf("text conditions need a field declared as text; %q is declared as %s", c.Key, kind)})
			case declared && c.Range != nil && kind != corpus.Integer && kind != corpus.Float && kind != corpus.Datetime:
				bad = append(bad, corpus.FieldError{Pointer: at + "/range", Code: "wrong_type",
					Detail: fmt.Sprintf("ranges need an integer, float or datetime field; %q is declared as %s", c.Key, kind)})
			}
		}
	}
	return bad
}

func fieldNames(fields map[string]corpus.FieldType) string {
	if len(fields) == 0 {
		return "none"
	}
	names := make([]string, 0, len(fields))
	for name := range fields {
		names = append(names, name)
	}
	slices.Sort(names)
	const shown = 20
	if len(names) > shown {
		names = append(names[:shown], "…")
	}
	return fmt.Sprint(names)
}
