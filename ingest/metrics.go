package ingest

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

type metrics struct {
	documents       *prometheus.CounterVec
	chunks          *prometheus.CounterVec
	points          prometheus.Counter
	deleted         prometheus.Counter
	purged          prometheus.Counter
	rejected        prometheus.Counter
	storeFailures   prometheus.Counter
	acceptDocuments prometheus.Histogram
	acceptSeconds   prometheus.Histogram
	batchEntries    prometheus.Histogram
	batchSeconds    prometheus.Histogram
	settleSeconds   prometheus.Histogram
	oldest          prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer, jobs *jobQueue) *metrics {
	f := promauto.With(reg)
	f.NewGaugeFunc(prometheus.GaugeOpts{Name: "lockstep_ingest_queue_entries",
		Help: "Claimed entries waiting in memory for a worker."}, func() float64 { return float64(jobs.waiting()) })
	seconds := prometheus.ExponentialBuckets(0.001, 2, 15)
	sizes := prometheus.ExponentialBuckets(1, 2, 11)
	return &metrics{
		documents: f.NewCounterVec(prometheus.CounterOpts{Name: "lockstep_ingest_documents_total",
			Help: "Documents by what the ledger made of them."}, []string{"result"}),
		chunks: f.NewCounterVec(prometheus.CounterOpts{Name: "lockstep_ingest_chunks_total",
			Help: "Index entries worked on, by outcome."}, []string{"result"}),
		points: f.NewCounter(prometheus.CounterOpts{Name: "lockstep_ingest_points_written_total",
			Help: "Points whose write the index completed."}),
		deleted: f.NewCounter(prometheus.CounterOpts{Name: "lockstep_ingest_points_deleted_total",
			Help: "Dead points deleted and confirmed absent."}),
		purged: f.NewCounter(prometheus.CounterOpts{Name: "lockstep_ingest_tombstones_purged_total",
			Help: "Tombstones purged after the grace period."}),
		rejected: f.NewCounter(prometheus.CounterOpts{Name: "lockstep_ingest_rejected_total",
			Help: "Requests refused because too many documents were waiting."}),
		storeFailures: f.NewCounter(prometheus.CounterOpts{Name: "lockstep_ingest_index_failures_total",
			Help: "Batches put off because the index did not answer."}),
		acceptDocuments: f.NewHistogram(prometheus.HistogramOpts{Name: "lockstep_ingest_accept_documents",
			Help: "Documents in one accepting transaction.", Buckets: sizes}),
		acceptSeconds: f.NewHistogram(prometheus.HistogramOpts{Name: "lockstep_ingest_accept_seconds",
			Help: "Duration of accepting transactions.", Buckets: seconds}),
		batchEntries: f.NewHistogram(prometheus.HistogramOpts{Name: "lockstep_ingest_batch_entries",
			Help: "Entries worked on at once.", Buckets: sizes}),
		batchSeconds: f.NewHistogram(prometheus.HistogramOpts{Name: "lockstep_ingest_batch_seconds",
			Help: "Duration of embedding and writing one batch.", Buckets: seconds}),
		settleSeconds: f.NewHistogram(prometheus.HistogramOpts{Name: "lockstep_ingest_settle_seconds",
			Help: "Duration of transactions that record results and switch versions.", Buckets: seconds}),
		oldest: f.NewGauge(prometheus.GaugeOpts{Name: "lockstep_ingest_oldest_pending_timestamp_seconds",
			Help: "Since when the longest waiting entry has been due; 0 when none is."}),
	}
}

// observe notes since when work has been due.
func (m *metrics) observe(live []corpus.LiveIndex) {
	oldest := 0.0
	for i := range live {
		if t := live[i].Oldest; !t.IsZero() {
			if at := float64(t.UnixMilli()) / 1000; oldest == 0 || at < oldest {
				oldest = at
			}
		}
	}
	m.oldest.Set(oldest)
}
