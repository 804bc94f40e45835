package qdrantlocal

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// collectionsService answers Qdrant's Collections service.
type collectionsService struct {
	qdrant.UnimplementedCollectionsServer
	s *Server
}

func seconds(start time.Time) float64 { return time.Since(start).Seconds() }

func operationResult(ok bool, start time.Time) *qdrant.CollectionOperationResponse {
	return &qdrant.CollectionOperationResponse{Result: ok, Time: seconds(start)}
}

// Create makes a collection, on disk before it answers.
func (cs *collectionsService) Create(_ context.Context, req *qdrant.CreateCollection) (*qdrant.CollectionOperationResponse, error) {
	start, s, name := time.Now(), cs.s, req.GetCollectionName()
	if err := checkCollectionName(name, true); err != nil {
		return nil, err
	}
	spec, err := newSpec(req)
	if err != nil {
		return nil, err
	}
	s.metaMu.Lock()
	defer s.metaMu.Unlock()
	s.mu.RLock()
	_, exists := s.collections[name]
	_, alias := s.aliases[name]
	s.mu.RUnlock()
	if exists {
		return nil, status.Errorf(codes.AlreadyExists, "Wrong input: Collection `%s` already exists!", name)
	}
	if alias {
		return nil, invalidf("Wrong input: Can't create collection with name %s. Alias with the same name already exists", name)
	}
	c := newCollection(name, filepath.Join(s.dir, collectionsDir, newDirName()), spec)
	c.log, err = createStore(c.dir, s.opts.LogLimitBytes, s.opts.fsync, s.logger)
	if err != nil {
		return nil, err
	}
	entry, err := c.entry(name)
	if err == nil {
		err = s.saveCatalogue(func(cat *catalogue) { cat.Collections = append(cat.Collections, entry) })
	}
	if err != nil {
		return nil, errors.Join(err, c.log.close(), os.RemoveAll(c.dir))
	}
	s.mu.Lock()
	s.collections[name] = c
	s.mu.Unlock()
	return operationResult(true, start), nil
}

// Update changes the settings that have an effect here or are only shown: strict mode,
// HNSW and optimizer parameters, metadata.
func (cs *collectionsService) Update(_ context.Context, req *qdrant.UpdateCollection) (*qdrant.CollectionOperationResponse, error) {
	start, s := time.Now(), cs.s
	if req.Params != nil || req.VectorsConfig != nil || req.QuantizationConfig != nil || req.SparseVectorsConfig != nil {
		return nil, unimplemented("changing a collection's parameters, vectors or quantization")
	}
	s.metaMu.Lock()
	defer s.metaMu.Unlock()
	c, err := s.find(req.GetCollectionName())
	if err != nil {
		return nil, err
	}
	create := proto.CloneOf(c.spec.create)
	proto.Merge(create, &qdrant.CreateCollection{
		HnswConfig: req.HnswConfig, OptimizersConfig: req.OptimizersConfig, StrictModeConfig: req.StrictModeConfig,
	})
	for k, v := range req.GetMetadata() {
		if create.Metadata == nil {
			create.Metadata = map[string]*qdrant.Value{}
		}
		if isNull(v) {
			delete(create.Metadata, k)
		} else {
			create.Metadata[k] = v
		}
	}
	spec, err := newSpec(create)
	if err != nil {
		return nil, err
	}
	enc, err := proto.Marshal(create)
	if err != nil {
		return nil, err
	}
	err = s.saveCatalogue(func(cat *catalogue) {
		for i := range cat.Collections {
			if cat.Collections[i].Name == c.name {
				cat.Collections[i].Create = enc
			}
		}
	})
	if err != nil {
		return nil, err
	}
	c.writer.Lock()
	s.mu.Lock()
	c.mu.Lock()
	c.spec.create, c.spec.strict = create, spec.strict
	c.mu.Unlock()
	s.mu.Unlock()
	c.writer.Unlock()
	return operationResult(true, start), nil
}

// Delete removes a collection and its aliases. It is gone once its catalogue is; the files
// follow.
func (cs *collectionsService) Delete(_ context.Context, req *qdrant.DeleteCollection) (*qdrant.CollectionOperationResponse, error) {
	start, s, name := time.Now(), cs.s, req.GetCollectionName()
	if err := checkCollectionName(name, false); err != nil {
		return nil, err
	}
	s.metaMu.Lock()
	defer s.metaMu.Unlock()
	s.mu.RLock()
	c := s.collections[name]
	s.mu.RUnlock()
	if c == nil {
		return operationResult(false, start), nil
	}
	err := s.saveCatalogue(func(cat *catalogue) {
		cat.Collections = slices.DeleteFunc(cat.Collections, func(e catalogueEntry) bool { return e.Name == name })
		maps.DeleteFunc(cat.Aliases, func(_, to string) bool { return to == name })
	})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	delete(s.collections, name)
	maps.DeleteFunc(s.aliases, func(_, to string) bool { return to == name })
	s.mu.Unlock()
	// Calls that found the collection before may still write: they take the writer lock and
	// see that it is gone.
	c.writer.Lock()
	c.mu.Lock()
	c.dropped = true
	c.mu.Unlock()
	c.writer.Unlock()
	if err := errors.Join(c.log.discard(), os.RemoveAll(c.dir)); err != nil {
		s.logger.Warn("files of a deleted collection remain until the next start", slog.String("collection", name), slog.Any("err", err))
	}
	return operationResult(true, start), nil
}

