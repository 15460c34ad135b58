"""What a client asks for: a prompt in token ids, how to sample, when to stop.

Plain data that travels between ranks as JSON. Text has been turned into ids before it gets here.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from parallel.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 means greedy, and nothing below matters but the penalty.
        top_k: keep the k likeliest tokens; 0 means all.
        top_p: keep the likeliest tokens that together reach this probability; 1 means all.
        min_p: drop tokens less likely than this fraction of the likeliest one; 0 means none.
        repetition_penalty: divides (or, below 0, multiplies) the logits of tokens seen; 1 means
            none.
        seed: with the position it determines every random number.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Beyond these bounds scaled logits are no numbers any more.
        heat, penalty = self.temperature, self.repetition_penalty
        _check("temperature", heat, heat == 0 or 1e-5 <= heat <= 1e5, "0 (greedy), or 1e-5 to 1e5")
        _check("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 (all tokens) to 2**31 - 1")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1 (all tokens)")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 (none) to 1")
        _check("repetition_penalty", penalty, 1e-9 <= penalty <= 1e9, "1e-9 to 1e9; 1 means none")
        _check("seed", self.seed, 0 <= self.seed < 2**64, "0 to 2**64 - 1")


@dataclass(frozen=True)
class Request:
    """One prompt to complete.

    Attributes:
        request_id: unique within the job; also the order in which requests are served.
        prompt_ids: at least one token id.
        max_tokens: most tokens to generate.
        stop_token_ids: a token that ends the completion, itself included in it.
        num_logprobs: of how many of the likeliest tokens the probabilities are wanted, beside that
            of the chosen one; None: of none at all.
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    num_logprobs: int | None = None

    @property
    def max_length(self) -> int:
        """Tokens of prompt and completion together, at most."""
        return len(self.prompt_ids) + self.max_tokens

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"stop_token_ids": sorted(self.stop_token_ids)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Request":
        return cls(
            request_id=values["request_id"],
            prompt_ids=tuple(values["prompt_ids"]),
            max_tokens=values["max_tokens"],
            sampling=SamplingParams(**values["sampling"]),
            stop_token_ids=frozenset(values["stop_token_ids"]),
            num_logprobs=values["num_logprobs"],
        )


def _check(name: str, value: float, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise ConfigError(f"{name}={value} is not allowed; use {allowed}")
