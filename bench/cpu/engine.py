#!/usr/bin/env python3
"""Times built models (the graphs that embedder/model writes) beside sentence-transformers on the CPU:
the same token ids, the same threads, one process, in turns.

usage: engine.py CHECKPOINT [--threads 2] [--texts 600] [--rounds 3] [--budget 2048] MODEL_DIR...
needs: onnxruntime, sentence-transformers. Pin the process (taskset -c 0,1) to as many cores as threads.
"""
import argparse
import json
import time

import numpy as np
import onnxruntime as ort
import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer

SEED = 20261123


def pad(rows, fill):
    width = max(map(len, rows))
    ids = np.full((len(rows), width), fill, np.int32)
    mask = np.zeros_like(ids)
    for i, r in enumerate(rows):
        ids[i, : len(r)], mask[i, : len(r)] = r, 1
    return ids, mask


class Built:
    def __init__(self, path, threads, budget):
        self.budget = budget
        self.manifest = json.load(open(path + "/manifest.json"))
        graph = next(g for g in self.manifest["graphs"] if g["device"] == "cpu")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False
        self.session = ort.InferenceSession(f"{path}/{graph['file']}", options, providers=["CPUExecutionProvider"])
        self.heads = {"heads": np.array([1], np.int32)} if "heads" in graph["inputs"] else {}
        self.name = "lockstep " + self.manifest["precision"]

    def batches(self, rows):
        out, cur = [], []
        for r in rows:
            if cur and len(r) * (len(cur) + 1) > self.budget:
                out, cur = out + [cur], []
            cur.append(r)
        return out + [cur]

    def run(self, rows):
        ids, mask = pad(rows, self.manifest["special_tokens"]["pad"])
        return self.session.run(["dense"], {"input_ids": ids, "attention_mask": mask, **self.heads})[0]


class Torch:
    def __init__(self, path, threads, size):
        torch.set_num_threads(threads)
        self.model = SentenceTransformer(path, device="cpu", model_kwargs={"dtype": torch.float32})
        self.pad = self.model.tokenizer.pad_token_id
        self.size, self.name = size, f"sentence-transformers batch {size}"

    def batches(self, rows):
        return [rows[i : i + self.size] for i in range(0, len(rows), self.size)]

    def run(self, rows):
        ids, mask = pad(rows, self.pad)
        with torch.inference_mode():
            out = self.model({"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()})
        return torch.nn.functional.normalize(out["sentence_embedding"]).numpy()


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("checkpoint")
    ap.add_argument("models", nargs="+")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--texts", type=int, default=600)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--budget", type=int, default=2048, help="padded tokens of a batch; the service's default")
    ap.add_argument("--longest", type=int, default=200)
    a = ap.parse_args()
    engines = [Built(m, a.threads, a.budget) for m in a.models]
    special = engines[0].manifest["special_tokens"]
    rng = np.random.default_rng(SEED)
    rows = [rng.integers(5, engines[0].manifest["vocab_size"] - 1, n) for n in np.sort(rng.integers(10, a.longest + 1, a.texts))]
    for r in rows:
        r[0], r[-1] = special["cls"], special["sep"]
    engines += [Torch(a.checkpoint, a.threads, size) for size in (8, 32)]
    print(f"{a.texts} texts of 10 to {a.longest} tokens (mean {np.mean([len(r) for r in rows]):.0f}), {a.threads} threads, onnxruntime {ort.__version__}, "
          f"torch {torch.__version__}, sentence-transformers {sentence_transformers.__version__}")
    want = None
    rate, query = {}, {}
    for turn in range(a.rounds):
        for e in engines[::-1]:
            batches = e.batches(rows)
            e.run(batches[0])
            start = time.time()
            got = np.concatenate([e.run(b) for b in batches])
            rate.setdefault(e.name, []).append(len(rows) / (time.time() - start))
            if want is None:
                want = got
            worst = float((got * want).sum(1).min())
            times = []
            for _ in range(40 if a.longest <= 200 and a.texts >= 200 else 8):
                start = time.time()
                e.run([rows[len(rows) // 20][:16]])
                times.append(time.time() - start)
            query.setdefault(e.name, []).append(np.median(times) * 1e3)
            print(f"  turn {turn + 1}: {e.name:32} {rate[e.name][-1]:8.1f} texts/s, one short text p50 {query[e.name][-1]:.2f} ms, "
                  f"least cosine to sentence-transformers {worst:.6f}", flush=True)
    best = max(np.median(v) for k, v in rate.items() if k.startswith("sent"))
    least = min(np.median(v) for k, v in query.items() if k.startswith("sent"))
    for k in rate:
        print(f"  {k:32} {np.median(rate[k]):8.1f} texts/s (x{np.median(rate[k]) / best:.2f} of torch's best; rounds {', '.join('%.1f' % v for v in rate[k])}); "
              f"one short text p50 {np.median(query[k]):.2f} ms (x{np.median(query[k]) / least:.2f})", flush=True)


if __name__ == "__main__":
    main()
