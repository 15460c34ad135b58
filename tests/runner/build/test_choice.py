"""`auto` takes the fastest backend that computes what the segment computes, and says why."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from bundles import make_plan_of
from torch import nn

from parallel.errors import PreflightError, UnsupportedSegmentError
from runner.build.choice import NAMED, Chooser
from runner.build.measure import Samples, error_of, microseconds
from runner.build.worklist import Use, Work
from runner.bundle.builder import BundleBuilder
from runner.compiler.backend import Backend, Compiled
from runner.compiler.backends import AUTO, Backends
from runner.compiler.eager import EagerBackend
from runner.compiler.segment import Segment, TensorSpec

CPU = torch.device("cpu")


class Gate(nn.Module):
    """A small segment of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(24, 16, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.weight.t())


@dataclass
class Wrong:
    """A backend that is fast and a little off."""

    factor: float
    name: str = "wrong"

    def fingerprint(self) -> Mapping[str, str]:
        return {}

    def build(self, segment: Segment, program: torch.export.ExportedProgram, folder: Path) -> None:
        del segment, program
        (folder / "wrong.bin").write_bytes(b"wrong")

    def load(self, folder: Path, segment: Segment) -> Compiled:
        del folder
        run = segment.function()
        return lambda *inputs: tuple(output * self.factor for output in run(*inputs))


class Incapable(Wrong):
    """A backend that lacks an operator."""

    def build(self, segment: Segment, program: torch.export.ExportedProgram, folder: Path) -> None:
        del segment, program, folder
        raise UnsupportedSegmentError("relu is too much")


@pytest.fixture
def work() -> Work:
    segment = Segment("gate", Gate(), (TensorSpec((4, 16), torch.float32),))
    return Work(segment, 4, [Use(0, "gate", 4), Use(2, "gate", 4)])


@pytest.fixture
def builder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[BundleBuilder]:
    plan = make_plan_of(checkpoint("llama"))
    with BundleBuilder.lead(tmp_path / "out", plan) as builder:
        yield builder


def test_auto_measures_what_runs_here_and_says_what_does_not(
    work: Work, builder: BundleBuilder
) -> None:
    backends = Backends(CPU)
    chooser = Chooser([backends[name] for name in AUTO], builder, CPU, 4.0)
    built = chooser.build(work)
    tensorrt, inductor, eager = built.candidates
    assert (tensorrt.backend, tensorrt.key, tensorrt.microseconds) == ("tensorrt", "", None)
    assert "needs a GPU" in tensorrt.note
    for candidate in (inductor, eager):
        assert (candidate.parity, candidate.note) == (True, "")
        assert candidate.microseconds is not None
        assert candidate.microseconds > 0
    fastest = min((inductor, eager), key=lambda c: c.microseconds or 0)
    assert (built.backend, built.key) == (fastest.backend, fastest.key)
    assert built.reason == "fastest of those that pass"
    assert built.seconds > 0
    assert (built.kind, built.num_rows, built.num_ops > 0) == ("gate", 4, True)
    assert [choice.rank for choice in built.choices] == [0, 2]
    assert {choice.chosen for choice in built.choices} == {fastest.backend}
    again = chooser.build(work)
    assert again.seconds == 0.0
    assert {c.key for c in again.candidates} == {c.key for c in built.candidates}


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_candidate_that_computes_something_else_is_out(
    factor: float, work: Work, builder: BundleBuilder
) -> None:
    built = Chooser([Wrong(factor), EagerBackend()], builder, CPU, 4.0).build(work)
    wrong, eager = built.candidates
    assert (wrong.parity, wrong.microseconds) == (False, None)
    assert wrong.note.startswith("error ")
    assert wrong.note.endswith(" times that of eager")
    assert built.backend == eager.backend == "eager"
    assert eager.parity is True


