"""What tests run on the ranks of a `RankPool`: each function gets a context and plain arguments."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from parallel.collectives import all_reduce
from parallel.context import ParallelContext
from parallel.low_latency import LowLatency
from runner.config.load import load
from runner.engine import rank
from runner.engine.batching import lay_out
from runner.engine.control import Control
from runner.engine.loading import load_stage
from runner.engine.logprobs import TokenLogprobs
from runner.engine.rank import loop, make_engine
from runner.engine.request import Request, SamplingParams
from runner.engine.request_maker import make_request
from runner.engine.scheduler import Output, Scheduled, Scheduler
from runner.planning import DecoderJob


def prepare(model: str, tp_sizes: list[int], settings: dict[str, Any]) -> DecoderJob:
    """A job in float32 with one stage for each of `tp_sizes`; `settings` as for `--set`."""
    overrides = [f"{key}={value}" for key, value in settings.items()]
    stages = ", ".join(f"{{tensor_parallel_size: {size}}}" for size in tp_sizes)
    keys = [f"model.path={model}", "model.dtype=float32", "parallel.device=cpu"]
    if "parallel.stages" not in settings:
        keys.append(f"parallel.stages=[{stages}]")
    return DecoderJob.prepare(load(None, overrides=[*keys, *overrides]).config)


class ListFront:
    """A front that sends requests and keeps their token ids and logprobs."""

    def __init__(self, requests: list[Request]) -> None:
        self.token_ids: dict[int, list[int]] = {r.request_id: [] for r in requests}
        self.logprobs: dict[int, list[TokenLogprobs | None]] = {r.request_id: [] for r in requests}
        self._unsent = requests
        self._open = set(self.token_ids)

    def kv_blocks(self, block_size: int) -> int:
        return sum(-(-r.max_length // block_size) for r in self._unsent)

    def begin(self, scheduler: Scheduler) -> None:
        """All lengths are known beforehand; the engine refuses what does not fit."""

    def next(self) -> Control:
        control = Control(self._unsent, leave=not self._open)
        self._unsent = []
        return control

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            self.token_ids[output.request_id].append(output.token_id)
            self.logprobs[output.request_id].append(output.logprobs)
            if output.finish_reason or output.failed:
                self._open.remove(output.request_id)


def run_ahead(decision: bool) -> Any:
    """Within this, whether steps are laid out before the tokens of those before have been read is
    decided so; a CPU never does it by itself.
    """
    return patch.object(rank, "may_run_ahead", lambda _: decision)


def requests_of(
    job: DecoderJob,
    prompts: list[list[int]],
    num_tokens: int,
    sampling: dict[str, Any],
    stop_token_ids: frozenset[int] = frozenset(),
) -> list[Request]:
    """One request a prompt, that nothing but these tokens ends before its length."""
    return [
        make_request(
            index,
            ids,
            vocab_size=job.spec.config.vocab_size,
            max_model_len=job.plan.max_model_len,
            max_tokens=num_tokens,
            sampling=SamplingParams(**sampling),
            stop_token_ids=stop_token_ids,
        )
        for index, ids in enumerate(prompts)
    ]


def complete(
    context: ParallelContext,
    model: str,
    prompts: list[list[int]],
    num_tokens: int,
    sampling: dict[str, Any],
    settings: dict[str, Any],
) -> list[list[int]] | None:
    """Token ids that follow each prompt; known on rank 0."""
    job = prepare(model, list(context.topology.tp_sizes), settings)
    return complete_job(context, job, prompts, num_tokens, sampling)


def complete_job(
    context: ParallelContext,
    job: DecoderJob,
    prompts: list[list[int]],
    num_tokens: int,
    sampling: dict[str, Any],
) -> list[list[int]] | None:
    """The same for a job that there is already, such as one from a bundle."""
    stage_runner = load_stage(job, context)
    front = None
    if context.rank == 0:
        front = ListFront(requests_of(job, prompts, num_tokens, sampling))
    loop(make_engine(job, stage_runner, front), front)
    return list(front.token_ids.values()) if front else None


def complete_ahead_or_not(
    context: ParallelContext,
    model: str,
    prompts: list[list[int]],
    num_tokens: int,
    samplings: list[dict[str, Any]],
    stop_token_ids: frozenset[int],
    settings: dict[str, Any],
) -> list[Any] | None:
    """Tokens and probabilities, each request sampled in its own way: when steps are read at once,
    and when they are laid out ahead. Known on rank 0.
    """
    job = prepare(model, list(context.topology.tp_sizes), settings)
    found = []
    for ahead in (False, True):
        requests = [
            replace(request, request_id=index, num_logprobs=2)
            for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
            for request in requests_of(job, [prompt], num_tokens, sampling, stop_token_ids)
        ]
        front = ListFront(requests)
        with run_ahead(ahead):
            mine = front if context.rank == 0 else None
            engine = make_engine(job, load_stage(job, context), mine)
        assert (engine.stage_runner.latest is not None) == ahead
        loop(engine, mine)
        found.append((list(front.token_ids.values()), list(front.logprobs.values())))
    return found if context.rank == 0 else None


def complete_with_logprobs(
    context: ParallelContext,
    model: str,
    prompts: list[list[int]],
    num_tokens: int,
    sampling: dict[str, Any],
    asked: list[int | None],
) -> tuple[list[list[int]], list[list[TokenLogprobs | None]]] | None:
    """Completions, of which each asks for so many logprobs, and these; known on rank 0."""
    job = prepare(model, list(context.topology.tp_sizes), {})
    stage_runner = load_stage(job, context)
    front = None
    if context.rank == 0:
        requests = requests_of(job, prompts, num_tokens, sampling)
        pairs = zip(requests, asked, strict=True)
        front = ListFront([replace(request, num_logprobs=count) for request, count in pairs])
    loop(make_engine(job, stage_runner, front), front)
    return (list(front.token_ids.values()), list(front.logprobs.values())) if front else None


def complete_in_few_blocks(
    context: ParallelContext,
    model: str,
    prompts: list[list[int]],
    num_tokens: int,
    settings: dict[str, Any],
    num_blocks: int,
    ahead: bool,
) -> tuple[list[list[int]], list[tuple[int, int]]] | None:
    """Greedy completions with a cache of so many blocks; and of every part of every step whose it
    was and how many of its tokens were in the cache. Known on rank 0.
    """
    job = prepare(model, list(context.topology.tp_sizes), settings)
    front = ListFront(requests_of(job, prompts, num_tokens, {}))
    front.kv_blocks = lambda _: num_blocks  # type: ignore[method-assign]
    with run_ahead(ahead):
        engine = make_engine(job, load_stage(job, context), front if context.rank == 0 else None)
    schedule = engine.scheduler.schedule
    seen: list[tuple[int, int]] = []
    follows: list[int | None] = []

    def watched() -> list[Scheduled]:
        parts = schedule()
        seen.extend((p.sequence.request.request_id, p.start) for p in parts)
        follows.extend(p.follows for p in parts)
        return parts

    with patch.object(engine.scheduler, "schedule", watched):
        loop(engine, front if context.rank == 0 else None)
    assert any(place is not None for place in follows) == ahead
    return (list(front.token_ids.values()), seen) if context.rank == 0 else None


def logits(
    context: ParallelContext, model: str, prompts: list[list[int]], settings: dict[str, Any]
) -> list[torch.Tensor] | None:
    """(len(prompt), vocab_size) of each prompt, all in one batch; known on the last stage."""
    job = prepare(model, list(context.topology.tp_sizes), settings)
    stage_runner = load_stage(job, context)
    front = ListFront(requests_of(job, prompts, 1, {}))
    engine = make_engine(job, stage_runner, front if context.rank == 0 else None)
    engine.admit(front.next())
    groups = iter(engine.scheduler.schedule, [])
    inputs = lay_out([part for group in groups for part in group], engine.block_size)
    output = stage_runner.run(inputs.with_all_logits(None))
    stage_runner.transfer.drain()
    return None if output is None else list(output.logits.split([len(p) for p in prompts]))


def all_reduce_errors(context: ParallelContext, *, low_latency: bool) -> dict[str, float]:
    """The largest error of sums of whole numbers, by size and dtype."""
    errors, group = {}, context.tp
    if low_latency:
        assert group.process_group is not None
        group = replace(group, small_sums=LowLatency.open(group.process_group, context.device))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for count in (1, 8, 4096, 8 * 8192, 3 * 2**20):
            mine = torch.arange(count, device=context.device).remainder(64).to(dtype)
            total = all_reduce(mine * (group.rank + 1), group)
            factor = sum(range(1, group.size + 1))
            errors[f"{count} {dtype}"] = float((total - factor * mine).abs().max())
    return errors


def small_sums(context: ParallelContext) -> str:
    """How small tensors are added up."""
    return type(context.tp.small_sums).__name__
