package qdrant

import (
	"context"
	"net"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"

	qc "github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/store/qdranttest"
)

// hooked is an embedded server seen through a server of another temper: hooks may change
// requests and answers by method. It forwards the calls of this package's tests.
type hooked struct {
	conn   *grpc.ClientConn
	before map[string]func(proto.Message)
	after  map[string]func(req, resp proto.Message)
}

func (h *hooked) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, _ grpc.UnaryHandler) (any, error) {
	method := path.Base(path.Dir(info.FullMethod))[len("qdrant."):] + "." + path.Base(info.FullMethod)
	in := proto.Clone(req.(proto.Message))
	if f := h.before[method]; f != nil {
		f(in)
	}
	var out proto.Message
	switch method {
	case "Points.Upsert", "Points.SetPayload", "Points.Delete", "Points.CreateFieldIndex":
		out = &qc.PointsOperationResponse{}
	case "Points.UpdateBatch":
		out = &qc.UpdateBatchResponse{}
	case "Points.Get":
		out = &qc.GetResponse{}
	case "Points.Scroll":
		out = &qc.ScrollResponse{}
	case "Points.Facet":
		out = &qc.FacetResponse{}
	case "Points.Count":
		out = &qc.CountResponse{}
	case "Points.QueryBatch":
		out = &qc.QueryBatchResponse{}
	case "Collections.Get":
		out = &qc.GetCollectionInfoResponse{}
	case "Collections.List":
		out = &qc.ListCollectionsResponse{}
	case "Collections.Create", "Collections.Delete":
		out = &qc.CollectionOperationResponse{}
	case "Qdrant.HealthCheck":
		out = &qc.HealthCheckReply{}
	}
	if err := h.conn.Invoke(ctx, info.FullMethod, in, out); err != nil {
		return nil, err
	}
	if f := h.after[method]; f != nil {
		f(req.(proto.Message), out)
	}
	return out, nil
}

func hook(t *testing.T, h *hooked) *Client {
	t.Helper()
	conn, err := grpc.NewClient(qdranttest.Own(t), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must0(t, err)
	h.conn = conn
	srv := grpc.NewServer(grpc.UnaryInterceptor(h.intercept))
	qc.RegisterPointsServer(srv, qc.UnimplementedPointsServer{})
	qc.RegisterCollectionsServer(srv, qc.UnimplementedCollectionsServer{})
	qc.RegisterQdrantServer(srv, qc.UnimplementedQdrantServer{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must0(t, err)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(l) })
	t.Cleanup(func() { srv.Stop(); wg.Wait(); must0(t, conn.Close()) })
	return open(t, Config{URL: "http://" + l.Addr().String()})
}

// An old server drops the fields it does not know. Each of the guards must be missed.
func TestOldServersAreRefused(t *testing.T) {
	t.Parallel()
	for what, before := range map[string]map[string]func(proto.Message){
		"insert_only": {"Points.Upsert": func(m proto.Message) { m.(*qc.UpsertPoints).UpdateMode = nil }},
		"update_filter": {"Points.UpdateBatch": func(m proto.Message) {
			for _, op := range m.(*qc.UpdateBatchPoints).GetOperations() {
				if up := op.GetUpsert(); up != nil {
					up.UpdateFilter = nil
				}
			}
		}},
		"set-payload": {"Points.UpdateBatch": func(m proto.Message) {
			for _, op := range m.(*qc.UpdateBatchPoints).GetOperations() {
				if f := op.GetSetPayload().GetPointsSelector().GetFilter(); f != nil {
					f.MustNot = nil
				}
			}
		}},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			c := hook(t, &hooked{before: before})
			err := c.ProveGuards(t.Context())
			if corpus.CodeOf(err) != CodeTooOld || corpus.KindOf(err) != corpus.Conflict || !strings.Contains(err.Error(), what) || !strings.Contains(err.Error(), "1.17") {
				t.Errorf("got %v", err)
			}
			if names, err := c.list(t.Context()); err != nil || len(names) != 0 {
				t.Errorf("left behind: %v %v", names, err)
			}
		})
	}
	must0(t, hook(t, &hooked{}).ProveGuards(t.Context()))
}

