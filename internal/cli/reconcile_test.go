package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// scripted is a Reconciler that answers reports one after the other.
type scripted struct {
	req       corpus.ReconcileRequest
	startErr  error
	reports   []corpus.RunReport
	errs      []error
	cancelled bool
	onRun     func()

	explanation corpus.Explanation
	decided     string
}

func (s *scripted) Start(_ context.Context, req corpus.ReconcileRequest) (corpus.ID, error) {
	s.req = req
	return corpus.ID{15: 1}, s.startErr
}

func (s *scripted) Run(ctx context.Context, _ corpus.ID) (corpus.RunReport, error) {
	if s.onRun != nil {
		s.onRun()
	}
	if err := ctx.Err(); err != nil {
		return corpus.RunReport{}, err
	}
	if len(s.errs) > 0 {
		err := s.errs[0]
		s.errs = s.errs[1:]
		return corpus.RunReport{}, err
	}
	r := s.reports[0]
	if len(s.reports) > 1 {
		s.reports = s.reports[1:]
	}
	return r, nil
}

func (s *scripted) Cancel(context.Context, corpus.ID) error {
	s.cancelled = true
	return nil
}

func (s *scripted) Explain(_ context.Context, query, _ string) (corpus.Explanation, error) {
	return s.explanation, s.startErr
}

func (s *scripted) AdoptRollback(_ context.Context, c string) error {
	s.decided = "adopt " + c
	return s.startErr
}

func (s *scripted) DiscardRollback(_ context.Context, c string) error {
	s.decided = "discard " + c
	return s.startErr
}

func TestExplainAndRollback(t *testing.T) {
	t.Parallel()
	died := int64(4)
	s := &scripted{explanation: corpus.Explanation{
		Query:    "kb/42",
		Document: &corpus.ExplainedDocument{Collection: "default", ExternalID: "kb/42", TargetVersion: 3, ServingVersion: 3},
		Chunks: []corpus.ExplainedChunk{
			{Collection: "default", Index: "lockstep_x", IndexState: corpus.IndexServing, Ledger: &corpus.ExplainedRow{State: "indexed", Gen: 7, DiedVersion: &died, LastError: "late"}},
			{Point: &corpus.ExplainedPoint{Gen: 9}, Verdicts: []corpus.ExplainedVerdict{{Kind: corpus.Orphan, Detail: "dead in Postgres", Repair: "deletes it"}}},
			{PointError: "away"},
		},
		Truncated: true, Verdict: "one orphan",
	}}
	w := newWorld("")
	if code := Reconcile(t.Context(), w.Env, s, ReconcileOptions{ExplainID: "kb/42"}); code != ExitDifferences {
		t.Errorf("exit %d", code)
	}
	for _, want := range []string{"Document kb/42 in default", "gen 7", "died in version 4", "last error: late", "has no such point", "knows no such chunk", "not ours", "orphan: dead in Postgres", "Repair: deletes it", "cannot be read: away", "one orphan", "more chunks"} {
		if !strings.Contains(w.out.String(), want) {
			t.Errorf("lacks %q:\n%s", want, w.out.String())
		}
	}
	w = newWorld("")
	if code := Reconcile(t.Context(), w.Env, s, ReconcileOptions{Rollback: "discard", Request: corpus.ReconcileRequest{Collection: "c"}}); code != 0 || s.decided != "discard c" {
		t.Errorf("exit %d, %q", code, s.decided)
	}
	s.startErr = &APIError{Status: 409, Detail: "not stopped"}
	if code := Reconcile(t.Context(), w.Env, s, ReconcileOptions{Rollback: "adopt"}); code != ExitFailed {
		t.Errorf("exit %d", code)
	}
}

func report(state corpus.RunState, repair bool, status corpus.Verdict, findings, repaired corpus.Counts) corpus.RunReport {
	begin := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	end := begin.Add(90 * time.Second)
	r := corpus.RunReport{RunID: corpus.ID{15: 1}, State: state, Depth: corpus.Full, Repair: repair, StartedAt: begin, FinishedAt: &end, Compared: 123456, Expected: 123456}
	c := corpus.CollectionReport{Collection: "default", Status: status, Depth: corpus.Full, Documents: 1000, ExpectedPoints: 123456, IndexedPoints: 123450, Pending: 3,
		Findings: corpus.NewCounts(), Repaired: corpus.NewCounts()}
	for k, n := range findings {
		c.Findings[k] = n
		c.Sample = append(c.Sample, corpus.Finding{Kind: k, ID: corpus.ID{15: 9}, Document: "kb/4\x1b[2J2", Detail: "evidence from both sides"})
	}
	for k, n := range repaired {
		c.Repaired[k] = n
	}
	r.Collections = []corpus.CollectionReport{c}
	return r
}

