package corpus

import "time"

// EntryState is what the ledger says about one chunk in one index.
type EntryState uint8

// The states of an index entry. EntryNone means there is no entry.
const (
	EntryNone EntryState = iota
	EntryPending
	EntryIndexed
	EntryFailed
	EntryDead
)

// String returns the word the ledger stores, or "none".
func (s EntryState) String() string {
	switch s {
	case EntryPending:
		return "pending"
	case EntryIndexed:
		return "indexed"
	case EntryFailed:
		return "failed"
	case EntryDead:
		return "dead"
	default:
		return "none"
	}
}

// ParseEntryState is the inverse of [EntryState.String]; unknown words are EntryNone.
func ParseEntryState(s string) EntryState {
	switch s {
	case "pending":
		return EntryPending
	case "indexed":
		return EntryIndexed
	case "failed":
		return EntryFailed
	case "dead":
		return EntryDead
	default:
		return EntryNone
	}
}

// LedgerRow is what Postgres says about one id in one index. Which fields are set depends on
// the read: a walk at the depths quick and full leaves Document, Gen and the meta versions
// zero; only a read by id sets the fields from Version on.
type LedgerRow struct {
	ID       ID
	Document ID // zero on the tombstone of a point whose document is not known
	Gen      int64
	// Died is set when no version that serves or will serve holds the chunk. A walk sets it
	// as soon as a version dropped the chunk, which may still serve.
	Died  bool
	State EntryState
	// MetaVersion is the one known to be on the point, WantMeta the one it should hold.
	MetaVersion, WantMeta int64

	// Version changes whenever the entry's row does; 0 without an entry.
	Version int64
	// ExternalID of the document, where one is known.
	ExternalID string
	// Scheduled: the entry is dead and its deletion is queued.
	Scheduled bool
	// Stuck is set when the entry is failed; or was leased, is unsettled and its lease ran out
	// a while ago without anybody claiming it again; or is dead after many attempts to delete.
	Stuck bool
	// Absent is set on a dead entry whose point was read absent.
	Absent bool
	// Attempts and LastError of the workers.
	Attempts  int
	LastError string
}

// RollbackFacts is what a Postgres knows about the history of its own gen sequence.
type RollbackFacts struct {
	// LastGen is the highest gen that was ever taken here.
	LastGen int64
	// Gaps are the ranges, both ends included, that were jumped over and never handed out
	// and that no documented step has settled for the collection.
	Gaps [][2]int64
	// Stopped says why no delete may run in the collection; empty when deletes may run.
	Stopped string
	// Adopted is the number up to which an operator settled the history, 0 for never. Evidence
	// that was gathered under another value is out of date.
	Adopted int64
}

// Evidence reports whether a point of ours with this gen was written under a history that
// this Postgres has lost.
func (f RollbackFacts) Evidence(gen int64) bool {
	if gen > f.LastGen {
		return true
	}
	for _, g := range f.Gaps {
		if gen >= g[0] && gen <= g[1] {
			return true
		}
	}
	return false
}

// RepairAction is what a repair does to an entry.
type RepairAction uint8

// The actions. RepairNone only records the finding.
const (
	RepairNone RepairAction = iota
	// RepairRewrite makes the entry pending with need = rewrite.
	RepairRewrite
	// RepairMetadata records the meta version that the point really holds, so that the
	// entry is unsettled and its metadata is written again, guarded.
	RepairMetadata
	// RepairRearm lets a stuck entry be claimed at once, its attempts counted from zero.
	RepairRearm
	// RepairDelete is decided later, when the run enters tombstones.
	RepairDelete
)

// Decision is the outcome of the second look at one suspect. It is carried out only if the
// ledger still says what it said before the index was read.
type Decision struct {
	Finding Finding
	// Suspect is the kind under which the first look recorded the id.
	Suspect FindingKind
	// Row is the ledger's answer before the index was read; nil when it did not know the id.
	Row    *LedgerRow
	Action RepairAction
	// PointMeta is the meta version the point holds (RepairMetadata).
	PointMeta int64
	// Dismiss: nothing is wrong with the id; the suspicion is dropped.
	Dismiss bool
}

