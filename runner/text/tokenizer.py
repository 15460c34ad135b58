"""Text to token ids and back, from a model folder's `tokenizer.json` and `tokenizer_config.json`.

Not here: decoding while tokens arrive (`detokenizer`) and conversations (`chat`).
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.errors import ConfigError, IntegrityError
from runner.config.json_file import read_json_object

if TYPE_CHECKING:
    import tokenizers

# The roles every model may fill, in the order in which missing ones are given new ids.
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

# What other tokenizer libraries leave in a folder instead of tokenizer.json.
FOREIGN_FILES = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json", "vocab.txt")


class Tokenizer:
    """Encodes and decodes as `transformers` does on the same folder, without importing it.

    `tokenizer.json` is the truth; `tokenizer_config.json` names the special tokens, and may add
    some. Its `tokenizer_class` is not read, where transformers 5 rebuilds some tokenizers by rules
    of their class (a Llama 2 folder then puts no space after a special token). Threads may share
    one.

    Attributes:
        special_tokens: by role as chat templates know them, `{"bos_token": "<s>", ...}`.
        special_ids: the ids that `decode` skips.
        is_byte_level: each token stands for bytes, and text is nothing but those bytes in a row.
        byte_fallback_ids: the `<0x00>` to `<0xFF>` tokens where the decoder turns them to bytes.
    """

    def __init__(
        self, backend: "tokenizers.Tokenizer", *, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        steps = _decoder_steps(backend)
        self.is_byte_level = "ByteLevel" in steps and steps <= {"ByteLevel", "Fuse"}
        self.byte_fallback_ids = _byte_tokens(backend) if "ByteFallback" in steps else frozenset()
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, model_dir: Path) -> "Tokenizer":
        """Read the tokenizer of a model folder.

        Raises:
            IntegrityError: no tokenizer.json, or one of the files is corrupt.
        """
        backend = _read_backend(model_dir)
        config = read_json_object(model_dir / "tokenizer_config.json", optional=True)
        if "added_tokens_decoder" not in config:
            # Only then is the older file of roles read; a newer config repeats what it says.
            config |= read_json_object(model_dir / "special_tokens_map.json", optional=True)
        roles = _roles(config)
        try:
            _add_configured_tokens(backend, config, named=tuple(roles.values()))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"{model_dir / 'tokenizer_config.json'} lists a malformed token: {error}"
            ) from error
        backend.encode_special_tokens = config.get("split_special_tokens") is True
        return cls(backend, special_tokens=roles)

    @property
    def bos_token(self) -> str | None:
        """The token that begins a sequence, if the model has one."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a sequence, if the model has one."""
        return self.special_tokens.get("eos_token")

    @property
    def bos_id(self) -> int | None:
        """The id of `bos_token`."""
        return self._id_of(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        """The id of `eos_token`."""
        return self._id_of(self.eos_token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised.

        Args:
            add_special_tokens: add what the model wants around a text (often `bos_token`).
                False for a rendered chat template, which has written them out itself.

        Raises:
            ConfigError: the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"the text holds half a surrogate pair at character {error.start}; "
                "send the whole character"
            ) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD; unknown ids have no text."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None for special and unknown ids."""
        if token_id in self.special_ids:
            return None
        return self._backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token of a byte-level tokenizer; none for special and unknown ids."""
        known = self._bytes.get(token_id)
        if known is None:
            text = self.token_text(token_id) or ""
            known = self._bytes[token_id] = _spelled_bytes(text)
        return known

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)


def _read_backend(model_dir: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise IntegrityError(_absent(model_dir))
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise IntegrityError(f"{path} is corrupt ({error}); copy the file again") from error


def _absent(model_dir: Path) -> str:
    if not model_dir.is_dir():
        return f"no model folder at {model_dir}; give the path of a local directory"
    found = [name for name in FOREIGN_FILES if (model_dir / name).is_file()]
    if not found:
        return f"no tokenizer.json in {model_dir}; copy the tokenizer files of the model there"
    return (
        f"no tokenizer.json in {model_dir}, only {', '.join(found)}; convert it on a host that has "
        "transformers with AutoTokenizer.from_pretrained(folder).save_pretrained(folder), "
        "then copy tokenizer.json and tokenizer_config.json here"
    )


def _roles(config: Mapping[str, Any]) -> dict[str, str]:
    """Every `*_token` key that names a token; `add_bos_token` and the like are flags, not names."""
    common = [f"{role}_token" for role in ROLES]
    own = [key for key in config if key.endswith("_token") and key not in common]
    contents = {key: _content(config.get(key)) for key in common + own}
    return {key: content for key, content in contents.items() if content is not None}


def _content(token: Any) -> str | None:
    """The text of a token that a JSON file writes as a string or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_configured_tokens(
    backend: "tokenizers.Tokenizer", config: Mapping[str, Any], *, named: tuple[str, ...]
) -> None:
    """Add what tokenizer_config.json knows and tokenizer.json may not, in the order of the ids."""
    listed = config.get("added_tokens_decoder", {})
    tokens = [_added_token(listed[key], named=named) for key in sorted(listed, key=int)]
    known = {token.content for token in tokens}
    known |= {token.content for token in backend.get_added_tokens_decoder().values()}
    tokens += [
        _added_token({"content": content}, named=[content])
        for content in dict.fromkeys([*named, *_extra_tokens(config)])
        if content not in known
    ]
    backend.add_tokens(tokens)


def _extra_tokens(config: Mapping[str, Any]) -> list[str]:
    """Special tokens without a role of the common ones: a list, or an object of role to token."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, str):
        raise TypeError(f"extra_special_tokens={extra!r} is not a list")
    values = extra.values() if isinstance(extra, dict) else extra
    return [content for content in map(_content, values) if content is not None]


def _added_token(entry: Mapping[str, Any], *, named: Sequence[str]) -> "tokenizers.AddedToken":
    from tokenizers import AddedToken

    special = entry.get("special", False) or entry["content"] in named
    return AddedToken(
        entry["content"],
        special=special,
        normalized=entry.get("normalized", not special),
        **{flag: entry.get(flag, False) for flag in ("single_word", "lstrip", "rstrip")},
    )


def _decoder_steps(backend: "tokenizers.Tokenizer") -> frozenset[str]:
    """The types of the decoder's steps, such as `{"Replace", "ByteFallback", "Fuse", "Strip"}`."""
    if backend.decoder is None:
        return frozenset()
    state = json.loads(backend.decoder.__getstate__())
    return frozenset(step["type"] for step in state.get("decoders", [state]))


def _byte_tokens(backend: "tokenizers.Tokenizer") -> frozenset[int]:
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(i for i in ids if i is not None)


@cache
def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies.

    Printable Latin-1 stands for itself; the other bytes, in order, take the characters from U+0100
    on (GPT-2's `bytes_to_unicode`).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _spelled_bytes(token: str) -> bytes:
    """The bytes a token spells; its own UTF-8 if, as an added token, it is not spelled in bytes."""
    alphabet = _byte_alphabet()
    if all(char in alphabet for char in token):
        return bytes(alphabet[char] for char in token)
    return token.encode()
