"""Names for what a rank does, in the timeline of a profiler: PyTorch's own, or Nsight's by NVTX.

While nobody profiles, `unnamed` stands in their place: one call that does nothing.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch.profiler import record_function


class Annotate(Protocol):
    """A range of time with a name, from entering it to leaving it."""

    def __call__(self, name: str, ids: Iterable[int] = (), /) -> AbstractContextManager[object]:
        """
        Args:
            ids: a part of the name; not looked at while nobody profiles.
        """
        ...


_NOTHING = nullcontext()


def unnamed(_name: str, _ids: Iterable[int] = ()) -> AbstractContextManager[object]:
    """No range."""
    return _NOTHING


def for_torch(name: str, ids: Iterable[int] = ()) -> AbstractContextManager[object]:
    """A range that `torch.profiler` records."""
    return record_function(_label(name, ids))


def for_nsight(name: str, ids: Iterable[int] = ()) -> AbstractContextManager[object]:
    """A range that Nsight Systems records; needs a CUDA build of torch."""
    return torch.cuda.nvtx.range(_label(name, ids))


def _label(name: str, ids: Iterable[int]) -> str:
    """
    >>> _label("requests", [3, 4])
    'requests 3, 4'
    """
    return f"{name} {', '.join(map(str, ids))}".rstrip()
