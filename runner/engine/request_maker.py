"""From a prompt in words to a request: chat template, tokens, and what the model's folder decides.

Not here: the way back, from tokens to text (`completion`).
"""

import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError, IntegrityError
from runner.engine.request import Request, SamplingParams
from runner.planning import DecoderJob
from runner.text.chat import ChatTemplate
from runner.text.generation_config import GenerationDefaults
from runner.text.generation_options import DEFAULT_MAX_TOKENS, GenerationOptions
from runner.text.stop import StopStrings
from runner.text.tokenizer import Tokenizer

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class RequestMaker:
    """Makes the requests of one model, checked against it.

    Attributes:
        tokenizer: the model's.
    """

    def __init__(self, job: DecoderJob) -> None:
        """Read the tokenizer and the defaults.

        Raises:
            IntegrityError: one of their files is absent or corrupt.
        """
        self.tokenizer = Tokenizer.load(job.spec.folder)
        self._folder: Path = job.spec.folder
        self._defaults = GenerationDefaults.load(job.spec.folder)
        self._vocab_size = job.spec.config.vocab_size
        self._max_model_len = job.plan.max_model_len

    def encode(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """The token ids of a text, or of the messages of a chat by the model's template.

        Raises:
            ConfigError: no valid Unicode, no chat template, or one that rejects the messages.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode(self._template.render(prompt), add_special_tokens=False)

    def check(self, options: GenerationOptions) -> None:
        """Raises ConfigError: options that no request could have."""
        self._sampling(options)
        StopStrings(options.stop or ())

    def max_tokens(self, options: GenerationOptions) -> int:
        """How many tokens are generated at most, if there is room for them."""
        return options.max_tokens or self._defaults.max_new_tokens or DEFAULT_MAX_TOKENS

    def make(
        self,
        request_id: int,
        prompt_ids: Sequence[int],
        options: GenerationOptions,
        *,
        name: str = "the prompt",
        num_logprobs: int | None = None,
    ) -> Request:
        """A request for a prompt; see `make_request` for what it raises.

        Args:
            options: what they do not say, the model's folder does; a seed of its own.
            num_logprobs: see `Request`; fewer where the model has fewer tokens.
        """
        if num_logprobs is not None:
            num_logprobs = min(num_logprobs, self._vocab_size)
        return make_request(
            request_id,
            prompt_ids,
            name=name,
            vocab_size=self._vocab_size,
            max_model_len=self._max_model_len,
            max_tokens=self.max_tokens(options),
            sampling=self._sampling(options),
            stop_token_ids=frozenset() if options.ignore_eos else self._defaults.stop_token_ids,
            num_logprobs=num_logprobs,
        )

    def _sampling(self, options: GenerationOptions) -> SamplingParams:
        asked = {name: getattr(options, name) for name in _SAMPLING}
        chosen = {
            name: getattr(self._defaults, name) if value is None else value
            for name, value in asked.items()
        }
        seed = secrets.randbits(63) if options.seed is None else options.seed
        return SamplingParams(**chosen, seed=seed)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate.load(self._folder, special_tokens=self.tokenizer.special_tokens)


def make_request(
    request_id: int,
    prompt_ids: Sequence[int],
    *,
    name: str = "the prompt",
    vocab_size: int,
    max_model_len: int,
    max_tokens: int,
    sampling: SamplingParams,
    stop_token_ids: frozenset[int],
    num_logprobs: int | None = None,
) -> Request:
    """A request that the model can run.

    Args:
        name: what messages call the prompt.
        max_tokens: fewer where the model's length leaves less room.

    Raises:
        ConfigError: the prompt is empty, or leaves no room for a single token.
        IntegrityError: the tokenizer has ids that the model does not know.
    """
    room = max_model_len - len(prompt_ids)
    if not prompt_ids:
        raise ConfigError(f"{name} is empty; give at least one token of text")
    if room < 1:
        raise ConfigError(
            f"{name} has {len(prompt_ids)} tokens, but max_model_len={max_model_len} leaves "
            "no room to generate; shorten the prompt or raise --max-model-len"
        )
    if max(prompt_ids) >= vocab_size:
        raise IntegrityError(
            f"{name} has the token id {max(prompt_ids)}, but the model knows {vocab_size} "
            "ids; tokenizer.json does not belong to this model"
        )
    length = min(max_tokens, room)
    return Request(request_id, tuple(prompt_ids), length, sampling, stop_token_ids, num_logprobs)
