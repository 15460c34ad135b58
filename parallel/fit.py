"""Whether a plan fits into the memory of its GPUs, and how much KV cache that leaves.

Pure arithmetic on a plan; who knows the memory says it. Not counted: the CUDA context and the
buffers of the communication library, some hundred MB a rank.
"""

from dataclasses import asdict, dataclass
from typing import Any

from parallel.decoder_plan import DecoderPlan, DecoderRankPlan


def format_bytes(num_bytes: int) -> str:
    """A size in decimal units: `538.1 MB`, and with two decimals from GB on.

    >>> format_bytes(538_060_032), format_bytes(17_640_734_720), format_bytes(0)
    ('538.1 MB', '17.64 GB', '0 B')
    """
    size = abs(num_bytes)
    if size >= 10**9:
        return f"{num_bytes / 10**9:,.2f} GB"
    if size >= 10**6:
        return f"{num_bytes / 10**6:.1f} MB"
    return f"{num_bytes / 10**3:.1f} kB" if size >= 10**3 else f"{num_bytes} B"


@dataclass(frozen=True)
class Budget:
    """What one GPU offers; all of a job are taken to be equal.

    Attributes:
        memory_bytes: of the GPU.
        utilization: share of it that weights, activations and KV cache may take together.
        block_size: tokens of a KV block; a sequence takes whole blocks.
    """

    memory_bytes: int
    utilization: float
    block_size: int

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * self.utilization)


@dataclass(frozen=True)
class RankFit:
    """The verdict on one rank.

    Attributes:
        needed_bytes: weights, activations, and the KV cache of one sequence of the plan's length.
        kv_room_bytes: left for the KV cache beside weights and activations; negative where these
            alone are too large.
        kv_tokens: what that holds, in whole blocks; None on a rank without attention layers.
        num_sequences: how many sequences of the plan's length that is; None likewise.
        fits: whether weights, activations and one sequence have room.
    """

    rank: int
    needed_bytes: int
    kv_room_bytes: int
    kv_tokens: int | None
    num_sequences: int | None
    fits: bool


@dataclass(frozen=True)
class Fit:
    """The verdict on a plan."""

    plan: DecoderPlan
    budget: Budget
    ranks: tuple[RankFit, ...]

    @property
    def fits(self) -> bool:
        return all(rank.fits for rank in self.ranks)

    @property
    def fullest(self) -> RankFit:
        """The rank that needs the most."""
        return max(self.ranks, key=lambda rank: rank.needed_bytes)

    @property
    def kv_tokens(self) -> int:
        """Tokens of the job's KV cache: the rank with the least room sets it for all."""
        return min(rank.kv_tokens for rank in self.ranks if rank.kv_tokens is not None)

    @property
    def num_sequences(self) -> int:
        """Sequences of the plan's length that the KV cache holds at once."""
        return min(rank.num_sequences for rank in self.ranks if rank.num_sequences is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the plan itself is left out."""
        return {
            "fits": self.fits,
            "memory_bytes": self.budget.memory_bytes,
            "usable_bytes": self.budget.usable_bytes,
            "kv_tokens": self.kv_tokens,
            "num_sequences": self.num_sequences,
            "ranks": [asdict(rank) for rank in self.ranks],
        }

    def shortage(self) -> str:
        """One line on a plan that does not fit: the fullest rank, its need, and what to change."""
        plan, budget, fullest = self.plan, self.budget, self.fullest
        rank = plan.ranks[fullest.rank]
        kv_bytes = fullest.needed_bytes - rank.weight_bytes - rank.activation_bytes
        smaller_dtype = ", model.dtype=bfloat16" if plan.dtype == "float32" else ""
        return (
            f"{plan.topology.describe(rank.rank)} needs {format_bytes(fullest.needed_bytes)} "
            f"(weights {format_bytes(rank.weight_bytes)}, activations "
            f"{format_bytes(rank.activation_bytes)}, KV cache of one sequence of "
            f"{plan.max_model_len} tokens {format_bytes(kv_bytes)}), but "
            f"{format_bytes(budget.usable_bytes)} may be used ({budget.utilization:g} of "
            f"{format_bytes(budget.memory_bytes)}); use more ranks{smaller_dtype}, or a smaller "
            "model.max_model_len or scheduler.max_num_batched_tokens"
        )


def fit_of(plan: DecoderPlan, budget: Budget) -> Fit:
    """Judge every rank of a plan."""
    return Fit(plan, budget, tuple(_fit_rank(rank, plan, budget) for rank in plan.ranks))


def _fit_rank(rank: DecoderRankPlan, plan: DecoderPlan, budget: Budget) -> RankFit:
    block_bytes = rank.kv_bytes_per_token * budget.block_size
    sequence_blocks = -(-plan.max_model_len // budget.block_size)
    fixed_bytes = rank.weight_bytes + rank.activation_bytes
    room = budget.usable_bytes - fixed_bytes
    num_blocks = max(room, 0) // block_bytes if block_bytes else None
    return RankFit(
        rank=rank.rank,
        needed_bytes=fixed_bytes + sequence_blocks * block_bytes,
        kv_room_bytes=room,
        kv_tokens=None if num_blocks is None else num_blocks * budget.block_size,
        num_sequences=None if num_blocks is None else num_blocks // sequence_blocks,
        fits=room >= sequence_blocks * block_bytes,
    )
