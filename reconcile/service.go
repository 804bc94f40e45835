package reconcile

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Walker reads the ledger's side of the join. Every call is one read of its own.
type Walker interface {
	// WalkChunks appends up to limit rows with from <= id <= to, ascending, to dst.
	WalkChunks(ctx context.Context, ix corpus.Index, from, to corpus.ID, limit int, depth corpus.Depth, dst []corpus.LedgerRow) ([]corpus.LedgerRow, error)
	// BucketCounts returns entries per id bucket: those whose points must be there, and those
	// whose points may be.
	BucketCounts(ctx context.Context, ix corpus.Index) (settled, unsettled []int64, err error)
	// WalkBucket is WalkChunks for one bucket, dead entries left out.
	WalkBucket(ctx context.Context, ix corpus.Index, bucket uint32, from corpus.ID, limit int, dst []corpus.LedgerRow) ([]corpus.LedgerRow, error)
	// EstimatePoints guesses how many points an index should hold, without counting.
	EstimatePoints(ctx context.Context, ix corpus.Index) (int64, error)
	// ReadRows returns what is known about those of ids that are known, in any order.
	ReadRows(ctx context.Context, ix corpus.Index, ids []corpus.ID, overdue time.Duration) ([]corpus.LedgerRow, error)
	// StuckEntries calls each with batches of ids that nobody works on although they need it.
	StuckEntries(ctx context.Context, ix corpus.Index, lo, hi corpus.ID, overdue time.Duration, each func([]corpus.ID) error) error
}

// Decider changes the ledger, always under the row locks of the documents concerned.
type Decider interface {
	// Decide carries decisions out where the ledger has not moved; moved counts the others.
	Decide(ctx context.Context, run corpus.ID, ix corpus.Index, decisions []corpus.Decision, overdue time.Duration, retryAt time.Time, maxLooks int) (moved int, err error)
	// EnterTombstones declares ids dead, within the budget; a Conflict with code
	// reconcile_braked or collection_stopped means that nothing happened.
	EnterTombstones(ctx context.Context, ix corpus.Index, claims []corpus.OrphanClaim, budget corpus.DeleteBudget) ([]corpus.OrphanFate, error)
	// MarkAbsent records that dead points were read absent.
	MarkAbsent(ctx context.Context, ix corpus.Index, ids []corpus.ID) error
	// RebuildIndex replaces a lost index by a new one under a new name, filled by the workers.
	RebuildIndex(ctx context.Context, lost corpus.Index) (corpus.Index, error)
	// PendingUpTo reports whether entries of chunks with at most this gen are still to be
	// written into the index for the first time.
	PendingUpTo(ctx context.Context, ix corpus.Index, gen int64) (bool, error)
}

// Historian knows whether the ledger's own history is whole (promise P8).
type Historian interface {
	// RollbackFacts must be read after the points that they judge.
	RollbackFacts(ctx context.Context, collection corpus.ID) (corpus.RollbackFacts, error)
	// StopCollection forbids deletes until a documented step is taken; false where one was taken
	// since the facts were read that said adopted.
	StopCollection(ctx context.Context, collection corpus.ID, adopted int64, reason string) (stopped bool, err error)
	// JumpSequence moves gen past what a lost history may have handed out.
	JumpSequence(ctx context.Context, why string) error
	// StampFits says why a stamp contradicts the ledger, or "".
	StampFits(ctx context.Context, ix corpus.Index, st corpus.Stamp) (string, error)
	// IssueStamp draws an index's next nonce when the last is older than every.
	IssueStamp(ctx context.Context, ix corpus.Index, nonce corpus.ID, every time.Duration) (st corpus.Stamp, due bool, err error)
	// DeletesToday and LedgerEmpty are what the brake knows before the first tombstone.
	DeletesToday(ctx context.Context, collection corpus.ID) (int64, error)
	LedgerEmpty(ctx context.Context, collection corpus.ID) (bool, error)
}

