package qdrantlocal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A collection's directory holds generations. snap-G is the whole collection as it was when
// log-G was begun, or a little newer; log-G and its successors hold what changed since.
//
//	compaction: sync log-G, begin log-G+1, write snap-G+1 beside, rename it, remove older
//
// Whichever step a crash interrupts, the newest complete snapshot and the logs from its
// generation on are there. A snapshot may hold changes that the log behind it repeats:
// records set absolute state, so repeating them in order ends in the same state.
const (
	logPrefix  = "log-"
	snapPrefix = "snap-"
	tempSuffix = ".tmp"

	// snapshotRecord is the size of a snapshot's records, written under one hold of the
	// read lock: about 1 ms.
	snapshotRecord = 1 << 20

	// compactRetry is the pause after a compaction failed, most likely for want of space.
	compactRetry = 30 * time.Second
)

// store is a collection's files.
type store struct {
	dir    string
	fsync  func(*os.File) error
	limit  int64
	logger *slog.Logger

	mu sync.Mutex
	// cur is the log being written; generation is its number.
	cur        *logFile
	generation uint64
	// older is the size of complete logs that the newest snapshot does not cover.
	older    int64
	snapshot int64
	// compacting is closed when the compaction that is under way ends, nil if none is.
	compacting chan struct{}
	// retry is when a compaction may be tried again after one failed.
	retry  time.Time
	closed bool
}

// ticket is a place in a log to wait for.
type ticket struct {
	log *logFile
	end int64
}

// wait returns when the record is on disk.
func (t ticket) wait() error {
	if t.log == nil {
		return nil
	}
	return t.log.wait(t.end)
}

func generationPath(dir, prefix string, g uint64) string {
	return filepath.Join(dir, fmt.Sprintf("%s%016x", prefix, g))
}

// createStore makes the directory of a new collection, durable before it returns.
func createStore(dir string, limit int64, fsync func(*os.File) error, logger *slog.Logger) (*store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s := &store{dir: dir, fsync: fsync, limit: limit, logger: logger, generation: 1}
	var err error
	if s.cur, err = createLog(generationPath(dir, logPrefix, 1), 1, fsync); err != nil {
		return nil, err
	}
	return s, syncDir(filepath.Dir(dir), fsync)
}

func (s *store) append(buf []byte, seq uint64) (ticket, error) {
	s.mu.Lock()
	log := s.cur
	s.mu.Unlock()
	end, err := log.append(buf, seq)
	return ticket{log, end}, err
}

// threshold is the size of logs at which the collection is compacted: as much as the
// snapshot, so that rewriting costs at most as many bytes as were written before it.
func (s *store) threshold() int64 { return max(s.limit, s.snapshot) }

// due reports whether a compaction should begin, and a channel to wait for if writers have
// outrun the one that is under way so far that disk use would no longer be bounded.
func (s *store) due() (begin bool, wait <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	size := s.older + s.cur.size()
	if s.compacting == nil {
		return size > s.threshold() && !s.closed && time.Now().After(s.retry), nil
	}
	if size > 4*s.threshold() {
		return false, s.compacting
	}
	return false, nil
}

// flush brings the current log to disk.
func (s *store) flush() error {
	s.mu.Lock()
	log := s.cur
	s.mu.Unlock()
	end, dirty := log.dirty()
	if !dirty {
		return nil
	}
	err := log.wait(end)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil // the collection was deleted meanwhile
	}
	return err
}

// close brings the log to disk and closes it. Nobody writes any more.
func (s *store) close() error {
	err := s.flush()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	return errors.Join(err, s.cur.f.Close())
}

// compact writes a snapshot of c and removes the files that it makes superfluous. Writers
// wait only while the log is switched. One compaction runs at a time; a second returns. A
// context that ends leaves the files as an interrupted compaction does.
func (s *store) compact(ctx context.Context, c *collection) (err error) {
	s.mu.Lock()
	if s.compacting != nil || s.closed {
		s.mu.Unlock()
		return nil
	}
	done := make(chan struct{})
	s.compacting = done
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.compacting = nil
		if err != nil {
			s.retry = time.Now().Add(compactRetry)
		}
		s.mu.Unlock()
		close(done)
	}()

	c.writer.Lock()
	err = s.rotate()
	generation := s.generation
	seq := c.seq
	c.writer.Unlock()
	if err != nil {
		return fmt.Errorf("switching the log: %w", err)
	}
	size, err := s.writeSnapshot(ctx, c, generation, seq)
	if err != nil {
		return fmt.Errorf("writing a snapshot: %w", err)
	}
	s.mu.Lock()
	s.snapshot, s.older = size, 0
	s.mu.Unlock()
	return s.removeOlder(generation)
}

