package ingest

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/lockstep-db/lockstep/ingest/chunk"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

// names remembers looked-up collections for a moment. A stale answer is harmless: the ledger
// refuses documents for a collection that was deleted, and the name is looked up again.
type names struct {
	ledger Catalogue
	mu     sync.Mutex
	byName map[string]remembered
}

type remembered struct {
	t     *target
	until time.Time
}

const (
	// nameTTL bounds how long another instance's index switch goes unnoticed here, which costs
	// a detour through the queue and nothing else (unmeasured).
	nameTTL = 2 * time.Second
	// maxNames bounds the memory of a service with very many collections.
	maxNames = 10_000
)

func newNames(l Catalogue) *names { return &names{ledger: l, byName: map[string]remembered{}} }

func (n *names) get(name string) *target {
	n.mu.Lock()
	defer n.mu.Unlock()
	if r, ok := n.byName[name]; ok && time.Now().Before(r.until) {
		return r.t
	}
	return nil
}

func (n *names) put(t *target) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.byName) >= maxNames {
		clear(n.byName)
	}
	n.byName[t.Name] = remembered{t, time.Now().Add(nameTTL)}
}

func (n *names) forget(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.byName, name)
}

// maxName is the longest name of a collection, in bytes.
const maxName = 255

// checkName accepts what reads the same everywhere: no control characters, no slash (names are
// part of paths), no white space at the ends.
func checkName(name string) error {
	switch {
	case name == "":
		return fault("invalid_name", "/collection", "the collection has no name")
	case len(name) > maxName:
		return fault("invalid_name", "/collection", "the collection's name has %d bytes; at most %d are allowed", len(name), maxName)
	case textFault(name) != "":
		return fault("invalid_name", "/collection", "%s", textFault(name))
	case strings.TrimSpace(name) != name || strings.ContainsFunc(name, func(r rune) bool { return r == '/' || unicode.IsControl(r) }):
		return fault("invalid_name", "/collection", "the collection's name must not contain slashes or control characters, nor begin or end with white space")
	}
	return nil
}

// resolve looks a collection up; NotFound collection_not_found.
func (s *Service) resolve(ctx context.Context, name string) (*target, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if t := s.names.get(name); t != nil {
		return t, nil
	}
	c, ix, err := s.cfg.Ledger.ResolveCollection(ctx, name)
	if err != nil {
		return nil, err
	}
	t := &target{c, ix}
	s.names.put(t)
	return t, nil
}

// within runs do for a collection. Where do finds nothing, the name may stand for another
// collection by now: then do runs once more.
func (s *Service) within(ctx context.Context, name string, do func(t *target) error) (*target, error) {
	t, err := s.resolve(ctx, name)
	if err != nil {
		return nil, err
	}
	if err = do(t); corpus.KindOf(err) != corpus.NotFound {
		return t, err
	}
	s.names.forget(name)
	again, rerr := s.resolve(ctx, name)
	if rerr != nil {
		return nil, rerr
	}
	if again.ID == t.ID {
		return t, err
	}
	return again, do(again)
}

// ensure looks a collection up, or creates it with the default settings on its first use.
func (s *Service) ensure(ctx context.Context, name string) (*target, error) {
	t, err := s.resolve(ctx, name)
	if corpus.CodeOf(err) != "collection_not_found" {
		return t, err
	}
	t, _, err = s.create(ctx, name, corpus.Settings{})
	return t, err
}

func (s *Service) create(ctx context.Context, name string, in corpus.Settings) (*target, bool, error) {
	settings, layout, fingerprint, err := s.complete(in)
	if err != nil {
		return nil, false, err
	}
	c, ix, created, err := s.cfg.Ledger.EnsureCollection(ctx, name, settings, layout, fingerprint)
	if err != nil {
		return nil, false, err
	}
	t := &target{c, ix}
	s.names.put(t)
	if created {
		// Not needed for acceptance: where the index is down, upkeep creates it later.
		if err := s.bringUp(ctx, ix); err != nil {
			s.log.WarnContext(ctx, "creating the index of a new collection; it will be tried again", "err", err)
			signal(s.upkeepNow)
		}
	}
	return t, created, nil
}

