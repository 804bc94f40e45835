package cli

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestIngestEveryFormat(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	dir := t.TempDir()
	write(t, dir, "a.jsonl", "\xef\xbb\xbf"+jsonl(3)+"\n\n  {\"id\":\"last\",\"text\":\"no newline\"}")
	write(t, dir, "sub/notes.txt", "Plain text.\r\nSecond line.")
	write(t, dir, "sub/deep/readme.MD", "intro\n# The Title #\nbody")
	write(t, dir, "page.html", "<title>Page &amp; more</title><h1>Hi</h1><p>Hello <b>wor</b>ld</p><script>evil()</script>")
	write(t, dir, ".hidden/x.txt", "hidden")
	write(t, dir, "image.png", "\x89PNG")
	w := newWorld(s.URL, "--metadata", "team=docs", dir, "--collection", "c1", "--id-prefix", "kb/")
	if code := Ingest(t.Context(), w.Env); code != ExitOK {
		t.Fatalf("exit %d: %s", code, w.err.String())
	}
	var ids []string
	for id := range s.docs {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	if got := strings.Join(ids, " "); got != "d0 d1 d2 kb/page.html kb/sub/deep/readme.MD kb/sub/notes.txt last" {
		t.Errorf("ids %q", got)
	}
	var page struct {
		Text     string
		Metadata map[string]any
	}
	if err := json.Unmarshal(s.docs["kb/page.html"], &page); err != nil {
		t.Fatal(err)
	}
	if page.Text != "# Hi\n\nHello world" || page.Metadata["title"] != "Page & more" || page.Metadata["team"] != "docs" || page.Metadata["source"] != "page.html" {
		t.Errorf("page %+v", page)
	}
	if err := json.Unmarshal(s.docs["kb/sub/deep/readme.MD"], &page); err != nil || page.Metadata["title"] != "The Title" {
		t.Errorf("markdown %+v", page)
	}
	if got := w.out.String(); !strings.HasPrefix(got, "7 documents: 7 indexed; 14 chunks, 7 embedded") {
		t.Errorf("summary %q", got)
	}
	if s.auth[0] != "Bearer the-key" || !strings.Contains(s.query[0], "collection=c1") || !strings.Contains(s.query[0], "wait=true") {
		t.Errorf("request %v %v", s.auth, s.query)
	}
	if w.err.Len() != 0 {
		t.Errorf("stderr should be quiet where nobody watches: %q", w.err.String())
	}
	// Again: nothing is new.
	w = newWorld(s.URL, "--output", "json", dir, "--id-prefix=kb/")
	if code := Ingest(t.Context(), w.Env); code != ExitOK {
		t.Fatal(code)
	}
	var sum ingestSummary
	if err := json.Unmarshal(w.out.Bytes(), &sum); err != nil || sum.Unchanged != 7 || sum.Documents != 7 {
		t.Errorf("%s", w.out.String())
	}
}

func TestIngestStdin(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	w := newWorld(s.URL, "-")
	w.Stdin = strings.NewReader(jsonl(5))
	if code := Ingest(t.Context(), w.Env); code != ExitOK || len(s.docs) != 5 {
		t.Errorf("exit %d, %d documents: %s", code, len(s.docs), w.err.String())
	}
	w = newWorld(s.URL, "--format", "text", "-")
	w.Stdin = strings.NewReader("just text")
	if code := Ingest(t.Context(), w.Env); code != ExitOK || s.docs["stdin"] == nil {
		t.Errorf("exit %d: %s", code, w.err.String())
	}
}

func TestIngestFormatIsTheCallers(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	dir := t.TempDir()
	odd := write(t, dir, "docs.data", jsonl(4))
	w := newWorld(s.URL, "--format", "jsonl", odd)
	if code := Ingest(t.Context(), w.Env); code != ExitOK || len(s.docs) != 4 {
		t.Errorf("exit %d, %d documents: %s", code, len(s.docs), w.err.String())
	}
	w = newWorld(s.URL, odd)
	if code := Ingest(t.Context(), w.Env); code != ExitOK || len(s.docs) != 5 {
		t.Errorf("an unknown ending is text: exit %d, %d documents", code, len(s.docs))
	}
	w = newWorld(s.URL, dir)
	if code := Ingest(t.Context(), w.Env); code != ExitOK || !strings.Contains(w.out.String(), "nothing to send") {
		t.Errorf("in a folder it is left out: exit %d %s", code, w.out.String())
	}
	w = newWorld(s.URL, "--format", "text", dir)
	if code := Ingest(t.Context(), w.Env); code != ExitOK || s.docs["docs.data"] == nil {
		t.Errorf("unless the format was given: exit %d", code)
	}
}

func TestIngestReportsWhatFails(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	dir := t.TempDir()
	a := write(t, dir, "a.jsonl", `{"id":"ok","text":"x"}`+"\n"+`{"id":`+"\n"+`{"id":"refused","text":"bad"}`+"\n")
	b := write(t, dir, "b.txt", "\xff\xfe")
	c := write(t, dir, "c.txt", "  \n")
	w := newWorld(s.URL, a, b, c, dir+"/missing.txt")
	if code := Ingest(t.Context(), w.Env); code != ExitFailed {
		t.Errorf("exit %d", code)
	}
	for _, want := range []string{a + ":2: not valid JSON", a + ":3 (id refused): no good (validation_failed)", b + ": not UTF-8 text", c + ": has no text", "missing.txt: no such file"} {
		if !strings.Contains(w.err.String(), want) {
			t.Errorf("stderr lacks %q:\n%s", want, w.err.String())
		}
	}
	if got := w.out.String(); !strings.Contains(got, "1 indexed, 5 failed") {
		t.Errorf("summary %q", got)
	}
}

// TestIngestResumes breaks the connection in every way and expects every document once in the
// end, nothing skipped.
func TestIngestResumes(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"drop", "error"} {
		s := newServer(t)
		cuts := 0
		s.cut = func(total int) string {
			if total%7 == 0 && cuts < 5 {
				cuts++
				return how
			}
			return ""
		}
		w := newWorld(s.URL, write(t, t.TempDir(), "a.jsonl", jsonl(100)))
		if code := Ingest(t.Context(), w.Env); code != ExitOK {
			t.Fatalf("%s: exit %d: %s", how, code, w.err.String())
		}
		if len(s.docs) != 100 || cuts != 5 || len(w.slept) < 5 {
			t.Errorf("%s: %d documents after %d cuts and %d waits", how, len(s.docs), cuts, len(w.slept))
		}
		if got := w.out.String(); !strings.HasPrefix(got, "100 documents: ") || strings.Contains(got, "failed") {
			t.Errorf("%s: %q", how, got)
		}
	}
}