func TestStrictModeBoundsRequests(t *testing.T) {
	t.Parallel()
	strict := &qc.StrictModeConfig{
		Enabled: qc.PtrOf(true), MaxQueryLimit: qc.PtrOf(uint32(100)), UpsertMaxBatchsize: qc.PtrOf(uint64(7)), ConditionMaxSize: qc.PtrOf(uint64(50)),
	}
	var mu sync.Mutex
	seen := map[string]int{}
	note := func(name string, n int) {
		mu.Lock()
		defer mu.Unlock()
		seen[name] = max(seen[name], n)
	}
	c := hook(t, &hooked{
		before: map[string]func(proto.Message){
			"Points.Upsert": func(m proto.Message) { note("upsert", len(m.(*qc.UpsertPoints).GetPoints())) },
			"Points.Scroll": func(m proto.Message) { note("scroll", int(m.(*qc.ScrollPoints).GetLimit())) },
			"Points.Facet":  func(m proto.Message) { note("facet", int(m.(*qc.FacetCounts).GetLimit())) },
			"Points.UpdateBatch": func(m proto.Message) {
				for _, op := range m.(*qc.UpdateBatchPoints).GetOperations() {
					note("has_id", len(op.GetSetPayload().GetPointsSelector().GetFilter().GetMust()[0].GetHasId().GetHasId()))
				}
			},
			"Points.QueryBatch": func(m proto.Message) {
				for _, q := range m.(*qc.QueryBatchPoints).GetQueryPoints() {
					note("query", int(q.GetLimit()))
				}
			},
		},
		after: map[string]func(req, resp proto.Message){"Collections.Get": func(_, m proto.Message) {
			m.(*qc.GetCollectionInfoResponse).GetResult().GetConfig().StrictModeConfig = strict
		}},
	})
	ix := makeIndex(t, c, corpus.Layout{Vectors: corpus.Dense, Dim: 2})
	var pts []corpus.Point
	for i := range 300 {
		pts = append(pts, makePoint(ix, i, 1, 1, nil))
	}
	must0(t, c.InsertPoints(t.Context(), ix, pts))
	must0(t, c.SetMetadata(t.Context(), ix, []corpus.MetadataWrite{{Points: ids(pts), MetaVersion: 2}}))
	page, next, err := c.Scroll(t.Context(), ix, corpus.ID{}, 10000, corpus.Full)
	if err != nil || len(page) != 100 || next == nil {
		t.Errorf("%d %v %v", len(page), next, err)
	}
	if got, err := c.Query(t.Context(), ix, corpus.IndexQuery{Head: corpus.Dense, Vectors: &pts[0].Vectors, Limit: 1000}); err != nil || len(got) != 100 {
		t.Errorf("query: %d %v", len(got), err)
	}
	buckets, err := c.FacetBuckets(t.Context(), ix)
	must0(t, err)
	var sum int64
	for _, n := range buckets {
		sum += n
	}
	if sum != 300 {
		t.Errorf("facets in slices count %d", sum)
	}
	for name, most := range map[string]int{"upsert": 7, "scroll": 100, "facet": 50, "has_id": 50, "query": 100} {
		if seen[name] != most {
			t.Errorf("%s: up to %d, want %d", name, seen[name], most)
		}
	}
	strict.SearchAllowExact = qc.PtrOf(false)
	c.forget(ix.QdrantName)
	for _, f := range []func() error{
		func() error { _, err := c.FacetBuckets(t.Context(), ix); return err },
		func() error { _, err := c.CountPoints(t.Context(), ix); return err },
	} {
		if err := f(); corpus.CodeOf(err) != "exact_refused" || !strings.Contains(err.Error(), "search_allow_exact") {
			t.Errorf("got %v", err)
		}
	}
}

