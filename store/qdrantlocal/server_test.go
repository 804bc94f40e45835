package qdrantlocal

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/qdrant/go-client/qdrant"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/lockstep-db/lockstep/store/storetest"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		if err := runChild(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

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

func TestHealth(t *testing.T) {
	t.Parallel()
	c := dial(t, open(t, t.TempDir(), Options{}))
	r, err := c.HealthCheck(t.Context())
	if err != nil || r.GetTitle() != Title || r.GetVersion() != Version {
		t.Errorf("%v, %v", r, err)
	}
	if !qdrant.IsCompatible("v1.17.1", r.GetVersion()) {
		t.Errorf("go-client does not take version %s for compatible", r.GetVersion())
	}
}

func TestOneProcessPerDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, Options{})
	_, err := Open(dir, Options{})
	var locked *LockedError
	if !errors.As(err, &locked) || locked.Dir != dir {
		t.Errorf("second Open: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, dir, Options{})
}

func TestCloseTwice(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), Options{})
	c := dial(t, s)
	if _, err := c.HealthCheck(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.ListCollections(t.Context()); err == nil {
		t.Error("a closed server answers")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(l); err == nil {
		t.Error("a closed server serves")
	}
	never, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if never.Addr() != nil {
		t.Error("an address before Serve")
	}
	if err := never.Close(); err != nil {
		t.Errorf("closing a server that never served: %v", err)
	}
}

func TestAPIKey(t *testing.T) {
	t.Parallel()
	addr := serve(t, open(t, t.TempDir(), Options{APIKey: "secret"}))
	c := storetest.Dial(t, addr)
	if _, err := c.HealthCheck(t.Context()); err != nil {
		t.Errorf("the health check asks for a key: %v", err)
	}
	for key, want := range map[string]codes.Code{"": codes.Unauthenticated, "wrong": codes.Unauthenticated, "secret": codes.OK} {
		for _, header := range []string{"api-key", "authorization"} {
			ctx := t.Context()
			if key != "" && header == "api-key" {
				ctx = metadata.AppendToOutgoingContext(ctx, header, key)
			} else if key != "" {
				ctx = metadata.AppendToOutgoingContext(ctx, header, "Bearer "+key)
			}
			if _, err := c.ListCollections(ctx); status.Code(err) != want {
				t.Errorf("%s %q: %v, want %v", header, key, err, want)
			}
		}
	}
}

// A real server takes such a payload and then fails on every read of it; this one refuses it.
func TestTooDeepAPayloadIsRefused(t *testing.T) {
	t.Parallel()
	c := dial(t, open(t, t.TempDir(), Options{}))
	ctx := t.Context()
	if err := c.CreateCollection(ctx, &qdrant.CreateCollection{CollectionName: "deep", VectorsConfig: qdrant.NewVectorsConfig(&qdrant.VectorParams{Size: 1, Distance: qdrant.Distance_Dot})}); err != nil {
		t.Fatal(err)
	}
	for _, levels := range []int{maxPayloadDepth, 200} {
		deep := qdrant.NewValueInt(1)
		for range levels {
			deep = &qdrant.Value{Kind: &qdrant.Value_ListValue{ListValue: &qdrant.ListValue{Values: []*qdrant.Value{deep}}}}
		}
		_, err := c.Upsert(ctx, &qdrant.UpsertPoints{CollectionName: "deep", Wait: qdrant.PtrOf(true), Points: []*qdrant.PointStruct{
			{Id: qdrant.NewIDNum(1), Vectors: qdrant.NewVectors(1), Payload: map[string]*qdrant.Value{"x": deep}},
		}})
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("a payload of %d levels: %v", levels+1, err)
		}
	}
}

