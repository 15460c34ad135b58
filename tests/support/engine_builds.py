"""Engines of all segments of a model, built for a GPU that is not here, by processes that a test
starts: each distinct segment once, whatever models it is of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from parallel.collectives import Group
from runner.build.worklist import Work, worklist
from runner.compiler.segment import Segment
from runner.compiler.tensorrt import BuildSettings
from runner.compiler.tensorrt_io import ENGINE_FILE, EngineIO
from runner.compiler.tensorrt_target import BuildJob, TensorRTTargetBackend, run_builder
from runner.config.load import load
from runner.models.attention import GatherAttention
from runner.models.decoder import DecoderStage
from runner.planning import DecoderJob

TARGET = "sm89"


class Case(NamedTuple):
    """How a model is cut and compiled. On one rank a layer is one segment, on two it is three."""

    tp_size: int
    dtype: torch.dtype
    num_rows: int


@dataclass(frozen=True)
class Built:
    """What became of the segments of one model.

    Attributes:
        num_segments: those of all cases, each as often as it comes.
        errors: what was said of those that are no engine.
    """

    num_segments: int
    errors: tuple[str, ...]


def engines_of(segments: Sequence[Segment], desk: Path) -> list[Path]:
    """A folder for each segment, with an engine of it that was built for `TARGET`."""
    jobs = []
    for index, segment in enumerate(segments):
        folder = desk / str(index)
        folder.mkdir()
        jobs.append(BuildJob(segment.kind, segment.export("cpu"), folder))
    TensorRTTargetBackend(TARGET).build_all(jobs)
    return [job.folder for job in jobs]


def build_engines(
    models: Mapping[str, Path], cases: Sequence[Case], desk: Path
) -> tuple[dict[str, Built], int]:
    """Build everything in one process of the builder.

    Returns:
        what became of each model, and how many engines there are.
    """
    jobs: dict[str, BuildJob] = {}
    wanted: dict[str, list[str]] = {name: [] for name in models}
    segments = {}
    for name, folder in models.items():
        for work in (work for case in cases for work in segments_of(folder, case)):
            program = work.segment.export("cpu")
            digest = work.segment.digest(program)
            wanted[name].append(digest)
            if digest not in jobs:
                place = desk / str(len(jobs))
                place.mkdir(parents=True)
                kind = f"{name} {work.segment.kind} {work.segment.activations[0]}"
                jobs[digest], segments[digest] = BuildJob(kind, program, place), work.segment
    answers = run_builder(list(jobs.values()), TARGET, BuildSettings())
    errors = {}
    for digest, error in zip(jobs, answers, strict=True):
        if error is not None:
            errors[digest] = error
            continue
        segment, place = segments[digest], jobs[digest].folder
        io = EngineIO.read(place)
        assert io.takes == tuple(io.inputs.values()) == segment.inputs
        assert {spec.dtype for spec in io.outputs.values()} == {segment.activations[0].dtype}
        assert (place / ENGINE_FILE).stat().st_size > 0
    built = {
        name: Built(len(digests), tuple(errors[d] for d in digests if d in errors))
        for name, digests in wanted.items()
    }
    return built, len(jobs)


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
