package reconcile

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

type metrics struct {
	differences *prometheus.GaugeVec
	lastSuccess prometheus.Gauge
	compared    prometheus.Counter
	repairs     *prometheus.CounterVec
	runs        *prometheus.CounterVec
	seconds     *prometheus.HistogramVec
	moved       prometheus.Counter
	throttled   prometheus.Counter
	hints       *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	m := &metrics{
		differences: f.NewGaugeVec(prometheus.GaugeOpts{Name: "lockstep_reconcile_differences",
			Help: "Unrepaired differences between ledger and index in the latest verdicts, over all collections."}, []string{"kind"}),
		lastSuccess: f.NewGauge(prometheus.GaugeOpts{Name: "lockstep_reconcile_last_success_timestamp_seconds",
			Help: "When a run over a whole collection last ended on this instance without an error."}),
		compared: f.NewCounter(prometheus.CounterOpts{Name: "lockstep_reconcile_points_compared_total",
			Help: "Ids compared between ledger and index."}),
		repairs: f.NewCounterVec(prometheus.CounterOpts{Name: "lockstep_reconcile_repairs_total",
			Help: "Repairs by kind of finding and result: repaired (read back) or remains."}, []string{"kind", "result"}),
		runs: f.NewCounterVec(prometheus.CounterOpts{Name: "lockstep_reconcile_runs_total",
			Help: "Runs that ended, by result."}, []string{"result"}),
		seconds: f.NewHistogramVec(prometheus.HistogramOpts{Name: "lockstep_reconcile_run_seconds",
			Help: "Duration of runs by depth.", Buckets: prometheus.ExponentialBuckets(0.1, 4, 10)}, []string{"depth"}),
		moved: f.NewCounter(prometheus.CounterOpts{Name: "lockstep_reconcile_moved_suspects_total",
			Help: "Second looks that found the ledger's row moving, so that nothing was decided."}),
		throttled: f.NewCounter(prometheus.CounterOpts{Name: "lockstep_reconcile_retries_total",
			Help: "Calls repeated because a store was overloaded or away."}),
		hints: f.NewCounterVec(prometheus.CounterOpts{Name: "lockstep_reconcile_hints_total",
			Help: "Read-repair hints by result: queued, known (already queued) or dropped (queue full)."}, []string{"result"}),
	}
	for _, k := range corpus.FindingKinds {
		m.differences.WithLabelValues(string(k))
	}
	return m
}

// refreshGauges sets the differences from the ledger's latest verdicts, so that every instance
// shows the same.
func (s *Service) refreshGauges(ctx context.Context) {
	reports, err := s.ledger.LatestReports(ctx, "", 0)
	if err != nil {
		s.log.WarnContext(ctx, "reading verdicts for the metrics", "error", err)
		return
	}
	sum := corpus.NewCounts()
	for _, r := range reports {
		for k, n := range r.Findings {
			sum[k] += n - r.Repaired[k]
		}
	}
	for k, n := range sum {
		s.metrics.differences.WithLabelValues(string(k)).Set(float64(n))
	}
}
