"""What the tests of `parallel` run on the ranks of a `RankPool`.

A job on a layer gets the unsharded parameters, takes this rank's share of them and computes; the
test compares with the unsharded module.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from parallel.checkpoint import SINGLE_FILE
from parallel.collectives import all_gather, all_reduce, broadcast, broadcast_bytes, minimum
from parallel.context import ParallelContext
from parallel.decoder_plan import DecoderPlan, DecoderStagePlan
from parallel.layers import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from parallel.plan import Carry
from parallel.planner import Limits, make_plan
from parallel.slicing import even_split, padded_split, split_heads
from parallel.transfer import CarryTransfer
from parallel.weights import stream
from runner.models.spec import ModelSpec

Tensors = dict[str, torch.Tensor]


def fill(layer: nn.Module, **parameters: torch.Tensor | None) -> None:
    """Set every parameter of a layer; the shapes must be those it was made with."""
    given = {name: value for name, value in parameters.items() if value is not None}
    layer.load_state_dict(given)


def run(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = layer(x)
    return output


def rows_of(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    start, stop = even_split(len(x), context.tp.size)[context.tp.rank]
    return x[start:stop]


def columns_of(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    return rows_of(x.t(), context).t()


def column_parallel(context: ParallelContext, full: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """This rank's columns of the output."""
    weight = rows_of(full.weight, context)
    bias = None if full.bias is None else rows_of(full.bias, context)
    layer = ColumnParallelLinear(full.in_features, len(weight), bias=bias is not None)
    fill(layer, weight=weight, bias=bias)
    return run(layer, x)


def row_parallel_layer(context: ParallelContext, full: nn.Linear) -> RowParallelLinear:
    weight = columns_of(full.weight, context)
    layer = RowParallelLinear(weight.shape[1], full.out_features)
    fill(layer, weight=weight)
    return layer


def row_parallel(context: ParallelContext, full: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' parts, then the bias, which every rank holds whole."""
    summed = all_reduce(run(row_parallel_layer(context, full), columns_of(x, context)), context.tp)
    return summed if full.bias is None else summed + full.bias.detach()


class ReducedLinear(nn.Module):
    """A row-parallel layer and its reduce."""

    def __init__(self, context: ParallelContext, full: nn.Linear) -> None:
        super().__init__()
        self.layer = row_parallel_layer(context, full)
        self.group = context.tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return all_reduce(self.layer(x), self.group)


def row_parallel_ops(context: ParallelContext, full: nn.Linear, x: torch.Tensor) -> list[str]:
    """The operations that `torch.export` sees in a row-parallel layer and its reduce."""
    layer = ReducedLinear(context, full)
    graph = torch.export.export(layer, (columns_of(x, context).contiguous(),)).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def gated_mlp(
    context: ParallelContext, gate: nn.Linear, up: nn.Linear, down: nn.Linear, x: torch.Tensor
) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) with gate and up merged."""
    size = len(rows_of(up.weight, context))
    merged = MergedColumnParallelLinear(up.in_features, (size, size), bias=True)
    fill(
        merged,
        weight=torch.cat([rows_of(layer.weight, context) for layer in (gate, up)]),
        bias=torch.cat([rows_of(layer.bias, context) for layer in (gate, up)]),
    )
    gated, plain = run(merged, x)
    partial = run(row_parallel_layer(context, down), nn.functional.silu(gated) * plain)
    return all_reduce(partial, context.tp) + down.bias.detach()


def qkv(
    context: ParallelContext, projections: list[nn.Linear], num_kv_heads: int, x: torch.Tensor
) -> list[torch.Tensor]:
    """This rank's q, k and v: (num_tokens, heads, 2)."""
    head_dim = 2
    num_heads = projections[0].out_features // head_dim
    heads = split_heads(num_heads, num_kv_heads, context.tp.size)[context.tp.rank]
    layer = QKVParallelLinear(projections[0].in_features, heads, head_dim, bias=True)
    rows = [slice(a * head_dim, b * head_dim) for a, b in (heads.query, heads.kv, heads.kv)]
    blocks = list(zip(projections, rows, strict=True))
    fill(
        layer,
        weight=torch.cat([full.weight[block] for full, block in blocks]),
        bias=torch.cat([full.bias[block] for full, block in blocks]),
    )
    return list(run(layer, x))


def vocabulary_rows(context: ParallelContext, weight: torch.Tensor) -> torch.Tensor:
    """This rank's rows, zeros below them up to the padded size."""
    ranges, padded = padded_split(len(weight), context.tp.size)
    start, stop = ranges[context.tp.rank]
    return nn.functional.pad(weight[start:stop], (0, 0, 0, padded - (stop - start)))


