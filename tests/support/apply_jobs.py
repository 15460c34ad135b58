"""Models that `parallel.apply` divides in the tests, and what compares them on ranks of a pool."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from rank_pool import RankPool
from torch import nn

from parallel.apply import apply
from parallel.collectives import Group
from parallel.context import ParallelContext

Call = tuple[nn.Module, dict[str, str], tuple[Any, ...], dict[str, Any]]
"""A module, the plan that divides it, and the arguments of a call."""


def divided(
    context: ParallelContext, module: nn.Module, plan: Mapping[str, str], *args: Any, **kwargs: Any
) -> Any:
    """What this rank's twin of a module makes of its inputs."""
    twin = apply(module, plan, context.tp).module
    with torch.no_grad():
        return twin(*args, **kwargs)


def divided_calls(context: ParallelContext, calls: list[Call]) -> list[Any]:
    """`divided` for several calls."""
    return [divided(context, module, plan, *args, **kwargs) for module, plan, args, kwargs in calls]


def call(module: nn.Module, plan: dict[str, str], *args: Any, **kwargs: Any) -> Call:
    """Of a module in inference mode, in which the twins are, too."""
    return module.eval(), plan, args, kwargs


def assert_divides(pool: RankPool, tp_sizes: list[int], *calls: Call) -> None:
    """Every rank's twin returns what the module returns; ranks of a group agree to the bit."""
    results = pool.run(divided_calls, tp_sizes, list(calls))
    ends = [sum(tp_sizes[: i + 1]) for i in range(len(tp_sizes))]
    for start, stop in pairwise([0, *ends]):
        for i, (module, _, args, kwargs) in enumerate(calls):
            with torch.no_grad():
                expected = module(*args, **kwargs)
            for rank in range(start, stop):
                torch.testing.assert_close(results[rank][i], expected)
                torch.testing.assert_close(results[rank][i], results[start][i], rtol=0, atol=0)


def groups(size: int) -> list[Group]:
    """Every rank's view of a group that is not running."""
    return [Group(tuple(range(size)), rank) for rank in range(size)]


class Mlp(nn.Module):
    """Two matrices with a GELU between them."""

    def __init__(self, size: int, hidden_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(size, hidden_size, bias=bias)
        self.down = nn.Linear(hidden_size, size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down(nn.functional.gelu(self.up(x)))
        return output


MLP_PLAN = {"up": "colwise", "down": "rowwise"}


class Repeated(nn.Module):
    """One MLP under two names, in a list that is no nn.ModuleList, and called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Mlp(6, 7)
        self.second = self.first
        self.turns = [self.first, self.second, self.first]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for turn in self.turns:
            x = x + turn(x)
        return x


REPEATED_PLAN = {"first.up": "colwise", "first.down": "rowwise"}


class VisionBlock(nn.Module):
    """Attention as nn.MultiheadAttention has it, before an MLP."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = nn.MultiheadAttention(size, num_heads, batch_first=True)
        self.mlp = Mlp(size, 2 * size + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        output: torch.Tensor = x + self.mlp(self.norm2(x))
        return output


class Vision(nn.Module):
    """A small vision transformer. Shapes: (batch, 3, 8, 8) -> (batch, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 10, kernel_size=4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 10))
        self.positions = nn.Parameter(torch.randn(1, 5, 10))
        self.blocks = nn.ModuleList(VisionBlock(10, 5) for _ in range(2))
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 7)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x)[:, 0])
        return logits


VISION_PLAN = {
    "blocks.{0..1}.attention": "heads",
    "blocks.*.mlp.up": "colwise",
    "blocks.*.mlp.down": "rowwise",
    "head": "colwise_gather_output",
    "patches": "replicate",
}


class TextLayer(nn.Module):
    """Attention by four matrices, whose number of heads follows from their width."""

    def __init__(self, size: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query, self.key, self.value, self.output = (nn.Linear(size, size) for _ in range(4))
        self.mlp = Mlp(size, size + 3)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (self._by_head(layer(x)) for layer in (self.query, self.key, self.value))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        x = self.norm1(x + self.output(attended.transpose(1, 2).flatten(2)))
        output: torch.Tensor = self.norm2(x + self.mlp(x))
        return output

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Text(nn.Module):
    """A small BERT: its head shares the embedding. Shapes: ids and mask (batch, length) ->
    (batch, length, 13).
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        size = 2 * num_heads
        self.words = nn.Embedding(13, size, padding_idx=0)
        self.positions = nn.Embedding(9, size)
        self.register_buffer("position_ids", torch.arange(9), persistent=False)
        self.layers = nn.ModuleList(TextLayer(size, 2) for _ in range(2))
        self.head = nn.Linear(size, 13)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.positions(self.position_ids[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, mask)
        logits: torch.Tensor = self.head(x)
        return logits


TEXT_PLAN = {
    "words": "embedding_rowwise",
    "positions": "embedding_colwise",
    "layers.*.query": "colwise",
    "layers.*.key": "colwise",
    "layers.*.value": "colwise",
    "layers.*.output": "rowwise",
    "layers.*.mlp.up": "colwise",
    "layers.*.mlp.down": "rowwise",
    "head": "colwise_gather_output",
}
"""Features are split as they come, so heads of two features need as many heads as divide evenly."""

ENCODER_PLAN = {
    "layers.*.self_attn": "heads",
    "layers.*.linear1": "colwise",
    "layers.*.linear2": "rowwise",
}


def encoder(num_heads: int, *, batch_first: bool = True) -> nn.TransformerEncoder:
    """Of the kind that torch would run on its fast path: in inference mode, batch first."""
    layer = nn.TransformerEncoderLayer(
        2 * num_heads, num_heads, dim_feedforward=11, batch_first=batch_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()
