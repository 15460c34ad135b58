"""The gate that a bundle passes, or fails with exit code 7.

Each unit: what the compiled ranks of a stage made of recorded hidden states, against the whole
layer in a wider dtype, read anew from the checkpoint and divided by nobody. So a wrong slice, a
lost all-reduce and a bad engine all show. The whole: logits of the compiled model against those of
the same weights uncompiled (`runner.build.whole_parity`).
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from runner.build.agreement import LEAST_ERROR, advice, cosine_of, errors_of, gain_of
from runner.build.recipe import Verdict
from runner.build.reference import EMBEDDING, HEAD, Reference, Unit
from runner.build.sharing import barrier, gather
from runner.build.tf32 import products_in_tf32
from runner.build.whole_parity import WholeParity, compare_whole
from runner.config.schema import CompileConfig
from runner.engine.batching import StepInputs, lay_out
from runner.engine.request import Request
from runner.engine.scheduler import Scheduled
from runner.engine.sequence import Sequence as TokenSequence
from runner.engine.stage_runner import StageRunner
from runner.models.part import Execute
from runner.planning import DecoderJob

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
        gain: length along the reference; 1 is right.
    """

    name: str
    num_tokens: int
    cosine: float
    error: float
    eager_error: float
    gain: float
    passed: bool


@dataclass(frozen=True)
class ParityReport(Verdict):
    """What was compared, and whether it is within the bounds of the configuration."""

    units: tuple[UnitParity, ...] = ()
    whole: WholeParity | None = None

    def line(self) -> str:
        """The comparison in a line."""
        if not self.passed:
            return f"parity: {'FAILED: ' if self.whole else ''}{self.reason}"
        parts = ["parity: passed"]
        if self.units:
            worst = min(self.units, key=lambda unit: unit.cosine)
            parts.append(
                f"smallest cosine of a layer's contribution {worst.cosine:.6f} "
                f"({worst.name} at {worst.num_tokens} tokens)"
            )
        if self.whole:
            whole = self.whole
            parts.append(
                f"top-1 {whole.top1:.3f}, KL {whole.kl:.2g} over {whole.num_positions} positions"
            )
        return "; ".join(parts)


@dataclass(frozen=True)
class Step:
    """One recorded step.

    Attributes:
        states: those hidden states that this rank needs, (num_tokens, hidden), on the CPU: 0 is
            before the first layer of the stage, 1 after it.
        logits: (num_samples, vocab_size) on the last stage.
    """

    inputs: StepInputs
    states: Mapping[int, torch.Tensor]
    logits: torch.Tensor | None


