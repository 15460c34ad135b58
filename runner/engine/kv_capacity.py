"""How many KV blocks the ranks can agree on."""

from pathlib import Path

import torch

from parallel.collectives import broadcast, minimum
from parallel.context import ParallelContext
from parallel.decoder_plan import DecoderPlan, DecoderRankPlan
from parallel.errors import DoesNotFitError
from parallel.fit import format_bytes
from runner.observe.cgroup import read_cgroup_limits
from runner.observe.host import parse_meminfo


def agree_on_blocks(
    wanted: int,
    context: ParallelContext,
    rank_plan: DecoderRankPlan,
    *,
    block_size: int,
    utilization: float,
) -> int:
    """The number of blocks that every rank can hold, and no more than rank 0 wants.

    Args:
        wanted: blocks that all requests together could use; only rank 0's value counts.
        block_size: tokens of a block.
        utilization: share of a device's memory that weights, activations and cache may take.

    Raises:
        DoesNotFitError: a rank has room for none.
    """
    # The first meeting after loading, which takes some ranks far longer than others.
    wanted = int(broadcast(torch.tensor([wanted]), 0, context.setup).item())
    block_bytes = rank_plan.kv_bytes_per_token * block_size
    free = _free_bytes(context, utilization) - rank_plan.activation_bytes
    fitting = free // block_bytes if block_bytes else wanted
    agreed = minimum(min(wanted, fitting), context.world)
    if agreed < 1:
        remedy = "more GPUs, " if context.device.type == "cuda" else ""
        raise DoesNotFitError(
            f"no memory for a KV cache: {max(free, 0) / 2**30:.1f} GiB are left beside the "
            f"weights, a block of {block_size} tokens takes {block_bytes / 2**20:.1f} MiB; "
            f"use {remedy}a lower scheduler.max_num_batched_tokens, or a higher "
            "kv_cache.gpu_memory_utilization"
        )
    return agreed


def check_weights_fit(plan: DecoderPlan, context: ParallelContext, utilization: float) -> None:
    """Before anything is read; the ranks of a CPU share its memory.

    Raises:
        DoesNotFitError: the weights and the activations are more than there is.
    """
    sharing = [plan.ranks[context.rank]] if context.device.type == "cuda" else plan.ranks
    needed = sum(rank.weight_bytes + rank.activation_bytes for rank in sharing)
    free = _free_bytes(context, utilization) * len(sharing)
    if needed > free:
        raise DoesNotFitError(
            f"weights and activations take {format_bytes(needed)}, {format_bytes(free)} are free "
            f"on {context.device}; use more GPUs, a smaller --dtype, or a lower --max-model-len or "
            "scheduler.max_num_batched_tokens"
        )


def _free_bytes(context: ParallelContext, utilization: float) -> int:
    """Memory that this rank may still take, its weights being loaded."""
    if context.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(context.device)
        return int(total * utilization) - (total - free)
    return int(_host_free_bytes() * utilization) // context.world.size


def _host_free_bytes() -> int:
    """What the kernel would still give: file cache counts as free, and a container has a limit."""
    available = parse_meminfo(Path("/proc/meminfo").read_text())["MemAvailable"]
    allowed = read_cgroup_limits().memory_free_bytes
    return available if allowed is None else min(available, allowed)
