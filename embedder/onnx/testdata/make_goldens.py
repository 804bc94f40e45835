"""Writes tokens_minilm.json, tokens_unigram.json and unigram.json beside this file.

Use: python make_goldens.py CHECKPOINT_DIR   (all-MiniLM-L6-v2's checkpoint)
Needs: tokenizers, transformers (their versions are written into the files).

The expected ids and spans come from Hugging Face tokenizers, checked against transformers'
own call; spans are converted from characters to bytes of the text in UTF-8.
"""
import json, os, random, sys, unicodedata
import tokenizers, transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

HERE = os.path.dirname(os.path.abspath(__file__))
SEED = 20261123

TEXTS = [
    "", " ", "\t\n \u00a0\u3000", "a", "Hello, world!", "The quick brown fox jumps over the lazy dog.",
    "  leading and trailing  ", "line one\nline two\r\n\r\nline three", "don't can't won't it's",
    "UPPER lower MiXeD", "3.14159 1,000,000 2026-11-23T10:00:00Z", "user@example.com https://example.com/a?b=c&d=%20",
    "naïve café résumé Ångström", unicodedata.normalize("NFD", "naïve café résumé Ångström Việt Nam"),
    "Việt Nam", "こんにちは世界。これはテストです。", "这是一个文本向量化的测试句子", "안녕하세요 세계", unicodedata.normalize("NFD", "안녕하세요"),
    "مرحبا بالعالم", "שלום עולם", "‏ימין לשמאל‎ mixed עם left", "Привет, мир! Ёжик", "Γειά σου Κόσμε ΣΊΣΥΦΟΣ", "नमस्ते दुनिया", "สวัสดีชาวโลก",
    "🙂", "👩‍👩‍👧‍👦 family", "🏳️‍🌈 🇩🇪 👍🏽", "e\u0301\u0323\u0302 stacked", "a\u0300\u0301\u0302\u0303\u0304b", "\u0301\u0301",
    "ﬁ ligature ﬀ ½ ² Ⅷ ㎏", "İstanbul ısı ŞŞ", "ß ẞ straße", "\u200b\u200c\u200d\ufeffzero width", "\u00ad soft\u00adhyphen",
    "control \u0001\u0002\u001f\u007f chars", "\ufffd replacement \ufffd", "\ue000\uf8ff private use", "\U0010ffff\U000e0001",
    "[CLS] literal [SEP] special [PAD] tokens [MASK] here [UNK]", "<s> not special here </s>", "##ing ##s word##piece",
    "supercalifragilisticexpialidocious antidisestablishmentarianism", "x" * 99, "x" * 100, "x" * 101, "x" * 300, "é" * 101,
    "!!!???...;;;:::", "a-b_c/d\\e|f", "$100 €50 £20 ¥5", "C++ C# F# .NET node.js", "func main() { fmt.Println(\"hi\") }",
    "𝕌𝕟𝕚𝕔𝕠𝕕𝕖 𝓜𝓪𝓽𝓱", "ᾧ ΐ ῗ", "Ǆ ǅ ǆ", "\u1100\u1161\u11a8", "क्षत्रिय", "\u0e01\u0e33", "word " * 40, "日本" * 40,
]

ALPHABETS = [
    (0x20, 0x7e), (0x09, 0x0d), (0xa0, 0x17f), (0x300, 0x36f), (0x370, 0x52f), (0x590, 0x6ff), (0x900, 0x97f), (0xe00, 0xe7f),
    (0x1100, 0x11ff), (0x2000, 0x206f), (0x2070, 0x21ff), (0x3000, 0x30ff), (0x4e00, 0x4fff), (0xac00, 0xad00), (0xfe00, 0xfe0f), (0xff00, 0xffef),
    (0x1f300, 0x1f64f), (0x1d400, 0x1d4ff), (0x1, 0x8), (0xe0000, 0xe007f), (0x41, 0x5a), (0x61, 0x7a), (0x61, 0x7a), (0x20, 0x20), (0x20, 0x20),
]


def random_text(rng):
    out = []
    for _ in range(rng.randint(1, 40)):
        lo, hi = rng.choice(ALPHABETS)
        out.append("".join(chr(rng.randint(lo, hi)) for _ in range(rng.randint(1, 6))))
    return "".join(out)


def byte_spans(text, encoding):
    at = [0]
    for ch in text:
        at.append(at[-1] + len(ch.encode()))
    return [[at[s], at[e]] for (s, e), special in zip(encoding.offsets, encoding.special_tokens_mask) if not special]


def goldens(tok, texts, reference=None):
    tok.no_padding()
    cases = []
    for text in texts:
        tok.no_truncation()
        e = tok.encode(text)
        if reference is not None:
            assert reference(text) == e.ids, text
        case = {"text": text, "ids": e.ids, "spans": byte_spans(text, e)}
        if len(e.ids) > 8:
            case["cut"] = []
            for size in (2, 7, len(e.ids) - 1):
                for direction in ("right", "left"):
                    tok.enable_truncation(size, direction=direction)
                    case["cut"].append({"max": size, "keep_end": direction == "left", "ids": tok.encode(text).ids})
        cases.append(case)
    return cases


def write(name, cases):
    doc = {
        "made_by": "make_goldens.py", "seed": SEED, "tokenizers": tokenizers.__version__, "transformers": transformers.__version__,
        "cases": cases,
    }
    with open(os.path.join(HERE, name), "w") as f:
        json.dump(doc, f, ensure_ascii=True, separators=(",", ":"))
        f.write("\n")


def unigram(texts):
    """A small tokenizer of XLM-R's form: Unigram over Metaspace, <s> text </s>, specials 0 to 3 and <mask> last."""
    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    tok.train_from_iterator([t for t in texts if t.isascii()] * 20, trainer)
    tok.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, normalized=False)])
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    # Padding and truncation as published files carry them: the wrapper must switch both off.
    tok.enable_truncation(512)
    tok.enable_padding(pad_id=1, pad_token="<pad>")
    path = os.path.join(HERE, "unigram.json")
    tok.save(path, pretty=False)
    return Tokenizer.from_file(path)


def main(checkpoint):
    rng = random.Random(SEED)
    texts = TEXTS + [random_text(rng) for _ in range(120)]
    auto = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tok = Tokenizer.from_file(os.path.join(checkpoint, "tokenizer.json"))
    write("tokens_minilm.json", goldens(tok, texts, lambda t: auto(t, truncation=False)["input_ids"]))
    write("tokens_unigram.json", goldens(unigram(TEXTS), texts))


main(sys.argv[1])
