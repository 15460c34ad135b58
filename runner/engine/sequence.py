"""A request on its way: the tokens it has, how many of them are in the KV cache, and where."""

from dataclasses import dataclass, field
from typing import Literal

from runner.engine.request import Request

FinishReason = Literal["stop", "length"]


@dataclass
class Sequence:
    """One request's state; equal on every rank.

    Attributes:
        token_ids: prompt and completion so far.
        num_computed: how many of them have their keys and values in the cache.
        blocks: KV blocks in order; set when the sequence is admitted.
        rope_variant: which rotary frequencies its cached keys have.
    """

    request: Request
    token_ids: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    rope_variant: int = 0

    @classmethod
    def of(cls, request: Request) -> "Sequence":
        return cls(request, list(request.prompt_ids))

    @property
    def num_pending(self) -> int:
        """Tokens that are not in the cache yet; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence is complete; None: it goes on."""
        if self.num_generated and self.token_ids[-1] in self.request.stop_token_ids:
            return "stop"
        return "length" if self.num_generated >= self.request.max_tokens else None