class Recorder:
    """Executes a stage's parts and keeps hidden states between its layers."""

    def __init__(self, execute: Execute, wanted: Collection[int]) -> None:
        """
        Args:
            wanted: which states: 0 is before the first layer, 1 after it.
        """
        self._execute = execute
        self._wanted = wanted
        self._next = 0
        self.states: dict[int, torch.Tensor] = {}

    def __call__(self, name: str, *activations: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self._execute(name, *activations)
        if name.endswith(".qkv"):
            self._keep(activations[0])
        elif name.endswith((".block", ".end")):
            self._keep(outputs[0])
        return outputs

    def _keep(self, state: torch.Tensor) -> None:
        if self._next in self._wanted:
            # A copy: a carry comes in the same memory in every step.
            self.states[self._next] = state.to("cpu", copy=True)
        self._next += 1


def compare(job: DecoderJob, runner: StageRunner) -> ParityReport:
    """Run the compiled stages together and judge them; every rank gets the whole report.

    Args:
        runner: compiled, with the bundle's weights, without a KV cache yet.
    """
    context, config = runner.context, job.config.compile
    block_size = job.config.kv_cache.block_size
    sequences = [_sequences(job, n) for n in runner.buckets]
    most = max(sum(-(-len(s) // block_size) for s in step) for step in sequences)
    runner.allocate(max(most, -(-config.parity.num_tokens // block_size)), block_size)
    # Loading takes some ranks longer than a step may.
    barrier(context.setup)
    units: list[UnitParity] = []
    has_reference = not job.has_random_weights or max(job.plan.tp_sizes) == 1
    if has_reference:
        limit = job.config.scheduler.max_num_seqs
        steps = [_record(runner, step, block_size, limit) for step in sequences]
        units = list(_units(job, runner, steps, config))
    units = sorted(gather(UnitParity, units, context.setup), key=_place)
    whole = compare_whole(job, runner, config.parity)
    failed = next((unit for unit in units if not unit.passed), None)
    fault = "" if whole.passed else whole.complaint()
    if failed:
        fault = _complaint(failed)
        fault += advice(config, runner.stage.dtype, context.device, cosine=failed.cosine)
    note = "" if has_reference else "layers not compared: random weights differ from cut to cut"
    return ParityReport(not fault, fault or note, tuple(units), whole)


def _place(unit: UnitParity) -> tuple[float, int]:
    """In the order of the model, so that what failed first is where the fault is."""
    ends = {EMBEDDING: -1.0, HEAD: math.inf}
    place = ends[unit.name] if unit.name in ends else float(unit.name.partition(".")[2])
    return place, unit.num_tokens


def _sequences(job: DecoderJob, num_tokens: int) -> list[list[int]]:
    """So many tokens as prompts that each fit into the model."""
    longest = job.plan.max_model_len
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(job.spec.config.vocab_size, (num_tokens,), generator=generator).tolist()
    return [ids[start : start + longest] for start in range(0, num_tokens, longest)]


def _record(
    runner: StageRunner, prompts: Sequence[Sequence[int]], block_size: int, max_num_seqs: int
) -> Step:
    """Run one step of all prompts on all stages; no more than `max_num_seqs` of them to the end."""
    scheduled, first = [], 0
    for index, prompt in enumerate(prompts):
        more = [0] if index >= max_num_seqs else []
        sequence = TokenSequence.of(Request(index, (*prompt, *more), 1))
        count = -(-len(prompt) // block_size)
        sequence.blocks = list(range(first, first + count))
        first += count
        scheduled.append(Scheduled.of(sequence, len(prompt)))
    inputs = lay_out(scheduled, block_size, runner.padding)
    assert runner.execute is not None
    compiled, recorder = runner.execute, Recorder(runner.execute, _states_of(runner))
    runner.execute = recorder
    output = runner.run(inputs)
    runner.execute = compiled
    logits = None if output is None else output.logits.to("cpu", copy=True)
    return Step(inputs, recorder.states, logits)


def _names(runner: StageRunner) -> list[str]:
    """The units of a stage that this rank judges."""
    stage, tp = runner.stage, runner.context.tp
    names = [f"layers.{index}" for index in stage.layer_indices]
    names = [EMBEDDING] * (stage.embed_tokens is not None) + names
    names += [HEAD] * (stage.lm_head is not None)
    return names[tp.rank :: tp.size]


def _states_of(runner: StageRunner) -> set[int]:
    """The states that go into these units, and that come out."""
    wanted: set[int] = set()
    for name in _names(runner):
        before, after = _places(name, runner)
        wanted |= {place for place in (before, after) if place is not None}
    return wanted


def _places(name: str, runner: StageRunner) -> tuple[int | None, int | None]:
    """Which state goes into a unit, and which comes out; None: none."""
    layers = runner.stage.layer_indices
    if name == EMBEDDING:
        return None, 0
    if name == HEAD:
        return len(layers), None
    place = int(name.partition(".")[2]) - layers.start
    return place, place + 1


def _units(
    job: DecoderJob, runner: StageRunner, steps: Sequence[Step], config: CompileConfig
) -> Iterator[UnitParity]:
    """This rank's share of its stage's units."""
    context = runner.context
    reference = Reference.of(job, context.device)
    narrow = runner.stage.dtype
    for name in _names(runner):
        weights = reference.weights(name)
        exact = reference.unit(name, weights, _WIDE[narrow])
        eager = reference.unit(name, weights, narrow)
        for step in steps:
            yield _judge(name, runner, step, exact, eager, config)


def _judge(
    name: str, runner: StageRunner, step: Step, exact: Unit, eager: Unit, config: CompileConfig
) -> UnitParity:
    bounds = config.parity
    device, wide, narrow = runner.context.device, exact.stage.dtype, eager.stage.dtype
    x, got = _ends(name, runner, step)
    batch = step.inputs.to(device)
    size = {"num_blocks": runner.num_blocks + 1, "block_size": runner.block_size}
    before = None if x is None else x.to(device)
    wanted = exact.run(batch, before, **size)
    with products_in_tf32(config.allow_tf32):
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
    gain, eager_gain = (gain_of(y, wanted, rounding=eps * stored) for y in (found, plain))
    # Written so that a number that is none fails.
    passed = cosine >= bounds.min_cosine
    floor = max(_FLOOR * eps, LEAST_ERROR)
    passed = passed and beyond <= max(bounds.max_error_ratio * eager_error, floor)
    passed = passed and abs(gain - 1) <= max(
        bounds.max_gain_error, bounds.max_error_ratio * abs(eager_gain - 1)
    )
    return UnitParity(
        name,
        step.inputs.num_rows,
        cosine=_known(cosine),
        error=_known(error),
        eager_error=_known(eager_error),
        gain=_known(gain),
        passed=passed,
    )


def _known(number: float) -> float:
    """JSON has no word for what is not a number."""
    return number if math.isfinite(number) else -1.0


def _ends(name: str, runner: StageRunner, step: Step) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What went into a unit of this stage, and what came out."""
    before, after = _places(name, runner)
    result = step.logits if after is None else step.states[after]
    assert result is not None, "only the last stage has a head"
    return None if before is None else step.states[before], result


def _complaint(unit: UnitParity) -> str:
    return (
        f"{unit.name} at {unit.num_tokens} tokens does not compute what the model computes: cosine "
        f"{unit.cosine:.6f}, gain {unit.gain:.4f}, error {unit.error:.3g} where the uncompiled "
        f"layer has {unit.eager_error:.3g}"
    )
