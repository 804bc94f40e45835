package reconcile

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Exit codes of lockstep reconcile; 2 is wrong usage and never a verdict.
const (
	ExitConsistent  = 0
	ExitCheckFailed = 1
	ExitDifferences = 3
	ExitRemain      = 4
	ExitBraked      = 5
	ExitCancelled   = 130
)

// ExitCode is what the command line ends with after a run.
func ExitCode(r corpus.RunReport) int {
	var found, repaired int64
	for _, c := range r.Collections {
		found += c.Findings.Total()
		repaired += c.Repaired.Total()
	}
	switch {
	case r.State == corpus.RunCancelled:
		return ExitCancelled
	case r.State == corpus.RunBraked:
		return ExitBraked
	case r.State != corpus.RunDone:
		return ExitCheckFailed
	case found == repaired:
		return ExitConsistent
	case r.Repair:
		return ExitRemain
	default:
		return ExitDifferences
	}
}

// advice explains one kind of finding to a person.
type advice struct{ what, why, repair string }

var advices = map[corpus.FindingKind]advice{
	corpus.Missing: {"the ledger says indexed, the index has no such point",
		"Qdrant lost data (a node or a shard, a restore from a snapshot), or somebody deleted points",
		"the chunks are embedded and written again by the ingest workers, then read back"},
	corpus.Orphan: {"the index holds points that the ledger declared dead or does not know",
		"a write that arrived late, an index restored from an older copy, or points written past Lockstep",
		"each id is declared dead in the ledger, its point deleted by id, and its absence read back"},
	corpus.Foreign: {"the index holds points that this installation did not sign",
		"another program, or another installation, writes into the same Qdrant collection",
		"none; to delete them name their owner: --delete-foreign OWNER (or none)"},
	corpus.StalePayload: {"a point's payload is not what the ledger says",
		"the payload was changed past Lockstep, or an older copy of the index was restored",
		"the payload, or the whole point, is written again under its version guard, then read back"},
	corpus.CorruptVector: {"a point's vectors are damaged",
		"the vectors were overwritten past Lockstep, or storage was damaged",
		"the chunk is embedded and the point written again, then read back"},
	corpus.Stuck: {"entries that nobody works on although they need it",
		"the embedder refuses the text for ever, or workers died and none is running",
		"they are queued again with their attempts counted from zero"},
	corpus.ConfigDrift: {"a Qdrant collection is not configured as it was made",
		"somebody changed it, or restored another one under its name",
		"none: it is never guessed; see docs/reconcile.md"},
	corpus.LostIndex: {"a Qdrant collection is gone",
		"it was dropped, or Qdrant lost its data",
		"a new one is built from the ledger under a new name and takes its place when it is full"},
	corpus.OrphanIndex: {"Qdrant holds a collection of ours that the ledger does not know",
		"a crash between two steps of creation, or a ledger restored from an older backup",
		"none: drop it in Qdrant once you know that nothing needs it"},
	corpus.RolledBack: {"the ledger lost part of its own history",
		"Postgres was restored from a backup, or this is not the Postgres the index was written from",
		"nothing is deleted until it is resolved: lockstep reconcile --adopt-rollback or --discard-rollback (docs/reconcile.md)"},
}

func repairWords(k corpus.FindingKind) string { return advices[k].repair }

// WriteText writes a run's report for people: what is wrong, why it may have happened, what a
// repair would do, and the exact command for it.
func WriteText(w io.Writer, r corpus.RunReport) error {
	var b strings.Builder
	took := ""
	if r.FinishedAt != nil {
		took = fmt.Sprintf(" in %s", r.FinishedAt.Sub(r.StartedAt).Round(100*time.Millisecond))
	}
	fmt.Fprintf(&b, "Run %s (%s, %s): %s%s, %d ids compared\n", r.RunID, r.Depth, mode(r), r.State, took, r.Compared)
	if r.Error != "" {
		fmt.Fprintf(&b, "  %s\n", r.Error)
	}
	for _, c := range r.Collections {
		fmt.Fprintf(&b, "\nCollection %q: %s\n", c.Collection, c.Status)
		fmt.Fprintf(&b, "  %d documents, %d points expected, %d in the index, %d on their way\n", c.Documents, c.ExpectedPoints, c.IndexedPoints, c.Pending)
		open := false
		for _, k := range corpus.FindingKinds {
			n, done := c.Findings[k], c.Repaired[k]
			if n == 0 {
				continue
			}
			a := advices[k]
			fmt.Fprintf(&b, "\n  %s: %d found, %d repaired\n    what    %s\n", k, n, done, a.what)
			if n > done {
				open = true
				fmt.Fprintf(&b, "    why     %s\n    repair  %s\n", a.why, a.repair)
			}
		}
		if len(c.Sample) > 0 {
			b.WriteString("\n")
			tw := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
			for i, f := range c.Sample {
				if i == 20 {
					fmt.Fprintf(tw, "  ... and more: --output json lists %d\n", len(c.Sample))
					break
				}
				mark := "open"
				if f.Repaired {
					mark = "repaired"
				}
				fmt.Fprintf(tw, "  %s\t%s\t%s\t%s\t%s\n", f.Kind, f.ID, mark, f.Document, f.Detail)
			}
			_ = tw.Flush() // into memory
		}
		if open && !r.Repair {
			fmt.Fprintf(&b, "\n  To repair: lockstep reconcile --collection %q --depth %s --repair\n", c.Collection, r.Depth)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func mode(r corpus.RunReport) string {
	if r.Repair {
		return "repair"
	}
	return "detection only"
}
