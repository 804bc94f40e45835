package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// explain shows everything both stores know about one id. The exit code is a verdict: 3 when
// something differs.
func explain(ctx context.Context, e *Env, r Reconciler, o ReconcileOptions) int {
	var x corpus.Explanation
	err := e.patiently(ctx, 3, func() (err error) {
		x, err = r.Explain(ctx, o.ExplainID, o.Request.Collection)
		return err
	})
	if err != nil {
		return e.failure(ctx, "reconcile", err)
	}
	if o.JSON {
		raw, err := json.MarshalIndent(x, "", "  ")
		if err != nil {
			return e.failure(ctx, "reconcile", err)
		}
		e.printf("%s\n", raw)
	} else {
		writeExplanation(e.Stdout, &x)
	}
	for i := range x.Chunks {
		if len(x.Chunks[i].Verdicts) > 0 {
			return ExitDifferences
		}
	}
	return ExitOK
}

func writeExplanation(w io.Writer, x *corpus.Explanation) {
	p := func(format string, args ...any) { fmt.Fprintf(w, format, args...) }
	if d := x.Document; d != nil {
		p("Document %s in %s (%s)\n", printable(d.ExternalID), d.Collection, d.ID)
		p("  target version %d, serving version %d, incarnation floor %d, updated %s\n", d.TargetVersion, d.ServingVersion, d.IncarnationFloor, d.UpdatedAt.UTC().Format("2006-01-02 15:04:05 UTC"))
		if d.DeletedAt != nil {
			p("  deleted %s\n", d.DeletedAt.UTC().Format("2006-01-02 15:04:05 UTC"))
		}
	}
	for i := range x.Chunks {
		c := &x.Chunks[i]
		p("\nChunk %s in %s (%s, %s)\n", c.ID, c.Collection, c.Index, c.IndexState)
		if l := c.Ledger; l == nil {
			p("  Postgres: knows no such chunk\n")
		} else {
			p("  Postgres: %s, gen %d, born in version %d", l.State, l.Gen, l.BornVersion)
			if l.DiedVersion != nil {
				p(", died in version %d", *l.DiedVersion)
			}
			p(", metadata %d of %d, %s\n", l.MetaVersion, l.WantMeta, plural(int64(l.Attempts), "attempt"))
			if l.LastError != "" {
				p("            last error: %s\n", printable(l.LastError))
			}
		}
		switch q := c.Point; {
		case c.PointError != "":
			p("  Index:    cannot be read: %s\n", printable(c.PointError))
		case q == nil:
			p("  Index:    has no such point\n")
		default:
			whose := "ours"
			if !q.Ours {
				whose = "not ours"
			}
			p("  Index:    a point, %s, gen %d, metadata %d, vectors %s\n", whose, q.Gen, q.MetaVersion, orElse(q.Vectors, "not read"))
			if len(q.Unreadable) > 0 {
				p("            unreadable: %s\n", printable(strings.Join(q.Unreadable, ", ")))
			}
		}
		for _, v := range c.Verdicts {
			p("  %s: %s\n    Repair: %s\n", strings.ReplaceAll(string(v.Kind), "_", " "), printable(v.Detail), v.Repair)
		}
	}
	if x.Truncated {
		p("\nThere are more chunks than are shown.\n")
	}
	p("\n%s\n", printable(x.Verdict))
}
