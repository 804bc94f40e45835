package faults

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// PostgresClasses are the SQLSTATEs that Refuse can raise, by name. The statement is replaced
// by one that raises the error, so the transaction's state stays true. The names with a
// leading "fatal_" end the connection as the server would.
var PostgresClasses = map[string]string{
	"serialization":         "40001",
	"deadlock":              "40P01",
	"statement_timeout":     "57014",
	"lock_timeout":          "55P03",
	"disk_full":             "53100",
	"out_of_memory":         "53200",
	"internal":              "XX000",
	"fatal_shutdown":        "57P01",
	"fatal_crash":           "57P02",
	"fatal_starting":        "57P03",
	"fatal_connections":     "53300",
	"fatal_connection_lost": "08006",
}

// maxMessage of Postgres' protocol.
const maxMessage = 1 << 30

// Postgres is a proxy between a Postgres client and its server, without TLS. Its unit is the
// round trip: everything the client sends up to a Sync, or one simple query. A plan sees the
// SQL of a round trip's statements, joined by "; ".
//
// What a kind means here: the client is told by a broken connection, for that is what Postgres'
// clients see. Hold breaks the client's connection, and the round trip arrives later on the
// server's, which stays open for it. Half lets only the first half of a pipeline arrive.
// Kinds marked "index only" pass.
type Postgres struct {
	plan     Plan
	upstream string
	listener net.Listener
	late     *late
	done     counts
	ctx      context.Context
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	refusing atomic.Bool

	planMu sync.Mutex
	seq    int

	mu    sync.Mutex
	conns map[net.Conn]bool
}

// NewPostgres starts a proxy on a loopback port in front of upstream: host:port, or the path
// of a Unix socket. clock may be nil if no fault has a duration.
func NewPostgres(upstream string, plan Plan, clock *Clock) (*Postgres, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Postgres{plan: plan, upstream: upstream, listener: l, late: newLate(clock), conns: map[net.Conn]bool{}}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.wg.Go(p.accept)
	return p, nil
}

// NewPostgresURL starts a proxy in front of the server that a postgres:// URL names, and
// returns the URL that leads through it.
func NewPostgresURL(dsn string, plan Plan, clock *Clock) (*Postgres, string, error) {
	u, err := url.Parse(dsn)
	if err != nil || u.Scheme != "postgres" && u.Scheme != "postgresql" {
		return nil, "", errors.New("faults: not a postgres:// URL") // without the URL: it may hold a password
	}
	q := u.Query()
	host, port := cmp.Or(q.Get("host"), u.Hostname(), "127.0.0.1"), cmp.Or(q.Get("port"), u.Port(), "5432")
	upstream := net.JoinHostPort(host, port)
	if strings.HasPrefix(host, "/") {
		upstream = path.Join(host, ".s.PGSQL."+port)
	}
	p, err := NewPostgres(upstream, plan, clock)
	if err != nil {
		return nil, "", err
	}
	q.Del("host")
	q.Del("port")
	q.Set("sslmode", "disable")
	u.Host, u.RawQuery = p.Addr(), q.Encode()
	return p, u.String(), nil
}

// Addr is host:port of the proxy.
func (p *Postgres) Addr() string { return p.listener.Addr().String() }

// Counts tells how often each kind of fault took effect.
func (p *Postgres) Counts() map[Kind]int { return p.done.all() }

// Held is how many late round trips wait to be delivered.
func (p *Postgres) Held() int { return p.late.count() }

// Release delivers the i-th held round trip and returns when the server has answered it;
// false when there is none.
func (p *Postgres) Release(i int) bool {
	h := p.late.take(i)
	if h == nil {
		return false
	}
	h.deliver()
	return true
}

// ReleaseAll delivers all held round trips in the order they were sent.
func (p *Postgres) ReleaseAll() {
	for p.Release(0) {
	}
}

// Disconnect breaks all connections, on both sides.
func (p *Postgres) Disconnect() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.Close() // it is being broken
	}
}

// Refuse ends new connections at once, before the server hears of them, until it is called
// with false. Connections that are there stay.
func (p *Postgres) Refuse(on bool) { p.refusing.Store(on) }

// Close ends the proxy and all connections. Held round trips are lost.
func (p *Postgres) Close() error {
	p.late.close()
	p.cancel()
	err := p.listener.Close()
	p.Disconnect()
	p.wg.Wait()
	return err
}

func (p *Postgres) accept() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			return // Close
		}
		if p.refusing.Load() {
			_ = c.Close() // it is being refused
			continue
		}
		p.wg.Go(func() {
			s := &session{p: p, client: c, statements: map[string]string{}, portals: map[string]string{}}
			_ = s.run() // how a session ends is told to its client by its end
		})
	}
}

func (p *Postgres) track(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		return false
	}
	p.conns[c] = true
	return true
}

