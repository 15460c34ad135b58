"""Compile on the ranks of a `RankPool` or of a command, with faults planted where a test asks."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch

from parallel.collectives import Group
from parallel.context import ParallelContext
from parallel.launch import RankEnv
from parallel.topology import Topology
from runner.build import decoder_recipe
from runner.build.compile import Destination, Outcome, compile_together
from runner.build.recipe import recipe_of
from runner.bundle.weights_file import read_weights
from runner.compiler.backend import Compiled
from runner.compiler.eager import EagerBackend
from runner.compiler.segment import Segment
from runner.joining import Phase
from runner.models import decoder

Plant = Callable[[pytest.MonkeyPatch, int], None]
"""Breaks something on a rank, which is named."""


def build(
    context: ParallelContext,
    model: str,
    out: Path,
    settings: dict[str, Any],
    plant: Plant | None = None,
    options: dict[str, Any] | None = None,
) -> Outcome:
    """Compile on this rank.

    Args:
        settings: as for `rank_jobs.prepare`.
        plant: its fault is there for as long as this takes.
        options: of `Destination`.
    """
    job = rank_jobs.prepare(model, list(context.topology.tp_sizes), settings)
    with pytest.MonkeyPatch.context() as patch:
        if plant:
            plant(patch, context.rank)
        phase = Phase(RankEnv(context.rank, context.topology.world_size))
        return compile_together(recipe_of(job), context, Destination(out, **options or {}), phase)


def build_here(model: Path, out: Path, settings: dict[str, Any], **options: Any) -> Outcome:
    """Compile on one rank, which is this process."""
    alone = ParallelContext.open(Topology.of([1]), RankEnv(0, 1), device_type="cpu")
    outcome = build(alone, str(model), out, settings, options=options)
    alone.close()
    return outcome


def arguments(model: Path, out: Path, tp_sizes: list[int], settings: dict[str, Any]) -> list[str]:
    """What makes the command compile the same."""
    stages = ", ".join(f"{{tensor_parallel_size: {size}}}" for size in tp_sizes)
    keys = {"model.dtype": "float32", "parallel.stages": f"[{stages}]", **settings}
    given = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    return ["compile", "--device", "cpu", "--model", str(model), "--output", str(out), *given]


def scale(name: str, factor: float) -> Plant:
    """Every rank that holds this tensor finds another one in the bundle."""
    return partial(_change_weights, name=name, only=None, change=partial(_times, factor=factor))


def swap_kv_heads(layer: int, *, rank: int, num_query: int, num_kv: int, head_dim: int) -> Plant:
    """The first two KV heads of a layer of one rank change places."""
    order = [*range(num_query)]
    for first in (num_query, num_query + num_kv):
        order += [first + 1, first, *range(first + 2, first + num_kv)]
    name = f"layers.{layer}.attention.qkv_proj.weight"
    change = partial(_reorder, order=order, head_dim=head_dim)
    return partial(_change_weights, name=name, only=rank, change=change)


def lose_all_reduce(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The ranks of a stage no longer add up their parts of a layer."""
    del rank
    patch.setattr(decoder, "all_reduce", _not_reduced)


def spoil(kind: str, num_rows: int) -> Plant:
    """What a kind of segment is compiled to at one number of rows is a little wrong."""
    return partial(_spoil_artefacts, kind=kind, num_rows=num_rows)


def _change_weights(
    patch: pytest.MonkeyPatch,
    rank: int,
    *,
    name: str,
    only: int | None,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    def read(path: Path, *, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        for held, tensor in read_weights(path, device=device):
            yield held, change(tensor) if held == name else tensor

    if only in (None, rank):
        patch.setattr(decoder_recipe, "read_weights", read)


def _times(tensor: torch.Tensor, *, factor: float) -> torch.Tensor:
    return tensor * factor


def _reorder(tensor: torch.Tensor, *, order: list[int], head_dim: int) -> torch.Tensor:
    return tensor.view(-1, head_dim, tensor.shape[1])[order].reshape(tensor.shape)


def _not_reduced(x: torch.Tensor, group: Group) -> torch.Tensor:
    del group
    return x


def _spoil_artefacts(patch: pytest.MonkeyPatch, rank: int, *, kind: str, num_rows: int) -> None:
    del rank
    load = EagerBackend.load

    def load_spoiled(self: EagerBackend, folder: Path, segment: Segment) -> Compiled:
        run = load(self, folder, segment)
        if (segment.kind, segment.activations[0].shape[0]) != (kind, num_rows):
            return run

        def run_wrongly(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            first, *others = run(*inputs)
            return first * 1.01, *others

        return run_wrongly

    patch.setattr(EagerBackend, "load", load_spoiled)
