"""The vocabulary of a GGUF file, read and checked: tokens, their types, merges or scores.

Not here: how text is split and joined with it; see gguf_tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from parallel.errors import ConfigError, IntegrityError
from runner.importer.gguf_config import token_id
from runner.importer.gguf_file import GgufFile

_Item = TypeVar("_Item")


class TokenType(IntEnum):
    """llama.cpp's types of tokens, as tokenizer.ggml.token_type numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of its tokenizer.

    Raises:
        IntegrityError: lists of different lengths, a merge of unknown tokens, and the like.
        ConfigError: a kind of tokenizer that is not supported.
    """

    kind: str
    """tokenizer.ggml.model: "gpt2" is byte-level BPE, "llama" is SentencePiece's BPE."""
    tokens: list[str]
    """The token of each id."""
    types: list[int]
    """The TokenType of each id."""
    merges: list[tuple[str, str]]
    """gpt2: pairs to merge, the first one first. llama: empty."""
    scores: list[float]
    """llama: the score of each id; the merge into the highest comes first. gpt2: empty."""
    pre: str
    """gpt2: the name of the rule that splits text before BPE; "" where the file has none."""
    special_ids: dict[str, int]
    """Role ("bos", "eos", "eot", "eom", "unknown", "padding") -> id, where the file has one."""
    add_bos: bool | None
    """Whether text starts with BOS; None where the file does not say."""
    add_eos: bool
    add_space_prefix: bool | None
    chat_template: str | None

    @classmethod
    def read(cls, file: GgufFile) -> Vocabulary:
        kind = file.require("tokenizer.ggml.model", str)
        if kind not in ("gpt2", "llama"):
            raise ConfigError(
                f"{file.path} has a tokenizer of kind {kind!r}; supported are 'gpt2' (byte-level "
                "BPE) and 'llama' (SentencePiece BPE)"
            )
        tokens = _list(file, "tokenizer.ggml.tokens", str)
        types = _list(file, "tokenizer.ggml.token_type", int) or [TokenType.NORMAL] * len(tokens)
        scores = _list(file, "tokenizer.ggml.scores", float) if kind == "llama" else []
        _check_tokens(file, kind, tokens, types, scores)
        roles = ("bos", "eos", "eot", "eom", "unknown", "padding")
        ids = {role: token_id(file, role) for role in roles}
        return cls(
            kind=kind,
            tokens=tokens,
            types=types,
            merges=_merges(file, set(tokens)) if kind == "gpt2" else [],
            scores=scores,
            pre=file.get("tokenizer.ggml.pre", str) or "",
            special_ids={role: index for role, index in ids.items() if index is not None},
            add_bos=file.get("tokenizer.ggml.add_bos_token", bool),
            add_eos=file.get("tokenizer.ggml.add_eos_token", bool) or False,
            add_space_prefix=file.get("tokenizer.ggml.add_space_prefix", bool),
            chat_template=file.get("tokenizer.chat_template", str),
        )

    def token(self, role: str) -> str | None:
        """The token of a role in `special_ids`; None where there is none."""
        index = self.special_ids.get(role)
        return None if index is None else self.tokens[index]

    def is_special(self, index: int) -> bool:
        """Whether the token marks up text: found whole in a prompt, left out of decoded text.

        Padding is not asked for: some files name an ordinary token, "!" for one, as theirs.
        """
        if self.types[index] in (TokenType.CONTROL, TokenType.UNKNOWN):
            return True
        return index in [self.special_ids.get(role) for role in ("bos", "eos", "eot", "eom")]


def _list(file: GgufFile, key: str, kind: type[_Item]) -> list[_Item]:
    values = file.get(key, list) or []
    if not all(isinstance(value, kind) for value in values):
        raise IntegrityError(f"{file.path}: {key} is not a list of {kind.__name__}")
    return values


def _check_tokens(
    file: GgufFile, kind: str, tokens: list[str], types: list[int], scores: list[float]
) -> None:
    vocab_size = file.tensor_shapes["token_embd.weight"][0]
    lengths = {"tokens": len(tokens), "token_type": len(types)}
    if kind == "llama":
        lengths["scores"] = len(scores)
    for name, length in lengths.items():
        if length != vocab_size:
            raise IntegrityError(
                f"{file.path}: tokenizer.ggml.{name} has {length} entries; the embedding has "
                f"{vocab_size} rows"
            )
    ids = {token: index for index, token in enumerate(tokens)}
    for index, token in enumerate(tokens):
        if ids[token] != index:
            raise IntegrityError(
                f"{file.path}: ids {index} and {ids[token]} are both the token {token!r}"
            )


def _merges(file: GgufFile, tokens: set[str]) -> list[tuple[str, str]]:
    merges = []
    for line in _list(file, "tokenizer.ggml.merges", str):
        left, _, right = line.partition(" ")
        if not (left in tokens and right in tokens and left + right in tokens):
            raise IntegrityError(f"{file.path}: merge {line!r} is not of two known tokens")
        merges.append((left, right))
    if not merges:
        raise IntegrityError(f"{file.path}: a 'gpt2' tokenizer without tokenizer.ggml.merges")
    return merges
