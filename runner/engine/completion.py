"""Prompts completed as a batch: rank 0's side of `shardline generate`.

Turns text into requests and tokens back into text, finds stop strings, and tells a display of every
piece of text as soon as it is certain.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from parallel.errors import ConfigError, IntegrityError
from runner.engine.control import Control
from runner.engine.request import Request, SamplingParams
from runner.engine.scheduler import Output
from runner.engine.sequence import FinishReason
from runner.text.detokenizer import IncrementalDetokenizer
from runner.text.stop import StopStrings
from runner.text.tokenizer import Tokenizer


@dataclass
class Completion:
    """One prompt and what has come of it.

    Attributes:
        token_ids: generated ids alone, a stop token included.
        finish_reason: None while it goes on.
    """

    prompt: str
    request: Request
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


def make_requests(
    prompt_ids: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    max_model_len: int,
    max_tokens: int,
    sampling: Sequence[SamplingParams],
    stop_token_ids: frozenset[int],
) -> list[Request]:
    """One request a prompt, checked against the model.

    Args:
        max_tokens: fewer where the model's length leaves less room.
        sampling: one for each prompt.

    Raises:
        ConfigError: a prompt is empty, or leaves no room for a single token.
        IntegrityError: the tokenizer has ids that the model does not know.
    """
    requests = []
    for index, (ids, params) in enumerate(zip(prompt_ids, sampling, strict=True)):
        room = max_model_len - len(ids)
        if not ids:
            raise ConfigError(f"prompt {index} is empty; give at least one token of text")
        if room < 1:
            raise ConfigError(
                f"prompt {index} has {len(ids)} tokens, but max_model_len={max_model_len} leaves "
                "no room to generate; shorten the prompt or raise --max-model-len"
            )
        if max(ids) >= vocab_size:
            raise IntegrityError(
                f"prompt {index} has the token id {max(ids)}, but the model knows {vocab_size} "
                "ids; tokenizer.json does not belong to this model"
            )
        length = min(max_tokens, room)
        requests.append(Request(index, tuple(ids), length, params, stop_token_ids))
    return requests


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
        self._open = {c.request.request_id: c for c in completions}
        self._detokenizers = {
            i: IncrementalDetokenizer(tokenizer, prompt_ids=c.request.prompt_ids)
            for i, c in self._open.items()
        }
        self._stops = {i: StopStrings(stops) for i in self._open}
        self._max_num_seqs = max_num_seqs
        self._on_progress = on_progress
        self._unsent = [c.request for c in completions]
        self._aborted: list[int] = []

    def kv_blocks(self, block_size: int) -> int:
        """What the longest requests take that could run at once."""
        blocks = (-(-c.request.max_length // block_size) for c in self._open.values())
        return sum(sorted(blocks, reverse=True)[: self._max_num_seqs])

    def next(self) -> Control:
        """All requests at first; then those that a stop string ended."""
        control = Control(self._unsent, self._aborted, leave=not self._open)
        self._unsent, self._aborted = [], []
        return control

    def take(self, outputs: list[Output]) -> None:
        """Turn a step's tokens into text."""
        for output in outputs:
            completion = self._open[output.request_id]
            completion.token_ids.append(output.token_id)
            text = self._detokenizers[output.request_id].push(output.token_id)
            if output.finish_reason:
                text += self._detokenizers[output.request_id].flush()
            text, stopped = self._stops[output.request_id].push(text)
            if stopped and not output.finish_reason:
                self._aborted.append(output.request_id)
            if not stopped and output.finish_reason:
                text += self._stops[output.request_id].flush()
            completion.text += text
            completion.finish_reason = "stop" if stopped else output.finish_reason
            if completion.finish_reason:
                del self._open[output.request_id]
        if outputs:
            self._on_progress()