// RunStore keeps runs, so that any instance can work on them and a killed one is resumed.
type RunStore interface {
	CreateRun(ctx context.Context, spec corpus.RunSpec, startedAt time.Time, leader corpus.ID, lease time.Duration) (corpus.RunRecord, error)
	GetRun(ctx context.Context, id corpus.ID) (corpus.RunRecord, error)
	ActiveRuns(ctx context.Context) ([]corpus.RunRecord, error)
	ResumableRun(ctx context.Context, collection string) (corpus.RunRecord, error)
	LeadRun(ctx context.Context, id, leader corpus.ID, lease time.Duration, revive bool) (bool, error)
	AdvanceRun(ctx context.Context, id, leader corpus.ID, stage corpus.RunStage) (bool, error)
	CancelRun(ctx context.Context, id corpus.ID) error
	FinishRun(ctx context.Context, id, leader corpus.ID, state corpus.RunState, message string, at time.Time) (bool, error)
	ForgetRuns(ctx context.Context) error

	TargetIndexes(ctx context.Context, collection corpus.ID) (ixs []corpus.Index, ready []bool, err error)
	KnownQdrantNames(ctx context.Context, names []string) (known, dropped []string, err error)
	PrepareTarget(ctx context.Context, run corpus.ID, t corpus.RunTarget, ranges []corpus.RunRange) error
	StopTarget(ctx context.Context, run, collection corpus.ID, reason string) error
	BrakeTarget(ctx context.Context, run, collection corpus.ID, reason string) error

	ClaimRange(ctx context.Context, run corpus.ID, stage corpus.RunStage, token corpus.ID, lease time.Duration) (r corpus.RunRange, ok bool, left int, err error)
	RenewRange(ctx context.Context, r corpus.RunRange, lease time.Duration) error
	FinishStage(ctx context.Context, r corpus.RunRange) error
	ReleaseRange(ctx context.Context, r corpus.RunRange) error
	Checkpoint(ctx context.Context, r corpus.RunRange, p corpus.ScanProgress, lease time.Duration) error
}

// FindingStore keeps what runs suspect and find.
type FindingStore interface {
	AddSuspects(ctx context.Context, run, index corpus.ID, suspects []corpus.Suspect) error
	SeedSuspects(ctx context.Context, run corpus.ID, ix corpus.Index, seenAt time.Time) error
	Suspects(ctx context.Context, r corpus.RunRange, from corpus.ID, limit int) ([]corpus.Suspect, error)
	AddFindings(ctx context.Context, run corpus.ID, ix corpus.Index, findings []corpus.Finding) error
	PendingFindings(ctx context.Context, r corpus.RunRange, state string, kinds []corpus.FindingKind, from corpus.ID, limit int) ([]corpus.Finding, error)
	SetFindings(ctx context.Context, run, index corpus.ID, findings []corpus.Finding, state string, details []string) error
	CountFindings(ctx context.Context, run, collection corpus.ID) (all, repaired corpus.Counts, err error)
	Rebuilding(ctx context.Context, run corpus.ID) ([]corpus.Index, error)

	RunProgress(ctx context.Context, run corpus.ID) (compared int64, err error)
	TargetReports(ctx context.Context, run corpus.ID, sample int) ([]corpus.CollectionReport, error)
	LatestReports(ctx context.Context, collection string, sample int) ([]corpus.CollectionReport, error)
	// PastRuns lists ended runs, newest first; background runs only if they covered everything
	// or found something.
	PastRuns(ctx context.Context, collection string, limit int) ([]corpus.RunRecord, error)
}

// Operator takes the documented steps after a rollback and looks single ids up.
type Operator interface {
	// ResolveCollection finds a collection by name.
	ResolveCollection(ctx context.Context, name string) (corpus.Collection, corpus.Index, error)
	// AdoptRollback makes this ledger the truth although it lost history; DiscardIndex does so
	// and gives every index of the collection up, to be built again from this ledger.
	AdoptRollback(ctx context.Context, collection corpus.ID) error
	DiscardIndex(ctx context.Context, collection corpus.ID) ([]corpus.Index, error)
	ExplainLedger(ctx context.Context, query, collection string) (corpus.Explanation, error)
	// StampedIndexes lists live indexes whose stamp is older than every.
	StampedIndexes(ctx context.Context, every time.Duration) ([]corpus.Index, error)
	CollectionName(ctx context.Context, id corpus.ID) (string, error)
	DueScrubs(ctx context.Context, quickEvery, sliceEvery time.Duration, slices int) (quick []string, slice map[string]int, err error)
	PutBackScrub(ctx context.Context, collection string, slice int) error
}

// Ledger is everything reconcile asks of Postgres.
type Ledger interface {
	Walker
	Decider
	Historian
	RunStore
	FindingStore
	Operator
}

