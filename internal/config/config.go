package config

import (
	"time"
)

// Config is everything that can be set. A field's flag is its YAML path with dashes
// (--http-max-body), its variable the same in capitals after LOCKSTEP_ (LOCKSTEP_HTTP_MAX_BODY)
// unless an env tag names others. The help tags are what --help and docs print.
type Config struct {
	Listen  string `yaml:"listen" help:"address to serve HTTP on; without API keys it must be loopback"`
	DataDir string `yaml:"data_dir" help:"folder of the embedded Postgres and index; default $XDG_DATA_HOME/lockstep (~/.local/share/lockstep), or /var/lib/lockstep for root"`
	// CacheDir holds what was fetched or built once: libraries, checkpoints, built models.
	CacheDir string `yaml:"cache_dir" help:"folder of what is fetched or built once; default $XDG_CACHE_HOME/lockstep"`

	Model     string `yaml:"model" help:"minilm, bge-m3, or a folder: a built model, or a checkpoint, which is built into the cache first"`
	Device    string `yaml:"device" help:"where the model runs: auto, cpu, cuda or cuda:N; cuda is an error where there is none, never a silent fallback"`
	Precision string `yaml:"precision" help:"precision of the built model: auto (fp32 on a CPU, fp16 on a GPU), fp32, fp16 or int8"`
	// ONNXRuntimeLib is found in the cache unless it is set.
	ONNXRuntimeLib string `yaml:"onnxruntime_lib" env:"ONNXRUNTIME_LIB" help:"path of the ONNX Runtime shared library; default the one in the cache"`

	DatabaseURL  Secret `yaml:"database_url" env:"DATABASE_URL" help:"Postgres to record in, as a URL or key=value; empty runs one under data-dir"`
	QdrantURL    string `yaml:"qdrant_url" env:"QDRANT_URL" help:"gRPC address of Qdrant as a URL (http://host:6334, https:// for TLS); empty runs one under data-dir"`
	QdrantAPIKey Secret `yaml:"qdrant_api_key" env:"QDRANT_API_KEY" help:"API key of Qdrant"`

	APIKeys     APIKeys `yaml:"api_keys" help:"API keys as name:scope+scope:secret, several separated by spaces or commas; scopes are read, write and admin"`
	APIKeysFile string  `yaml:"api_keys_file" help:"file with one such API key a line; # begins a comment"`

	// Scrub is the switch; the Scrub* settings of Reconcile say how.
	Scrub bool `yaml:"scrub" help:"compare the stores in the background, all the time and gently"`
	// Collection is created on first use, as any other.
	Collection string `yaml:"collection" help:"collection of requests that name none"`

	ShutdownTimeout time.Duration `yaml:"shutdown_timeout" help:"how long requests under way have to finish after SIGTERM"`

	Log       Log       `yaml:"log"`
	TLS       TLS       `yaml:"tls"`
	HTTP      HTTP      `yaml:"http"`
	Database  Database  `yaml:"database"`
	Qdrant    Qdrant    `yaml:"qdrant"`
	Embedder  Embedder  `yaml:"embedder"`
	Ingest    Ingest    `yaml:"ingest"`
	Search    Search    `yaml:"search"`
	Reconcile Reconcile `yaml:"reconcile"`

	// sources says where each setting that is not a default came from, by YAML path.
	sources map[string]string
}

// Log says what is logged, and how.
type Log struct {
	Level  string `yaml:"level" help:"debug, info, warn or error"`
	Format string `yaml:"format" help:"auto (text on a terminal, else JSON), text or json"`
}

// TLS serves HTTPS when both are set.
type TLS struct {
	CertFile string `yaml:"cert_file" help:"PEM file of the server's certificate chain"`
	KeyFile  string `yaml:"key_file" help:"PEM file of its private key"`
}