class Coarse(nn.Module):
    """An MLP whose products take their factors rounded to some bits, as tensor cores do."""

    def __init__(self, bits: int | None) -> None:
        super().__init__()
        self.bits = bits
        self.up = nn.Parameter(torch.empty(704, 256, device="meta"))
        self.down = nn.Parameter(torch.empty(256, 704, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(nn.functional.silu(self.product(x, self.up)), self.down)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.bits is not None:
            x, weight = _rounded(x, self.bits), _rounded(weight, self.bits)
        return x @ weight.t()


def _rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    mantissa, exponent = x.frexp()
    return torch.ldexp((mantissa * 2**bits).round(), exponent - bits)


@pytest.mark.parametrize("rows", [1, 7, 256])
def test_products_in_float32_may_be_as_coarse_as_those_of_tensorrt_but_not_as_tf32(
    rows: int,
) -> None:
    """TF32 has 11 bits, the leading one included."""
    activations = (TensorSpec((rows, 256), torch.float32),)
    segments = {bits: Segment("mlp", Coarse(bits), activations) for bits in (None, 11, 14)}
    samples = Samples.draw(segments[None], CPU)
    of_tf32, finer = (samples.error_ratio(segments[bits].function()) for bits in (11, 14))
    assert of_tf32 > 4
    allowing = Samples.draw(segments[None], CPU, allow_tf32=True)
    assert allowing.error_ratio(segments[11].function()) == pytest.approx(1, abs=0.05)
    # Two products that are each off by 4e-5 of their norm.
    assert 0.5 < finer < 4


def test_a_candidate_that_lacks_an_operator_is_out(work: Work, builder: BundleBuilder) -> None:
    built = Chooser([Incapable(1.0), EagerBackend()], builder, CPU, 4.0).build(work)
    assert built.candidates[0].note == "relu is too much"
    assert built.candidates[0].key == ""
    assert built.backend == "eager"


def test_a_segment_that_no_candidate_computes_is_an_error(
    work: Work, builder: BundleBuilder
) -> None:
    chooser = Chooser([Wrong(2.0), Incapable(1.0, "incapable")], builder, CPU, 4.0)
    told = r"gate: no backend can run it \(wrong: error .*; incapable: relu is too much\)"
    with pytest.raises(UnsupportedSegmentError, match=told):
        chooser.build(work)


def test_a_backend_that_was_named_is_the_only_one(work: Work, builder: BundleBuilder) -> None:
    built = Chooser([EagerBackend()], builder, CPU, 4.0).build(work)
    (candidate,) = built.candidates
    assert (candidate.microseconds, candidate.parity) == (None, None)
    assert built.reason == NAMED


@pytest.mark.parametrize(
    ("backend", "error"),
    [(Incapable(1.0), UnsupportedSegmentError), (Backends(CPU)["tensorrt"], PreflightError)],
)
def test_what_a_named_backend_cannot_do_is_an_error(
    backend: Backend, error: type[Exception], work: Work, builder: BundleBuilder
) -> None:
    with pytest.raises(error):
        Chooser([backend], builder, CPU, 4.0).build(work)
    assert not any((builder.folder / "artefacts").glob("*"))


def test_samples_are_the_same_in_every_run_and_more_than_a_cache_holds(work: Work) -> None:
    one, other = (Samples.draw(work.segment, CPU) for _ in range(2))
    assert len(one.inputs) > 2
    assert all(torch.equal(a, b) for a, b in zip(one.inputs[1], other.inputs[1], strict=True))
    assert not torch.equal(one.inputs[0][0], one.inputs[1][0])
    assert [tuple(x.shape) for x in one.inputs[0]] == [(4, 16), (24, 16)]
    assert one.exact[0].dtype == torch.float64
    assert one.error_ratio(work.segment.function()) <= 1
    exact = one.exact[0]
    error = 0.01 * (exact.abs().max() / exact.pow(2).mean().sqrt()).item()
    found = one.error_ratio(Wrong(1.01).load(Path(), work.segment))
    assert found == pytest.approx(error / one.eager_error, rel=0.01)
    assert microseconds(work.segment.function(), one.inputs) > 0


def test_the_error_is_relative_to_each_outputs_own_size() -> None:
    exact = (torch.full((4,), 100.0), torch.full((2, 2), 0.5))
    found = (torch.tensor([100.0, 101.0, 100.0, 99.5]), torch.full((2, 2), 0.51))
    assert error_of(found, exact) == pytest.approx(0.02)


@pytest.mark.parametrize("place", [0, 1])
def test_an_output_that_is_not_a_number_is_no_small_error(place: int) -> None:
    exact = (torch.ones(4), torch.ones(2))
    found = [tensor.clone() for tensor in exact]
    found[place][1] = float("nan")
    assert error_of(tuple(found), exact) == float("inf")