// Scanner reads an index in bulk. Errors are corpus kinds; NotFound means the index is gone.
type Scanner interface {
	// Scroll returns points from the id from on, ascending; next is nil at the end. Depth Quick
	// reads ids alone, Full the payload's own keys, Deep payload and vectors.
	Scroll(ctx context.Context, ix corpus.Index, from corpus.ID, limit int, depth corpus.Depth) (page []corpus.PointState, next *corpus.ID, err error)
	// ScrollBucket is Scroll at depth Quick over points of ours in the id buckets.
	ScrollBucket(ctx context.Context, ix corpus.Index, buckets []uint32, from corpus.ID, limit int) (page []corpus.PointState, next *corpus.ID, err error)
	// ScrollForeign is Scroll at depth Quick over points that are not ours.
	ScrollForeign(ctx context.Context, ix corpus.Index, from corpus.ID, limit int) (page []corpus.PointState, next *corpus.ID, err error)
	// FacetBuckets counts our points by id bucket, exactly; CountPoints all points.
	FacetBuckets(ctx context.Context, ix corpus.Index) (map[uint32]int64, error)
	CountPoints(ctx context.Context, ix corpus.Index) (int64, error)
}

// PointStore reads and deletes single points.
type PointStore interface {
	// ReadPoints returns those of ids that exist, in any order.
	ReadPoints(ctx context.Context, ix corpus.Index, ids []corpus.ID, withVectors bool) ([]corpus.PointState, error)
	// DeletePoints deletes by id; nil means that all are done.
	DeletePoints(ctx context.Context, ix corpus.Index, ids []corpus.ID) error
	// FindGenAbove returns points of ours whose gen is above gen or inside a gap.
	FindGenAbove(ctx context.Context, ix corpus.Index, gen int64, gaps [][2]int64, limit int) ([]corpus.PointState, error)
}

// Inspector looks after whole indexes.
type Inspector interface {
	DescribeIndex(ctx context.Context, ix corpus.Index) (exists bool, drift []string, err error)
	// CreatePayloadIndexes makes those that are missing, in a collection that is there.
	CreatePayloadIndexes(ctx context.Context, ix corpus.Index) error
	DropIndex(ctx context.Context, ix corpus.Index) error
	ListOurCollections(ctx context.Context, prefix string) ([]string, error)
	ReadStamp(ctx context.Context, ix corpus.Index) (corpus.Stamp, bool, error)
	WriteStamp(ctx context.Context, ix corpus.Index, st corpus.Stamp) error
}

// Index is everything reconcile asks of the vector index.
type Index interface {
	Scanner
	PointStore
	Inspector
}

// Config of a Service. The zero value of a field means its default.
type Config struct {
	// Owner is the installation whose points are ours.
	Owner corpus.ID
	// IndexPrefix begins the names of our Qdrant collections; default "lockstep_".
	IndexPrefix string
	// Workers read ranges at the same time on this instance; default 2.
	Workers int
	// RangePoints is about how many points one range holds; default 250,000 (one second of a
	// scroll: what a killed worker loses at most).
	RangePoints int64
	// PointsPerSecond bounds what a requested run reads from the index; 0 means no bound.
	PointsPerSecond int
	// Grace is how long a suspect rests before the second look; default 2 s. It has to exceed
	// the time that replicas of the index need to agree; the protocol itself needs none.
	Grace time.Duration
	// Overdue is how long queued work may lie before it counts as stuck; default 2 min.
	Overdue time.Duration
	// SettleTimeout ends the wait for the workers when none of a range's entries settled for
	// that long; default 2 min.
	SettleTimeout time.Duration
	// Poll is how often a run looks whether the workers are done; default 200 ms.
	Poll time.Duration
	// Lease of ranges and of a run's lead; default 30 s. A killed instance is replaced after it.
	Lease time.Duration
	// MaxDeletes is the brake's share where a request names none; default 0.1.
	MaxDeletes float64
	// FreeDeletes is how many deletes a day are always allowed, so that one orphan among five
	// points is not a fifth; default 20.
	FreeDeletes int64
	// Quarantine, when positive, is how long a point found to be an orphan stays in the index,
	// declared dead and so invisible, before the workers delete it.
	Quarantine time.Duration
	// QuickBuckets is how many differing buckets a quick run descends into before it reads all
	// ids instead; default 256, a sixteenth.
	QuickBuckets int
	// Scrub configures the background.
	Scrub ScrubConfig
	// Wake, when not nil, is called after entries were given to the workers. It must not block.
	Wake func()
	// Clock, when nil, is the system's.
	Clock Clock
}

