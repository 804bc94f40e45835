#!/usr/bin/env python3
"""Makes tiny-m3/, a small random checkpoint in BGE-M3's exact file layout, and m3_goldens.json,
what FlagEmbedding's BGEM3FlagModel gives for a fixed set of texts with it in fp32.

Both are committed; run this again only to change them. The seed makes the weights repeat.

usage: make_tiny_m3.py            (writes beside this file)
       make_tiny_m3.py --full DIR (only a full-size random BGE-M3, for benchmarks; 2.3 GB)
needs: torch, transformers, tokenizers; FlagEmbedding for the goldens
"""
import argparse
import base64
import json
import os
import platform
import unicodedata

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

HERE = os.path.dirname(os.path.abspath(__file__))
SEED = 20261123
MAX_TOKENS = 8192

CORPUS = [
    "The ledger and the index disagree whenever one of two writes is lost.",
    "Every write is recorded first, sent second and confirmed third; readers join both.",
    "What is BGE M3? Defination of BM25. I love China.",
    "lazy dogs and quick brown foxes jump over numbers like 0 1 2 3 4 5 6 7 8 9",
    "Das ist ein deutscher Satz über Suchmaschinen und Vektoren.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "这是一个文本向量化的测试句子",
    "日本語の文章を埋め込みベクトルに変換します。",
]

TEXTS = [
    "a",
    "hello",
    "What is BGE M3?",
    "Defination of BM25",
    "I love China",
    "the the the ledger ledger the",  # repeated tokens: the largest weight of each counts
    "   ",
    "\u00ad",
    "\U0001f3f3\ufe0f\u200d\U0001f308",  # unknown tokens only
    "ก ข ค",  # unknown to this vocabulary, with spaces
    "<mask> is kept in sparse and <s> </s> <pad> <unk> are not",
    "pad <pad> in the middle <pad> of a text",
    unicodedata.normalize("NFC", "naïve café Größe"),
    unicodedata.normalize("NFD", "naïve café Größe"),
    "e\u0301\u0301\u0301 q\u0323\u0307",
    "هذا نص عربي",
    "这是一个文本向量化的测试句子",
    "日本語の文章を埋め込みベクトルに変換します。",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "ﬁ ½ ² ㎏ ｶﾀｶﾅ",
    " ".join(CORPUS),
    " ".join(CORPUS * 3),
]
# Only dense and sparse are kept for these; their ColBERT vectors would fill the file.
LONG_TEXTS = [
    " ".join(CORPUS * 16),
    "word " * 1000,
    " ".join(CORPUS * 60),  # far beyond the maximum: cut to 8,192 tokens
]


def make_tokenizer(path):
    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=380, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    tok.train_from_iterator(CORPUS * 20, trainer)
    tok.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, model_max_length=MAX_TOKENS, bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token=AddedToken("<mask>", lstrip=True))
    fast.save_pretrained(path)
    return len(fast)


def dump(path, name, value):
    full = os.path.join(path, name)
    os.makedirs(os.path.dirname(full), exist_ok=True)
    with open(full, "w") as f:
        json.dump(value, f, indent=2)
        f.write("\n")


