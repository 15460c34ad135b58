"""Layers that hold one rank's share of their weights, as plain local tensors.

Each takes local sizes. Matrices compute without a word to other ranks, so that what lies between
two collectives can be compiled; the sums and the logits are completed by whoever calls them. Which
share a rank holds is decided by `parallel.planner`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from parallel.collectives import Group, all_gather, all_reduce
from parallel.slicing import HeadShare, Range


class ColumnParallelLinear(nn.Module):
    """A linear layer with its output features split: no communication, a local slice of the output.

    Shapes: x (num_tokens, in_features) -> (num_tokens, local_out_features).
    """

    def __init__(self, in_features: int, local_out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(local_out_features, in_features))
        self.bias = nn.Parameter(torch.empty(local_out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel layers of one input as one matrix, such as gate and up.

    Shapes: x (num_tokens, in_features) -> one (num_tokens, size) for every local size.
    """

    def __init__(self, in_features: int, local_sizes: tuple[int, ...], *, bias: bool) -> None:
        super().__init__(in_features, sum(local_sizes), bias=bias)
        self.local_sizes = local_sizes

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return torch.split(super().forward(x), list(self.local_sizes), dim=-1)


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections of this rank's heads as one matrix.

    Shapes: x (num_tokens, in_features) -> q (num_tokens, num_query, head_dim), k and v
    (num_tokens, num_kv, head_dim).
    """

    def __init__(self, in_features: int, heads: HeadShare, head_dim: int, *, bias: bool) -> None:
        kv_size = heads.num_kv * head_dim
        super().__init__(in_features, (heads.num_query * head_dim, kv_size, kv_size), bias=bias)
        self.head_counts = (heads.num_query, heads.num_kv, heads.num_kv)
        self.head_dim = head_dim

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        parts = zip(super().forward(x), self.head_counts, strict=True)
        return tuple(part.view(len(x), count, self.head_dim) for part, count in parts)


class RowParallelLinear(nn.Module):
    """A linear layer with its input features split: every rank makes a partial sum.

    The caller adds them up over the group (`collectives.all_reduce`), and adds a bias after that.

    Shapes: x (num_tokens, local_in_features) -> (num_tokens, out_features).
    """

    def __init__(self, local_in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, local_in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class VocabParallelEmbedding(nn.Module):
    """An embedding with its rows split: ranks that do not hold a token add zeros for it.

    Shapes: token_ids (num_tokens,) int64 -> (num_tokens, hidden_size), equal on all ranks of the
    group.

    Args:
        padded_rows: rows held by every rank of the group; those beyond `rows` are zero.
        rows: this rank's range of the vocabulary.
    """

    def __init__(self, padded_rows: int, hidden_size: int, *, rows: Range, group: Group) -> None:
        super().__init__()
        self.rows = rows
        self.group = group
        self.weight = nn.Parameter(torch.empty(padded_rows, hidden_size))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1:
            return F.embedding(token_ids, self.weight)
        start, stop = self.rows
        held = (token_ids >= start) & (token_ids < stop)
        local_ids = torch.where(held, token_ids - start, 0)
        return all_reduce(F.embedding(local_ids, self.weight) * held.unsqueeze(-1), self.group)


class ParallelLMHead(nn.Module):
    """The output head with its vocabulary split: each rank makes its own columns.

    Shapes: x (num_rows, hidden_size) -> (num_rows, padded_rows).
    """

    def __init__(
        self, padded_rows: int, hidden_size: int, *, vocab_size: int, group: Group
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.group = group
        self.weight = nn.Parameter(torch.empty(padded_rows, hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    def gather(self, columns: torch.Tensor) -> torch.Tensor:
        """This rank's columns -> (num_rows, vocab_size), on every rank of the group."""
        return all_gather(columns, self.group)[:, : self.vocab_size]