// complete validates settings, fills in defaults and derives the index's layout.
func (s *Service) complete(in corpus.Settings) (corpus.Settings, corpus.Layout, string, error) {
	spec := s.cfg.Embedder.Spec()
	bad := func(pointer, format string, args ...any) (corpus.Settings, corpus.Layout, string, error) {
		return in, corpus.Layout{}, "", fault("invalid_settings", pointer, format, args...)
	}
	layout := corpus.Layout{Quantization: in.Quantization, OnDisk: in.OnDisk, DenseType: in.DenseType, Fields: in.Fields}
	fingerprint := spec.Fingerprint
	switch in.Model {
	case corpus.ExternalModel:
		fingerprint = corpus.ExternalModel
		if in.Vectors == 0 {
			in.Vectors = corpus.Dense
		}
		if needs := in.Vectors.Has(corpus.Dense) || in.Vectors.Has(corpus.ColBERT); needs && (in.DenseSize < 1 || in.DenseSize > maxDim) {
			return bad("/dense/size", "an external collection needs the size of its vectors, from 1 to %d", maxDim)
		}
		layout.Dim, layout.ColBERTDim = in.DenseSize, in.DenseSize
		in.Chunking = corpus.Chunking{}
	case "":
		if in.DenseSize != 0 && in.DenseSize != spec.Dim {
			return bad("/dense/size", "the model %s makes vectors of %d values, not %d", spec.Name, spec.Dim, in.DenseSize)
		}
		in.DenseSize = 0
		if in.Vectors == 0 {
			in.Vectors = spec.Heads &^ corpus.ColBERT // a row a token is asked for, not assumed
		}
		if missing := in.Vectors &^ spec.Heads; missing != 0 {
			return bad("/vectors", "the model %s has no %s head", spec.Name, missing)
		}
		layout.Dim, layout.ColBERTDim = spec.Dim, spec.ColBERTDim
		most := spec.MaxTokens
		if in.Vectors.Has(corpus.ColBERT) && spec.ColBERTDim > 0 {
			most = min(most, corpus.MaxColBERTValues/spec.ColBERTDim)
		}
		if in.Chunking.TargetTokens == 0 {
			overlap := in.Chunking.OverlapTokens
			if in.Chunking = s.cfg.Chunking; in.Chunking.TargetTokens == 0 {
				in.Chunking = chunk.Default(most)
			}
			in.Chunking.TargetTokens = min(in.Chunking.TargetTokens, most)
			if overlap != 0 {
				in.Chunking.OverlapTokens = overlap
			}
		}
		if fe := chunk.Check(in.Chunking, most); fe != nil {
			return bad("/chunking"+fe.Pointer, "%s", fe.Detail)
		}
	default:
		return bad("/model", "model must be left out for the service's own, or be %q", corpus.ExternalModel)
	}
	if !in.Vectors.Has(corpus.Dense) {
		return bad("/vectors", "a collection needs the dense vector")
	}
	if !in.Vectors.Has(corpus.ColBERT) {
		layout.ColBERTDim = 0
	}
	layout.Vectors = in.Vectors
	switch in.Quantization {
	case "", "scalar", "binary":
	default:
		return bad("/quantization", "quantization must be scalar or binary, or be left out")
	}
	switch in.DenseType {
	case "", "float16":
	default:
		return bad("/dense_type", "dense_type must be float16, or be left out for float32")
	}
	if len(in.Fields) > maxFields {
		return bad("/fields", "%d filterable fields are declared; at most %d are allowed", len(in.Fields), maxFields)
	}
	for path, kind := range in.Fields {
		if path == "" || len(path) > corpus.MaxExternalID || textFault(path) != "" {
			return bad("/fields", "a field's path must have 1 to %d bytes of text", corpus.MaxExternalID)
		}
		switch kind {
		case corpus.Keyword, corpus.Integer, corpus.Float, corpus.Boolean, corpus.Datetime, corpus.FullText:
		default:
			return bad("/fields", "field %q has the unknown type %q", path, kind)
		}
	}
	return in, layout, fingerprint, nil
}

const (
	// maxDim is the longest dense vector Qdrant stores.
	maxDim = 65_536
	// maxFields bounds the payload indexes of one collection (unmeasured).
	maxFields = 256
)

// CreateCollection creates a collection. One that exists with the same settings is returned as
// it is; with others the error is a Conflict (collection_exists).
func (s *Service) CreateCollection(ctx context.Context, name string, settings corpus.Settings) (corpus.CollectionView, error) {
	if err := checkName(name); err != nil {
		return corpus.CollectionView{}, err
	}
	t, created, err := s.create(ctx, name, settings)
	if err != nil {
		return corpus.CollectionView{}, err
	}
	if !created {
		want, _, _, err := s.complete(settings)
		if err != nil {
			return corpus.CollectionView{}, err
		}
		if !equalJSON(want, t.Settings) {
			return corpus.CollectionView{}, corpus.Errorf(corpus.Conflict, "collection_exists", "the collection %q exists with other settings", name)
		}
	}
	return s.cfg.Ledger.CollectionView(ctx, name)
}

// equalJSON compares values as the ledger stores them: an empty map and none are equal.
func equalJSON(a, b any) bool {
	x, err1 := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err1 == nil && err2 == nil && bytes.Equal(x, y)
}

// Collection inspects a collection; NotFound collection_not_found.
func (s *Service) Collection(ctx context.Context, name string) (corpus.CollectionView, error) {
	if err := checkName(name); err != nil {
		return corpus.CollectionView{}, err
	}
	return s.cfg.Ledger.CollectionView(ctx, name)
}

// Collections lists all collections by name.
func (s *Service) Collections(ctx context.Context) ([]corpus.CollectionView, error) {
	return s.cfg.Ledger.Collections(ctx)
}

// DeleteCollection makes a collection and its documents invisible at once; its points and rows
// are removed afterwards. The name is free. NotFound collection_not_found.
func (s *Service) DeleteCollection(ctx context.Context, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	err := s.cfg.Ledger.DeleteCollection(ctx, name)
	s.names.forget(name)
	if err == nil {
		signal(s.upkeepNow)
	}
	return err
}

// Reembed starts building a second index of a collection with the service's present model.
// It serves once it holds everything; until then the old one does. Conflict index_building
// when one is being built, or index_current when the model is the one that serves.
func (s *Service) Reembed(ctx context.Context, name string) (corpus.Index, error) {
	s.names.forget(name)
	t, err := s.resolve(ctx, name)
	if err != nil {
		return corpus.Index{}, err
	}
	if t.external() {
		return corpus.Index{}, corpus.Errorf(corpus.Conflict, "external_collection", "collection %q takes only vectors its callers bring", name)
	}
	wanted := t.Settings
	_, layout, fingerprint, err := s.complete(wanted)
	if err != nil {
		return corpus.Index{}, err
	}
	if fingerprint == t.Index.Fingerprint && equalJSON(layout, t.Index.Layout) {
		return corpus.Index{}, corpus.Errorf(corpus.Conflict, "index_current", "collection %q is served by this model already", name)
	}
	ix, err := s.cfg.Ledger.BuildIndex(ctx, t.ID, fingerprint, layout)
	if err != nil {
		return corpus.Index{}, err
	}
	signal(s.upkeepNow)
	return ix, nil
}
