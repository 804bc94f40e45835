package postgres_test

import (
	"context"
	"reflect"
	"slices"
	"sync"
	"testing"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/postgres"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
)

var denseLayout = corpus.Layout{Vectors: corpus.Dense, Dim: 4}

func TestMigrateTakesTurnsAndKeepsTheIdentity(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	url := pgtest.New(t)
	var wg sync.WaitGroup
	stores := make([]*postgres.Store, 4)
	for i := range stores {
		wg.Go(func() {
			s, err := postgres.Open(ctx, postgres.Config{URL: url}, discard())
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(s.Close)
			if _, err := s.Migrate(ctx); err != nil {
				t.Error(err)
			}
			stores[i] = s
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	first, err := stores[0].Installation(ctx)
	if err != nil || first.IsZero() {
		t.Fatalf("installation = %v, %v", first, err)
	}
	for _, s := range stores[1:] {
		if id, err := s.Installation(ctx); err != nil || id != first {
			t.Errorf("installation = %v, %v; want %v", id, err, first)
		}
	}
	if n, err := stores[1].Migrate(ctx); err != nil || n != 0 {
		t.Errorf("second migration applied %d, %v", n, err)
	}
}

func TestInstallationBeforeMigration(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s, err := postgres.Open(ctx, postgres.Config{URL: pgtest.New(t)}, discard())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Installation(ctx); corpus.CodeOf(err) != "not_migrated" {
		t.Errorf("err = %v, want not_migrated", err)
	}
}

func TestEnsureCollectionCreatesOnce(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := newStore(t)
	settings := corpus.Settings{Vectors: corpus.Dense, Chunking: corpus.Chunking{TargetTokens: 100, OverlapTokens: 10}, Fields: map[string]corpus.FieldType{"lang": corpus.Keyword}}

	if _, _, err := s.ResolveCollection(ctx, "books"); corpus.CodeOf(err) != "collection_not_found" {
		t.Fatalf("resolve before creation: %v", err)
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	creations := 0
	ids := map[corpus.ID]bool{}
	for range 8 {
		wg.Go(func() {
			c, ix, created, err := s.EnsureCollection(ctx, "books", settings, denseLayout, "m1")
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
				return
			}
			if created {
				creations++
			}
			ids[c.ID], ids[ix.ID] = true, true
		})
	}
	wg.Wait()
	if creations != 1 || len(ids) != 2 {
		t.Fatalf("%d creations, %d ids; want 1 and 2", creations, len(ids))
	}
	c, ix, err := s.ResolveCollection(ctx, "books")
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(c.Settings, settings) || !reflect.DeepEqual(ix.Layout, denseLayout) || ix.Fingerprint != "m1" ||
		ix.State != corpus.IndexServing || ix.Salt != ix.ID || ix.Collection != c.ID {
		t.Errorf("collection %+v, index %+v", c, ix)
	}
}

func TestDeletedCollectionsNameIsFreeWithANewID(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s := newStore(t)
	c1, ix1, _, err := s.EnsureCollection(ctx, "a", corpus.Settings{}, denseLayout, "m")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteCollection(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteCollection(ctx, "a"); corpus.CodeOf(err) != "collection_not_found" {
		t.Errorf("second deletion: %v", err)
	}
	c2, ix2, created, err := s.EnsureCollection(ctx, "a", corpus.Settings{}, denseLayout, "m")
	if err != nil || !created {
		t.Fatal(created, err)
	}
	if c1.ID == c2.ID || ix1.QdrantName == ix2.QdrantName {
		t.Error("a recreated collection shares an id with the deleted one")
	}
	retired, err := s.RetiredIndexes(ctx)
	if err != nil || len(retired) != 1 || retired[0].ID != ix1.ID {
		t.Fatalf("retired = %v, %v", retired, err)
	}
	// The collection's row waits for its index to be forgotten.
	if err := s.ClearCollections(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.ForgetIndex(ctx, ix1.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.ClearCollections(ctx); err != nil {
		t.Fatal(err)
	}
	if live, err := s.Indexes(ctx); err != nil || len(live) != 1 || live[0].ID != ix2.ID {
		t.Errorf("indexes = %v, %v", live, err)
	}
	if err := s.ForgetIndex(ctx, ix1.ID); err != nil {
		t.Fatal("again:", err)
	}
	// Forgotten but for its name.
	known, dropped, err := s.KnownQdrantNames(ctx, []string{ix1.QdrantName, ix2.QdrantName, "lockstep_other"})
	if err != nil || !slices.Equal(known, []string{ix2.QdrantName}) || !slices.Equal(dropped, []string{ix1.QdrantName}) {
		t.Errorf("known %v, dropped %v, %v", known, dropped, err)
	}
}
