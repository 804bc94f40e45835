package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Reconciler runs reconciles: a server over HTTP ([Client]), or the room itself (--direct).
type Reconciler interface {
	Start(ctx context.Context, req corpus.ReconcileRequest) (corpus.ID, error)
	Run(ctx context.Context, id corpus.ID) (corpus.RunReport, error)
	Cancel(ctx context.Context, id corpus.ID) error
	Explain(ctx context.Context, query, collection string) (corpus.Explanation, error)
	AdoptRollback(ctx context.Context, collection string) error
	DiscardRollback(ctx context.Context, collection string) error
}

// ReconcileOptions are the parsed arguments of `lockstep reconcile`.
type ReconcileOptions struct {
	Request corpus.ReconcileRequest
	JSON    bool
	Quiet   bool
	// Direct works on the stores without a server; the caller builds the Reconciler.
	Direct bool
	Server string
	// ExplainID asks what both stores know of one id, instead of a run.
	ExplainID string
	// Rollback, adopt or discard, ends the stop of a collection, instead of a run.
	Rollback string
	// DirectArgs are what follows "--": flags of the configuration, for --direct.
	DirectArgs []string
}

// ParseReconcile reads the arguments. ok is false when the command is done, with its code.
func ParseReconcile(e *Env) (o ReconcileOptions, code int, ok bool) {
	set := e.flags("reconcile", "[flags]",
		"Compares Postgres with the vector index and says what differs; with --repair, repairs it.\nExit codes: 0 consistent or all repaired, 1 the check failed, 2 wrong usage, 3 differences found,\n4 differences remain after repair, 5 stopped by the brake, 130 cancelled.\nAgainst the stores without a server: reconcile --direct [flags] -- [configuration flags].")
	server := e.serverFlag(set)
	output := outputFlag(set)
	collection := set.String("collection", "", "collection to compare")
	all := set.Bool("all", false, "compare all collections (the default)")
	depth := set.String("depth", "full", "quick (counts), full (every id) or deep (payloads and vectors too)")
	set.BoolVar(&o.Request.Repair, "repair", false, "repair what differs")
	set.Float64Var(&o.Request.MaxDeletes, "max-deletes", 0, "the brake: largest share of a collection's points that may be deleted (default: the server's, 0.1)")
	set.BoolVar(&o.Request.Force, "force", false, "override the brake's share; a rollback is never overridden")
	set.BoolVar(&o.Request.Resume, "resume", false, "go on with the last unfinished run")
	set.StringVar(&o.Request.DeleteForeign, "delete-foreign", "", "delete points of this foreign owner (a UUID, or none for unsigned points); needs --repair")
	set.StringVar(&o.ExplainID, "explain", "", "show everything both stores know about one chunk or document id, and the verdict")
	set.StringVar(&o.Rollback, "rollback", "", "decide for a collection whose Postgres was rolled back: adopt what Postgres says, or discard the index and build it again; needs --collection")
	set.BoolVar(&o.Quiet, "quiet", false, "draw no progress")
	set.BoolVar(&o.Direct, "direct", false, "work on the stores themselves, without a server")
	args := e.Args
	for i, a := range args {
		if a == "--" {
			o.DirectArgs = args[i+1:]
			e.Args = args[:i]
			break
		}
	}
	operands, code, ok := e.parse(set)
	e.Args = args
	if !ok {
		return o, code, false
	}
	o.Server, o.JSON = *server, *output == "json"
	o.Request.Collection, o.Request.Depth = *collection, corpus.Depth(*depth)
	fault := ""
	switch {
	case len(operands) > 0:
		fault = fmt.Sprintf("unexpected argument %q", operands[0])
	case *collection != "" && *all:
		fault = "give --collection or --all, not both"
	case !oneOf(*depth, "quick", "full", "deep"):
		fault = "--depth is quick, full or deep"
	case !oneOf(*output, "text", "json"):
		fault = "--output is text or json"
	case !(o.Request.MaxDeletes >= 0 && o.Request.MaxDeletes <= 1):
		fault = "--max-deletes is a share from 0 to 1"
	case (o.Request.Force || o.Request.MaxDeletes > 0 || o.Request.DeleteForeign != "") && !o.Request.Repair:
		fault = "--force, --max-deletes and --delete-foreign need --repair"
	case o.Rollback != "" && !oneOf(o.Rollback, "adopt", "discard"):
		fault = "--rollback is adopt or discard"
	case o.Rollback != "" && *collection == "":
		fault = "--rollback needs --collection: it is decided for one at a time"
	case o.Rollback != "" && (o.Request.Repair || o.ExplainID != ""):
		fault = "--rollback goes alone; repair in the next run"
	case len(o.DirectArgs) > 0 && !o.Direct:
		fault = "configuration flags after -- need --direct"
	}
	if fault != "" {
		return o, e.usage("reconcile", "%s", fault), false
	}
	return o, ExitOK, true
}

