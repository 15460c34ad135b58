"""A plan, or one rank of it in full, as text for a terminal. Whether it fits is `fit_text`."""

import sys
from itertools import pairwise

from parallel.decoder_plan import DecoderPlan, DecoderRankPlan, DecoderStagePlan
from parallel.errors import ConfigError
from parallel.fit import format_bytes
from parallel.graph_plan import GraphPlan
from parallel.plan import LocalTensor, ShardPlan
from runner.cli.table import table
from runner.drawing.plan_words import condense, headline, span
from runner.drawing.words import plural

_RANK_COLUMNS = (
    "rank>",
    "stage>",
    "tp rank>",
    "device>",
    "modules",
    "query heads",
    "KV heads",
    "MLP columns",
    "vocabulary rows",
    "weights>",
    "KV a token>",
    "activations>",
)
_TENSOR_COLUMNS = ("tensor", "local shape", "source", "dim>", "slice")


def describe_plan(plan: DecoderPlan) -> str:
    """Who holds what, what crosses between the stages, and what a sequence costs."""
    lines = [headline(plan), "", *table(_RANK_COLUMNS, [_rank_row(plan, r) for r in plan.ranks])]
    lines += _replicated_heads(plan)
    if len(plan.stages) > 1:
        lines += ["", *_carries(plan), "", _bubble(plan)]
    return "\n".join([*lines, "", _kv_line(plan)])


def describe_rank(plan: ShardPlan, rank: int) -> str:
    """Every parameter of a rank, and the slices of the checkpoint that it is made of.

    Raises:
        ConfigError: there is no such rank.
    """
    if not 0 <= rank < len(plan.ranks):
        raise ConfigError(
            f"--rank={rank}: the plan has {plural(len(plan.ranks), 'rank')}, numbered from 0"
        )
    here = plan.ranks[rank]
    title = (
        f"{plan.topology.describe(rank)}, device {here.device}: {len(here.tensors)} tensors, "
        f"{format_bytes(here.weight_bytes)}"
    )
    in_order = isinstance(plan, GraphPlan)
    tensors = here.tensors if in_order else sorted(here.tensors, key=_position)
    rows = [row for tensor in tensors for row in _tensor_rows(tensor)]
    lines = [headline(plan), "", title]
    if in_order:
        lines.append(f"runs {', '.join(condense(plan.stages[here.stage].modules))}")
    return "\n".join([*lines, "", *table(_TENSOR_COLUMNS, rows)])


def _has_layers(stage: DecoderStagePlan) -> bool:
    return stage.layers[0] < stage.layers[1]


def _rank_row(plan: DecoderPlan, rank: DecoderRankPlan) -> list[str]:
    stage = plan.stages[rank.stage]
    has_layers, has_vocab = _has_layers(stage), stage.has_embedding or stage.has_head
    mark = "*" if has_layers and _shares_kv_heads(plan, rank) else ""
    return [
        str(rank.rank),
        str(rank.stage),
        str(rank.tp_rank),
        str(rank.device),
        ", ".join(condense(stage.modules)),
        span(rank.heads.query, present=has_layers),
        span(rank.heads.kv, present=has_layers) + mark,
        span(rank.mlp, present=has_layers),
        span(rank.vocab, present=has_vocab),
        format_bytes(rank.weight_bytes),
        f"{rank.kv_bytes_per_token:,} B",
        format_bytes(rank.activation_bytes),
    ]


def _shares_kv_heads(plan: DecoderPlan, rank: DecoderRankPlan) -> bool:
    """Whether another rank of its stage holds one of its KV heads too."""
    start, stop = rank.heads.kv
    peers = [r.heads.kv for r in plan.ranks if r.stage == rank.stage and r.rank != rank.rank]
    return any(start < peer_stop and peer_start < stop for peer_start, peer_stop in peers)


def _replicated_heads(plan: DecoderPlan) -> list[str]:
    """A footnote for each stage that holds a KV head more than once."""
    notes = []
    for index, stage in enumerate(plan.stages):
        ranks = [rank for rank in plan.ranks if rank.stage == index]
        num_heads, copies = ranks[-1].heads.kv[1], sum(rank.heads.num_kv for rank in ranks)
        if _has_layers(stage) and copies > num_heads:
            notes.append(
                f"* Stage {index} has more ranks than KV heads: its {len(ranks)} ranks hold "
                f"{copies} copies of {plural(num_heads, 'KV head')}."
            )
    return ["", *notes] if notes else []


def _carries(plan: DecoderPlan) -> list[str]:
    lines = ["Between the stages:"]
    for index, (stage, _) in enumerate(pairwise(plan.stages)):
        receivers = plan.topology.ranks(index + 1)
        routes = ", ".join(f"{plan.topology.carry_source(r)} -> {r}" for r in receivers)
        for carry in stage.carries:
            shape = ", ".join(map(str, carry.shape))
            lines.append(
                f"  stage {index} -> {index + 1}: {carry.name} ({shape}) {carry.dtype}, "
                f"{carry.num_bytes:,} B a token; ranks {routes}"
            )
    return lines


def _bubble(plan: DecoderPlan) -> str:
    return (
        f"Pipeline: a sequence alone passes the {len(plan.stages)} stages one after the other, so "
        f"each waits {plan.pipeline_bubble * 100:.0f} % of the time; several sequences run in as "
        "many groups, at once."
    )


def _kv_line(plan: DecoderPlan) -> str:
    fullest = max(plan.ranks, key=lambda rank: rank.kv_bytes_per_token)
    equal = {rank.kv_bytes_per_token for rank in plan.ranks} == {fullest.kv_bytes_per_token}
    where = "each rank" if equal else f"rank {fullest.rank}, which takes the most"
    size = format_bytes(fullest.kv_bytes_per_token * plan.max_model_len)
    return f"KV cache: one sequence of {plan.max_model_len} tokens takes {size} on {where}."


def _position(tensor: LocalTensor) -> int:
    """Sorts parameters into the order in which they run: embeddings, layers, norm and head."""
    module, _, rest = tensor.name.partition(".")
    if module == "layers":
        return int(rest.partition(".")[0])
    return -1 if module.startswith("embed_") else sys.maxsize


def _tensor_rows(tensor: LocalTensor) -> list[list[str]]:
    """A line a piece; the first one names the parameter."""
    stored = "  stored transposed" if tensor.transposed else ""
    pieces = [
        [p.source, "-", f"whole{stored}"]
        if p.dim is None
        else [p.source, str(p.dim), f"[{p.range[0]}:{p.range[1]}){stored}"]
        for p in tensor.pieces
    ]
    if all(piece.dim is not None for piece in tensor.pieces):
        held = sum(piece.range[1] - piece.range[0] for piece in tensor.pieces)
        padding = tensor.shape[tensor.dim] - held
        if padding:
            pieces.append(["(padding)", str(tensor.dim), f"{padding} of zeros"])
    shape = "(" + ", ".join(map(str, tensor.shape)) + ("," if len(tensor.shape) == 1 else "") + ")"
    names = [[tensor.name, shape], *([["", ""]] * (len(pieces) - 1))]
    return [[*name, *piece] for name, piece in zip(names, pieces, strict=True)]
