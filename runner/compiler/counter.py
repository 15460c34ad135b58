"""How often this process compiled anything: the proof that a bundle runs without a compiler.

Sums what PyTorch counts by itself (dynamo's frames, inductor's graphs), what Triton tells of each
kernel, and what our own backends report. `count_compilations` is 0 in a process that only loads
artefacts.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ours: Counter[str] = Counter()
_is_triton_watched = False


@contextmanager
def counted(kind: str) -> Iterator[None]:
    """Count what happens inside as one compilation of this kind."""
    _ours[kind] += 1
    yield


def watch_triton() -> None:
    """Count the kernels that Triton compiles from now on, and not those that it finds in a cache;
    without Triton there are none.
    """
    global _is_triton_watched
    if _is_triton_watched:
        return
    try:
        from triton import knobs
    except ImportError:
        return
    previous = knobs.compilation.listener

    def listen(*, cache_hit: bool, **told: Any) -> None:
        _ours["triton"] += not cache_hit
        if previous:
            previous(cache_hit=cache_hit, **told)

    knobs.compilation.listener = listen
    _is_triton_watched = True


def compilations() -> dict[str, int]:
    """Compilations of this process so far, by kind; kinds that did not happen are left out."""
    found = Counter(_ours)
    utils: Any = sys.modules.get("torch._dynamo.utils")
    if utils is not None:
        found["dynamo"] += utils.counters["stats"]["unique_graphs"]
        found["inductor"] += utils.counters["inductor"]["fxgraph_cache_miss"]
    return {kind: count for kind, count in sorted(found.items()) if count}


def count_compilations() -> int:
    """Their sum."""
    return sum(compilations().values())
