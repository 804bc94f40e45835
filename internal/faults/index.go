package faults

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	qc "github.com/qdrant/go-client/qdrant"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// IndexClasses are the error classes in which Qdrant answers, by name.
var IndexClasses = map[string]codes.Code{
	"invalid":        codes.InvalidArgument,
	"not_found":      codes.NotFound,
	"already_exists": codes.AlreadyExists,
	"precondition":   codes.FailedPrecondition,
	"timeout":        codes.DeadlineExceeded,
	"unavailable":    codes.Unavailable,
	"denied":         codes.PermissionDenied,
	"internal":       codes.Internal,
	"unimplemented":  codes.Unimplemented,
	"data_loss":      codes.DataLoss,
	"rate_limited":   codes.ResourceExhausted, // with the trailer retry-after
	"storage_full":   codes.ResourceExhausted, // without it
}

// writes are the methods that change data.
var writes = map[string]bool{
	"Upsert": true, "Delete": true, "UpdateBatch": true, "SetPayload": true, "OverwritePayload": true, "DeletePayload": true,
	"ClearPayload": true, "UpdateVectors": true, "DeleteVectors": true, "Create": true, "CreateFieldIndex": true, "DeleteFieldIndex": true,
}

// Index is a proxy between go-client and a server of Qdrant's API. It serves unary calls, of
// which that API consists.
type Index struct {
	plan     Plan
	upstream *grpc.ClientConn
	server   *grpc.Server
	listener *trackedListener
	late     *late
	done     counts
	served   chan struct{}
	ctx      context.Context
	cancel   context.CancelFunc

	planMu sync.Mutex
	seq    int

	passMu sync.Mutex
	passed chan struct{} // closed and replaced whenever a request has passed
}

// NewIndex starts a proxy on a loopback port in front of upstream (host:port, without TLS).
// clock may be nil if no fault has a duration.
func NewIndex(upstream string, plan Plan, clock *Clock) (*Index, error) {
	conn, err := grpc.NewClient("passthrough:///"+upstream, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{}), grpc.MaxCallRecvMsgSize(1<<30), grpc.MaxCallSendMsgSize(1<<30)))
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	p := &Index{
		plan: plan, upstream: conn, late: newLate(clock), served: make(chan struct{}),
		listener: &trackedListener{Listener: l, conns: map[string]net.Conn{}}, passed: make(chan struct{}),
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.server = grpc.NewServer(
		grpc.UnknownServiceHandler(p.handle), grpc.ForceServerCodec(rawCodec{}),
		grpc.MaxRecvMsgSize(1<<30), grpc.MaxSendMsgSize(1<<30), grpc.WaitForHandlers(true),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
	)
	go func() {
		defer close(p.served)
		_ = p.server.Serve(p.listener) // ends with Close, which reports nothing else
	}()
	return p, nil
}

// Addr is host:port of the proxy.
func (p *Index) Addr() string { return p.listener.Addr().String() }

// URL is its address as Lockstep takes it.
func (p *Index) URL() string { return "http://" + p.Addr() }

// Counts tells how often each kind of fault took effect.
func (p *Index) Counts() map[Kind]int { return p.done.all() }

// Held is how many late requests wait to be delivered.
func (p *Index) Held() int { return p.late.count() }

// Release delivers the i-th held request, oldest first from 0, and returns when it has taken
// effect; false when there is none.
func (p *Index) Release(i int) bool {
	h := p.late.take(i)
	if h == nil {
		return false
	}
	h.deliver()
	return true
}

// ReleaseAll delivers all held requests in the order they were sent.
func (p *Index) ReleaseAll() {
	for p.Release(0) {
	}
}

// Disconnect breaks all of the clients' connections.
func (p *Index) Disconnect() { p.listener.closeAll() }

// Close ends the proxy. Held requests are lost.
func (p *Index) Close() error {
	p.late.close()
	p.cancel()
	p.server.Stop()
	<-p.served
	return p.upstream.Close()
}

// message is one encoded message.
type message struct{ b []byte }

// rawCodec passes messages through without decoding them.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) {
	m, ok := v.(*message)
	if !ok {
		return nil, fmt.Errorf("faults: cannot forward %T", v)
	}
	return m.b, nil
}

func (rawCodec) Unmarshal(b []byte, v any) error {
	m, ok := v.(*message)
	if !ok {
		return fmt.Errorf("faults: cannot forward into %T", v)
	}
	m.b = append([]byte(nil), b...)
	return nil
}

func (rawCodec) Name() string { return "proto" }

// answer of the upstream.
type answer struct {
	body    message
	trailer metadata.MD
	err     error
}

