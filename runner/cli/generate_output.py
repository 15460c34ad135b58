"""Where the text of `shardline generate` goes: streamed to a terminal, or as JSON lines.

Completions are shown in the order of their prompts: the first one that is not complete streams, and
what comes of later ones meanwhile is kept.
"""

import json
import sys
import time
from collections.abc import Sequence

from runner.engine.completion import Completion


class TextOutput:
    """Streams text to standard output, and says on standard error how fast."""

    def __init__(self, completions: Sequence[Completion]) -> None:
        self._completions = list(completions)
        self._current = 0
        self._shown = 0
        self._first_token_at: float | None = None

    def show(self) -> None:
        """Write what has come since the last call."""
        if self._first_token_at is None:
            self._first_token_at = time.monotonic()
        while self._current < len(self._completions):
            current = self._completions[self._current]
            self._write(current)
            if current.finish_reason is None:
                return
            sys.stdout.write("\n")
            self._current, self._shown = self._current + 1, 0
        self._say_how_fast()

    def _write(self, completion: Completion) -> None:
        begins = self._shown == 0 and (completion.text or completion.finish_reason)
        if begins and len(self._completions) > 1:
            sys.stdout.write(f"[{self._current}] {completion.prompt!r}\n")
        sys.stdout.write(completion.text[self._shown :])
        sys.stdout.flush()
        self._shown = len(completion.text)

    def _say_how_fast(self) -> None:
        assert self._first_token_at is not None
        later = sum(len(c.token_ids) for c in self._completions) - 1
        elapsed = time.monotonic() - self._first_token_at
        if later > 0 and elapsed > 0:
            sys.stderr.write(f"shardline: {later / elapsed:.1f} tokens/s after the first token\n")


class JsonOutput:
    """One object a line for every prompt, when it is complete."""

    def __init__(self, completions: Sequence[Completion]) -> None:
        self._waiting = list(completions)

    def show(self) -> None:
        """Write what has come since the last call."""
        while self._waiting and self._waiting[0].finish_reason is not None:
            sys.stdout.write(json.dumps(_as_dict(self._waiting.pop(0)), ensure_ascii=False) + "\n")
            sys.stdout.flush()


def _as_dict(completion: Completion) -> dict[str, object]:
    return {
        "prompt": completion.prompt,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(completion.request.prompt_ids),
        "completion_tokens": len(completion.token_ids),
    }
