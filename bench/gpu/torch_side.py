#!/usr/bin/env python3
"""The torch side of run.sh: the machine's peak, the reference in fp32 and sentence-transformers.

usage: torch_side.py peak
       torch_side.py rows VOCAB MAX OUT.json             (rows of token ids of many lengths)
       torch_side.py compare CHECKPOINT ROWS.json VECTORS.bin
       torch_side.py goldens ids|compare GOLDENS.json FILE  (the committed tiny BGE-M3)
       torch_side.py time CHECKPOINT PEAK OUT.json
"""
import base64
import json
import os
import struct
import sys
import time

import numpy as np
import torch

SEED = 20261123


def peak():
    """TFLOP/s of an 8192^3 fp16 product: the best of short bursts, and what 5 s sustain."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    flops = 2 * 8192**3
    for _ in range(5):
        a @ b
    best = 0
    for _ in range(10):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(10):
            a @ b
        end.record()
        torch.cuda.synchronize()
        best = max(best, 10 * flops / start.elapsed_time(end) / 1e9)
        time.sleep(0.1)
    t, n = time.time(), 0
    while time.time() - t < 5:
        for _ in range(50):
            a @ b
        torch.cuda.synchronize()
        n += 50
    return best, n * flops / (time.time() - t) / 1e12


def make_rows(vocab, longest, out):
    rng = np.random.default_rng(SEED)
    lengths = [n for n in (3, 4, 7, 16, 33, 64, 100, 128, 200, 384, 512, 777, 1024, 2048, 4096, 8192) if n <= longest]
    rows = []
    for n in lengths + [20] * 16:
        row = rng.integers(4, vocab - 1, n)
        row[0], row[-1] = 0, 2
        rows.append(row.tolist())
    rows[5][10] = 1  # a padding token inside a text: XLM-RoBERTa does not count it
    json.dump(rows, open(out, "w"))


def read_vectors(path):
    """What the Go side wrote: canonical encodings of vectors, each after its length."""
    data = open(path, "rb").read()
    at, out = 0, []
    while at < len(data):
        (n,) = struct.unpack_from("<I", data, at)
        b, at, p, v = data[at + 4 : at + 4 + n], at + 4 + n, 1, {}
        if b[0] & 1:
            (d,) = struct.unpack_from("<I", b, p)
            v["dense"] = np.frombuffer(b, "<f4", d, p + 4)
            p += 4 + 4 * d
        if b[0] & 2:
            (d,) = struct.unpack_from("<I", b, p)
            ids, w = np.frombuffer(b, "<u4", d, p + 4), np.frombuffer(b, "<f4", d, p + 4 + 4 * d)
            v["sparse"] = dict(zip(ids.tolist(), w.tolist()))
            p += 4 + 8 * d
        if b[0] & 4:
            r, c = struct.unpack_from("<II", b, p)
            v["colbert"] = np.frombuffer(b, "<f4", r * c, p + 8).reshape(r, c)
        out.append(v)
    return out


def report(name, want, got):
    """Worst cosine, relative error and the like of a list of results against the reference."""
    worst = {"dense_cosine": 1.0, "dense_relative_error": 0.0, "dense_max_abs": 0.0, "sparse_max_abs": 0.0, "sparse_keys_differ": 0,
             "colbert_min_cosine": 1.0, "colbert_max_abs": 0.0}
    for w, g in zip(want, got):
        d = np.asarray(w["dense"], np.float64)
        e = g["dense"] - d
        worst["dense_cosine"] = min(worst["dense_cosine"], float(d @ g["dense"] / np.linalg.norm(d) / np.linalg.norm(g["dense"])))
        worst["dense_relative_error"] = max(worst["dense_relative_error"], float(np.linalg.norm(e) / np.linalg.norm(d)))
        worst["dense_max_abs"] = max(worst["dense_max_abs"], float(np.abs(e).max()))
        if "sparse" in w and "sparse" in g:
            for k in w["sparse"].keys() | g["sparse"].keys():
                worst["sparse_max_abs"] = max(worst["sparse_max_abs"], abs(w["sparse"].get(k, 0) - g["sparse"].get(k, 0)))
            worst["sparse_keys_differ"] += len(w["sparse"].keys() ^ g["sparse"].keys())
        if "colbert" in w and "colbert" in g:
            c = w["colbert"]
            assert c.shape == g["colbert"].shape, (c.shape, g["colbert"].shape)
            worst["colbert_min_cosine"] = min(worst["colbert_min_cosine"], float((c * g["colbert"]).sum(1).min()))
            worst["colbert_max_abs"] = max(worst["colbert_max_abs"], float(np.abs(c - g["colbert"]).max()))
    print(name, json.dumps({k: float(f"{v:.8g}") for k, v in worst.items()}), flush=True)


def compare(checkpoint, rows_file, vectors):
    from transformers import AutoModel

    torch.backends.cuda.matmul.allow_tf32 = False
    rows = json.load(open(rows_file))
    m = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).cuda().eval()
    heads = os.path.exists(checkpoint + "/sparse_linear.pt")
    if heads:
        sparse = torch.load(checkpoint + "/sparse_linear.pt", map_location="cuda")
        colbert = torch.load(checkpoint + "/colbert_linear.pt", map_location="cuda")
    mean = json.load(open(checkpoint + "/1_Pooling/config.json"))["pooling_mode_mean_tokens"]
    want = []
    with torch.inference_mode():
        for row in rows:
            h = m(input_ids=torch.tensor([row], device="cuda"), attention_mask=torch.ones(1, len(row), device="cuda", dtype=torch.long)).last_hidden_state[0]
            w = {"dense": torch.nn.functional.normalize(h.mean(0) if mean else h[0], dim=0).cpu().numpy()}
            if heads:
                weights = torch.relu(h @ sparse["weight"].float().T + sparse["bias"].float())[:, 0].tolist()
                agg = {}
                for t, x in zip(row, weights):
                    if t > 3 and x > agg.get(t, 0):
                        agg[t] = x
                w["sparse"] = agg
                w["colbert"] = torch.nn.functional.normalize(h[1:] @ colbert["weight"].float().T + colbert["bias"].float(), dim=1).cpu().numpy()
            want.append(w)
    got = read_vectors(vectors)
    report("one by one ", want, got[: len(rows)])
    report("one batch  ", want, got[len(rows) :])
    d = np.stack([w["dense"] for w in want])
    print("cosine between different texts of the reference: min %.5f mean %.5f" % ((d @ d.T).min(), (d @ d.T).mean()))


def goldens(what, goldens_file, file):
    g = json.load(open(goldens_file))
    texts = [t for t in g["texts"] if "colbert" in t]
    if what == "ids":
        json.dump([t["ids"] for t in texts], open(file, "w"))
        return
    f = lambda b: np.frombuffer(base64.b64decode(b), "<f4")
    want = [{"dense": f(t["dense"]), "sparse": {int(k): v for k, v in t["sparse"].items()},
             "colbert": f(t["colbert"]).reshape(t["colbert_rows"], -1)} for t in texts]
    got = read_vectors(file)
    report("tiny, one by one", want, got[: len(texts)])
    report("tiny, one batch ", want, got[len(texts) :])


def time_torch(checkpoint, peak_tflops, out):
    """sentence-transformers in fp16, its forward pass on token ids that are ready."""
    from sentence_transformers import SentenceTransformer

    m = SentenceTransformer(checkpoint, device="cuda", model_kwargs={"dtype": torch.float16})
    rng = np.random.default_rng(SEED)
    vocab = m[0].auto_model.config.vocab_size
    mixed = np.clip(np.exp(np.log(120) + 0.9 * rng.standard_normal(10000)).astype(int), 8, 2048)
    loads = {"128 tokens": np.full(4096, 128), "512 tokens": np.full(1024, 512), "mixed, sorted": np.sort(mixed)[::-1][::2], "8192 tokens": np.full(16, 8192)}
    results = []
    for name, batches in (("128 tokens", (32, 256)), ("512 tokens", (32, 128)), ("mixed, sorted", (32, 64)), ("8192 tokens", (8,))):
        rows = [rng.integers(4, vocab - 1, n) for n in loads[name]]
        for size in batches:
            feats = []
            for i in range(0, len(rows), size):
                part = rows[i : i + size]
                ids = np.ones((len(part), max(map(len, part))), np.int64)
                mask = np.zeros_like(ids)
                for j, r in enumerate(part):
                    ids[j, : len(r)], mask[j, : len(r)] = r, 1
                feats.append({"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)})
            best = 0
            with torch.inference_mode():
                for attempt in range(3):  # the first one plans the shapes
                    torch.cuda.synchronize()
                    t = time.time()
                    for f in feats:
                        m({k: v.cuda() for k, v in f.items()})["sentence_embedding"].cpu()
                    took = time.time() - t
                    if attempt:
                        best = max(best, len(rows) / took)
                    else:
                        first = len(rows) / took
                    if took > 25:
                        best = max(best, len(rows) / took)
                        break
            n = loads[name].astype(np.float64)
            flops = (24 * (n * 2 * 12 * 1024**2 + 4 * n * n * 1024)).mean() * best / 1e12
            results.append({"workload": name, "batch": size, "texts_per_second": best, "first_pass": first, "share_of_peak": flops / peak_tflops})
            print("sentence-transformers fp16 %-14s batch %3d: %6.0f texts/s (first pass %.0f) share %.3f" % (name, size, best, first, flops / peak_tflops), flush=True)
    json.dump(results, open(out, "w"), indent=1)


if __name__ == "__main__":
    verb, args = sys.argv[1], sys.argv[2:]
    if verb == "peak":
        print("%.1f %.1f" % peak())
    elif verb == "rows":
        make_rows(int(args[0]), int(args[1]), args[2])
    elif verb == "compare":
        compare(*args)
    elif verb == "goldens":
        goldens(*args)
    elif verb == "time":
        time_torch(args[0], float(args[1]), args[2])
