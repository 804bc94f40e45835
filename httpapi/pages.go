package httpapi

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/labstack/echo/v4"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Pages are rendered here, whole, and need nothing else: no scripts, no fonts, no other host.

//go:embed pages/*.html pages/style.css
var pageFiles embed.FS

// pages renders the templates.
type pages struct {
	templates *template.Template
	// policy allows the one style sheet, by its hash, and nothing else.
	policy string
	now    func() time.Time
}

func loadPages(now func() time.Time) (*pages, error) {
	css, err := pageFiles.ReadFile("pages/style.css")
	if err != nil {
		return nil, err
	}
	p := &pages{now: now}
	p.templates, err = template.New("").Funcs(template.FuncMap{
		"css":   func() template.CSS { return template.CSS(css) }, //nolint:gosec // our own file
		"stamp": func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
		"ago":   p.ago,
		"count": groupDigits,
	}).ParseFS(pageFiles, "pages/*.html")
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(css)
	p.policy = "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
		"'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
	return p, nil
}

// ago renders a time as people say it; the exact one is in the markup.
func (p *pages) ago(t time.Time) string {
	switch d := p.now().Sub(t); {
	case d < 0:
		return t.UTC().Format("2006-01-02 15:04 UTC")
	case d < time.Minute:
		return some(int(d.Seconds()), "second") + " ago"
	case d < time.Hour:
		return some(int(d.Minutes()), "minute") + " ago"
	case d < 48*time.Hour:
		return some(int(d.Hours()), "hour") + " ago"
	}
	return t.UTC().Format("2006-01-02 15:04 UTC")
}

func some(n int, unit string) string {
	if n == 1 {
		return "1 " + unit
	}
	return strconv.Itoa(n) + " " + unit + "s"
}

