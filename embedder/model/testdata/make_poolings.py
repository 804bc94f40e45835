#!/usr/bin/env python3
"""Writes pooling_goldens.json: what sentence-transformers gives for tiny-m3 as an ordinary encoder
(without BGE-M3's further heads), with each pooling that can be built. Committed; made once.

usage: make_poolings.py   (beside tiny-m3 and m3_goldens.json)
needs: sentence-transformers, torch
"""
import base64
import json
import os
import shutil
import tempfile

import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer

HERE = os.path.dirname(os.path.abspath(__file__))
MODES = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "mean_sqrt_len": "mean_sqrt_len_tokens"}


def main():
    ids = [t["ids"] for t in json.load(open(os.path.join(HERE, "m3_goldens.json")))["texts"] if len(t["ids"]) < 400]
    out = {"made_by": {"sentence_transformers": sentence_transformers.__version__, "torch": torch.__version__},
           "tolerance": {"max_abs": 1e-5}, "ids": ids, "dense": {}}
    for name, key in MODES.items():
        with tempfile.TemporaryDirectory() as tmp:
            path = os.path.join(tmp, "m")
            shutil.copytree(os.path.join(HERE, "tiny-m3"), path, ignore=shutil.ignore_patterns("*_linear.pt"))
            json.dump({"word_embedding_dimension": 16, "pooling_mode_" + key: True,
                       **{"pooling_mode_" + k: False for k in MODES.values() if k != key}}, open(path + "/1_Pooling/config.json", "w"))
            model = SentenceTransformer(path, device="cpu")
            vectors = []
            with torch.inference_mode():
                for row in ids:
                    got = model({"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)})
                    vectors.append(base64.b64encode(got["sentence_embedding"][0].numpy().astype("<f4").tobytes()).decode())
            out["dense"][name] = vectors
    with open(os.path.join(HERE, "pooling_goldens.json"), "w") as f:
        json.dump(out, f, separators=(",", ":"))
        f.write("\n")


if __name__ == "__main__":
    main()
