"""The figures of a run of the load generator, as plain JSON types."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from runner.bench.load.slo import Slo, is_good
from runner.bench.load.timeline import FORMULAS, Timeline, complete
from runner.bench.stats import summarize

_MS = 1e3


def load_result(timelines: Sequence[Timeline], slos: Sequence[Slo]) -> dict[str, Any]:
    """Of at least one request; latencies are null where no answer has them."""
    good = complete(timelines)
    duration_s = max(t.ended_at for t in timelines) - min(t.sent_at for t in timelines)
    outputs = sum(t.num_output_tokens for t in good)
    prompts = None
    if all(t.prompt_tokens is not None for t in good):
        prompts = sum(t.prompt_tokens or 0 for t in good)
    chunks = sum(len(t.chunks_at) for t in good)
    tpots = [t.tpot_s for t in good if t.tpot_s is not None]
    return {
        "num_requests": len(timelines),
        "num_complete": len(good),
        "errors": _errors(timelines),
        "duration_s": duration_s,
        "prompt_tokens": prompts,
        "output_tokens": outputs,
        "tokens_per_chunk": outputs / chunks if chunks else None,
        "counted_by": sorted({"chunks" if t.output_tokens is None else "usage" for t in good}),
        "requests_per_s": len(good) / duration_s,
        "output_tokens_per_s": outputs / duration_s,
        "total_tokens_per_s": None if prompts is None else (prompts + outputs) / duration_s,
        "goodput_requests_per_s": sum(is_good(t, slos) for t in timelines) / duration_s
        if slos
        else None,
        "ttft_ms": _summary([t.ttft_s for t in good]),
        "tpot_ms": _summary(tpots),
        "itl_ms": _summary([gap for t in good for gap in t.itls_s]),
        "e2e_ms": _summary([t.e2e_s for t in good]),
        "send_delay_ms": _summary([t.sent_at - t.due_at for t in timelines]),
        "formulas": FORMULAS,
    }


def _errors(timelines: Sequence[Timeline]) -> dict[str, dict[str, Any]]:
    """How often each kind of error came, and what was said first."""
    counts = Counter(t.error for t in timelines if t.error)
    return {
        kind: {"count": count, "first": next(t.detail for t in timelines if t.error == kind)}
        for kind, count in counts.most_common()
    }


def _summary(seconds: Sequence[float]) -> dict[str, float] | None:
    return asdict(summarize([s * _MS for s in seconds])) if seconds else None
