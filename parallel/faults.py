"""What an exception in the middle of a job says: this rank is wrong, or another is."""

import re

import torch
import torch.distributed as dist

from parallel.errors import DoesNotFitError, RankLostError, ShardlineError, StalledError

_LATE = ("Timed out waiting", "Watchdog caught collective operation timeout", "wait timeout after")
_GONE = ("Connection closed by peer", "Connection reset", "Broken pipe", "Connection refused")
"""How gloo, NCCL and the store word it that another rank is late, or gone."""

_SOURCE_PLACE = re.compile(r"^\[[^]]*\.(cc|cpp|h):\d+\]\s*")


def as_rank_error(error: Exception, doing: str) -> ShardlineError:
    """The error that a rank ends with.

    Args:
        doing: what this rank was doing, such as "loading weights".
    """
    first_line = _SOURCE_PLACE.sub("", str(error).strip().partition("\n")[0])
    message = f"{type(error).__name__} while {doing}: {first_line}"
    if isinstance(error, torch.OutOfMemoryError):
        return DoesNotFitError(
            f"out of GPU memory while {doing}; use more ranks, a lower --max-model-len, "
            "scheduler.max_num_batched_tokens or kv_cache.gpu_memory_utilization"
        )
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LATE):
        return StalledError(message)
    gone = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _GONE)
    return RankLostError(message, peer=gone or isinstance(error, dist.DistError))