func (p *Postgres) drop(c net.Conn) {
	if c == nil {
		return
	}
	p.mu.Lock()
	delete(p.conns, c)
	p.mu.Unlock()
	_ = c.Close() // it is being broken
}

func (p *Postgres) next(c Call) Fault {
	p.planMu.Lock()
	defer p.planMu.Unlock()
	c.Seq = p.seq
	p.seq++
	if p.plan == nil {
		return Fault{}
	}
	return p.plan.Next(c)
}

// session is one client's connection. One goroutine reads the client, decides, and writes to
// the server; another copies answers back, counting the ends of round trips.
type session struct {
	p      *Postgres
	client net.Conn
	server net.Conn

	statements map[string]string // prepared: name to SQL
	portals    map[string]string

	mu      sync.Mutex
	muted   bool          // answers are swallowed
	ready   int           // round trips answered
	changed chan struct{} // closed and replaced on each answer
	ended   bool
}

type frame struct {
	kind byte
	raw  []byte // with header
}

func (f frame) body() []byte { return f.raw[5:] }

func (s *session) run() error {
	if !s.p.track(s.client) {
		return s.client.Close()
	}
	keep := false // the server's connection outlives this function when a late round trip owns it
	defer func() {
		s.p.drop(s.client)
		if !keep {
			s.p.drop(s.server)
		}
	}()
	start, err := s.startup()
	if err != nil {
		return err
	}
	var d net.Dialer
	network := "tcp"
	if strings.HasPrefix(s.p.upstream, "/") {
		network = "unix"
	}
	if s.server, err = d.DialContext(s.p.ctx, network, s.p.upstream); err != nil {
		return err
	}
	if !s.p.track(s.server) {
		return s.server.Close()
	}
	if _, err := s.server.Write(start); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(start[4:]) == 80877102 {
		return nil // a cancel request has no answer
	}
	s.changed = make(chan struct{})
	answered := make(chan struct{})
	s.p.wg.Go(func() {
		defer close(answered)
		s.copyAnswers()
	})
	sent := 1 // the start-up is answered like a round trip, by ReadyForQuery
	for {
		round, err := s.readRound()
		if err != nil {
			return err
		}
		if round.sync {
			sent++
		}
		done, err := s.act(round, sent)
		if done == ownedByLate {
			keep = true
		}
		if err != nil || done != goOn {
			return err
		}
	}
}

// startup reads the client's first message and declines encryption.
func (s *session) startup() ([]byte, error) {
	for {
		var head [8]byte
		if _, err := io.ReadFull(s.client, head[:]); err != nil {
			return nil, err
		}
		n := binary.BigEndian.Uint32(head[:])
		if n < 8 || n > 1<<16 {
			return nil, errors.New("faults: not a start of Postgres' protocol")
		}
		msg := make([]byte, n)
		copy(msg, head[:])
		if _, err := io.ReadFull(s.client, msg[8:]); err != nil {
			return nil, err
		}
		switch binary.BigEndian.Uint32(head[4:]) {
		case 80877103, 80877104: // SSLRequest, GSSENCRequest
			if _, err := s.client.Write([]byte("N")); err != nil {
				return nil, err
			}
			continue
		}
		return msg, nil
	}
}

func readFrame(r io.Reader) (frame, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return frame{}, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n < 4 || n > maxMessage {
		return frame{}, fmt.Errorf("faults: a message of %d bytes", n)
	}
	raw := make([]byte, 1+n)
	copy(raw, head[:])
	_, err := io.ReadFull(r, raw[5:])
	return frame{head[0], raw}, err
}

// round is what the client sends in one go.
type round struct {
	frames []frame
	sql    []string
	sync   bool // the server answers it with ReadyForQuery
}

// readRound reads up to a Sync, a simple query, or a message that does not wait for one
// (passwords, copied data, flushes).
func (s *session) readRound() (round, error) {
	var r round
	for {
		f, err := readFrame(s.client)
		if err != nil {
			return r, err
		}
		r.frames = append(r.frames, f)
		switch f.kind {
		case 'P':
			name, rest := cstring(f.body())
			sql, _ := cstring(rest)
			s.statements[name] = sql
		case 'B':
			portal, rest := cstring(f.body())
			name, _ := cstring(rest)
			s.portals[portal] = s.statements[name]
		case 'E':
			portal, _ := cstring(f.body())
			r.sql = append(r.sql, s.portals[portal])
		case 'Q':
			sql, _ := cstring(f.body())
			r.sql, r.sync = append(r.sql, sql), true
			return r, nil
		case 'S':
			r.sync = true
			return r, nil
		case 'D', 'C': // describe, close: part of a pipeline
		default:
			return r, nil
		}
	}
}

func cstring(b []byte) (string, []byte) {
	i := bytes.IndexByte(b, 0)
	if i < 0 {
		return string(b), nil
	}
	return string(b[:i]), b[i+1:]
}

type outcome int

const (
	goOn outcome = iota
	ended
	ownedByLate
)

