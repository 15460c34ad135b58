"""Turns token ids into text one at a time, for streaming.

Not here: `Tokenizer.decode`, which does it for a finished sequence, and `StopStrings`.
`tokenizers` has a DecodeStream; it raises on byte tokens that turn out not to be UTF-8, and a model
may produce any token.
"""

import codecs
from collections.abc import Sequence

from runner.text.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_UTF8_BYTES = 4

# A language that the vocabulary lacks is written in byte tokens alone. Streaming it must not wait
# for the end of such a run, only for the first whole character after this many tokens.
MAX_HELD_TOKENS = 16


class IncrementalDetokenizer:
    """Emits the text of a growing sequence, in whole characters and never the same one twice.

    What `push` and `flush` return adds up to the text that the generated ids add to the prompt:
    `decode(prompt_ids + ids)` without `decode(prompt_ids)`. Special tokens have no text. The work
    for a token does not grow with the sequence.

    One exception: a run of more than MAX_HELD_TOKENS byte-fallback tokens that turns out not to be
    UTF-8 keeps the characters emitted so far, while `decode` makes a U+FFFD of every byte of it.
    """

    def __init__(self, tokenizer: Tokenizer, *, prompt_ids: Sequence[int] = ()) -> None:
        """Begin after `prompt_ids`.

        The prompt is not emitted. It decides whether the first token begins the text, where
        SentencePiece tokenizers drop its space, or stands in the middle of it.
        """
        stream = _ByteStream if tokenizer.is_byte_level else _ContextStream
        self._stream: _ByteStream | _ContextStream = stream(tokenizer, prompt_ids)

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that is now certain, "" inside a character."""
        return self._stream.push(token_id)

    def flush(self) -> str:
        """End the sequence; returns what was held back, U+FFFD for half a character."""
        return self._stream.flush()


class _ByteStream:
    """For byte-level tokenizers: tokens are bytes, and UTF-8 can be decoded as it comes."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tail = _last_bytes(tokenizer, prompt_ids, MAX_UTF8_BYTES)
        self._decoder.decode(tail)  # keeps the beginning of a character that the prompt broke off

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def _last_bytes(tokenizer: Tokenizer, ids: Sequence[int], count: int) -> bytes:
    """At least the last `count` bytes of the text, if it has as many."""
    tail = b""
    for token_id in reversed(ids):
        tail = tokenizer.token_bytes(token_id) + tail
        if len(tail) >= count:
            break
    return tail


class _ContextStream:
    """For all other decoders: decode new tokens behind the last one emitted, and take the rest.

    The token in front keeps the decoder from treating the new ones as the beginning of the text.
    Byte tokens in a row are one unit to the decoder, UTF-8 as a whole or not at all, so they are
    held until another token ends the run.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = _context_of(tokenizer, prompt_ids)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if self._tokenizer.token_text(token_id) is None:
            return ""
        self._pending.append(token_id)
        if token_id in self._tokenizer.byte_fallback_ids and not self._overdue():
            return ""
        text = self._text()
        # Only a decoder of an unusual make splits a character over ordinary tokens.
        if text.endswith(REPLACEMENT) and len(self._pending) < MAX_UTF8_BYTES:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        return self._emit(self._text())

    def _overdue(self) -> bool:
        """Whether a long run of byte tokens can be cut here, after a whole character."""
        excess = len(self._pending) - MAX_HELD_TOKENS
        # If UTF-8, the run has a boundary within so many tokens. If not, it is not worth a decode.
        return 0 <= excess < MAX_UTF8_BYTES and REPLACEMENT not in self._text()

    def _text(self) -> str:
        return self._tokenizer.decode(self._context + self._pending)

    def _emit(self, text: str) -> str:
        """The part of `text` that the pending tokens added; they are pending no longer."""
        before = self._tokenizer.decode(self._context)
        ordinary = [i for i in self._pending if i not in self._tokenizer.byte_fallback_ids]
        self._context = ordinary[-1:] or self._context or self._pending
        self._pending = []
        return text[_common_length(before, text) :]


def _context_of(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> list[int]:
    """The end of the prompt: some ordinary tokens, with the byte tokens between and behind them.

    A character that the prompt broke off began within as many tokens as it has bytes.
    """
    context: list[int] = []
    num_ordinary = 0
    for token_id in reversed(prompt_ids):
        if tokenizer.token_text(token_id) is not None:
            context.append(token_id)
            num_ordinary += token_id not in tokenizer.byte_fallback_ids
        if num_ordinary == MAX_UTF8_BYTES:
            break
    return context[::-1]


def _common_length(before: str, text: str) -> int:
    """How far `text` repeats `before`: all of it, but for a character that the prompt broke off."""
    if text.startswith(before):
        return len(before)
    return next(i for i, char in enumerate(before) if text[i : i + 1] != char)
