"""Prompts completed as a batch: rank 0's side of `shardline generate`.

Turns tokens into text, finds stop strings, and tells a display of every piece of text as soon as it
is certain. Not here: making the requests (`request_maker`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from parallel.errors import ConfigError
from runner.engine.control import Control
from runner.engine.logprobs import TokenLogprobs
from runner.engine.request import Request
from runner.engine.scheduler import Output, Scheduler
from runner.engine.sequence import FinishReason
from runner.text.detokenizer import IncrementalDetokenizer
from runner.text.stop import StopStrings
from runner.text.token_bytes import bytes_of
from runner.text.tokenizer import Tokenizer


@dataclass
class Completion:
    """One prompt and what has come of it.

    Attributes:
        prompt: as it was given: a text, or the messages of a chat.
        token_ids: generated ids alone, a stop token included.
        finish_reason: None while it goes on.
        logprobs: of every generated token, if they were asked for.
        offsets: where each of these tokens begins in the text, were there no stop strings.
    """

    prompt: str | Sequence[Mapping[str, Any]]
    request: Request
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


NOT_FINITE_LOGITS = (
    "the model's logits are not finite numbers; use --dtype bfloat16 or float32, or copy the "
    "weights again"
)


def check_all_chosen(outputs: Iterable[Output]) -> None:
    """For a command to which the failure of one request is its own.

    Raises:
        ConfigError: one has failed.
    """
    if any(output.failed for output in outputs):
        raise ConfigError(NOT_FINITE_LOGITS)


class CompletionText:
    """The text of a completion while its tokens come: whole characters, up to a stop string."""

    def __init__(
        self, completion: Completion, tokenizer: Tokenizer, *, stops: Sequence[str]
    ) -> None:
        """
        Args:
            stops: strings that end the completion and are not part of it.
        """
        self.completion = completion
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_ids=completion.request.prompt_ids
        )
        self._stops = StopStrings(stops)
        self._tokenizer = tokenizer
        self._num_characters = 0

    def take(self, output: Output) -> tuple[str, bool]:
        """Add a token.

        Returns:
            The text that is certain by now and was not before; and whether a stop string ended what
            the engine would go on with.
        """
        completion = self.completion
        completion.token_ids.append(output.token_id)
        text = self._detokenizer.push(output.token_id)
        self._num_characters += len(text)
        if output.logprobs:
            completion.logprobs.append(output.logprobs)
            completion.offsets.append(self._num_characters - self._own_length(output, text))
        if output.finish_reason:
            text += self._detokenizer.flush()
        text, stopped = self._stops.push(text)
        if not stopped and output.finish_reason:
            text += self._stops.flush()
        completion.text += text
        completion.finish_reason = "stop" if stopped else output.finish_reason
        return text, stopped and not output.finish_reason

    def _own_length(self, output: Output, added: str) -> int:
        """How much of the text that a token added is its own: what the tokens before it had held
        back, half a character, is not.
        """
        own = bytes_of(self._tokenizer, output.token_id).decode(errors="replace")
        return len(own) if added.endswith(own) else len(added)


class BatchFront:
    """Sends all requests before the first step and leaves when the last one is complete."""

    def __init__(
        self,
        completions: Sequence[Completion],
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str],
        max_num_seqs: int,
        on_progress: Callable[[], None],
    ) -> None:
        """
        Args:
            stops: strings that end a completion and are not part of it.
            on_progress: called after every step that produced tokens.
        """
        self._open = {
            c.request.request_id: CompletionText(c, tokenizer, stops=stops) for c in completions
        }
        self._max_num_seqs = max_num_seqs
        self._on_progress = on_progress
        self._unsent = [c.request for c in completions]
        self._aborted: list[int] = []

    def kv_blocks(self, block_size: int) -> int:
        """What the longest requests take that could run at once."""
        lengths = (text.completion.request.max_length for text in self._open.values())
        blocks = (-(-length // block_size) for length in lengths)
        return sum(sorted(blocks, reverse=True)[: self._max_num_seqs])

    def begin(self, scheduler: Scheduler) -> None:
        """All lengths are known beforehand; the engine refuses what does not fit."""

    def next(self) -> Control:
        """All requests at first; then those that a stop string ended."""
        control = Control(self._unsent, self._aborted, leave=not self._open)
        self._unsent, self._aborted = [], []
        return control

    def take(self, outputs: list[Output]) -> None:
        """Turn a step's tokens into text.

        Raises:
            ConfigError: there is no token to choose.
        """
        check_all_chosen(outputs)
        for output in outputs:
            text = self._open[output.request_id]
            _, stopped = text.take(output)
            if stopped:
                self._aborted.append(output.request_id)
            if text.completion.finish_reason:
                del self._open[output.request_id]
        if outputs:
            self._on_progress()