func (p *Index) handle(_ any, stream grpc.ServerStream) error {
	full, _ := grpc.MethodFromServerStream(stream)
	var req message
	if err := stream.RecvMsg(&req); err != nil {
		return err
	}
	ctx := stream.Context()
	md, _ := metadata.FromIncomingContext(ctx)
	md = md.Copy()
	for k := range md { // the transport writes its own
		if strings.HasPrefix(k, ":") || k == "content-type" || k == "user-agent" || k == "te" {
			delete(md, k)
		}
	}
	call := &indexCall{p: p, full: full, req: req, md: md}
	op := path.Base(full)
	f := p.next(Call{Op: op, Write: writes[op] && !strings.HasSuffix(path.Dir(full), "Collections") || full == "/qdrant.Collections/Create" || full == "/qdrant.Collections/Delete", Batch: call.batch()})
	reply := func(a answer) error {
		if len(a.trailer) > 0 {
			stream.SetTrailer(a.trailer)
		}
		if a.err != nil {
			return a.err
		}
		return stream.SendMsg(&a.body)
	}
	lost := status.Error(codes.Unavailable, "faults: connection lost")
	timeUp := status.Error(codes.DeadlineExceeded, "faults: timeout")
	switch f.Kind {
	case DropRequest:
		p.done.add(f.Kind)
		return lost
	case DropReply:
		call.send(p.ctx)
		p.done.add(f.Kind)
		return lost
	case Delay:
		done := make(chan answer, 1)
		if !p.late.add(f.For, func() { done <- call.send(p.ctx) }) {
			return lost
		}
		p.done.add(f.Kind)
		select {
		case a := <-done:
			return reply(a)
		case <-ctx.Done(): // the client has left; the request is still under way
			return status.FromContextError(ctx.Err()).Err()
		case <-p.ctx.Done():
			return lost
		}
	case Hold, WaitTimeoutLate:
		if f.Kind == WaitTimeoutLate {
			a, ok := call.pretend(qc.UpdateStatus_WaitTimeout)
			if !ok {
				break // nothing to wait for: it passes
			}
			p.late.add(f.For, func() { call.send(p.ctx) })
			p.done.add(f.Kind)
			return reply(a)
		}
		p.late.add(f.For, func() { call.send(p.ctx) })
		p.done.add(f.Kind)
		return timeUp
	case Duplicate:
		a := call.send(ctx)
		call.send(p.ctx)
		p.done.add(f.Kind)
		return reply(a)
	case DuplicateLate:
		a := call.send(ctx)
		p.late.add(f.For, func() { call.send(p.ctx) })
		p.done.add(f.Kind)
		return reply(a)
	case Reorder:
		// The next request that passes goes first; when none comes, the client's patience ends.
		select {
		case <-p.nextPass():
		case <-ctx.Done():
			p.done.add(f.Kind)
			call.send(p.ctx)
			return status.FromContextError(ctx.Err()).Err()
		case <-p.ctx.Done():
			return lost
		}
		p.done.add(f.Kind)
		return reply(call.send(ctx))
	case Half:
		half, ok := call.half()
		if !ok {
			break // nothing to halve: it passes
		}
		half.send(p.ctx)
		p.done.add(f.Kind)
		return status.Error(codes.Internal, "faults: 1 out of 2 shards failed to apply operation")
	case Refuse, RefuseAfter:
		a, ok := refusal(f)
		if !ok {
			return status.Errorf(codes.Internal, "faults: unknown class %q", f.Class)
		}
		if f.Kind == RefuseAfter {
			call.send(p.ctx)
		}
		p.done.add(f.Kind)
		return reply(a)
	case WaitTimeout, Acknowledged:
		s := qc.UpdateStatus_WaitTimeout
		if f.Kind == Acknowledged {
			s = qc.UpdateStatus_Acknowledged
		}
		a, ok := call.pretend(s)
		if !ok {
			break
		}
		if sent := call.send(ctx); sent.err != nil {
			return reply(sent)
		}
		p.done.add(f.Kind)
		return reply(a)
	case Disconnect, DisconnectAfter:
		if f.Kind == DisconnectAfter {
			call.send(p.ctx)
		}
		p.done.add(f.Kind)
		if from, ok := peer.FromContext(ctx); ok {
			p.listener.close(from.Addr.String())
		}
		return lost
	}
	a := call.send(ctx)
	p.pass()
	return reply(a)
}

func (p *Index) next(c Call) Fault {
	p.planMu.Lock()
	defer p.planMu.Unlock()
	c.Seq = p.seq
	p.seq++
	if p.plan == nil {
		return Fault{}
	}
	return p.plan.Next(c)
}

func (p *Index) nextPass() <-chan struct{} {
	p.passMu.Lock()
	defer p.passMu.Unlock()
	return p.passed
}

