package qdrantlocal

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/qdrant/go-client/qdrant"
)

// copyDir copies a data directory as a crash at this moment would leave it.
func copyDir(t testing.TB, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if e.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), b, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// onlyFile finds the one file of the one collection whose name begins with prefix.
func onlyFile(t testing.TB, dir, prefix string) string {
	t.Helper()
	m, err := filepath.Glob(filepath.Join(dir, collectionsDir, "*", prefix+"*"))
	if err != nil || len(m) != 1 {
		t.Fatalf("%s*: %v, %v", prefix, m, err)
	}
	return m[0]
}

// reopen opens a directory and returns its collection as text, or the error.
func reopen(t testing.TB, dir string) (string, error) {
	t.Helper()
	s, err := Open(dir, Options{fsync: noSync})
	if err != nil {
		return "", err
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	checkInvariants(t, s, "model")
	return stored(t, s, "model").text(), nil
}

// TestTornTail cuts the log at every byte: what was complete is served, what was not is
// dropped.
func TestTornTail(t *testing.T) {
	t.Parallel()
	for _, wait := range []bool{true, false} {
		t.Run(fmt.Sprintf("wait=%v", wait), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := open(t, dir, Options{fsync: noSync})
			d := newDriver(t, s, 3)
			c, err := s.find(d.name)
			if err != nil {
				t.Fatal(err)
			}
			// ends[i] is where the log ended after i operations, states[i] what it held.
			ends, states := []int64{fileHeader}, []string{d.want.text()}
			for range 25 {
				d.step(wait)
				ends = append(ends, recordsEnd(c))
				states = append(states, d.want.text())
			}
			whole := t.TempDir()
			copyDir(t, dir, whole)
			log := onlyFile(t, whole, logPrefix)
			content, err := os.ReadFile(log)
			if err != nil {
				t.Fatal(err)
			}
			for cut := range len(content) + 1 {
				if err := os.WriteFile(log, content[:cut], 0o600); err != nil {
					t.Fatal(err)
				}
				got, err := reopen(t, whole)
				if cut < fileHeader {
					var damage *CorruptionError
					if !errors.As(err, &damage) {
						t.Fatalf("cut at %d, inside the header: %v", cut, err)
					}
					continue
				}
				if err != nil {
					t.Fatalf("cut at %d: %v", cut, err)
				}
				last := 0
				for i, end := range ends {
					if end <= int64(cut) {
						last = i
					}
				}
				if got != states[last] {
					t.Fatalf("cut at %d, after operation %d:\ngot  %s\nwant %s", cut, last, got, states[last])
				}
			}
		})
	}
}

// recordsEnd is where the last record ends that is not a sync mark.
func recordsEnd(c *collection) int64 {
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	end, _ := c.log.cur.dirty()
	return end
}

// TestDamage flips every byte of the log of acknowledged operations: that is reported and
// never served, nor silently dropped.
func TestDamage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, Options{fsync: noSync})
	d := newDriver(t, s, 5)
	for range 12 {
		d.step(true)
	}
	c, err := s.find(d.name)
	if err != nil {
		t.Fatal(err)
	}
	acknowledged := recordsEnd(c)
	whole := t.TempDir()
	copyDir(t, dir, whole)
	log := onlyFile(t, whole, logPrefix)
	content, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for at := range content {
		damaged := append([]byte(nil), content...)
		damaged[at] ^= 0x40
		if err := os.WriteFile(log, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := reopen(t, whole)
		var damage *CorruptionError
		switch {
		case errors.As(err, &damage):
			if damage.File != log || int64(at) < damage.Offset {
				t.Fatalf("byte %d: reported as %v", at, damage)
			}
		case err != nil:
			t.Fatalf("byte %d: %v", at, err)
		case int64(at) < acknowledged:
			t.Fatalf("byte %d of acknowledged data flipped and nobody noticed", at)
		case got != d.want.text():
			t.Fatalf("byte %d: served %s, want %s", at, got, d.want.text())
		}
		// The refusal changes nothing: restored, the file opens.
	}
	if err := os.WriteFile(log, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := reopen(t, whole); err != nil || got != d.want.text() {
		t.Fatalf("restored: %v, %s", err, got)
	}
}

// TestSnapshotDamage flips bytes of a snapshot.
func TestSnapshotDamage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, Options{fsync: noSync})
	d := newDriver(t, s, 6)
	for range 60 {
		d.step(true)
	}
	c, err := s.find(d.name)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.log.compact(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	whole := t.TempDir()
	copyDir(t, dir, whole)
	snap := onlyFile(t, whole, snapPrefix)
	content, err := os.ReadFile(snap)
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string, damaged []byte) {
		t.Helper()
		if err := os.WriteFile(snap, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := reopen(t, whole)
		var damage *CorruptionError
		if !errors.As(err, &damage) || damage.File != snap {
			t.Fatalf("%s: %v", what, err)
		}
	}
	for at := range content {
		damaged := append([]byte(nil), content...)
		damaged[at] ^= 1
		check(fmt.Sprintf("byte %d flipped", at), damaged)
	}
	for cut := 0; cut < len(content); cut += 3 {
		check(fmt.Sprintf("cut at %d", cut), content[:cut])
	}
	if err := os.Remove(snap); err != nil {
		t.Fatal(err)
	}
	_, err = reopen(t, whole)
	var damage *CorruptionError
	if !errors.As(err, &damage) {
		t.Fatalf("snapshot removed: %v", err)
	}
}

