"""Every segment of every family is one TensorRT engine: by the real builder, which needs no GPU."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES
from engine_builds import Built, Case, build_engines

# On an idle machine of two cores the engines in half precision take two to three minutes.
pytestmark = pytest.mark.timeout(1200)

DECODE, PREFILL = 1, 33

HALF, SINGLE = (
    [
        Case(tp_size, dtype, num_rows)
        for tp_size in (1, 2)
        for dtype in dtypes
        for num_rows in (DECODE, PREFILL)
    ]
    for dtypes in ((torch.bfloat16, torch.float16), (torch.float32,))
)

ALIKE = ("llama", "mistral", "qwen2")
"""Families that share most segments begin so, and are built by one process."""

Checkpoint = Callable[[str], Path]


def build_all(cases: list[Case], checkpoint: Checkpoint, desk: Path) -> dict[str, Built]:
    """All families, by two processes at once."""
    folders = {name: checkpoint(name) for name in FAMILIES}
    shares = [
        {n: f for n, f in folders.items() if n.startswith(ALIKE) == alike}
        for alike in (True, False)
    ]
    found: dict[str, Built] = {}
    num_engines = 0
    with ProcessPoolExecutor(len(shares), get_context("spawn")) as processes:
        places = [desk / str(i) for i in range(len(shares))]
        for built, count in processes.map(build_engines, shares, [cases] * len(shares), places):
            found |= built
            num_engines += count
    # Ropes differ outside of segments, so the variants of a family share their engines.
    assert num_engines < sum(built.num_segments for built in found.values())
    return found


@pytest.fixture(scope="module")
def half(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    return build_all(HALF, checkpoint, tmp_path_factory.mktemp("half"))


@pytest.fixture(scope="module")
def single(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    return build_all(SINGLE, checkpoint, tmp_path_factory.mktemp("single"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_segment_is_one_engine_in_both_half_precisions(
    name: str, half: dict[str, Built]
) -> None:
    """For one rank and for two, for decoding and for prompts."""
    # Of either size of the group at least qkv, two kinds of layers' parts, and the head.
    assert half[name].num_segments >= 4 * len(HALF)
    assert half[name].errors == ()


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_every_segment_is_one_engine_in_float32(name: str, single: dict[str, Built]) -> None:
    assert single[name].num_segments >= 4 * len(SINGLE)
    assert single[name].errors == ()
