package devstack

import (
	"errors"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// identity is the user that Postgres runs as when Lockstep runs as root, which Postgres
// refuses. nil means our own.
type identity struct {
	name     string
	uid, gid uint32
}

// pickIdentity returns nil unless we are root. The owner of a database that exists stays its
// owner; a new one belongs to postgres, else nobody.
func pickIdentity(pgdata string) (*identity, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	st, err := os.Stat(pgdata)
	if err == nil {
		if sys, ok := st.Sys().(*syscall.Stat_t); ok && sys.Uid != 0 {
			id := &identity{name: strconv.Itoa(int(sys.Uid)), uid: sys.Uid, gid: sys.Gid}
			if u, err := user.LookupId(id.name); err == nil {
				id.name = u.Username
			}
			return id, nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err1 == nil && err2 == nil && uid != 0 {
			return &identity{name, uint32(uid), uint32(gid)}, nil
		}
	}
	return nil, corpus.Errorf(corpus.Unavailable, "no_user", "Postgres does not run as root, and there is neither a user postgres nor nobody to run it as; start Lockstep as another user, or set DATABASE_URL")
}

// give hands a directory tree to the identity.
func (id *identity) give(root string) error {
	if id == nil {
		return nil
	}
	return filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, int(id.uid), int(id.gid))
	})
}

// reaches reports the first directory on the way to path, path's parents included, that the
// identity may not pass; "" when it may pass all.
func (id *identity) reaches(path string) (string, error) {
	if id == nil {
		return "", nil
	}
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		st, err := os.Stat(dir)
		if err != nil {
			return "", err
		}
		need := os.FileMode(0o001)
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			switch {
			case sys.Uid == id.uid:
				need = 0o100
			case sys.Gid == id.gid:
				need = 0o010
			}
		}
		if st.Mode().Perm()&need == 0 {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", nil
		}
	}
}
