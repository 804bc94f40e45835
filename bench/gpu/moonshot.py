#!/usr/bin/env python3
"""What matrix products in 8 bits would bring BGE-M3's encoder, and what a CUDA graph would: torch alone, none of Lockstep.

The same encoder, each layer compiled, in fp16 and with its products in fp8 or int8, in turns in one run: texts a second
against fp16, and the dense vectors against fp32 with the same weights. Random weights have none of the outlier channels
of trained ones, which are what 8 bits fail on, so accuracy is also taken with some made: see outliers().

usage: moonshot.py CHECKPOINT OUT.json      (CHECKPOINT as make_tiny_m3.py --full makes it)
"""
import itertools
import json
import sys
import time

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

SEED = 20261123
TOKENS = 65536  # of a batch, as in the engine's runs
HEADS, EPS = 16, 1e-5
E4M3, E4M3_MAX = torch.float8_e4m3fn, 448.0
torch._dynamo.config.recompile_limit = 1000  # every form and length is a compilation of its own
torch.backends.cuda.matmul.allow_tf32 = False


# Forms of a product x·wᵀ + b: how the weight is kept, and the product.


class FP16:
    """Also the reference, with weights in fp32."""

    def keep(w, b, amax):
        return w, b

    def product(x, w, b):
        return F.linear(x, w, b)


