"""Small GGUF tokenizers of every supported kind, and what the `tokenizers` package makes of texts with them.

    python make_gguf_tokenizers.py

Vocabularies are trained here on a few sentences of ours. The byte-level references are assembled as the
families' tokenizer.json are; the SentencePiece one gets its merges from transformers' `generate_merges`.
Writes gguf_tokenizers.json beside this file. Needs: tokenizers, transformers.
"""

import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import generate_merges

HERE = pathlib.Path(__file__).parent
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and it's what they'll say we've done in 2024 or 12345.",
    "A tokenizer turns text into tokens: tokens are numbers; numbers 100 200 300 are digits.\n\nNew line\r\n",
    "def f(x):\n    return x ** 2\n    # the quick test of the THE And HTTPServer camelCase", "caf\u00e9 na\u00efve \u00fcber \u4e2d\u6587 \u4e2d\u6587 \U0001F600",
] * 4
TEXTS = CORPUS[:4] + [
    "Hello", " Hello  world ", "I'LL we'RE don't", "1234567890 3.14", "\n\n \n\t x\r\n", "e\u0301 caf\u00e9", "a///\n{};\n", "\u4e2d\u6587\U0001F600!",
    "HTTPServer iPhone \u00c9cole", "", "   ", "aaaa the the",
]
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTIONS + "?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTIONS + "?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# DeepSeek-V3's, which Hunyuan has: digits, then Chinese and Japanese, then the rest.
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def split(*patterns):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


BYTE_LEVEL = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None, False, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]), None, False, False),
    "llama-bpe": (split(LLAMA3), None, True, True),
    "dbrx": (split(LLAMA3), None, False, False),
    "qwen2": (split(QWEN2), normalizers.NFC(), False, False),
    "tekken": (split(TEKKEN), None, True, True),
    "gpt-4o": (split(O200K), None, False, False),
    "glm4": (split(LLAMA3), None, True, False),
    "hunyuan-dense": (split(*DEEPSEEK3), None, False, False),
}


def rows(tokenizer):
    out = []
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        out.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids)})
    return out


def byte_level(name):
    pre, normalizer, whole, bos = BYTE_LEVEL[name]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = [t for t, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    reference = Tokenizer(models.BPE(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], ignore_merges=whole))
    reference.pre_tokenizer = pre
    if normalizer:
        reference.normalizer = normalizer
    reference.decoder = decoders.ByteLevel()
    reference.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens[:3]])
    return {
        "name": name,
        "bos": bos,
        "metadata": {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
            "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        },
        "texts": rows(reference),
    }


def sentence_piece(prefix):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=260, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    learned = [a + b for a, b in model["merges"]]
    characters = [t for t in sorted(model["vocab"]) if len(t) == 1 and t != "\n"]
    learned = list(dict.fromkeys(t for t in learned if t not in characters))
    fixed = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    tokens = fixed + learned + characters
    scores = [0.0] * len(fixed) + [-float(i) for i in range(len(learned))] + [-float(len(learned) + i) for i in range(len(characters))]
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = generate_merges(vocab, {t: s for t, s in zip(tokens, scores)}, skip_tokens=fixed)
    reference = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581")] * prefix + [normalizers.Replace(" ", "\u2581")]
    reference.normalizer = normalizers.Sequence(steps)
    reference.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()] + [decoders.Strip(" ", 1, 0)] * prefix)
    reference.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens[:3]])
    return {
        "name": f"llama, prefix {prefix}",
        "bos": True,
        "metadata": {
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
            "tokenizer.ggml.add_space_prefix": prefix,
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        },
        "texts": rows(reference),
    }


if __name__ == "__main__":
    cases = [byte_level(name) for name in BYTE_LEVEL] + [sentence_piece(prefix) for prefix in (True, False)]
    (HERE / "gguf_tokenizers.json").write_text(json.dumps(cases) + "\n")
