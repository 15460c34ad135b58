"""Whether a plan fits, and which sizes there are to choose from, as text for a terminal."""

from collections.abc import Sequence

from parallel.autoplan import H200, Candidate, ranked
from parallel.fit import Fit, RankFit, format_bytes
from runner.cli.table import table
from runner.drawing.words import plural

_FIT_COLUMNS = ("rank>", "needs>", "room for KV>", "KV tokens>", "sequences>", "verdict")
_CANDIDATE_COLUMNS = (
    "tp>",
    "pp>",
    "ranks>",
    "weights of the fullest rank>",
    "KV tokens>",
    "fits",
    "est. ms a token>",
)


def describe_fit(fit: Fit, origin: str) -> str:
    """The verdict on each rank.

    Args:
        origin: where the size of the memory comes from.
    """
    budget, length = fit.budget, fit.plan.max_model_len
    lines = [
        f"Memory of a GPU: {format_bytes(budget.memory_bytes)} ({origin}); "
        f"{format_bytes(budget.usable_bytes)} of it may be used "
        f"(kv_cache.gpu_memory_utilization {budget.utilization:g})",
        "",
        *table(_FIT_COLUMNS, [_fit_row(rank) for rank in fit.ranks]),
        "",
        f"A rank needs its weights, its activations and one sequence of {length} tokens. The CUDA "
        "context and NCCL's buffers come on top.",
    ]
    if fit.fits:
        lines.append(
            f"The rank that can keep the fewest tokens sets the KV cache of all: "
            f"{fit.kv_tokens:,} tokens, {plural(fit.num_sequences, 'sequence')} of {length}."
        )
    return "\n".join(lines)


def describe_candidates(candidates: Sequence[Candidate], chosen: Candidate, num_gpus: int) -> str:
    """All sizes that were tried, which one was chosen and why, and what to write for it."""
    mark = "<- chosen" if chosen.fit.fits else "<- closest"
    rows = [_candidate_row(c, mark if c is chosen else "") for c in ranked(candidates)]
    return "\n".join(
        [
            f"Sizes for up to {plural(num_gpus, 'GPU')}, fastest first:",
            "",
            *table((*_CANDIDATE_COLUMNS, ""), rows),
            "",
            f"The estimate is for one sequence on H200s: weights read at "
            f"{H200.bandwidth / 1e12:g} TB/s, {H200.all_reduce_s * 1e6:g} us for an all-reduce "
            f"(2 a layer where tp > 1; measured), {H200.transfer_s * 1e6:g} us for a transfer "
            f"between stages (taken to be like it). Attention is not in it.",
            "",
            _reason(candidates, chosen),
            *_yaml(chosen),
        ]
    )


def _fit_row(rank: RankFit) -> list[str]:
    return [
        str(rank.rank),
        format_bytes(rank.needed_bytes),
        format_bytes(max(rank.kv_room_bytes, 0)),
        "-" if rank.kv_tokens is None else f"{rank.kv_tokens:,}",
        "-" if rank.num_sequences is None else f"{rank.num_sequences:,}",
        "fits" if rank.fits else "does not fit",
    ]


def _candidate_row(candidate: Candidate, note: str) -> list[str]:
    return [
        str(candidate.tp_size),
        str(candidate.pp_size),
        str(candidate.num_ranks),
        format_bytes(candidate.weight_bytes),
        f"{candidate.fit.kv_tokens:,}",
        "yes" if candidate.fit.fits else "no",
        f"{candidate.step_s * 1e3:.3f}",
        note,
    ]


def _reason(candidates: Sequence[Candidate], chosen: Candidate) -> str:
    sizes = f"tensor_parallel_size={chosen.tp_size}, pipeline_parallel_size={chosen.pp_size}"
    fitting = ranked([candidate for candidate in candidates if candidate.fit.fits])
    if not fitting:
        return f"None of them fits; the closest is {sizes}."
    lowest = f"{fitting[0].step_s * 1e3:.3f} ms"
    if len(fitting) == 1:
        why = "nothing else fits"
    elif chosen is fitting[0]:
        why = f"it fits, and no other that fits has a lower estimate than its {lowest}"
    else:
        why = f"it fits, and has the fewest ranks of those within 1 % of the lowest, {lowest}"
    return f"Chosen: {sizes}; {why}."


def _yaml(chosen: Candidate) -> list[str]:
    return [
        "",
        "For the configuration:",
        "",
        "parallel:",
        f"  tensor_parallel_size: {chosen.tp_size}",
        f"  pipeline_parallel_size: {chosen.pp_size}",
    ]
