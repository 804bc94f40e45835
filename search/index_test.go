package search

import (
	"context"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/qdrant"
	"github.com/lockstep-db/lockstep/store/qdranttest"
)

// indexes returns the servers that the exactness tests run against: the embedded one always,
// a real one where there is one.
func indexes(t *testing.T) map[string]*qdrant.Client {
	t.Helper()
	urls := map[string]string{"embedded": "http://" + qdranttest.Embedded(t)}
	if addr := qdranttest.Real(t); addr != "" {
		urls["server"] = "http://" + addr
	}
	out := map[string]*qdrant.Client{}
	for name, url := range urls {
		c, err := qdrant.Open(t.Context(), qdrant.Config{URL: url, APIKey: os.Getenv("QDRANT_API_KEY"), Registerer: prometheus.NewRegistry()})
		if err != nil {
			t.Fatal(err)
		}
		c.SetOwner(corpus.ID{0xaa})
		t.Cleanup(func() {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
		out[name] = c
	}
	return out
}

// realIndex is a world whose points lie in a server.
type realIndex struct {
	*world
	client *qdrant.Client
}

func (r realIndex) QueryBatch(ctx context.Context, ix corpus.Index, q []corpus.IndexQuery) ([][]corpus.Candidate, error) {
	return r.client.QueryBatch(ctx, ix, q)
}

func (r realIndex) ReadPoints(ctx context.Context, ix corpus.Index, ids []corpus.ID, v bool) ([]corpus.PointState, error) {
	return r.client.ReadPoints(ctx, ix, ids, v)
}

// fill creates the world's index on a server and writes all of its points, junk included.
func (w *world) fill(t *testing.T, c *qdrant.Client, r *rand.Rand) {
	t.Helper()
	for i := range w.ix.ID {
		w.ix.ID[i] = byte(r.Uint32())
	}
	w.ix.QdrantName = qdrant.Prefix + "search_test_" + w.ix.ID.String()
	w.ix.Salt = w.ix.ID
	w.ix.Layout.Fields = w.coll.Settings.Fields
	if err := c.CreateIndex(t.Context(), w.ix); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.DropIndex(context.Background(), w.ix); err != nil {
			t.Error(err)
		}
	})
	var points []corpus.Point
	for id, p := range w.points {
		points = append(points, corpus.Point{ID: id, Vectors: p.vectors, Payload: corpus.Payload{
			Owner: corpus.ID{0xaa}, Gen: 1, MetaVersion: 1, Metadata: p.metadata,
			Bucket: corpus.Bucket(w.ix.Salt, id), Checksum: corpus.ChecksumVectors(&p.vectors, ""),
		}})
	}
	if len(points) > 0 {
		if err := c.InsertPoints(t.Context(), w.ix, points); err != nil {
			t.Fatal(err)
		}
	}
}

// TestExactOnServers: every mode, with groups, offsets, filters, thresholds and batches,
// answers through the client and a server what the brute force answers, whatever junk lies
// in the index.
func TestExactOnServers(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for name, client := range indexes(t) {
		t.Run(name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			for range 10 {
				w, e := randomWorld(t, r, allHeads)
				w.fill(t, client, r)
				s := New(w, realIndex{w, client}, e, w, Config{Exact: true}, prometheus.NewRegistry())
				var reqs []corpus.SearchRequest
				for range 12 {
					req := randomRequest(r)
					reqs = append(reqs, req)
					got, err := s.Search(t.Context(), req)
					if err != nil {
						t.Fatalf("%+v: %v", req, err)
					}
					v := embed(t, e, req.Query, allHeads)
					compare(t, w, req, got, w.bruteForce(req, &v))
				}
				many, err := s.SearchBatch(t.Context(), reqs)
				if err != nil {
					t.Fatal(err)
				}
				for i, got := range many {
					v := embed(t, e, reqs[i].Query, allHeads)
					compare(t, w, reqs[i], got, w.bruteForce(reqs[i], &v))
				}
			}
		})
	}
}
