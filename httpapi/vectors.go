package httpapi

import (
	"cmp"
	"slices"
	"strconv"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// vectorsJSON is an embedding that a caller brings.
type vectorsJSON struct {
	Dense   []float32   `json:"dense,omitempty"`
	Sparse  *sparseJSON `json:"sparse,omitempty"`
	ColBERT [][]float32 `json:"colbert,omitempty"`
}

type sparseJSON struct {
	Indices []uint32  `json:"indices"`
	Values  []float32 `json:"values"`
}

// maxColBERTRows bounds token vectors of one text; a text has at most 8,192 tokens.
const maxColBERTRows = 8192

// vectors checks what can be checked without the collection and converts. A zero dense vector
// has no direction and would be reported as corrupt once stored, so it is refused here.
func (v *vectorsJSON) vectors(at string) (*corpus.Vectors, []corpus.FieldError) {
	out := &corpus.Vectors{}
	var bad []corpus.FieldError
	fault := func(pointer, code, detail string) {
		bad = append(bad, corpus.FieldError{Pointer: at + pointer, Code: code, Detail: detail})
	}
	if v.Dense != nil {
		out.Dense = v.Dense
		switch {
		case len(v.Dense) == 0:
			fault("/dense", "empty_vector", "the vector is empty")
		case zero(v.Dense):
			fault("/dense", "zero_vector", "all values are zero, so the vector has no direction")
		}
	}
	if v.Sparse != nil {
		if len(v.Sparse.Indices) != len(v.Sparse.Values) {
			fault("/sparse", "length_mismatch", "there are "+strconv.Itoa(len(v.Sparse.Indices))+" indices but "+strconv.Itoa(len(v.Sparse.Values))+" values")
		} else {
			s, duplicate := sortedSparse(v.Sparse)
			if duplicate {
				fault("/sparse/indices", "duplicate_index", "an index occurs twice")
			}
			out.Sparse = s
		}
	}
	if v.ColBERT != nil {
		out.ColBERT = v.ColBERT
		switch {
		case len(v.ColBERT) == 0:
			fault("/colbert", "empty_vector", "there are no token vectors")
		case len(v.ColBERT) > maxColBERTRows:
			fault("/colbert", "too_many", "there are more than "+strconv.Itoa(maxColBERTRows)+" token vectors")
		}
		for i, row := range v.ColBERT {
			if len(row) == 0 || len(row) != len(v.ColBERT[0]) {
				fault("/colbert/"+strconv.Itoa(i), "length_mismatch", "token vectors must be of one length, and not empty")
				break
			}
		}
	}
	if len(bad) == 0 && out.Heads() == 0 {
		fault("", "empty_vector", "give at least one of dense, sparse and colbert")
	}
	return out, bad
}

func zero(row []float32) bool {
	for _, x := range row {
		if x != 0 {
			return false
		}
	}
	return true
}

// sortedSparse orders the entries by index.
func sortedSparse(in *sparseJSON) (out *corpus.Sparse, duplicate bool) {
	n := len(in.Indices)
	order := make([]int, n)
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(in.Indices[a], in.Indices[b]) })
	out = &corpus.Sparse{Indices: make([]uint32, n), Values: make([]float32, n)}
	for to, from := range order {
		out.Indices[to], out.Values[to] = in.Indices[from], in.Values[from]
		duplicate = duplicate || to > 0 && out.Indices[to] == out.Indices[to-1]
	}
	return out, duplicate
}

// renderVectors is the inverse, for replies.
func renderVectors(v *corpus.Vectors) *vectorsJSON {
	if v == nil {
		return nil
	}
	out := &vectorsJSON{Dense: v.Dense, ColBERT: v.ColBERT}
	if v.Sparse != nil {
		out.Sparse = &sparseJSON{Indices: v.Sparse.Indices, Values: v.Sparse.Values}
	}
	return out
}

// stringOr reads a string, or an object into dst. It reports which it was.
func stringOr(dec *jsontext.Decoder, text *string, dst any) (isText bool, err error) {
	switch dec.PeekKind() {
	case jsontext.KindString:
		return true, json.UnmarshalDecode(dec, text)
	case jsontext.KindBeginObject:
		return false, json.UnmarshalDecode(dec, dst)
	case jsontext.KindInvalid:
		_, err := dec.ReadToken()
		return false, err
	}
	if err := dec.SkipValue(); err != nil {
		return false, err
	}
	return false, &fieldRefusal{code: "wrong_type", detail: "a string or an object is needed"}
}