func TestExitCodes(t *testing.T) {
	t.Parallel()
	two := corpus.Counts{corpus.Orphan: 2}
	one := corpus.Counts{corpus.Orphan: 1}
	for name, c := range map[string]struct {
		run  corpus.RunReport
		code int
	}{
		"consistent":          {report(corpus.RunDone, false, corpus.Consistent, nil, nil), 0},
		"all repaired":        {report(corpus.RunDone, true, corpus.Consistent, two, two), 0},
		"differences":         {report(corpus.RunDone, false, corpus.Inconsistent, two, nil), 3},
		"remain":              {report(corpus.RunDone, true, corpus.Inconsistent, two, one), 4},
		"other kind repaired": {report(corpus.RunDone, true, corpus.Inconsistent, corpus.Counts{corpus.Orphan: 1}, corpus.Counts{corpus.Missing: 5}), 4},
		"braked":              {report(corpus.RunBraked, true, corpus.Inconsistent, two, nil), 5},
		"cancelled":           {report(corpus.RunCancelled, false, corpus.Unknown, nil, nil), 130},
		"failed":              {report(corpus.RunFailed, false, corpus.Unknown, nil, nil), 1},
		"unknown":             {report(corpus.RunDone, false, corpus.Unknown, nil, nil), 1},
		"no collections":      {corpus.RunReport{State: corpus.RunDone}, 0},
	} {
		w := newWorld("")
		if code := Reconcile(t.Context(), w.Env, &scripted{reports: []corpus.RunReport{c.run}}, ReconcileOptions{}); code != c.code {
			t.Errorf("%s: exit %d, expected %d", name, code, c.code)
		}
	}
}

func TestReconcileFollowsTheRun(t *testing.T) {
	t.Parallel()
	running := report(corpus.RunRunning, false, corpus.Running, nil, nil)
	s := &scripted{reports: []corpus.RunReport{running, running, report(corpus.RunDone, false, corpus.Consistent, nil, nil)}, errs: []error{&APIError{Status: 503}}}
	w := newWorld("")
	if code := Reconcile(t.Context(), w.Env, s, ReconcileOptions{Request: corpus.ReconcileRequest{Depth: corpus.Deep}}); code != 0 || s.req.Depth != corpus.Deep {
		t.Errorf("exit %d, %+v", code, s.req)
	}
	if !strings.Contains(w.out.String(), "Collection default: consistent") {
		t.Errorf("report %q", w.out.String())
	}
	s = &scripted{startErr: &APIError{Status: 409, Code: "reconcile_running", Detail: "a run is going on"}}
	w = newWorld("")
	if code := Reconcile(t.Context(), w.Env, s, ReconcileOptions{}); code != ExitFailed || !strings.Contains(w.err.String(), "a run is going on") {
		t.Errorf("exit %d %q", code, w.err.String())
	}
}

func TestReconcileInterrupted(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	s := &scripted{reports: []corpus.RunReport{report(corpus.RunRunning, false, corpus.Running, nil, nil)}, onRun: cancel}
	w := newWorld("")
	if code := Reconcile(ctx, w.Env, s, ReconcileOptions{}); code != ExitCancelled || !s.cancelled {
		t.Errorf("exit %d, cancelled %v", code, s.cancelled)
	}
	if !strings.Contains(w.err.String(), "--resume") || w.out.Len() > 0 {
		t.Errorf("stderr %q stdout %q", w.err.String(), w.out.String())
	}
}

func TestReconcileJSON(t *testing.T) {
	t.Parallel()
	w := newWorld("")
	Reconcile(t.Context(), w.Env, &scripted{reports: []corpus.RunReport{report(corpus.RunDone, false, corpus.Inconsistent, corpus.Counts{corpus.Missing: 1}, nil)}}, ReconcileOptions{JSON: true})
	var back corpus.RunReport
	if err := json.Unmarshal(w.out.Bytes(), &back); err != nil || back.Collections[0].Findings[corpus.Missing] != 1 || back.RunID != (corpus.ID{15: 1}) {
		t.Errorf("%v: %s", err, w.out.String())
	}
}

