"""How many KV blocks the ranks can agree on."""

import os

import torch

from parallel.collectives import broadcast, minimum
from parallel.context import ParallelContext
from parallel.errors import DoesNotFitError
from parallel.plan import RankPlan


def agree_on_blocks(
    wanted: int,
    context: ParallelContext,
    rank_plan: RankPlan,
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
    wanted = int(broadcast(torch.tensor([wanted]), 0, context.world).item())
    block_bytes = rank_plan.kv_bytes_per_token * block_size
    free = _free_bytes(context, utilization) - rank_plan.activation_bytes
    fitting = free // block_bytes if block_bytes else wanted
    agreed = minimum(min(wanted, fitting), context.world)
    if agreed < 1:
        raise DoesNotFitError(
            f"no memory for a KV cache: {max(free, 0) / 2**30:.1f} GiB are left beside the "
            f"weights, a "
            f"block of {block_size} tokens takes {block_bytes / 2**20:.1f} MiB; use more ranks, a "
            f"lower "
            "scheduler.max_num_batched_tokens, or a higher kv_cache.gpu_memory_utilization"
        )
    return agreed


def _free_bytes(context: ParallelContext, utilization: float) -> int:
    """Memory that this rank may still take, its weights being loaded."""
    if context.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(context.device)
        return int(total * utilization) - (total - free)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(available * utilization) // context.world.size
