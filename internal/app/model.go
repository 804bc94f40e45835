package app

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lockstep-db/lockstep/embedder"
	"github.com/lockstep-db/lockstep/embedder/model"
	"github.com/lockstep-db/lockstep/embedder/onnx"
	"github.com/lockstep-db/lockstep/internal/config/cachedir"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

// checkpoint returns the folder that a model's name stands for: a name of ours, whose
// checkpoint the set-up or `lockstep model pull` left in the cache, or a folder of the
// caller's.
func checkpoint(name string, cache cachedir.Layout) (dir, short string, err error) {
	known := map[string]struct{ dir, remedy string }{
		"minilm": {cache.MiniLM(), "run `make setup`, or point LOCKSTEP_MODEL at a checkpoint directory"},
		"bge-m3": {cache.Checkpoint("bge-m3"), "run `lockstep model pull bge-m3`, or point LOCKSTEP_MODEL at a checkpoint directory"},
	}
	if k, ok := known[name]; ok {
		if _, err := os.Stat(k.dir); err != nil {
			return "", "", corpus.Wrap(corpus.Invalid, "model_missing", fmt.Sprintf("the model %s is not in %s: %s", name, k.dir, k.remedy), err)
		}
		return k.dir, name, nil
	}
	info, err := os.Stat(name)
	if err != nil || !info.IsDir() {
		return "", "", corpus.Errorf(corpus.Invalid, "model_missing",
			"LOCKSTEP_MODEL is %q: use minilm, bge-m3, or a directory that holds a built model or a Hugging Face checkpoint", name)
	}
	return name, filepath.Base(filepath.Clean(name)), nil
}

// builtPlace is the cache folder into which a checkpoint is built.
func builtPlace(name string, precision model.Precision, cache cachedir.Layout) (string, error) {
	src, short, err := checkpoint(name, cache)
	if err != nil {
		return "", err
	}
	abs, err := filepath.Abs(src)
	if err != nil {
		return "", fmt.Errorf("finding the model's folder: %w", err)
	}
	// Two checkpoints of one base name do not share a folder.
	place := sha256.Sum256([]byte(abs))
	return filepath.Join(cache.Models(), fmt.Sprintf("%s-%s-%s", short, precision, hex.EncodeToString(place[:4]))), nil
}

// buildModel returns the folder of the built model that name stands for, building it into
// the cache first if it is a checkpoint that was not built yet.
func buildModel(ctx context.Context, name string, precision model.Precision, cache cachedir.Layout, log *slog.Logger) (string, error) {
	src, short, err := checkpoint(name, cache)
	if err != nil {
		return "", err
	}
	if model.IsBuilt(src) {
		return src, nil
	}
	dst, err := builtPlace(name, precision, cache)
	if err != nil {
		return "", err
	}
	start := time.Now()
	var told string
	m, err := model.Build(ctx, src, dst, model.Options{Name: short, Precision: precision, Progress: func(p model.Progress) {
		if p.Stage != told && p.Stage != "done" {
			told = p.Stage
			log.InfoContext(ctx, "preparing the model", "model", short, "stage", p.Stage, "bytes", p.Total)
		}
	}})
	if err != nil {
		return "", err
	}
	log.InfoContext(ctx, "model prepared", "model", short, "dir", dst, "fingerprint", m.Fingerprint, "duration", time.Since(start).Round(time.Millisecond))
	return dst, nil
}

// device is where the model runs.
type device struct {
	cuda bool
	id   int
}

// pickDevice reads auto, cpu, cuda or cuda:N. auto takes the GPU when the runtime library
// carries the CUDA provider and the machine has an NVIDIA device; a GPU that is then unusable
// is an error, never a silent fallback.
func pickDevice(setting, library string) (device, error) {
	switch {
	case setting == "cpu":
		return device{}, nil
	case setting == "auto":
		provider := filepath.Join(filepath.Dir(library), "libonnxruntime_providers_cuda.so")
		for _, path := range []string{provider, "/dev/nvidiactl"} {
			if _, err := os.Stat(path); err != nil {
				return device{}, nil //nolint:nilerr // its absence is the answer
			}
		}
		return device{cuda: true}, nil
	case setting == "cuda":
		return device{cuda: true}, nil
	case strings.HasPrefix(setting, "cuda:"):
		id, err := strconv.Atoi(setting[len("cuda:"):])
		if err == nil && id >= 0 {
			return device{cuda: true, id: id}, nil
		}
	}
	return device{}, corpus.Errorf(corpus.Invalid, "device", "device is %q: use auto, cpu, cuda or cuda:N", setting)
}