func (p *Index) pass() {
	p.passMu.Lock()
	defer p.passMu.Unlock()
	close(p.passed)
	p.passed = make(chan struct{})
}

func refusal(f Fault) (answer, bool) {
	code, ok := IndexClasses[f.Class]
	a := answer{err: status.Error(code, "faults: "+f.Class)}
	if f.Class == "rate_limited" {
		a.trailer = metadata.Pairs("retry-after", strconv.Itoa(max(f.RetryAfter, 1)))
	}
	return a, ok
}

// indexCall is one request, which can be sent any number of times.
type indexCall struct {
	p    *Index
	full string
	req  message
	md   metadata.MD
}

func (c *indexCall) send(ctx context.Context) answer {
	var a answer
	ctx = metadata.NewOutgoingContext(ctx, c.md)
	a.err = c.p.upstream.Invoke(ctx, c.full, &c.req, &a.body, grpc.Trailer(&a.trailer))
	return a
}

// request decodes the writes that consist of parts; nil for others.
func (c *indexCall) request() proto.Message {
	var m proto.Message
	switch c.full {
	case qc.Points_Upsert_FullMethodName:
		m = &qc.UpsertPoints{}
	case qc.Points_UpdateBatch_FullMethodName:
		m = &qc.UpdateBatchPoints{}
	case qc.Points_Delete_FullMethodName:
		m = &qc.DeletePoints{}
	default:
		return nil
	}
	if err := proto.Unmarshal(c.req.b, m); err != nil {
		return nil
	}
	return m
}

func (c *indexCall) batch() int {
	switch m := c.request().(type) {
	case *qc.UpsertPoints:
		return max(len(m.GetPoints()), 1)
	case *qc.DeletePoints:
		return max(len(m.GetPoints().GetPoints().GetIds()), 1)
	case *qc.UpdateBatchPoints:
		n := 0
		for _, op := range m.GetOperations() {
			n += max(len(op.GetUpsert().GetPoints()), 1)
		}
		return max(n, 1)
	}
	return 1
}

// half is the call with the first half of its parts; false when there is one part only.
func (c *indexCall) half() (*indexCall, bool) {
	if c.batch() < 2 {
		return nil, false
	}
	m := c.request()
	switch m := m.(type) {
	case *qc.UpsertPoints:
		m.Points = m.GetPoints()[:len(m.GetPoints())/2]
	case *qc.DeletePoints:
		ids := m.GetPoints().GetPoints()
		ids.Ids = ids.GetIds()[:len(ids.GetIds())/2]
	case *qc.UpdateBatchPoints:
		if ops := m.GetOperations(); len(ops) > 1 {
			m.Operations = ops[:len(ops)/2]
		} else {
			up := ops[0].GetUpsert()
			up.Points = up.GetPoints()[:len(up.GetPoints())/2]
		}
	}
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, false
	}
	return &indexCall{c.p, c.full, message{b}, c.md}, true
}

// pretend makes a success answer with the given status; false for calls without one.
func (c *indexCall) pretend(s qc.UpdateStatus) (answer, bool) {
	result := &qc.UpdateResult{Status: s, OperationId: proto.Uint64(1)}
	var m proto.Message
	switch c.full {
	case qc.Points_UpdateBatch_FullMethodName:
		r := &qc.UpdateBatchResponse{}
		if req, ok := c.request().(*qc.UpdateBatchPoints); ok {
			for range req.GetOperations() {
				r.Result = append(r.Result, result)
			}
		}
		m = r
	case qc.Points_Upsert_FullMethodName, qc.Points_Delete_FullMethodName, qc.Points_SetPayload_FullMethodName,
		qc.Points_OverwritePayload_FullMethodName, qc.Points_DeletePayload_FullMethodName, qc.Points_CreateFieldIndex_FullMethodName:
		m = &qc.PointsOperationResponse{Result: result}
	default:
		return answer{}, false
	}
	b, err := proto.Marshal(m)
	return answer{body: message{b}}, err == nil
}

// trackedListener knows its connections, so that one can be broken.
type trackedListener struct {
	net.Listener
	mu    sync.Mutex
	conns map[string]net.Conn
}

func (l *trackedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns[c.RemoteAddr().String()] = c
	return &trackedConn{c, l}, nil
}

func (l *trackedListener) close(remote string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.conns[remote]; c != nil {
		_ = c.Close() // it is being broken
	}
}

func (l *trackedListener) closeAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		_ = c.Close() // they are being broken
	}
}

type trackedConn struct {
	net.Conn
	l *trackedListener
}

func (c *trackedConn) Close() error {
	c.l.mu.Lock()
	delete(c.l.conns, c.RemoteAddr().String())
	c.l.mu.Unlock()
	return c.Conn.Close()
}
