package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/html"
	"golang.org/x/net/html/atom"
)

// source reads documents from files, folders and stdin, one after the other, as lines of
// JSON for the server.
type source struct {
	format   string            // auto, jsonl, text, markdown or html
	prefix   string            // before ids made from file names
	metadata map[string]string // added to every document made from a file
	stdin    io.Reader
	maxFile  int64
}

// item is one document on its way: its line, and where it came from, for messages.
type item struct {
	line   []byte
	origin string
	// bytes of the input that are read with this document, for progress.
	bytes int64
}

// fileFault is an input that is no document; the others go on.
type fileFault struct {
	origin string
	err    error
}

// maxInputLine bounds one line of JSONL; the server has a limit of its own.
const maxInputLine = 64 << 20

var formats = map[string]string{
	".jsonl": "jsonl", ".ndjson": "jsonl",
	".txt": "text", ".text": "text",
	".md": "markdown", ".markdown": "markdown",
	".html": "html", ".htm": "html", ".xhtml": "html",
}

// job is one file to read. id is its path as the caller named it, with forward slashes.
type job struct {
	path, id, format string
	size             int64
}

// plan lists the files of the operands, folders entered in order of name. A file that was
// named is taken whatever its ending says (as text, if it says nothing); inside folders, only
// known endings are, unless the format was given, and hidden files are left out. A folder's
// files are named relative to the folder.
func (s *source) plan(operands []string) (jobs []job, faults []fileFault) {
	for _, op := range operands {
		if op == "-" {
			f := s.format
			if f == "auto" {
				f = "jsonl"
			}
			jobs = append(jobs, job{path: "-", id: "stdin", format: f})
			continue
		}
		info, err := os.Stat(op)
		if err != nil {
			faults = append(faults, fileFault{op, pathCause(err)})
			continue
		}
		if !info.IsDir() {
			f, known := s.formatOf(op)
			if !known {
				f = "text"
			}
			jobs = append(jobs, job{op, filepath.ToSlash(filepath.Clean(op)), f, info.Size()})
			continue
		}
		err = filepath.WalkDir(op, func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				faults = append(faults, fileFault{path, pathCause(err)})
				if d != nil && d.IsDir() {
					return fs.SkipDir
				}
				return nil
			case path != op && strings.HasPrefix(d.Name(), "."):
				if d.IsDir() {
					return fs.SkipDir
				}
				return nil
			case d.IsDir():
				return nil
			}
			f, known := s.formatOf(path)
			if !known {
				return nil
			}
			info, err := os.Stat(path) // follows a link to a file
			if err != nil {
				faults = append(faults, fileFault{path, pathCause(err)})
				return nil
			}
			if !info.Mode().IsRegular() {
				return nil
			}
			rel, err := filepath.Rel(op, path)
			if err != nil {
				return err
			}
			jobs = append(jobs, job{path, filepath.ToSlash(rel), f, info.Size()})
			return nil
		})
		if err != nil {
			faults = append(faults, fileFault{op, err})
		}
	}
	return jobs, faults
}

// formatOf says how a file is read: as the caller says, else by its ending.
func (s *source) formatOf(path string) (format string, known bool) {
	if s.format != "auto" {
		return s.format, true
	}
	format, known = formats[strings.ToLower(filepath.Ext(path))]
	return format, known
}

