"""All-reduce of small tensors in one kernel: every rank reads what the others hold, over NVLink.

NCCL takes several steps for what a decode step adds up, a few kilobytes; here the time is that of
one read of a peer's memory. Large tensors stay with NCCL, which moves each byte once.
"""

from collections.abc import Sequence
from itertools import permutations

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

MAX_BYTES = 512 * 1024
"""The largest tensor that is added up this way."""

_ALIGNMENT = 16
_DTYPES = (torch.bfloat16, torch.float32)
"""What torch's kernel adds up."""


class OneShot:
    """A group's memory that its ranks read from one another; seen from one of them.

    Calls are ordered by the stream that they are made on, and can be captured in a CUDA graph.
    """

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device) -> None:
        """All ranks of the group must do this together.

        Raises:
            RuntimeError: the driver does not let ranks share memory.
        """
        self._group_name = process_group.group_name
        self._buffer = symm_mem.empty(MAX_BYTES, dtype=torch.uint8, device=device)
        symm_mem.rendezvous(self._buffer, process_group)

    def takes(self, x: torch.Tensor) -> bool:
        """See `SmallSums`."""
        fits = x.nbytes <= MAX_BYTES and x.nbytes % _ALIGNMENT == 0
        return fits and x.dtype in _DTYPES and x.is_contiguous()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `SmallSums`."""
        shared = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        total: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(
            shared, x, "sum", self._group_name
        )
        return total


def can_read_one_another(devices: Sequence[int]) -> bool:
    """Whether every GPU can read the memory of every other, by index."""
    return all(torch.cuda.can_device_access_peer(a, b) for a, b in permutations(set(devices), 2))
