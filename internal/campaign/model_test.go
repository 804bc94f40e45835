package campaign

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// contents that documents flip between: some share chunks, one has equal ones, one comes with a
// vector of its own.
var contents = map[string][]string{
	"A": {"shared one", "only in alpha", "shared two"},
	"B": {"shared two", "only in beta"},
	"C": {"only in gamma", "only in gamma", "shared one"},
	"D": {"only in delta"},
	"E": {"shared one", "brought along"},
}

var contentNames = slices.Sorted(maps.Keys(contents))

// bringsVector is the text whose dense vector its caller brings.
const bringsVector = "brought along"

var broughtVector = []float32{3, 0, 0, 0, 4, 0, 0, 0}

func input(doc, content string, value int) corpus.DocumentInput {
	in := corpus.DocumentInput{ID: doc, Metadata: metadataOf(value)}
	for _, text := range contents[content] {
		c := corpus.ChunkInput{Text: text}
		if text == bringsVector {
			c.Vectors = &corpus.Vectors{Dense: slices.Clone(broughtVector)}
		}
		in.Chunks = append(in.Chunks, c)
	}
	return in
}

var groups = []string{"a", "b"}

func metadataOf(value int) corpus.Metadata {
	return corpus.Metadata{"op": int64(value), "grp": groups[value%len(groups)]}
}

func valueOf(m corpus.Metadata) int {
	v, ok := m["op"].(int64)
	if !ok || m["grp"] != groups[int(v)%len(groups)] {
		return -1
	}
	return int(v)
}

type opKind string

const (
	put    opKind = "put"
	patch  opKind = "patch"
	remove opKind = "delete"
)

// op is one client's operation. Times are ticks of the model; the end of one whose outcome is
// not known is never.
type op struct {
	kind       opKind
	content    string // of a put
	value      int    // of a put or a patch: what its metadata says
	start, end int64
	acked      bool
	void       bool  // known to have changed nothing
	visible    bool  // acknowledged as serving
	version    int64 // acknowledged
}

func (o *op) String() string {
	s := fmt.Sprintf("%s %s#%d v%d [%d,", o.kind, o.content, o.value, o.version, o.start)
	switch {
	case o.void:
		return s + fmt.Sprintf("%d] void", o.end)
	case !o.acked:
		return s + "?]"
	case o.visible:
		return s + fmt.Sprintf("%d] serving", o.end)
	default:
		return s + fmt.Sprintf("%d]", o.end)
	}
}

// seen is what one search showed of one document.
type seen struct {
	start, end int64
	version    int64
	value      int
	texts      map[int]string // by ordinal; some only, unless whole
}

// model knows what clients did to each document, and so what they may see.
type model struct {
	mu sync.Mutex
	// versioned: versions order operations. Not so where documents are purged and begin anew.
	versioned bool
	now       int64
	values    int
	docs      map[string]*docModel
}

type docModel struct {
	ops []*op
	// shown are the values that searches showed, with the end of the first search that did.
	shown []shown
}

type shown struct {
	ops     []*op
	version int64
	end     int64
}

func newModel(docs []string, versioned bool) *model {
	m := &model{versioned: versioned, docs: map[string]*docModel{}}
	for _, d := range docs {
		m.docs[d] = &docModel{}
	}
	return m
}

func (m *model) tick() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now++
	return m.now
}

// time is the last tick.
func (m *model) time() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.now
}

// begin notes an operation that is about to be sent. reuse keeps the metadata of the
// document's last operation.
func (m *model) begin(doc string, kind opKind, content string, reuse bool) *op {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.docs[doc]
	m.now++
	o := &op{kind: kind, content: content, start: m.now, end: math.MaxInt64}
	if last := d.last(); kind != remove && reuse && last != nil {
		o.value = last.value
	} else if kind != remove {
		m.values++
		o.value = m.values
	}
	d.ops = append(d.ops, o)
	return o
}

func (d *docModel) last() *op {
	for i := len(d.ops) - 1; i >= 0; i-- {
		if d.ops[i].kind != remove {
			return d.ops[i]
		}
	}
	return nil
}

// done notes an operation's answer.
func (m *model) done(o *op, set func(o *op)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now++
	o.end = m.now
	set(o)
}

// before reports whether a surely happened before b.
func (m *model) before(a, b *op) bool {
	if a.end < b.start {
		return true
	}
	return m.versioned && a.acked && b.acked && !a.void && !b.void && a.version < b.version
}

// candidates are the operations after which a document may hold texts and metadata like these.
// Of a patch, some put whose content survived until then must fit as well; a patch changes the
// metadata of what serves, too, so to a search a content survives until another is visible.
func (m *model) candidates(d *docModel, fits func(content string) bool, value int, serving bool) []*op {
	var out []*op
	for _, o := range d.ops {
		if o.void || o.kind == remove || o.value != value {
			continue
		}
		if o.kind == put {
			if fits(o.content) {
				out = append(out, o)
			}
			continue
		}
		for _, p := range d.ops {
			if p.kind != put || p.void || !fits(p.content) || m.before(o, p) || p.start > o.end {
				continue
			}
			if !slices.ContainsFunc(d.ops, func(q *op) bool {
				return q != p && q.acked && !q.void && q.kind != patch && (!serving || q.visible) && m.before(p, q) && m.before(q, o)
			}) {
				out = append(out, o)
				break
			}
		}
	}
	return out
}

