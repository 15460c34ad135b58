"""What a client sees of one request, and the latencies that follow from it.

All times are seconds of one clock of the client. Not here: reading a stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

FORMULAS = {
    "ttft": "first chunk with text - request sent",
    "e2e": "last chunk with text - request sent",
    "tpot": "(e2e - ttft) / (output tokens - 1), of answers of two tokens or more",
    "itl": "time between two chunks with text, which may hold several tokens: see tokens_per_chunk",
    "output_tokens": "usage.completion_tokens; chunks with text where the server gives no usage",
    "duration_s": "first request sent to last answer ended, warm-up excluded",
    "requests_per_s": "answers without error / duration_s",
    "output_tokens_per_s": "output tokens of answers without error / duration_s",
    "total_tokens_per_s": "prompt and output tokens of answers without error / duration_s",
    "goodput_requests_per_s": "answers without error that meet every --slo / duration_s",
    "send_delay": "request sent - time at which it was due; large: this client is the limit",
}
"""How each figure of a result is worked out; a part of the result."""


@dataclass
class Timeline:
    """One request.

    Attributes:
        due_at: when it was to be sent.
        chunks_at: when each piece of text arrived; of an answer without text, when it ended.
        prompt_tokens, output_tokens: as the server counts them; None where it does not.
        error: what kind of failure ended it; None: it is complete.
        detail: what the server or the connection said of the error.
    """

    due_at: float
    sent_at: float
    chunks_at: list[float] = field(default_factory=list)
    ended_at: float = 0.0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None
    detail: str = ""

    @property
    def num_output_tokens(self) -> int:
        return len(self.chunks_at) if self.output_tokens is None else self.output_tokens

    @property
    def ttft_s(self) -> float:
        return self.chunks_at[0] - self.sent_at

    @property
    def e2e_s(self) -> float:
        return self.chunks_at[-1] - self.sent_at

    @property
    def tpot_s(self) -> float | None:
        if self.num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.chunks_at)]


def complete(timelines: Sequence[Timeline]) -> list[Timeline]:
    """Those without an error."""
    return [timeline for timeline in timelines if timeline.error is None]
