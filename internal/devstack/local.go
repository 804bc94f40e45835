package devstack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"github.com/lockstep-db/lockstep/store/qdrantlocal"
)

// localIndex is the embedded index, served on a loopback port of this process.
type localIndex struct {
	url    string
	server *qdrantlocal.Server
	ended  chan struct{} // closed when Serve has returned

	mu  sync.Mutex
	err error
}

func startLocalIndex(dir *dataDir, key string, log *slog.Logger) (*localIndex, string, error) {
	home := dir.join("index")
	server, err := qdrantlocal.Open(home, qdrantlocal.Options{Logger: log, APIKey: key})
	if err != nil {
		return nil, "", err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, "", errors.Join(err, server.Close())
	}
	i := &localIndex{url: "http://" + l.Addr().String(), server: server, ended: make(chan struct{})}
	go func() {
		defer close(i.ended)
		err := server.Serve(l)
		i.mu.Lock()
		defer i.mu.Unlock()
		if err == nil {
			err = errors.New("it was closed")
		}
		i.err = err
	}()
	return i, fmt.Sprintf("the vector index inside this process (exact search, no Qdrant), data in %s, for evaluation and small corpora: set QDRANT_URL for a server", home), nil
}

// failed says why the index no longer serves, nil while it does.
func (i *localIndex) failed() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.err
}

// stop lets calls under way finish, which takes seconds at most, and brings all to disk. It
// does not heed ctx: what would be cut short is the safety of the data.
func (i *localIndex) stop(context.Context) error {
	err := i.server.Close()
	<-i.ended
	return err
}