// look judges what a search showed of a document; "" is fine.
func (m *model) look(doc string, s seen) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.docs[doc]
	if d == nil {
		return fmt.Sprintf("P1: a document nobody sent is found: %q", doc)
	}
	fits := func(content string) bool {
		for ordinal, text := range s.texts {
			if want := contents[content]; ordinal >= len(want) || want[ordinal] != text {
				return false
			}
		}
		return true
	}
	if !slices.ContainsFunc(contentNames, fits) {
		return fmt.Sprintf("P2: %s shows %v, which is no version of it\n%s", doc, s.texts, d)
	}
	cands := m.candidates(d, fits, s.value, true)
	if len(cands) == 0 {
		return fmt.Sprintf("P1: %s shows %v with metadata %d, which no operation left\n%s", doc, s.texts, s.value, d)
	}
	for _, sh := range d.shown {
		if m.versioned && sh.end < s.start && sh.version > s.version {
			return fmt.Sprintf("P2: a search in [%d,%d] shows %s at version %d; by tick %d one had shown version %d\n%s", s.start, s.end, doc, s.version, sh.end, sh.version, d)
		}
	}
	why := ""
	var ok []*op
	for _, c := range cands {
		if bad := m.mayShow(d, c, &s); bad != "" {
			why += "\n  " + c.String() + ": " + bad
		} else {
			ok = append(ok, c)
		}
	}
	if len(ok) == 0 {
		return fmt.Sprintf("P2: a search in [%d,%d] shows %s at version %d with %v and metadata %d:%s\n%s", s.start, s.end, doc, s.version, s.texts, s.value, why, d)
	}
	d.shown = append(d.shown, shown{ok, s.version, s.end})
	return ""
}

// mayShow says why a search must not show what c left, or "".
func (m *model) mayShow(d *docModel, c *op, s *seen) string {
	if m.versioned && c.acked && c.kind == put && c.version != s.version {
		return fmt.Sprintf("it was acknowledged as version %d", c.version)
	}
	if c.start > s.end {
		return "it began later"
	}
	for _, o := range d.ops {
		if o.acked && !o.void && o.end < s.start && m.before(c, o) && (o.kind == remove || o.visible) {
			return "it had been followed by " + o.String()
		}
	}
	for _, sh := range d.shown {
		if sh.end < s.start && !slices.ContainsFunc(sh.ops, func(o *op) bool { return !m.before(c, o) }) {
			return fmt.Sprintf("by tick %d a search had shown %s", sh.end, sh.ops[0])
		}
	}
	return ""
}

// mustFind says which documents a search that begins at start cannot but find, if it sees all:
// those that were acknowledged as serving, and that no delete can have reached since.
func (m *model) mustFind(start int64) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for name, d := range m.docs {
		if d.exists(start, func(o *op) bool { return o.visible }) {
			out = append(out, name)
		}
	}
	return out
}

// notFound judges the answer that there is no such document, given to o.
func (m *model) notFound(doc string, o *op) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if d := m.docs[doc]; d.exists(o.start, func(*op) bool { return true }) {
		return fmt.Sprintf("P3: %s was answered not_found\n%s", o, d)
	}
	return ""
}

// exists reports whether the document surely existed from start on: by an acknowledged write of
// the kind asked for, that no delete can have reached.
func (d *docModel) exists(start int64, by func(*op) bool) bool {
	return slices.ContainsFunc(d.ops, func(o *op) bool {
		return o.acked && !o.void && o.kind != remove && o.end < start && by(o) && !slices.ContainsFunc(d.ops, func(r *op) bool {
			return r.kind == remove && !r.void && r.end > o.start
		})
	})
}

// final judges what a document is at the end; texts is nil where there is none.
func (m *model) final(doc string, texts []string, value int, version int64) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.docs[doc]
	var cands []*op
	if texts == nil {
		for _, o := range d.ops {
			if o.kind == remove && !o.void {
				cands = append(cands, o)
			}
		}
		if len(cands) == 0 {
			if i := slices.IndexFunc(d.ops, func(o *op) bool { return o.acked && !o.void }); i >= 0 {
				return fmt.Sprintf("P3: %s is not there, and nobody deleted it\n%s", doc, d)
			}
			return ""
		}
	} else {
		cands = m.candidates(d, func(c string) bool { return slices.Equal(contents[c], texts) }, value, false)
		if m.versioned {
			cands = slices.DeleteFunc(cands, func(o *op) bool { return o.acked && o.kind == put && o.version != version })
		}
		if len(cands) == 0 {
			return fmt.Sprintf("P1: %s holds %q with metadata %d at version %d, which no operation left\n%s", doc, texts, value, version, d)
		}
	}
	why := ""
	for _, c := range cands {
		i := slices.IndexFunc(d.ops, func(o *op) bool { return o != c && o.acked && !o.void && m.before(c, o) })
		if i < 0 {
			return ""
		}
		why += fmt.Sprintf("\n  %s was followed by %s", c, d.ops[i])
	}
	return fmt.Sprintf("P3: at the end %s holds %q with metadata %d at version %d:%s\n%s", doc, texts, value, version, why, d)
}

func (d *docModel) String() string {
	s := "its operations:"
	for _, o := range d.ops {
		s += "\n  " + o.String()
	}
	return s
}
