package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/lockstep-db/lockstep"

// pkg is what `go list -json` says of one package.
type pkg struct {
	ImportPath   string
	Doc          string
	GoFiles      []string
	CgoFiles     []string
	Imports      []string
	Deps         []string
	TestImports  []string
	XTestImports []string
}

func list(t *testing.T) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Doc,GoFiles,CgoFiles,Imports,Deps", "./...")
	cmd.Dir = "../.."
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	pkgs := map[string]pkg{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		pkgs[strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")] = p
	}
	return pkgs
}

// rooms says which packages of this module each room may import directly. A room that is
// missing here fails the test: new rooms are decided, not drifted into.
var rooms = map[string][]string{
	"cmd/lockstep":             {"internal/app", "internal/config", "internal/cli"},
	"internal/cli":             {"internal/corpus", "internal/config", "internal/config/cachedir"},
	"internal/corpus":          {},
	"internal/config":          {"internal/corpus", "internal/config/cachedir"},
	"internal/config/cachedir": {},
	"internal/devstack":        {"internal/corpus", "store/qdrantlocal"},
	"internal/faults":          {"internal/corpus"},
	"internal/archtest":        {},
	"httpapi":                  {"internal/corpus"},
	"ingest":                   {"internal/corpus", "ingest/chunk"},
	"ingest/chunk":             {"internal/corpus"},
	"search":                   {"internal/corpus"},
	"reconcile":                {"internal/corpus"},
	"embedder":                 {"internal/corpus"},
	"embedder/fake":            {"internal/corpus"},
	"embedder/onnx":            {"internal/corpus", "embedder/model"},
	"embedder/model":           {"internal/corpus"},
	"store/postgres":           {"internal/corpus", "migrations"},
	"store/postgres/pgtest":    {},
	"store/qdrant":             {"internal/corpus"},
	"store/qdrantlocal":        {"internal/corpus"},
	"store/qdranttest":         {"store/qdrantlocal"},
	"store/storetest":          {"internal/corpus", "store/qdrantlocal"},
	"migrations":               {},
}

// open lists places that may import any room: they wire or measure, and nothing imports them.
var open = []string{"internal/app", "internal/campaign", "bench", "examples", "deploy"}

// reach says which modules only some rooms may reach, directly or through others.
var reach = []struct {
	what string
	only []string
	why  string
}{
	{"github.com/labstack/echo/v4", []string{"httpapi"}, "one room speaks HTTP"},
	{"github.com/jackc/pgx/v5", []string{"store/postgres", "store/postgres/pgtest", "internal/devstack"}, "one room speaks SQL; devstack asks its server whether it is up"},
	{"github.com/qdrant/go-client/qdrant", []string{"store/qdrant", "store/qdrantlocal", "store/qdranttest", "store/storetest", "internal/faults", "internal/devstack"}, "proto types stay at the edge"},
	{"google.golang.org/grpc", []string{"store/qdrant", "store/qdrantlocal", "store/qdranttest", "store/storetest", "internal/faults", "internal/devstack"}, "transport stays at the edge"},
	{"github.com/daulet/tokenizers", []string{"embedder/onnx"}, "one cgo room"},
	{"github.com/yalue/onnxruntime_go", []string{"embedder/onnx"}, "one cgo room"},
}

func under(path string, roots []string) bool {
	for _, r := range roots {
		if path == r || strings.HasPrefix(path, r+"/") {
			return true
		}
	}
	return false
}

func TestRoomsImportOnlyWhatTheyMay(t *testing.T) {
	t.Parallel()
	pkgs := list(t)
	if len(pkgs) < 10 {
		t.Fatalf("go list saw only %d packages", len(pkgs))
	}
	for name, p := range pkgs {
		if under(name, open) {
			continue
		}
		allowed, ok := rooms[name]
		if !ok {
			t.Errorf("%s is no room of the design: add it to the table with what it may import", name)
			continue
		}
		for _, imp := range p.Imports {
			inner, ours := strings.CutPrefix(imp, module+"/")
			if ours && !slices.Contains(allowed, inner) {
				t.Errorf("%s imports %s; it may import %v", name, inner, allowed)
			}
		}
		if name == "internal/corpus" {
			for _, dep := range p.Imports {
				if strings.Contains(dep, ".") {
					t.Errorf("corpus imports %s; it may import the standard library only", dep)
				}
			}
		}
	}
	for name := range rooms {
		if _, ok := pkgs[name]; !ok {
			t.Errorf("the table names %s, which does not exist", name)
		}
	}
}

func TestTechnologiesStayInTheirRooms(t *testing.T) {
	t.Parallel()
	for name, p := range list(t) {
		if under(name, open) || name == "cmd/lockstep" {
			continue
		}
		for _, rule := range reach {
			if slices.Contains(p.Deps, rule.what) && !slices.Contains(rule.only, name) {
				t.Errorf("%s reaches %s, which only %v may: %s", name, rule.what, rule.only, rule.why)
			}
		}
		if len(p.CgoFiles) > 0 && name != "embedder/onnx" {
			t.Errorf("%s uses cgo; only embedder/onnx may", name)
		}
	}
}

func TestOnlyMainImportsApp(t *testing.T) {
	t.Parallel()
	for name, p := range list(t) {
		if slices.Contains(p.Imports, module+"/internal/app") && name != "cmd/lockstep" && !under(name, []string{"bench"}) {
			t.Errorf("%s imports internal/app; only cmd/lockstep may", name)
		}
	}
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	t.Parallel()
	for name, p := range list(t) {
		if len(p.GoFiles)+len(p.CgoFiles) > 0 && p.Doc == "" {
			t.Errorf("%s has no package comment", name)
		}
	}
}
