package app

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lockstep-db/lockstep/embedder/model"
	"github.com/lockstep-db/lockstep/embedder/onnx"
	"github.com/lockstep-db/lockstep/internal/config"
	"github.com/lockstep-db/lockstep/internal/config/cachedir"
	"github.com/lockstep-db/lockstep/internal/corpus"
	"github.com/lockstep-db/lockstep/internal/devstack"
	"github.com/lockstep-db/lockstep/store/postgres"
)

// Migrate brings the ledger's schema up to date and returns how many steps were applied.
// Without a configured Postgres it migrates the embedded one.
func Migrate(ctx context.Context, cfg config.Config, log *slog.Logger) (applied int, err error) {
	err = withLedger(ctx, cfg, log, func(store *postgres.Store) error {
		applied, err = store.Migrate(ctx)
		return err
	})
	return applied, err
}

// withLedger opens the configured or the embedded Postgres for the time of one call.
func withLedger(ctx context.Context, cfg config.Config, log *slog.Logger, do func(*postgres.Store) error) (err error) {
	if cfg.DatabaseURL == "" {
		stack, err := devstack.Start(ctx, devstack.Config{DataDir: cfg.DataDir, NeedPostgres: true, Logger: log})
		if err != nil {
			return err
		}
		defer func() {
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
			defer cancel()
			if serr := stack.Stop(stop); err == nil {
				err = serr
			}
		}()
		cfg = withEmbedded(cfg, stack)
	}
	store, err := openLedger(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer store.Close()
	return do(store)
}

// ModelInfo describes a built model.
type ModelInfo = model.Manifest

// BuildRequest says what to build, and where to.
type BuildRequest struct {
	// Source is minilm, bge-m3 or a checkpoint directory; empty takes the configured model.
	Source string
	// Destination directory; empty takes the cache.
	Destination string
	// Precision is auto, fp32, fp16 or int8; empty takes the configured one.
	Precision string
	// Progress, when not nil, is called often with a stage and bytes.
	Progress func(stage string, done, total int64)
}

// BuildModel builds a checkpoint into an ONNX model, unless that was done before.
func BuildModel(ctx context.Context, cfg config.Config, req BuildRequest, log *slog.Logger) (*ModelInfo, error) {
	dev, err := pickDevice(cfg.Device, cfg.ONNXRuntimeLib)
	if err != nil {
		return nil, err
	}
	if req.Source == "" {
		req.Source = cfg.Model
	}
	if req.Precision == "" {
		req.Precision = cfg.Precision
	}
	precision := pickPrecision(req.Precision, dev)
	if req.Destination == "" {
		dir, err := buildModel(ctx, req.Source, precision, cachedir.Layout{Root: cfg.CacheDir}, log)
		if err != nil {
			return nil, err
		}
		return model.Open(dir)
	}
	src, short, err := checkpoint(req.Source, cachedir.Layout{Root: cfg.CacheDir})
	if err != nil {
		return nil, err
	}
	o := model.Options{Name: short, Precision: precision}
	if req.Progress != nil {
		o.Progress = func(p model.Progress) { req.Progress(p.Stage, p.Done, p.Total) }
	}
	return model.Build(ctx, src, req.Destination, o)
}

// InspectModel opens a built model's description, or says what the configured one was built
// to. It reads no weights.
func InspectModel(cfg config.Config, name string) (*ModelInfo, error) {
	if name == "" {
		name = cfg.Model
	}
	if model.IsBuilt(name) {
		return model.Open(name)
	}
	dev, err := pickDevice(cfg.Device, cfg.ONNXRuntimeLib)
	if err != nil {
		return nil, err
	}
	dst, err := builtPlace(name, pickPrecision(cfg.Precision, dev), cachedir.Layout{Root: cfg.CacheDir})
	if err != nil {
		return nil, err
	}
	return model.Open(dst)
}

// Part is one thing that `lockstep version` names.
type Part struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// Versions lists what the program runs on. A part that cannot say its version says why.
func Versions(cfg config.Config) []Part {
	parts := []Part{
		{"go", runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH},
		{"tokenizers", onnx.TokenizersVersion},
	}
	ort, err := onnx.RuntimeVersion(cfg.ONNXRuntimeLib)
	if err != nil {
		ort = "unusable: " + err.Error()
	}
	parts = append(parts, Part{"onnxruntime", ort})
	m, err := InspectModel(cfg, "")
	if err != nil {
		return append(parts, Part{"model", err.Error()})
	}
	return append(parts, Part{"model", m.Name + " " + string(m.Precision)}, Part{"fingerprint", m.Fingerprint})
}

// Diagnosis is what the doctor says of one thing.
type Diagnosis struct {
	Name   string `json:"name"`
	Detail string `json:"detail"`
	// Err is what is wrong and what to do, or empty.
	Err string `json:"error,omitempty"`
}

// Doctor checks everything that serving needs, without serving, and goes on after a failure.
func Doctor(ctx context.Context, cfg config.Config, log *slog.Logger) []Diagnosis {
	var out []Diagnosis
	check := func(name string, do func() (string, error)) {
		detail, err := do()
		d := Diagnosis{Name: name, Detail: detail}
		if err != nil {
			d.Err = err.Error()
		}
		out = append(out, d)
	}
	check("onnxruntime", func() (string, error) { return onnx.RuntimeVersion(cfg.ONNXRuntimeLib) })
	check("model", func() (string, error) {
		m, err := BuildModel(ctx, cfg, BuildRequest{}, log)
		if err != nil {
			return cfg.Model, err
		}
		if err := m.Verify(ctx); err != nil {
			return m.Dir(), err
		}
		return fmt.Sprintf("%s %s, %d dimensions, in %s", m.Name, m.Precision, m.Dim, m.Dir()), nil
	})
	stack, err := devstack.Start(ctx, devstack.Config{
		DataDir: cfg.DataDir, NeedPostgres: cfg.DatabaseURL == "", NeedQdrant: cfg.QdrantURL == "", Logger: log})
	if err != nil {
		return append(out, Diagnosis{Name: "embedded servers", Detail: cfg.DataDir, Err: err.Error()})
	}
	defer func() {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if err := stack.Stop(stop); err != nil {
			log.WarnContext(ctx, "stopping the embedded servers", "err", err)
		}
	}()
	own := cfg.DatabaseURL == "" || cfg.QdrantURL == ""
	cfg = withEmbedded(cfg, stack)
	check("postgres", func() (string, error) {
		store, err := openLedger(ctx, cfg, log)
		if err != nil {
			return "", err
		}
		defer store.Close()
		return "answers, keeps what it acknowledges", store.Ping(ctx)
	})
	check("qdrant", func() (string, error) {
		client, err := openIndex(ctx, cfg, prometheus.NewRegistry(), log)
		if err != nil {
			return "", err
		}
		defer client.Close()
		if err := client.Ping(ctx); err != nil {
			return "", err
		}
		return "answers, honours guarded writes", client.ProveGuards(ctx)
	})
	check("data directory", func() (string, error) {
		if !own {
			return "not used: both stores are configured", nil
		}
		probe := filepath.Join(cfg.DataDir, ".doctor")
		if err := os.WriteFile(probe, nil, 0o600); err != nil {
			return cfg.DataDir, corpus.Wrap(corpus.Invalid, "data_dir", "the data directory cannot be written", err)
		}
		return cfg.DataDir, os.Remove(probe)
	})
	return out
}
