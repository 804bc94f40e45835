package main

import (
	"bytes"
	"context"
	"log/slog"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/lockstep-db/lockstep/embedder/fake"
	"github.com/lockstep-db/lockstep/internal/app"
	"github.com/lockstep-db/lockstep/internal/config"
	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
)

// TestDocs runs the pages' examples against a whole Lockstep with a fake model of three heads.
func TestDocs(t *testing.T) {
	cfg := config.Default()
	cfg.Listen, cfg.DataDir, cfg.Scrub = "127.0.0.1:0", t.TempDir(), false
	cfg.DatabaseURL = config.Secret(pgtest.New(t))
	log := slog.New(slog.DiscardHandler)
	a, err := app.New(t.Context(), cfg, log, app.Options{
		Version: "test", Embedder: fake.New(32, corpus.Dense|corpus.SparseHead|corpus.ColBERT),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	defer func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}()
	var out bytes.Buffer
	pages, err := filepath.Glob("../../docs/search.md")
	if err != nil || len(pages) != 1 {
		t.Fatalf("pages %v, %v", pages, err)
	}
	args := append([]string{"-server", "http://" + a.Addr().String(), "-outputs", "sparse,colbert"}, pages...)
	for range 2 { // a page may be run again
		if err := run(t.Context(), args, &out); err != nil {
			t.Fatalf("%v\n%s", err, &out)
		}
	}
	if n := strings.Count(out.String(), "POST /search: 200"); n < 16 {
		t.Errorf("%d searches ran:\n%s", n, &out)
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	got, err := parse("text\n```http status=422 if=a,b\nPOST /x y\n{\n}\n```\n```json\n{}\n```\n```http\nGET /z\n```\n")
	want := []block{
		{line: 2, method: "POST", path: "/x y", body: "{\n}\n", status: 422, needs: []string{"a", "b"}},
		{line: 10, method: "GET", path: "/z"},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"```http\nPOST /x\n", "```http what=1\n```", "```http status=x\n```", "```http\nPOST\n```"} {
		if _, err := parse(bad); err == nil {
			t.Errorf("%q is no error", bad)
		}
	}
}
