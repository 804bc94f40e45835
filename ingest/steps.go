package ingest

// Step names a point of the write path at which a process may die.
type Step string

// The steps, in the order of a document's way.
const (
	StepValidated    Step = "validated"     // nothing is durable
	StepAccepted     Step = "accepted"      // the transaction is committed, the caller not yet told
	StepClaimed      Step = "claimed"       // work is leased
	StepEmbedded     Step = "embedded"      // vectors are computed, nothing is sent
	StepWritten      Step = "written"       // the index completed a write, the ledger does not know
	StepReadBack     Step = "read-back"     // points were read, the ledger does not know
	StepSettled      Step = "settled"       // results are committed, waiters not yet told
	StepMetadataSent Step = "metadata-sent" // a guarded metadata write completed
	StepDeleted      Step = "deleted"       // dead points were deleted, not confirmed
	StepConfirmed    Step = "confirmed"     // absence is committed
	StepPurged       Step = "purged"        // tombstones are gone, floors raised
	StepIndexCreated Step = "index-created" // the Qdrant collection exists, the ledger does not know
	StepIndexDropped Step = "index-dropped" // the Qdrant collection is gone, its rows are not
)

// Steps lists all steps, for campaigns that visit each.
var Steps = []Step{
	StepValidated, StepAccepted, StepClaimed, StepEmbedded, StepWritten, StepReadBack, StepSettled, StepMetadataSent,
	StepDeleted, StepConfirmed, StepPurged, StepIndexCreated, StepIndexDropped,
}