func TestIngestHonoursRetryAfter(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.intercept = func(n int, w http.ResponseWriter, r *http.Request) bool {
		if n > 2 {
			return false
		}
		w.Header().Set("Retry-After", "7")
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader([]int{429, 503}[n-1])
		_, _ = w.Write([]byte(`{"code":"overloaded","detail":"full"}`))
		return true
	}
	w := newWorld(s.URL, write(t, t.TempDir(), "a.jsonl", jsonl(3)))
	if code := Ingest(t.Context(), w.Env); code != ExitOK || len(s.docs) != 3 {
		t.Fatalf("exit %d: %s", code, w.err.String())
	}
	if !slices.Equal(w.slept, []time.Duration{7 * time.Second, 7 * time.Second}) {
		t.Errorf("waited %v", w.slept)
	}
}

func TestIngestGivesUp(t *testing.T) {
	t.Parallel()
	file := write(t, t.TempDir(), "a.jsonl", jsonl(3))
	cases := map[string]struct {
		intercept func(int, http.ResponseWriter, *http.Request) bool
		cut       func(int) string
		want      string
		waits     bool
	}{
		"refused": {intercept: func(_ int, w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Type", "application/problem+json")
			w.WriteHeader(403)
			_, _ = w.Write([]byte(`{"code":"forbidden","detail":"this key lacks the scope \"write\""}`))
			return true
		}, want: `this key lacks the scope "write" (forbidden)`},
		"no Lockstep": {intercept: func(_ int, w http.ResponseWriter, _ *http.Request) bool {
			w.WriteHeader(404)
			return true
		}, want: "404"},
		"a defect":    {cut: func(int) string { return "broken" }, want: "defect (internal)"},
		"always away": {cut: func(int) string { return "error" }, want: "the index does not answer (index_unavailable)", waits: true},
	}
	for name, c := range cases {
		s := newServer(t)
		s.intercept, s.cut = c.intercept, c.cut
		w := newWorld(s.URL, file, "--retry", "1m")
		if code := Ingest(t.Context(), w.Env); code != ExitFailed {
			t.Errorf("%s: exit %d", name, code)
		}
		if !strings.Contains(w.err.String(), c.want) || (len(w.slept) > 0) != c.waits {
			t.Errorf("%s: waits %v, stderr %q", name, w.slept, w.err.String())
		}
		if !strings.Contains(w.out.String(), "3 not answered") && !strings.Contains(w.out.String(), "1 not answered") || !strings.Contains(w.out.String(), "Run the same command again") {
			t.Errorf("%s: summary %q", name, w.out.String())
		}
	}
	w := newWorld("http://127.0.0.1:1", file, "--retry", "3s")
	if code := Ingest(t.Context(), w.Env); code != ExitFailed || !strings.Contains(w.err.String(), "start one with `lockstep serve`") {
		t.Errorf("nobody listens: %s", w.err.String())
	}
}

