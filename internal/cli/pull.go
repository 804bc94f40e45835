package cli

import (
	"context"
	"crypto/sha1" //nolint:gosec // the hub names small files by git's blob hash, which is SHA-1
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/lockstep-db/lockstep/internal/config/cachedir"
)

// DefaultHub is where checkpoints are fetched from unless LOCKSTEP_HUB_URL names a mirror.
const DefaultHub = "https://huggingface.co"

// knownModels are the short names of `lockstep serve --model` and what they stand for.
var knownModels = map[string]string{
	"minilm": "sentence-transformers/all-MiniLM-L6-v2",
	"bge-m3": "BAAI/bge-m3",
}

// ModelPull is `lockstep model pull`.
func ModelPull(ctx context.Context, e *Env) int {
	set := e.flags("model pull", "[flags] minilm|bge-m3|OWNER/NAME",
		"Fetches a checkpoint into the cache, file by file: an interrupted fetch goes on where it\nended, and every file is held against the checksum that the hub publishes for it.\n$LOCKSTEP_HUB_URL names a mirror of the hub, $HF_TOKEN a token for it.")
	revision := set.String("revision", "main", "branch, tag or commit")
	dir := set.String("dir", "", "folder to write (default: the cache)")
	cacheDir := set.String("cache-dir", e.Getenv("LOCKSTEP_CACHE_DIR"), "folder of the cache")
	quiet := set.Bool("quiet", false, "draw no progress")
	operands, code, ok := e.parse(set)
	if !ok {
		return code
	}
	if len(operands) != 1 {
		return e.usage("model pull", "name one model: minilm, bge-m3 or OWNER/NAME")
	}
	name := operands[0]
	repo, known := knownModels[name]
	if !known {
		repo = name
		if !repoName.MatchString(repo) {
			return e.usage("model pull", "%q is neither minilm, bge-m3 nor OWNER/NAME", name)
		}
	}
	if *dir == "" {
		cache := cachedir.Layout{Root: *cacheDir}
		if *cacheDir == "" {
			var err error
			if cache, err = cachedir.Default(e.Getenv); err != nil {
				return e.usage("model pull", "%s", err)
			}
		}
		switch {
		case name == "minilm":
			*dir = cache.MiniLM()
		case known:
			*dir = cache.Checkpoint(name)
		default:
			*dir = cache.Checkpoint(strings.ReplaceAll(repo, "/", "--"))
		}
	}
	hub := e.Getenv("LOCKSTEP_HUB_URL")
	if hub == "" {
		hub = DefaultHub
	}
	base, err := url.Parse(hub)
	if err != nil || (base.Scheme != "http" && base.Scheme != "https") || base.Host == "" {
		return e.usage("model pull", "LOCKSTEP_HUB_URL is not a URL such as %s", DefaultHub)
	}
	p := &pull{e: e, base: base, repo: repo, revision: *revision, token: e.Getenv("HF_TOKEN"), dir: *dir, bar: e.progress(*quiet), http: &http.Client{}}
	defer p.http.CloseIdleConnections()
	err = p.run(ctx)
	p.bar.clear()
	if err != nil {
		return e.failure(ctx, "model pull", err)
	}
	model := *dir
	if known {
		model = name
	}
	e.printf("%s is in %s\nServe it with: lockstep serve --model %s\n", repo, *dir, model)
	return ExitOK
}

