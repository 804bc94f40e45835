package corpus

import "time"

// MaxColBERTValues is the most values (rows times columns) a point's ColBERT vector may have:
// Qdrant refuses larger multivectors. A chunk that exceeds it fails alone and says so.
const MaxColBERTValues = 1 << 20

// Stamp is the mark an installation leaves in an index: who owns it, and a nonce renewed
// every minute, by which a clone or an old copy of either store is told from the original.
type Stamp struct {
	Installation ID
	Nonce        ID
	At           time.Time
}

// IndexQuery asks one index for candidates. Candidates are ids: what they mean, and whether
// they may be shown, only the ledger knows.
type IndexQuery struct {
	// Vectors of the query: the heads that Mode needs, in the index's own sizes.
	Vectors *Vectors
	// Mode must be one of the four; the index does not choose.
	Mode SearchMode
	// Fusion of hybrid modes.
	Fusion Fusion
	Filter *Filter
	// Exclude these points.
	Exclude []ID
	// Limit of candidates, at least 1.
	Limit int
	// Threshold drops candidates that score lower; on the scale of the mode's own scores.
	Threshold *float64
	// Prefetch is how many candidates each head contributes to a hybrid mode, and how many
	// fused candidates are reranked; 0 means the larger of 2*Limit and 100 (unmeasured).
	Prefetch int
	// WithVectors returns the candidates' stored vectors.
	WithVectors bool
	// WithHeads returns, for hybrid modes, each candidate's rank and score under each head;
	// it costs one more query a head.
	WithHeads bool
	// Exact searches without the approximate graph.
	Exact bool
}

// Candidate is one point an index proposes, best first.
type Candidate struct {
	ID ID
	// Score on the mode's scale: dot product (dense, sparse), fused score (hybrid), mean over
	// the query's ColBERT vectors of the best dot product (hybrid_rerank).
	Score float64
	// Heads by name (dense, sparse, colbert), if asked for; a head that did not propose the
	// candidate among its first Prefetch is absent.
	Heads map[string]HeadScore
	// Vectors, if asked for.
	Vectors *Vectors
}
