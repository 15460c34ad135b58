"""Vocabularies of both kinds as tokenizers: the splits, the merges, BOS, control tokens."""

import itertools
import json
import random
from dataclasses import replace

import pytest

from parallel.errors import ConfigError
from runner.importer.gguf_tokenizer import build_tokenizer, merges_by_score, tokenizer_config
from runner.importer.gguf_vocabulary import TokenType, Vocabulary

tokenizers = pytest.importorskip("tokenizers")

NORMAL, UNKNOWN, CONTROL, USER = (
    TokenType.NORMAL,
    TokenType.UNKNOWN,
    TokenType.CONTROL,
    TokenType.USER_DEFINED,
)
TEXT = (
    "The year 2024 had 366 days; 2023 had 365. It's what they'll say, isn't it?\n"
    "def add(first, second):\n    return first + second\n\n"
    "Naïve café, 東京タワー 333 m, straße.  Two  spaces,   three.\n"
) * 3


def trained(model, alphabet: list[str], pre_tokenizer) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges of BPE trained on TEXT with some of its words."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    vocab = tokenizer.get_vocab()
    state = json.loads(tokenizer.to_str())
    return sorted(vocab, key=vocab.__getitem__), [tuple(m) for m in state["model"]["merges"]]


def byte_level_vocabulary(pre: str) -> Vocabulary:
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens, merges = trained(tokenizers.models.BPE(), byte_level.alphabet(), byte_level)
    added = {"<s>": CONTROL, "</s>": CONTROL, "<tool>": USER}
    return Vocabulary(
        kind="gpt2",
        tokens=[*tokens, *added],
        types=[*[NORMAL] * len(tokens), *added.values()],
        merges=merges,
        scores=[],
        pre=pre,
        special_ids={"bos": len(tokens), "eos": len(tokens) + 1},
        add_bos=None,
        add_eos=False,
        add_space_prefix=None,
        chat_template=None,
    )