// TestUnimplemented: what is not there says so, and nothing plausible.
func TestUnimplemented(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c := dial(t, open(t, t.TempDir(), Options{}))
	name := "u"
	if err := c.CreateCollection(ctx, &qdrant.CreateCollection{CollectionName: name, VectorsConfig: qdrant.NewVectorsConfig(&qdrant.VectorParams{Size: 2, Distance: qdrant.Distance_Dot})}); err != nil {
		t.Fatal(err)
	}
	points, collections := c.GetPointsClient(), c.GetCollectionsClient()
	query := func(q *qdrant.Query) error {
		_, err := c.Query(ctx, &qdrant.QueryPoints{CollectionName: name, Query: q})
		return err
	}
	create := func(change func(*qdrant.CreateCollection)) error {
		req := &qdrant.CreateCollection{CollectionName: "x", VectorsConfig: qdrant.NewVectorsConfig(&qdrant.VectorParams{Size: 2, Distance: qdrant.Distance_Dot})}
		change(req)
		return c.CreateCollection(ctx, req)
	}
	geo := &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewGeoRadius("g", 1, 2, 3)}}
	for what, call := range map[string]func() error{
		"search": func() error { _, err := points.Search(ctx, &qdrant.SearchPoints{CollectionName: name}); return err },
		"recommend": func() error {
			_, err := points.Recommend(ctx, &qdrant.RecommendPoints{CollectionName: name})
			return err
		},
		"discover":     func() error { _, err := points.Discover(ctx, &qdrant.DiscoverPoints{CollectionName: name}); return err },
		"query groups": func() error { _, err := c.QueryGroups(ctx, &qdrant.QueryPointGroups{CollectionName: name}); return err },
		"search matrix": func() error {
			_, err := c.SearchMatrixPairs(ctx, &qdrant.SearchMatrixPoints{CollectionName: name})
			return err
		},
		"cluster info": func() error {
			_, err := collections.CollectionClusterInfo(ctx, &qdrant.CollectionClusterInfoRequest{CollectionName: name})
			return err
		},
		"shard key": func() error { return c.CreateShardKey(ctx, name, &qdrant.CreateShardKey{}) },
		"snapshot": func() error {
			_, err := c.GetSnapshotsClient().Create(ctx, &qdrant.CreateSnapshotRequest{CollectionName: name})
			return err
		},
		"sample":   func() error { return query(qdrant.NewQuerySample(qdrant.Sample_Random)) },
		"order by": func() error { return query(qdrant.NewQueryOrderBy(&qdrant.OrderBy{Key: "a"})) },
		"formula":  func() error { return query(qdrant.NewQueryFormula(&qdrant.Formula{})) },
		"document": func() error { return query(qdrant.NewQueryDocument(&qdrant.Document{Text: "x"})) },
		"geo": func() error {
			_, err := c.Count(ctx, &qdrant.CountPoints{CollectionName: name, Filter: geo})
			return err
		},
		"scroll order": func() error {
			_, err := c.Scroll(ctx, &qdrant.ScrollPoints{CollectionName: name, OrderBy: &qdrant.OrderBy{Key: "a"}})
			return err
		},
		"shard selector": func() error {
			_, err := c.Count(ctx, &qdrant.CountPoints{CollectionName: name, ShardKeySelector: &qdrant.ShardKeySelector{ShardKeys: []*qdrant.ShardKey{qdrant.NewShardKey("a")}}})
			return err
		},
		"lookup": func() error {
			_, err := c.Query(ctx, &qdrant.QueryPoints{CollectionName: name, Query: qdrant.NewQuery(1, 2), LookupFrom: &qdrant.LookupLocation{CollectionName: name}})
			return err
		},
		"uint8 vectors": func() error {
			return create(func(r *qdrant.CreateCollection) {
				r.GetVectorsConfig().GetParams().Datatype = qdrant.Datatype_Uint8.Enum()
			})
		},
		"idf": func() error {
			return create(func(r *qdrant.CreateCollection) {
				r.SparseVectorsConfig = qdrant.NewSparseVectorsConfig(map[string]*qdrant.SparseVectorParams{"s": {Modifier: qdrant.Modifier_Idf.Enum()}})
			})
		},
		"custom sharding": func() error {
			return create(func(r *qdrant.CreateCollection) { r.ShardingMethod = qdrant.ShardingMethod_Custom.Enum() })
		},
		"rate limit": func() error {
			return create(func(r *qdrant.CreateCollection) {
				r.StrictModeConfig = &qdrant.StrictModeConfig{Enabled: qdrant.PtrOf(true), WriteRateLimit: qdrant.PtrOf(uint32(1))}
			})
		},
		"geo index": func() error {
			_, err := c.CreateFieldIndex(ctx, &qdrant.CreateFieldIndexCollection{CollectionName: name, FieldName: "g", FieldType: qdrant.FieldType_FieldTypeGeo.Enum()})
			return err
		},
		"newer field of a request": func() error {
			req := &qdrant.CountPoints{CollectionName: name}
			req.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 999, protowire.VarintType), 1))
			_, err := c.Count(ctx, req)
			return err
		},
		"newer condition": func() error {
			cond := &qdrant.Condition{}
			cond.ProtoReflect().SetUnknown(protowire.AppendBytes(protowire.AppendTag(nil, 8, protowire.BytesType), nil))
			_, err := c.Delete(ctx, &qdrant.DeletePoints{CollectionName: name, Points: qdrant.NewPointsSelectorFilter(&qdrant.Filter{Must: []*qdrant.Condition{cond}})})
			return err
		},
		"newer field of a point": func() error {
			p := &qdrant.PointStruct{Id: qdrant.NewIDNum(1), Vectors: qdrant.NewVectors(1, 2)}
			p.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 999, protowire.VarintType), 1))
			_, err := c.Upsert(ctx, &qdrant.UpsertPoints{CollectionName: name, Points: []*qdrant.PointStruct{p}})
			return err
		},
	} {
		if err := call(); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v, want Unimplemented", what, err)
		}
	}
}

