package httpapi

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	inFlight prometheus.Gauge
	rejected *prometheus.CounterVec
	panics   prometheus.Counter
	received prometheus.Counter
	sent     prometheus.Counter
}

// newMetrics registers this room's metrics. Labels are route templates and methods of the
// route table, never paths: ids must not become label values.
func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	return &metrics{
		requests: f.NewCounterVec(prometheus.CounterOpts{
			Name: "http_requests_total", Help: "Requests answered, by route template, method and status."},
			[]string{"route", "method", "status"}),
		seconds: f.NewHistogramVec(prometheus.HistogramOpts{
			Name: "http_request_seconds", Help: "Time from the request's header to the end of the reply.",
			// From a health check (under a millisecond) to a bulk load that waits.
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300}},
			[]string{"route"}),
		inFlight: f.NewGauge(prometheus.GaugeOpts{
			Name: "http_requests_in_flight", Help: "Requests being answered, health checks excluded."}),
		rejected: f.NewCounterVec(prometheus.CounterOpts{
			Name: "http_rejected_total", Help: "Requests refused before any work was done, by reason."},
			[]string{"reason"}),
		panics: f.NewCounter(prometheus.CounterOpts{
			Name: "http_panics_total", Help: "Handlers that panicked; each is a defect."}),
		received: f.NewCounter(prometheus.CounterOpts{
			Name: "http_received_bytes_total", Help: "Bytes of request bodies read."}),
		sent: f.NewCounter(prometheus.CounterOpts{
			Name: "http_sent_bytes_total", Help: "Bytes of reply bodies written."}),
	}
}
