"""The tensorrt backend where there is no GPU: what is installed, what it says, what it writes."""

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from parallel.errors import (
    ConfigError,
    IncompatibleError,
    IntegrityError,
    PreflightError,
    UnsupportedSegmentError,
)
from runner.compiler.backend import artefact_key
from runner.compiler.counter import count_compilations
from runner.compiler.segment import Segment, TensorSpec
from runner.compiler.tensorrt import BuildSettings, TensorRTBackend, check_import
from runner.compiler.tensorrt_install import Install, find_install
from runner.compiler.tensorrt_io import ENGINE_FILE, EngineIO, specs_of
from runner.compiler.tensorrt_runtime import EngineRuntime
from runner.compiler.tensorrt_target import (
    ORDER_FILE,
    BuildJob,
    TensorRTTargetBackend,
    run_builder,
)

ROOT = Path(__file__).parents[3]
SPEC = TensorSpec((4, 64), torch.bfloat16)


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256, bias=False)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        residual = residual + x
        gate, up = self.up(residual).split((128, 128), -1)
        return residual, self.down(nn.functional.silu(gate) * up)


class Function(nn.Module):
    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.function(*inputs)


def mlp() -> Segment:
    with torch.device("meta"):
        module = GatedMLP().to(SPEC.dtype)
    return Segment("mlp", module, (SPEC, SPEC))


def job(segment: Segment, folder: Path) -> BuildJob:
    folder.mkdir()
    return BuildJob(segment.kind, segment.export("cpu"), folder)


