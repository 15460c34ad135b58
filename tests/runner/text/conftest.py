"""Real tokenizers of each family, trained here in a moment on a few lines of text."""

import json

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

ASCII = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A model is cut into shards; each shard runs on a GPU of its own.",
    "def main():\n    return {'answer': 42}\n",
] * 4
CORPUS = [
    *ASCII,
    "Zażółć gęślą jaźń. Größe, Maße und Gewicht. Le cœur a ses raisons.",
    "数字とひらがなとカタカナ。模型分成若干部分。",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SPACE = "▁"


def _bpe_trainer(**options: object) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, show_progress=False, **options
    )


def byte_level() -> Tokenizer:
    """In the style of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, _bpe_trainer(initial_alphabet=alphabet))
    # Added but not special; the second is spelled in characters that stand for no byte.
    tokenizer.add_tokens(["<tool>", "日本 語"])
    return tokenizer


def sentencepiece(*, leading_space: bool) -> Tokenizer:
    """With byte fallback, in the style of Llama 2 (`leading_space`) or of Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    prepend = [normalizers.Prepend(SPACE)] if leading_space else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    tokenizer.train_from_iterator(ASCII, _bpe_trainer())  # all else falls back to bytes
    tokenizer.model = _with_byte_fallback(tokenizer)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if leading_space else []
    tokenizer.decoder = decoders.Sequence([*steps, *strip])
    bos = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    return tokenizer


def _with_byte_fallback(tokenizer: Tokenizer) -> models.BPE:
    """The trained model with the 256 byte tokens behind its vocabulary."""
    trained = json.loads(tokenizer.to_str())["model"]
    vocab = trained["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges = [tuple(pair) for pair in trained["merges"]]
    return models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def wordpiece() -> Tokenizer:
    """In the style of BERT: a token that begins no word is marked."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    """In the style of T5: all spaces of the first token are dropped."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def mixed() -> Tokenizer:
    """Byte-level with one more decoding step, so that its text is more than its bytes."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(SPACE, " ")])
    return tokenizer


@pytest.fixture(scope="session")
def backends() -> dict[str, Tokenizer]:
    """One of each family. Shared: do not change them."""
    return {
        "byte-level": byte_level(),
        "llama-2": sentencepiece(leading_space=True),
        "gemma": sentencepiece(leading_space=False),
        "wordpiece": wordpiece(),
        "unigram": unigram(),
        "mixed": mixed(),
    }
