package corpus

import "time"

// ExternalModel is the model name of a collection that takes only vectors its callers bring.
const ExternalModel = "external"

// FieldType is how a filterable metadata field is indexed.
type FieldType string

// The field types a collection may declare.
const (
	Keyword  FieldType = "keyword"
	Integer  FieldType = "integer"
	Float    FieldType = "float"
	Boolean  FieldType = "boolean"
	Datetime FieldType = "datetime"
	FullText FieldType = "text"
)

// Chunking says how a document's text is cut.
type Chunking struct {
	// TargetTokens is the largest chunk, in the model's tokens, special tokens included.
	TargetTokens int `json:"target_tokens"`
	// OverlapTokens of a chunk's end are repeated at the start of the next.
	OverlapTokens int `json:"overlap_tokens"`
}

// Settings of a collection, fixed at creation (fields may be added later).
type Settings struct {
	// Model is empty for the service's own model, or [ExternalModel].
	Model string `json:"model,omitempty"`
	// DenseSize is the vector length of an external collection.
	DenseSize int `json:"dense_size,omitempty"`
	// Vectors are the heads stored for each chunk.
	Vectors Heads `json:"vectors"`
	// Chunking of documents that arrive as text.
	Chunking Chunking `json:"chunking"`
	// Fields that filters may name, by metadata path, with their types.
	Fields map[string]FieldType `json:"fields,omitempty"`
	// AllowUndeclared lets filters name fields that were not declared, at the price of a scan.
	AllowUndeclared bool `json:"allow_undeclared,omitempty"`
	// Quantization of dense vectors: "", "scalar" or "binary"; results are rescored.
	Quantization string `json:"quantization,omitempty"`
	// OnDisk keeps dense vectors on disk rather than in memory.
	OnDisk bool `json:"on_disk,omitempty"`
	// DenseType is the storage type of dense and ColBERT values: "" (float32) or "float16".
	DenseType string `json:"dense_type,omitempty"`
}

// Collection is a named set of documents. Its ID is drawn at creation, so a collection
// recreated under an old name shares nothing with it.
type Collection struct {
	ID        ID
	Name      string
	Settings  Settings
	CreatedAt time.Time
}

// IndexState is where an index is in its life.
type IndexState string

// The states of an index.
const (
	IndexBuilding IndexState = "building"
	IndexServing  IndexState = "serving"
	IndexRetired  IndexState = "retired"
)

// Index is one physical Qdrant collection holding one embedding of a collection.
type Index struct {
	ID         ID
	Collection ID
	// QdrantName contains the index's random id and is never used twice.
	QdrantName  string
	Fingerprint string
	State       IndexState
	// Layout is what the Qdrant collection was created with; drift is measured against it.
	Layout Layout
	// Salt of the id buckets, see [Bucket]. It is the index's own ID.
	Salt ID
}

// Layout is the vector and payload-index configuration of one Qdrant collection.
type Layout struct {
	Vectors      Heads                `json:"vectors"`
	Dim          int                  `json:"dim,omitempty"`
	ColBERTDim   int                  `json:"colbert_dim,omitempty"`
	Quantization string               `json:"quantization,omitempty"`
	OnDisk       bool                 `json:"on_disk,omitempty"`
	DenseType    string               `json:"dense_type,omitempty"`
	Fields       map[string]FieldType `json:"fields,omitempty"`
}

// ChunkInput is a chunk as a caller sent it, already cut.
type ChunkInput struct {
	Text string
	// Vectors the caller brought, or nil.
	Vectors *Vectors
}

// DocumentInput is one document of an ingest request: Text, or Chunks, never both.
type DocumentInput struct {
	ID       string
	Text     string
	Chunks   []ChunkInput
	Metadata Metadata
}

// DocumentStatus is what became of one document of a request.
type DocumentStatus string

// The statuses of the contract.
const (
	StatusIndexed    DocumentStatus = "indexed"
	StatusAccepted   DocumentStatus = "accepted"
	StatusUnchanged  DocumentStatus = "unchanged"
	StatusSuperseded DocumentStatus = "superseded"
	StatusFailed     DocumentStatus = "failed"
)

// DocumentResult is the answer for one document of an ingest request.
type DocumentResult struct {
	ID             string
	DocumentID     ID
	Version        int64
	Status         DocumentStatus
	Chunks         int
	ChunksEmbedded int
	PointIDs       []ID
	// Err says why Status is failed; nil otherwise.
	Err *Error
}

// ChunkView is a chunk as GET /documents/{id} shows it.
type ChunkView struct {
	ID      ID
	Ordinal int
	Text    string
	// State of its entry in the serving index: pending, indexed or failed.
	State       string
	Occurrence  uint32
	Incarnation uint32
	LastError   string
}

// DocumentView is a live document as the ledger knows it.
type DocumentView struct {
	ExternalID       string
	DocumentID       ID
	TargetVersion    int64
	ServingVersion   int64 // 0 when none serves yet
	Metadata         Metadata
	IncarnationFloor uint32
	CreatedAt        time.Time
	UpdatedAt        time.Time
	// Chunks of the target version, in order; empty in listings.
	Chunks     []ChunkView
	ChunkCount int
}

// CollectionView is a collection with its counts.
type CollectionView struct {
	Collection
	Index     Index
	Documents int64
	Chunks    int64
	Pending   int64
	Failed    int64
}

// IngestRequest asks for documents of one collection to be recorded and indexed. Each
// document succeeds or fails on its own; no two may carry the same id.
type IngestRequest struct {
	// Collection by name; it is created on first use.
	Collection string
	Documents  []DocumentInput
	// Wait until each document's version, or a later one, serves.
	Wait bool
}
