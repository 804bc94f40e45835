package qdrantlocal

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/qdrant/go-client/qdrant"
)

// fill makes a collection of n points with UUIDs, a dense vector of dim floats and
// Lockstep's payload, and returns the ids.
func fill(b testing.TB, c *qdrant.Client, name string, n, dim int) {
	b.Helper()
	ctx := context.Background()
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	must(c.CreateCollection(ctx, &qdrant.CreateCollection{
		CollectionName: name,
		VectorsConfig: qdrant.NewVectorsConfigMap(map[string]*qdrant.VectorParams{
			"dense": {Size: uint64(dim), Distance: qdrant.Distance_Dot},
		}),
	}))
	for field, t := range map[string]qdrant.FieldType{
		"_owner": qdrant.FieldType_FieldTypeKeyword, "_doc": qdrant.FieldType_FieldTypeKeyword,
		"_gen": qdrant.FieldType_FieldTypeInteger, "_bucket": qdrant.FieldType_FieldTypeInteger,
	} {
		_, err := c.CreateFieldIndex(ctx, &qdrant.CreateFieldIndexCollection{CollectionName: name, FieldName: field, FieldType: t.Enum(), Wait: qdrant.PtrOf(true)})
		must(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for done := 0; done < n; {
		batch := make([]*qdrant.PointStruct, 0, 1000)
		for len(batch) < cap(batch) && done < n {
			batch = append(batch, benchPoint(r, done, dim))
			done++
		}
		_, err := c.Upsert(ctx, &qdrant.UpsertPoints{CollectionName: name, Points: batch, Wait: qdrant.PtrOf(done == n)})
		must(err)
	}
}

func benchPoint(r *rand.Rand, i, dim int) *qdrant.PointStruct {
	v := make([]float32, dim)
	for j := range v {
		v[j] = r.Float32() - 0.5
	}
	id := pointID{hi: r.Uint64(), lo: r.Uint64(), uuid: true}
	return &qdrant.PointStruct{
		Id:      qdrant.NewID(id.uuidText()),
		Vectors: qdrant.NewVectorsMap(map[string]*qdrant.Vector{"dense": qdrant.NewVectorDense(v)}),
		Payload: qdrant.NewValueMap(map[string]any{
			"_owner": "0189abcd-ef01-7234-8567-89abcdef0123", "_doc": pointID{lo: uint64(i / 4), uuid: true}.uuidText(),
			"_gen": i, "_mv": i, "_bucket": id.hi >> 52, "_sum": "0123456789abcdef",
			"m": map[string]any{"lang": "en", "year": 2000 + i%26},
		}),
	}
}

// BenchmarkQuery searches exactly, k = 10.
func BenchmarkQuery(b *testing.B) {
	for _, size := range []struct{ n, dim int }{{10_000, 384}, {100_000, 1024}} {
		b.Run(fmt.Sprintf("n=%d/dim=%d", size.n, size.dim), func(b *testing.B) {
			c := dial(b, open(b, b.TempDir(), Options{}))
			fill(b, c, "q", size.n, size.dim)
			r := rand.New(rand.NewPCG(3, 4))
			q := make([]float32, size.dim)
			for i := range q {
				q[i] = r.Float32() - 0.5
			}
			year := 2010.0
			for what, f := range map[string]*qdrant.Filter{
				"all":       nil,
				"indexed":   {Must: []*qdrant.Condition{qdrant.NewMatch("_owner", "0189abcd-ef01-7234-8567-89abcdef0123")}},
				"unindexed": {Must: []*qdrant.Condition{qdrant.NewRange("m.year", &qdrant.Range{Lt: &year})}},
			} {
				b.Run(what, func(b *testing.B) {
					for b.Loop() {
						hits, err := c.Query(b.Context(), &qdrant.QueryPoints{CollectionName: "q", Query: qdrant.NewQueryDense(q), Using: qdrant.PtrOf("dense"), Filter: f, Limit: qdrant.PtrOf(uint64(10))})
						if err != nil || len(hits) != 10 {
							b.Fatal(len(hits), err)
						}
					}
				})
			}
		})
	}
}

// BenchmarkUpsert writes batches of 256 points of 1,024 floats with wait=true.
func BenchmarkUpsert(b *testing.B) {
	for _, workers := range []int{1, 4} {
		b.Run(fmt.Sprintf("workers=%d", workers), func(b *testing.B) {
			const batch = 256
			c := dial(b, open(b, b.TempDir(), Options{}))
			fill(b, c, "u", 0, 1024)
			r := rand.New(rand.NewPCG(1, 2))
			reqs := make([]*qdrant.UpsertPoints, 16)
			for i := range reqs {
				reqs[i] = &qdrant.UpsertPoints{CollectionName: "u", Wait: qdrant.PtrOf(true), UpdateMode: qdrant.UpdateMode_Upsert.Enum()}
				for j := range batch {
					reqs[i].Points = append(reqs[i].Points, benchPoint(r, i*batch+j, 1024))
				}
			}
			var next atomic.Int64
			b.SetParallelism((workers + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0))
			if workers == 1 {
				for b.Loop() {
					if _, err := c.Upsert(b.Context(), reqs[next.Add(1)%16]); err != nil {
						b.Fatal(err)
					}
				}
			} else {
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						if _, err := c.Upsert(b.Context(), reqs[next.Add(1)%16]); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			b.ReportMetric(float64(b.N*batch)/b.Elapsed().Seconds(), "points/s")
		})
	}
}

// BenchmarkScroll reads every id of a collection of 200,000 points.
func BenchmarkScroll(b *testing.B) {
	const n = 200_000
	c := dial(b, open(b, b.TempDir(), Options{}))
	fill(b, c, "s", n, 8)
	for what, sel := range map[string]*qdrant.WithPayloadSelector{
		"ids": qdrant.NewWithPayload(false), "field": qdrant.NewWithPayloadInclude("_mv"), "payload": qdrant.NewWithPayload(true),
	} {
		for _, page := range []uint32{1000, 10_000} {
			b.Run(fmt.Sprintf("%s/page=%d", what, page), func(b *testing.B) {
				for b.Loop() {
					seen := 0
					var offset *qdrant.PointId
					for {
						ps, next, err := c.ScrollAndOffset(b.Context(), &qdrant.ScrollPoints{CollectionName: "s", Limit: &page, Offset: offset, WithPayload: sel})
						if err != nil {
							b.Fatal(err)
						}
						seen += len(ps)
						if offset = next; next == nil {
							break
						}
					}
					if seen != n {
						b.Fatal(seen)
					}
				}
				b.ReportMetric(float64(b.N)*n/b.Elapsed().Seconds(), "ids/s")
			})
		}
	}
}

// BenchmarkFacet counts 200,000 points in 4,096 buckets, whole and filtered.
func BenchmarkFacet(b *testing.B) {
	c := dial(b, open(b, b.TempDir(), Options{}))
	fill(b, c, "f", 200_000, 8)
	for what, f := range map[string]*qdrant.Filter{
		"all":      nil,
		"filtered": {Must: []*qdrant.Condition{qdrant.NewMatch("_owner", "0189abcd-ef01-7234-8567-89abcdef0123")}},
	} {
		b.Run(what, func(b *testing.B) {
			for b.Loop() {
				hits, err := c.Facet(b.Context(), &qdrant.FacetCounts{CollectionName: "f", Key: "_bucket", Filter: f, Limit: qdrant.PtrOf(uint64(4096)), Exact: qdrant.PtrOf(true)})
				if err != nil || len(hits) != 4096 {
					b.Fatal(len(hits), err)
				}
			}
		})
	}
}

// BenchmarkOpen reads a compacted collection at start-up.
func BenchmarkOpen(b *testing.B) {
	for _, size := range []struct{ n, dim int }{{100_000, 8}, {100_000, 1024}} {
		b.Run(fmt.Sprintf("n=%d/dim=%d", size.n, size.dim), func(b *testing.B) {
			dir := b.TempDir()
			s := open(b, dir, Options{})
			fill(b, dial(b, s), "o", size.n, size.dim)
			if err := s.Close(); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				s, err := Open(dir, Options{})
				if err != nil {
					b.Fatal(err)
				}
				if n := s.collections["o"].ids.Len(); n != size.n {
					b.Fatal(n)
				}
				if err := s.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
