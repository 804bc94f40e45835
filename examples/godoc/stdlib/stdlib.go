// Package stdlib reads the documentation comments of the Go standard library from its source,
// which every machine with Go has: a corpus of real text for the demo and for bench/relevance.
//
// Promises: for one Go release the documents are the same on every machine and in every run,
// in the same order. Nothing is fetched.
package stdlib

import (
	"bytes"
	"errors"
	"fmt"
	"go/ast"
	"go/build"
	"go/doc"
	"go/doc/comment"
	"go/format"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// Kinds of documents.
const (
	KindPackage = "package"
	KindFunc    = "func"
	KindType    = "type"
	KindMethod  = "method"
	KindConst   = "const"
	KindVar     = "var"
)

// Document is a package's overview or one exported symbol with its comment.
type Document struct {
	// ID is the import path, or the import path, a dot and the symbol: net/http.Client.Do.
	ID      string
	Package string // import path
	Kind    string
	// Symbol is the name within the package: Client.Do; empty for a package.
	Symbol string
	// Declaration is Go source, without a body; empty for a package.
	Declaration string
	// Comment is the documentation comment as it stands in the source, without its marks.
	Comment string
	// Examples of the symbol, from the package's test files. Their code is no part of the text.
	Examples []Example

	parser *comment.Parser
}

// Example is one runnable example of a symbol.
type Example struct {
	// Suffix is the example's own name, where a symbol has several: "customProtocol".
	Suffix string
	// Doc is the comment above it.
	Doc string
}

// GoVersion is the release whose documentation is read.
func GoVersion() string { return runtime.Version() }

// maxDeclaration bounds a declaration, in lines: large constant groups would drown their comment.
const maxDeclaration = 30

// Read returns the documents of every importable package under root/src, or of those whose import
// path begins with one of prefixes. It reads the files that linux/amd64 would build.
func Read(root string, prefixes ...string) ([]Document, error) {
	src := filepath.Join(root, "src")
	var out []Document
	err := filepath.WalkDir(src, func(dir string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(src, dir)
		if err != nil {
			return err
		}
		path := filepath.ToSlash(rel)
		switch name := d.Name(); {
		case slices.Contains([]string{"internal", "testdata", "vendor", "cmd"}, name), strings.HasPrefix(name, "_"):
			return filepath.SkipDir
		}
		if path == "." || len(prefixes) > 0 && !slices.ContainsFunc(prefixes, func(p string) bool {
			return path == p || strings.HasPrefix(path, p+"/")
		}) {
			return nil
		}
		docs, err := readPackage(dir, path)
		out = append(out, docs...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", src, err)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no documented package under %s (GOROOT names a Go installation with its sources)", src)
	}
	slices.SortFunc(out, func(a, b Document) int { return strings.Compare(a.ID, b.ID) })
	return slices.CompactFunc(out, func(a, b Document) bool { return a.ID == b.ID }), nil
}

func readPackage(dir, path string) ([]Document, error) {
	ctx := build.Default
	ctx.GOOS, ctx.GOARCH, ctx.CgoEnabled = "linux", "amd64", true
	found, err := ctx.ImportDir(dir, 0)
	var none *build.NoGoError
	if errors.As(err, &none) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if found.Name == "main" {
		return nil, nil
	}
	fset := token.NewFileSet()
	var files []*ast.File
	for _, name := range slices.Concat(found.GoFiles, found.CgoFiles, found.TestGoFiles, found.XTestGoFiles) {
		f, err := parser.ParseFile(fset, filepath.Join(dir, name), nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	p, err := doc.NewFromFiles(fset, files, path)
	if err != nil {
		return nil, err
	}
	r := reader{fset: fset, pkg: p}
	if path == "builtin" {
		// Its declarations stand for the language's own; they have no package to be called by.
		return nil, nil
	}
	r.add(KindPackage, "", p.Doc, nil, p.Examples)
	for _, v := range p.Consts {
		r.value(KindConst, v)
	}
	for _, v := range p.Vars {
		r.value(KindVar, v)
	}
	for _, f := range p.Funcs {
		r.add(KindFunc, f.Name, f.Doc, f.Decl, f.Examples)
	}
	for _, t := range p.Types {
		r.add(KindType, t.Name, t.Doc, t.Decl, t.Examples)
		for _, v := range t.Consts {
			r.value(KindConst, v)
		}
		for _, v := range t.Vars {
			r.value(KindVar, v)
		}
		for _, f := range t.Funcs {
			r.add(KindFunc, f.Name, f.Doc, f.Decl, f.Examples)
		}
		for _, m := range t.Methods {
			r.add(KindMethod, t.Name+"."+m.Name, m.Doc, m.Decl, m.Examples)
		}
	}
	return r.out, nil
}

type reader struct {
	fset *token.FileSet
	pkg  *doc.Package
	out  []Document
}

// add appends a document for a symbol that has a comment.
func (r *reader) add(kind, symbol, text string, decl ast.Decl, examples []*doc.Example) {
	if strings.TrimSpace(text) == "" {
		return
	}
	d := Document{ID: r.pkg.ImportPath, Package: r.pkg.ImportPath, Kind: kind, Symbol: symbol, Comment: text, parser: r.pkg.Parser()}
	if symbol != "" {
		d.ID += "." + symbol
	}
	if decl != nil {
		d.Declaration = r.source(decl)
	}
	for _, e := range examples {
		d.Examples = append(d.Examples, Example{Suffix: e.Suffix, Doc: strings.TrimSpace(e.Doc)})
	}
	r.out = append(r.out, d)
}

func (r *reader) value(kind string, v *doc.Value) {
	for _, name := range v.Names {
		if ast.IsExported(name) {
			r.add(kind, name, v.Doc, v.Decl, nil)
			return
		}
	}
}

// source prints a declaration without its body and comments.
func (r *reader) source(decl ast.Decl) string {
	switch d := decl.(type) {
	case *ast.FuncDecl:
		c := *d
		c.Body, c.Doc = nil, nil
		decl = &c
	case *ast.GenDecl:
		c := *d
		c.Doc = nil
		decl = &c
	}
	var b bytes.Buffer
	if err := format.Node(&b, r.fset, decl); err != nil {
		return "" // a declaration that does not print leaves its comment, which is what is searched
	}
	lines := strings.Split(b.String(), "\n")
	if len(lines) > maxDeclaration {
		lines = append(lines[:maxDeclaration], "\t// …")
	}
	return strings.Join(lines, "\n")
}

// Text renders the document: a heading, the declaration and the comment.
func (d *Document) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# %s %s\n\n", d.Kind, d.ID)
	if d.Declaration != "" {
		fmt.Fprintf(&b, "```go\n%s\n```\n\n", d.Declaration)
	}
	b.Write(d.Plain(d.Parse()))
	return b.String()
}

// Parse returns the comment's structure, links to symbols resolved.
func (d *Document) Parse() *comment.Doc { return d.parser.Parse(d.Comment) }

// Plain renders a comment's structure as text: Markdown's headings, and nothing escaped.
func (d *Document) Plain(c *comment.Doc) []byte {
	p := comment.Printer{TextWidth: -1}
	return p.Text(c)
}

// GOROOT returns where this machine's Go lives.
func GOROOT() string {
	if root := os.Getenv("GOROOT"); root != "" {
		return root
	}
	return build.Default.GOROOT
}
