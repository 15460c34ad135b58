"""The programs of all ranks in a bundle: one JSON file, and the graph of each segment as .pt2.

Compiled segments need only their shapes; a graph is read where a segment runs uncompiled, or is
compiled anew.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.export.passes import move_to_device_pass

from parallel.graph_stage import Collective, Value
from parallel.records import read_record
from runner.compiler.segment import Segment, TensorSpec
from runner.config.json_file import read_json_object
from runner.pipeline.stage_program import Compute, StageProgram
from runner.sources.pt2 import read_program, write_program

FILE = "programs.json"
GRAPHS = "graphs"


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, spec: TensorSpec) -> "_Tensor":
        return cls(name, str(spec.dtype).removeprefix("torch."), spec.shape)

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.shape, getattr(torch, self.dtype))


@dataclass(frozen=True)
class _Step:
    """A segment or a collective; the fields of the other one are empty."""

    kind: str
    inputs: tuple[_Tensor, ...]
    outputs: tuple[_Tensor, ...]
    weights: tuple[_Tensor, ...]
    graph: str


@dataclass(frozen=True)
class _Program:
    steps: tuple[_Step, ...]
    receives: tuple[_Tensor, ...]
    sends: tuple[_Tensor, ...]
    results: tuple[_Tensor, ...]


@dataclass(frozen=True)
class _Programs:
    """For each rank, its programs by bucket."""

    ranks: tuple[tuple[_Program, ...], ...]


class StoredSegment(Segment):
    """A segment whose graph lies in a file of a bundle; its weights are known by shape only."""

    def __init__(
        self,
        kind: str,
        activations: tuple[TensorSpec, ...],
        weights: Mapping[str, TensorSpec],
        file: Path,
        device: str,
    ) -> None:
        super().__init__(kind, nn.Module(), activations)
        vars(self).update(_specs=dict(weights), _file=file, _device=device)

    @property
    def weights(self) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = vars(self)["_specs"]
        return specs

    def export(self, device: torch.device | str) -> torch.export.ExportedProgram:
        program = move_to_device_pass(read_program(vars(self)["_file"]), str(device))
        # A file holds no example inputs, and inductor asks for them; the graph's own are fake.
        nodes = {node.name: node for node in program.graph.nodes}
        names = program.graph_signature.user_inputs
        program.example_inputs = tuple(nodes[str(name)].meta["val"] for name in names), {}
        return program

    def function(self) -> nn.Module:
        return self.export(vars(self)["_device"]).module(check_guards=False)


def write_programs(ranks: Sequence[Sequence[StageProgram]], folder: Path) -> list[str]:
    """Write the programs of all ranks into a folder.

    Returns:
        The names of the files, relative to the folder.
    """
    graphs = _Graphs(folder / GRAPHS)
    stored = _Programs(tuple(tuple(_store(p, graphs) for p in programs) for programs in ranks))
    (folder / FILE).write_text(json.dumps(asdict(stored), indent=1) + "\n")
    return [FILE, *(f"{GRAPHS}/{name}.pt2" for name in sorted(graphs.names))]


class _Graphs:
    """The graphs that are written, each once, under the digests of their segments."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.names: set[str] = set()

    def add(self, segment: Segment) -> str:
        program = segment.export("cpu")
        name = segment.digest(program)
        if name not in self.names:
            self.names.add(name)
            write_program(program, self._folder / f"{name}.pt2")
        return name


def read_programs(folder: Path, rank: int, *, device: str) -> list[StageProgram]:
    """The programs of a rank, from a folder whose hashes were checked.

    Raises:
        IntegrityError: it holds something else.
    """
    stored = read_record(_Programs, read_json_object(folder / FILE), FILE)
    return [_restore(program, folder, device) for program in stored.ranks[rank]]


def _store(program: StageProgram, graphs: _Graphs) -> _Program:
    steps = []
    for step in program.steps:
        if isinstance(step, Collective):
            steps.append(_Step(step.kind, _tensors([step.input]), _tensors([step.output]), (), ""))
            continue
        segment = step.segment
        steps.append(
            _Step(
                segment.kind,
                tuple(map(_Tensor.of, step.inputs, segment.activations)),
                tuple(_Tensor(name, "", ()) for name in step.outputs),
                tuple(_Tensor.of(name, spec) for name, spec in segment.weights.items()),
                graphs.add(segment),
            )
        )
    return _Program(
        tuple(steps),
        _tensors(program.receives),
        _tensors(program.sends),
        _tensors(program.results),
    )


def _restore(program: _Program, folder: Path, device: str) -> StageProgram:
    steps = [
        _compute(step, folder, device) if step.graph else _collective(step)
        for step in program.steps
    ]
    edges = (_values(v) for v in (program.receives, program.sends, program.results))
    return StageProgram(tuple(steps), *edges)


def _compute(step: _Step, folder: Path, device: str) -> Compute:
    segment = StoredSegment(
        step.kind,
        tuple(tensor.spec for tensor in step.inputs),
        {tensor.name: tensor.spec for tensor in step.weights},
        folder / GRAPHS / f"{step.graph}.pt2",
        device,
    )
    names = tuple(t.name for t in step.inputs), tuple(t.name for t in step.outputs)
    return Compute(segment, *names)


def _collective(step: _Step) -> Collective:
    kind: Literal["all_reduce", "all_gather"]
    kind = "all_reduce" if step.kind == "all_reduce" else "all_gather"
    return Collective(kind, *_values(step.inputs), *_values(step.outputs))


def _tensors(values: Iterable[Value]) -> tuple[_Tensor, ...]:
    return tuple(_Tensor(value.name, value.dtype, value.shape) for value in values)


def _values(tensors: Iterable[_Tensor]) -> tuple[Value, ...]:
    return tuple(Value(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
