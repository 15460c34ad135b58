"""What a rank's stage does in one bucket: segments to compute, and collectives between them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from parallel.graph_stage import Collective, Stage, Value
from runner.compiler.segment import Segment, TensorSpec, named_tensors


@dataclass(frozen=True)
class Compute:
    """A segment, and where its activations come from and go to.

    Attributes:
        segment: `segment.kind` names the step, the same in all buckets of a batch size.
        inputs, outputs: names of values.
    """

    segment: Segment
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class StageProgram:
    """A stage at fixed shapes.

    Attributes:
        receives, sends: what crosses its boundaries; see `parallel.graph_stage.Stage`.
        results: what the whole model returns, in the order of the plan's outputs.
    """

    steps: tuple[Compute | Collective, ...]
    receives: tuple[Value, ...]
    sends: tuple[Value, ...]
    results: tuple[Value, ...]

    @classmethod
    def of(cls, stage: Stage, results: tuple[Value, ...], *, prefix: str) -> "StageProgram":
        """Make the pieces of a stage segments.

        Args:
            prefix: what the kinds of its segments begin with, such as "stage0".
        """
        steps: list[Compute | Collective] = []
        for step in stage.steps:
            if isinstance(step, Collective):
                steps.append(step)
                continue
            kind = f"{prefix}.{len(steps)}"
            specs = tuple(TensorSpec(v.shape, v.torch_dtype) for v in step.inputs)
            names = tuple(v.name for v in step.inputs), tuple(v.name for v in step.outputs)
            steps.append(Compute(Segment(kind, step.module, specs), *names))
        return cls(tuple(steps), stage.receives, stage.sends, results)

    @property
    def distinct_results(self) -> tuple[Value, ...]:
        """Each once: what the last stage sends to rank 0."""
        return tuple(dict.fromkeys(self.results))

    @property
    def computations(self) -> tuple[Compute, ...]:
        return tuple(step for step in self.steps if isinstance(step, Compute))

    @property
    def weights(self) -> Mapping[str, TensorSpec]:
        """All that its segments hold, by name."""
        return {n: spec for step in self.computations for n, spec in step.segment.weights.items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights themselves, where the program was traced from a model."""
        for step in self.computations:
            yield from named_tensors(step.segment.module)
