package qdrantlocal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/uuid"
	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/protobuf/proto"
)

// The catalogue says which collections there are. It is one small file, replaced as a whole
// with every change; a collection exists from the moment its catalogue is on disk.
const (
	catalogueFile   = "catalogue"
	collectionsDir  = "collections"
	catalogueFormat = "lockstep-qdrantlocal 1 %08x\n"
)

type catalogue struct {
	Collections []catalogueEntry  `json:"collections"`
	Aliases     map[string]string `json:"aliases,omitempty"`
}

type catalogueEntry struct {
	Name string `json:"name"`
	// Dir is the directory below collections.
	Dir string `json:"dir"`
	// Create is the encoded CreateCollection request.
	Create []byte `json:"create"`
	// Indexes are encoded CreateFieldIndexCollection requests, by field.
	Indexes map[string][]byte `json:"indexes,omitempty"`
}

// load reads the catalogue and every collection. Directories that no catalogue names are
// what an interrupted creation or deletion left; they are removed.
func (s *Server) load() error {
	var cat catalogue
	path := filepath.Join(s.dir, catalogueFile)
	raw, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		entries, err := os.ReadDir(filepath.Join(s.dir, collectionsDir))
		if err != nil {
			return err
		}
		if len(entries) > 0 {
			return &CorruptionError{File: path, Reason: "the file is missing while there are collections"}
		}
		if err := s.saveCatalogue(func(*catalogue) {}); err != nil {
			return err
		}
	case err != nil:
		return err
	default:
		if err := decodeCatalogue(raw, &cat); err != nil {
			return &CorruptionError{File: path, Reason: err.Error()}
		}
	}
	known := map[string]bool{}
	for _, e := range cat.Collections {
		known[e.Dir] = true
		c, err := s.loadCollection(e)
		if err != nil {
			return fmt.Errorf("collection %s: %w", e.Name, err)
		}
		s.collections[e.Name] = c
	}
	for alias, name := range cat.Aliases {
		s.aliases[alias] = name
	}
	return s.sweep(known)
}

func (s *Server) loadCollection(e catalogueEntry) (*collection, error) {
	var req qdrant.CreateCollection
	if err := proto.Unmarshal(e.Create, &req); err != nil {
		return nil, err
	}
	spec, err := newSpec(&req)
	if err != nil {
		return nil, err
	}
	c := newCollection(e.Name, filepath.Join(s.dir, collectionsDir, e.Dir), spec)
	for field, enc := range e.Indexes {
		var idx qdrant.CreateFieldIndexCollection
		if err := proto.Unmarshal(enc, &idx); err != nil {
			return nil, err
		}
		col, err := columnOf(&idx)
		if err != nil {
			return nil, err
		}
		c.columns[field] = col
		spec.indexes[field] = &idx
	}
	c.log, err = loadStore(c, s.opts.LogLimitBytes, s.opts.fsync, s.logger)
	return c, err
}

// sweep removes collection directories other than the known ones.
func (s *Server) sweep(known map[string]bool) error {
	dir := filepath.Join(s.dir, collectionsDir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !known[e.Name()] {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// saveCatalogue writes the catalogue as it would be with change applied. The caller holds
// metaMu; change gets the catalogue of the current state.
func (s *Server) saveCatalogue(change func(*catalogue)) error {
	cat := catalogue{Aliases: map[string]string{}}
	s.mu.RLock()
	for name, c := range s.collections {
		e, err := c.entry(name)
		if err != nil {
			s.mu.RUnlock()
			return err
		}
		cat.Collections = append(cat.Collections, e)
	}
	for a, n := range s.aliases {
		cat.Aliases[a] = n
	}
	s.mu.RUnlock()
	change(&cat)
	raw, err := encodeCatalogue(&cat)
	if err != nil {
		return err
	}
	return replaceFile(filepath.Join(s.dir, catalogueFile), raw, s.opts.fsync)
}

func (c *collection) entry(name string) (catalogueEntry, error) {
	e := catalogueEntry{Name: name, Dir: filepath.Base(c.dir), Indexes: map[string][]byte{}}
	var err error
	if e.Create, err = proto.Marshal(c.spec.create); err != nil {
		return e, err
	}
	for f, idx := range c.spec.indexes {
		if e.Indexes[f], err = proto.Marshal(idx); err != nil {
			return e, err
		}
	}
	return e, nil
}

func encodeCatalogue(cat *catalogue) ([]byte, error) {
	body, err := json.MarshalIndent(cat, "", " ")
	if err != nil {
		return nil, err
	}
	return append(fmt.Appendf(nil, catalogueFormat, crc32.Checksum(body, castagnoli)), body...), nil
}

func decodeCatalogue(raw []byte, cat *catalogue) error {
	line, body, _ := bytes.Cut(raw, []byte("\n"))
	if want := fmt.Appendf(nil, catalogueFormat, crc32.Checksum(body, castagnoli)); !bytes.Equal(append(line, '\n'), want) {
		return errors.New("its first line does not fit its contents")
	}
	return json.Unmarshal(body, cat)
}

// replaceFile puts content in the place of path, so that a crash leaves the old or the new.
func replaceFile(path string, content []byte, fsync func(*os.File) error) error {
	f, err := os.OpenFile(path+tempSuffix, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = fsync(f)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+tempSuffix, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path), fsync)
}

func newDirName() string { return uuid.NewString() }