// rotate begins the next log. The caller holds the collection's writer lock.
func (s *store) rotate() error {
	s.mu.Lock()
	old, next := s.cur, s.generation+1
	s.mu.Unlock()
	// The old log must be complete before anything is written behind it: the reader takes
	// a torn end for damage in every log but the last.
	if err := old.wait(old.size()); err != nil {
		return err
	}
	log, err := createLog(generationPath(s.dir, logPrefix, next), next, s.fsync)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.cur, s.generation = log, next
	s.older += old.size()
	s.mu.Unlock()
	return old.f.Close()
}

func (s *store) writeSnapshot(ctx context.Context, c *collection, generation, seq uint64) (size int64, err error) {
	path := generationPath(s.dir, snapPrefix, generation)
	f, err := os.OpenFile(path+tempSuffix, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(path+tempSuffix))
		}
	}()
	id, err := newFileID(generation)
	if err != nil {
		return 0, err
	}
	if _, err = f.Write(encodeHeader(id)); err != nil {
		return 0, err
	}
	size = fileHeader
	var buf []byte
	write := func() error {
		sealRecord(buf, id, seq, 0)
		n, err := f.Write(buf)
		size += int64(n)
		return err
	}
	var from pointID
	total := 0
	for done := false; !done; {
		if err = ctx.Err(); err != nil {
			return 0, err
		}
		var n int
		buf, from, n, done = c.snapshotChunk(beginRecord(buf, recordPoints), from, snapshotRecord)
		if total += n; n > 0 {
			if err = write(); err != nil {
				return 0, err
			}
		}
	}
	buf = appendCount(beginRecord(buf, recordEnd), total)
	if err = write(); err != nil {
		return 0, err
	}
	if err = s.fsync(f); err != nil {
		return 0, err
	}
	if err = f.Close(); err != nil {
		return 0, err
	}
	if err = os.Rename(path+tempSuffix, path); err != nil {
		return 0, err
	}
	return size, syncDir(s.dir, s.fsync)
}

// removeOlder deletes the files that the snapshot of generation supersedes.
func (s *store) removeOlder(generation uint64) error {
	files, err := listFiles(s.dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		if f.generation < generation || f.temp {
			err = errors.Join(err, os.Remove(filepath.Join(s.dir, f.name)))
		}
	}
	return err
}

// dataFile is a file of a collection's directory.
type dataFile struct {
	name       string
	snapshot   bool
	temp       bool
	generation uint64
}

func listFiles(dir string) ([]dataFile, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []dataFile
	for _, e := range entries {
		f := dataFile{name: e.Name()}
		base, temp := strings.CutSuffix(f.name, tempSuffix)
		f.temp = temp
		hex, ok := strings.CutPrefix(base, logPrefix)
		if !ok {
			if hex, ok = strings.CutPrefix(base, snapPrefix); !ok {
				continue
			}
			f.snapshot = true
		}
		if f.generation, err = strconv.ParseUint(hex, 16, 64); err != nil {
			continue
		}
		out = append(out, f)
	}
	return out, nil
}

// loadStore reads a collection's directory into c, which must be empty, and leaves it ready
// for writing. A torn end of the last log is cut off and logged; any other damage is a
// *CorruptionError and changes nothing.
func loadStore(c *collection, limit int64, fsync func(*os.File) error, logger *slog.Logger) (*store, error) {
	files, err := listFiles(c.dir)
	if err != nil {
		return nil, err
	}
	s := &store{dir: c.dir, fsync: fsync, limit: limit, logger: logger}
	first := uint64(1)
	for _, f := range files {
		if f.snapshot && !f.temp {
			first = max(first, f.generation)
		}
	}
	var logs []uint64
	snap := ""
	for _, f := range files {
		switch {
		case f.temp || f.generation < first:
		case f.snapshot:
			snap = filepath.Join(c.dir, f.name)
		default:
			logs = append(logs, f.generation)
		}
	}
	if snap != "" {
		if s.snapshot, err = readSnapshot(c, snap); err != nil {
			return nil, err
		}
	}
	slices.Sort(logs)
	for i, g := range logs {
		if g != first+uint64(i) {
			return nil, &CorruptionError{File: generationPath(c.dir, logPrefix, first+uint64(i)), Reason: "the file is missing"}
		}
	}
	if len(logs) == 0 {
		return nil, &CorruptionError{File: generationPath(c.dir, logPrefix, first), Reason: "the file is missing"}
	}
	for i, g := range logs {
		if err := s.readLog(c, g, i == 0, i == len(logs)-1); err != nil {
			return nil, err
		}
	}
	return s, s.removeOlder(first)
}