REFUSED: dict[str, tuple[Callable[..., object], str]] = {
    "no_converter": (lambda x: torch.kthvalue(x, 2)[0], "no converter for aten.kthvalue.default"),
    "two_of_them": (
        lambda x: torch.cumprod(torch.kthvalue(x, 2)[0], 0),
        "no converter for aten.cumprod.default, aten.kthvalue.default",
    ),
    "refused": (lambda x: x.int() @ x.int().T, "MATRIX_MULTIPLY"),
    "same_twice": (lambda x: (y := x + 1, y), "it returns one tensor twice"),
    "input_returned": (lambda x: (x, x + 1), "it returns an input as it is"),
    "same_after_lowering": (lambda x: (y := x + 1, y.to(x.dtype)), "it returns one tensor twice"),
}
"""Each is an engine short of an output, or a graph of several engines, if nobody looks."""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the folders that `outcomes` fills."""
    return tmp_path_factory.mktemp("desk")


@pytest.fixture(scope="module")
def outcomes(desk: Path) -> dict[str, str | None]:
    """What the builder says of each of `REFUSED`, and of a segment between them that it takes."""
    jobs = [
        job(Segment(name, Function(function), (SPEC,)), desk / name)
        for name, (function, _) in REFUSED.items()
    ]
    jobs.insert(1, job(mlp(), desk / "mlp"))
    errors = run_builder(jobs, "sm89", BuildSettings())
    return {one.kind: error for one, error in zip(jobs, errors, strict=True)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_one_engine_is_refused_by_name(
    name: str, outcomes: dict[str, str | None]
) -> None:
    message = outcomes[name]
    assert message is not None
    assert message.startswith(f"segment '{name}' cannot be compiled by the tensorrt backend: ")
    assert REFUSED[name][1] in message
    assert message.endswith("set compile.backend to inductor or auto")
    assert "\n" not in message


def test_a_target_without_the_dtype_is_refused(desk: Path) -> None:
    (error,) = run_builder([job(mlp(), desk / "sm75")], "sm75", BuildSettings())
    assert error is not None
    assert "Cannot compile for target(s) sm75" in error


def test_a_refusal_spoils_no_other_segment(outcomes: dict[str, str | None], desk: Path) -> None:
    assert outcomes["mlp"] is None
    assert [name for name in REFUSED if any((desk / name).iterdir())] == []


def test_an_artefact_describes_itself(outcomes: dict[str, str | None], desk: Path) -> None:
    assert outcomes["mlp"] is None
    assert {file.name for file in (desk / "mlp").iterdir()} == {ENGINE_FILE, "io.json"}
    assert (desk / "mlp" / ENGINE_FILE).stat().st_size > 0
    io = EngineIO.read(desk / "mlp")
    assert (io.flavour, io.tensorrt, io.target) == ("rtx", find_install().tensorrt, "sm89")
    assert io.takes == tuple(io.inputs.values()) == mlp().inputs
    assert io.outputs == {"output0": SPEC, "output1": SPEC}


def test_a_layer_that_needs_more_workspace_than_is_allowed_gets_it(tmp_path: Path) -> None:
    attention = Function(lambda x: torch.softmax(x @ x.T, -1) @ x)
    allowed = BuildSettings(workspace_bytes=1)
    jobs = [
        job(Segment("attention", attention, (SPEC,)), tmp_path / "needs"),
        job(Segment("refused", Function(REFUSED["refused"][0]), (SPEC,)), tmp_path / "refused"),
    ]
    error, other = run_builder(jobs, "sm89", allowed)
    assert error is None
    assert (tmp_path / "needs" / ENGINE_FILE).stat().st_size > 0
    assert other is not None
    assert "MATRIX_MULTIPLY" in other


def test_a_build_is_counted_and_leaves_no_other_trace(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    segment = mlp()
    program = segment.export("cpu")
    before = (warnings.showwarning, logging.getLogger().handlers[:], program.example_inputs)
    num_compilations = count_compilations()
    TensorRTTargetBackend("sm89").build(segment, program, tmp_path)
    assert count_compilations() == num_compilations + 1
    after = (warnings.showwarning, logging.getLogger().handlers[:], program.example_inputs)
    assert after == before
    assert "".join(capfd.readouterr()) == ""
    assert "torch_tensorrt" not in sys.modules


def test_the_first_refusal_is_raised(tmp_path: Path) -> None:
    segment = Segment("odd", Function(REFUSED["no_converter"][0]), (SPEC,))
    with pytest.raises(UnsupportedSegmentError, match=r"'odd'.*kthvalue"):
        TensorRTTargetBackend("sm89").build_all([job(segment, tmp_path / "odd")])


@pytest.mark.parametrize("target", ["sm90", "sm42", "h200", ""])
def test_a_target_that_rtx_does_not_build_for(target: str, tmp_path: Path) -> None:
    backend = TensorRTTargetBackend(target)
    for ask in (backend.fingerprint, lambda: backend.build_all([job(mlp(), tmp_path / "x")])):
        with pytest.raises(ConfigError, match=r"not one of sm75, sm80, sm86, sm89, .*that has it"):
            ask()


def test_what_is_built_for_a_target_is_not_loaded_by_it(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"'mlp'.* for sm89"):
        TensorRTTargetBackend("sm89").load(tmp_path, mlp())


def test_a_key_depends_on_target_and_settings() -> None:
    backends = [
        TensorRTTargetBackend("sm89"),
        TensorRTTargetBackend("sm80"),
        TensorRTTargetBackend("sm89", settings=BuildSettings(optimization_level=5)),
        TensorRTTargetBackend("sm89", settings=BuildSettings(workspace_bytes=0)),
    ]
    assert len({artefact_key("digest", backend) for backend in backends}) == len(backends)
    assert artefact_key("digest", backends[0]) == artefact_key(
        "digest", TensorRTTargetBackend("sm89")
    )


def install(folder: Path, *packages: str) -> None:
    for name in packages:
        info = folder / f"{name.replace('-', '_')}-2.13.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.13.0\n")


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        ((), r"not installed; pip install 'shardline\[rtx\]' .*'shardline\[tensorrt\]'"),
        (("torch-tensorrt", "torch-tensorrt-rtx"), "both installed .*pip uninstall"),
    ],
)
def test_neither_flavour_or_both(
    packages: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, *packages)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(PreflightError, match=message):
        find_install()


def test_torch_tensorrt_without_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "torch-tensorrt")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(PreflightError, match=r"module tensorrt does not import .*pip install"):
        find_install()


def test_the_standard_flavour_builds_for_no_other_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TensorRTTargetBackend("sm89")
    monkeypatch.setattr(
        "runner.compiler.tensorrt_target.find_install",
        lambda: Install("standard", "2.13.0", "10.16.1"),
    )
    with pytest.raises(ConfigError, match="sm89 needs torch-tensorrt-rtx"):
        backend.fingerprint()


def test_torch_tensorrt_is_imported_without_a_word_of_what_nobody_asked_for(tmp_path: Path) -> None:
    """A builder with nothing to build, since importing needs its answers in a GPU's place."""
    (tmp_path / ORDER_FILE).write_text('{"target": "sm89", "settings": {}, "jobs": []}')
    program = [sys.executable, "-m", "runner.compiler.target_builder", str(tmp_path)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_rank_on_the_cpu_is_told_so() -> None:
    with pytest.raises(PreflightError, match=r"needs a GPU, .* runs on cpu; .*inductor or eager"):
        artefact_key("digest", TensorRTBackend(torch.device("cpu")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it imports where there is a driver")
def test_a_host_without_a_driver_is_told_so() -> None:
    told = r"does not import on this host .*compile\.backend"
    with pytest.raises(PreflightError, match=told):
        check_import()
    for checks in (True, False):
        with pytest.raises(PreflightError, match=told):
            TensorRTBackend(torch.device("cuda", 0), checks=checks).prepare()


def test_a_user_without_a_name_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 3)
    with pytest.raises(PreflightError, match="user id 2147483645 has no line in /etc/passwd"):
        TensorRTBackend(torch.device("cuda", 0), checks=False).prepare()


def test_specs_leave_constants_out() -> None:
    program = Segment("c", Function(lambda x: x * torch.tensor(3.0)), (SPEC,)).export("cpu")
    assert specs_of(program) == ({"inputs_0": SPEC}, {"output0": SPEC})


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"flavour": "lean", "tensorrt": "1", "target": "sm89", "takes": [], "inputs": [],'
        ' "outputs": []}',
        '{"flavour": "rtx", "tensorrt": "1", "target": "sm89", "takes": [], "inputs": [1],'
        ' "outputs": []}',
        '{"flavour": "rtx", "tensorrt": "1", "target": "sm89", "takes": [], "outputs": [],'
        ' "inputs": [{"name": "x", "shape": [1], "dtype": "nn"}]}',
    ],
)
def test_a_spoilt_description_is_an_integrity_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "io.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"io\.json"):
        EngineIO.read(tmp_path)


def test_an_engine_of_another_segment_is_refused_before_it_is_read(tmp_path: Path) -> None:
    io = EngineIO("rtx", "1.5.0.114", "sm89", (SPEC,), {"inputs_0": SPEC}, {"output0": SPEC})
    io.write(tmp_path)
    with pytest.raises(IncompatibleError, match=r"takes bfloat16\[4, 64\]; segment 'mlp'"):
        EngineRuntime(torch.device("cpu")).load(tmp_path, mlp())