func (c *Config) defaults() {
	def(&c.IndexPrefix, "lockstep_")
	def(&c.Workers, 2)
	def(&c.RangePoints, 250_000)
	def(&c.Grace, 2*time.Second)
	def(&c.Overdue, 2*time.Minute)
	def(&c.SettleTimeout, 2*time.Minute)
	def(&c.Poll, 200*time.Millisecond)
	def(&c.Lease, 30*time.Second)
	def(&c.MaxDeletes, 0.1)
	def(&c.FreeDeletes, 20)
	def(&c.QuickBuckets, 256)
	if c.Wake == nil {
		c.Wake = func() {}
	}
	if c.Clock == nil {
		c.Clock = systemClock{}
	}
	c.Scrub.defaults()
}

func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// sampleSize is how many findings a report lists.
const sampleSize = 100

// Service runs reconciles. Its methods are safe for concurrent use; Close ends it.
type Service struct {
	cfg     Config
	ledger  Ledger
	index   Index
	clock   Clock
	log     *slog.Logger
	metrics *metrics
	hints   *hintQueue
	// leader is this instance's token as a leader of runs.
	leader corpus.ID

	ctx    context.Context // ends when Close is called; only for goroutines of the service
	cancel context.CancelCauseFunc
	mu     sync.Mutex // guards closed and wg.Add against Close, and leading
	closed bool
	// leading counts the goroutines of this instance that lead a run.
	leading map[corpus.ID]int
	wg      sync.WaitGroup
}

var errClosing = errors.New("reconcile: the service is closing")

// New makes a Service over a ledger and an index. It starts nothing: [Service.Scrub] and the
// runs of [Service.Start] do.
func New(cfg Config, ledger Ledger, index Index, log *slog.Logger, reg prometheus.Registerer) *Service {
	cfg.defaults()
	ctx, cancel := context.WithCancelCause(context.Background())
	return &Service{
		cfg: cfg, ledger: ledger, index: index, clock: cfg.Clock, log: log, metrics: newMetrics(reg),
		hints: newHintQueue(maxHints), leader: newID(), ctx: ctx, cancel: cancel,
		leading: map[corpus.ID]int{},
	}
}

// Close stops every run this instance works on, at its next checkpoint, and waits for them.
// Runs that it leads keep their checkpoints: another instance, or a later resume, goes on.
func (s *Service) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel(errClosing)
	s.wg.Wait()
}

// spawn runs f in a goroutine that Close waits for; false when the service is closing.
func (s *Service) spawn(f func(ctx context.Context)) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.wg.Go(func() { f(s.ctx) })
	return true
}

// hold says that a goroutine of this instance leads a run, or is about to, until the returned
// function is called: others leave the run to it.
func (s *Service) hold(run corpus.ID) (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leading[run]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.leading[run]--; s.leading[run] == 0 {
			delete(s.leading, run)
		}
	}
}

func (s *Service) isLeading(run corpus.ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leading[run] > 0
}

// Start begins a run, or with Resume goes on with the last unfinished one, and returns its id
// at once; the run ends even if ctx does. Errors: Invalid for a bad request, NotFound for an
// unknown collection or nothing to resume, Conflict (reconcile_running) while another run
// holds a collection.
func (s *Service) Start(ctx context.Context, req corpus.ReconcileRequest) (corpus.ID, error) {
	if req.Resume {
		return s.resume(ctx, req.Collection)
	}
	spec, err := s.spec(req)
	if err != nil {
		return corpus.ID{}, err
	}
	defer s.hold(spec.ID)() // launch holds it as well
	var rec corpus.RunRecord
	err = s.insist(ctx, spec.Collections, func() (err error) {
		rec, err = s.ledger.CreateRun(ctx, spec, s.clock.Now(), s.leader, s.cfg.Lease)
		return err
	})
	if err != nil {
		return corpus.ID{}, err
	}
	return spec.ID, s.launch(rec)
}

func (s *Service) resume(ctx context.Context, collection string) (corpus.ID, error) {
	rec, err := s.ledger.ResumableRun(ctx, collection)
	if err != nil {
		return corpus.ID{}, err
	}
	defer s.hold(rec.Spec.ID)()
	var got bool
	err = s.insist(ctx, rec.Spec.Collections, func() (err error) {
		got, err = s.ledger.LeadRun(ctx, rec.Spec.ID, s.leader, s.cfg.Lease, true)
		return err
	})
	switch {
	case err != nil:
		return corpus.ID{}, err
	case !got:
		return corpus.ID{}, corpus.Errorf(corpus.Conflict, codeRunning, "run %s goes on elsewhere", rec.Spec.ID)
	}
	return rec.Spec.ID, s.launch(rec)
}

