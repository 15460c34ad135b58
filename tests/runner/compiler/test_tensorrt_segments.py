"""Every segment of every family is one TensorRT engine: by the real builder, which needs no GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from checkpoints import FAMILIES

from parallel.collectives import Group
from runner.build.worklist import Work, worklist
from runner.compiler.tensorrt import BuildSettings
from runner.compiler.tensorrt_io import ENGINE_FILE, EngineIO
from runner.compiler.tensorrt_target import BuildJob, run_builder
from runner.config.load import load
from runner.models.attention import GatherAttention
from runner.models.decoder import DecoderStage
from runner.planning import DecoderJob

pytestmark = pytest.mark.timeout(600)

DECODE, PREFILL = 1, 33


class Case(NamedTuple):
    """How a model is cut and compiled. On one rank a layer is one segment, on two it is three."""

    tp_size: int
    dtype: torch.dtype
    num_rows: int


CASES = [Case(1, torch.bfloat16, DECODE), Case(2, torch.float16, PREFILL)]
OTHER_CASES = [
    Case(tp_size, dtype, num_rows)
    for tp_size in (1, 2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for num_rows in (DECODE, PREFILL)
    if Case(tp_size, dtype, num_rows) not in CASES
]


def segments_of(folder: Path, case: Case) -> list[Work]:
    """What all ranks of a job run, without weights."""
    settings = {
        "model.path": folder,
        "parallel.device": "cpu",
        "parallel.tensor_parallel_size": case.tp_size,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    job = DecoderJob.prepare(load(None, overrides=overrides).config)
    stages = [
        DecoderStage(
            job.spec.config,
            job.plan.stages[0],
            rank_plan,
            Group(tuple(range(case.tp_size)), rank),
            attend=GatherAttention(rank_plan.heads, torch.device("cpu")),
            max_model_len=job.plan.max_model_len,
            dtype=case.dtype,
        )
        for rank, rank_plan in enumerate(job.plan.ranks)
    ]
    return worklist(stages, (case.num_rows,), max_num_seqs=case.num_rows)


def build(families: dict[str, Path], cases: list[Case], desk: Path) -> dict[str, list[str]]:
    """Build everything in one process.

    Returns:
        the errors of each family; for every segment without one an artefact was checked.
    """
    works = [
        (family, work.segment)
        for family, folder in families.items()
        for case in cases
        for work in segments_of(folder, case)
    ]
    jobs = []
    for i, (family, segment) in enumerate(works):
        kind = f"{family} {segment.kind} {segment.activations[0]}"
        jobs.append(BuildJob(kind, segment.export("cpu"), desk / str(i)))
        jobs[-1].folder.mkdir()
    found: dict[str, list[str]] = {family: [] for family in families}
    errors = run_builder(jobs, "sm89", BuildSettings())
    for (family, segment), job, error in zip(works, jobs, errors, strict=True):
        if error is not None:
            found[family].append(error)
            continue
        io = EngineIO.read(job.folder)
        assert tuple(io.inputs.values()) == segment.inputs
        assert {spec.dtype for spec in io.outputs.values()} == {segment.activations[0].dtype}
        assert (job.folder / ENGINE_FILE).stat().st_size > 0
    return found


@pytest.fixture(scope="module")
def errors(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    families = {name: checkpoint(name) for name in FAMILIES}
    return build(families, CASES, tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_segment_is_one_engine(name: str, errors: dict[str, list[str]]) -> None:
    assert errors[name] == []


@pytest.mark.full
def test_one_family_in_both_half_precisions_at_both_buckets(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """What the quick cases leave out, for one family; `full` does it for all."""
    rest = [case for case in OTHER_CASES if case.dtype is not torch.float32]
    assert build({"llama": checkpoint("llama")}, rest, tmp_path) == {"llama": []}


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_every_segment_in_every_dtype_at_both_buckets(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    assert build({name: checkpoint(name)}, OTHER_CASES, tmp_path) == {name: []}