// pollEvery is how often a run's progress is asked for.
const pollEvery = 500 * time.Millisecond

// cancelTime bounds the request that cancels a run after the command was interrupted.
const cancelTime = 10 * time.Second

// Reconcile does what o asks of r: explains an id, decides about a rollback, or starts a run,
// follows it to its end and reports. Interrupted, it cancels the run: what was repaired stays
// repaired, and --resume goes on from there.
func Reconcile(ctx context.Context, e *Env, r Reconciler, o ReconcileOptions) int {
	switch {
	case o.ExplainID != "":
		return explain(ctx, e, r, o)
	case o.Rollback != "":
		return decide(ctx, e, r, o)
	}
	var id corpus.ID
	err := e.patiently(ctx, 5, func() (err error) {
		id, err = r.Start(ctx, o.Request)
		return err
	})
	if err != nil {
		return e.failure(ctx, "reconcile", err)
	}
	bar := e.progress(o.Quiet || o.JSON)
	var run corpus.RunReport
	for {
		err = e.patiently(ctx, 10, func() (err error) {
			run, err = r.Run(ctx, id)
			return err
		})
		if err != nil {
			bar.clear()
			if ctx.Err() != nil {
				return e.cancelRun(ctx, r, id)
			}
			return e.failure(ctx, "reconcile", fmt.Errorf("follow run %s: %w", id, err))
		}
		if run.State != corpus.RunRunning {
			break
		}
		found := int64(0)
		for _, c := range run.Collections {
			found += c.Findings.Total()
		}
		bar.show(float64(run.Compared), float64(run.Expected), fmt.Sprintf("%s ids compared, %s", count(run.Compared), plural(found, "difference")))
		if e.sleep(ctx, pollEvery) != nil {
			bar.clear()
			return e.cancelRun(ctx, r, id)
		}
	}
	bar.clear()
	if o.JSON {
		if err := writeReportJSON(e.Stdout, &run); err != nil {
			return e.failure(ctx, "reconcile", err)
		}
	} else {
		WriteReport(e.Stdout, &run)
	}
	return ExitOf(&run)
}

func (e *Env) cancelRun(ctx context.Context, r Reconciler, id corpus.ID) int {
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), cancelTime)
	defer cancel()
	if err := r.Cancel(stop, id); err != nil {
		e.warnf("lockstep reconcile: run %s could not be cancelled and may go on: %s", id, err)
	} else {
		e.warnf("lockstep reconcile: run %s is cancelled; go on with: lockstep reconcile --resume", id)
	}
	return ExitCancelled
}

func writeReportJSON(w io.Writer, run *corpus.RunReport) error {
	raw, err := json.MarshalIndent(run, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the report: %w", err)
	}
	_, err = fmt.Fprintf(w, "%s\n", raw)
	return err
}

// ExitOf is the only table from a run's result to an exit code.
func ExitOf(run *corpus.RunReport) int {
	switch run.State {
	case corpus.RunDone:
	case corpus.RunBraked:
		return ExitBraked
	case corpus.RunCancelled:
		return ExitCancelled
	default:
		return ExitFailed
	}
	code := ExitOK
	for i := range run.Collections {
		c := &run.Collections[i]
		switch {
		case c.Status == corpus.Unknown:
			return ExitFailed
		case remaining(c) > 0 && run.Repair:
			code = ExitRemaining
		case remaining(c) > 0:
			code = ExitDifferences
		}
	}
	return code
}

// remaining counts findings that were not repaired.
func remaining(c *corpus.CollectionReport) int64 {
	var n int64
	for _, k := range corpus.FindingKinds {
		n += max(0, c.Findings[k]-c.Repaired[k])
	}
	return n
}

// WriteReport renders a run for people: what is wrong, why it may have happened, what repair
// does, and the exact command.
func WriteReport(w io.Writer, run *corpus.RunReport) {
	p := func(format string, args ...any) { fmt.Fprintf(w, format, args...) }
	verb := "compared"
	if run.Repair {
		verb = "compared and repaired"
	}
	took := ""
	if run.FinishedAt != nil && !run.StartedAt.IsZero() {
		took = " in " + short(run.FinishedAt.Sub(run.StartedAt))
	}
	p("Run %s: %s at depth %s%s, %s read.\n", run.RunID, verb, run.Depth, took, plural(run.Compared, "id"))
	for i := range run.Collections {
		writeCollection(p, run, &run.Collections[i])
	}
	if len(run.Collections) == 0 && run.State == corpus.RunDone {
		p("\nThere are no collections.\n")
	}
	switch run.State {
	case corpus.RunFailed:
		p("\nThe check itself failed, so nothing is proved: %s\n", orElse(run.Error, "see the server's log"))
		p("Finish it with: lockstep reconcile --resume\n")
	case corpus.RunBraked:
		p("\nStopped by the brake before anything more was deleted: %s\n", orElse(run.Error, "too large a share of the points would have been deleted"))
		p("If the deletes are right, run again with --repair --max-deletes SHARE, or --force.\n")
	case corpus.RunCancelled:
		p("\nCancelled. What was repaired stays repaired; go on with: lockstep reconcile --resume\n")
	case corpus.RunRunning:
		p("\nStill running.\n")
	}
}