// readSnapshot reads a snapshot, which is complete or damaged: it got its name only when it
// was on disk.
func readSnapshot(c *collection, path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	size, err := replaySnapshot(c, f, path)
	return size, errors.Join(err, f.Close())
}

func replaySnapshot(c *collection, f *os.File, path string) (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	l, ok, err := openReader(f, st.Size())
	if err != nil {
		return 0, err
	}
	if !ok {
		return 0, &CorruptionError{File: path, Reason: "its header cannot be read"}
	}
	for {
		off := l.off
		rec, err := l.next()
		switch {
		case errors.Is(err, io.EOF):
			return 0, &CorruptionError{File: path, Offset: off, Reason: "it ends before its last record"}
		case errors.Is(err, errBadRecord):
			return 0, &CorruptionError{File: path, Offset: off, Reason: "a record fails its checksum"}
		case err != nil:
			return 0, err
		}
		c.seq = max(c.seq, rec.seq)
		if rec.kind == recordEnd {
			d := decoder{b: rec.body}
			if n := d.uvarint(); d.err != nil || n != uint64(c.ids.Len()) || l.off != l.size {
				return 0, &CorruptionError{File: path, Offset: off, Reason: "its last record does not agree with its contents"}
			}
			return st.Size(), nil
		}
		if err := c.apply(rec, false); err != nil {
			return 0, &CorruptionError{File: path, Offset: off, Reason: err.Error()}
		}
	}
}

// readLog replays log g. Only the last may end in a torn record; it is opened for writing.
func (s *store) readLog(c *collection, g uint64, first, last bool) (err error) {
	path := generationPath(s.dir, logPrefix, g)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	keep := false
	defer func() {
		if !keep {
			err = errors.Join(err, f.Close())
		}
	}()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	l, ok, err := openReader(f, st.Size())
	if err != nil {
		return err
	}
	if !ok || l.id.generation != g {
		if !last || first || st.Size() > fileHeader {
			return &CorruptionError{File: path, Reason: "its header cannot be read"}
		}
		// Compaction was interrupted while it began this log; nothing was written to it.
		s.cur, err = createLog(path, g, s.fsync)
		s.generation = g
		return err
	}
	for {
		off := l.off
		rec, err := l.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if errors.Is(err, errBadRecord) {
			if !last {
				return &CorruptionError{File: path, Offset: off, Reason: "a record fails its checksum"}
			}
			proven, err := l.provenBeyond()
			if err != nil {
				return err
			}
			if proven {
				return &CorruptionError{File: path, Offset: off, Reason: "a record fails its checksum and later ones are whole"}
			}
			s.logger.Warn("the log ends in a torn record, which was never acknowledged; it is dropped",
				slog.String("file", path), slog.Int64("offset", off), slog.Int64("bytes", l.size-off))
			if err := f.Truncate(off); err != nil {
				return err
			}
			break
		}
		if err != nil {
			return err
		}
		if rec.kind == recordSynced {
			continue
		}
		c.seq = max(c.seq, rec.seq)
		if err := c.apply(rec, false); err != nil {
			return &CorruptionError{File: path, Offset: off, Reason: err.Error()}
		}
	}
	if !last {
		s.older += l.off
		return nil
	}
	// What was read may still be in memory only; what is appended must not precede it.
	if err := s.fsync(f); err != nil {
		return err
	}
	keep = true
	s.cur, s.generation = newLogFile(f, l.id, l.off, s.fsync), g
	return nil
}

// discard closes the log of a deleted collection without bringing it to disk, after a
// compaction that may be under way.
func (s *store) discard() error {
	s.mu.Lock()
	s.closed = true
	wait := s.compacting
	s.mu.Unlock()
	if wait != nil {
		<-wait
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cur.f.Close()
}

// ticket is the present end of the log.
func (s *store) ticket() ticket {
	s.mu.Lock()
	log := s.cur
	s.mu.Unlock()
	end, _ := log.dirty()
	return ticket{log, end}
}
