package corpus

import "time"

// LiveIndex is an index that is written to.
type LiveIndex struct {
	Index
	CollectionName string
	// Ready: its Qdrant collection is known to exist. Until then it may be created; afterwards
	// one that is gone was lost, and nobody creates it again.
	Ready bool
	// Stopped: evidence of a rollback stands, and no delete may run in the collection.
	Stopped bool
	// Oldest is since when an entry has been due for work, zero if none is.
	Oldest time.Time
	// Dead: points wait for their deletion.
	Dead bool
}

// PreparedChunk is a chunk as the ledger accepts it.
type PreparedChunk struct {
	Text    string
	Content ContentHash
	// Occurrence counts equal chunks inside the document, from 0.
	Occurrence uint32
	// Vectors the caller brought, or nil.
	Vectors *Vectors
}

// PreparedDocument is a validated document, cut into chunks.
type PreparedDocument struct {
	ExternalID string
	// Content is the hash of the chunk list, of brought vectors and of the rule that cut it.
	Content  ContentHash
	Metadata Metadata
	// Chunks in order; nil when the document was not cut because it is believed unchanged. Then
	// an acceptance that finds it changed answers [NeedsChunks].
	Chunks []PreparedChunk
}

// Acceptance is what the ledger made of a document.
type Acceptance uint8

// The outcomes.
const (
	// NeedsChunks: the content differs from the target version and no chunks came along.
	NeedsChunks Acceptance = iota
	// Unchanged: content and metadata equal the target version's.
	Unchanged
	// NewMetadata: the content is equal, the metadata is not.
	NewMetadata
	// NewVersion: a version was made.
	NewVersion
)

// Accepted is the ledger's answer for one document.
type Accepted struct {
	Document   ID
	Acceptance Acceptance
	// Version that is now the target, and the version of its metadata.
	Version, MetaVersion int64
	// Serving is the version that serves, 0 for none.
	Serving int64
	// PointIDs of the target version, in order.
	PointIDs []ID
	// NewChunks that have to be embedded; those whose vectors were brought are not among them.
	NewChunks int
}

// Lease asks for work to be claimed: at most Max entries, until For has passed.
type Lease struct {
	Token ID
	Max   int
	For   time.Duration
}

// Entry is one claimed unit of work: a chunk in an index that does not yet hold what it should.
type Entry struct {
	Chunk, Document ID
	// Token of the lease under which it was claimed.
	Token ID
	Gen   int64
	// WantMeta is the meta_version the point should hold, Metadata what belongs to it. The map
	// is shared among entries and never changed.
	WantMeta int64
	Metadata Metadata
	Text     string
	// Vectors the caller brought, or nil.
	Vectors *Vectors
	// MetaOnly: the point is there; only its metadata is behind.
	MetaOnly bool
	// Rewrite: the point may hold something else and is to be written whole.
	Rewrite bool
	// First: nobody claimed this entry before, so nothing was ever sent for it.
	First bool
	// Attempts since it was last well, this one included.
	Attempts int
}

// EntryOutcome is what became of a claimed entry.
type EntryOutcome uint8

// The outcomes.
const (
	// EntryDone: the index holds the point with its gen and the meta_version of the result.
	EntryDone EntryOutcome = iota
	// EntryRetry: unknown or not now; it is tried again after the result's delay.
	EntryRetry
	// EntryGivenUp: it can never work as it is; it is settled as failed and reported.
	EntryGivenUp
	// EntryRewrite: the point is not what the ledger believed; it is to be written whole.
	EntryRewrite
)

// EntryResult reports one claimed entry back to the ledger.
type EntryResult struct {
	Chunk, Document, Token ID
	Outcome                EntryOutcome
	// Meta is the meta_version the point holds (EntryDone).
	Meta int64
	// Delay before the next try; Blameless retries do not count as attempts.
	Delay     time.Duration
	Blameless bool
	// Error for people, without document text.
	Error string
}

// DocumentProgress is where a document stands after work on it was recorded.
type DocumentProgress struct {
	Document ID
	// Known is false when the ledger holds no such document (any more).
	Known           bool
	Deleted         bool
	Target, Serving int64
	// MetaSettled is the lowest meta_version that any point of the serving version is known to
	// hold in the serving index.
	MetaSettled int64
	// Dying counts chunks whose points are not yet known to be absent.
	Dying int64
	// Failure says why an entry of the target version was given up, or is empty.
	Failure string
}
