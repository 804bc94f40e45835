package devstack

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// logBound is the size at which a child's log is moved aside; one older file is kept.
const logBound = 8 << 20

// logFile is a child's output. The child writes to the file itself, so that its log survives
// us and it never blocks on us.
type logFile struct {
	file *os.File
}

func openLog(name string) (*logFile, error) {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	return &logFile{f}, err
}

// trim copies a log that has outgrown its bound aside and empties it. Lines written between
// the copy and the cut are lost; the child appends, so it goes on at the start.
func (l *logFile) trim() error {
	st, err := l.file.Stat()
	if err != nil || st.Size() <= logBound {
		return err
	}
	old, err := os.OpenFile(l.file.Name()+".1", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(old, io.NewSectionReader(l.file, max(st.Size()-logBound, 0), logBound))
	return errors.Join(err, old.Close(), l.file.Truncate(0))
}

// tail returns the last lines, for an error message.
func (l *logFile) tail() string {
	st, err := l.file.Stat()
	if err != nil {
		return ""
	}
	const most = 4 << 10
	buf := make([]byte, min(st.Size(), most))
	n, err := l.file.ReadAt(buf, st.Size()-int64(len(buf)))
	if err != nil && !errors.Is(err, io.EOF) {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(buf[:n])), "\n")
	return strings.Join(lines[max(len(lines)-10, 0):], "\n")
}

func (l *logFile) close() error { return l.file.Close() }