def make_checkpoint(path, shape, spread, vocab=None, sparse_bias=0.0):
    """Writes the files BAAI/bge-m3 publishes. spread scales the weights: with the usual 0.02 all
    texts come out nearly equal, and a test could not tell one from another. sparse_bias is added
    to the sparse head's, whose weights could all be negative otherwise."""
    os.makedirs(path, exist_ok=True)
    size = make_tokenizer(path)
    config = XLMRobertaConfig(
        vocab_size=vocab or size, max_position_embeddings=MAX_TOKENS + 2, type_vocab_size=1, layer_norm_eps=1e-5,
        hidden_act="gelu", pad_token_id=1, bos_token_id=0, eos_token_id=2, **shape)
    config.architectures = ["XLMRobertaModel"]
    gen = torch.Generator().manual_seed(SEED)
    model = XLMRobertaModel(config, add_pooling_layer=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=gen)
            if name.endswith("LayerNorm.weight"):
                p.copy_(1 + 0.1 * noise)
            elif name.endswith("bias"):
                p.copy_(0.1 * noise)
            else:
                p.copy_(spread * noise)
    hidden = shape["hidden_size"]
    config.torch_dtype = None
    config.save_pretrained(path)
    torch.save(model.state_dict(), os.path.join(path, "pytorch_model.bin"))
    for name, out, add in (("sparse_linear.pt", 1, sparse_bias), ("colbert_linear.pt", hidden, 0.0)):
        torch.save(
            {"weight": (torch.randn((out, hidden), generator=gen) * spread).half(), "bias": (torch.randn((out,), generator=gen) * 0.1 + add).half()},
            os.path.join(path, name))
    dump(path, "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}])
    dump(path, "1_Pooling/config.json", {
        "word_embedding_dimension": hidden, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False,
        "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False})
    dump(path, "sentence_bert_config.json", {"max_seq_length": MAX_TOKENS, "do_lower_case": False})


def make_goldens(checkpoint, out):
    import FlagEmbedding
    from FlagEmbedding import BGEM3FlagModel

    m3 = BGEM3FlagModel(checkpoint, use_fp16=False, devices="cpu", normalize_embeddings=True)
    raw = BGEM3FlagModel(checkpoint, use_fp16=False, devices="cpu", normalize_embeddings=False)

    def b64(v):
        return base64.b64encode(np.ascontiguousarray(v, "<f4").tobytes()).decode()

    rows = []
    for text in TEXTS + LONG_TEXTS:
        # One text at a time: no padding takes part in the reference.
        got = m3.encode([text], batch_size=1, max_length=MAX_TOKENS, return_dense=True, return_sparse=True, return_colbert_vecs=True)
        row = {
            "text": text,
            "ids": m3.tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"],
            "dense": b64(got["dense_vecs"][0]),
            "norm": float(np.linalg.norm(raw.encode([text], batch_size=1, max_length=MAX_TOKENS)["dense_vecs"][0])),
            "sparse": {k: float(v) for k, v in sorted(got["lexical_weights"][0].items(), key=lambda kv: int(kv[0]))},
        }
        colbert = got["colbert_vecs"][0]
        assert len(colbert) == len(row["ids"]) - 1
        row["colbert_rows"] = len(colbert)
        if text in TEXTS:
            row["colbert"] = b64(colbert)
        else:
            row["colbert_mean"] = b64(colbert.mean(axis=0))
        rows.append(row)
    pairs = [[TEXTS[2], TEXTS[20]], [TEXTS[3], TEXTS[5]], [TEXTS[4], TEXTS[4]]]
    weights = [0.4, 0.2, 0.4]
    scores = m3.compute_score(pairs, max_passage_length=MAX_TOKENS, weights_for_different_modes=weights)
    head = {
        "made_by": {
            "python": platform.python_version(), "FlagEmbedding": FlagEmbedding.__version__ if hasattr(FlagEmbedding, "__version__") else FLAG_VERSION,
            "transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__, "seed": SEED,
        },
        "tolerance": {"cosine": 0.99999, "max_abs": 1e-5},
        "max_tokens": MAX_TOKENS,
        "scores": {"pairs": pairs, "weights": weights, **{k: [float(x) for x in v] for k, v in scores.items()}},
    }
    with open(out, "w", encoding="utf-8") as f:
        f.write(json.dumps(head, indent=1)[:-2] + ',\n "texts": [\n')
        f.write(",\n".join(json.dumps(r, separators=(",", ":")) for r in rows) + "\n]}\n")


def flag_version():
    from importlib.metadata import version
    return version("FlagEmbedding")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--full", metavar="DIR")
    a = ap.parse_args()
    if a.full:
        make_checkpoint(a.full, dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096), 0.02, vocab=250002, sparse_bias=1.0)
        return
    global FLAG_VERSION
    FLAG_VERSION = flag_version()
    path = os.path.join(HERE, "tiny-m3")
    make_checkpoint(path, dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32), 0.3)
    make_goldens(path, os.path.join(HERE, "m3_goldens.json"))


if __name__ == "__main__":
    main()
