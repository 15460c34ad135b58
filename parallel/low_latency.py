"""All-reduce of small tensors without a barrier: a rank sends, and waits for nothing but data.

A kernel that reads a peer's memory (`parallel.one_shot`) first waits until the peer has something
there, and at its end until the peer has read: twice as long as a message takes. Here every 32 bits
of data travel with the number of the call, so that whoever reads them knows that they have come.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

MAX_BYTES = 512 * 1024
"""The largest tensor that is added up this way; it takes twice as much in transfer."""

KERNEL = "low_latency_kernel"
"""The function that Triton compiles for it."""

_ALIGNMENT = 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_WORDS = MAX_BYTES // 4
_WORDS_OF_A_PROGRAM = 256
_NUM_WARPS = 8
"""With a word for each thread, which waits for no other word."""


class LowLatency:
    """A group's inboxes, into which its ranks write; seen from one of them.

    Calls are ordered by the stream that they are made on, and can be captured in a CUDA graph.
    """

    def __init__(self, rank: int, inboxes: Sequence[int], inbox: torch.Tensor) -> None:
        """
        Args:
            rank: this rank's place in the group.
            inboxes: addresses of all ranks' inboxes, that this rank can write to.
            inbox: this rank's, of `inbox_words` int64 zeros.
        """
        places = [address + rank * _MAX_WORDS * inbox.element_size() for address in inboxes]
        self._outboxes = torch.tensor(places, dtype=torch.int64, device=inbox.device)
        self._inbox, self._size = inbox, len(inboxes)
        num_programs = _MAX_WORDS // _WORDS_OF_A_PROGRAM
        self._calls = torch.zeros(num_programs, dtype=torch.int32, device=inbox.device)

    @classmethod
    def open(cls, process_group: dist.ProcessGroup, device: torch.device) -> "LowLatency":
        """All ranks of the group must do this together.

        Raises:
            RuntimeError: the driver does not let ranks share memory.
        """
        num_words = inbox_words(process_group.size())
        inbox = symm_mem.empty(num_words, dtype=torch.int64, device=device).zero_()
        shared = symm_mem.rendezvous(inbox, process_group)
        # Nobody writes before all inboxes are empty.
        shared.barrier()
        torch.cuda.synchronize(device)
        assert shared.buffer_ptrs[process_group.rank()] == inbox.data_ptr()
        return cls(process_group.rank(), shared.buffer_ptrs, inbox)

    def takes(self, x: torch.Tensor) -> bool:
        """See `SmallSums`."""
        # Of no words at all a program would count a call without waiting for the others.
        fits = 0 < x.nbytes <= MAX_BYTES and x.nbytes % _ALIGNMENT == 0
        return fits and x.dtype in _DTYPES and x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `SmallSums`; added up in float32."""
        from parallel.low_latency_kernel import low_latency_kernel

        total = torch.empty_like(x)
        num_words = x.nbytes // 4
        low_latency_kernel[(-(-num_words // _WORDS_OF_A_PROGRAM),)](
            x,
            total,
            self._outboxes,
            self._inbox,
            self._calls,
            num_words,
            SIZE=self._size,
            MAX_WORDS=_MAX_WORDS,
            BLOCK=_WORDS_OF_A_PROGRAM,
            num_warps=_NUM_WARPS,
        )
        return total


def inbox_words(size: int) -> int:
    """Of the inbox of a rank, in a group of so many."""
    return 2 * size * _MAX_WORDS