func orElse(s, fallback string) string {
	if s == "" {
		return fallback
	}
	return s
}

func writeCollection(p func(string, ...any), run *corpus.RunReport, c *corpus.CollectionReport) {
	left := remaining(c)
	total := c.Findings.Total()
	p("\nCollection %s: ", c.Collection)
	switch {
	case c.Status == corpus.Unknown:
		p("not known; the comparison did not finish\n")
	case c.Status == corpus.Running:
		p("still running\n")
	case total == 0:
		p("consistent\n")
	case left == 0:
		p("consistent now; %s repaired and read back\n", plural(total, "difference"))
	case run.Repair:
		p("%s of %s left\n", count(left), plural(total, "difference"))
	default:
		p("%s\n", plural(total, "difference"))
	}
	p("  %s, %s expected, %s in the index", plural(c.Documents, "document"), plural(c.ExpectedPoints, "point"), count(c.IndexedPoints))
	if c.Pending > 0 {
		p(", %s on their way", count(c.Pending))
	}
	p("\n")
	manual, repairable := false, false
	for _, k := range corpus.FindingKinds {
		n := c.Findings[k]
		if n == 0 {
			continue
		}
		a := k.Advice()
		done := c.Repaired[k]
		p("\n  %s: %s", strings.ReplaceAll(string(k), "_", " "), count(n))
		if done > 0 {
			p(", %s repaired", count(done))
		}
		p("\n")
		paragraph(p, "What:   ", a.Meaning)
		if n > done {
			paragraph(p, "Why:    ", a.Cause)
			paragraph(p, "Repair: ", a.Repair)
			yours := a.Manual || a.Partly && run.Repair
			manual = manual || yours
			repairable = repairable || !yours
		}
		for _, f := range c.Sample {
			if f.Kind != k {
				continue
			}
			p("    %s", f.ID)
			if f.Document != "" {
				p("  document %s", printable(f.Document))
			}
			if f.Detail != "" {
				p("  %s", printable(f.Detail))
			}
			if f.Repaired {
				p("  (repaired)")
			}
			p("\n")
		}
	}
	if run.State != corpus.RunDone {
		return
	}
	switch {
	case repairable && !run.Repair:
		p("\n  To repair: lockstep reconcile --collection %s --depth %s --repair\n", c.Collection, run.Depth)
	case repairable:
		p("\n  What remains was repaired but not read back right, or came back. Run again; if it stays, look at the server's log and at:\n  lockstep reconcile --explain ID --collection %s\n", c.Collection)
	}
	if manual {
		p("\n  Some of this needs a decision of yours; docs/reconcile.md has the steps.\n")
	}
}

// paragraph wraps text under a label.
func paragraph(p func(string, ...any), label, text string) {
	const width = 88
	for i, line := range wrap(text, width, 1<<20) {
		if i > 0 {
			label = strings.Repeat(" ", len(label))
		}
		p("    %s%s\n", label, line)
	}
}

// RemoteReconcile is `lockstep reconcile` against a server.
func RemoteReconcile(ctx context.Context, e *Env, o ReconcileOptions) int {
	client, err := NewClient(o.Server, e.Getenv("LOCKSTEP_API_KEY"))
	if err != nil {
		return e.usage("reconcile", "%s", err)
	}
	defer client.Close()
	return Reconcile(ctx, e, client, o)
}

// decide ends the stop of a rolled back collection.
func decide(ctx context.Context, e *Env, r Reconciler, o ReconcileOptions) int {
	name := o.Request.Collection
	do, then := r.AdoptRollback, "What this Postgres does not know is an orphan now; look, then repair:\n  lockstep reconcile --collection %s --depth full\n"
	if o.Rollback == "discard" {
		do, then = r.DiscardRollback, "The index is built again from Postgres; watch it with:\n  lockstep reconcile --collection %s --depth full\n"
	}
	if err := do(ctx, name); err != nil {
		return e.failure(ctx, "reconcile", err)
	}
	e.printf("Collection %s: decided (%s). "+then, name, o.Rollback, name)
	return ExitOK
}