// OrphanClaim asks for one id to be declared dead in the ledger.
type OrphanClaim struct {
	ID       ID
	Document ID
	// Gen from the point's payload, 0 when unreadable.
	Gen int64
	// Foreign: the point is not ours, and an operator named its owner; its gen means nothing here.
	Foreign bool
}

// OrphanFate is what the ledger decided about an [OrphanClaim].
type OrphanFate uint8

// The fates.
const (
	// OrphanAlive: an ingest took the id meanwhile; it is not an orphan.
	OrphanAlive OrphanFate = iota
	// OrphanDead: the ledger declares the id dead; its point may be deleted.
	OrphanDead
	// OrphanElsewhere: the id is live in another collection; nothing may be deleted, because
	// the Qdrant collection may be that one's under another name.
	OrphanElsewhere
	// OrphanRolledBack: its gen is evidence of a rollback; nothing may be deleted.
	OrphanRolledBack
)

// DeleteBudget bounds what reconcile may delete in one collection and day.
type DeleteBudget struct {
	// Limit of points per collection and day over all runs.
	Limit int64
	// Force overrides the limit and the refusal of an empty ledger, never a rollback.
	Force bool
	// Horizon, when positive, only schedules the deletion: the point is dead, so no search
	// shows it, and the workers delete it after the horizon.
	Horizon time.Duration
}

// RunSpec is a reconcile run as it was asked for.
type RunSpec struct {
	ID ID
	// Collections by name; empty means all.
	Collections []string
	Depth       Depth
	Repair      bool
	// Sweep re-deletes points the ledger has already declared dead, even without Repair.
	Sweep         bool
	Force         bool
	MaxDeletes    float64
	DeleteForeign string
	// Origin is request, scrub or hint.
	Origin string
	// Lo and Hi bound the ids that are read, both included.
	Lo, Hi ID
	// SeedsOnly reads only suspects that were seeded, no range.
	SeedsOnly bool
}

// Whole reports whether the run covers every id.
func (s RunSpec) Whole() bool {
	return !s.SeedsOnly && s.Lo.IsZero() && s.Hi == MaxID
}

// MaxID is the largest id.
var MaxID = ID{255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255}

// RunStage is how far a run has come. All ranges of a run finish a stage before the next begins.
type RunStage int

// The stages of a run.
const (
	StagePrepare RunStage = iota
	StageScan
	StageConfirm
	StageSettle
	StageDelete
	StageFinish
)

// RunRecord is a run as the ledger keeps it.
type RunRecord struct {
	Spec            RunSpec
	State           RunState
	Stage           RunStage
	StartedAt       time.Time
	FinishedAt      *time.Time
	CancelRequested bool
	Error           string
	Targets         []RunTarget
	// Leader moves the run from stage to stage; Led is false once its lease ran out.
	Leader ID
	Led    bool
}

// RunTarget is one collection of a run.
type RunTarget struct {
	Collection ID
	Name       string
	// IndexPoints of the serving index: estimated when the run begins, counted before it deletes.
	IndexPoints int64
	// Stopped says why nothing may be deleted in this collection; empty otherwise.
	Stopped string
	// Braked says why the brake stopped this run's deletes here; empty otherwise.
	Braked string
}

// RunRange is one slice of one index's ids, leased by one worker at a time.
type RunRange struct {
	Run    ID
	Index  ID
	Lo, Hi ID
	// Cursor is the next id to read in the scan.
	Cursor ID
	// Stage is the one the range has to do next.
	Stage RunStage
	// Token of the lease.
	Token ID
}

// ScanProgress is what a worker adds to a range at a checkpoint.
type ScanProgress struct {
	Cursor ID
	// Compared ids read on either side; Expected that the ledger wants in the index, Points
	// that the index holds, since the last checkpoint.
	Compared, Expected, Points int64
	Suspects                   []Suspect
}

// Suspect is a difference that was seen once.
type Suspect struct {
	ID     ID
	Kind   FindingKind
	SeenAt time.Time
	// Looks counts second looks that found the ledger's row moving.
	Looks int
}
