"""How often this process compiled anything: the proof that a bundle runs without a compiler.

Sums what PyTorch counts by itself (dynamo's frames, inductor's graphs), what Triton tells its hook,
and what our own backends report. `count_compilations` is 0 in a process that only loads artefacts.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ours: Counter[str] = Counter()
_triton_hooked = False


@contextmanager
def counted(kind: str) -> Iterator[None]:
    """Count what happens inside as one compilation of this kind."""
    _ours[kind] += 1
    yield


def watch_triton() -> None:
    """Count Triton's kernels from now on; without Triton there are none."""
    global _triton_hooked
    if _triton_hooked:
        return
    try:
        from triton import knobs
    except ImportError:
        return
    previous = knobs.runtime.jit_post_compile_hook

    def hook(*args: Any, **kwargs: Any) -> Any:
        _ours["triton"] += 1
        return previous(*args, **kwargs) if previous else None

    knobs.runtime.jit_post_compile_hook = hook
    _triton_hooked = True


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
