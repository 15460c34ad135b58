"""`Part`: one call of a stage's sequence, which may be run by PyTorch or in compiled form."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from runner.compiler.segment import Segment, TensorSpec

Execute = Callable[..., tuple[torch.Tensor, ...]]
"""Runs a part of a stage: called with its name and its activations, returns its outputs."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One call of a stage's sequence.

    Attributes:
        kind: what it computes, the same in all layers.
        module: pure; called with the activations alone.
        activations: the shape of each, without the rows that come first.
        dtype: of the activations.
        per_sample: its rows are the step's samples rather than its tokens.
    """

    kind: str
    module: nn.Module
    activations: tuple[Shape, ...]
    dtype: torch.dtype
    per_sample: bool = False

    def segment(self, num_rows: int) -> Segment:
        """The part at a fixed number of rows."""
        specs = tuple(TensorSpec((num_rows, *shape), self.dtype) for shape in self.activations)
        return Segment(self.kind, self.module, specs)
