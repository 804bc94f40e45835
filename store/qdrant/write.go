package qdrant

import (
	"context"

	qc "github.com/qdrant/go-client/qdrant"
	"google.golang.org/protobuf/proto"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// maxVersion bounds every generation and meta_version; the range filter compares as double.
const maxVersion = 1 << 53

// InsertPoints writes points that are not there yet; one that exists stays as it is, which a
// nil error does not tell: who must know reads back. nil means Completed for all of them.
// Points are cut into requests by bytes and by number; when some requests completed and one
// did not, the error is a [corpus.PartialError]. Points that do not fit the index are not sent
// and are in its Refused; those in neither Refused nor Done are in an unknown state.
// The caller keeps pts; their vectors are read until the call returns.
func (c *Client) InsertPoints(ctx context.Context, ix corpus.Index, pts []corpus.Point) error {
	return c.writePoints(ctx, ix, pts, func(ctx context.Context, batch []encoded) error {
		points := make([]*qc.PointStruct, len(batch))
		for i := range batch {
			points[i] = batch[i].point
		}
		return c.call(ctx, "insert", func(ctx context.Context) error {
			r, err := c.api.Upsert(ctx, &qc.UpsertPoints{
				CollectionName: ix.QdrantName, Wait: qc.PtrOf(true), Points: points,
				UpdateMode: qc.UpdateMode_InsertOnly.Enum(),
			})
			if err != nil {
				return err
			}
			return completed(r)
		})
	})
}

// RewritePoints writes whole points, vectors and payload, over what is there, except where a
// higher meta_version is stored: that point keeps its state, and again only reading back
// tells. A stored version that is absent or unreadable does not protect. Errors are those of
// [Client.InsertPoints].
func (c *Client) RewritePoints(ctx context.Context, ix corpus.Index, pts []corpus.Point) error {
	return c.writePoints(ctx, ix, pts, func(ctx context.Context, batch []encoded) error {
		// One guard holds for one list, so neighbours of equal version share one.
		var ops []*qc.PointsUpdateOperation
		for i := 0; i < len(batch); {
			j, version := i, batch[i].version
			var points []*qc.PointStruct
			for ; j < len(batch) && batch[j].version == version; j++ {
				points = append(points, batch[j].point)
			}
			ops = append(ops, qc.NewPointsUpdateUpsert(&qc.PointsUpdateOperation_PointStructList{
				Points:       points,
				UpdateFilter: &qc.Filter{MustNot: []*qc.Condition{storedAbove(version)}},
			}))
			i = j
		}
		return c.updateBatch(ctx, ix, "rewrite", ops)
	})
}

// storedAbove matches points whose stored meta_version is readable and higher than version.
// "Not above" rather than "at most": a version that is absent, of another type or beyond what
// the sequence can reach must not shut out the repair of its own point.
func storedAbove(version int64) *qc.Condition {
	return qc.NewRange(corpus.KeyMetaVersion, &qc.Range{Gt: qc.PtrOf(float64(version)), Lte: qc.PtrOf(float64(maxVersion))})
}

// SetMetadata replaces the metadata and meta_version of points that exist, except where an
// equal or a higher meta_version is stored. Points that do not exist are skipped. nil means
// Completed for all; a [corpus.PartialError] names the points of completed requests.
func (c *Client) SetMetadata(ctx context.Context, ix corpus.Index, writes []corpus.MetadataWrite) error {
	l, err := c.limitsOf(ctx, ix)
	if err != nil {
		return err
	}
	// A selector names at most this many ids; 1,000 keeps a request small (unmeasured).
	selector := capped(1000, l.conditions)
	var (
		done, ids []corpus.ID
		ops       []*qc.PointsUpdateOperation
		bytes     int
	)
	flush := func() error {
		if len(ops) == 0 {
			return nil
		}
		if err := c.updateBatch(ctx, ix, "set_metadata", ops); err != nil {
			return partly(done, err)
		}
		done = append(done, ids...)
		ops, ids, bytes = nil, nil, 0
		return nil
	}
	for _, w := range writes {
		payload := map[string]*qc.Value{
			corpus.KeyMetaVersion: qc.NewValueInt(w.MetaVersion),
			corpus.KeyMetadata:    value(w.Metadata),
		}
		for rest := w.Points; len(rest) > 0; {
			n := min(selector, len(rest))
			op := qc.NewPointsUpdateSetPayload(&qc.PointsUpdateOperation_SetPayload{
				Payload: payload,
				PointsSelector: qc.NewPointsSelectorFilter(&qc.Filter{
					Must: []*qc.Condition{qc.NewHasID(pointIDs(rest[:n])...)},
					MustNot: []*qc.Condition{qc.NewRange(corpus.KeyMetaVersion, &qc.Range{
						Gte: qc.PtrOf(float64(w.MetaVersion)), Lte: qc.PtrOf(float64(maxVersion)),
					})},
				}),
			})
			size := proto.Size(op)
			if len(ops) > 0 && (bytes+size > c.cfg.MaxBatchBytes || len(ops) >= c.cfg.MaxBatchPoints) {
				if err := flush(); err != nil {
					return err
				}
			}
			ops, ids, bytes = append(ops, op), append(ids, rest[:n]...), bytes+size
			rest = rest[n:]
		}
	}
	return flush()
}

// DeletePoints removes points by id; those that do not exist are fine. nil means Completed
// for all; a [corpus.PartialError] names the points of completed requests.
func (c *Client) DeletePoints(ctx context.Context, ix corpus.Index, ids []corpus.ID) error {
	const batch = 1000 // 20 bytes an id: far below any bound (unmeasured)
	for start := 0; start < len(ids); start += batch {
		part := ids[start:min(start+batch, len(ids))]
		err := c.call(ctx, "delete", func(ctx context.Context) error {
			r, err := c.api.Delete(ctx, &qc.DeletePoints{
				CollectionName: ix.QdrantName, Wait: qc.PtrOf(true), Ordering: c.ordering(),
				Points: qc.NewPointsSelectorIDs(pointIDs(part)),
			})
			if err != nil {
				return err
			}
			return completed(r)
		})
		if err != nil {
			return partly(ids[:start:start], err)
		}
	}
	return nil
}

// ordering of deletes, metadata and rewrites: on replicas a reordered one would undo a later
// write.
func (c *Client) ordering() *qc.WriteOrdering {
	if c.cfg.StrongOrdering {
		return &qc.WriteOrdering{Type: qc.WriteOrderingType_Strong}
	}
	return &qc.WriteOrdering{Type: qc.WriteOrderingType_Medium}
}

func (c *Client) updateBatch(ctx context.Context, ix corpus.Index, op string, ops []*qc.PointsUpdateOperation) error {
	return c.call(ctx, op, func(ctx context.Context) error {
		results, err := c.api.UpdateBatch(ctx, &qc.UpdateBatchPoints{
			CollectionName: ix.QdrantName, Wait: qc.PtrOf(true), Ordering: c.ordering(), Operations: ops,
		})
		if err != nil {
			return err
		}
		if len(results) != len(ops) {
			return corpus.Errorf(corpus.Unavailable, CodeUnknown, "the index answered %d of %d operations: the others may or may not be applied", len(results), len(ops))
		}
		for _, r := range results {
			if err := completed(r); err != nil {
				return err
			}
		}
		return nil
	})
}

type encoded struct {
	id      corpus.ID
	version int64
	point   *qc.PointStruct
}

// writePoints encodes pts, cuts them into batches and sends one after the other. All points
// are encoded a batch at a time, so memory is bounded by the batch, not by pts.
func (c *Client) writePoints(ctx context.Context, ix corpus.Index, pts []corpus.Point, send func(context.Context, []encoded) error) error {
	if len(pts) == 0 {
		return nil
	}
	l, err := c.limitsOf(ctx, ix)
	if err != nil {
		return err
	}
	most := capped(c.cfg.MaxBatchPoints, l.upsertBatch)
	var (
		done  []corpus.ID
		batch []encoded
		bytes int
	)
	refused := map[corpus.ID]error{}
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		if err := send(ctx, batch); err != nil {
			if len(done)+len(refused) == 0 {
				return err
			}
			return &corpus.PartialError{Done: done, Refused: refused, Err: err}
		}
		for i := range batch {
			done = append(done, batch[i].id)
		}
		clear(batch)
		batch, bytes = batch[:0], 0
		return nil
	}
	for i := range pts {
		p, err := encodePoint(ix, &pts[i])
		if err != nil {
			refused[pts[i].ID] = err // its neighbours go ahead
			continue
		}
		size := proto.Size(p)
		if len(batch) >= most || len(batch) > 0 && bytes+size > c.cfg.MaxBatchBytes {
			if err := flush(); err != nil {
				return err
			}
		}
		batch, bytes = append(batch, encoded{pts[i].ID, pts[i].Payload.MetaVersion, p}), bytes+size
	}
	if err := flush(); err != nil {
		return err
	}
	for _, err := range refused {
		return &corpus.PartialError{Done: done, Refused: refused, Err: err}
	}
	return nil
}
