package cli

import (
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// hub stands in for a model hub: its listing, its files, ranges, and its faults.
type hub struct {
	*httptest.Server
	files map[string]string
	lfs   map[string]bool
	mu    sync.Mutex
	got   []string
	// fault may answer a file's request instead; n counts requests of that file from 1.
	fault func(name string, n int, w http.ResponseWriter, content string) bool
	asked map[string]int
}

func newHub(t *testing.T) *hub {
	t.Helper()
	h := &hub{asked: map[string]int{}, lfs: map[string]bool{"model.safetensors": true, "sparse_linear.pt": true}, files: map[string]string{
		"config.json": `{"a":1}`, "tokenizer.json": "tok", "model.safetensors": strings.Repeat("weights", 5000), "pytorch_model.bin": "not wanted",
		"1_Pooling/config.json": "pool", "onnx/model.onnx": "not wanted", "sparse_linear.pt": "head", "imgs/x.png": "not wanted",
	}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/models/BAAI/bge-m3/revision/{rev}", func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("rev") != "main" {
			w.WriteHeader(404)
			return
		}
		var siblings []map[string]any
		for name, content := range h.files {
			blob := sha1.Sum([]byte(fmt.Sprintf("blob %d\x00%s", len(content), content)))
			f := map[string]any{"rfilename": name, "size": len(content), "blobId": hex.EncodeToString(blob[:])}
			if h.lfs[name] {
				sum := sha256.Sum256([]byte(content))
				f["lfs"] = map[string]any{"sha256": hex.EncodeToString(sum[:]), "size": len(content)}
			}
			siblings = append(siblings, f)
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"sha": "abc123", "siblings": siblings})
	})
	mux.HandleFunc("GET /BAAI/bge-m3/resolve/abc123/{file...}", func(w http.ResponseWriter, r *http.Request) {
		name := r.PathValue("file")
		h.mu.Lock()
		h.asked[name]++
		n := h.asked[name]
		h.got = append(h.got, name+" "+r.Header.Get("Range"))
		h.mu.Unlock()
		content, ok := h.files[name]
		if !ok {
			w.WriteHeader(404)
			return
		}
		if h.fault != nil && h.fault(name, n, w, content) {
			return
		}
		if from, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
			at, _ := strconv.Atoi(strings.TrimSuffix(from, "-"))
			w.WriteHeader(206)
			content = content[at:]
		}
		_, _ = w.Write([]byte(content))
	})
	h.Server = httptest.NewServer(mux)
	t.Cleanup(h.Close)
	return h
}

func (h *hub) pull(t *testing.T, dir string, args ...string) (*world, int) {
	t.Helper()
	w := newWorld("", append(args, "--dir", dir)...)
	w.Getenv = func(k string) string {
		if k == "LOCKSTEP_HUB_URL" {
			return h.URL
		}
		return ""
	}
	return w, ModelPull(t.Context(), w.Env)
}

func TestPull(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	dir := filepath.Join(t.TempDir(), "m")
	w, code := h.pull(t, dir, "bge-m3")
	if code != ExitOK {
		t.Fatalf("exit %d: %s", code, w.err.String())
	}
	for _, name := range []string{"config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json", "sparse_linear.pt"} {
		if raw, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(raw) != h.files[name] {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"pytorch_model.bin", "onnx/model.onnx", "imgs/x.png"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			t.Errorf("%s was fetched", name)
		}
	}
	if _, err := os.Stat(dir + ".partial"); err == nil {
		t.Error("the partial folder is left")
	}
	before := len(h.got)
	if _, code := h.pull(t, dir, "bge-m3"); code != ExitOK || len(h.got) != before {
		t.Error("fetched again what was there")
	}
}

func TestPullGoesOnWhereItEnded(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.fault = func(name string, n int, w http.ResponseWriter, content string) bool {
		if name != "model.safetensors" || n > 1 {
			return false
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(content)))
		_, _ = w.Write([]byte(content[:10_000]))
		panic(http.ErrAbortHandler)
	}
	dir := filepath.Join(t.TempDir(), "m")
	if w, code := h.pull(t, dir, "bge-m3"); code != ExitOK {
		t.Fatalf("exit %d: %s", code, w.err.String())
	}
	resumed := slices.ContainsFunc(h.got, func(s string) bool {
		return strings.HasPrefix(s, "model.safetensors bytes=") && s != "model.safetensors bytes=0-"
	})
	if !resumed {
		t.Errorf("requests %q", h.got)
	}
}

func TestPullRefusesDamage(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	h.fault = func(name string, _ int, w http.ResponseWriter, content string) bool {
		if name != "model.safetensors" {
			return false
		}
		_, _ = w.Write([]byte(strings.ToUpper(content)))
		return true
	}
	dir := filepath.Join(t.TempDir(), "m")
	w, code := h.pull(t, dir, "bge-m3")
	if code != ExitFailed || !strings.Contains(w.err.String(), "checksum") {
		t.Errorf("exit %d: %s", code, w.err.String())
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a damaged checkpoint was put in its place")
	}
	if h.asked["model.safetensors"] != 2 {
		t.Errorf("tried %d times", h.asked["model.safetensors"])
	}
}

func TestPullFaults(t *testing.T) {
	t.Parallel()
	h := newHub(t)
	if w, code := h.pull(t, filepath.Join(t.TempDir(), "m"), "bge-m3", "--revision", "nope"); code != ExitFailed || !strings.Contains(w.err.String(), "no such model") {
		t.Errorf("exit %d: %s", code, w.err.String())
	}
	h.files["../../evil.safetensors"] = "x"
	h.files["1_Pooling/../../config.json"] = "x"
	dir := filepath.Join(t.TempDir(), "m")
	if w, code := h.pull(t, dir, "bge-m3"); code != ExitOK {
		t.Errorf("names that are not wanted do not matter: exit %d: %s", code, w.err.String())
	}
	delete(h.files, "config.json")
	if w, code := h.pull(t, filepath.Join(t.TempDir(), "m"), "bge-m3"); code != ExitFailed || !strings.Contains(w.err.String(), "config.json") {
		t.Errorf("exit %d: %s", code, w.err.String())
	}
	h.fault = func(_ string, n int, w http.ResponseWriter, _ string) bool {
		if n < 3 {
			w.Header().Set("Retry-After", "2")
			w.WriteHeader(429)
			return true
		}
		return false
	}
	h.files["config.json"] = "{}"
	if w, code := h.pull(t, filepath.Join(t.TempDir(), "m"), "bge-m3"); code != ExitOK || len(w.slept) == 0 {
		t.Errorf("a busy hub: exit %d: %s", code, w.err.String())
	}
}
