package embedder

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

type metrics struct {
	rejected                                          *prometheus.CounterVec
	dropped, failed, poisoned, truncated, outOfMemory prometheus.Counter
	tokens, padding                                   prometheus.Counter
	wait, size, batchTokens, run                      prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer, b *Batcher) *metrics {
	f := promauto.With(reg)
	counter := func(name, help string) prometheus.Counter {
		return f.NewCounter(prometheus.CounterOpts{Name: "lockstep_embedder_" + name, Help: help})
	}
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		return f.NewHistogram(prometheus.HistogramOpts{Name: "lockstep_embedder_" + name, Help: help, Buckets: buckets})
	}
	for which, name := range map[corpus.Lane]string{corpus.Bulk: "bulk", corpus.Query: "query"} {
		labels := prometheus.Labels{"lane": name}
		gauge := func(metric, help string, read func(*lane) int) {
			f.NewGaugeFunc(prometheus.GaugeOpts{Name: "lockstep_embedder_" + metric, Help: help, ConstLabels: labels}, func() float64 {
				b.mu.Lock()
				defer b.mu.Unlock()
				return float64(read(&b.lanes[which]))
			})
		}
		gauge("queue_rows", "Texts waiting for a batch.", func(l *lane) int { return l.rows })
		gauge("queue_tokens", "Tokens admitted and not yet finished.", func(l *lane) int { return l.tokens })
	}
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "lockstep_embedder_budget_tokens", Help: "Token budget of a batch; below the configured one after the device ran out of memory.",
	}, func() float64 {
		b.mu.Lock()
		defer b.mu.Unlock()
		return float64(b.budget)
	})
	return &metrics{
		rejected: f.NewCounterVec(prometheus.CounterOpts{
			Name: "lockstep_embedder_rejected_total", Help: "Requests refused at admission, by reason."}, []string{"reason"}),
		dropped:     counter("dropped_total", "Texts whose caller left before they ran."),
		failed:      counter("failed_batches_total", "Batches that failed and were retried one by one."),
		poisoned:    counter("failed_inputs_total", "Texts that failed even alone."),
		truncated:   counter("truncated_inputs_total", "Texts cut to the maximum length."),
		outOfMemory: counter("out_of_memory_total", "Batches that did not fit the device's memory."),
		tokens:      counter("tokens_total", "Tokens embedded."),
		padding:     counter("padding_tokens_total", "Tokens of padding computed beside them."),
		wait:        histogram("queue_wait_seconds", "From arrival to the start of the batch.", prometheus.ExponentialBuckets(0.0001, 4, 10)),
		size:        histogram("batch_rows", "Texts in a batch.", prometheus.ExponentialBuckets(1, 2, 10)),
		batchTokens: histogram("batch_tokens", "Tokens in a batch.", prometheus.ExponentialBuckets(8, 4, 8)),
		run:         histogram("run_seconds", "Time of one batch on the device.", prometheus.ExponentialBuckets(0.0005, 3, 10)),
	}
}

func (m *metrics) batch(rows, tokens, longest int, padded bool, took time.Duration) {
	m.size.Observe(float64(rows))
	m.batchTokens.Observe(float64(tokens))
	m.run.Observe(took.Seconds())
	m.tokens.Add(float64(tokens))
	if padded {
		m.padding.Add(float64(rows*longest - tokens))
	}
}
