package storetest

import (
	"net"
	"strconv"
	"testing"

	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc"
)

// maxPage is what a client of the tests accepts in one answer. grpc-go's own bound of 4 MiB
// is below a page of 10,000 points with a payload, or of 1,024 with vectors.
const maxPage = 1 << 30

// Dial returns a client of the server at addr, host:port, that ends with the test. It uses
// one connection, so that the calls of one goroutine keep their order.
func Dial(t testing.TB, addr string) *qdrant.Client {
	t.Helper()
	host, p, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	port, err := strconv.Atoi(p)
	if err != nil {
		t.Fatal(err)
	}
	c, err := qdrant.NewClient(&qdrant.Config{
		Host: host, Port: port, PoolSize: 1, SkipCompatibilityCheck: true,
		GrpcOptions: []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxPage))},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("closing the client: %v", err)
		}
	})
	return c
}
