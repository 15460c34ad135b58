from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.text.detokenizer import MAX_HELD_TOKENS, IncrementalDetokenizer
from runner.text.tokenizer import Tokenizer

FAMILIES = ["byte-level", "llama-2", "gemma", "wordpiece", "unigram", "mixed"]


@pytest.fixture(scope="module")
def family(backends):
    return {name: Tokenizer(backend) for name, backend in backends.items()}


def pieces(tokenizer: Tokenizer, ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> list[str]:
    """What each push emits, and last what the flush does."""
    stream = IncrementalDetokenizer(tokenizer, prompt_ids=prompt_ids)
    return [*map(stream.push, ids), stream.flush()]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    first = min(tokenizer.byte_fallback_ids)  # the byte tokens stand in a row
    return [first + byte for byte in data]


def id_for(tokenizer: Tokenizer, token: str) -> int:
    ids = [i for i in range(2000) if tokenizer.token_text(i) == token]
    assert ids, f"the test tokenizer has no token {token!r}"
    return ids[0]


@st.composite
def any_ids(draw, tokenizer: Tokenizer) -> list[int]:
    """Any tokens, special and unknown ones too; most lists of them are no valid UTF-8.

    Byte tokens come in runs short enough to be judged as a whole.
    """
    texts = [i for i in range(2000) if tokenizer.token_text(i) is not None]
    unknown = max(texts) + 1
    others = {*texts, *tokenizer.special_ids, unknown} - tokenizer.byte_fallback_ids
    ordinary = st.sampled_from(sorted(others))
    if not tokenizer.byte_fallback_ids:
        return draw(st.lists(ordinary, max_size=40))
    plain = st.sampled_from([i for i in texts if i not in tokenizer.byte_fallback_ids])
    run = st.lists(st.sampled_from(sorted(tokenizer.byte_fallback_ids)), max_size=MAX_HELD_TOKENS)
    groups = draw(st.lists(st.tuples(st.lists(ordinary, max_size=3), run, plain), max_size=6))
    return [i for before, run_ids, after in groups for i in (*before, *run_ids, after)]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mixed"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_add_up_to_their_decoding(family, name, data):
    tokenizer = family[name]
    ids = data.draw(any_ids(tokenizer))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=40))
def test_text_comes_out_in_whole_characters_and_in_order(family, name, text):
    tokenizer = family[name]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    emitted = ""
    for piece in pieces(tokenizer, ids):
        emitted += piece
        assert whole.startswith(emitted)
    assert emitted == whole


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=80, deadline=None)
@given(text=st.text(alphabet="ab The dog. é語😀\n", max_size=30), data=st.data())
def test_after_a_prompt_it_is_what_the_ids_add(family, name, text, data):
    tokenizer = family[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    cut = data.draw(st.integers(0, len(ids)))
    prompt = tokenizer.decode(ids[:cut])
    whole = tokenizer.decode(ids)
    if not whole.startswith(prompt):  # the cut went through a character
        prompt = prompt.rstrip("\ufffd")
    assert prompt + "".join(pieces(tokenizer, ids[cut:], prompt_ids=ids[:cut])) == whole


def test_a_character_of_several_byte_level_tokens_comes_with_its_last(family):
    tokenizer = family["byte-level"]
    ids = tokenizer.encode("a😀b")
    assert len(ids) == 6
    assert pieces(tokenizer, ids) == ["a", "", "", "", "😀", "b", ""]


def test_an_added_token_that_is_not_spelled_in_bytes(family):
    tokenizer = family["byte-level"]
    ids = tokenizer.encode("a日本 語<tool>")
    assert len(ids) == 3
    assert pieces(tokenizer, ids) == ["a", "日本 語", "<tool>", ""]


def test_byte_fallback_comes_with_the_token_that_ends_the_run(family):
    tokenizer = family["llama-2"]
    ids = [*byte_ids(tokenizer, "é😀".encode()), id_for(tokenizer, "x")]
    assert pieces(tokenizer, ids) == [""] * 6 + ["é😀x", ""]


def test_a_byte_fallback_run_that_is_not_utf8_as_a_whole(family):
    tokenizer = family["llama-2"]
    ids = [*byte_ids(tokenizer, b"A\xff"), id_for(tokenizer, "x")]
    # Where the DecodeStream of tokenizers has shown "A" by then, and raises.
    assert pieces(tokenizer, ids) == ["", "", "\ufffd\ufffdx", ""]


@pytest.mark.parametrize("text", ["အ" * 100, "𝄞" * 100, "aé語" * 40])
@pytest.mark.parametrize("name", ["llama-2", "gemma"])
def test_a_language_of_byte_tokens_alone_still_streams(family, name, text):
    tokenizer = family[name]
    emitted = pieces(tokenizer, byte_ids(tokenizer, text.encode()))
    assert "".join(emitted) == text
    waits = [len(part) for part in "".join("|" if piece else "." for piece in emitted).split("|")]
    assert max(waits) < MAX_HELD_TOKENS + 4


@pytest.mark.parametrize(
    ("name", "prompt", "token", "expected"),
    [
        ("llama-2", [], "▁a", "a"),  # the first token of a text loses its space
        ("llama-2", ["<s>"], "▁a", "a"),
        ("llama-2", ["x"], "▁a", " a"),
        ("llama-2", ["▁"], "▁a", " a"),
        ("gemma", [], "▁a", " a"),
        ("wordpiece", [], "the", "the"),
        ("wordpiece", ["the"], "the", " the"),
        ("wordpiece", ["the"], "##s", "s"),
        ("unigram", [], "▁", ""),
        ("unigram", ["▁"], "▁", " "),
    ],
)
def test_the_space_in_front_depends_on_the_prompt(family, backends, name, prompt, token, expected):
    prompt_ids = [backends[name].token_to_id(part) for part in prompt]
    token_id = id_for(family[name], token)
    assert "".join(pieces(family[name], [token_id], prompt_ids)) == expected


@pytest.mark.parametrize("name", ["byte-level", "llama-2"])
def test_a_character_that_the_prompt_broke_off_is_finished(family, name):
    tokenizer = family[name]
    ids = tokenizer.encode("x 😀!", add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids[-2:], prompt_ids=ids[:-2])) == "😀!"


@pytest.mark.parametrize("name", ["byte-level", "llama-2"])
def test_special_and_unknown_tokens_have_no_text_and_part_nothing(family, backends, name):
    tokenizer = family[name]
    first, *rest = tokenizer.encode("😀", add_special_tokens=False)[-4:]
    end = backends[name].token_to_id("<|im_end|>")
    assert "".join(pieces(tokenizer, [end, first, end, 999_999, *rest, end])) == "😀"


@pytest.mark.parametrize("name", ["byte-level", "mixed"])
def test_flush_shows_half_a_character_once(family, name):
    tokenizer = family[name]
    half = tokenizer.encode("😀")[:2]
    stream = IncrementalDetokenizer(tokenizer)
    assert [stream.push(i) for i in half] == ["", ""]
    assert [stream.flush(), stream.flush()] == ["\ufffd", ""]


class CountingTokenizer(Tokenizer):
    """Counts the ids it is asked to decode."""

    decoded = 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return super().decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("data", [b"plain text ", "語".encode(), b"\xff", b"\xe2\x82"])
def test_the_work_for_a_token_does_not_grow(backends, data):
    tokenizer = CountingTokenizer(backends["llama-2"])
    ids = byte_ids(tokenizer, data * (4000 // len(data)))
    pieces(tokenizer, ids)
    assert tokenizer.decoded < 12 * len(ids)
