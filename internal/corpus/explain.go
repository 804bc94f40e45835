package corpus

import "time"

// Explanation is everything both stores know about one chunk or document.
type Explanation struct {
	// Query as it was asked: a chunk's or document's id, or a document's external id.
	Query string `json:"query"`
	// Document, when the ledger knows one.
	Document *ExplainedDocument `json:"document,omitempty"`
	// Chunks, at most a few hundred: one element for each id and index.
	Chunks []ExplainedChunk `json:"chunks"`
	// Truncated is set when there were more.
	Truncated bool `json:"truncated,omitempty"`
	// Verdict in a sentence.
	Verdict string `json:"verdict"`
}

// ExplainedDocument is a document as the ledger knows it.
type ExplainedDocument struct {
	Collection       string     `json:"collection"`
	ID               ID         `json:"id"`
	ExternalID       string     `json:"external_id"`
	TargetVersion    int64      `json:"target_version"`
	ServingVersion   int64      `json:"serving_version"`
	DeletedAt        *time.Time `json:"deleted_at,omitempty"`
	IncarnationFloor int64      `json:"incarnation_floor"`
	UpdatedAt        time.Time  `json:"updated_at"`
}

// ExplainedChunk is one id in one index, from both sides.
type ExplainedChunk struct {
	ID         ID     `json:"id"`
	Collection string `json:"collection"`
	// Index is the Qdrant collection's name.
	Index      string          `json:"index"`
	IndexState IndexState      `json:"index_state"`
	Ledger     *ExplainedRow   `json:"ledger"`
	Point      *ExplainedPoint `json:"point"`
	// PointError says why the index could not be read.
	PointError string             `json:"point_error,omitempty"`
	Verdicts   []ExplainedVerdict `json:"verdicts"`

	// In is the index to read; it is not shown.
	In Index `json:"-"`
}

// ExplainedRow is the ledger's side.
type ExplainedRow struct {
	// State of the entry: pending, indexed, failed, dead or none.
	State       string     `json:"state"`
	Need        string     `json:"need,omitempty"`
	Gen         int64      `json:"gen"`
	BornVersion int64      `json:"born_version"`
	DiedVersion *int64     `json:"died_version,omitempty"`
	Occurrence  int64      `json:"occurrence"`
	Incarnation int64      `json:"incarnation"`
	MetaVersion int64      `json:"meta_version"`
	WantMeta    int64      `json:"want_meta"`
	Attempts    int        `json:"attempts"`
	LastError   string     `json:"last_error,omitempty"`
	LeaseUntil  *time.Time `json:"lease_until,omitempty"`
	AbsentAt    *time.Time `json:"absent_at,omitempty"`
	ChangedAt   *time.Time `json:"changed_at,omitempty"`
}

// ExplainedPoint is the index's side.
type ExplainedPoint struct {
	Ours        bool     `json:"ours"`
	Owner       *ID      `json:"owner,omitempty"`
	Document    ID       `json:"document_id"`
	Gen         int64    `json:"gen"`
	MetaVersion int64    `json:"meta_version"`
	Checksum    string   `json:"checksum"`
	Vectors     string   `json:"vectors"`
	Unreadable  []string `json:"unreadable,omitempty"`
	Partial     bool     `json:"partial,omitempty"`
}

// ExplainedVerdict is one difference and what a repair would do.
type ExplainedVerdict struct {
	Kind   FindingKind `json:"kind"`
	Detail string      `json:"detail"`
	Repair string      `json:"repair"`
}
