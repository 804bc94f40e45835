package campaign

import (
	"flag"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/lockstep-db/lockstep/store/postgres/pgtest"
	"github.com/lockstep-db/lockstep/store/qdranttest"
)

var (
	flagSeed    = flag.Uint64("campaign.seed", 0, "the first history's seed; 0 draws one. With -campaign.n=1 it is replayed alone")
	flagN       = flag.Int("campaign.n", 0, "how many histories; 0 runs for campaign.time")
	flagTime    = flag.Duration("campaign.time", 45*time.Second, "how long to go on where campaign.n is 0")
	flagWorkers = flag.Int("campaign.workers", 2, "histories side by side, each with stores of its own")
)

// TestCampaign runs random histories and checks the promises P1 to P7. P8 has histories of its
// own, in rollback_test.go.
func TestCampaign(t *testing.T) {
	base := *flagSeed
	if base == 0 {
		base = rand.Uint64()>>24 | 1
	}
	t.Logf("first seed %d", base)
	begin := time.Now()
	var mu sync.Mutex
	var all stats
	next := uint64(0)
	take := func() (uint64, bool) {
		mu.Lock()
		defer mu.Unlock()
		if t.Failed() || *flagN > 0 && next >= uint64(*flagN) || *flagN == 0 && time.Since(begin) > *flagTime {
			return 0, false
		}
		next++
		return base + next - 1, true
	}
	var workers sync.WaitGroup
	for range *flagWorkers {
		// One installation for each server: an index that another one is just creating has no stamp
		// yet, and grace is too short here to wait for it.
		r := newRig(t, pgtest.New(t), qdranttest.Child(t))
		workers.Go(func() {
			for {
				seed, ok := take()
				if !ok {
					return
				}
				s := newHistory(t, r, seed).run()
				mu.Lock()
				all.add(s)
				if all.histories%100 == 0 {
					t.Logf("after %v: %+v", time.Since(begin).Round(time.Second), all)
				}
				mu.Unlock()
				if t.Failed() {
					t.Errorf("replay with: make campaign SEED=%d N=1", seed)
				}
			}
		})
	}
	workers.Wait()
	took := time.Since(begin)
	t.Logf("%d histories from seed %d in %v (%.1f a second): %+v", all.histories, base, took.Round(time.Millisecond), float64(all.histories)/took.Seconds(), all)
	if all.histories >= 20 && (all.faults == 0 || all.kills == 0 || all.searches == 0 || all.reconciles == 0 || all.late == 0) {
		t.Error("the campaign reached no fault, killed nobody, or delivered nothing late: it proves nothing")
	}
}