def sentencepiece_vocabulary() -> Vocabulary:
    """Merged tokens best first; without the characters of 京 and é, which take bytes."""
    marked = TEXT.replace(" ", "▁")
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex("▁*[^▁ ]*"), "isolated")
    tokens, _ = trained(tokenizers.models.BPE(), sorted(set(marked)), words)
    tokens = [token for token in tokens if not set(" 京é") & set(token)]
    merged = [token for token in tokens if len(token) > 1]
    single = [token for token in tokens if len(token) == 1]
    control = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "<tool>": USER}
    byte_tokens = {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
    types = {**control, **byte_tokens, **dict.fromkeys(merged + single, NORMAL)}
    return Vocabulary(
        kind="llama",
        tokens=list(types),
        types=list(types.values()),
        merges=[],
        # As SentencePiece writes them: 0 for all but what merging makes, then -0, -1, ...
        scores=[
            *[0.0] * 260,
            *[-float(rank) for rank in range(len(merged))],
            *[-1000.0] * len(single),
        ],
        pre="default",
        special_ids={"bos": 1, "eos": 2, "unknown": 0},
        add_bos=None,
        add_eos=False,
        add_space_prefix=None,
        chat_template=None,
    )


def best_score_first(vocabulary: Vocabulary, text: str) -> list[int]:
    """SentencePiece's BPE by its definition: join the best pair, the leftmost of equals."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    mergeable = {t for t in ids if vocabulary.types[ids[t]] == NORMAL}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [
            (-vocabulary.scores[ids[left + right]], place)
            for place, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in mergeable
        ]
        if not pairs:
            break
        _, place = min(pairs)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    found: list[int] = []
    for symbol in symbols:
        known = [ids[symbol]] if symbol in ids else None
        found += known or [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def test_sentencepiece_merges_as_its_definition_says():
    vocabulary = sentencepiece_vocabulary()
    tokenizer = build_tokenizer(vocabulary)
    assert any(len(token) > 4 for token in vocabulary.tokens[260:])
    rng = random.Random(0)
    words = [*TEXT.split(), "  ", " ", "\n", "京", "é", "\U0001f389", "saysay", "1", "zz"]
    texts = ["".join(rng.choices(words, k=8)) for _ in range(150)]
    texts += [" ".join(rng.choices(words, k=8)) for _ in range(150)]
    for text in texts:
        expected = best_score_first(vocabulary, text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, text
        assert tokenizer.decode(expected) == text


def test_sentencepiece_without_a_space_prefix():
    vocabulary = replace(sentencepiece_vocabulary(), add_space_prefix=False)
    tokenizer = build_tokenizer(vocabulary)
    for text in ("days", " days", "  two"):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(encoding.tokens) == text.replace(" ", "▁")
        assert tokenizer.decode(encoding.ids) == text


def test_equal_scores_merge_the_lower_id_first():
    vocabulary = replace(
        sentencepiece_vocabulary(),
        tokens=["a", "b", "c", "bc", "ab", "<x>"],
        types=[NORMAL] * 5 + [CONTROL],
        scores=[0.0] * 6,
    )
    assert merges_by_score(vocabulary) == [("b", "c"), ("a", "b")]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["It's", " ", "2", "0", "2", "4", "   ", "7"]),
        ("llama-bpe", ["It's", " ", "202", "4", "  ", " ", "7"]),
        ("gpt-2", ["It's", " 2024", "  ", " 7"]),
    ],
)
def test_each_rule_splits_numbers_its_own_way(pre, pieces):
    tokenizer = build_tokenizer(byte_level_vocabulary(pre))
    text = "".join(pieces)
    cuts = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cuts] == ["It", "'s", *pieces[1:]]


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "llama3", "gpt-2"])
def test_byte_level_text_comes_back_unchanged(pre):
    tokenizer = build_tokenizer(byte_level_vocabulary(pre))
    text = TEXT + "\U0001f469\u200d\U0001f467 \r\n\t ½٣ <tool>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


def test_llama3_takes_a_whole_word_that_no_merge_makes():
    vocabulary = byte_level_vocabulary("llama-bpe")
    vocabulary = replace(
        vocabulary, tokens=[*vocabulary.tokens, "Ġqwxz"], types=[*vocabulary.types, NORMAL]
    )
    assert build_tokenizer(vocabulary).encode("a qwxz").tokens[-1] == "Ġqwxz"
    smollm = build_tokenizer(replace(vocabulary, pre="smollm"))
    assert smollm.encode("a qwxz").tokens[-1] == "z"


@pytest.mark.parametrize(
    ("pre", "add_bos", "add_eos", "expected"),
    [
        ("smollm", None, False, "a"),
        ("smollm", True, False, "<s>a"),
        ("smollm", True, True, "<s>a</s>"),
        ("llama-bpe", None, False, "<s>a"),
        ("llama-bpe", False, False, "a"),
    ],
)
def test_bos_and_eos_are_added_as_the_file_asks(pre, add_bos, add_eos, expected):
    vocabulary = replace(byte_level_vocabulary(pre), add_bos=add_bos, add_eos=add_eos)
    encoding = build_tokenizer(vocabulary).encode("a")
    assert "".join(encoding.tokens) == expected


def test_sentencepiece_starts_with_bos_unless_told_otherwise():
    vocabulary = sentencepiece_vocabulary()
    assert build_tokenizer(vocabulary).encode("a").ids[0] == 1
    assert build_tokenizer(replace(vocabulary, add_bos=False)).encode("a").ids[0] != 1


@pytest.mark.parametrize(
    "vocabulary", [byte_level_vocabulary("smollm"), sentencepiece_vocabulary()]
)
def test_control_and_user_tokens_keep_their_ids(vocabulary):
    tokenizer = build_tokenizer(vocabulary)
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(vocabulary.tokens)}
    encoding = tokenizer.encode("say <tool> it</s>", add_special_tokens=False)
    assert "<tool>" in encoding.tokens
    assert encoding.tokens[-1] == "</s>"
    assert "<tool>" in tokenizer.decode(encoding.ids)
    assert "</s>" not in tokenizer.decode(encoding.ids)


def test_an_ordinary_token_named_as_padding_stays_ordinary():
    vocabulary = byte_level_vocabulary("smollm")
    padding = vocabulary.tokens.index("!")
    vocabulary = replace(vocabulary, special_ids={**vocabulary.special_ids, "padding": padding})
    tokenizer = build_tokenizer(vocabulary)
    assert tokenizer.decode(tokenizer.encode("Hi!").ids) == "Hi!"
    config = tokenizer_config(vocabulary, max_length=64)
    assert config["bos_token"] == "<s>"
    assert "pad_token" not in config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "default"}, "'default'.*supported are llama-bpe, llama3, llama-v3, smollm, gpt-2"),
        ({"pre": ""}, "none named"),
        ({"add_space_prefix": True}, "space before the text"),
        ({"add_bos": True, "special_ids": {}}, "names no such token"),
    ],
)
def test_what_a_tokenizer_cannot_be_built_from_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(replace(byte_level_vocabulary("smollm"), **changes))
