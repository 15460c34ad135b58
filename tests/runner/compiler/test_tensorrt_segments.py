"""Every segment of every family is one TensorRT engine: by the real builder, which needs no GPU."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES
from engine_builds import Built, Case, build_engines

# On an idle machine of two cores the engines of a dtype take two minutes.
pytestmark = pytest.mark.timeout(1200)

DECODE, PREFILL = 1, 33

DTYPES = [
    torch.bfloat16,
    pytest.param(torch.float16, marks=pytest.mark.full),
    pytest.param(torch.float32, marks=pytest.mark.full),
]

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


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def cases(request: pytest.FixtureRequest) -> list[Case]:
    """For one rank and for two, for decoding and for prompts."""
    return [
        Case(tp_size, request.param, num_rows)
        for tp_size in (1, 2)
        for num_rows in (DECODE, PREFILL)
    ]


@pytest.fixture(scope="module")
def built(
    cases: list[Case], checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Built]:
    return build_all(cases, checkpoint, tmp_path_factory.mktemp("built"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_segment_is_one_engine(name: str, cases: list[Case], built: dict[str, Built]) -> None:
    # In every case at least qkv, two kinds of layers' parts, and the head.
    assert built[name].num_segments >= 4 * len(cases)
    assert built[name].errors == ()
