package qdrant

import (
	"context"
	"crypto/rand"
	"fmt"
	"strconv"
	"strings"
	"time"

	qc "github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// probePrefix names scratch collections: prefix, unix time of creation, random part.
const probePrefix = Prefix + "probe_"

// probeAge is after how long another process's scratch collection is taken for abandoned.
const probeAge = 10 * time.Minute

// ProveGuards shows on a scratch collection that the connected server honours insert_only,
// the guards on meta_version, and points without vectors. An old server silently drops the
// fields it does not know; on such a server every promise would be void, so the error
// ([corpus.Conflict], code index_too_old) says which version is needed. On a cluster in a
// rolling upgrade it speaks for the nodes that answered.
func (c *Client) ProveGuards(ctx context.Context) error {
	version, err := c.version(ctx)
	if err != nil {
		return err
	}
	c.sweepProbes(ctx)
	var nonce [8]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return corpus.Wrap(corpus.Internal, "random", "no random numbers", err)
	}
	ix := corpus.Index{
		QdrantName: fmt.Sprintf("%s%d_%x", probePrefix, c.cfg.Now().Unix(), nonce),
		Layout:     corpus.Layout{Vectors: corpus.Dense, Dim: 1},
	}
	if err := c.CreateIndex(ctx, ix); err != nil {
		return fmt.Errorf("making a scratch collection: %w", err)
	}
	defer func() {
		// Also when the caller has left: an abandoned collection would wait for the next sweep.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := c.DropIndex(ctx, ix); err != nil {
			c.log.WarnContext(ctx, "scratch collection left behind", "name", ix.QdrantName, "err", err)
		}
	}()
	return c.prove(ctx, ix, version)
}

func (c *Client) prove(ctx context.Context, ix corpus.Index, version string) error {
	tooOld := func(what string) error {
		return corpus.Errorf(corpus.Conflict, CodeTooOld,
			"the index server (version %s) ignores %s; Lockstep needs Qdrant 1.17 or later on every node", version, what)
	}
	id := corpus.ID{15: 1}
	point := func(gen, version int64) corpus.Point {
		return corpus.Point{
			ID: id, Vectors: corpus.Vectors{Dense: []float32{1}},
			Payload: corpus.Payload{Gen: gen, MetaVersion: version, Metadata: corpus.Metadata{"v": version}},
		}
	}
	write := func(version int64) []corpus.MetadataWrite {
		return []corpus.MetadataWrite{{Points: []corpus.ID{id}, MetaVersion: version, Metadata: corpus.Metadata{"v": version}}}
	}
	for _, step := range []struct {
		what         string
		do           func() error
		gen, version int64 // expected afterwards
	}{
		{"inserts", func() error { return c.InsertPoints(ctx, ix, []corpus.Point{point(1, 10)}) }, 1, 10},
		{"update_mode=insert_only", func() error { return c.InsertPoints(ctx, ix, []corpus.Point{point(2, 20)}) }, 1, 10},
		{"update_filter of an upsert", func() error { return c.RewritePoints(ctx, ix, []corpus.Point{point(3, 9)}) }, 1, 10},
		{"an upsert that its update_filter admits", func() error { return c.RewritePoints(ctx, ix, []corpus.Point{point(4, 10)}) }, 4, 10},
		{"the filter of set-payload", func() error { return c.SetMetadata(ctx, ix, write(9)) }, 4, 10},
		{"set-payload that its filter admits", func() error { return c.SetMetadata(ctx, ix, write(11)) }, 4, 11},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("proving %s: %w", step.what, err)
		}
		got, err := c.ReadPoints(ctx, ix, []corpus.ID{id}, true)
		if err != nil {
			return fmt.Errorf("proving %s: %w", step.what, err)
		}
		if len(got) != 1 || got[0].Payload.Gen != step.gen || got[0].Payload.MetaVersion != step.version || got[0].Payload.Metadata["v"] != step.version {
			return tooOld(step.what)
		}
	}
	// A version that cannot be read must not shut out the repair of its point.
	for _, broken := range []*qc.Value{qc.NewValueString("ten"), qc.NewValueNull(), qc.NewValueDouble(1e300)} {
		err := c.call(ctx, "set_payload", func(ctx context.Context) error {
			r, err := c.api.SetPayload(ctx, &qc.SetPayloadPoints{
				CollectionName: ix.QdrantName, Wait: qc.PtrOf(true),
				Payload:        map[string]*qc.Value{corpus.KeyMetaVersion: broken},
				PointsSelector: qc.NewPointsSelector(pointID(id)),
			})
			if err != nil {
				return err
			}
			return completed(r)
		})
		if err != nil {
			return fmt.Errorf("proving the repair of an unreadable version: %w", err)
		}
		if err := c.RewritePoints(ctx, ix, []corpus.Point{point(5, 12)}); err != nil {
			return fmt.Errorf("proving the repair of an unreadable version: %w", err)
		}
		got, err := c.ReadPoints(ctx, ix, []corpus.ID{id}, false)
		if err != nil {
			return fmt.Errorf("proving the repair of an unreadable version: %w", err)
		}
		if len(got) != 1 || got[0].Payload.MetaVersion != 12 {
			return tooOld("an unreadable meta_version in update_filter")
		}
	}
	stamp := corpus.Stamp{Installation: id, Nonce: id, At: c.cfg.Now().UTC().Truncate(time.Microsecond)}
	if err := c.WriteStamp(ctx, ix, stamp); err != nil {
		return fmt.Errorf("proving points without vectors: %w", err)
	}
	if got, ok, err := c.ReadStamp(ctx, ix); err != nil {
		return fmt.Errorf("proving points without vectors: %w", err)
	} else if !ok || !got.At.Equal(stamp.At) || got.Nonce != stamp.Nonce {
		return tooOld("points without vectors")
	}
	return nil
}

// sweepProbes removes scratch collections that a killed process left. Failing to is not worth
// failing the start.
func (c *Client) sweepProbes(ctx context.Context) {
	names, err := c.list(ctx)
	if err != nil {
		c.log.WarnContext(ctx, "scratch collections not listed", "err", err)
		return
	}
	for _, name := range names {
		rest, ok := strings.CutPrefix(name, probePrefix)
		if !ok {
			continue
		}
		made, _, _ := strings.Cut(rest, "_")
		unix, err := strconv.ParseInt(made, 10, 64)
		if err != nil || c.cfg.Now().Sub(time.Unix(unix, 0)) < probeAge {
			continue
		}
		if err := c.DropIndex(ctx, corpus.Index{QdrantName: name}); err != nil {
			c.log.WarnContext(ctx, "scratch collection not removed", "name", name, "err", err)
		}
	}
}