// Of three replicas, some hold points that others do not: what all hold is present, what
// some hold is neither.
func TestReplicas(t *testing.T) {
	t.Parallel()
	onlyOne := func(id *qc.PointId) bool { p, _ := parseID(id); return p[15]%10 == 3 }
	filter := func(list []*qc.RetrievedPoint, rc *qc.ReadConsistency) []*qc.RetrievedPoint {
		if rc == nil || rc.GetType() != qc.ReadConsistencyType_All {
			return list // the replica that holds everything
		}
		return slices.DeleteFunc(list, func(p *qc.RetrievedPoint) bool { return onlyOne(p.GetId()) })
	}
	c := hook(t, &hooked{after: map[string]func(req, resp proto.Message){
		"Collections.Get": func(_, m proto.Message) {
			m.(*qc.GetCollectionInfoResponse).GetResult().GetConfig().GetParams().ReplicationFactor = qc.PtrOf(uint32(3))
		},
		"Points.Get": func(req, m proto.Message) {
			r := m.(*qc.GetResponse)
			r.Result = filter(r.GetResult(), req.(*qc.GetPoints).GetReadConsistency())
		},
		"Points.Scroll": func(req, m proto.Message) {
			r := m.(*qc.ScrollResponse)
			r.Result = filter(r.GetResult(), req.(*qc.ScrollPoints).GetReadConsistency())
		},
	}})
	ix := makeIndex(t, c, corpus.Layout{Vectors: corpus.Dense, Dim: 2})
	var pts []corpus.Point
	for i := range 100 {
		pts = append(pts, makePoint(ix, i, 1, 1, nil))
	}
	must0(t, c.InsertPoints(t.Context(), ix, pts))
	check := func(how string, got []corpus.PointState, want int) {
		t.Helper()
		if len(got) != want {
			t.Errorf("%s: %d points", how, len(got))
		}
		for _, s := range got {
			if s.Partial != (s.ID[15]%10 == 3) {
				t.Errorf("%s: %s partial %v", how, s.ID, s.Partial)
			}
		}
	}
	got, err := c.ReadPoints(t.Context(), ix, append(ids(pts), pid(1000)), false)
	must0(t, err)
	check("read", got, 100)
	page, next, err := c.Scroll(t.Context(), ix, corpus.ID{}, 50, corpus.Full)
	must0(t, err)
	check("scroll", page, 50)
	page, next, err = c.Scroll(t.Context(), ix, *next, 50, corpus.Full)
	must0(t, err)
	check("scroll on", page, 50)
	if next != nil {
		t.Error("no end")
	}
}

func TestMergeOfReplicaPages(t *testing.T) {
	t.Parallel()
	list := func(ns ...int) (out []corpus.PointState) {
		for _, n := range ns {
			out = append(out, corpus.PointState{ID: pid(n)})
		}
		return out
	}
	at := func(n int) *corpus.ID { id := pid(n); return &id }
	for _, c := range []struct {
		all     []corpus.PointState
		nextAll *corpus.ID
		one     []corpus.PointState
		nextOne *corpus.ID
		want    string // number, * for partial; then the next page's start
	}{
		{list(), nil, list(), nil, "|"},
		{list(1, 2), nil, list(1, 2), nil, "1 2|"},
		{list(1, 3), nil, list(1, 2, 3), nil, "1 2* 3|"},
		{list(1, 5), at(6), list(1, 2), at(3), "1 2*|3"},
		{list(1, 2), at(3), list(1, 4), at(9), "1 2|3"},
		{list(1, 2), at(3), list(1, 2), nil, "1 2|3"},
		{list(), nil, list(7), nil, "7*|"},
	} {
		got, next := mergeReplicas(c.all, c.nextAll, c.one, c.nextOne)
		var parts []string
		for _, s := range got {
			p := string(rune('0' + s.ID[15]))
			if s.Partial {
				p += "*"
			}
			parts = append(parts, p)
		}
		out := strings.Join(parts, " ") + "|"
		if next != nil {
			out += string(rune('0' + next[15]))
		}
		if out != c.want {
			t.Errorf("got %s, want %s", out, c.want)
		}
	}
}
