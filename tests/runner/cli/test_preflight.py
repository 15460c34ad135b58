"""What a command asks preflight to look for, before it looks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parallel.errors import PreflightError
from runner.bundle.bundle import Bundle
from runner.cli import preflight
from runner.config.load import load
from runner.observe.preflight import Demand


@pytest.fixture
def demands(monkeypatch: pytest.MonkeyPatch) -> list[Demand]:
    asked: list[Demand] = []
    monkeypatch.setenv("SHARDLINE_PREFLIGHT", "1")
    monkeypatch.setattr(
        "runner.observe.preflight.inspect_host", lambda demand: asked.append(demand) or []
    )
    return asked


@pytest.mark.parametrize(
    ("overrides", "compiles", "expected"),
    [
        ([], False, ("expected", "parallel.device: auto", "--device cpu")),
        (["parallel.device=cpu", "compile.backend=tensorrt"], True, ("none", "", None)),
        (["parallel.device=cuda"], False, ("needed", "parallel.device: cuda", "--device cpu")),
        (
            ["compile.backend=tensorrt"],
            False,
            (
                "needed",
                "compile.backend: tensorrt",
                "--device cpu, and another compile.backend",
            ),
        ),
        ([], True, ("needed", "compile.backend: tensorrt", "--device cpu, and another")),
        (["compile.backend=inductor"], True, ("expected", "parallel.device: auto", "--device")),
    ],
    ids=["auto", "cpu", "cuda", "tensorrt", "compile", "compile-inductor"],
)
def test_a_model(
    demands: list[Demand],
    tmp_path: Path,
    overrides: list[str],
    compiles: bool,
    expected: tuple[str, str, str | None],
) -> None:
    settings = [f"model.path={tmp_path}", "parallel.tensor_parallel_size=4", *overrides]
    preflight.check_model(load(None, overrides=settings), compiles=compiles)
    (demand,) = demands
    gpus, gpus_for, without = expected
    assert (demand.num_ranks, demand.gpus, demand.gpus_for) == (4, gpus, gpus_for)
    assert (demand.without_gpus or "").startswith(without or "")


@pytest.mark.parametrize(
    ("device", "backends", "on_mismatch", "expected"),
    [
        ("cuda", {"tensorrt"}, "fail", "needed"),
        ("cuda", {"tensorrt", "eager"}, "rebuild", "needed"),
        ("cuda", {"inductor"}, "rebuild", "taken"),
        ("cuda", {"tensorrt"}, "eager", "taken"),
        ("cpu", {"inductor"}, "fail", "none"),
    ],
)
def test_a_bundle(
    demands: list[Demand],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    backends: set[str],
    on_mismatch: str,
    expected: str,
) -> None:
    verified: list[bool] = []
    manifest = SimpleNamespace(host=SimpleNamespace(device=device), backends=backends)
    bundle: Any = SimpleNamespace(
        path=Path("/bundle"),
        plan=SimpleNamespace(ranks=[0, 1]),
        manifest=manifest,
        verify=lambda: verified.append(True),
    )
    monkeypatch.setattr(Bundle, "open", lambda _: bundle)
    preflight.check_bundle(Path("/bundle"), on_mismatch=on_mismatch)
    (demand,) = demands
    assert (demand.num_ranks, demand.gpus) == (2, expected)
    # --device is refused with --bundle.
    assert demand.without_gpus == ("--on-mismatch eager" if expected == "needed" else None)
    assert verified


def test_a_socket_whose_folder_is_absent(
    demands: list[Demand], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preflight.check_socket(None)
    preflight.check_socket(str(tmp_path / "s"))
    with pytest.raises(PreflightError, match=r"1 error \(socket_dir\)"):
        preflight.check_socket(str(tmp_path / "absent" / "s"))
    said = capsys.readouterr().err
    assert said.startswith(f"shardline: preflight error, socket_dir: {tmp_path / 'absent'} does")
    assert not demands


def test_nobody_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SHARDLINE_PREFLIGHT", raising=False)
    preflight.check_socket(str(tmp_path / "absent" / "s"))
