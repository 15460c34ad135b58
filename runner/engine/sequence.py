"""A request on its way: the tokens it has, how many of them are in the KV cache, and where."""

from dataclasses import dataclass, field
from typing import Literal

from runner.engine.kv_blocks import next_key
from runner.engine.request import Request

FinishReason = Literal["stop", "length"]

NOT_FINITE = -1
"""In place of a token id: the logits that were to choose it are not finite numbers."""


@dataclass
class Sequence:
    """One request's state; equal on every rank.

    Attributes:
        token_ids: prompt and completion so far, as far as the host has read them.
        num_computed: how many of them have their keys and values in the cache, or will have when
            the steps that are under way are over.
        num_published: how many of these lie in blocks that others may share.
        blocks: KV blocks in order, for all tokens, while the sequence runs; empty while it waits.
        rope_variant: which rotary frequencies its cached keys have.
        num_unread: tokens behind these that steps under way choose.
        place_in_step: of the newest of them, among all that its step chooses.
        is_over: complete or aborted.
        was_admitted: it has run, even if it waits again.
    """

    request: Request
    token_ids: list[int]
    num_computed: int = 0
    num_published: int = 0
    blocks: list[int] = field(default_factory=list)
    rope_variant: int = 0
    num_unread: int = 0
    place_in_step: int = 0
    is_over: bool = False
    was_admitted: bool = False
    _keys: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request) -> "Sequence":
        return cls(request, list(request.prompt_ids))

    @property
    def length(self) -> int:
        """Its tokens, those that have not been read among them."""
        return len(self.token_ids) + self.num_unread

    @property
    def num_pending(self) -> int:
        """Tokens that are not in the cache yet; 1 while decoding."""
        return self.length - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens of the completion that have been read."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def will_be_over(self) -> bool:
        """Whether the tokens that have not been read bring it to its longest."""
        return self.num_generated + self.num_unread >= self.request.max_tokens

    def keys(self, count: int, block_size: int) -> list[bytes]:
        """By what its first `count` blocks, which must be full, are known to `BlockPool`."""
        for index in range(len(self._keys), count):
            previous = self._keys[-1] if self._keys else bytes([self.rope_variant])
            held = self.token_ids[index * block_size : (index + 1) * block_size]
            self._keys.append(next_key(previous, held))
        return self._keys[:count]

    @property
    def made_keys(self) -> list[bytes]:
        """All that `keys` has made, whether the sequence still has the blocks or not."""
        return self._keys

    def switch_rope(self) -> None:
        """Go on with the second variant of the frequencies; what was cached is of no use."""
        self.rope_variant = 1
        self._keys.clear()

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence is complete; None: it goes on."""
        num_generated = self.num_generated
        if num_generated and self.token_ids[-1] in self.request.stop_token_ids:
            return "stop"
        return "length" if num_generated >= self.request.max_tokens else None
