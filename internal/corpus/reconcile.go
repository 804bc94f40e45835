package corpus

import "time"

// Depth is how much a reconcile reads.
type Depth string

// The depths.
const (
	Quick Depth = "quick"
	Full  Depth = "full"
	Deep  Depth = "deep"
)

// FindingKind names one way in which the stores can differ.
type FindingKind string

// The findings of the contract.
const (
	Missing       FindingKind = "missing"
	Orphan        FindingKind = "orphan"
	Foreign       FindingKind = "foreign"
	StalePayload  FindingKind = "stale_payload"
	CorruptVector FindingKind = "corrupt_vector"
	Stuck         FindingKind = "stuck"
	ConfigDrift   FindingKind = "config_drift"
	LostIndex     FindingKind = "lost_index"
	OrphanIndex   FindingKind = "orphan_index"
	RolledBack    FindingKind = "rolled_back"
)

// FindingKinds lists all kinds in the contract's order.
var FindingKinds = []FindingKind{
	Missing, Orphan, Foreign, StalePayload, CorruptVector, Stuck, ConfigDrift, LostIndex, OrphanIndex, RolledBack,
}

// Counts maps each finding kind to a number. A report always carries all kinds.
type Counts map[FindingKind]int64

// NewCounts returns zero for every kind.
func NewCounts() Counts {
	c := make(Counts, len(FindingKinds))
	for _, k := range FindingKinds {
		c[k] = 0
	}
	return c
}

// Total sums all kinds.
func (c Counts) Total() int64 {
	var n int64
	for _, v := range c {
		n += v
	}
	return n
}

// Finding is one confirmed difference.
type Finding struct {
	Kind FindingKind `json:"kind"`
	// ID of the point, or of the index for the kinds that speak of one.
	ID ID `json:"id"`
	// Document is the external id, where Postgres knows one.
	Document string `json:"document,omitempty"`
	// Detail is the evidence from both sides, for people.
	Detail string `json:"detail"`
	// SeenAt is when it was first seen; ConfirmedAt when it was read again, unchanged.
	SeenAt      time.Time `json:"seen_at"`
	ConfirmedAt time.Time `json:"confirmed_at"`
	// Repaired is set when repair was asked for, done, and read back.
	Repaired bool `json:"repaired"`
}

// Verdict is a collection's state as its last run left it.
type Verdict string

// The verdicts of the contract.
const (
	Consistent   Verdict = "consistent"
	Inconsistent Verdict = "inconsistent"
	Unknown      Verdict = "unknown"
	Running      Verdict = "running"
)

// ReconcileRequest starts a run.
type ReconcileRequest struct {
	// Collection by name; empty means all.
	Collection string
	Depth      Depth
	Repair     bool
	// MaxDeletes is the brake's share of a collection's points, 0 to 1; 0 means the default 0.1.
	MaxDeletes float64
	// Force overrides the share, never a rollback.
	Force bool
	// Resume continues the last unfinished run instead of starting one.
	Resume bool
	// DeleteForeign names a foreign owner whose points are to be deleted ("none" for unsigned points).
	DeleteForeign string
}

// CollectionReport is the contract's verdict on one collection.
type CollectionReport struct {
	Collection     string    `json:"collection"`
	Status         Verdict   `json:"status"`
	CheckedAt      time.Time `json:"checked_at,omitzero"` // absent until the first check
	RunID          ID        `json:"run_id,omitzero"`
	Depth          Depth     `json:"depth,omitempty"`
	Documents      int64     `json:"documents"`
	ExpectedPoints int64     `json:"expected_points"`
	IndexedPoints  int64     `json:"indexed_points"`
	Pending        int64     `json:"pending"`
	Findings       Counts    `json:"findings"`
	Repaired       Counts    `json:"repaired"`
	Sample         []Finding `json:"sample"`
}

// RunState is where a run is in its life.
type RunState string

// The states of a run.
const (
	RunRunning   RunState = "running"
	RunDone      RunState = "done"
	RunFailed    RunState = "failed"
	RunBraked    RunState = "braked"
	RunCancelled RunState = "cancelled"
)

// RunReport is one run over one or more collections, finished or under way.
type RunReport struct {
	RunID      ID         `json:"run_id"`
	State      RunState   `json:"state"`
	Depth      Depth      `json:"depth"`
	Repair     bool       `json:"repair"`
	StartedAt  time.Time  `json:"started_at"`
	FinishedAt *time.Time `json:"finished_at,omitempty"`
	// Compared counts ids read on either side; Expected is the estimate it grows towards.
	Compared int64 `json:"compared"`
	Expected int64 `json:"expected"`
	// Error says why a run failed or was stopped by the brake, and what to do.
	Error       string             `json:"error,omitempty"`
	Collections []CollectionReport `json:"collections"`
}