func TestIngestCancelled(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	ctx, cancel := context.WithCancel(t.Context())
	s.cut = func(total int) string {
		if total == 10 {
			cancel()
		}
		return ""
	}
	w := newWorld(s.URL, write(t, t.TempDir(), "a.jsonl", jsonl(100_000)))
	if code := Ingest(ctx, w.Env); code != ExitCancelled {
		t.Errorf("exit %d: %s", code, w.err.String())
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		run  func(context.Context, *Env) int
		args []string
		code int
	}{
		{Ingest, nil, 2}, {Ingest, []string{"--nope", "x"}, 2}, {Ingest, []string{"--format", "pdf", "x"}, 2}, {Ingest, []string{"--help"}, 0},
		{Ingest, []string{"--server", "nonsense", "x"}, 2}, {Ingest, []string{"--metadata", "x", "y"}, 2},
		{Search, nil, 2}, {Search, []string{" "}, 2}, {Search, []string{"x", "--filter", "{"}, 2}, {Search, []string{"x", "--output", "xml"}, 2}, {Search, []string{"x", "--like", "y"}, 2},
		{ModelPull, nil, 2}, {ModelPull, []string{"nonsense"}, 2}, {ModelPull, []string{"a/../b"}, 2},
	} {
		w := newWorld("http://127.0.0.1:1", c.args...)
		if code := c.run(t.Context(), w.Env); code != c.code {
			t.Errorf("%v: exit %d, expected %d: %s", c.args, code, c.code, w.err.String())
		}
		if c.code == 2 && (w.out.Len() > 0 || w.err.Len() == 0) {
			t.Errorf("%v: wrong usage belongs on stderr", c.args)
		}
		if c.code == 0 && !strings.Contains(w.out.String(), "Usage: lockstep") {
			t.Errorf("%v: no help: %q", c.args, w.out.String())
		}
	}
}

func TestHTMLText(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"plain":                                  "plain",
		"<p>a<p>b":                               "a\n\nb",
		"<ul><li>x</li><li>y <i>z</i></li></ul>": "- x\n- y z",
		"<pre>  a\n   b</pre>after":              "a\n   b\n\nafter",
		"a<br>b":                                 "a\nb",
		"<table><tr><td>1</td><td>2</td></tr><tr><td>3</td></tr></table>": "1 2\n3",
		"<nav>menu</nav><style>x</style>text":                             "text",
		"x<b>y</b>z <b>q</b>":                                             "xyz q",
		strings.Repeat("<div>", 100) + "deep":                             "deep",
		"&lt;tag&gt; &amp;":                                               "<tag> &",
	} {
		if _, got, err := htmlText(in); err != nil || got != want {
			t.Errorf("htmlText(%.40q) = %q, %v; expected %q", in, got, err, want)
		}
	}
}

func FuzzHTMLText(f *testing.F) {
	f.Add("<h1>a</h1><p>b<table><tr><td>c")
	f.Fuzz(func(t *testing.T, page string) {
		_, text, err := htmlText(page)
		if err == nil && strings.Contains(text, "\x00") && !strings.Contains(page, "\x00") {
			t.Fatalf("made a zero byte of %q", page)
		}
	})
}

func TestProgressOnlyOnTerminals(t *testing.T) {
	t.Parallel()
	w := newWorld("")
	p := w.progress(false)
	p.show(1, 2, "x")
	p.clear()
	if w.err.Len() != 0 {
		t.Errorf("drew %q", w.err.String())
	}
	p.on = true
	p.show(1, 2, "doing")
	p.show(2, 2, "too soon")
	p.clear()
	if got := w.err.String(); !strings.HasPrefix(got, "\r[============            ]  50%  doing") || strings.Contains(got, "soon") || !strings.HasSuffix(got, "\r") {
		t.Errorf("drew %q", got)
	}
	if got := bar(1, 4, 10*time.Second); !strings.Contains(got, "25% 30.0s left") {
		t.Errorf("bar %q", got)
	}
}
