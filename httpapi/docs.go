package httpapi

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/labstack/echo/v4"
)

// docsPage shows openapi.yaml to people.
func (s *Server) docsPage(c echo.Context) error {
	return s.render(c, http.StatusOK, "docs", struct {
		frame
		*docsView
	}{s.frame("API", "docs"), s.docs})
}

type docsView struct {
	Info struct {
		Title, Summary, Description, Auth string
	}
	Groups []docsGroup
}

type docsGroup struct {
	Name, Description string
	Operations        []docsOperation
}

type docsOperation struct {
	ID, Method, Path, Summary, Description, Scope string
	Parameters                                    []docsField
	Bodies                                        []docsBody
	Responses                                     []docsBody
}

type docsField struct {
	Name, In, Type, Description string
	Required                    bool
}

type docsBody struct {
	Status, Media, Description, Example string
	Fields                              []docsField
}

// tree is a part of the document.
type tree = map[string]any

func child(t tree, path ...string) tree {
	for _, p := range path {
		t, _ = t[p].(tree)
	}
	return t
}

func text(t tree, key string) string {
	s, _ := t[key].(string)
	return strings.Join(strings.Fields(s), " ")
}

func list(t tree, key string) []any {
	l, _ := t[key].([]any)
	return l
}

// resolve follows a $ref to its place in the document.
func (d *document) resolve(t tree) tree {
	ref, ok := t["$ref"].(string)
	if !ok {
		return t
	}
	return d.resolve(child(d.tree, strings.Split(strings.TrimPrefix(ref, "#/"), "/")...))
}

// buildDocs turns the document into what the page shows, once.
func buildDocs(d *document) *docsView {
	v := &docsView{}
	info := child(d.tree, "info")
	v.Info.Title, v.Info.Summary, v.Info.Description = text(info, "title"), text(info, "summary"), text(info, "description")
	v.Info.Auth = text(child(d.tree, "components", "securitySchemes", "key"), "description")
	byTag := map[string]int{}
	for _, raw := range list(d.tree, "tags") {
		t, _ := raw.(tree)
		byTag[text(t, "name")] = len(v.Groups)
		v.Groups = append(v.Groups, docsGroup{Name: text(t, "name"), Description: text(t, "description")})
	}
	paths := child(d.tree, "paths")
	for _, path := range slices.Sorted(maps.Keys(paths)) {
		item := child(paths, path)
		for _, method := range []string{"get", "post", "patch", "delete"} {
			op := child(item, method)
			if op == nil {
				continue
			}
			o := d.operation(strings.ToUpper(method), path, item, op)
			tags := list(op, "tags")
			if len(tags) == 0 {
				continue
			}
			name, _ := tags[0].(string)
			g := &v.Groups[byTag[name]]
			g.Operations = append(g.Operations, o)
		}
	}
	return v
}

func (d *document) operation(method, path string, item, op tree) docsOperation {
	o := docsOperation{
		ID: text(op, "operationId"), Method: method, Path: path,
		Summary: text(op, "summary"), Description: text(op, "description"), Scope: text(op, "x-scope"),
	}
	for _, raw := range append(list(item, "parameters"), list(op, "parameters")...) {
		t, _ := raw.(tree)
		p := d.resolve(t)
		required, _ := p["required"].(bool)
		o.Parameters = append(o.Parameters, docsField{
			Name: text(p, "name"), In: text(p, "in"), Description: text(p, "description"),
			Type: d.typeName(child(p, "schema")), Required: required,
		})
	}
	o.Bodies = d.bodies(child(op, "requestBody", "content"), "", "")
	responses := child(op, "responses")
	for _, status := range slices.Sorted(maps.Keys(responses)) {
		r := d.resolve(child(responses, status))
		name := status
		if status == "default" {
			name = "Errors"
		}
		bodies := d.bodies(child(r, "content"), name, text(r, "description"))
		if len(bodies) == 0 {
			bodies = []docsBody{{Status: name, Description: text(r, "description")}}
		}
		o.Responses = append(o.Responses, bodies...)
	}
	return o
}

func (d *document) bodies(content tree, status, description string) []docsBody {
	var out []docsBody
	for _, media := range slices.Sorted(maps.Keys(content)) {
		m := child(content, media)
		b := docsBody{Status: status, Media: media, Description: description, Fields: d.fields(child(m, "schema"))}
		if e, ok := m["example"]; ok {
			if raw, err := json.Marshal(e, json.Deterministic(true), jsontext.WithIndent("  ")); err == nil {
				b.Example = string(raw)
			}
		}
		out = append(out, b)
	}
	return out
}

// fields lists the members of an object's schema, or of the first alternative that is one.
func (d *document) fields(schema tree) []docsField {
	schema = d.resolve(schema)
	for _, key := range []string{"anyOf", "allOf"} {
		for _, raw := range list(schema, key) {
			t, _ := raw.(tree)
			if f := d.fields(t); f != nil {
				return f
			}
		}
	}
	props := child(schema, "properties")
	var out []docsField
	for _, name := range slices.Sorted(maps.Keys(props)) {
		p := child(props, name)
		out = append(out, docsField{
			Name: name, Type: d.typeName(p), Description: text(d.resolve(p), "description"),
			Required: slices.Contains(list(schema, "required"), any(name)),
		})
	}
	return out
}

// typeName says in a few words what a schema accepts.
func (d *document) typeName(schema tree) string {
	name := ""
	if ref, ok := schema["$ref"].(string); ok {
		name = ref[strings.LastIndex(ref, "/")+1:]
	}
	s := d.resolve(schema)
	var parts []string
	add := func(p string) {
		if p != "" && !slices.Contains(parts, p) {
			parts = append(parts, p)
		}
	}
	switch t := s["type"].(type) {
	case string:
		add(t)
	case []any:
		for _, one := range t {
			if one, _ := one.(string); one != "null" {
				add(one)
			}
		}
	}
	for _, raw := range list(s, "anyOf") {
		t, _ := raw.(tree)
		add(d.typeName(t))
	}
	for _, raw := range list(s, "enum") {
		if raw != nil && raw != "" {
			add(fmt.Sprint(raw))
		}
	}
	if items := child(s, "items"); items != nil {
		for i := range parts {
			if parts[i] == "array" {
				parts[i] = "list of " + d.typeName(items)
			}
		}
	}
	out := strings.Join(parts, " or ")
	if out == "object" && name != "" {
		out = name
	}
	lo, hasLo := s["minimum"]
	hi, hasHi := s["maximum"]
	switch {
	case hasLo && hasHi:
		out += fmt.Sprintf(", %v to %v", lo, hi)
	case hasLo:
		out += fmt.Sprintf(", at least %v", lo)
	}
	if def, ok := s["default"]; ok {
		out += fmt.Sprintf(" (default %v)", def)
	}
	return strings.TrimPrefix(out, ", ")
}
