"""What an exception in the middle of a job says: this rank is wrong, or another is."""

import errno
import re

import torch
import torch.distributed as dist

from parallel.errors import DoesNotFitError, RankLostError, ShardlineError, StalledError

_LATE = {
    "Timed out waiting": "collective_timeout_s",
    # To an operation of this rank, when another one of its own has passed the limit.
    "Application timeout caused pair closure": "collective_timeout_s",
    "Watchdog caught collective operation timeout": "collective_timeout_s",
    "wait timeout after": "init_timeout_s",
}
"""How gloo, NCCL and the store word it that another rank is late: which limit it passed."""

_GONE = ("Connection closed by peer", "Connection reset", "Broken pipe", "Connection refused")
"""The same of one that is gone."""

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
    limits = [limit for sign, limit in _LATE.items() if sign in str(error)]
    if isinstance(error, RuntimeError) and limits:
        return StalledError(
            f"{message}; if no rank hangs, a step is slower than distributed.{limits[0]} allows"
        )
    gone = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _GONE)
    return RankLostError(message, peer=gone or isinstance(error, dist.DistError))


def is_disk_full(error: BaseException | None) -> bool:
    """Whether it, or what it came of, is that a disk has no space left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