var repoName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$`)

// wantedFile says which files of a repository a model is built from. Exports to other run
// times, which many repositories carry beside, are large and of no use here.
func wantedFile(name string, safetensors bool) bool {
	switch name {
	case "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
		"sentencepiece.bpe.model", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
		"sparse_linear.pt", "colbert_linear.pt", "model.safetensors.index.json", "README.md":
		return true
	case "pytorch_model.bin", "pytorch_model.bin.index.json":
		return !safetensors
	}
	dir, base := path.Split(name)
	if dir == "" {
		shard := strings.HasPrefix(base, "pytorch_model-") && strings.HasSuffix(base, ".bin")
		return strings.HasSuffix(base, ".safetensors") || shard && !safetensors
	}
	// Modules of sentence-transformers: 1_Pooling/config.json, 2_Dense/model.safetensors.
	return moduleDir.MatchString(dir) && (base == "config.json" || base == "model.safetensors" || base == "pytorch_model.bin" && !safetensors)
}

var moduleDir = regexp.MustCompile(`^[0-9]+_[A-Za-z]+/$`)

type hubFile struct {
	Name string `json:"rfilename"`
	Size int64  `json:"size"`
	// BlobID is git's hash of a file that lies in the repository itself.
	BlobID string `json:"blobId"`
	LFS    *struct {
		SHA256 string `json:"sha256"`
		Size   int64  `json:"size"`
	} `json:"lfs"`
}

type pull struct {
	e                     *Env
	base                  *url.URL
	http                  *http.Client
	repo, revision, token string
	dir                   string
	bar                   *progress
	// total of the wanted files, and of those that are there.
	total, before int64
}

// maxListing bounds the hub's description of a repository.
const maxListing = 16 << 20

// run fetches into a folder beside the final one, which is renamed when all is there and
// verified: a checkpoint folder is complete or does not exist.
func (p *pull) run(ctx context.Context) error {
	if _, err := os.Stat(p.dir); err == nil {
		if _, err := os.Stat(filepath.Join(p.dir, "config.json")); err == nil {
			p.e.warnf("%s is there already; remove it to fetch it again", p.dir)
			return nil
		}
	}
	var listing struct {
		SHA      string    `json:"sha"`
		Siblings []hubFile `json:"siblings"`
	}
	err := p.e.patiently(ctx, 5, func() error {
		return p.getJSON(ctx, "/api/models/"+p.repo+"/revision/"+url.PathEscape(p.revision)+"?blobs=true", &listing)
	})
	if err != nil {
		return fmt.Errorf("list the files of %s: %w", p.repo, err)
	}
	safetensors := slices.ContainsFunc(listing.Siblings, func(f hubFile) bool {
		return !strings.Contains(f.Name, "/") && strings.HasSuffix(f.Name, ".safetensors")
	})
	var files []hubFile
	for _, f := range listing.Siblings {
		if !wantedFile(f.Name, safetensors) {
			continue
		}
		if !filepath.IsLocal(filepath.FromSlash(f.Name)) {
			return fmt.Errorf("the hub names a file outside of the checkpoint: %q", f.Name)
		}
		files = append(files, f)
		p.total += f.size()
	}
	if !slices.ContainsFunc(files, func(f hubFile) bool { return f.Name == "config.json" }) {
		return fmt.Errorf("%s has no config.json: it is not a checkpoint that Lockstep can build from", p.repo)
	}
	commit := listing.SHA
	if commit == "" {
		commit = p.revision
	}
	part := p.dir + ".partial"
	for _, f := range files {
		if err := p.fetch(ctx, commit, f, part); err != nil {
			return fmt.Errorf("fetch %s: %w", f.Name, err)
		}
		p.before += f.size()
	}
	if err := os.Rename(part, p.dir); err != nil {
		return fmt.Errorf("put the checkpoint in its place: %w", err)
	}
	return nil
}

func (f *hubFile) size() int64 {
	if f.LFS != nil && f.LFS.Size > 0 {
		return f.LFS.Size
	}
	return f.Size
}

// checksum returns the hash that the hub publishes for the file, ready to be fed, and the
// expected sum in hex.
func (f *hubFile) checksum() (hash.Hash, string, error) {
	switch {
	case f.LFS != nil && len(f.LFS.SHA256) == 2*sha256.Size:
		return sha256.New(), f.LFS.SHA256, nil
	case len(f.BlobID) == 2*sha1.Size:
		h := sha1.New() //nolint:gosec // see the import
		fmt.Fprintf(h, "blob %d\x00", f.Size)
		return h, f.BlobID, nil
	}
	return nil, "", errors.New("the hub publishes no checksum for it")
}

func (p *pull) getJSON(ctx context.Context, target string, out any) error {
	res, err := p.get(ctx, target, 0)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(res.Body, maxListing))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return &APIError{Status: http.StatusUnprocessableEntity, Detail: p.base.Redacted() + " does not answer as a model hub does"}
	}
	return nil
}

func (p *pull) get(ctx context.Context, target string, from int64) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(p.base.String(), "/")+target, nil)
	if err != nil {
		return nil, err
	}
	if p.token != "" {
		req.Header.Set("Authorization", "Bearer "+p.token) // net/http drops it when another host is redirected to
	}
	// Compressed bytes could not be resumed.
	req.Header.Set("Accept-Encoding", "identity")
	if from > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", from))
	}
	res, err := p.http.Do(req)
	if err != nil {
		return nil, err
	}
	if res.StatusCode/100 == 2 || from > 0 && res.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		return res, nil
	}
	defer res.Body.Close()
	e := readAPIError(res)
	switch res.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		e.Detail = "the hub refuses access; set HF_TOKEN to a token that may read the model"
	case http.StatusNotFound:
		e.Detail = "the hub has no such model, revision or file"
	}
	return nil, e
}

// fetch brings one file into dir, going on where an earlier attempt ended.
func (p *pull) fetch(ctx context.Context, commit string, f hubFile, dir string) error {
	dst := filepath.Join(dir, filepath.FromSlash(f.Name))
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	if err := verify(dst, f); err == nil {
		return nil
	}
	target := "/" + p.repo + "/resolve/" + url.PathEscape(commit) + "/" + (&url.URL{Path: f.Name}).EscapedPath()
	for attempt := 1; ; attempt++ {
		err := p.e.patiently(ctx, 8, func() error { return p.download(ctx, target, f, dst) })
		if err != nil {
			return err
		}
		err = verify(dst, f)
		if err == nil {
			return nil
		}
		// What is there does not fit: not worth going on from.
		if rerr := os.Remove(dst); rerr != nil {
			return rerr
		}
		if attempt == 2 {
			return err
		}
	}
}

func (p *pull) download(ctx context.Context, target string, f hubFile, dst string) (err error) {
	file, err := os.OpenFile(dst, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	have, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if size := f.size(); have >= size && size > 0 {
		if have == size {
			return nil // verified by the caller
		}
		have = 0
	}
	res, err := p.get(ctx, target, have)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusPartialContent {
		have = 0 // the hub sends it from the start
	}
	if err := file.Truncate(have); err != nil {
		return err
	}
	if _, err := file.Seek(have, io.SeekStart); err != nil {
		return err
	}
	if res.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		return errors.New("the hub's file has another size now")
	}
	buf := make([]byte, 1<<20)
	limit := f.size() + 1
	for {
		n, rerr := res.Body.Read(buf)
		if n > 0 {
			have += int64(n)
			if f.size() > 0 && have >= limit {
				return nil // too long: verify refuses it
			}
			if _, err := file.Write(buf[:n]); err != nil {
				return err
			}
			p.bar.show(float64(p.before+have), float64(p.total), fmt.Sprintf("%s (%s of %s)", f.Name, mebi(p.before+have), mebi(p.total)))
		}
		if errors.Is(rerr, io.EOF) {
			return nil
		}
		if rerr != nil {
			return rerr
		}
	}
}

func mebi(n int64) string { return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20)) }

// verify holds a file against the hub's size and checksum.
func verify(name string, f hubFile) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	h, want, err := f.checksum()
	if err != nil {
		return err
	}
	n, err := io.Copy(h, file)
	if err != nil {
		return err
	}
	if n != f.size() {
		return fmt.Errorf("has %d bytes, not %d", n, f.size())
	}
	if got := hex.EncodeToString(h.Sum(nil)); !strings.EqualFold(got, want) {
		return fmt.Errorf("its checksum is %s, not %s", got, want)
	}
	return nil
}
