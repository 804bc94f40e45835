package qdrantlocal

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"sync"
)

// A log file is a header followed by records. The same framing carries snapshots.
//
//	header: magic(8) generation(8) salt(8) crc(4)
//	record: magic(4) length(4) sequence(8) synced(8) crc(4) kind(1) body(length-1)
//
// synced is the file offset known to be on disk when the record was written. It lets the
// reader tell a torn tail, which nobody was promised, from damage to what was promised. The
// checksum covers everything after the magic and starts from the file's random salt, so
// that no content can pass for a record.
const (
	fileMagic    = "LSQLOG1\n"
	fileHeader   = 28
	recordHeader = 28
	// recordMagic opens each record, so that a reader that lost its place can find one.
	recordMagic = 0x5c0e9b17
	// maxRecord bounds a record's length; a request is bounded well below it.
	maxRecord = 1 << 31
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CorruptionError reports damage to data that was acknowledged. Nothing was changed on
// disk; the server refuses to open the directory.
type CorruptionError struct {
	// File is the damaged file.
	File string
	// Offset is where the first unreadable record begins.
	Offset int64
	// Reason says what is wrong there.
	Reason string
}

// Error names the file, the place and what to do.
func (e *CorruptionError) Error() string {
	return fmt.Sprintf("%s is damaged at byte %d (%s); acknowledged data behind it cannot be trusted: "+
		"restore the directory from a copy, or remove it and let reconcile rebuild the index", e.File, e.Offset, e.Reason)
}

// fileID is what the header of a log file says.
type fileID struct {
	generation uint64
	salt       uint64
}

func encodeHeader(id fileID) []byte {
	b := make([]byte, 0, fileHeader)
	b = append(b, fileMagic...)
	b = binary.LittleEndian.AppendUint64(b, id.generation)
	b = binary.LittleEndian.AppendUint64(b, id.salt)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func decodeHeader(b []byte) (fileID, bool) {
	if len(b) < fileHeader || string(b[:8]) != fileMagic ||
		crc32.Checksum(b[:24], castagnoli) != binary.LittleEndian.Uint32(b[24:]) {
		return fileID{}, false
	}
	return fileID{binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint64(b[16:])}, true
}

func newFileID(generation uint64) (fileID, error) {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return fileID{}, err
	}
	return fileID{generation, binary.LittleEndian.Uint64(b[:])}, nil
}

// beginRecord reserves the header of a record in front of its body.
func beginRecord(buf []byte, kind recordKind) []byte {
	buf = append(buf[:0], make([]byte, recordHeader)...)
	return append(buf, byte(kind))
}

// sealRecord fills the header of the record that buf holds.
func sealRecord(buf []byte, id fileID, seq, synced uint64) {
	binary.LittleEndian.PutUint32(buf[0:], recordMagic)
	binary.LittleEndian.PutUint32(buf[4:], uint32(len(buf)-recordHeader))
	binary.LittleEndian.PutUint64(buf[8:], seq)
	binary.LittleEndian.PutUint64(buf[16:], synced)
	binary.LittleEndian.PutUint32(buf[24:], recordSum(buf[4:24], buf[recordHeader:], id))
}

func recordSum(head, body []byte, id fileID) uint32 {
	var salt [8]byte
	binary.LittleEndian.PutUint64(salt[:], id.salt)
	sum := crc32.Checksum(salt[:], castagnoli)
	sum = crc32.Update(sum, castagnoli, head)
	return crc32.Update(sum, castagnoli, body)
}

// logRecord is a record as the reader found it. body is valid until the next one is read.
type logRecord struct {
	kind        recordKind
	seq, synced uint64
	body        []byte
}

// logReader reads records one after another.
type logReader struct {
	r    io.ReaderAt
	size int64
	id   fileID
	off  int64
	buf  []byte
}

// openReader reads the header. ok is false when the file is shorter than a header or its
// header is not valid.
func openReader(r io.ReaderAt, size int64) (*logReader, bool, error) {
	head := make([]byte, fileHeader)
	if size < fileHeader {
		return nil, false, nil
	}
	if _, err := r.ReadAt(head, 0); err != nil {
		return nil, false, err
	}
	id, ok := decodeHeader(head)
	return &logReader{r: r, size: size, id: id, off: fileHeader}, ok, nil
}

// errBadRecord means that no valid record begins at the reader's offset.
var errBadRecord = errors.New("no valid record")

// at reads the record that begins at off, and returns where the next one begins.
func (l *logReader) at(off int64) (logRecord, int64, error) {
	if off+recordHeader+1 > l.size {
		return logRecord{}, 0, errBadRecord
	}
	var head [recordHeader]byte
	if _, err := l.r.ReadAt(head[:], off); err != nil {
		return logRecord{}, 0, err
	}
	n := int64(binary.LittleEndian.Uint32(head[4:]))
	if binary.LittleEndian.Uint32(head[0:]) != recordMagic || n < 1 || off+recordHeader+n > l.size {
		return logRecord{}, 0, errBadRecord
	}
	if int64(cap(l.buf)) < n {
		l.buf = make([]byte, n+n/4)
	}
	body := l.buf[:n]
	if _, err := l.r.ReadAt(body, off+recordHeader); err != nil {
		return logRecord{}, 0, err
	}
	if recordSum(head[4:24], body, l.id) != binary.LittleEndian.Uint32(head[24:]) {
		return logRecord{}, 0, errBadRecord
	}
	return logRecord{
		kind:   recordKind(body[0]),
		seq:    binary.LittleEndian.Uint64(head[8:]),
		synced: binary.LittleEndian.Uint64(head[16:]),
		body:   body[1:],
	}, off + recordHeader + n, nil
}

// next reads the next record. It returns io.EOF at the exact end of the file and
// errBadRecord where no valid record begins, without moving.
func (l *logReader) next() (logRecord, error) {
	if l.off == l.size {
		return logRecord{}, io.EOF
	}
	rec, end, err := l.at(l.off)
	if err == nil {
		l.off = end
	}
	return rec, err
}

// provenBeyond looks for a valid record behind the reader's offset whose header says that
// the log was on disk beyond that offset. If there is one, what cannot be read was once
// written completely: it is damage and not a torn tail.
func (l *logReader) provenBeyond() (bool, error) {
	var magic [4]byte
	binary.LittleEndian.PutUint32(magic[:], recordMagic)
	bad := l.off
	const window = 1 << 20
	buf := make([]byte, window+3)
	for base := bad + 1; base < l.size; base += window {
		n := min(int64(len(buf)), l.size-base)
		if _, err := l.r.ReadAt(buf[:n], base); err != nil && !errors.Is(err, io.EOF) {
			return false, err
		}
		for i := 0; ; i++ {
			j := bytes.Index(buf[i:n], magic[:])
			if j < 0 {
				break
			}
			i += j
			rec, _, err := l.at(base + int64(i))
			if errors.Is(err, errBadRecord) {
				continue
			}
			if err != nil {
				return false, err
			}
			if int64(rec.synced) > bad {
				return true, nil
			}
		}
	}
	return false, nil
}

// logFile is the log being written. Appending and syncing may happen at the same time:
// callers that wait for the disk share one fsync.
type logFile struct {
	f    *os.File
	id   fileID
	sync func(*os.File) error

	mu   sync.Mutex
	cond *sync.Cond
	// written is the end of the last record, synced what is known to be on disk.
	written, synced int64
	// data is the end of the last record other than a sync mark.
	data    int64
	syncing bool
	// err, once set, refuses every further write: after a failed write or fsync nobody
	// knows what the disk holds.
	err error
}

func newLogFile(f *os.File, id fileID, end int64, fsync func(*os.File) error) *logFile {
	l := &logFile{f: f, id: id, written: end, synced: end, data: end, sync: fsync}
	l.cond = sync.NewCond(&l.mu)
	return l
}

// append writes the record that buf holds, begun with beginRecord. It returns the offset to
// wait for. On a failed write the file is cut back, or closed for writing if it cannot be.
func (l *logFile) append(buf []byte, seq uint64) (int64, error) {
	if int64(len(buf)) > maxRecord {
		return 0, fmt.Errorf("record of %d bytes is over the limit of %d", len(buf), maxRecord)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.appendLocked(buf, seq)
}

func (l *logFile) appendLocked(buf []byte, seq uint64) (int64, error) {
	if l.err != nil {
		return 0, l.err
	}
	sealRecord(buf, l.id, seq, uint64(l.synced))
	if _, err := l.f.WriteAt(buf, l.written); err != nil {
		err = fmt.Errorf("writing the log: %w", err)
		if terr := l.f.Truncate(l.written); terr != nil {
			l.err = errors.Join(err, terr)
		}
		return 0, err
	}
	l.written += int64(len(buf))
	if recordKind(buf[recordHeader]) != recordSynced {
		l.data = l.written
	}
	return l.written, nil
}

// wait returns when everything up to end is on disk.
func (l *logFile) wait(end int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.synced < end {
		if l.err != nil {
			return l.err
		}
		if l.syncing {
			l.cond.Wait()
			continue
		}
		l.syncing = true
		target := l.written
		l.mu.Unlock()
		err := l.sync(l.f)
		l.mu.Lock()
		l.syncing = false
		if err != nil {
			// After a failed fsync the kernel may have dropped the dirty pages: what is on
			// disk is unknown, and a second fsync that succeeds proves nothing.
			l.err = fmt.Errorf("syncing the log: %w", err)
			l.cond.Broadcast()
			return l.err
		}
		l.synced = max(l.synced, target)
		// The mark tells the next reader that what precedes it was promised. Should it not
		// fit on the disk, the promise itself still holds.
		_, _ = l.appendLocked(beginRecord(nil, recordSynced), 0)
		l.cond.Broadcast()
	}
	return nil
}

// dirty reports whether records wait for the disk that nobody may be waiting for.
func (l *logFile) dirty() (end int64, dirty bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.data, l.synced < l.data && l.err == nil
}

func (l *logFile) size() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.written
}

// createLog makes a new, empty, durable log file.
func createLog(path string, generation uint64, fsync func(*os.File) error) (*logFile, error) {
	id, err := newFileID(generation)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err = f.Write(encodeHeader(id)); err == nil {
		err = fsync(f)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path), fsync)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(path))
	}
	return newLogFile(f, id, fileHeader, fsync), nil
}

func syncDir(dir string, fsync func(*os.File) error) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(fsync(d), d.Close())
}