// TestGoldenReports keeps the text that people read.
func TestGoldenReports(t *testing.T) {
	t.Parallel()
	var got bytes.Buffer
	for _, c := range []struct {
		name string
		run  corpus.RunReport
	}{
		{"consistent", report(corpus.RunDone, false, corpus.Consistent, nil, nil)},
		{"differences", report(corpus.RunDone, false, corpus.Inconsistent, corpus.Counts{corpus.Missing: 12345}, nil)},
		{"needs a person", report(corpus.RunDone, false, corpus.Inconsistent, corpus.Counts{corpus.RolledBack: 1}, nil)},
		{"all repaired", report(corpus.RunDone, true, corpus.Consistent, corpus.Counts{corpus.Orphan: 2}, corpus.Counts{corpus.Orphan: 2})},
		{"some remain", report(corpus.RunDone, true, corpus.Inconsistent, corpus.Counts{corpus.StalePayload: 2}, corpus.Counts{corpus.StalePayload: 1})},
		{"braked", report(corpus.RunBraked, true, corpus.Inconsistent, corpus.Counts{corpus.Orphan: 9000}, nil)},
		{"cancelled", report(corpus.RunCancelled, true, corpus.Unknown, nil, nil)},
		{"failed", report(corpus.RunFailed, false, corpus.Unknown, nil, nil)},
	} {
		got.WriteString("# " + c.name + "\n")
		WriteReport(&got, &c.run)
		got.WriteString("\n")
	}
	path := filepath.Join("testdata", "reports.golden")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("the reports differ; look, then run with -update:\n%s", got.String())
	}
	if strings.Contains(got.String(), "\x1b") {
		t.Error("a document's id controls the terminal")
	}
}

func TestParseReconcile(t *testing.T) {
	t.Parallel()
	w := newWorld("http://s", "--collection", "c", "--depth", "deep", "--repair", "--max-deletes", "0.5", "--force", "--output", "json", "--resume")
	o, _, ok := ParseReconcile(w.Env)
	if r := o.Request; !ok || r.Collection != "c" || r.Depth != corpus.Deep || !r.Repair || r.MaxDeletes != 0.5 || !r.Force || !r.Resume || !o.JSON || o.Server != "http://s" {
		t.Errorf("%+v", o)
	}
	w = newWorld("", "--direct", "--repair", "--", "--data-dir", "/x")
	if o, _, ok := ParseReconcile(w.Env); !ok || !o.Direct || len(o.DirectArgs) != 2 {
		t.Errorf("%+v", o)
	}
	for _, args := range [][]string{
		{"--all", "--collection", "c"}, {"--depth", "x"}, {"extra"}, {"--force"}, {"--max-deletes", "0.5"}, {"--repair", "--max-deletes", "2"},
		{"--repair", "--max-deletes", "NaN"}, {"--rollback", "adopt"}, {"--rollback", "x", "--collection", "c"}, {"--rollback", "adopt", "--collection", "c", "--repair"}, {"--delete-foreign", "none"}, {"--output", "yaml"}, {"--", "--data-dir", "x"}, {"--nope"},
	} {
		w := newWorld("", args...)
		if _, code, ok := ParseReconcile(w.Env); ok || code != ExitUsage {
			t.Errorf("%v: code %d, ok %v", args, code, ok)
		}
	}
}

func TestRemoteReconcile(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	var got []string
	s.intercept = func(_ int, w http.ResponseWriter, r *http.Request) bool {
		var body bytes.Buffer
		_, _ = body.ReadFrom(r.Body)
		got = append(got, r.Method+" "+r.URL.String()+" "+body.String())
		w.Header().Set("Content-Type", "application/json")
		switch {
		case r.Method == "POST":
			w.WriteHeader(202)
			_, _ = w.Write([]byte(`{"run_id":"00000000-0000-0000-0000-000000000001"}`))
		case strings.HasPrefix(r.URL.Path, "/admin/explain"):
			_, _ = w.Write([]byte(`{"query":"kb/42","chunks":[],"verdict":"healthy"}`))
		default:
			if err := json.NewEncoder(w).Encode(report(corpus.RunDone, true, corpus.Consistent, nil, nil)); err != nil {
				t.Error(err)
			}
		}
		return true
	}
	w := newWorld(s.URL, "--repair", "--collection", "c")
	o, _, _ := ParseReconcile(w.Env)
	if code := RemoteReconcile(t.Context(), w.Env, o); code != 0 {
		t.Errorf("exit %d: %s", code, w.err.String())
	}
	if len(got) != 2 || !strings.Contains(got[0], `"collection":"c"`) || !strings.Contains(got[0], `"repair":true`) || strings.Contains(got[0], "max_deletes") || !strings.HasPrefix(got[1], "GET /admin/reconcile/00000000-0000-0000-0000-000000000001") {
		t.Errorf("requests %q", got)
	}
	w = newWorld(s.URL, "--explain", "kb/42")
	o, _, _ = ParseReconcile(w.Env)
	if code := RemoteReconcile(t.Context(), w.Env, o); code != 0 || !strings.Contains(w.out.String(), "healthy") {
		t.Errorf("exit %d: %s", code, w.out.String())
	}
}

