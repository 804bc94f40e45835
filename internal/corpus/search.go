package corpus

import "time"

// SearchMode chooses how candidates are found and scored.
type SearchMode string

// The modes of the contract.
const (
	ModeDense        SearchMode = "dense"
	ModeSparse       SearchMode = "sparse"
	ModeHybrid       SearchMode = "hybrid"
	ModeHybridRerank SearchMode = "hybrid_rerank"
)

// Fusion says how hybrid search combines the dense and the sparse list.
type Fusion struct {
	// Method is rrf (default), dbsf or weighted.
	Method string
	// K of reciprocal rank fusion; 0 means 60.
	K int
	// Weights in the order dense, sparse, colbert; nil means [1,1,1].
	Weights []float64
}

// SearchRequest is one query. Exactly one of Query, Vectors and Like is set.
type SearchRequest struct {
	Collection string
	Query      string
	// Vectors is the caller's own embedding.
	Vectors *Vectors
	// Like is the external id of a document whose neighbours are wanted.
	Like   string
	Limit  int
	Offset int
	// Mode, or "" for hybrid when the index has a sparse vector, else dense.
	Mode   SearchMode
	Fusion Fusion
	Filter *Filter
	// ScoreThreshold, or nil.
	ScoreThreshold *float64
	// GroupByDocument keeps the best chunk of each document.
	GroupByDocument bool
	// Context chunks before and after each hit are returned beside it.
	Context int
	// Include names of text, metadata, vector.
	IncludeText, IncludeMetadata, IncludeVector bool
	// Highlight asks for the matched sparse terms.
	Highlight bool
	// Explain asks for per-head ranks and scores.
	Explain bool
	// Timeout bounds the whole search; 0 is the service's default.
	Timeout time.Duration
}

// HeadScore is a result's rank (from 1) and score under one head.
type HeadScore struct {
	Rank  int     `json:"rank"`
	Score float64 `json:"score"`
}

// Neighbour is a chunk beside a hit, of the same version.
type Neighbour struct {
	ID      ID     `json:"id"`
	Ordinal int    `json:"ordinal"`
	Text    string `json:"text"`
}

// SearchResult is one hit. Everything in it comes from one version of one document.
type SearchResult struct {
	ID         ID
	DocumentID ID
	ExternalID string
	Version    int64
	Ordinal    int
	Score      float64
	Text       string
	Metadata   Metadata
	Vectors    *Vectors
	// ChunkCount is how many candidate chunks of the document matched (grouping only).
	ChunkCount int
	Before     []Neighbour
	After      []Neighbour
	Highlights []string
	// Heads holds per-head ranks and scores when Explain was set.
	Heads map[string]HeadScore
}

// SearchResponse is the answer to one query.
type SearchResponse struct {
	Mode SearchMode
	// Fusion that was used, with its defaults filled in; zero in modes of one head.
	Fusion  Fusion
	Results []SearchResult
	// Filtered counts candidates the join removed; Widened, how often the query was widened;
	// Truncated is set when the answer may be short for want of time or candidates' cap.
	Filtered, Widened  int
	Truncated          bool
	Embed, Index, Join time.Duration
}