// HTTP bounds requests.
type HTTP struct {
	MaxBody       Bytes         `yaml:"max_body" help:"largest body of one request; streams of documents have no such limit"`
	MaxLine       Bytes         `yaml:"max_line" help:"longest line of a stream of documents"`
	MaxRequests   int           `yaml:"max_requests" help:"requests worked on at once; more get 429"`
	Timeout       time.Duration `yaml:"timeout" help:"time limit of a request that neither writes nor embeds in bulk"`
	IngestTimeout time.Duration `yaml:"ingest_timeout" help:"time limit of a request that writes or embeds, and of each batch of a stream"`
	StreamIdle    time.Duration `yaml:"stream_idle" help:"how long a stream of documents may stay without a new one"`
	RatePerKey    float64       `yaml:"rate_per_key" help:"requests a second that each API key may make; 0 is no limit"`
	RateBurst     int           `yaml:"rate_burst" help:"requests a key may make at once under rate-per-key; 0 is twice the rate"`
}

// Database bounds the use of Postgres.
type Database struct {
	MaxConns       int           `yaml:"max_conns" help:"connections of this instance to Postgres"`
	ConnectTimeout time.Duration `yaml:"connect_timeout" help:"time limit of one attempt to connect"`
}

// Qdrant says how the index is used and how new Qdrant collections are made.
type Qdrant struct {
	Timeout          time.Duration `yaml:"timeout" help:"time limit of one request to Qdrant"`
	MaxBatchBytes    Bytes         `yaml:"max_batch_bytes" help:"largest write request"`
	MaxBatchPoints   int           `yaml:"max_batch_points" help:"most points of one write request"`
	Shards           int           `yaml:"shards" help:"shards of new Qdrant collections; 0 leaves it to Qdrant"`
	Replicas         int           `yaml:"replicas" help:"replicas of new Qdrant collections; 0 leaves it to Qdrant"`
	WriteConsistency int           `yaml:"write_consistency" help:"replicas that must confirm a write; 0 leaves it to Qdrant"`
	StrongOrdering   bool          `yaml:"strong_ordering" help:"send deletes and metadata through a shard's permanent leader"`
}

// Embedder bounds the model's work.
type Embedder struct {
	Threads      int           `yaml:"threads" help:"threads of one batch on the CPU; 0 is one for each core"`
	Nice         int           `yaml:"nice" help:"how far the model's threads stand back behind everything else on the CPU in the same container or unit, as nice(1); Linux only"`
	Runners      int           `yaml:"runners" help:"batches that run at once; 0 is one on a CPU and two on a GPU"`
	BatchTokens  int           `yaml:"batch_tokens" help:"token budget of a batch; 0 is what the device was measured to like"`
	BatchRows    int           `yaml:"batch_rows" help:"most texts of a batch; 0 is the embedder's default"`
	QueueTokens  int           `yaml:"queue_tokens" help:"most tokens that wait or run in each lane before callers get 429; 0 is the embedder's default"`
	AgeLimit     time.Duration `yaml:"age_limit" help:"how long a text of bulk may be passed over for better-fitting ones"`
	DeviceMemory Bytes         `yaml:"device_memory" help:"most memory of the GPU that each of the two graphs may take, weights included; 0 is no bound"`
}

// Ingest bounds the workers that bring accepted documents into the index.
type Ingest struct {
	Workers      int           `yaml:"workers" help:"batches that are embedded and written at once"`
	BatchChunks  int           `yaml:"batch_chunks" help:"most chunks of one batch"`
	Lease        time.Duration `yaml:"lease" help:"how long a worker may stay silent before another takes its batch over"`
	TombstoneAge time.Duration `yaml:"tombstone_age" help:"how long ids of deleted chunks are kept after the point was read absent"`
}

// Search bounds queries.
type Search struct {
	Timeout    time.Duration `yaml:"timeout" help:"time limit of a search that names none"`
	CacheBytes Bytes         `yaml:"cache_bytes" help:"memory for embeddings of recent queries; 0 turns the cache off"`
	CacheTTL   time.Duration `yaml:"cache_ttl" help:"how long the embedding of a query is kept"`
}

