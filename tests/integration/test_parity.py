"""The gate of a compile: green for what is right, red for every fault, which it calls by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import build_jobs
import pytest
from build_jobs import Plant
from rank_pool import RankPool

from runner.build.parity import ParityReport
from runner.bundle.manifest import Manifest

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]

BUCKETS = [1, 24]
SETTINGS: dict[str, Any] = {
    "compile.backend": "eager",
    "compile.buckets": BUCKETS,
    "scheduler.max_num_seqs": 4,
    "scheduler.max_num_batched_tokens": BUCKETS[-1],
    "compile.parity.num_tokens": 40,
}
NUM_LAYERS = {"gemma3": 4}


def parity_of(
    pool: RankPool, model: Path, out: Path, tp_sizes: list[int], plant: Plant | None = None
) -> ParityReport:
    """What the gate says of a float32 model; every rank must hear the same."""
    outcomes = pool.run(build_jobs.build, tp_sizes, str(model), out, SETTINGS, plant)
    reports = [outcome.parity for outcome in outcomes]
    assert reports == reports[:1] * len(reports)
    return reports[0]


def failed(report: ParityReport) -> set[tuple[str, int]]:
    return {(unit.name, unit.num_tokens) for unit in report.units if not unit.passed}


def at_all_buckets(*names: str) -> set[tuple[str, int]]:
    return {(name, num_tokens) for name in names for num_tokens in BUCKETS}


@pytest.mark.parametrize("tp_sizes", [[1], [2, 2]], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3"])
def test_every_unit_of_a_right_model_passes(
    name: str,
    tp_sizes: list[int],
    rank_pool: RankPool,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    if name == "gemma3" and tp_sizes != [1]:
        tp_sizes = [3, 2]  # 3 query heads that share a KV head
    layers = [f"layers.{index}" for index in range(NUM_LAYERS.get(name, 3))]
    for dtype in ("float32", "bfloat16"):
        settings = SETTINGS | {"model.dtype": dtype}
        out = tmp_path / dtype
        outcomes = rank_pool.run(build_jobs.build, tp_sizes, str(checkpoint(name)), out, settings)
        report = outcomes[0].parity
        assert (report.passed, report.reason) == (True, ""), report
        compared = [(unit.name, unit.num_tokens) for unit in report.units]
        units = ["embedding", *layers, "head"]
        assert compared == [(unit, num_tokens) for unit in units for num_tokens in BUCKETS]
        assert report.whole is not None
        assert report.whole.num_positions == 40
        assert Manifest.read(out).parity["passed"] is True


def test_a_scaled_weight_of_one_layer(
    rank_pool: RankPool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    plant = build_jobs.scale("layers.1.mlp.down_proj.weight", 1.1)
    report = parity_of(rank_pool, checkpoint("llama"), tmp_path / "out", [2, 2], plant)
    assert not report.passed
    assert failed(report) == at_all_buckets("layers.1")
    assert report.reason.startswith("layers.1 at 1 tokens does not compute what the model computes")
    assert Manifest.read(tmp_path / "out").parity["passed"] is False


def test_two_kv_heads_that_changed_places_on_one_rank(
    rank_pool: RankPool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of six query and three KV heads the last stage's first rank has four and two."""
    plant = build_jobs.swap_kv_heads(2, rank=2, num_query=4, num_kv=2, head_dim=8)
    report = parity_of(rank_pool, checkpoint("llama"), tmp_path / "out", [2, 2], plant)
    assert failed(report) == at_all_buckets("layers.2")
    assert "layers.2" in report.reason


def test_a_lost_all_reduce(
    rank_pool: RankPool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    plant = build_jobs.lose_all_reduce
    report = parity_of(rank_pool, checkpoint("llama"), tmp_path / "out", [2], plant)
    # The head, too: each rank computes its part of the vocabulary from other hidden states.
    assert failed(report) == at_all_buckets("layers.0", "layers.1", "layers.2", "head")
    assert "layers.0 at 1 tokens" in report.reason


def test_an_artefact_that_is_a_little_wrong_at_one_bucket(
    rank_pool: RankPool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """One per cent of a layer's output, in the step of 24 tokens alone."""
    plant = build_jobs.spoil("add", 24)
    report = parity_of(rank_pool, checkpoint("llama"), tmp_path / "out", [2, 2], plant)
    last_of_stages = {unit.name for unit in report.units if not unit.passed}
    assert last_of_stages <= {"layers.0", "layers.1", "layers.2"}
    assert failed(report) == {(name, 24) for name in last_of_stages}
    assert "layers.2" in last_of_stages
    assert " at 24 tokens " in report.reason


@pytest.mark.parametrize("layer", [pytest.param(3, marks=pytest.mark.full), 15, 25])
def test_a_scaled_weight_of_a_real_model_in_bfloat16(
    layer: int, rank_pool: RankPool, smollm2: Path, tmp_path: Path
) -> None:
    """Late layers add little to what bfloat16 rounds, and some states are thousands of times larger
    than what is added to them; one token alone may tell too little.
    """
    settings = SETTINGS | {"model.dtype": "bfloat16", "model.max_model_len": 128}
    plant = build_jobs.scale(f"layers.{layer}.mlp.down_proj.weight", 1.1)
    arguments = (str(smollm2), tmp_path / "out", settings, plant)
    report = rank_pool.run(build_jobs.build, [1], *arguments)[0].parity
    found = failed(report)
    assert (f"layers.{layer}", 24) in found
    assert found <= at_all_buckets(f"layers.{layer}")