// TestRestart: what is not in the log of a collection survives too.
func TestRestart(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := t.TempDir()
	s := open(t, dir, Options{})
	c := dial(t, s)
	req := &qdrant.CreateCollection{
		CollectionName: "r", VectorsConfig: qdrant.NewVectorsConfig(&qdrant.VectorParams{Size: 2, Distance: qdrant.Distance_Cosine}),
		StrictModeConfig: &qdrant.StrictModeConfig{Enabled: qdrant.PtrOf(true), MaxQueryLimit: qdrant.PtrOf(uint32(5))},
	}
	if err := c.CreateCollection(ctx, req); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CreateFieldIndex(ctx, &qdrant.CreateFieldIndexCollection{CollectionName: "r", FieldName: "k", FieldType: qdrant.FieldType_FieldTypeKeyword.Enum()}); err != nil {
		t.Fatal(err)
	}
	if err := c.CreateAlias(ctx, "alias", "r"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Upsert(ctx, &qdrant.UpsertPoints{CollectionName: "alias", Points: []*qdrant.PointStruct{{Id: qdrant.NewIDNum(1), Vectors: qdrant.NewVectors(1, 2), Payload: qdrant.NewValueMap(map[string]any{"k": "x"})}}}); err != nil {
		t.Fatal(err)
	}
	if err := c.UpdateCollection(ctx, &qdrant.UpdateCollection{CollectionName: "r", StrictModeConfig: &qdrant.StrictModeConfig{MaxQueryLimit: qdrant.PtrOf(uint32(7))}}); err != nil {
		t.Fatal(err)
	}
	before, err := c.GetCollectionInfo(ctx, "r")
	if err != nil {
		t.Fatal(err)
	}
	hits, err := c.Query(ctx, &qdrant.QueryPoints{CollectionName: "r", Query: qdrant.NewQuery(1, 2), Limit: qdrant.PtrOf(uint64(5))})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	c = dial(t, open(t, dir, Options{}))
	after, err := c.GetCollectionInfo(ctx, "alias")
	if err != nil || !proto.Equal(before, after) {
		t.Errorf("%v\n%v\n%v", err, before, after)
	}
	again, err := c.Query(ctx, &qdrant.QueryPoints{CollectionName: "alias", Query: qdrant.NewQuery(1, 2), Limit: qdrant.PtrOf(uint64(5))})
	if err != nil || len(again) != 1 || !proto.Equal(hits[0], again[0]) {
		t.Errorf("%v\n%v\n%v", err, hits, again)
	}
	if _, err := c.Scroll(ctx, &qdrant.ScrollPoints{CollectionName: "r", Limit: qdrant.PtrOf(uint32(8))}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("strict mode after a restart: %v", err)
	}
	fh, err := c.Facet(ctx, &qdrant.FacetCounts{CollectionName: "r", Key: "k", Limit: qdrant.PtrOf(uint64(5))})
	if err != nil || len(fh) != 1 || fh[0].GetCount() != 1 {
		t.Errorf("facet after a restart: %v, %v", fh, err)
	}
}

// TestDeadline: a call's timeout and its cancellation end it.
func TestDeadline(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), Options{fsync: noSync})
	c := dial(t, s)
	fill(t, c, "d", 2000, 8)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	ps := &pointsService{s: s}
	if _, err := ps.Query(ctx, &qdrant.QueryPoints{CollectionName: "d", Query: qdrant.NewQuery(1, 2, 3, 4, 5, 6, 7, 8), Using: qdrant.PtrOf("dense")}); !errors.Is(err, context.Canceled) {
		t.Errorf("query: %v", err)
	}
	if _, err := ps.Scroll(ctx, &qdrant.ScrollPoints{CollectionName: "d"}); !errors.Is(err, context.Canceled) {
		t.Errorf("scroll: %v", err)
	}
}

