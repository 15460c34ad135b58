"""The result of `bench serve` as a short text: what was asked, what came, and the latencies."""

from typing import Any

from runner.cli.bench_text import number
from runner.cli.table import table
from runner.drawing.words import plural

_LATENCIES = ("ttft", "tpot", "itl", "e2e")
_COLUMNS = ("mean", "median", "p90", "p95", "p99")


def describe(report: dict[str, Any]) -> str:
    """The text for a report of `bench serve`."""
    result, load, server = report["result"], report["workload"], report["server"]
    lines = [
        f"{server['model']} at {server['url']}: {_loop(load)}, {load['data']} prompts",
        f"{result['num_complete']} of {plural(result['num_requests'], 'request')} complete in "
        f"{number(result['duration_s'])} s, {_tokens(result)}",
    ]
    for kind, error in result["errors"].items():
        lines.append(f"{kind}: {error['count']} times; first: {error['first'] or 'nothing said'}")
    titles = ("", *("p50>" if name == "median" else f"{name}>" for name in _COLUMNS))
    rows = [
        [f"{name}, ms", *(number(result[f"{name}_ms"][column]) for column in _COLUMNS)]
        for name in _LATENCIES
        if result[f"{name}_ms"]
    ]
    return "\n".join(
        [*lines, "", *(table(titles, rows) if rows else ["no latencies"]), "", _rates(report)]
    )


def _loop(load: dict[str, Any]) -> str:
    if load["concurrency"]:
        return f"{load['concurrency']} at a time"
    return f"{number(load['request_rate'])} requests/s at random (burstiness {load['burstiness']})"


def _tokens(result: dict[str, Any]) -> str:
    counted = " and ".join(result["counted_by"]) or "nothing"
    prompts = result["prompt_tokens"]
    asked = "" if prompts is None else f"{prompts:,} tokens in, "
    return f"{asked}{result['output_tokens']:,} out (counted by {counted})"


def _rates(report: dict[str, Any]) -> str:
    result, slos = report["result"], report["workload"]["slo"]
    rates = (
        f"{number(result['requests_per_s'])} requests/s, "
        f"{number(result['output_tokens_per_s'])} output tokens/s"
    )
    if not slos:
        return rates
    goodput = number(result["goodput_requests_per_s"])
    return f"{rates}; goodput {goodput} requests/s within {', '.join(slos)} ms"
