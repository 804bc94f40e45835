package reconcile

import (
	"fmt"
	"slices"
	"strings"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// judge compares what the two stores say about single ids. It holds no state that changes.
type judge struct {
	index corpus.Index
	owner corpus.ID
	facts corpus.RollbackFacts
	// payload: the points were read with their payload; vectors: with their vectors too.
	payload, vectors bool
}

// verdict is one difference at one id, and what a repair would do about it.
type verdict struct {
	kind   corpus.FindingKind
	detail string
	action corpus.RepairAction
}

// suspicion is the judgement of a scan at the depths quick and full, which read ids alone:
// whether the two sides disagree about the id's presence. A point that only some replicas hold
// is neither present where it should be nor absent where it should not. ok is false if the
// sides agree.
func suspicion(row *corpus.LedgerRow, pt *corpus.PointState) (kind corpus.FindingKind, ok bool) {
	switch {
	case row == nil:
		return corpus.Orphan, pt != nil
	case row.State == corpus.EntryIndexed:
		return corpus.Missing, pt == nil || pt.Partial
	case row.State == corpus.EntryNone && !row.Died:
		return corpus.Missing, true
	case row.State == corpus.EntryNone, row.State == corpus.EntryDead:
		return corpus.Orphan, pt != nil
	default: // pending and failed entries promise nothing about the point
		return "", false
	}
}

// look names every difference at one id. row is nil when the ledger does not know the id, pt
// when the index does not hold it.
func (j judge) look(row *corpus.LedgerRow, pt *corpus.PointState) []verdict {
	switch {
	case row == nil && pt == nil:
		return nil
	case row == nil:
		return []verdict{j.unknown(pt)}
	case pt == nil:
		return j.absent(row)
	default:
		return j.present(row, pt)
	}
}

func (j judge) unknown(pt *corpus.PointState) verdict {
	switch {
	case !pt.HasOwner:
		return verdict{corpus.Foreign, "the index holds a point that nobody signed, and the ledger does not know its id", corpus.RepairDelete}
	case pt.Payload.Owner != j.owner:
		return verdict{corpus.Foreign, fmt.Sprintf("the index holds a point signed by installation %s; this is %s", pt.Payload.Owner, j.owner), corpus.RepairDelete}
	case j.facts.Evidence(pt.Payload.Gen):
		return j.rolledBack(pt)
	default:
		return verdict{corpus.Orphan, fmt.Sprintf("the index holds a point of ours (gen %d, document %s) and the ledger does not know its id", pt.Payload.Gen, pt.Payload.Document), corpus.RepairDelete}
	}
}

func (j judge) rolledBack(pt *corpus.PointState) verdict {
	return verdict{corpus.RolledBack, fmt.Sprintf("the point carries gen %d, which this Postgres never handed out (its last is %d): the point was written under a history that this Postgres has lost",
		pt.Payload.Gen, j.facts.LastGen), corpus.RepairNone}
}

func (j judge) absent(row *corpus.LedgerRow) []verdict {
	var out []verdict
	switch {
	case row.State == corpus.EntryIndexed:
		out = append(out, verdict{corpus.Missing, fmt.Sprintf("the ledger says indexed (meta version %d) and the index has no such point", row.MetaVersion), corpus.RepairRewrite})
	case row.State == corpus.EntryNone && !row.Died:
		out = append(out, verdict{corpus.Missing, "the chunk is live, has no entry for this index, and the index has no such point", corpus.RepairRewrite})
	}
	return append(out, j.stuck(row)...)
}

// stuck is judged beside presence: it speaks of the queue, not of the point.
func (j judge) stuck(row *corpus.LedgerRow) []verdict {
	if !row.Stuck {
		return nil
	}
	why := "nobody claimed it again after its lease ran out"
	switch row.State {
	case corpus.EntryFailed:
		why = "the workers gave up on it"
	case corpus.EntryDead:
		why = "its point is still not known to be absent"
	}
	detail := fmt.Sprintf("the entry is %s after %d attempts and %s", row.State, row.Attempts, why)
	if row.LastError != "" {
		detail += "; last error: " + row.LastError
	}
	return []verdict{{corpus.Stuck, detail, corpus.RepairRearm}}
}

func (j judge) present(row *corpus.LedgerRow, pt *corpus.PointState) []verdict {
	if row.State == corpus.EntryDead || row.State == corpus.EntryNone && row.Died {
		if row.Scheduled {
			return j.stuck(row) // its deletion is queued: ordinary work, however long the queue
		}
		if pt.HasOwner && pt.Payload.Owner == j.owner && j.facts.Evidence(pt.Payload.Gen) {
			return []verdict{j.rolledBack(pt)}
		}
		detail := "the ledger declared the id dead and the index still holds its point"
		if row.Absent {
			detail = "the point was read absent after its deletion and is back: a late write resurrected it, or the index was restored from an older copy"
		}
		return []verdict{{corpus.Orphan, detail, corpus.RepairDelete}}
	}
	out := j.stuck(row)
	if row.State == corpus.EntryNone && !row.Died {
		out = append(out, verdict{corpus.Stuck, "the chunk is live and its point is present, but it has no entry for this index, so nobody would repair it", corpus.RepairRewrite})
	}
	if row.State != corpus.EntryIndexed {
		return out
	}
	if pt.Partial {
		return append(out, verdict{corpus.Missing, "only some replicas of the index hold the point", corpus.RepairRewrite})
	}
	if j.payload {
		if pt.HasOwner && pt.Payload.Owner == j.owner && !unreadable(pt, corpus.KeyGen) && j.facts.Evidence(pt.Payload.Gen) {
			return append(out, j.rolledBack(pt))
		}
		out = append(out, j.stale(row, pt)...)
	}
	if j.vectors {
		out = append(out, j.corrupt(pt)...)
	}
	return out
}

func unreadable(pt *corpus.PointState, key string) bool {
	return slices.Contains(pt.Unreadable, key)
}

func (j judge) stale(row *corpus.LedgerRow, pt *corpus.PointState) []verdict {
	var wrong []string
	action := corpus.RepairRewrite
	p := pt.Payload
	switch {
	case !pt.HasOwner:
		wrong = append(wrong, "its owner is gone or unreadable")
	case p.Owner != j.owner:
		wrong = append(wrong, fmt.Sprintf("it is signed by installation %s", p.Owner))
	}
	switch {
	case unreadable(pt, corpus.KeyDocument):
		wrong = append(wrong, "its document is unreadable")
	case p.Document != row.Document:
		wrong = append(wrong, fmt.Sprintf("it names document %s, the ledger %s", p.Document, row.Document))
	}
	switch {
	case unreadable(pt, corpus.KeyGen):
		wrong = append(wrong, "its gen is unreadable")
	case p.Gen != row.Gen:
		wrong = append(wrong, fmt.Sprintf("it carries gen %d, the ledger %d", p.Gen, row.Gen))
	}
	switch {
	case unreadable(pt, corpus.KeyBucket):
		wrong = append(wrong, "its bucket is unreadable")
	case p.Bucket != corpus.Bucket(j.index.Salt, row.ID):
		wrong = append(wrong, "its bucket is wrong")
	}
	if unreadable(pt, corpus.KeyMetadata) {
		wrong = append(wrong, "its metadata is unreadable")
	}
	// An entry whose two meta versions differ is work that the queue already holds.
	if row.MetaVersion == row.WantMeta {
		switch {
		case unreadable(pt, corpus.KeyMetaVersion):
			wrong = append(wrong, "its meta version is unreadable")
		case p.MetaVersion < row.WantMeta:
			if len(wrong) == 0 {
				action = corpus.RepairMetadata
			}
			wrong = append(wrong, fmt.Sprintf("it holds meta version %d, the ledger wants %d", p.MetaVersion, row.WantMeta))
		case p.MetaVersion > row.WantMeta:
			wrong = append(wrong, fmt.Sprintf("it holds meta version %d, newer than the ledger's %d", p.MetaVersion, row.WantMeta))
		}
	}
	if len(wrong) == 0 {
		return nil
	}
	return []verdict{{corpus.StalePayload, "the point's payload is not the ledger's: " + strings.Join(wrong, "; "), action}}
}

func (j judge) corrupt(pt *corpus.PointState) []verdict {
	if why := vectorDamage(j.index.Layout, pt); why != "" {
		return []verdict{{corpus.CorruptVector, why, corpus.RepairRewrite}}
	}
	return nil
}

// vectorDamage says what is wrong with a point's vectors, or "".
func vectorDamage(l corpus.Layout, pt *corpus.PointState) string {
	v := pt.Vectors
	if v == nil {
		v = &corpus.Vectors{}
	}
	if missing := l.Vectors &^ v.Heads(); missing != 0 {
		return fmt.Sprintf("the point has no %s vector", missing)
	}
	if l.Vectors.Has(corpus.Dense) {
		if len(v.Dense) != l.Dim {
			return fmt.Sprintf("the dense vector has %d values, the index is made for %d", len(v.Dense), l.Dim)
		}
		if zero(v.Dense) {
			return "the dense vector is all zeros"
		}
	}
	if l.Vectors.Has(corpus.ColBERT) {
		for _, row := range v.ColBERT {
			if len(row) != l.ColBERTDim {
				return fmt.Sprintf("a ColBERT row has %d values, the index is made for %d", len(row), l.ColBERTDim)
			}
		}
	}
	if !v.Finite() {
		return "a vector holds a value that is not a finite number"
	}
	if unreadable(pt, corpus.KeyChecksum) {
		return "the checksum in the point's payload is absent or unreadable"
	}
	if sum := corpus.ChecksumVectors(v, l.DenseType); sum != pt.Payload.Checksum {
		return fmt.Sprintf("the vectors have checksum %s, the point's own payload says %s", sum, pt.Payload.Checksum)
	}
	return ""
}

func zero(row []float32) bool {
	for _, x := range row {
		if x != 0 {
			return false
		}
	}
	return true
}
