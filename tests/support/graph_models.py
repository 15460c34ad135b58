"""Small models of many kinds to cut into stages, and a runner of the stages."""

import random
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from parallel.graph import Collective, Graph, Piece, Stage, Value

_c10d = torch.ops._c10d_functional


class UNet(nn.Module):
    """Three levels down, three up, each joined to its opposite by a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_block(2, 4), _block(4, 8), _block(8, 16)])
        self.pool = nn.MaxPool2d(2)
        self.middle = _block(16, 16)
        self.grow = nn.Upsample(scale_factor=2)
        self.up = nn.ModuleList([_block(32, 8), _block(16, 4), _block(8, 4)])
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x, skips = image, []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.middle(x)
        for block in self.up:
            x = block(torch.cat([self.grow(x), skips.pop()], 1))
        return self.head(x)


def _block(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.layers = nn.Sequential(*(Residual(4) for _ in range(num_blocks)))
        self.dropout = nn.Dropout()
        self.fc = nn.Linear(4, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(image))
        return self.fc(self.dropout(self.layers(x).mean((2, 3))))


class RandomDag(nn.Module):
    """A random program over (rows, 6) tensors of two inputs, with views, parts and writes in place.

    It shares modules and parameters, and returns values made early and late, some twice, and
    sometimes an input, in nested containers.
    """

    OPERATIONS = (
        "linear", "tied", "add", "cat", "split", "chunk", "topk", "max", "write", "turn", "buffer",
        "constant", "arange", "norm",
    )  # fmt: skip

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        pick = random.Random(seed)
        self.linears = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.linears[0].weight
        self.wide = nn.Linear(12, 6)
        self.norm = nn.LayerNorm(6)
        self.register_buffer("shift", torch.randn(6))
        self.program = [
            (pick.choice(self.OPERATIONS), pick.random(), pick.random())
            for _ in range(pick.randint(4, 14))
        ]
        self.returned = [pick.random() for _ in range(pick.randint(1, 4))]

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, object]:
        pool = [x, y]
        for operation, first, second in self.program:
            a, b = pool[int(first * len(pool))], pool[int(second * len(pool))]
            pool += self._compute(operation, a, b, int(first * 99))
        returned = [pool[int(place * len(pool))] for place in self.returned]
        return {"last": pool[-1], "others": (*returned, [returned[0]])}

    def _compute(
        self, operation: str, a: torch.Tensor, b: torch.Tensor, number: int
    ) -> list[torch.Tensor]:
        match operation:
            case "linear":
                return [self.linears[number % 3](a)]
            case "tied":
                return [self.tied(a)]
            case "add":
                return [a + b]
            case "cat":
                return [self.wide(torch.cat([a, b], -1))]
            case "split":
                left, right = torch.split(a, [2, 4], -1)
                return [torch.cat([right, left], -1)]
            case "chunk":
                return [torch.cat([part * k for k, part in enumerate(a.chunk(3, -1))], -1)]
            case "topk":
                values, places = a.topk(6, -1)
                return [values, places.to(a.dtype)]
            case "max":
                values, places = a.max(-1, keepdim=True)
                return [b * values + places]
            case "write":
                changed = self.linears[0](a)
                changed[:, 1:3].mul_(b[:, 1:3])
                changed += 1
                return [changed]
            case "turn":
                return [(a.t() * 2).t(), a.view(-1).view(a.shape)]
            case "buffer":
                return [a * self.shift]
            case "constant":
                return [a * torch.tensor([1.0, 2, 3, 4, 5, number], dtype=a.dtype)]
            case "arange":
                return [a + torch.arange(6, device=a.device)]
        return [self.norm(a)]


class ParallelMlp(nn.Module):
    """One rank's share of two MLPs, whose outputs are summed up, and of a head, gathered."""

    def __init__(self, whole: "Mlp", rank: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"up": _rows(block["up"], rank, size), "down": _columns(block["down"], rank, size)}
            )
            for block in whole.blocks
        )
        self.head = _rows(whole.head, rank, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            partial = block["down"](torch.relu(block["up"](x)))
            x = x + _c10d.wait_tensor(_c10d.all_reduce(partial, "sum", "no such group"))
        columns = self.head(x)
        stacked = _c10d.wait_tensor(
            _c10d.all_gather_into_tensor(columns, self.size, "no such group")
        )
        return torch.cat(stacked.chunk(self.size), -1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8, bias=False)})
            for _ in range(2)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.head(x)


def _rows(linear: nn.Linear, rank: int, size: int) -> nn.Linear:
    part = nn.Linear(linear.in_features, linear.out_features // size)
    part.weight = nn.Parameter(linear.weight.chunk(size)[rank])
    part.bias = nn.Parameter(linear.bias.chunk(size)[rank])
    return part


def _columns(linear: nn.Linear, rank: int, size: int) -> nn.Linear:
    part = nn.Linear(linear.in_features // size, linear.out_features, bias=False)
    part.weight = nn.Parameter(linear.weight.chunk(size, 1)[rank])
    return part


def trace(module: nn.Module, *inputs: torch.Tensor, atomic: Sequence[str] = ()) -> Graph:
    """The graph of a module at the shapes of these inputs, named x0, x1 and so on."""
    values = [Value.of(f"x{index}", tensor) for index, tensor in enumerate(inputs)]
    return Graph.trace(module, values, atomic=atomic)


def run_stages(
    graph: Graph, stages: Sequence[Stage], *inputs: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The outputs of a graph without collectives."""
    return run_ranks(graph, [stages], *inputs)[0]


def run_ranks(
    graph: Graph, ranks: Sequence[Sequence[Stage]], *inputs: torch.Tensor
) -> list[tuple[torch.Tensor, ...]]:
    """The outputs on each rank of one tensor-parallel group that runs all stages.

    Only what a stage sends is there for the next one.
    """
    given = {value.name: tensor.clone() for value, tensor in zip(graph.inputs, inputs, strict=True)}
    held: list[Mapping[str, torch.Tensor]] = [given] * len(ranks)
    for stages in zip(*ranks, strict=True):
        held = _run_stage(stages, held)
    return [tuple(sent[value.name] for value in graph.outputs) for sent in held]


@torch.no_grad()
def _run_stage(
    stages: Sequence[Stage], held: Sequence[Mapping[str, torch.Tensor]]
) -> list[Mapping[str, torch.Tensor]]:
    values = [dict(received) for received in held]
    for stage, received in zip(stages, held, strict=True):
        assert [value.name for value in stage.receives] == list(received)
    for steps in zip(*(stage.steps for stage in stages), strict=True):
        if isinstance(steps[0], Collective):
            _exchange(steps[0], values)
            continue
        for step, known in zip(steps, values, strict=True):
            assert isinstance(step, Piece)
            known.update(_run_piece(step, known))
    pairs = zip(stages, values, strict=True)
    return [{value.name: known[value.name] for value in stage.sends} for stage, known in pairs]


def _run_piece(piece: Piece, known: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    results = piece.module(*(known[value.name] for value in piece.inputs))
    for value, tensor in zip(piece.outputs, results, strict=True):
        assert Value.of(value.name, tensor) == value
        assert tensor.is_contiguous()
    return {value.name: tensor for value, tensor in zip(piece.outputs, results, strict=True)}


def _exchange(collective: Collective, values: Sequence[dict[str, torch.Tensor]]) -> None:
    given = [known[collective.input.name] for known in values]
    result = torch.cat(given) if collective.kind == "all_gather" else torch.stack(given).sum(0)
    for known in values:
        known[collective.output.name] = result