// act decides about a round trip and does it. n is how many round trips the client has sent,
// this one included.
func (s *session) act(r round, n int) (outcome, error) {
	if !r.sync || len(r.sql) == 0 {
		return goOn, s.forward(r.frames)
	}
	op := strings.Join(r.sql, "; ")
	f := s.p.next(Call{Op: op, Write: changes(r.sql), Batch: len(r.sql)})
	switch f.Kind {
	case DropRequest, Disconnect:
		s.p.done.add(f.Kind)
		return ended, nil
	case DropReply, DisconnectAfter:
		s.mute()
		if err := s.forward(r.frames); err != nil {
			return ended, err
		}
		if s.await(n) {
			s.p.done.add(f.Kind)
		}
		return ended, nil
	case Delay:
		arrived := make(chan error, 1)
		if !s.p.late.add(f.For, func() { arrived <- s.forward(r.frames); s.await(n) }) {
			return ended, nil
		}
		s.p.done.add(f.Kind)
		select {
		case err := <-arrived:
			return goOn, err
		case <-s.p.ctx.Done():
			return ended, nil
		}
	case Hold:
		s.mute()
		owned := s.p.late.add(f.For, func() {
			if s.forward(r.frames) == nil {
				s.await(n)
			}
			s.p.drop(s.server)
		})
		if !owned {
			return ended, nil
		}
		s.p.done.add(f.Kind)
		return ownedByLate, nil
	case Half:
		executes := 0
		for i, fr := range r.frames {
			if fr.kind != 'E' {
				continue
			}
			if executes++; executes == len(r.sql)/2 {
				s.mute()
				if err := s.forward(append(r.frames[:i+1:i+1], flushFrame)); err != nil {
					return ended, err
				}
				s.p.done.add(f.Kind)
				return ended, nil
			}
		}
	case Refuse:
		code, ok := PostgresClasses[f.Class]
		if !ok {
			return ended, fmt.Errorf("faults: unknown class %q", f.Class)
		}
		s.p.done.add(f.Kind)
		if strings.HasPrefix(f.Class, "fatal_") {
			_, err := s.client.Write(fatal(code))
			return ended, err
		}
		return goOn, s.forward([]frame{raise(code)})
	}
	return goOn, s.forward(r.frames)
}

func changes(sql []string) bool {
	for _, q := range sql {
		word, _, _ := strings.Cut(strings.ToLower(strings.TrimSpace(q)), " ")
		if word != "select" && word != "show" && word != "begin" {
			return true
		}
	}
	return false
}

func (s *session) forward(frames []frame) error {
	var b []byte
	for _, f := range frames {
		b = append(b, f.raw...)
	}
	_, err := s.server.Write(b)
	return err
}

func (s *session) mute() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.muted = true
}

// await waits until the server has answered n round trips; false when it never will.
func (s *session) await(n int) bool {
	for {
		s.mu.Lock()
		ready, over, changed := s.ready, s.ended, s.changed
		s.mu.Unlock()
		if ready >= n || over {
			return ready >= n
		}
		select {
		case <-changed:
		case <-s.p.ctx.Done():
			return false
		case <-time.After(time.Minute): // a statement that blocks for ever must not block the test
			return false
		}
	}
}

func (s *session) copyAnswers() {
	for {
		f, err := readFrame(s.server)
		s.mu.Lock()
		if err != nil {
			s.ended = true
		} else if f.kind == 'Z' {
			s.ready++
		}
		if err != nil || f.kind == 'Z' {
			close(s.changed)
			s.changed = make(chan struct{})
		}
		muted := s.muted
		s.mu.Unlock()
		if err == nil && !muted {
			_, err = s.client.Write(f.raw)
			if err != nil {
				// The client has left; its last round trip may still be owed to a late delivery.
				s.mute()
				err = nil
			}
		}
		if err != nil {
			s.mu.Lock()
			muted := s.muted
			s.mu.Unlock()
			if !muted {
				_ = s.client.Close() // the server's end is the client's
			}
			return
		}
	}
}

func encode(kind byte, body []byte) []byte {
	b := append([]byte{kind}, 0, 0, 0, 0)
	binary.BigEndian.PutUint32(b[1:], uint32(len(body)+4))
	return append(b, body...)
}

var flushFrame = frame{'H', encode('H', nil)}

// raise is a simple query that fails with the SQLSTATE.
func raise(code string) frame {
	sql := "DO $$ BEGIN RAISE EXCEPTION 'injected by faults' USING ERRCODE = '" + code + "'; END $$"
	return frame{'Q', encode('Q', append([]byte(sql), 0))}
}

// fatal is the error message with which a server ends a connection.
func fatal(code string) []byte {
	var b []byte
	for _, f := range []string{"SFATAL", "VFATAL", "C" + code, "Minjected by faults"} {
		b = append(append(b, f...), 0)
	}
	return encode('E', append(b, 0))
}
