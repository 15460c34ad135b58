"""A benchmark's result as a short text: what ran, where, the limits of the device, and a table."""

from collections.abc import Iterator
from typing import Any

from runner.cli.table import table
from runner.drawing.words import plural

_RATES = ("gb_per_s", "share_of_bandwidth", "tflop_per_s", "share_of_matmul_rate")
_ABOVE = (
    "a share above 100 %: the device was busy while its limits were measured, or weights stay in a "
    "cache, from which they are read faster"
)
_RATE_TITLES = ("GB/s>", "share>", "TFLOP/s>", "share>")


def describe(report: dict[str, Any]) -> str:
    """The text for a report of `runner.bench.report`."""
    body = {"latency": _latency, "throughput": _throughput, "startup": _startup}
    lines = [_model(report), _environment(report)]
    if report["limits"]:
        lines.append(_limits(report))
    lines += body[report["benchmark"]](report)
    if max(_shares(report["result"]), default=0.0) > 1:
        lines += ["", _ABOVE]
    return "\n".join(lines)


def _shares(values: Any) -> Iterator[float]:
    """Those of a limit of the device, wherever they are in a result."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key.startswith("share_of"):
                yield value
            else:
                yield from _shares(value)


def _model(report: dict[str, Any]) -> str:
    model, sizes = report["model"], report["model"]["tensor_parallel_sizes"]
    weights = ", random weights" if model["load_format"] == "dummy" else ""
    return (
        f"{report['benchmark']} of {model['architecture']}{weights}: {model['dtype']}, "
        f"{model['backend']}, {plural(sum(sizes), 'rank')}, tensor-parallel sizes {sizes}"
    )


def _environment(report: dict[str, Any]) -> str:
    found = report["environment"]
    devices = ", ".join(sorted(set(found["gpus"])))
    cpu = f"{found['cpu'] or 'CPU'}, {plural(found['num_threads'], 'thread')}"
    commit = f" ({found['commit']})" if found["commit"] else ""
    return f"on {devices or cpu}; torch {found['torch']}, shardline {found['shardline']}{commit}"


def _limits(report: dict[str, Any]) -> str:
    limits = report["limits"]
    return (
        f"limits, measured now on rank 0: memory {number(limits['read_gb_per_s'])} GB/s reading, "
        f"{number(limits['copy_gb_per_s'])} copying (the {limits['bandwidth_from']} counts), "
        f"matmul {number(limits['matmul_tflop_per_s'])} TFLOP/s"
    )


def _latency(report: dict[str, Any]) -> list[str]:
    result, load = report["result"], report["workload"]
    columns = ("", "ms>", "p90>", "p99>", "floor>", "share>", *_RATE_TITLES)
    phases = {"prefill": result["prefill"], "decode step": result["decode_step"]}
    rows = [_phase(name, phase) for name, phase in phases.items() if phase]
    after = result["decode_tokens_per_s"]
    tail = f"{number(after)} tokens/s after the first token, " if after else ""
    return [
        f"batch of {load['num_requests']}, {_lengths(load)}; {_rounds(result)}",
        "",
        *table(columns, rows),
        "",
        f"{tail}{number(result['output_tokens_per_s'])} tokens/s in all",
    ]


def _phase(name: str, phase: dict[str, Any]) -> list[str]:
    times = [number(phase["ms"][key]) for key in ("median", "p90", "p99")]
    floor = [number(phase["floor_ms"]), _percent(phase["share_of_floor"])]
    return [name, *times, *floor, *_rates(phase)]


def _throughput(report: dict[str, Any]) -> list[str]:
    result, load = report["result"], report["workload"]
    columns = ("requests/s>", "output tokens/s>", "all tokens/s>", *_RATE_TITLES)
    counts = ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s")
    row = [*(number(result[key]) for key in counts), *_rates(result["per_device"])]
    return [
        f"{plural(load['num_requests'], 'request')}, {_lengths(load)}; {_rounds(result)}",
        "",
        *table(columns, [row]),
        "",
        f"{plural(result['num_steps'], 'step')} in {number(result['elapsed_s']['median'])} s; "
        "GB/s and TFLOP/s are of one device, the mean of all",
    ]


def _startup(report: dict[str, Any]) -> list[str]:
    result, load = report["result"], report["workload"]
    phases = list(result["starts"][0]["phases_s"])
    rows = [
        [f"{index}", number(start["seconds"]), *(number(start["phases_s"][p]) for p in phases)]
        for index, start in enumerate(result["starts"], start=1)
    ]
    later = result["later_s"]
    tail = f", then {number(later['median'])} s (median)" if later else ""
    return [
        f"from the start of the process to the first token, {load['input_len']} tokens in",
        "",
        *table(("start>", "s>", *(f"{phase.replace('_', ' ')}>" for phase in phases)), rows),
        "",
        f"{number(result['first_s'])} s at first, with the page cache as it was{tail}",
    ]


def _lengths(load: dict[str, Any]) -> str:
    return f"{load['input_len']} tokens in, {load['output_len']} out"


def _rounds(result: dict[str, Any]) -> str:
    """Which rounds are reported, and whether they agree."""
    count, warmup = len(result["rounds_ms"]), plural(result["warmup_rounds"], "warm-up round")
    share = _percent(result["tolerance"])
    verdict = f"they agree within {share}" if result["is_stable"] else f"NOT stable within {share}"
    return f"last {result['reported_rounds']} of {plural(count, 'round')} after {warmup}, {verdict}"


def _rates(values: dict[str, float]) -> list[str]:
    return [
        _percent(values[key]) if key.startswith("share") else number(values[key]) for key in _RATES
    ]


def number(value: float) -> str:
    """Three digits that count, and all digits before the point.

    >>> number(4310.2), number(12.345), number(3.4), number(0.01234)
    ('4,310', '12.3', '3.40', '0.0123')
    """
    for limit, decimals in ((100, 0), (10, 1), (1, 2), (0.1, 3), (0.01, 4)):
        if value >= limit:
            return f"{value:,.{decimals}f}"
    return f"{value:.2g}"


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %" if share >= 0.1 else f"{share * 100:.2g} %"
