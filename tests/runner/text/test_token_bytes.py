"""A token by itself is what it adds to a text, whatever decoders do at the beginning of one."""

import pytest
import tokenizers

from runner.text.token_bytes import bytes_of
from runner.text.tokenizer import Tokenizer

FAMILIES = ["byte-level", "llama-2", "gemma", "unigram", "mixed"]
TEXT = "The quick brown fox runs on a GPU of its own. Größe"


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_add_up_to_the_text(family: str, backends: dict[str, tokenizers.Tokenizer]) -> None:
    tokenizer = Tokenizer(backends[family])
    ids = tokenizer.encode(f"{TEXT} {TEXT}", add_special_tokens=False)
    joined = b"".join(bytes_of(tokenizer, token_id) for token_id in ids).decode()
    assert joined.strip() == tokenizer.decode(ids).strip()


@pytest.mark.parametrize("family", ["byte-level", "llama-2"])
def test_a_part_of_a_character_is_its_bytes(
    family: str, backends: dict[str, tokenizers.Tokenizer]
) -> None:
    tokenizer = Tokenizer(backends[family])
    parts = [bytes_of(tokenizer, i) for i in tokenizer.encode("🂡", add_special_tokens=False)]
    assert len(parts) > 1
    assert b"".join(parts).decode().strip() == "🂡"


def test_special_and_unknown_tokens(backends: dict[str, tokenizers.Tokenizer]) -> None:
    backend = backends["byte-level"]
    tokenizer = Tokenizer(backend)
    end = backend.token_to_id("<|im_end|>")
    assert end in tokenizer.special_ids
    assert bytes_of(tokenizer, end) == b"<|im_end|>"
    assert bytes_of(tokenizer, 10**6) == b""
