"""The compiled model as a whole against the same weights uncompiled, position by position."""

import itertools
import math
from dataclasses import dataclass

import torch

from runner.build.sharing import gather
from runner.config.schema import ParityConfig
from runner.engine.batching import lay_out
from runner.engine.request import Request
from runner.engine.scheduler import Scheduled
from runner.engine.sequence import Sequence
from runner.engine.stage_runner import StageRunner
from runner.models.part import Execute
from runner.planning import DecoderJob

_NUM_DECODED = 8
"""The last positions run one by one, as in decoding."""


@dataclass(frozen=True)
class WholeParity:
    """How far two models' distributions agree.

    Attributes:
        top1: share of positions with the same likeliest token; two tokens that the uncompiled
            model's dtype cannot tell apart count as the same.
        kl: mean divergence from the uncompiled model's distribution, in nats; -1 where it is no
            finite number.
    """

    num_positions: int
    top1: float
    kl: float
    passed: bool

    def complaint(self) -> str:
        return (
            f"the compiled model differs from the uncompiled one: top-1 agreement {self.top1:.3f}, "
            f"KL divergence {self.kl:.3g} over {self.num_positions} positions"
        )


def compare_whole(job: DecoderJob, runner: StageRunner, bounds: ParityConfig) -> WholeParity:
    """Feed the same tokens to both, in chunks and one by one; every rank gets the answer."""
    context = runner.context
    if job.has_random_weights:
        # The likeliest tokens of random weights are too near to one another.
        bounds = bounds.model_copy(update={"min_top1": 0.0})
    room = min(bounds.num_tokens, job.plan.max_model_len)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(job.spec.config.vocab_size, (room,), generator=generator).tolist()
    assert runner.padding is not None
    chunk = runner.padding.bucket(min(job.config.scheduler.max_num_seqs, runner.buckets[-1]))
    compiled = _logits(runner, ids, chunk, runner.execute)
    plain = _logits(runner, ids, chunk, None)
    found: list[WholeParity] = []
    source = context.topology.ranks(context.topology.last_stage)[0]
    if context.rank == source and compiled is not None and plain is not None:
        found = [judge(compiled, plain, runner.stage.dtype, bounds)]
    return gather(WholeParity, found, context.setup)[0]


def _logits(
    runner: StageRunner, ids: list[int], chunk: int, execute: Execute | None
) -> torch.Tensor | None:
    """(len(ids), vocab_size) on the last stage."""
    alone = min(_NUM_DECODED, len(ids) - 1)
    starts = [*range(0, len(ids) - alone, chunk), *range(len(ids) - alone, len(ids))]
    compiled, runner.execute = runner.execute, execute
    block_size, logits = runner.block_size, []
    for start, end in itertools.pairwise([*starts, len(ids)]):
        sequence = Sequence(Request(0, tuple(ids[:end]), 1), ids[:end], num_computed=start)
        sequence.blocks = list(range(-(-end // block_size)))
        inputs = lay_out([Scheduled.of(sequence, end - start)], block_size, runner.padding)
        output = runner.run(inputs.with_all_logits(runner.padding))
        if output is not None:
            logits.append(output.logits.to("cpu", torch.float32, copy=True))
    runner.execute = compiled
    return torch.cat(logits) if logits else None


def judge(
    compiled: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype, bounds: ParityConfig
) -> WholeParity:
    """Compare logits, (num_positions, vocab_size) float32, that were computed in `dtype`."""
    best, chosen = plain.max(-1), compiled.argmax(-1, keepdim=True)
    nearly = 4 * torch.finfo(dtype).eps * best.values.abs()
    agrees = best.values - plain.gather(-1, chosen).squeeze(-1) <= nearly
    top1 = agrees.double().mean().item()
    p, q = (x.double().log_softmax(-1) for x in (plain, compiled))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    passed = top1 >= bounds.min_top1 and kl <= bounds.max_kl
    return WholeParity(len(plain), top1, kl if math.isfinite(kl) else -1.0, passed)