func groupDigits(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// frame is what every page has.
type frame struct {
	Title, Page, Version, Footer string
	Refresh                      int
}

func (s *Server) frame(title, pageName string) frame {
	return frame{Title: title, Page: pageName, Version: s.cfg.Version, Footer: "Lockstep " + s.cfg.Version + ". Times are relative to the server's clock."}
}

func (s *Server) render(c echo.Context, status int, name string, data any) error {
	var b bytes.Buffer
	if err := s.pages.templates.ExecuteTemplate(&b, name, data); err != nil {
		return fmt.Errorf("render page %s: %w", name, err)
	}
	h := c.Response().Header()
	h.Set("Content-Security-Policy", s.pages.policy)
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Cache-Control", "no-store")
	return c.HTMLBlob(status, b.Bytes())
}

func (s *Server) writePageProblem(c echo.Context, p *problem) error {
	return s.render(c, p.Status, "error", struct {
		frame
		Problem *problem
	}{s.frame(p.Title, ""), p})
}

func (s *Server) root(c echo.Context) error { return c.Redirect(http.StatusSeeOther, "/docs") }

type noticeView struct {
	Text string
	Bad  bool
}

type findingView struct {
	Name            string
	Found, Repaired int64
	Advice          corpus.Advice
}

type collectionPageView struct {
	Name, Anchor                                      string
	Verdict, Class, Mark                              string
	CheckedAt                                         time.Time
	Depth                                             corpus.Depth
	Documents, ExpectedPoints, IndexedPoints, Pending int64
	Findings                                          []findingView
	Samples                                           []corpus.Finding
	Command                                           string
}

type runView struct {
	ID                                  corpus.ID
	Short, State, Class, Mark           string
	Scope, Error, Took                  string
	Depth                               corpus.Depth
	Repair, Running, Asked              bool
	StartedAt                           time.Time
	Compared, Expected, Found, Repaired int64
	Percent                             int64
}

type adminView struct {
	frame
	Notices     []noticeView
	Ready       bool
	Checks      []checkJSON
	Collections []collectionPageView
	Runs        []runView
	Running     bool
}

// maxRefresh bounds the page's own reloading, in seconds.
const maxRefresh = 300

func (s *Server) adminPage(c echo.Context) error {
	ctx := c.Request().Context()
	v := adminView{frame: s.frame("Consistency", "admin"), Ready: true}
	refresh, err := queryInt(c, "refresh", 0, 0, maxRefresh)
	if err != nil {
		return err
	}
	asked := c.QueryParam("run")
	switch {
	case asked != "" && c.QueryParam("done") == "cancel":
		v.Notices = append(v.Notices, noticeView{Text: "Run " + shorten(asked) + " was asked to end."})
	case asked != "":
		v.Notices = append(v.Notices, noticeView{Text: "Run " + shorten(asked) + " has started; it stands at the top of the list below."})
	}
	v.Checks, v.Ready = s.checkHealth(ctx)
	// The page stays useful while a store is away: what cannot be read is said so.
	unread := func(what string, err error) {
		s.log.WarnContext(ctx, "admin page incomplete", "part", what, "err", err)
		v.Notices = append(v.Notices, noticeView{Text: what + " cannot be read now: " + notReadyDetail(err), Bad: true})
	}
	reports, err := s.deps.Reconciler.Latest(ctx, "")
	if err != nil {
		unread("The verdicts", err)
	}
	for i := range reports {
		v.Collections = append(v.Collections, pageCollection(&reports[i]))
	}
	runs, err := s.deps.Reconciler.History(ctx, "", 20)
	if err != nil {
		unread("The history", err)
	}
	for i := range runs {
		r := s.pageRun(&runs[i])
		r.Asked = r.ID.String() == asked
		v.Running = v.Running || r.Running
		v.Runs = append(v.Runs, r)
	}
	if v.Running {
		v.Refresh = refresh
	}
	return s.render(c, http.StatusOK, "admin", &v)
}

func shorten(id string) string {
	if _, ok := corpus.ParseID(id); !ok {
		return "?"
	}
	return id[:8]
}

func pageCollection(r *corpus.CollectionReport) collectionPageView {
	v := collectionPageView{
		Name: r.Collection, Anchor: r.Collection, CheckedAt: r.CheckedAt, Depth: r.Depth, Documents: r.Documents,
		ExpectedPoints: r.ExpectedPoints, IndexedPoints: r.IndexedPoints, Pending: r.Pending, Samples: r.Sample,
	}
	switch r.Status {
	case corpus.Consistent:
		v.Verdict, v.Class, v.Mark = "consistent", "ok", "✓"
	case corpus.Inconsistent:
		v.Verdict, v.Class, v.Mark = "inconsistent", "bad", "✗"
	case corpus.Running:
		v.Verdict, v.Class, v.Mark = "being compared", "warn", "…"
	default:
		v.Verdict, v.Class, v.Mark = "not known", "warn", "?"
	}
	repairable := false
	for _, k := range corpus.FindingKinds {
		if r.Findings[k] == 0 {
			continue
		}
		a := k.Advice()
		repairable = repairable || !a.Manual && r.Findings[k] > r.Repaired[k]
		v.Findings = append(v.Findings, findingView{strings.ReplaceAll(string(k), "_", " "), r.Findings[k], r.Repaired[k], a})
	}
	if repairable {
		v.Command = fmt.Sprintf("lockstep reconcile --collection %s --depth %s --repair", r.Collection, orDepth(r.Depth))
	}
	return v
}

func orDepth(d corpus.Depth) corpus.Depth {
	if d == "" {
		return corpus.Full
	}
	return d
}

func (s *Server) pageRun(r *corpus.RunReport) runView {
	v := runView{
		ID: r.RunID, Short: r.RunID.String()[:8], State: string(r.State), Error: r.Error, Depth: r.Depth, Repair: r.Repair,
		StartedAt: r.StartedAt, Compared: r.Compared, Expected: max(r.Expected, r.Compared, 1), Running: r.State == corpus.RunRunning,
	}
	var names []string
	for i := range r.Collections {
		names = append(names, r.Collections[i].Collection)
		v.Found += r.Collections[i].Findings.Total()
		v.Repaired += r.Collections[i].Repaired.Total()
	}
	switch {
	case len(names) == 0:
		v.Scope = "no collection"
	case len(names) > 3:
		v.Scope = strconv.Itoa(len(names)) + " collections"
	default:
		v.Scope = strings.Join(names, ", ")
	}
	switch r.State {
	case corpus.RunDone:
		v.Class, v.Mark = "ok", "✓"
		if v.Found > v.Repaired {
			v.Class, v.Mark, v.State = "bad", "✗", "done, differences found"
		}
	case corpus.RunRunning:
		v.Class, v.Mark = "warn", "…"
		v.Percent = 100 * v.Compared / v.Expected
	case corpus.RunCancelled:
		v.Class, v.Mark = "warn", "–"
	default:
		v.Class, v.Mark = "bad", "✗"
	}
	end := s.cfg.Now()
	if r.FinishedAt != nil {
		end = *r.FinishedAt
	}
	if !r.StartedAt.IsZero() {
		v.Took = end.Sub(r.StartedAt).Round(100 * time.Millisecond).String()
	}
	return v
}

// maxForm bounds the page's own forms.
const maxForm = 16 << 10

// adminAction takes the page's forms. That they come from the page itself was checked before
// (see sameOrigin): a browser that sends them for another site says so in its headers.
func (s *Server) adminAction(c echo.Context) error {
	mt, _, err := mime.ParseMediaType(c.Request().Header.Get("Content-Type"))
	if err != nil || mt != "application/x-www-form-urlencoded" {
		return refuse(http.StatusUnsupportedMediaType, "unsupported_media_type", "this route takes the forms of the page; programs use /admin/reconcile")
	}
	c.Request().Body = http.MaxBytesReader(c.Response(), c.Request().Body, maxForm)
	if err := c.Request().ParseForm(); err != nil {
		return bodyReadError(err)
	}
	form := c.Request().PostForm
	ctx := c.Request().Context()
	switch form.Get("action") {
	case "start":
		req, err := s.reconcileRequest(&reconcileJSON{Collection: form.Get("collection"), Depth: form.Get("depth"), Repair: form.Get("repair") == "on"})
		if err != nil {
			return err
		}
		id, err := s.deps.Reconciler.Start(ctx, req)
		if err != nil {
			return err
		}
		return c.Redirect(http.StatusSeeOther, "/admin?run="+id.String()+"&refresh=5#runs")
	case "cancel":
		id, ok := corpus.ParseID(form.Get("run_id"))
		if !ok {
			return refuse(http.StatusNotFound, "run_not_found", "there is no such run")
		}
		if err := s.deps.Reconciler.Cancel(ctx, id); err != nil {
			return err
		}
		return c.Redirect(http.StatusSeeOther, "/admin?run="+id.String()+"&done=cancel#runs")
	}
	return invalidField("/action", "unknown_value", "the form asks for nothing that this page does")
}
