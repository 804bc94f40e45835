package corpus

// IndexQuery asks an index for the points nearest to one query under one head. The index
// does not fuse: search joins every list with Postgres and fuses what survives, so that ranks
// and scores do not depend on what else lies in the index.
type IndexQuery struct {
	// Head to search by; exactly one.
	Head Heads
	// Vectors of the query: Head's, and those of every prefetch in Among.
	Vectors *Vectors
	// Among, when not empty, restricts the answer to the points that these prefetches find
	// (their union), each scored under Head: rescoring, in one call.
	Among []IndexPrefetch
	// Filter on the document's metadata, or nil. It holds for the prefetches too.
	Filter *Filter
	// Exclude these points, here and in the prefetches.
	Exclude []ID
	// Limit of the answer, at least 1.
	Limit int
	// Threshold, or nil: points scoring less are left out.
	Threshold *float64
	// Exact turns approximate search off.
	Exact bool
}

// IndexPrefetch finds the Limit points nearest to the query under Head.
type IndexPrefetch struct {
	Head  Heads
	Limit int
}

// Candidate is one point of an index's answer. Score is the dot product for the dense and
// the sparse head; for ColBERT it is the sum, over the query's vectors, of each one's largest
// dot product with the point's vectors. Higher is nearer.
type Candidate struct {
	ID    ID
	Score float64
}