class FP8Tensor:
    """One scale for a weight and one, from other texts, for the activations."""

    def keep(w, b, amax):
        scale = w.float().abs().amax() / E4M3_MAX
        return (w.float() / scale).to(E4M3), scale, torch.as_tensor(amax / E4M3_MAX, dtype=torch.float32, device=w.device), b.half()

    def product(x, w, w_scale, x_scale, b):
        x = (x.float() / x_scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
        return torch._scaled_mm(x, w.t(), scale_a=x_scale, scale_b=w_scale, bias=b, out_dtype=torch.float16, use_fast_accum=True)


class FP8Row:
    """A scale for each token and each output channel."""

    def keep(w, b, amax):
        scale = w.float().abs().amax(1, keepdim=True) / E4M3_MAX
        return (w.float() / scale).to(E4M3), scale.t().contiguous(), b.half()

    def product(x, w, w_scale, b):
        x_scale = x.float().abs().amax(1, keepdim=True) / E4M3_MAX
        x = (x.float() / x_scale).to(E4M3)
        return torch._scaled_mm(x, w.t(), scale_a=x_scale, scale_b=w_scale, bias=b, out_dtype=torch.float16, use_fast_accum=True)


class Int8:
    """A scale for each token and each output channel; cuBLAS's product, its sums in int32 read again to scale them."""

    def keep(w, b, amax):
        scale = w.float().abs().amax(1) / 127
        return (w.float() / scale[:, None]).round().to(torch.int8), scale, b.half()

    def quantise(x):
        scale = x.float().abs().amax(1, keepdim=True) / 127
        return (x.float() / scale).round().to(torch.int8), scale

    def product(x, w, w_scale, b):
        x, x_scale = Int8.quantise(x)
        return (torch._int_mm(x, w.t()).float() * x_scale * w_scale + b).half()


CONFIGS = [triton.Config({"BM": m, "BN": n, "BK": 128}, num_warps=8, num_stages=s) for m, n, s in ((128, 256, 3), (128, 128, 4), (256, 128, 3))]


@triton.autotune(CONFIGS, key=["N", "K"])
@triton.jit
def int8_kernel(x, w, x_scale, w_scale, b, y, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    group = 8 * tl.cdiv(N, BN)  # eight rows of tiles share their columns' weights in the cache
    tile = tl.program_id(0)
    first = tile // group * 8
    height = min(tl.cdiv(M, BM) - first, 8)
    row = first + tile % group % height
    rows = row * BM + tl.arange(0, BM)
    cols = tile % group // height * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    xs = x + (rows % M)[:, None] * K + k[None, :]
    ws = w + (cols % N)[None, :] * K + k[:, None]
    acc = tl.zeros((BM, BN), tl.int32)
    for _ in range(0, K, BK):
        acc = tl.dot(tl.load(xs), tl.load(ws), acc, out_dtype=tl.int32)
        xs += BK
        ws += BK
    out = acc.to(tl.float32) * tl.load(x_scale + rows % M)[:, None] * tl.load(w_scale + cols % N)[None, :] + tl.load(b + cols % N)[None, :]
    tl.store(y + rows[:, None] * N + cols[None, :], out.to(tl.float16), (rows < M)[:, None] & (cols < N)[None, :])


class Int8Fused(Int8):
    """The same numbers from a kernel that scales its sums before it writes them."""

    def product(x, w, w_scale, b):
        x, x_scale = Int8.quantise(x)
        (M, K), N = x.shape, w.shape[0]
        y = torch.empty(M, N, dtype=torch.float16, device=x.device)
        grid = lambda meta: (triton.cdiv(M, meta["BM"]) * triton.cdiv(N, meta["BN"]),)
        int8_kernel[grid](x, w, x_scale, w_scale, b, y, M, N, K)
        return y


# The encoder. A form is one class for each of a layer's four products: QKV, the attention's output, up, down.


def layer(x, texts, form, products, norm1, norm2):
    width = x.shape[1]
    qkv = form[0].product(x, *products[0]).view(texts, -1, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
    a = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(-1, width)
    x = F.layer_norm(form[1].product(a, *products[1]) + x, (width,), *norm1, EPS)
    up = F.gelu(form[2].product(x, *products[2]))
    return F.layer_norm(form[3].product(up, *products[3]) + x, (width,), *norm2, EPS)


compiled = torch.compile(layer, dynamic=False, fullgraph=True)


def forward(m, form, ids, layer=layer):
    """The dense vectors of rows of equal length."""
    at = torch.arange(2, 2 + ids.shape[1], device=ids.device)
    x = (m["words"][ids] + m["positions"][at] + m["type"]).flatten(0, 1)
    x = F.layer_norm(x, x.shape[1:], *m["norm"], EPS)
    for products, norm1, norm2 in m["layers"]:
        x = layer(x, len(ids), form, products, norm1, norm2)
    return F.normalize(x.view(*ids.shape, -1)[:, 0].float())


def read(checkpoint, device):
    """The checkpoint's weights in fp32: each layer's four products and two norms."""
    w = {k: v.to(device) for k, v in torch.load(checkpoint + "/pytorch_model.bin", weights_only=True, mmap=True).items()}
    pair = lambda name: (w[name + ".weight"], w[name + ".bias"])
    layers = []
    for i in itertools.count():
        p = f"encoder.layer.{i}."
        if p + "output.dense.weight" not in w:
            break
        qkv = [pair(p + "attention.self." + n) for n in ("query", "key", "value")]
        layers.append((
            [tuple(torch.cat(t) for t in zip(*qkv)), pair(p + "attention.output.dense"), pair(p + "intermediate.dense"), pair(p + "output.dense")],
            pair(p + "attention.output.LayerNorm"), pair(p + "output.LayerNorm")))
    return {"words": w["embeddings.word_embeddings.weight"], "positions": w["embeddings.position_embeddings.weight"],
            "type": w["embeddings.token_type_embeddings.weight"][0], "norm": pair("embeddings.LayerNorm"), "layers": layers}


def outliers(m, channels=4, times=20.0):
    """The same model with a few channels that every norm makes large, as those of trained encoders are."""
    def norm(n):
        weight = n[0].clone()
        weight[:: len(weight) // channels] *= times
        return weight, n[1]
    return {**m, "layers": [(p, norm(a), norm(b)) for p, a, b in m["layers"]]}


def calibrate(m, ids):
    """The largest input of each product of each layer, for scales that are fixed beforehand."""
    seen = []

    class Seen:
        def product(x, w, b):
            seen.append(x.abs().amax().item())
            return F.linear(x, w, b)

    with torch.inference_mode():
        forward(m, (Seen,) * 4, ids)
    return [seen[i : i + 4] for i in range(0, len(seen), 4)]


def keep(m, form, amax):
    half = lambda *ts: tuple(t.half() for t in ts)
    layers = [([f.keep(*half(*p), a) for f, p, a in zip(form, products, most)], half(*n1), half(*n2))
              for (products, n1, n2), most in zip(m["layers"], amax)]
    return {"words": m["words"].half(), "positions": m["positions"].half(), "type": m["type"].half(), "norm": half(*m["norm"]), "layers": layers}


def compare(want, got):
    """Least cosine, largest relative error, and that error in units of the distance between two texts."""
    want, got = want.double(), got.double()
    error = (got - want).norm(dim=1)
    apart = torch.pdist(want).median()
    return {"least_cosine": F.cosine_similarity(want, got).min().item(), "relative_error": error.max().item(), "of_distance": (error.max() / apart).item()}


def in_turns(jobs, rounds=3, seconds=0.7):
    """Calls of each job a second, the best of some rounds."""
    best = dict.fromkeys(jobs, 0.0)
    for _ in range(rounds):
        for name, job in jobs.items():
            job()
            torch.cuda.synchronize()
            start, n = time.time(), 0
            while time.time() - start < seconds:
                for _ in range(3):
                    job()
                torch.cuda.synchronize()
                n += 3
            best[name] = max(best[name], n / (time.time() - start))
    return best


FORMS = {
    "fp16": (FP16,) * 4,
    "fp8, a scale a tensor": (FP8Tensor,) * 4,
    "fp8, by token and channel": (FP8Row,) * 4,
    "the latter in the feed-forward only": (FP16, FP16, FP8Row, FP8Row),
    "int8, cuBLAS": (Int8,) * 4,
    "int8, scaled in the kernel": (Int8Fused,) * 4,
    "int8 so, in the feed-forward only": (FP16, FP16, Int8Fused, Int8Fused),
}


def products(weights, texts):
    models = {"random weights": weights, "with outlier channels": outliers(weights)}
    result = {name: {} for name in FORMS}
    for length, ids in texts.items():
        jobs = {}
        for kind, m in models.items():
            some = ids[: 32768 // length]
            with torch.inference_mode():
                want = forward(m, FORMS["fp16"], some)
            amax = calibrate(m, ids[-8:])
            for name, form in FORMS.items():
                kept = keep(m, form, amax)
                job = torch.inference_mode()(lambda kept=kept, form=form: forward(kept, form, ids, compiled))
                result[name].setdefault(kind, {})[length] = compare(want, job()[: len(some)])
                print(f"{length} tokens, {name}, {kind}: {result[name][kind][length]}", flush=True)
                if m is weights:
                    jobs[name] = job
        rates = in_turns(jobs)
        for name, rate in rates.items():
            result[name].setdefault("texts_per_second", {})[length] = rate * len(ids)
            print(f"{length} tokens, {name}: {rate * len(ids):.0f} texts/s, {rate / rates['fp16']:.3f} of fp16", flush=True)
    return result


def graphs(m, ids):
    """Median milliseconds of one text alone, from ids on the host to the vector there."""
    result = {}
    for name, step in (("eager", layer), ("compiled", compiled)):
        here = ids.cuda()
        with torch.inference_mode():
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(5):
                    forward(m, FORMS["fp16"], here, step)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = forward(m, FORMS["fp16"], here, step)

            def plain():
                here.copy_(ids)
                forward(m, FORMS["fp16"], here, step).cpu()

            def replay():
                here.copy_(ids)
                graph.replay()
                out.cpu()

            for how, run in (("launched", plain), ("as a graph", replay)):
                times = []
                for _ in range(220):
                    start = time.perf_counter()
                    run()
                    times.append(1e3 * (time.perf_counter() - start))
                result[f"{name}, {how}"] = sorted(times[20:])[100]
    for name, ms in result.items():
        print(f"one text of {ids.shape[1]} tokens, {name}: {ms:.2f} ms", flush=True)
    return result


def main(checkpoint, out):
    weights = read(checkpoint, "cuda")
    gen = torch.Generator().manual_seed(SEED)

    def texts(n, length):
        ids = torch.randint(4, len(weights["words"]) - 1, (n, length), generator=gen)
        ids[:, 0], ids[:, -1] = 0, 2
        return ids

    from transformers import AutoModel

    ids = texts(4, 128).cuda()
    with torch.inference_mode():
        want = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).cuda().eval()(ids, torch.ones_like(ids)).last_hidden_state[:, 0]
        off = compare(F.normalize(want), forward(weights, FORMS["fp16"], ids))
    print("fp32, this encoder against transformers:", off, flush=True)
    assert off["relative_error"] < 1e-4
    result = {"products": products(weights, {n: texts(TOKENS // n, n).cuda() for n in (128, 512)})}
    amax = [[0.0] * 4] * len(weights["layers"])
    result["one text of 32 tokens, ms"] = graphs(keep(weights, FORMS["fp16"], amax), texts(1, 32))
    json.dump(result, open(out, "w"), indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