// List names the collections in order.
func (cs *collectionsService) List(context.Context, *qdrant.ListCollectionsRequest) (*qdrant.ListCollectionsResponse, error) {
	start := time.Now()
	cs.s.mu.RLock()
	names := slices.Sorted(maps.Keys(cs.s.collections))
	cs.s.mu.RUnlock()
	out := &qdrant.ListCollectionsResponse{}
	for _, n := range names {
		out.Collections = append(out.Collections, &qdrant.CollectionDescription{Name: n})
	}
	out.Time = seconds(start)
	return out, nil
}

// CollectionExists follows aliases.
func (cs *collectionsService) CollectionExists(_ context.Context, req *qdrant.CollectionExistsRequest) (*qdrant.CollectionExistsResponse, error) {
	start := time.Now()
	if err := checkCollectionName(req.GetCollectionName(), false); err != nil {
		return nil, err
	}
	cs.s.mu.RLock()
	exists := cs.s.resolve(req.GetCollectionName()) != nil
	cs.s.mu.RUnlock()
	return &qdrant.CollectionExistsResponse{Result: &qdrant.CollectionExists{Exists: exists}, Time: seconds(start)}, nil
}

// Get describes a collection. Its counts are exact.
func (cs *collectionsService) Get(_ context.Context, req *qdrant.GetCollectionInfoRequest) (*qdrant.GetCollectionInfoResponse, error) {
	start := time.Now()
	if err := checkCollectionName(req.GetCollectionName(), false); err != nil {
		return nil, err
	}
	c, err := cs.s.find(req.GetCollectionName())
	if err != nil {
		return nil, err
	}
	cs.s.mu.RLock()
	indexes := maps.Clone(c.spec.indexes)
	cs.s.mu.RUnlock()
	c.mu.RLock()
	defer c.mu.RUnlock()
	schema := map[string]*qdrant.PayloadSchemaInfo{}
	for key, col := range c.columns {
		info := &qdrant.PayloadSchemaInfo{DataType: col.schemaType(), Points: proto.Uint64(uint64(col.points))}
		if idx := indexes[key]; idx != nil {
			info.Params = proto.CloneOf(idx.GetFieldIndexParams())
		}
		schema[key] = info
	}
	n := uint64(c.ids.Len())
	return &qdrant.GetCollectionInfoResponse{
		Result: &qdrant.CollectionInfo{
			Status:              qdrant.CollectionStatus_Green,
			OptimizerStatus:     &qdrant.OptimizerStatus{Ok: true},
			SegmentsCount:       1,
			Config:              c.spec.config(),
			PayloadSchema:       schema,
			PointsCount:         proto.Uint64(n),
			IndexedVectorsCount: proto.Uint64(0),
		},
		Time: seconds(start),
	}, nil
}

// UpdateAliases applies its actions one after another, all or none.
func (cs *collectionsService) UpdateAliases(_ context.Context, req *qdrant.ChangeAliases) (*qdrant.CollectionOperationResponse, error) {
	start, s := time.Now(), cs.s
	s.metaMu.Lock()
	defer s.metaMu.Unlock()
	s.mu.RLock()
	aliases := maps.Clone(s.aliases)
	known := maps.Clone(s.collections)
	s.mu.RUnlock()
	for _, a := range req.GetActions() {
		switch k := a.GetAction().(type) {
		case *qdrant.AliasOperations_CreateAlias:
			name, alias := k.CreateAlias.GetCollectionName(), k.CreateAlias.GetAliasName()
			if known[name] == nil {
				return nil, status.Errorf(codes.NotFound, "Not found: Collection `%s` doesn't exist!", name)
			}
			if known[alias] != nil {
				return nil, status.Errorf(codes.AlreadyExists, "Wrong input: Collection `%s` already exists!", alias)
			}
			if err := checkCollectionName(alias, false); err != nil {
				return nil, err
			}
			aliases[alias] = name
		case *qdrant.AliasOperations_DeleteAlias:
			delete(aliases, k.DeleteAlias.GetAliasName())
		case *qdrant.AliasOperations_RenameAlias:
			from, to := k.RenameAlias.GetOldAliasName(), k.RenameAlias.GetNewAliasName()
			name, ok := aliases[from]
			if !ok {
				return nil, status.Errorf(codes.NotFound, "Not found: Alias %s does not exists!", from)
			}
			if err := checkCollectionName(to, false); err != nil {
				return nil, err
			}
			delete(aliases, from)
			aliases[to] = name
		default:
			return nil, invalid("Malformed AliasOperation type")
		}
	}
	if err := s.saveCatalogue(func(cat *catalogue) { cat.Aliases = aliases }); err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.aliases = aliases
	s.mu.Unlock()
	return operationResult(true, start), nil
}

// ListAliases names every alias in order.
func (cs *collectionsService) ListAliases(context.Context, *qdrant.ListAliasesRequest) (*qdrant.ListAliasesResponse, error) {
	return cs.listAliases(func(string) bool { return true }), nil
}

// ListCollectionAliases names the aliases of one collection.
func (cs *collectionsService) ListCollectionAliases(_ context.Context, req *qdrant.ListCollectionAliasesRequest) (*qdrant.ListAliasesResponse, error) {
	c, err := cs.s.find(req.GetCollectionName())
	if err != nil {
		return nil, err
	}
	return cs.listAliases(func(name string) bool { return name == c.name }), nil
}

func (cs *collectionsService) listAliases(want func(collection string) bool) *qdrant.ListAliasesResponse {
	start := time.Now()
	out := &qdrant.ListAliasesResponse{}
	cs.s.mu.RLock()
	defer cs.s.mu.RUnlock()
	for _, a := range slices.Sorted(maps.Keys(cs.s.aliases)) {
		if want(cs.s.aliases[a]) {
			out.Aliases = append(out.Aliases, &qdrant.AliasDescription{AliasName: a, CollectionName: cs.s.aliases[a]})
		}
	}
	out.Time = seconds(start)
	return out
}