def embedding(
    context: ParallelContext, weight: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    local = vocabulary_rows(context, weight)
    rows = padded_split(len(weight), context.tp.size)[0][context.tp.rank]
    layer = VocabParallelEmbedding(len(local), weight.shape[1], rows=rows, group=context.tp)
    fill(layer, weight=local)
    return run(layer, token_ids)


def lm_head(context: ParallelContext, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    local = vocabulary_rows(context, weight)
    layer = ParallelLMHead(len(local), weight.shape[1], vocab_size=len(weight), group=context.tp)
    fill(layer, weight=local)
    return layer.gather(run(layer, x))


def collectives(context: ParallelContext) -> dict[str, object]:
    """What each collective makes of numbers that tell the ranks of the group apart."""
    tp, rank = context.tp, context.tp.rank
    mine = torch.tensor([[10.0 * rank, 10.0 * rank + 1], [10.0 * rank + 2, 10.0 * rank + 3]])
    last = tp.ranks[-1]
    message = f"from {last}".encode() if context.rank == last else None
    return {
        "all_reduce": all_reduce(mine, tp).tolist(),
        "all_gather": all_gather(mine, tp).tolist(),
        "all_gather of no rows": list(all_gather(mine[:0], tp).shape),
        "argument": mine.tolist(),
        "broadcast": broadcast(mine.clone(), last, tp).tolist(),
        "broadcast_bytes": broadcast_bytes(message, last, tp),
        "broadcast_bytes of nothing": broadcast_bytes(message and b"", last, tp),
        "minimum": minimum(7 - rank, tp),
    }


def places(context: ParallelContext) -> dict[str, object]:
    """Where a rank finds itself, and which ranks its two groups really reach."""
    one_hot = torch.zeros(1, context.topology.world_size)
    one_hot[0, context.rank] = 1
    return {
        "stage": context.coordinate.stage,
        "tp_rank": context.coordinate.tp_rank,
        "first": context.is_first_stage,
        "last": context.is_last_stage,
        "tp": (context.tp.ranks, context.tp.rank),
        "world": (context.world.ranks, context.world.rank),
        "tp reaches": all_reduce(one_hot, context.tp).nonzero()[:, 1].tolist(),
        "world reaches": all_reduce(one_hot, context.world).nonzero()[:, 1].tolist(),
    }


def carry_plan(context: ParallelContext, max_tokens: int) -> DecoderPlan:
    """As much of a plan as a transfer reads: two carries of different dtypes at each boundary."""
    carries = (
        Carry("hidden_states", "float32", ("num_tokens", 3)),
        Carry("skip", "bfloat16", ("num_tokens", 2, 2)),
    )
    topology = context.topology
    stages = tuple(
        DecoderStagePlan(
            (), carries if i < topology.last_stage else (), (0, 0), False, False, False, 0, 0
        )
        for i in range(topology.num_stages)
    )
    return DecoderPlan(
        "decoder", "", "float32", topology.tp_sizes, topology.devices, stages, (), 0, max_tokens
    )


def carries_of(stage: int, step: int, num_tokens: int) -> list[torch.Tensor]:
    """What a stage sends in a step: equal on its ranks, different from every other stage and step.

    The second carry is not contiguous.
    """
    first = 1000.0 * stage + 100 * step
    hidden = first + torch.arange(num_tokens * 3).view(num_tokens, 3)
    skip = (first + torch.arange(num_tokens * 4)).bfloat16().view(num_tokens, 2, 2)
    return [hidden, skip.transpose(1, 2)]


def relay(
    context: ParallelContext, tokens_of_steps: list[int], max_tokens: int
) -> list[tuple[list[torch.Tensor], list[int]]]:
    """Send a stage's carries on in each step; what was received, and the addresses it lay at."""
    transfer = CarryTransfer(context, carry_plan(context, max_tokens))
    received = []
    for step, num_tokens in enumerate(tokens_of_steps):
        if not context.is_first_stage:
            views = transfer.receive(num_tokens)
            received.append(([v.clone() for v in views], [v.data_ptr() for v in views]))
        if not context.is_last_stage:
            transfer.send(carries_of(context.coordinate.stage, step, num_tokens))
    transfer.drain()
    return received


def load_memory(context: ParallelContext, model: str, whole: bool) -> tuple[int, int]:
    """Bytes of this rank's weights, and the most by which private memory grew while they loaded.

    Args:
        whole: read all tensors whole first, as a loader must not.
    """
    spec = ModelSpec.open(Path(model))
    plan = make_plan(
        spec.layout,
        spec.checkpoint,
        context.topology,
        architecture=spec.config.architecture,
        dtype="float32",
        limits=Limits(max_model_len=8, max_num_seqs=1, max_num_batched_tokens=8),
    ).ranks[context.rank]
    with peak_memory() as peak:
        kept: Tensors = {}
        if whole:
            with safe_open(Path(model) / SINGLE_FILE, framework="pt") as file:
                kept = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        loaded = stream(spec.checkpoint, plan, dtype=torch.float32, device=context.device)
        kept |= {f"local {name}": tensor for name, tensor in loaded}
    return plan.weight_bytes, peak[0]


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most private memory above that at the start, in bytes; known when the block is left."""
    peak = [0]
    ctypes.CDLL(None).malloc_trim(0)  # what earlier jobs freed must not serve this one
    start = private_bytes()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], private_bytes() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield peak
    peak[0] = max(peak[0], private_bytes() - start)
    done.set()
    watcher.join()


def private_bytes() -> int:
    """Memory of this process that no file backs: a mapped checkpoint does not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (resident,) = [line for line in lines if line.startswith("RssAnon:")]
    return int(resident.split()[1]) * 1024
