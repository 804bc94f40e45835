package corpus

// Payload keys of a point. Lockstep's own values lie under top-level keys with a leading
// underscore; the document's metadata lies whole under [KeyMetadata], so that one guarded
// set-payload replaces all of it, removed keys included.
const (
	KeyOwner       = "_owner"
	KeyDocument    = "_doc"
	KeyGen         = "_gen"
	KeyMetaVersion = "_mv"
	KeyBucket      = "_bucket"
	KeyChecksum    = "_sum"
	KeyMetadata    = "m"
)

// Payload is what every point of ours carries.
type Payload struct {
	// Owner is the installation that wrote the point.
	Owner ID
	// Document is the ledger's id of the document.
	Document ID
	// Gen comes from the one sequence, in the transaction that created the chunk. Below 2^53.
	Gen int64
	// MetaVersion, from the same sequence, versions Metadata: a last-writer-wins register.
	MetaVersion int64
	// Bucket of the point's id, see [Bucket].
	Bucket uint32
	// Checksum of the vectors as the index stores them, see [ChecksumVectors].
	Checksum string
	// Metadata of the document, copied for filtering.
	Metadata Metadata
}

// Point is one row of an index.
type Point struct {
	ID      ID
	Vectors Vectors
	Payload Payload
}

// PointState is a point as the index answered it. A field of the payload that was absent or
// of the wrong type is zero, and its name is listed in Unreadable.
type PointState struct {
	ID      ID
	Payload Payload
	// Unreadable lists payload keys of ours that were absent or of the wrong type.
	Unreadable []string
	// HasOwner is false on a point nobody signed.
	HasOwner bool
	// Vectors, only if they were asked for.
	Vectors *Vectors
	// Partial is set when some replicas of a replicated index hold the point and others do
	// not: it is neither proved present nor proved absent.
	Partial bool
}

// MetadataWrite asks for one document's metadata to be set on its points, guarded so that
// it applies only where the stored version is lower or absent.
type MetadataWrite struct {
	Points      []ID
	MetaVersion int64
	Metadata    Metadata
}

// PartialError reports a batch of which only part is known to be done. Points not in Done
// are in an unknown state.
type PartialError struct {
	Done []ID
	// Refused points were not sent, for they can never be stored as they are; each with its
	// reason, of kind [Invalid].
	Refused map[ID]error
	Err     error
}

// Error describes the cause.
func (e *PartialError) Error() string { return "batch partly done: " + e.Err.Error() }

// Unwrap returns the cause.
func (e *PartialError) Unwrap() error { return e.Err }