// insist takes collections for somebody who asked: where the background holds one of them, it
// is told to step aside and waited for.
func (s *Service) insist(ctx context.Context, names []string, take func() error) error {
	for began := s.clock.Now(); ; {
		err := take()
		if corpus.CodeOf(err) != codeRunning || s.clock.Now().Sub(began) > preemptWait {
			return err
		}
		inWay, perr := s.preempt(ctx, names)
		switch {
		case perr != nil:
			return perr
		case !inWay:
			return err
		}
		if serr := s.clock.Sleep(ctx, s.cfg.Poll); serr != nil {
			return serr
		}
	}
}

// codeRunning is how the ledger says that another run holds a collection.
const codeRunning = "reconcile_running"

// preemptWait bounds how long a request waits for background runs to step aside: they notice
// within a second, or at their next page.
const preemptWait = 15 * time.Second

// preempt asks background runs of the collections to end, for somebody who asked. inWay is
// false when what holds the collections is not the background.
func (s *Service) preempt(ctx context.Context, names []string) (inWay bool, err error) {
	runs, err := s.ledger.ActiveRuns(ctx)
	if err != nil {
		return false, err
	}
	for _, r := range runs {
		if len(names) > 0 && !slices.ContainsFunc(r.Spec.Collections, func(n string) bool { return slices.Contains(names, n) }) {
			continue
		}
		if r.Spec.Origin == "request" {
			return false, nil
		}
		if err := s.ledger.CancelRun(ctx, r.Spec.ID); err != nil {
			return false, err
		}
	}
	return true, nil
}

func (s *Service) launch(rec corpus.RunRecord) error {
	pace, release := s.requestPace(), s.hold(rec.Spec.ID)
	if !s.spawn(func(ctx context.Context) {
		defer release()
		s.lead(ctx, rec.Spec.ID, pace)
	}) {
		release()
		return corpus.Errorf(corpus.Unavailable, "shutting_down", "the service is shutting down; the run can be resumed")
	}
	return nil
}

func (s *Service) requestPace() *pacer {
	return newPacer(s.clock, s.cfg.PointsPerSecond, 1, s.metrics.throttled.Inc)
}

func (s *Service) spec(req corpus.ReconcileRequest) (corpus.RunSpec, error) {
	spec := corpus.RunSpec{
		ID: newID(), Depth: req.Depth, Repair: req.Repair, Force: req.Force, MaxDeletes: req.MaxDeletes, DeleteForeign: req.DeleteForeign,
		Origin: "request", Hi: corpus.MaxID,
	}
	if req.Collection != "" {
		spec.Collections = []string{req.Collection}
	}
	switch spec.Depth {
	case "":
		spec.Depth = corpus.Full
	case corpus.Quick, corpus.Full, corpus.Deep:
	default:
		return spec, invalid("/depth", "depth is quick, full or deep, not %q", req.Depth)
	}
	if spec.MaxDeletes == 0 {
		spec.MaxDeletes = s.cfg.MaxDeletes
	}
	if !(spec.MaxDeletes > 0 && spec.MaxDeletes <= 1) {
		return spec, invalid("/max_deletes", "max_deletes is a share above 0 and at most 1, not %v", req.MaxDeletes)
	}
	if spec.DeleteForeign != "" && !spec.Repair {
		return spec, invalid("/delete_foreign", "foreign points are deleted only by a repairing run")
	}
	return spec, nil
}

func invalid(pointer, format string, args ...any) error {
	e := corpus.Errorf(corpus.Invalid, "validation_failed", format, args...)
	e.Fields = []corpus.FieldError{{Pointer: pointer, Code: "invalid", Detail: e.Detail}}
	return e
}

// Run returns a run's progress or result; NotFound (run_not_found) when it is not known.
func (s *Service) Run(ctx context.Context, id corpus.ID) (corpus.RunReport, error) {
	rec, err := s.ledger.GetRun(ctx, id)
	if err != nil {
		return corpus.RunReport{}, err
	}
	return s.report(ctx, rec, sampleSize)
}

