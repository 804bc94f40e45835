package config

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Validate checks each field and fields against each other. The error lists everything that
// is wrong, one problem a line, each naming the setting.
func (c *Config) Validate() error {
	var bad []error
	fault := func(path, format string, args ...any) {
		bad = append(bad, fmt.Errorf("%s: %s", path, fmt.Sprintf(format, args...)))
	}
	within := func(path string, n, lo, hi int) {
		if n < lo || n > hi {
			fault(path, "%d is not within %d to %d", n, lo, hi)
		}
	}
	atLeast := func(path string, d, lo time.Duration) {
		if d < lo {
			fault(path, "%s is shorter than %s", d, lo)
		}
	}
	oneOf := func(path, v string, accepted ...string) {
		if !slices.Contains(accepted, v) {
			fault(path, "%q is none of %s", v, strings.Join(accepted, ", "))
		}
	}

	host, port, err := net.SplitHostPort(c.Listen)
	if err != nil {
		fault("listen", "%q is not host:port, such as 127.0.0.1:8080", c.Listen)
	} else {
		if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
			fault("listen", "%q is not a port", port)
		}
		if len(c.APIKeys) == 0 && !loopback(host) {
			fault("listen", "%s is reachable from other machines, but no API keys are set: set LOCKSTEP_API_KEYS (or api_keys_file), or listen on 127.0.0.1", c.Listen)
		}
	}
	if c.Model == "" {
		fault("model", "empty; use minilm, bge-m3 or a folder")
	}
	device, number, numbered := strings.Cut(c.Device, ":")
	oneOf("device", device, "auto", "cpu", "cuda")
	if n, err := strconv.Atoi(number); numbered && (device != "cuda" || err != nil || n < 0 || n > 63) {
		fault("device", "%q is none of auto, cpu, cuda, cuda:N", c.Device)
	}
	oneOf("precision", c.Precision, "auto", "fp32", "fp16", "int8")
	if c.Precision == "fp16" && c.Device == "cpu" {
		fault("precision", "fp16 needs a GPU; a CPU computes fp32 or int8")
	}
	if c.Precision == "int8" && device == "cuda" {
		fault("precision", "int8 is for CPUs; a GPU computes fp16 or fp32")
	}
	if s := string(c.DatabaseURL); s != "" {
		u, err := url.Parse(s)
		isURL := err == nil && (u.Scheme == "postgres" || u.Scheme == "postgresql")
		// Never quoted: it carries a password.
		if !isURL && (strings.Contains(s, "://") || !strings.Contains(s, "=")) {
			fault("database_url", "neither a postgres:// URL nor key=value settings")
		}
	}
	if c.QdrantURL != "" {
		u, err := url.Parse(c.QdrantURL)
		switch {
		case err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Hostname() == "":
			fault("qdrant_url", "not a URL such as http://host:6334 or https://host:6334")
		case u.User != nil:
			fault("qdrant_url", "credentials do not belong here; set QDRANT_API_KEY")
		case strings.Trim(u.Path, "/") != "" || u.RawQuery != "":
			fault("qdrant_url", "a gRPC address has no path and no parameters")
		case u.Port() == "6333":
			fault("qdrant_url", "6333 is Qdrant's HTTP port; Lockstep speaks gRPC, usually on 6334")
		}
	} else if c.QdrantAPIKey != "" {
		fault("qdrant_api_key", "set without qdrant_url")
	}
	names, secrets := map[string]bool{}, map[Secret]bool{}
	for _, k := range c.APIKeys {
		if names[k.Name] {
			fault("api_keys", "two keys are named %s", k.Name)
		}
		if secrets[k.Secret] {
			fault("api_keys", "%s has the secret of another key", k.Name)
		}
		names[k.Name], secrets[k.Secret] = true, true
	}
	if c.Collection == "" {
		fault("collection", "empty")
	}
	atLeast("shutdown_timeout", c.ShutdownTimeout, 0)
	oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")
	oneOf("log.format", c.Log.Format, "auto", "text", "json")
	if (c.TLS.CertFile == "") != (c.TLS.KeyFile == "") {
		fault("tls", "cert_file and key_file are set together or not at all")
	}
	for _, f := range []struct{ path, file string }{{"tls.cert_file", c.TLS.CertFile}, {"tls.key_file", c.TLS.KeyFile}} {
		if f.file != "" {
			if err := exists(f.file); err != nil {
				fault(f.path, "%s: %v", f.file, err)
			}
		}
	}

	if c.HTTP.MaxBody < 1<<10 {
		fault("http.max_body", "%s is less than 1KiB", c.HTTP.MaxBody)
	}
	if c.HTTP.MaxLine < 1<<10 {
		fault("http.max_line", "%s is less than 1KiB", c.HTTP.MaxLine)
	}
	within("http.max_requests", c.HTTP.MaxRequests, 1, 100_000)
	atLeast("http.timeout", c.HTTP.Timeout, time.Second)
	atLeast("http.ingest_timeout", c.HTTP.IngestTimeout, c.HTTP.Timeout)
	atLeast("http.stream_idle", c.HTTP.StreamIdle, time.Second)
	if c.HTTP.RatePerKey < 0 || c.HTTP.RatePerKey != c.HTTP.RatePerKey {
		fault("http.rate_per_key", "must not be negative")
	}
	if c.HTTP.RatePerKey > 0 && len(c.APIKeys) == 0 {
		fault("http.rate_per_key", "limits API keys, but none are set")
	}
	within("http.rate_burst", c.HTTP.RateBurst, 0, 1_000_000)

	within("database.max_conns", c.Database.MaxConns, 4, 1000)
	atLeast("database.connect_timeout", c.Database.ConnectTimeout, 100*time.Millisecond)
	atLeast("qdrant.timeout", c.Qdrant.Timeout, 100*time.Millisecond)
	if c.Qdrant.MaxBatchBytes < 64<<10 {
		fault("qdrant.max_batch_bytes", "%s is less than 64KiB", c.Qdrant.MaxBatchBytes)
	}
	within("qdrant.max_batch_points", c.Qdrant.MaxBatchPoints, 1, 10_000)
	within("qdrant.shards", c.Qdrant.Shards, 0, 10_000)
	within("qdrant.replicas", c.Qdrant.Replicas, 0, 100)
	within("qdrant.write_consistency", c.Qdrant.WriteConsistency, 0, 100)
	if r := c.Qdrant.Replicas; r > 0 && c.Qdrant.WriteConsistency > r {
		fault("qdrant.write_consistency", "%d confirmations cannot come from %d replicas", c.Qdrant.WriteConsistency, r)
	}

	within("embedder.threads", c.Embedder.Threads, 0, 1024)
	within("embedder.nice", c.Embedder.Nice, 0, 19)
	within("embedder.runners", c.Embedder.Runners, 0, 64)
	within("embedder.batch_tokens", c.Embedder.BatchTokens, 0, 1<<24)
	within("embedder.batch_rows", c.Embedder.BatchRows, 0, 1<<16)
	within("embedder.queue_tokens", c.Embedder.QueueTokens, 0, 1<<30)
	if q, b := c.Embedder.QueueTokens, c.Embedder.BatchTokens; q > 0 && b > q {
		fault("embedder.batch_tokens", "a batch of %d tokens never fits a queue of %d", b, q)
	}
	atLeast("embedder.age_limit", c.Embedder.AgeLimit, time.Millisecond)

	within("ingest.workers", c.Ingest.Workers, 1, 256)
	within("ingest.batch_chunks", c.Ingest.BatchChunks, 1, 10_000)
	if c.Ingest.Workers+4 > c.Database.MaxConns {
		fault("ingest.workers", "%d workers leave too few of %d connections for requests; raise database.max_conns to %d or more", c.Ingest.Workers, c.Database.MaxConns, c.Ingest.Workers+4)
	}
	atLeast("ingest.lease", c.Ingest.Lease, 5*time.Second)
	if c.Ingest.Lease < c.Qdrant.Timeout {
		fault("ingest.lease", "%s is shorter than one request to Qdrant may take (%s)", c.Ingest.Lease, c.Qdrant.Timeout)
	}
	atLeast("ingest.tombstone_age", c.Ingest.TombstoneAge, 0)

	atLeast("search.timeout", c.Search.Timeout, 10*time.Millisecond)
	if c.Search.Timeout > c.HTTP.Timeout {
		fault("search.timeout", "%s is longer than a request may take (http.timeout %s)", c.Search.Timeout, c.HTTP.Timeout)
	}
	atLeast("search.cache_ttl", c.Search.CacheTTL, 0)

	within("reconcile.workers", c.Reconcile.Workers, 1, 256)
	within("reconcile.points_per_second", c.Reconcile.PointsPerSecond, 0, 1<<30)
	within("reconcile.free_deletes", c.Reconcile.FreeDeletes, 0, 1<<30)
	within("reconcile.scrub_points_per_second", c.Reconcile.ScrubPoints, 1, 1<<30)
	atLeast("reconcile.grace", c.Reconcile.Grace, 0)
	atLeast("reconcile.quarantine", c.Reconcile.Quarantine, 0)
	atLeast("reconcile.scrub_quick_every", c.Reconcile.ScrubQuickEvery, time.Second)
	atLeast("reconcile.scrub_full_within", c.Reconcile.ScrubFullWithin, time.Minute)
	if m := c.Reconcile.MaxDeletes; !(m > 0 && m <= 1) {
		fault("reconcile.max_deletes", "%v is not a share above 0 and up to 1", m)
	}
	return errors.Join(bad...)
}

// loopback reports whether only this machine can reach the host.
func loopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}
