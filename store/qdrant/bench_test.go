package qdrant

import (
	"testing"

	qc "github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/qdranttest"
)

// BenchmarkInsert writes 256 points of 1,024 floats a round: through this adapter, and by a
// bare loop of the client library that sends the very same points.
func BenchmarkInsert(b *testing.B) {
	layout := corpus.Layout{Vectors: corpus.Dense, Dim: 1024}
	md := corpus.Metadata{"lang": "en", "year": int64(2026), "tags": []any{"a", "b"}, "path": "docs/guide/start"}
	for _, bare := range []bool{false, true} {
		name := "adapter"
		if bare {
			name = "bare"
		}
		b.Run(name, func(b *testing.B) {
			c, err := Open(b.Context(), Config{URL: "http://" + qdranttest.Own(b)})
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			ix := corpus.Index{QdrantName: Prefix + "bench", Layout: layout, Salt: corpus.ID{1}}
			if err := c.CreateIndex(b.Context(), ix); err != nil {
				b.Fatal(err)
			}
			pts := make([]corpus.Point, 256)
			for i := range pts {
				pts[i] = makePoint(ix, i, 1, 1, md)
			}
			n := 0
			b.ReportAllocs()
			for b.Loop() {
				for i := range pts {
					n++
					pts[i].ID = corpus.ID{6: 0x50, 12: byte(n >> 24), 13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)}
				}
				if !bare {
					err = c.InsertPoints(b.Context(), ix, pts)
				} else {
					up := &qc.UpsertPoints{CollectionName: ix.QdrantName, Wait: qc.PtrOf(true)}
					for i := range pts {
						up.Points = append(up.Points, &qc.PointStruct{
							Id: pointID(pts[i].ID), Vectors: qc.NewVectorsMap(map[string]*qc.Vector{denseName: qc.NewVectorDense(pts[i].Vectors.Dense)}),
							Payload: encodePayload(&pts[i].Payload),
						})
					}
					_, err = c.api.Upsert(b.Context(), up)
				}
				if err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "points/s")
		})
	}
}