func (s *Service) report(ctx context.Context, rec corpus.RunRecord, sample int) (rep corpus.RunReport, err error) {
	rep = corpus.RunReport{
		RunID: rec.Spec.ID, State: rec.State, Depth: rec.Spec.Depth, Repair: rec.Spec.Repair,
		StartedAt: rec.StartedAt, FinishedAt: rec.FinishedAt, Error: rec.Error,
	}
	for _, t := range rec.Targets {
		rep.Expected += t.IndexPoints
	}
	if rep.Compared, err = s.ledger.RunProgress(ctx, rec.Spec.ID); err != nil {
		return rep, err
	}
	rep.Expected = max(rep.Expected, rep.Compared)
	rep.Collections, err = s.ledger.TargetReports(ctx, rec.Spec.ID, sample)
	return rep, err
}

// Wait blocks until the run has ended, calling progress (which may be nil) at every poll, and
// returns its report. When ctx ends first, the run goes on and the cause is returned.
func (s *Service) Wait(ctx context.Context, id corpus.ID, progress func(corpus.RunReport)) (corpus.RunReport, error) {
	for {
		rep, err := s.Run(ctx, id)
		if err != nil {
			return rep, err
		}
		if rep.State != corpus.RunRunning {
			return rep, nil
		}
		if progress != nil {
			progress(rep)
		}
		if err := s.clock.Sleep(ctx, s.cfg.Poll); err != nil {
			return rep, err
		}
	}
}

// Cancel asks a run to end. It ends within a page's time; what it repaired stays repaired.
func (s *Service) Cancel(ctx context.Context, id corpus.ID) error { return s.ledger.CancelRun(ctx, id) }

// Latest returns the latest verdict of the named collection, or of all.
func (s *Service) Latest(ctx context.Context, collection string) ([]corpus.CollectionReport, error) {
	return s.ledger.LatestReports(ctx, collection, sampleSize)
}

// History returns up to limit past runs of a collection ("" for all), newest first, without
// samples: what was asked for, and what the background checked entirely or found.
func (s *Service) History(ctx context.Context, collection string, limit int) ([]corpus.RunReport, error) {
	recs, err := s.ledger.PastRuns(ctx, collection, min(max(limit, 1), 1000))
	if err != nil {
		return nil, err
	}
	out := make([]corpus.RunReport, len(recs))
	for i, rec := range recs {
		if out[i], err = s.report(ctx, rec, 0); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// AdoptRollback makes the restored ledger the truth for the collection: its deletes may run
// again, every entry is read back, and points of the lost history become orphans, which the
// next repairing run deletes.
func (s *Service) AdoptRollback(ctx context.Context, collection string) error {
	c, err := s.resolveStop(ctx, collection)
	if err != nil {
		return err
	}
	if err := s.ledger.AdoptRollback(ctx, c.ID); err != nil {
		return err
	}
	s.log.WarnContext(ctx, "rollback adopted", "collection", collection)
	s.cfg.Wake()
	return nil
}

// DiscardRollback gives the collection's indexes up and has them built again, under new names,
// from what the ledger says. The old ones are dropped by the workers.
func (s *Service) DiscardRollback(ctx context.Context, collection string) error {
	c, err := s.resolveStop(ctx, collection)
	if err != nil {
		return err
	}
	if _, err := s.ledger.DiscardIndex(ctx, c.ID); err != nil {
		return err
	}
	s.log.WarnContext(ctx, "indexes discarded after a rollback", "collection", collection)
	s.cfg.Wake()
	return nil
}

// resolveStop prepares the end of a stop. The order lets an interruption leave the collection
// stopped: first the sequence passes whatever the lost history handed out (so that what is
// adopted includes it), then the indexes get a stamp of this ledger.
func (s *Service) resolveStop(ctx context.Context, collection string) (corpus.Collection, error) {
	c, _, err := s.ledger.ResolveCollection(ctx, collection)
	if err != nil {
		return c, err
	}
	if err := s.ledger.JumpSequence(ctx, "an operator resolved a rollback of collection "+collection); err != nil {
		return c, err
	}
	ixs, ready, err := s.ledger.TargetIndexes(ctx, c.ID)
	if err != nil {
		return c, err
	}
	for i, ix := range ixs {
		if !ready[i] {
			continue
		}
		if err := s.writeStamp(ctx, ix, 0); err != nil && corpus.KindOf(err) != corpus.NotFound {
			return c, err
		}
	}
	return c, nil
}

func newID() corpus.ID {
	var id corpus.ID
	_, _ = rand.Read(id[:]) // never fails: crypto/rand ends the process instead
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	return id
}