// TestConcurrent runs readers and writers of every kind at once; with -race it looks for
// unguarded state.
func TestConcurrent(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), Options{LogLimitBytes: 100_000, fsync: noSync})
	c := dial(t, s)
	fill(t, c, "c", 3000, 16)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	run := func(f func(r *rand.Rand) error) {
		seed := rand.Uint64()
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, 1))
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := f(r); err != nil {
					t.Errorf("seed %d: %v", seed, err)
					return
				}
			}
		})
	}
	ctx := t.Context()
	owner := &qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewMatch("_owner", "0189abcd-ef01-7234-8567-89abcdef0123")}}
	query := qdrant.NewQueryDense(make([]float32, 16))
	run(func(r *rand.Rand) error {
		_, err := c.Upsert(ctx, &qdrant.UpsertPoints{CollectionName: "c", Wait: qdrant.PtrOf(r.IntN(2) == 0), Points: []*qdrant.PointStruct{benchPoint(r, r.IntN(100), 16)}})
		return err
	})
	run(func(r *rand.Rand) error {
		ps, err := c.Scroll(ctx, &qdrant.ScrollPoints{CollectionName: "c", Offset: qdrant.NewID(pointID{hi: r.Uint64(), uuid: true}.uuidText()), Limit: qdrant.PtrOf(uint32(50)), WithVectors: qdrant.NewWithVectors(true)})
		if err != nil || len(ps) == 0 {
			return err
		}
		_, err = c.Delete(ctx, &qdrant.DeletePoints{CollectionName: "c", Points: qdrant.NewPointsSelector(ps[0].GetId())})
		return err
	})
	run(func(*rand.Rand) error {
		_, err := c.Query(ctx, &qdrant.QueryPoints{CollectionName: "c", Query: query, Using: qdrant.PtrOf("dense"), Filter: owner, WithPayload: qdrant.NewWithPayload(true)})
		return err
	})
	run(func(*rand.Rand) error {
		_, err := c.Facet(ctx, &qdrant.FacetCounts{CollectionName: "c", Key: "_bucket", Filter: owner})
		return err
	})
	run(func(r *rand.Rand) error {
		v := float64(r.IntN(100))
		_, err := c.SetPayload(ctx, &qdrant.SetPayloadPoints{CollectionName: "c", Payload: qdrant.NewValueMap(map[string]any{"_mv": r.IntN(100)}),
			PointsSelector: qdrant.NewPointsSelectorFilter(&qdrant.Filter{Must: []*qdrant.Condition{qdrant.NewRange("_mv", &qdrant.Range{Lt: &v})}})})
		return err
	})
	run(func(r *rand.Rand) error {
		if r.IntN(2) == 0 {
			_, err := c.CreateFieldIndex(ctx, &qdrant.CreateFieldIndexCollection{CollectionName: "c", FieldName: "_mv", FieldType: qdrant.FieldType_FieldTypeInteger.Enum()})
			return err
		}
		_, err := c.DeleteFieldIndex(ctx, &qdrant.DeleteFieldIndexCollection{CollectionName: "c", FieldName: "_mv"})
		return err
	})
	run(func(*rand.Rand) error {
		req := &qdrant.CreateCollection{CollectionName: "e", VectorsConfig: qdrant.NewVectorsConfig(&qdrant.VectorParams{Size: 2, Distance: qdrant.Distance_Dot})}
		if err := c.CreateCollection(ctx, req); err != nil {
			return err
		}
		if _, err := c.GetCollectionInfo(ctx, "c"); err != nil {
			return err
		}
		return c.DeleteCollection(ctx, "e")
	})
	run(func(*rand.Rand) error {
		_, err := c.Upsert(ctx, &qdrant.UpsertPoints{CollectionName: "e", Wait: qdrant.PtrOf(true), Points: []*qdrant.PointStruct{{Id: qdrant.NewIDNum(1), Vectors: qdrant.NewVectors(1, 2)}}})
		if code := status.Code(err); code != codes.OK && code != codes.NotFound {
			return err
		}
		return nil
	})
	timer := time.NewTimer(1500 * time.Millisecond)
	<-timer.C
	close(stop)
	wg.Wait()
	checkInvariants(t, s, "c")
}
