"""The plan of a language model as a drawing; see `plan_picture`."""

from parallel.decoder_plan import DecoderPlan, DecoderRankPlan, DecoderStagePlan
from runner.drawing.plan_picture import Picture, draw_picture, facts_of
from runner.drawing.plan_words import condense, span


def draw(plan: DecoderPlan) -> str:
    """The SVG document."""
    length = plan.max_model_len
    picture = Picture(
        plan,
        facts=facts_of(plan, f"max_model_len {length}"),
        parts=(
            ("weights", "weights"),
            ("activations", "activations"),
            ("KV cache", f"KV cache of one sequence of {length} tokens"),
        ),
        sizes=tuple(_sizes(plan, rank) for rank in plan.ranks),
        shares=tuple(_share(plan, rank) for rank in plan.ranks),
        modules=tuple(tuple(condense(stage.modules)) for stage in plan.stages),
        carries=tuple(_carry_lines(stage) for stage in plan.stages[:-1]),
    )
    return draw_picture(picture)


def _sizes(plan: DecoderPlan, rank: DecoderRankPlan) -> tuple[int, int, int]:
    """Bytes of weights, activations and the KV cache of one sequence of the plan's length."""
    kv_bytes = rank.kv_bytes_per_token * plan.max_model_len
    return rank.weight_bytes, rank.activation_bytes, kv_bytes


def _share(plan: DecoderPlan, rank: DecoderRankPlan) -> str:
    """What is cut for this rank: heads and MLP columns, or else its rows of the vocabulary."""
    first, stop = plan.stages[rank.stage].layers
    if first == stop:
        return f"vocabulary {span(rank.vocab)}"
    heads = f"heads {span(rank.heads.query)}, KV {span(rank.heads.kv)}"
    return f"{heads}, MLP {span(rank.mlp)}"


def _carry_lines(stage: DecoderStagePlan) -> tuple[str, ...]:
    return tuple(
        line
        for carry in stage.carries
        for line in (
            carry.name,
            f"({', '.join(map(str, carry.shape))})",
            f"{carry.num_bytes:,} B a token",
        )
    )