// Reconcile says how the stores are compared.
type Reconcile struct {
	Workers         int           `yaml:"workers" help:"ranges that this instance reads at once"`
	PointsPerSecond int           `yaml:"points_per_second" help:"most points a second that a requested run reads; 0 is no bound"`
	Grace           time.Duration `yaml:"grace" help:"how long a suspect rests before the second look"`
	MaxDeletes      float64       `yaml:"max_deletes" help:"the brake: largest share of a collection's points that a day's runs may delete"`
	FreeDeletes     int           `yaml:"free_deletes" help:"deletes a day that the brake always allows"`
	Quarantine      time.Duration `yaml:"quarantine" help:"how long an orphan stays in the index, hidden, before it is deleted"`
	ScrubQuickEvery time.Duration `yaml:"scrub_quick_every" help:"how often the background compares the counts of every bucket"`
	ScrubFullWithin time.Duration `yaml:"scrub_full_within" help:"time in which the background has compared every id once"`
	ScrubPoints     int           `yaml:"scrub_points_per_second" help:"most points a second that the background reads"`
}

// Default returns the settings that hold where nothing else is said. DataDir, CacheDir and
// ONNXRuntimeLib depend on the machine and are filled in by [Load].
func Default() Config {
	return Config{
		Listen:    "127.0.0.1:8080",
		Model:     "minilm",
		Device:    "auto",
		Precision: "auto",
		Scrub:     true,
		// The name that clients of one collection never have to learn.
		Collection: "default",
		// A bulk batch takes a second or two; a stream that is cut is resumed by its sender.
		ShutdownTimeout: 30 * time.Second,
		Log:             Log{Level: "info", Format: "auto"},
		HTTP: HTTP{
			// 1,000 texts of 8,192 tokens are about as much; a JSON body is held in memory whole.
			MaxBody:       32 << 20,
			MaxLine:       8 << 20,
			MaxRequests:   256, // unmeasured; the embedder's queue is the tighter bound
			Timeout:       30 * time.Second,
			IngestTimeout: 5 * time.Minute,
			StreamIdle:    time.Minute,
		},
		Database: Database{
			MaxConns:       16, // unmeasured: workers, accepts and searches rarely hold more at once
			ConnectTimeout: 5 * time.Second,
		},
		Qdrant: Qdrant{
			Timeout:        30 * time.Second,
			MaxBatchBytes:  16 << 20,
			MaxBatchPoints: 256, // measured: 10,000 points of 1,024 floats a second from one worker
		},
		Embedder: Embedder{
			// On two cores, eight clients that search without a pause: p99 under ingestion over idle
			// p99 2.1 to 2.9 with 0, 1.9 to 2.1 with 5, and 0.9 to 1.7 with 10, where ingestion stood
			// still (bench/search -load).
			Nice:     5,
			AgeLimit: 500 * time.Millisecond, // unmeasured
			// BGE-M3 stayed level at 9.7 GB in all, CUDA's own memory included, over varying shapes on an
			// H200 (bench/gpu).
			DeviceMemory: 8 << 30,
		},
		Ingest: Ingest{
			Workers:      4, // unmeasured
			BatchChunks:  256,
			Lease:        time.Minute,
			TombstoneAge: 24 * time.Hour, // tidiness, not safety: ids are never used twice
		},
		Search: Search{
			Timeout:    10 * time.Second,
			CacheBytes: 32 << 20,
			CacheTTL:   10 * time.Minute,
		},
		Reconcile: Reconcile{
			Workers:         2,
			Grace:           2 * time.Second,
			MaxDeletes:      0.1,
			FreeDeletes:     20,
			ScrubQuickEvery: 5 * time.Minute,
			ScrubFullWithin: 24 * time.Hour,
			ScrubPoints:     20_000, // unmeasured; a tenth of what one scroll of a real server gave
		},
	}
}
