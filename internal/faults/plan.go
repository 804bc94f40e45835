package faults

import (
	"math/rand/v2"
	"strings"
	"sync"
	"time"
)

// Kind is what is done to one request.
type Kind string

// The kinds. "The client is told" means an error as of a lost connection.
const (
	// Pass: nothing.
	Pass Kind = ""
	// DropRequest: it never arrives; the client is told.
	DropRequest Kind = "drop_request"
	// DropReply: it takes effect, the reply is lost; the client is told.
	DropReply Kind = "drop_reply"
	// Delay: it arrives late and the client waits, as long as it likes.
	Delay Kind = "delay"
	// Hold: the client is told at once that its time is up; the request arrives late, even
	// when everybody has forgotten it.
	Hold Kind = "hold"
	// Duplicate: it arrives twice, the client gets the first reply. Index only.
	Duplicate Kind = "duplicate"
	// DuplicateLate: it arrives now and, held, once more. Index only.
	DuplicateLate Kind = "duplicate_late"
	// Reorder: it arrives after the next request that passes; the client waits. Index only.
	Reorder Kind = "reorder"
	// Half: only part of a batch arrives; the client is told of a failure.
	Half Kind = "half"
	// Refuse: it does not arrive; the client gets the error of the fault's Class.
	Refuse Kind = "refuse"
	// RefuseAfter: it takes effect and the client gets the error of Class. Index only.
	RefuseAfter Kind = "refuse_after"
	// WaitTimeout: it takes effect, but the answer says that waiting for it ended. Index only.
	WaitTimeout Kind = "wait_timeout"
	// WaitTimeoutLate: the same answer; the effect comes later, as with [Hold]. Index only.
	WaitTimeoutLate Kind = "wait_timeout_late"
	// Acknowledged: it takes effect, but the answer promises no more than the log. Index only.
	Acknowledged Kind = "acknowledged"
	// Disconnect: the client's connection breaks before the request arrives, and with it all
	// that travels on it.
	Disconnect Kind = "disconnect"
	// DisconnectAfter: the connection breaks after the effect.
	DisconnectAfter Kind = "disconnect_after"
)

// Fault is one thing to do.
type Fault struct {
	Kind Kind
	// Class names the error of Refuse and RefuseAfter: one of [IndexClasses] or
	// [PostgresClasses].
	Class string
	// RetryAfter of the class rate_limited, in whole seconds; 0 means 1.
	RetryAfter int
	// For is how much simulated time a late request takes; 0 means until released.
	For time.Duration
}

// Call describes a request to a plan.
type Call struct {
	// Seq counts requests from 0.
	Seq int
	// Op is the method's name, such as Upsert, or the SQL of a round trip.
	Op string
	// Write is set for what changes data.
	Write bool
	// Batch is how many parts could be halved, at least 1.
	Batch int
}

// Plan chooses a fault for each request. It is called for one request at a time.
type Plan interface {
	Next(Call) Fault
}

// Rule of a script.
type Rule struct {
	// Op is a part of the request's Op, in any letter case; "" fits all.
	Op string
	// Skip this many fitting requests first.
	Skip int
	// Times it applies; 0 means once, -1 always.
	Times int
	Fault Fault
}

// Script applies the first rule that fits. Rules may be added while it runs.
type Script struct {
	mu    sync.Mutex
	rules []*Rule
}

// NewScript returns a script of the given rules.
func NewScript(rules ...Rule) *Script {
	s := &Script{}
	s.Add(rules...)
	return s
}

// Add appends rules.
func (s *Script) Add(rules ...Rule) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range rules {
		if r.Times == 0 {
			r.Times = 1
		}
		s.rules = append(s.rules, &r)
	}
}

// Clear removes all rules: requests pass from now on.
func (s *Script) Clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rules = nil
}

// Next is the fault of the first rule that fits.
func (s *Script) Next(c Call) Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.rules {
		if r.Times == 0 || !strings.Contains(strings.ToLower(c.Op), strings.ToLower(r.Op)) {
			continue
		}
		if r.Skip > 0 {
			r.Skip--
			continue
		}
		if r.Times > 0 {
			r.Times--
		}
		return r.Fault
	}
	return Fault{}
}

// Random draws faults from a seed: the same requests in the same order get the same faults.
type Random struct {
	mu     sync.Mutex
	rng    *rand.Rand
	rate   float64
	faults []Fault
	off    bool
}

// NewRandom applies one of the faults, each as likely, to a share of requests between 0 and 1.
func NewRandom(seed uint64, rate float64, faults ...Fault) *Random {
	return &Random{rng: rand.New(rand.NewPCG(seed, 0x6661756c7473)), rate: rate, faults: faults}
}

// Stop lets everything pass from now on.
func (r *Random) Stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.off = true
}

// Next draws.
func (r *Random) Next(Call) Fault {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.off || len(r.faults) == 0 || r.rng.Float64() >= r.rate {
		return Fault{}
	}
	return r.faults[r.rng.IntN(len(r.faults))]
}

// Plans asks one after the other; the first that does not pass decides.
type Plans []Plan

// Next is the first fault chosen.
func (p Plans) Next(c Call) Fault {
	for _, plan := range p {
		if f := plan.Next(c); f.Kind != Pass {
			return f
		}
	}
	return Fault{}
}
