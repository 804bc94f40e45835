package qdrantlocal

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/store/storetest"
)

// childDir names the variable that makes the test binary a server on a directory.
const childDir = "QDRANTLOCAL_TEST_CHILD_DIR"

// runChild serves until it is killed.
func runChild(dir string) error {
	s, err := Open(dir, Options{LogLimitBytes: 300_000})
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	return s.Serve(l)
}

// startChild runs a server in a process of its own and returns its address.
func startChild(t *testing.T, dir string) (addr string, kill func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	kill = func() {
		once.Do(func() {
			if err := cmd.Process.Kill(); err != nil {
				t.Errorf("killing: %v", err)
			}
			_ = cmd.Wait() // it ends by the signal, which is an error
		})
	}
	t.Cleanup(kill)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the child does not serve: %v", err)
	}
	return strings.TrimSpace(line), kill
}

// TestKill kills a server under load from several clients, again and again: whatever was
// acknowledged is there afterwards, and nothing that was never sent.
func TestKill(t *testing.T) {
	t.Parallel()
	const clients, keys = 4, 40
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	dir := t.TempDir()
	// known[client][key] is the version last acknowledged, 0 for deleted; unsure the version
	// of a write whose answer never came.
	type knowledge struct {
		known, unsure map[uint64]int64
	}
	state := make([]knowledge, clients)
	for i := range state {
		state[i] = knowledge{map[uint64]int64{}, map[uint64]int64{}}
	}
	version := make([]int64, clients)
	acknowledged := 0
	for round := range rounds {
		addr, kill := startChild(t, dir)
		if round == 0 {
			c := storetest.Dial(t, addr)
			err := c.CreateCollection(t.Context(), &qdrant.CreateCollection{
				CollectionName: "kill",
				VectorsConfig:  qdrant.NewVectorsConfig(&qdrant.VectorParams{Size: 64, Distance: qdrant.Distance_Dot}),
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		r := rand.New(rand.NewPCG(seed, uint64(round)))
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var mu sync.Mutex
		for w := range clients {
			c := storetest.Dial(t, addr)
			wr := rand.New(rand.NewPCG(seed, uint64(round*clients+w+1000)))
			wg.Go(func() {
				k := &state[w]
				for ctx.Err() == nil {
					id := uint64(w*keys + wr.IntN(keys))
					version[w]++
					v := version[w]
					var err error
					if wr.IntN(4) == 0 {
						v = 0
						_, err = c.Delete(ctx, &qdrant.DeletePoints{CollectionName: "kill", Wait: qdrant.PtrOf(true), Points: qdrant.NewPointsSelector(qdrant.NewIDNum(id))})
					} else {
						vec := make([]float32, 64)
						vec[0] = float32(v)
						_, err = c.Upsert(ctx, &qdrant.UpsertPoints{CollectionName: "kill", Wait: qdrant.PtrOf(true), Points: []*qdrant.PointStruct{{
							Id: qdrant.NewIDNum(id), Vectors: qdrant.NewVectorsDense(vec), Payload: qdrant.NewValueMap(map[string]any{"v": v}),
						}}})
					}
					if err != nil {
						k.unsure[id] = v
						return
					}
					k.known[id] = v
					delete(k.unsure, id)
					mu.Lock()
					acknowledged++
					mu.Unlock()
				}
			})
		}
		// The moment of the kill is random; there is no event to wait for.
		timer := time.NewTimer(time.Duration(50+r.IntN(250)) * time.Millisecond)
		<-timer.C
		kill()
		cancel()
		wg.Wait()

		s, err := Open(dir, Options{})
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		c, err := s.find("kill")
		if err != nil {
			t.Fatal(err)
		}
		for w := range state {
			for id := uint64(w * keys); id < uint64((w+1)*keys); id++ {
				got := int64(0)
				if slot, ok := c.slotOf(pointID{lo: id}); ok {
					m, err := decodePayload(c.payloads.at(slot))
					if err != nil {
						t.Fatal(err)
					}
					got = m["v"].GetIntegerValue()
					if x := c.vectors[0].row(slot)[0]; x != float32(got) {
						t.Errorf("round %d: point %d has payload %d and vector %v", round, id, got, x)
					}
				}
				maybe, unsure := state[w].unsure[id]
				if got != state[w].known[id] && (!unsure || got != maybe) {
					t.Errorf("round %d: point %d is at %d, acknowledged %d (unanswered: %v %d)", round, id, got, state[w].known[id], unsure, maybe)
				}
				state[w].known[id] = got
				delete(state[w].unsure, id)
			}
		}
		checkInvariants(t, s, "kill")
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d writes acknowledged over %d kills", acknowledged, rounds)
	if acknowledged < rounds {
		t.Errorf("only %d writes were acknowledged", acknowledged)
	}
}