func pathCause(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// read sends the documents of one job to out. It returns what failed; only ctx's end stops it.
func (s *source) read(ctx context.Context, j job, out chan<- item, fault func(fileFault)) error {
	r := s.stdin
	if j.path != "-" {
		f, err := os.Open(j.path)
		if err != nil {
			fault(fileFault{j.path, pathCause(err)})
			return nil
		}
		defer f.Close()
		r = f
	}
	if j.format == "jsonl" {
		return s.readLines(ctx, j, r, out, fault)
	}
	raw, err := io.ReadAll(io.LimitReader(r, s.maxFile+1))
	switch {
	case err != nil:
		fault(fileFault{j.path, pathCause(err)})
		return nil
	case int64(len(raw)) > s.maxFile:
		fault(fileFault{j.path, fmt.Errorf("larger than %d bytes; cut it, or send it as JSONL", s.maxFile)})
		return nil
	}
	it, err := s.document(j, raw)
	if err != nil {
		fault(fileFault{j.path, err})
		return nil
	}
	return put(ctx, out, it)
}

func put(ctx context.Context, out chan<- item, it item) error {
	select {
	case out <- it:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// document makes one document of a file's content.
func (s *source) document(j job, raw []byte) (item, error) {
	raw = bytes.TrimPrefix(raw, []byte("\xef\xbb\xbf"))
	if !utf8.Valid(raw) {
		return item{}, errors.New("not UTF-8 text")
	}
	if bytes.IndexByte(raw, 0) >= 0 {
		return item{}, errors.New("contains a zero byte: not text")
	}
	md := map[string]any{"source": j.id, "format": j.format}
	text := strings.ReplaceAll(string(raw), "\r\n", "\n")
	if j.format == "html" {
		title, body, err := htmlText(text)
		if err != nil {
			return item{}, fmt.Errorf("read HTML: %w", err)
		}
		text = body
		if title != "" {
			md["title"] = title
		}
	}
	if j.format == "markdown" {
		if title := markdownTitle(text); title != "" {
			md["title"] = title
		}
	}
	if strings.TrimSpace(text) == "" {
		return item{}, errors.New("has no text")
	}
	for k, v := range s.metadata {
		md[k] = v
	}
	line, err := encode(map[string]any{"id": s.prefix + j.id, "text": text, "metadata": md})
	return item{line: line, origin: j.path, bytes: int64(len(raw))}, err
}

func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimRight(b.Bytes(), "\n"), nil
}

// readLines passes lines of JSON through as they are: the server judges them, and the
// messages name file and line.
func (s *source) readLines(ctx context.Context, j job, r io.Reader, out chan<- item, fault func(fileFault)) error {
	br := bufio.NewReaderSize(r, 1<<20)
	for n := 1; ; n++ {
		origin := fmt.Sprintf("%s:%d", j.path, n)
		line, size, err := readInputLine(br)
		if n == 1 {
			line = bytes.TrimPrefix(line, []byte("\xef\xbb\xbf"))
		}
		switch trimmed := bytes.TrimSpace(line); {
		case err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, errLineTooLong):
			fault(fileFault{origin, pathCause(err)})
			return nil
		case errors.Is(err, errLineTooLong):
			fault(fileFault{origin, fmt.Errorf("the line is longer than %d bytes", maxInputLine)})
			err = nil
		case len(trimmed) == 0:
		case !json.Valid(trimmed):
			fault(fileFault{origin, errors.New("not valid JSON")})
		default:
			if perr := put(ctx, out, item{line: slices.Clone(trimmed), origin: origin, bytes: size}); perr != nil {
				return perr
			}
		}
		if err != nil {
			return nil //nolint:nilerr // the end of the file; other errors were reported above
		}
	}
}

var errLineTooLong = errors.New("line too long")

func readInputLine(r *bufio.Reader) (line []byte, size int64, err error) {
	tooLong := false
	for {
		part, err := r.ReadSlice('\n')
		size += int64(len(part))
		if len(line)+len(part) > maxInputLine {
			tooLong, line = true, nil
		}
		if !tooLong {
			line = append(line, part...)
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if err == nil && tooLong {
			err = errLineTooLong
		}
		return line, size, err
	}
}

// markdownTitle is the first heading of level one.
func markdownTitle(text string) string {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, "# "); ok {
			return strings.TrimSpace(strings.TrimRight(strings.TrimSpace(rest), "#"))
		}
	}
	return ""
}

