package search

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

type metrics struct {
	requests                                         *prometheus.CounterVec
	seconds                                          prometheus.Histogram
	stages                                           *prometheus.HistogramVec
	results, filtered, widened, refreshed, truncated prometheus.Counter
	hinted                                           prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, c *cache) *metrics {
	f := promauto.With(reg)
	counter := func(name, help string) prometheus.Counter {
		return f.NewCounter(prometheus.CounterOpts{Name: "lockstep_search_" + name, Help: help})
	}
	// From a cached dense query on one machine to a search at its deadline.
	buckets := prometheus.ExponentialBuckets(0.0005, 2, 16)
	m := &metrics{
		requests: f.NewCounterVec(prometheus.CounterOpts{
			Name: "lockstep_search_queries_total", Help: "Queries answered, by mode, and failed, by error kind."}, []string{"mode", "result"}),
		seconds: f.NewHistogram(prometheus.HistogramOpts{
			Name: "lockstep_search_seconds", Help: "Time of an answered search or batch.", Buckets: buckets}),
		stages: f.NewHistogramVec(prometheus.HistogramOpts{
			Name: "lockstep_search_stage_seconds", Help: "Time in each stage of an answered search or batch.", Buckets: buckets}, []string{"stage"}),
		results:   counter("results_total", "Results shown."),
		filtered:  counter("filtered_total", "Candidates of the index that the ledger removed: unknown, dead, waiting, or not matching the filter."),
		widened:   counter("widened_total", "Times a query was widened because too few candidates were left, or equal scores went on beyond them."),
		refreshed: counter("refreshed_total", "Times the index was asked again because a document switched while it answered."),
		truncated: counter("truncated_total", "Answers that may be short, for want of time or of candidates."),
		hinted:    counter("hints_total", "Ids handed to reconcile: dead or unknown points found, live ones missed."),
	}
	cached := f.NewCounterVec(prometheus.CounterOpts{
		Name: "lockstep_search_query_cache_total", Help: "Query embeddings by where they came from: hit (cached), shared (computed for another request), miss."}, []string{"result"})
	c.hits, c.shared, c.misses = cached.WithLabelValues("hit").Inc, cached.WithLabelValues("shared").Inc, cached.WithLabelValues("miss").Inc
	f.NewGaugeFunc(prometheus.GaugeOpts{Name: "lockstep_search_query_cache_bytes", Help: "Size of the cached query embeddings."}, func() float64 {
		c.mu.Lock()
		defer c.mu.Unlock()
		return float64(c.bytes)
	})
	return m
}

func (m *metrics) failed(err error, queries int) {
	m.requests.WithLabelValues("none", string(corpus.KindOf(err))).Add(float64(queries))
}

func (m *metrics) answered(out []corpus.SearchResponse, took time.Duration) {
	m.seconds.Observe(took.Seconds())
	for i := range out {
		r := &out[i]
		m.requests.WithLabelValues(string(r.Mode), "ok").Inc()
		m.results.Add(float64(len(r.Results)))
		m.filtered.Add(float64(r.Filtered))
		m.widened.Add(float64(r.Widened))
		if r.Truncated {
			m.truncated.Inc()
		}
	}
}

func (m *metrics) stage(embed, index, join time.Duration) {
	m.stages.WithLabelValues("embed").Observe(embed.Seconds())
	m.stages.WithLabelValues("index").Observe(index.Seconds())
	m.stages.WithLabelValues("join").Observe(join.Seconds())
}
