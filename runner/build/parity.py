"""The gate that a bundle passes, or fails with exit code 7.

Each unit: what the compiled ranks of a stage made of recorded hidden states, against the whole
layer in a wider dtype, read anew from the checkpoint and divided by nobody. So a wrong slice, a
lost all-reduce and a bad engine all show. The whole: logits of the compiled model against those of
the same weights uncompiled (`runner.build.whole_parity`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from runner.build.reference import EMBEDDING, HEAD, Reference, Unit
from runner.build.sharing import barrier, gather
from runner.build.whole_parity import WholeParity, compare_whole
from runner.config.schema import ParityConfig
from runner.engine.batching import StepInputs, lay_out
from runner.engine.request import Request
from runner.engine.scheduler import Scheduled
from runner.engine.sequence import Sequence as TokenSequence
from runner.engine.stage_runner import StageRunner
from runner.models.part import Execute
from runner.planning import Job

_WIDE = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}

_FLOOR = 16
"""Errors of so many roundings are never too large."""


@dataclass(frozen=True)
class UnitParity:
    """A layer, the embedding or the head in one step.

    Attributes:
        name: such as "layers.3".
        cosine: between its contribution and that of the reference, rounding of the residual aside.
        error: largest, relative to the root mean square of the reference.
        eager_error: the same of PyTorch's kernels in the model's dtype, undivided.
    """

    name: str
    num_tokens: int
    cosine: float
    error: float
    eager_error: float
    passed: bool


@dataclass(frozen=True)
class ParityReport:
    """What was compared, and whether it is within the bounds of the configuration.

    Attributes:
        passed: false where nothing was compared, too.
        reason: what failed first, or why nothing was compared; empty if all is well.
    """

    passed: bool
    reason: str
    units: tuple[UnitParity, ...] = ()
    whole: WholeParity | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Step:
    """One recorded step.

    Attributes:
        states: hidden states before the first layer and after each, (num_tokens, hidden), on the
            CPU.
        logits: (num_samples, vocab_size) on the last stage.
    """

    inputs: StepInputs
    states: tuple[torch.Tensor, ...]
    logits: torch.Tensor | None


class Recorder:
    """Executes a stage's parts and keeps the hidden states between its layers."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self.states: list[torch.Tensor] = []

    def __call__(self, name: str, *activations: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self._execute(name, *activations)
        if name.endswith(".qkv"):
            self._keep(activations[0])
        elif name.endswith((".block", ".end")):
            self._keep(outputs[0])
        return outputs

    def _keep(self, state: torch.Tensor) -> None:
        # A copy: a carry comes in the same memory in every step.
        self.states.append(state.to("cpu", copy=True))


def compare(job: Job, runner: StageRunner) -> ParityReport:
    """Run the compiled stages together and judge them; every rank gets the whole report.

    Args:
        runner: compiled, with the bundle's weights, without a KV cache yet.
    """
    context, bounds = runner.context, job.config.compile.parity
    block_size = job.config.kv_cache.block_size
    sequences = [_sequences(job, n) for n in runner.buckets]
    most = max(sum(-(-len(s) // block_size) for s in step) for step in sequences)
    runner.allocate(max(most, -(-bounds.num_tokens // block_size)), block_size)
    # Loading takes some ranks longer than a step may.
    barrier(context.setup)
    units: list[UnitParity] = []
    if job.config.model.load_format != "dummy" or context.tp.size == 1:
        steps = [_record(runner, step, block_size) for step in sequences]
        units = list(_units(job, runner, steps, bounds))
    units = sorted(gather(UnitParity, units, context.setup), key=_place)
    whole = compare_whole(job, runner, bounds)
    failed = next((unit for unit in units if not unit.passed), None)
    reason = _complaint(failed) if failed else "" if whole.passed else whole.complaint()
    return ParityReport(not reason, reason, tuple(units), whole)


def _place(unit: UnitParity) -> tuple[float, int]:
    """In the order of the model, so that what failed first is where the fault is."""
    ends = {EMBEDDING: -1.0, HEAD: math.inf}
    place = ends[unit.name] if unit.name in ends else float(unit.name.partition(".")[2])
    return place, unit.num_tokens


def _sequences(job: Job, num_tokens: int) -> list[list[int]]:
    """So many tokens as prompts that each fit into the model."""
    longest = job.plan.max_model_len
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(job.spec.config.vocab_size, (num_tokens,), generator=generator).tolist()
    return [ids[start : start + longest] for start in range(0, num_tokens, longest)]


def _record(runner: StageRunner, prompts: Sequence[Sequence[int]], block_size: int) -> Step:
    """Run one step of all prompts on all stages."""
    scheduled, first = [], 0
    for index, prompt in enumerate(prompts):
        sequence = TokenSequence.of(Request(index, tuple(prompt), 1))
        count = -(-len(prompt) // block_size)
        sequence.blocks = list(range(first, first + count))
        first += count
        scheduled.append(Scheduled(sequence, len(prompt)))
    inputs = lay_out(scheduled, block_size, runner.padding)
    assert runner.execute is not None
    compiled, recorder = runner.execute, Recorder(runner.execute)
    runner.execute = recorder
    output = runner.run(inputs)
    runner.execute = compiled
    logits = None if output is None else output.logits.to("cpu", copy=True)
    return Step(inputs, tuple(recorder.states), logits)


def _units(
    job: Job, runner: StageRunner, steps: Sequence[Step], bounds: ParityConfig
) -> Iterator[UnitParity]:
    """This rank's share of its stage's units."""
    context = runner.context
    reference = Reference.of(job, context.device)
    stage, narrow = runner.stage, runner.stage.dtype
    names = [f"layers.{index}" for index in stage.layer_indices]
    names = [EMBEDDING] * (stage.embed_tokens is not None) + names
    names += [HEAD] * (stage.lm_head is not None)
    for name in names[context.tp.rank :: context.tp.size]:
        weights = reference.weights(name)
        exact = reference.unit(name, weights, _WIDE[narrow])
        eager = reference.unit(name, weights, narrow)
        for step in steps:
            yield _judge(name, runner, step, exact, eager, bounds)


def _judge(
    name: str, runner: StageRunner, step: Step, exact: Unit, eager: Unit, bounds: ParityConfig
) -> UnitParity:
    device, wide, narrow = runner.context.device, exact.stage.dtype, eager.stage.dtype
    x, got = _ends(name, runner, step)
    batch = step.inputs.to(device)
    size = {"num_blocks": runner.num_blocks + 1, "block_size": runner.block_size}
    before = None if x is None else x.to(device)
    wanted = exact.run(batch, before, **size)
    plain = eager.run(batch, before, **size).to(wide)
    found = got.to(device, wide)
    rows = step.inputs.num_samples if name == HEAD else len(found)
    wanted, plain, found = (y[:rows] for y in (wanted, plain, found))
    stored = torch.zeros_like(wanted)
    if before is not None and name != HEAD:
        residual = before[:rows].to(wide)
        stored = torch.maximum(residual.abs(), wanted.abs())
        # What a layer adds; the residual stream would hide it.
        wanted, plain, found = (y - residual for y in (wanted, plain, found))
    eps = torch.finfo(narrow).eps
    error, beyond = errors_of(found, wanted, rounding=eps * stored)
    eager_error, _ = errors_of(plain, wanted, rounding=eps * stored)
    cosine = cosine_of(found, wanted, rounding=eps * stored)
    # Written so that a number that is none fails.
    passed = cosine >= bounds.min_cosine
    passed = passed and beyond <= max(bounds.max_error_ratio * eager_error, _FLOOR * eps)
    return UnitParity(
        name,
        step.inputs.num_rows,
        cosine=_known(cosine),
        error=_known(error),
        eager_error=_known(eager_error),
        passed=passed,
    )


def errors_of(
    found: torch.Tensor, wanted: torch.Tensor, *, rounding: torch.Tensor
) -> tuple[float, float]:
    """The largest error of any element, relative to the root mean square of `wanted`.

    Args:
        rounding: what each element may be off because of the state that it is added to. Some
            models have a few states that are thousands of times larger than what a layer adds;
            how well these happen to be rounded says nothing.

    Returns:
        The error, and the error beyond the rounding.
    """
    scale = wanted.pow(2).mean().sqrt().clamp_min(torch.finfo(wanted.dtype).tiny)
    off = (found - wanted).abs()
    return (off.max() / scale).item(), ((off - rounding).max() / scale).item()


def cosine_of(found: torch.Tensor, wanted: torch.Tensor, *, rounding: torch.Tensor) -> float:
    """The cosine of all elements together, where those within `rounding` count as right."""
    settled = torch.where((found - wanted).abs() <= rounding, wanted, found)
    return torch.cosine_similarity(settled.flatten(), wanted.flatten(), dim=0).item()


def _known(number: float) -> float:
    """JSON has no word for what is not a number."""
    return number if math.isfinite(number) else -1.0


def _ends(name: str, runner: StageRunner, step: Step) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What went into a unit of this stage, and what came out."""
    if name == EMBEDDING:
        return None, step.states[0]
    if name == HEAD:
        assert step.logits is not None
        return step.states[-1], step.logits
    place = int(name.partition(".")[2]) - runner.stage.layer_indices.start
    return step.states[place], step.states[place + 1]


def _complaint(unit: UnitParity) -> str:
    return (
        f"{unit.name} at {unit.num_tokens} tokens does not compute what the model computes: cosine "
        f"{unit.cosine:.6f}, error {unit.error:.3g} where the uncompiled layer has "
        f"{unit.eager_error:.3g}"
    )
