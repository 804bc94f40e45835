#!/usr/bin/env python3
"""Writes minilm_goldens.json: what sentence-transformers gives for a fixed set of texts.

The file is made once and committed; tests compare Lockstep's own tokenizer and graphs with it.

usage: make_goldens.py CHECKPOINT_DIR OUT.json
needs: sentence-transformers, torch (CPU is enough), transformers
"""
import base64
import json
import platform
import sys
import unicodedata

import numpy as np
import sentence_transformers
import tokenizers
import torch
import transformers
from sentence_transformers import SentenceTransformer

LOREM = (
    "The ledger and the index disagree whenever one of two writes is lost, so every write is recorded first, "
    "sent second and confirmed third; a reader that joins both never sees the gap. "
)

TEXTS = [
    "a",
    "I",
    "hello",
    "Hello, World!",
    "  leading and trailing white space \t\n",
    "   ",
    "\u00ad",  # soft hyphen: nothing is left after cleaning
    "\u200b\u200d\ufeff",  # zero-width characters only
    "\u0301\u0308",  # combining marks only
    "The quick brown fox jumps over the lazy dog.",
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG.",
    "What is the capital of France?",
    "Error executing plan: Internal error: Error finding id",
    "SELECT id FROM chunks WHERE died_version IS NULL ORDER BY id LIMIT 100;",
    "func main() { fmt.Println(\"hi\") } // https://example.com/a?b=c&d=%20#frag",
    "3.14159 2,718 1e-12 0xDEADBEEF 2026-11-23T20:07:00Z",
    "naïve café résumé coöperate Ångström",
    unicodedata.normalize("NFD", "naïve café résumé coöperate Ångström"),
    "e\u0301\u0301\u0301 stacked combining marks q\u0323\u0307",
    "Straße, Größe, Übung, ẞ",
    "İstanbul ve ılık ığdır",
    "Das ist ein deutscher Satz über Suchmaschinen und Vektoren.",
    "L'été dernier, nous avons visité la côte d'Azur.",
    "El niño comió piñas en la mañana.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "这是一个文本向量化的测试句子",
    "日本語の文章を埋め込みベクトルに変換します。カタカナ ｶﾀｶﾅ",
    "한국어 문장을 벡터로 바꿉니다.",
    unicodedata.normalize("NFD", "한국어 문장을 벡터로 바꿉니다."),
    "هذا نص عربي من اليمين إلى اليسار، مع أرقام ١٢٣.",
    "זהו משפט בעברית עִם נִקּוּד",
    "mixed עברית and English \u202eoverride\u202c direction",
    "यह हिन्दी का एक वाक्य है।",
    "நான் தமிழில் எழுதுகிறேன்",
    "นี่คือประโยคภาษาไทยที่ไม่มีช่องว่าง",
    "Đây là một câu tiếng Việt có dấu.",
    "😀 😃 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 emoji",
    "👨‍👩‍👧",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒎𝒂𝒕𝒉 ﬁ ligature ½ ² ™",
    "\U00020000\U0002a6d6 rare ideographs",
    "\ue000 private use \U000f0000",
    "[CLS] [SEP] [MASK] [PAD] [UNK] as text",
    "<s> </s> <pad> <unk> <mask> as text",
    "control\x01char\x07s and\u2028line\u2029separators\x85",
    "line one\nline two\r\nline three\ttab",
    "supercalifragilisticexpialidociousantidisestablishmentarianism",
    "x" * 99,
    "x" * 101,  # one word over the WordPiece limit of 100 characters
    "!" * 40,
    "word " * 20,
    LOREM,
    LOREM * 2,
    LOREM * 4,
    "word " * 253,  # 255 tokens
    "word " * 254,  # 256 tokens: exactly the maximum
    "word " * 255,  # 257 tokens: cut by one
    LOREM * 12,  # far over the maximum
    "数" * 400,
]


def main():
    torch.manual_seed(0)
    model = SentenceTransformer(sys.argv[1], device="cpu")
    model.eval()
    tok = model.tokenizer
    limit = model.max_seq_length
    ids = [tok(t, truncation=True, max_length=limit)["input_ids"] for t in TEXTS]
    full = [len(tok(t, truncation=False)["input_ids"]) for t in TEXTS]
    # One text at a time: no padding takes part in the reference.
    dense = np.stack([model.encode([t], batch_size=1, convert_to_numpy=True)[0] for t in TEXTS]).astype("<f4")
    # What leaves the pooling, before the last module makes its length 1.
    assert type(model[-1]).__name__ == "Normalize"
    pooled = SentenceTransformer(modules=list(model)[:-1], device="cpu")
    norms = [float(np.linalg.norm(pooled.encode([t], batch_size=1, normalize_embeddings=False)[0])) for t in TEXTS]
    out = {
        "made_by": {
            "python": platform.python_version(),
            "sentence_transformers": sentence_transformers.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "tolerance": {"cosine": 0.99999, "max_abs": 1e-5},
        "max_tokens": limit,
        "dim": int(dense.shape[1]),
        "texts": [
            {"text": t, "ids": i, "tokens_before_truncation": n, "dense": base64.b64encode(v.tobytes()).decode(), "norm": norm}
            for t, i, n, v, norm in zip(TEXTS, ids, full, dense, norms)
        ],
    }
    with open(sys.argv[2], "w", encoding="utf-8") as f:
        # One text a line, so that a change shows as the lines it touches.
        rows = ",\n".join(json.dumps(t, separators=(",", ":")) for t in out.pop("texts"))
        f.write(json.dumps(out, indent=1)[:-2] + ',\n "texts": [\n' + rows + "\n]}\n")


if __name__ == "__main__":
    main()
