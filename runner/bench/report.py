"""The result of a benchmark as one JSON object: what was run, where, and what came of it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from runner.bench.floor import DeviceLimits, Floor, Work, WorkCount, floor_of
from runner.bench.front import RoundsFront
from runner.bench.rounds import Repeat, Round
from runner.bench.startup import Start
from runner.bench.stats import TOLERANCE, summarize
from runner.bench.workload import Workload
from runner.planning import DecoderJob

_GIGA, _TERA, _MS = 1e9, 1e12, 1e3


def make_report(
    benchmark: str,
    job: DecoderJob,
    *,
    command: Sequence[str],
    environment: dict[str, Any],
    workload: Workload,
    limits: DeviceLimits | None,
    result: dict[str, Any],
) -> dict[str, Any]:
    """Put the parts together.

    Args:
        command: the command line, as given.
        limits: of rank 0's device; None where the benchmark does not measure them.
    """
    return {
        "benchmark": benchmark,
        "command": list(command),
        "environment": environment,
        "model": _model(job),
        "workload": asdict(workload),
        "limits": _limits(limits) if limits else None,
        "result": result,
    }


def latency_result(front: RoundsFront, repeat: Repeat, count: WorkCount) -> dict[str, Any]:
    """Of one batch: the time to the first tokens, and of each decoding step."""
    assert front.limits is not None, "the front measures them before its first round"
    rounds, load = repeat.reported(front.rounds), count.workload
    plan, limits = count.plan, front.limits
    decode_s = [seconds for round_ in rounds for seconds in round_.decode_steps_s]
    prefill = floor_of(plan, count.prefill(), limits)
    elapsed_s = summarize([round_.elapsed_s for round_ in rounds]).median
    return _repeats(front.rounds, repeat) | {
        "prefill": _against_floor([round_.prefill_s for round_ in rounds], prefill, limits),
        "decode_step": _against_floor(decode_s, floor_of(plan, count.decode_step(), limits), limits)
        if decode_s
        else None,
        "decode_tokens_per_s": load.num_requests / summarize(decode_s).median if decode_s else None,
        "output_tokens_per_s": load.num_requests * load.output_len / elapsed_s,
    }


def throughput_result(front: RoundsFront, repeat: Repeat, count: WorkCount) -> dict[str, Any]:
    """Of many requests at once; rates of the devices are the mean over all of them."""
    assert front.limits is not None, "the front measures them before its first round"
    rounds, load, limits = repeat.reported(front.rounds), count.workload, front.limits
    elapsed = summarize([round_.elapsed_s for round_ in rounds])
    works = count.round(len(rounds[-1].steps))
    total = sum(works, Work(0.0, 0.0))
    mean = Work(total.num_bytes / len(works), total.flops / len(works))
    return _repeats(front.rounds, repeat) | {
        "elapsed_s": asdict(elapsed),
        "num_steps": len(rounds[-1].steps),
        "requests_per_s": load.num_requests / elapsed.median,
        "output_tokens_per_s": load.num_requests * load.output_len / elapsed.median,
        "total_tokens_per_s": load.num_requests * load.length / elapsed.median,
        "per_device": _rates(mean, elapsed.median, limits),
    }


def startup_result(starts: Sequence[Start]) -> dict[str, Any]:
    """Of several processes, one after the other. Whether the first finds the model in the page
    cache is not known and cannot be controlled; the later ones find what it left there.
    """
    later = starts[1:]
    return {
        "first_s": starts[0].seconds,
        "later_s": asdict(summarize([start.seconds for start in later])) if later else None,
        "starts": [asdict(start) for start in starts],
    }


def _repeats(rounds: Sequence[Round], repeat: Repeat) -> dict[str, Any]:
    return {
        "warmup_rounds": repeat.warmup_rounds,
        "rounds_ms": [seconds * _MS for seconds in repeat.metrics(rounds)],
        "reported_rounds": len(repeat.reported(rounds)),
        "is_stable": repeat.is_stable(rounds),
        "tolerance": TOLERANCE,
    }


def _against_floor(
    seconds: Sequence[float], floor: Floor, limits: DeviceLimits
) -> dict[str, float | dict[str, float]]:
    """Times, and what the ranks on the slowest path reached at the median."""
    summary = summarize([s * _MS for s in seconds])
    median_s = summary.median / _MS
    return {
        "ms": asdict(summary),
        "floor_ms": floor.seconds * _MS,
        "share_of_floor": floor.seconds / median_s,
        **_rates(floor.work, median_s, limits),
    }


def _rates(work: Work, seconds: float, limits: DeviceLimits) -> dict[str, float]:
    bytes_per_s, flops_per_s = work.num_bytes / seconds, work.flops / seconds
    return {
        "gb_per_s": bytes_per_s / _GIGA,
        "share_of_bandwidth": bytes_per_s / limits.bytes_per_s,
        "tflop_per_s": flops_per_s / _TERA,
        "share_of_matmul_rate": flops_per_s / limits.flops_per_s,
    }


def _limits(limits: DeviceLimits) -> dict[str, Any]:
    return {
        "read_gb_per_s": limits.read_bytes_per_s / _GIGA,
        "copy_gb_per_s": limits.copy_bytes_per_s / _GIGA,
        "bandwidth_from": limits.bandwidth_from,
        "matmul_tflop_per_s": limits.flops_per_s / _TERA,
        "buffer_bytes": limits.buffer_bytes,
        "matmul_size": limits.matmul_size,
    }


def _model(job: DecoderJob) -> dict[str, Any]:
    plan, config = job.plan, job.config
    return {
        "path": config.model.path,
        "architecture": plan.architecture,
        "load_format": config.model.load_format,
        "dtype": plan.dtype,
        "backend": config.compile.backend if job.bundle else "eager",
        "tensor_parallel_sizes": list(plan.tp_sizes),
        "weight_bytes": [rank.weight_bytes for rank in plan.ranks],
        "kv_bytes_per_token": [rank.kv_bytes_per_token for rank in plan.ranks],
        "max_model_len": plan.max_model_len,
        "max_num_seqs": config.scheduler.max_num_seqs,
        "max_num_batched_tokens": plan.max_num_batched_tokens,
        "plan_digest": plan.digest(),
    }