// htmlText returns a page's title and its text: blocks become paragraphs, headings keep a
// Markdown mark so that chunks are cut at them, lists keep their dashes; scripts, styles and
// navigation are left out.
func htmlText(page string) (title, text string, err error) {
	doc, err := html.Parse(strings.NewReader(page))
	if err != nil {
		return "", "", err
	}
	w := &textWriter{}
	// Deep trees come from broken or hostile pages; html.Parse itself bounds its open elements,
	// and this walk keeps its place in the tree instead of on the stack.
	var open []*html.Node
	for n := doc; n != nil; {
		descend := w.enter(n, &title)
		if descend && n.FirstChild != nil {
			open = append(open, n)
			n = n.FirstChild
			continue
		}
		w.leave(n)
		for n.NextSibling == nil {
			if len(open) == 0 {
				return strings.TrimSpace(title), strings.TrimSpace(w.b.String()), nil
			}
			n = open[len(open)-1]
			open = open[:len(open)-1]
			w.leave(n)
		}
		n = n.NextSibling
	}
	return title, "", nil
}

type textWriter struct {
	b   strings.Builder
	pre int
	// space is set when white space was seen that matters only before more text.
	space bool
	// breaks is how many line ends the next text needs before it.
	breaks int
}

func (w *textWriter) paragraph() { w.breaks = max(w.breaks, 2) }

func (w *textWriter) write(s string) {
	if s == "" {
		return
	}
	if w.b.Len() > 0 && w.breaks > 0 {
		w.b.WriteString(strings.Repeat("\n", w.breaks))
	} else if w.b.Len() > 0 && w.space {
		w.b.WriteByte(' ')
	}
	w.breaks, w.space = 0, false
	w.b.WriteString(s)
}

// enter handles a node before its children and reports whether they matter.
func (w *textWriter) enter(n *html.Node, title *string) bool {
	switch n.Type {
	case html.TextNode:
		if w.pre > 0 {
			w.write(n.Data)
			return false
		}
		words := strings.Fields(n.Data)
		if len(words) == 0 {
			w.space = w.space || n.Data != ""
			return false
		}
		w.space = w.space || n.Data[0] <= ' '
		w.write(strings.Join(words, " "))
		w.space = n.Data[len(n.Data)-1] <= ' '
		return false
	case html.ElementNode:
	default:
		return n.Type == html.DocumentNode
	}
	switch n.DataAtom {
	case atom.Script, atom.Style, atom.Noscript, atom.Template, atom.Svg, atom.Nav, atom.Iframe, atom.Object, atom.Math:
		return false
	case atom.Title:
		if n.FirstChild != nil && *title == "" {
			*title = strings.Join(strings.Fields(n.FirstChild.Data), " ")
		}
		return false
	case atom.H1, atom.H2, atom.H3, atom.H4, atom.H5, atom.H6:
		w.paragraph()
		w.write(strings.Repeat("#", int(n.Data[1]-'0')))
		w.space = true
	case atom.Br:
		w.breaks = max(w.breaks, 1)
	case atom.Li:
		w.breaks = max(w.breaks, 1)
		w.write("-")
		w.space = true
	case atom.Td, atom.Th:
		w.space = true
	case atom.Tr:
		w.breaks = max(w.breaks, 1)
	case atom.Pre:
		w.paragraph()
		w.pre++
	default:
		if blocks[n.DataAtom] {
			w.paragraph()
		}
	}
	return true
}

func (w *textWriter) leave(n *html.Node) {
	if n.Type != html.ElementNode {
		return
	}
	switch n.DataAtom {
	case atom.Pre:
		w.pre--
		w.paragraph()
	case atom.H1, atom.H2, atom.H3, atom.H4, atom.H5, atom.H6:
		w.paragraph()
	default:
		if blocks[n.DataAtom] {
			w.paragraph()
		}
	}
}

var blocks = map[atom.Atom]bool{
	atom.P: true, atom.Div: true, atom.Section: true, atom.Article: true, atom.Header: true, atom.Footer: true,
	atom.Ul: true, atom.Ol: true, atom.Dl: true, atom.Dt: true, atom.Dd: true, atom.Table: true, atom.Blockquote: true,
	atom.Main: true, atom.Aside: true, atom.Figure: true, atom.Figcaption: true, atom.Form: true, atom.Hr: true,
	atom.Body: true, atom.Address: true, atom.Fieldset: true, atom.Details: true, atom.Summary: true,
}