// pickPrecision resolves auto: fp32 on a CPU, fp16 on a GPU.
func pickPrecision(setting string, d device) model.Precision {
	switch {
	case setting != "auto":
		return model.Precision(setting)
	case d.cuda:
		return model.FP16
	default:
		return model.FP32
	}
}

// gpuBatchTokens is the token budget of a batch on a GPU: 32,768 packed tokens lost 0.8 %
// against sorted arrival on an H100, half of it 4.7 %.
const gpuBatchTokens = 32768

// gpuBatchRows lets a batch of short texts reach the token budget: at 32 tokens, 1,024 of them.
const gpuBatchRows = 1024

// cpuBatchTokens is the budget on a CPU, in padded tokens. Two threads of an AMD EPYC ran fp32
// MiniLM (sorted texts of 8 to 250 tokens) at 12,200 tokens/s with 256 or 512 tokens a batch,
// 11,200 with 1,024, 10,100 with 2,048 and 9,200 with 4,096: larger ones outgrow the cache.
// That a thread keeps needing 256 beyond two is unmeasured.
func cpuBatchTokens(threads int) int {
	if threads <= 0 {
		threads = runtime.NumCPU()
	}
	return max(512, 256*threads)
}

// openModel builds the configured model if need be, loads it, and starts its batcher.
func (a *App) openModel(ctx context.Context, reg prometheus.Registerer, log *slog.Logger) (*embedder.Batcher, error) {
	cfg := a.cfg
	dev, err := pickDevice(cfg.Device, cfg.ONNXRuntimeLib)
	if err != nil {
		return nil, err
	}
	dir, err := buildModel(ctx, cfg.Model, pickPrecision(cfg.Precision, dev), cachedir.Layout{Root: cfg.CacheDir}, a.log)
	if err != nil {
		return nil, err
	}
	nice := cfg.Embedder.Nice
	if dev.cuda {
		nice = 0 // there the runners' threads keep the GPU busy and take little of the CPU
	}
	engine, err := onnx.Open(onnx.Config{
		Library: cfg.ONNXRuntimeLib, ModelDir: dir, CUDA: dev.cuda, DeviceID: dev.id,
		Threads: cfg.Embedder.Threads, Nice: nice, DeviceMemory: int64(cfg.Embedder.DeviceMemory),
	})
	if err != nil {
		return nil, err
	}
	a.onStop(func(context.Context) error { return engine.Close() })
	ec := embedder.Config{
		BatchTokens: cfg.Embedder.BatchTokens, BatchRows: cfg.Embedder.BatchRows, Padded: engine.Padded(),
		Runners: cfg.Embedder.Runners, QueueTokens: cfg.Embedder.QueueTokens, AgeLimit: cfg.Embedder.AgeLimit, Enter: engine.Enter,
	}
	if ec.BatchTokens == 0 {
		ec.BatchTokens = cpuBatchTokens(cfg.Embedder.Threads)
		if dev.cuda {
			ec.BatchTokens = gpuBatchTokens
		}
	}
	a.batchTokens = ec.BatchTokens
	if ec.BatchRows == 0 && dev.cuda {
		ec.BatchRows = gpuBatchRows
	}
	if ec.Runners == 0 && dev.cuda {
		ec.Runners = 2 // two host threads on one session gave 2 to 4 % more on an H100
	}
	spec := engine.Spec()
	batcher := embedder.New(spec, engine, engine, ec, log, reg)
	a.onStop(func(context.Context) error { batcher.Close(); return nil })
	a.log.InfoContext(ctx, "model loaded", "model", spec.Name, "fingerprint", spec.Fingerprint, "device", spec.Device,
		"precision", spec.Precision, "dimensions", spec.Dim, "max_tokens", spec.MaxTokens, "heads", spec.Heads.String())
	return batcher, nil
}

// warmLengths are the shapes whose first run is slow: one short query, one passage.
func warmLengths(spec corpus.ModelSpec) []int { return []int{16, min(512, spec.MaxTokens)} }