// TestUnsyncedHole: after a loss of power a record may be missing in front of a later one
// that made it to the disk. Neither was promised: both are dropped.
func TestUnsyncedHole(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, Options{fsync: noSync})
	d := newDriver(t, s, 8)
	for range 10 {
		d.step(true)
	}
	before := d.want.text()
	c, err := s.find(d.name)
	if err != nil {
		t.Fatal(err)
	}
	hole := recordsEnd(c)
	for recordsEnd(c) == hole {
		d.step(false)
	}
	first := recordsEnd(c)
	for recordsEnd(c) == first {
		d.step(false)
	}
	lost := t.TempDir()
	copyDir(t, dir, lost)
	log := onlyFile(t, lost, logPrefix)
	content, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for i := first - 20; i < first; i++ {
		content[i] = 0
	}
	if err := os.WriteFile(log, content, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := reopen(t, lost)
	if err != nil || got != before {
		t.Fatalf("%v\ngot  %s\nwant %s", err, got, before)
	}
	// The cut is final: what is written next is not followed by the dropped record.
	again, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if int64(len(again)) >= first {
		t.Errorf("the log still has %d bytes, the hole is at %d", len(again), hole)
	}
}

// TestCrashAnywhere copies the directory at every sync of a life of writes, compactions,
// new indexes and deleted collections: each copy opens and holds what was acknowledged.
func TestCrashAnywhere(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	dir := filepath.Join(root, "live")
	var mu sync.Mutex
	var copies []string
	type promise struct{ least, most string }
	promised := map[string]promise{}
	least, most := "", ""
	crash := func(*os.File) error {
		mu.Lock()
		defer mu.Unlock()
		to := filepath.Join(root, fmt.Sprintf("copy%d", len(copies)))
		copyDir(t, dir, to)
		copies = append(copies, to)
		promised[to] = promise{least, most}
		return nil
	}
	s, err := Open(dir, Options{fsync: crash, LogLimitBytes: 1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	d := newDriver(t, s, 9)
	c, err := s.find(d.name)
	if err != nil {
		t.Fatal(err)
	}
	least = d.want.text()
	most = least
	for i := range 90 {
		before := d.want.clone()
		// The operation that is under way may or may not have happened.
		mu.Lock()
		least, most = before.text(), "?"
		mu.Unlock()
		first := len(copies)
		d.step(true)
		mu.Lock()
		for _, cp := range copies[first:] {
			promised[cp] = promise{before.text(), d.want.text()}
		}
		least, most = d.want.text(), d.want.text()
		mu.Unlock()
		if i%15 == 7 {
			if err := c.log.compact(t.Context(), c); err != nil {
				t.Fatal(err)
			}
		}
		if i%20 == 3 {
			cs := &collectionsService{s: s}
			if _, err := cs.Create(t.Context(), &qdrant.CreateCollection{CollectionName: "other", VectorsConfig: qdrant.NewVectorsConfig(&qdrant.VectorParams{Size: 2, Distance: qdrant.Distance_Dot})}); err != nil {
				t.Fatal(err)
			}
			if _, err := cs.Delete(t.Context(), &qdrant.DeleteCollection{CollectionName: "other"}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	opened := 0
	for _, cp := range copies {
		want := promised[cp]
		if want.least == "" {
			continue // the collection was being made
		}
		got, err := reopen(t, cp)
		if err != nil {
			t.Fatalf("%s: %v", filepath.Base(cp), err)
		}
		if got != want.least && got != want.most {
			t.Fatalf("%s:\ngot  %s\nwant %s\nor   %s", filepath.Base(cp), got, want.least, want.most)
		}
		// Opened once, it opens again the same.
		if again, err := reopen(t, cp); err != nil || again != got {
			t.Fatalf("%s, a second time: %v", filepath.Base(cp), err)
		}
		opened++
	}
	if opened < 100 {
		t.Errorf("only %d crashes were tried", opened)
	}
}

// TestCompactionSteps interrupts a compaction between its steps by leaving out files.
func TestCompactionSteps(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, Options{fsync: noSync})
	d := newDriver(t, s, 10)
	for range 40 {
		d.step(true)
	}
	old := t.TempDir()
	copyDir(t, dir, old)
	c, err := s.find(d.name)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.log.compact(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		d.step(true)
	}
	oldLog := filepath.Base(onlyFile(t, old, logPrefix))
	newSnap := filepath.Base(onlyFile(t, dir, snapPrefix))
	rel, err := filepath.Rel(dir, filepath.Dir(onlyFile(t, dir, snapPrefix)))
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(at string) error{
		"nothing removed yet": func(at string) error {
			return copyFile(filepath.Join(old, rel, oldLog), filepath.Join(at, rel, oldLog))
		},
		"snapshot not renamed yet": func(at string) error {
			return errors.Join(copyFile(filepath.Join(old, rel, oldLog), filepath.Join(at, rel, oldLog)),
				os.Rename(filepath.Join(at, rel, newSnap), filepath.Join(at, rel, newSnap+tempSuffix)))
		},
		"snapshot half written": func(at string) error {
			p := filepath.Join(at, rel, newSnap)
			return errors.Join(copyFile(filepath.Join(old, rel, oldLog), filepath.Join(at, rel, oldLog)),
				os.Truncate(p, 100), os.Rename(p, p+tempSuffix))
		},
	} {
		at := t.TempDir()
		copyDir(t, dir, at)
		if err := change(at); err != nil {
			t.Fatal(err)
		}
		got, err := reopen(t, at)
		if err != nil || got != d.want.text() {
			t.Errorf("%s: %v\ngot  %s\nwant %s", what, err, got, d.want.text())
		}
		files, err := os.ReadDir(filepath.Join(at, rel))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if strings.HasSuffix(f.Name(), tempSuffix) {
				t.Errorf("%s: %s remains", what, f.Name())
			}
		}
	}
	// A new log whose header did not reach the disk was never written to.
	at := t.TempDir()
	copyDir(t, old, at)
	if err := os.WriteFile(filepath.Join(at, rel, logPrefix+"0000000000000002"), []byte("LSQ"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := reopen(t, at); err != nil {
		t.Errorf("log without a header: %v", err)
	}
	// A log that is missing in the middle is not passed over.
	if err := os.Rename(filepath.Join(at, rel, logPrefix+"0000000000000002"), filepath.Join(at, rel, logPrefix+"0000000000000003")); err != nil {
		t.Fatal(err)
	}
	_, err = reopen(t, at)
	var damage *CorruptionError
	if !errors.As(err, &damage) {
		t.Errorf("a log is missing: %v", err)
	}
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o600)
}

// TestCatalogueDamage: a damaged catalogue is reported, and no collection is removed for
// not being named in it.
func TestCatalogueDamage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := Open(dir, Options{fsync: noSync})
	if err != nil {
		t.Fatal(err)
	}
	d := newDriver(t, s, 12)
	for range 5 {
		d.step(true)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, catalogueFile)
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var damage *CorruptionError
	for at := range content {
		damaged := append([]byte(nil), content...)
		damaged[at] ^= 4
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir, Options{}); !errors.As(err, &damage) {
			t.Fatalf("byte %d: %v", at, err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, Options{}); !errors.As(err, &damage) {
		t.Fatalf("removed: %v", err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := reopen(t, dir); err != nil || got != d.want.text() {
		t.Fatalf("restored: %v", err)
	}
}

// TestSyncFailure: after a failed fsync a write is never acknowledged, not even when the
// next fsync would succeed.
func TestSyncFailure(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var mu sync.Mutex
	broken := false
	s, err := Open(dir, Options{
		Logger: slog.New(slog.DiscardHandler),
		fsync: func(*os.File) error {
			mu.Lock()
			defer mu.Unlock()
			if broken {
				return errors.New("disk on fire")
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	d := newDriver(t, s, 13)
	put := func() error {
		_, err := d.ps.Upsert(t.Context(), &qdrant.UpsertPoints{CollectionName: d.name, Wait: qdrant.PtrOf(true), Points: []*qdrant.PointStruct{{Id: qdrant.NewIDNum(1), Vectors: qdrant.NewVectorsMap(nil)}}})
		return err
	}
	if err := put(); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	broken = true
	mu.Unlock()
	if err := put(); err == nil {
		t.Error("acknowledged without a sync")
	}
	mu.Lock()
	broken = false
	mu.Unlock()
	if err := put(); err == nil {
		t.Error("acknowledged after a failed sync")
	}
	if err := s.Close(); err != nil {
		t.Log("closing:", err)
	}
	s, err = Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.attach(s)
	if err := put(); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
