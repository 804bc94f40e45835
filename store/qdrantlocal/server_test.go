package qdrantlocal

import (
	"context"
	"net"
	"testing"

	"github.com/qdrant/go-client/qdrant"
	"go.uber.org/goleak"

	"github.com/lockstep-db/lockstep/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// open starts a server on dir that ends with the test.
func open(t testing.TB, dir string, opts Options) *Server {
	t.Helper()
	s, err := Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	return s
}

// serve serves s on a free port of this machine until the test ends.
func serve(t testing.TB, s *Server) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("closing the server: %v", err)
		}
		if err := <-done; err != nil {
			t.Errorf("serving: %v", err)
		}
	})
	return l.Addr().String()
}

// dial serves s and returns a client of it.
func dial(t testing.TB, s *Server) *qdrant.Client {
	t.Helper()
	return storetest.Dial(t, serve(t, s))
}

func TestSmoke(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	dir := t.TempDir()
	s := open(t, dir, Options{})
	c := dial(t, s)
	if err := c.CreateCollection(ctx, &qdrant.CreateCollection{
		CollectionName: "a",
		VectorsConfig:  qdrant.NewVectorsConfig(&qdrant.VectorParams{Size: 4, Distance: qdrant.Distance_Cosine}),
	}); err != nil {
		t.Fatal(err)
	}
	r, err := c.Upsert(ctx, &qdrant.UpsertPoints{
		CollectionName: "a", Wait: qdrant.PtrOf(true),
		Points: []*qdrant.PointStruct{
			{Id: qdrant.NewIDNum(1), Vectors: qdrant.NewVectors(1, 0, 0, 0), Payload: qdrant.NewValueMap(map[string]any{"a": 1})},
			{Id: qdrant.NewIDNum(2), Vectors: qdrant.NewVectors(0, 2, 0, 0), Payload: qdrant.NewValueMap(map[string]any{"a": 2})},
		},
	})
	if err != nil || r.GetStatus() != qdrant.UpdateStatus_Completed {
		t.Fatal(r, err)
	}
	hits, err := c.Query(ctx, &qdrant.QueryPoints{CollectionName: "a", Query: qdrant.NewQuery(0, 1, 0, 0), WithPayload: qdrant.NewWithPayload(true)})
	if err != nil || len(hits) != 2 || hits[0].GetId().GetNum() != 2 || hits[0].GetScore() != 1 {
		t.Fatal(hits, err)
	}
}
