"""Drop-ins: what takes the place of a layer of any model, with one rank's share of its parameters.

A drop-in is called as the layer was and keeps the names of its parameters. Where the model does not
expect a share, it talks to the other ranks itself. Which layers are swapped is `parallel.apply`;
the layers that our own decoder is made of are `parallel.layers`.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from parallel.collectives import Group, all_gather_parts, all_reduce
from parallel.errors import ConfigError
from parallel.slicing import Range, even_split


@dataclass(frozen=True)
class Blocks:
    """The part of a tensor that a rank holds: ranges of `dim`, one after the other."""

    dim: int
    ranges: tuple[Range, ...]

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A view of one range; a copy of several."""
        parts = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


@dataclass(frozen=True)
class Place:
    """Where a layer is swapped.

    Attributes:
        name: of the layer in its model.
        group: the ranks that divide it.
        made: local parameters of the model by the identity of the whole one and the blocks, so that
            layers that share a parameter go on sharing it where they hold the same blocks.
    """

    name: str
    group: Group
    made: dict[tuple[int, Blocks], nn.Parameter] = field(default_factory=dict)

    def split(self, total: int, unit: str) -> tuple[Range, ...]:
        """The ranges of all ranks; none is empty.

        Raises:
            ConfigError: more ranks than units.
        """
        if self.group.size > total:
            raise ConfigError(
                f"tensor_parallel_size={self.group.size} exceeds the {total} {unit} of "
                f"{self.name}; use 1 to {total}, or replicate it in parallel.tp_plan"
            )
        return even_split(total, self.group.size)

    def inner(self, name: str) -> "Place":
        """That of a layer within the layer."""
        return replace(self, name=f"{self.name}.{name}")

    def local(self, whole: torch.Tensor, blocks: Blocks) -> nn.Parameter:
        """This rank's blocks of a parameter."""
        key = (id(whole), blocks)
        if key not in self.made:
            part = blocks.of(whole.detach())
            self.made[key] = nn.Parameter(part, requires_grad=whole.requires_grad)
        return self.made[key]


class DropIn(nn.Module):
    """What all drop-ins have.

    Attributes:
        name: of the layer whose place it takes.
        group: the ranks that hold the other shares.
        blocks: which part of the layer's parameter each of its own is; those it holds whole are not
            listed.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.name = place.name
        self.group = place.group
        self.blocks: dict[str, Blocks] = {}

    def _hold(self, name: str, whole: torch.Tensor | None, blocks: Blocks, place: Place) -> None:
        """Register this rank's part of a parameter of the layer, if the layer has it."""
        self.register_parameter(name, None if whole is None else place.local(whole, blocks))
        if whole is not None:
            self.blocks[name] = blocks


class ColwiseLinear(DropIn):
    """An nn.Linear with its output features split.

    Shapes: x (..., in_features) -> (..., local_out_features), or with `gather` (..., out_features)
    on every rank.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, whole: nn.Linear, place: Place, *, gather: bool) -> None:
        super().__init__(place)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.gather = gather
        ranges = place.split(whole.out_features, "output features")
        self.extents = [stop - start for start, stop in ranges]
        rows = Blocks(0, (ranges[place.group.rank],))
        self._hold("weight", whole.weight, rows, place)
        self._hold("bias", whole.bias, rows, place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        local = F.linear(x, self.weight, self.bias)
        return all_gather_parts(local, self.extents, self.group) if self.gather else local


class RowwiseLinear(DropIn):
    """An nn.Linear with its input features split; the bias is whole, and added after the reduce.

    Shapes: x (..., local_in_features), or with `split_input` (..., in_features) ->
    (..., out_features) on every rank.

    Args:
        columns: this rank's input features; None: an even share.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, whole: nn.Linear, place: Place, *, split_input: bool, columns: Range | None = None
    ) -> None:
        super().__init__(place)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.split_input = split_input
        ranges = place.split(whole.in_features, "input features")
        self.columns = columns or ranges[place.group.rank]
        self._hold("weight", whole.weight, Blocks(1, (self.columns,)), place)
        self.bias = whole.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start, stop = self.columns
        self._check(x.shape[-1])
        if self.split_input:
            x = x.narrow(-1, start, stop - start)
        summed = all_reduce(F.linear(x, self.weight), self.group)
        return summed if self.bias is None else summed + self.bias

    def _check(self, num_features: int) -> None:
        start, stop = self.columns
        expected = self.in_features if self.split_input else stop - start
        if num_features == expected:
            return
        other = "rowwise" if self.split_input else "rowwise_split_input"
        source = "colwise_gather_output" if self.split_input else "colwise"
        raise ConfigError(
            f"parallel.tp_plan: {self.name} reads {expected} of {self.in_features} features on "
            f"rank {self.group.rank} of its group, but was given {num_features}; make what feeds "
            f"it {source}, or make it {other}"
        )


class RowwiseEmbedding(DropIn):
    """An nn.Embedding with its rows split: ranks that do not hold an id add zeros for it.

    Shapes: ids (...) int -> (..., embedding_dim) on every rank.
    """

    weight: nn.Parameter

    def __init__(self, whole: nn.Embedding, place: Place) -> None:
        super().__init__(place)
        _refuse_max_norm(whole, place)
        self.num_embeddings, self.embedding_dim = whole.num_embeddings, whole.embedding_dim
        self.rows = place.split(whole.num_embeddings, "rows")[place.group.rank]
        self._hold("weight", whole.weight, Blocks(0, (self.rows,)), place)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        start, stop = self.rows
        # The first and the last rank also take ids that are out of range, so that looking one up
        # fails there as it does in the whole embedding.
        held = torch.ones_like(ids, dtype=torch.bool) if start == 0 else ids >= start
        if stop < self.num_embeddings:
            held = held & (ids < stop)
        found = F.embedding(torch.where(held, ids - start, 0), self.weight)
        return all_reduce(found.masked_fill(~held.unsqueeze(-1), 0), self.group)


class ColwiseEmbedding(DropIn):
    """An nn.Embedding with its columns split.

    Shapes: ids (...) int -> (..., embedding_dim) on every rank.
    """

    weight: nn.Parameter

    def __init__(self, whole: nn.Embedding, place: Place) -> None:
        super().__init__(place)
        _refuse_max_norm(whole, place)
        self.num_embeddings, self.embedding_dim = whole.num_embeddings, whole.embedding_dim
        ranges = place.split(whole.embedding_dim, "columns")
        self.extents = [stop - start for start, stop in ranges]
        self._hold("weight", whole.weight, Blocks(1, (ranges[place.group.rank],)), place)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return all_gather_parts(F.embedding(ids, self.weight), self.extents, self.group)


def _refuse_max_norm(whole: nn.Embedding, place: Place) -> None:
    if whole.max_norm is not None:
        raise ConfigError(
            f"parallel.tp_plan: {place.name} has max_norm, which rewrites its rows while it runs; "
            "such an embedding is not split, replicate it"
        )