func TestSearch(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	var body string
	s.intercept = func(n int, w http.ResponseWriter, r *http.Request) bool {
		var b bytes.Buffer
		_, _ = b.ReadFrom(r.Body)
		body = b.String()
		w.Header().Set("Content-Type", "application/json")
		if n == 1 {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(503)
			return true
		}
		_, _ = w.Write([]byte(`{"results":[{"id":"00000000-0000-0000-0000-000000000001","document":"kb/\u001b[2J42","version":3,"ordinal":1,"score":0.83,
			"text":"` + strings.Repeat("word ", 100) + `","metadata":{"b":1,"a":"x"},"chunk_count":2,"before":[{"ordinal":0,"text":"before"}],"highlights":["bread"],"heads":{"dense":{"rank":1,"score":0.83}}}],
			"mode":"hybrid","fusion":{"method":"rrf","k":60,"weights":[1,2]},"consistency":{"filtered":2,"widened":1,"truncated":true},"timings_ms":{"embed":1.5}}`))
		return true
	}
	w := newWorld(s.URL, "how", "is", "bread", "made", "--limit", "3", "--group", "--highlight", "--explain", "--filter", `{"must":[]}`)
	if code := Search(t.Context(), w.Env); code != 0 {
		t.Fatalf("exit %d: %s", code, w.err.String())
	}
	for _, want := range []string{`"query":"how is bread made"`, `"limit":3`, `"group_by":"document"`, `"highlight":true`, `"filter":{"must":[]}`} {
		if !strings.Contains(body, want) {
			t.Errorf("request lacks %s: %s", want, body)
		}
	}
	out := w.out.String()
	for _, want := range []string{" 1. kb/[2J42  chunk 1, version 3  score 0.8300  (2 chunks match)", "[0] before", "a=x  b=1", "dense    rank 1", "matched terms: bread", "mode hybrid, fused by rrf with k = 60 and weights [1 2];", "removed 2 candidates", "may be short"} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
	for line := range strings.Lines(out) {
		if len([]rune(line)) > 81+80 {
			t.Errorf("a line of %d: %q", len(line), line)
		}
	}
	if strings.Contains(out, "\x1b") {
		t.Error("a document's id controls the terminal")
	}
	w = newWorld(s.URL, "q", "--output", "json")
	if code := Search(t.Context(), w.Env); code != 0 || !json.Valid(w.out.Bytes()) {
		t.Errorf("exit %d: %s", code, w.out.String())
	}
	s.intercept = func(_ int, w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(422)
		_, _ = w.Write([]byte(`{"code":"validation_failed","detail":"/limit: limit is 1 to 1000 (and 1 more)","errors":[{"pointer":"/limit","detail":"limit is 1 to 1000"},{"pointer":"/mode","detail":"x"}]}`))
		return true
	}
	w = newWorld(s.URL, "q")
	if code := Search(t.Context(), w.Env); code != ExitFailed || !strings.Contains(w.err.String(), "/mode: x") {
		t.Errorf("exit %d: %s", code, w.err.String())
	}
}

func TestDoctor(t *testing.T) {
	t.Parallel()
	w := newWorld("")
	if d, ready := AskServer(t.Context(), w.Env, "http://127.0.0.1:1"); ready || d.Err != nil || !strings.Contains(d.Detail, "none answers") {
		t.Errorf("no server: %+v", d)
	}
	s := newServer(t)
	s.intercept = func(n int, w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", "application/problem+json")
		if n == 1 {
			w.WriteHeader(503)
			_, _ = w.Write([]byte(`{"code":"not_ready","detail":"not ready: qdrant: away"}`))
			return true
		}
		_, _ = w.Write([]byte(`{"status":"ready","checks":[{"name":"model","ready":true,"detail":"minilm"}]}`))
		return true
	}
	if d, ready := AskServer(t.Context(), w.Env, s.URL); ready || d.Err == nil {
		t.Errorf("not ready: %+v", d)
	}
	if d, ready := AskServer(t.Context(), w.Env, s.URL); !ready || d.Err != nil || !strings.Contains(d.Detail, "model: minilm") {
		t.Errorf("ready: %+v", d)
	}
	code := WriteDiagnoses(w.Env, []Diagnosis{{Name: "a", Detail: "fine"}, {Name: "b", Err: &APIError{Detail: "broken"}, Remedy: "mend it"}})
	if out := w.out.String(); code != ExitFailed || !strings.Contains(out, "ok    a") || !strings.Contains(out, "FAIL  b") || !strings.Contains(out, "to do: mend it") {
		t.Errorf("%d %s", code, out)
	}
}
