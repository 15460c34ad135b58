"""What an exported graph is cut into: stages of pieces, and of collectives between the pieces.

Data only; the cut itself is `parallel.graph`.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from parallel.errors import ConfigError


@dataclass(frozen=True)
class Value:
    """A tensor that crosses between pieces; always contiguous.

    Attributes:
        name: the input's name, or that of the operation that makes it; unique in its graph.
        dtype: as torch spells it, such as "float32".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "Value":
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises ConfigError: torch has no such dtype."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(
                f"{self.name} has dtype {self.dtype!r}, which torch lacks; use one such as float32"
            )
        return dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Piece:
    """A run of operations as a module.

    Attributes:
        module: called with the inputs, returns a tuple of the outputs, each contiguous. It holds
            the parameters and buffers that it uses, and no others, under the names that they have
            in the model. Constants of the traced code are buffers named after their contents.
    """

    module: fx.GraphModule
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Its parameters, then its buffers, by name."""
        yield from self.module.named_parameters()
        yield from self.module.named_buffers()


@dataclass(frozen=True)
class Collective:
    """What the ranks of a stage's tensor-parallel group do together.

    Attributes:
        kind: "all_reduce" sums; "all_gather" stacks the inputs of all ranks along dim 0, in the
            order of the group, as `all_gather_into_tensor` does.
    """

    kind: Literal["all_reduce", "all_gather"]
    input: Value
    output: Value


@dataclass(frozen=True)
class Stage:
    """A contiguous part of a graph.

    A value that skips stages is received and sent on by those between, so a stage talks to its
    neighbours only.

    Attributes:
        steps: in the order in which they run.
        receives: what is live at its beginning; the graph's inputs for stage 0.
        sends: what is live at its end; the graph's distinct outputs for the last stage.
    """

    steps: tuple[Piece | Collective, ...]
    receives: tuple[Value, ...]
    sends: tuple[Value, ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(step for step in self.steps if isinstance(step, Piece))

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """What its pieces hold, by name."""
        return {name: tensor for piece in self.pieces for name, tensor in piece.weights()}


def shared_weights(stages: Sequence[Stage]) -> dict[str, tuple[int, ...]]:
    """The weights that several stages hold a copy of: name -> stages, in ascending order.

    Two names of the same elements of one storage count as one weight, under the name that the
    earliest stage uses. Tensors on the meta device have no storage and are told apart by name.
    """
    names: dict[object, str] = {}
    holders: defaultdict[str, set[int]] = defaultdict(set)
    for index, stage in enumerate(stages):
        for name, tensor in stage.weights.items():
            holders[names.setdefault(_identity(name, tensor), name)].add(index)
    return {name: tuple(sorted(held)) for name, held in holders.items() if len(held) > 1}


def _identity(name: str, tensor: torch.Tensor) -> object:
    if tensor.is_meta or not tensor.numel():
        return name
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
