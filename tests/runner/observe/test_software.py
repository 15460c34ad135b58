"""Installed packages: the torch series, CUDA builds and the two flavours of Torch-TensorRT."""

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from runner.observe.finding import Finding
from runner.observe.software import (
    TORCH_SERIES,
    Software,
    distributions_by_name,
    find_distributions,
    find_flavour,
    find_lacking,
    judge_extras,
    judge_nccl,
    judge_torch,
    judge_torch_tensorrt,
    parse_series,
    read_software,
)

STANDARD = {"torch-tensorrt": "2.13.0", "tensorrt": "10.16.0", "tensorrt-cu13": "10.16.0"}
RTX = {"torch-tensorrt-rtx": "2.13.0", "tensorrt-rtx": "1.5.0.114"}
NAMED_SERIES = ".".join(map(str, TORCH_SERIES))


def judged(distributions: dict[str, str], version: str = "2.13.0") -> Finding:
    """On a host with a GPU."""
    return judge_torch_tensorrt(distributions, torch_version=version, has_gpu=True)


def install(site: Path, name: str, version: str, *requirements: str) -> None:
    """Lay down the metadata that an installed distribution leaves."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


def test_the_series_is_the_one_that_the_project_pins() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert f"torch=={NAMED_SERIES}.*" in project["dependencies"]


def test_this_interpreter_is_read() -> None:
    software = read_software()
    assert software.torch_version == torch.__version__
    assert software.torch_cuda == torch.version.cuda
    assert (software.num_torch_gpus is None) == (torch.version.cuda is None)
    assert "torch_tensorrt" not in sys.modules


def test_distributions_are_found_by_metadata_and_normalised(tmp_path: Path) -> None:
    install(tmp_path, "Torch_TensorRT-RTX", "2.13.0")
    install(tmp_path, "tensorrt.rtx", "1.5.0")
    install(tmp_path, "tensorboard", "2.0")
    (tmp_path / "half_removed-1.0.dist-info").mkdir()
    installed = distributions_by_name(importlib.metadata.distributions(path=[str(tmp_path)]))
    assert find_distributions(installed) == {
        "torch-tensorrt-rtx": "2.13.0",
        "tensorrt-rtx": "1.5.0",
    }


def test_what_an_extra_lacks_is_named(tmp_path: Path) -> None:
    install(
        tmp_path,
        "shardline",
        "0.1.0",
        "typer>=0.15",
        'fastapi>=0.115; extra == "serve"',
        'uvicorn>=0.30; python_version > "3" and extra == "serve"',
        'onnx2torch>=1.5; extra == "onnx"',
        'ruff>=0.8; extra == "dev"',
    )
    install(tmp_path, "Fast_API", "0.165.0")
    install(tmp_path, "onnx2torch", "1.5.15")
    path = [str(tmp_path)]
    lacking = find_lacking(distributions_by_name(importlib.metadata.distributions(path=path)))
    assert lacking["serve"] == ("fastapi", "uvicorn")
    assert lacking["onnx"] == ()
    assert "dev" not in lacking
    install(tmp_path, "FastAPI", "0.165.0")
    lacking = find_lacking(distributions_by_name(importlib.metadata.distributions(path=path)))
    assert lacking["serve"] == ("uvicorn",)
    found = judge_extras(lacking)
    assert found.status == "absent"
    assert found.detail.endswith("; not there: serve (lacks uvicorn)")
    assert found.fix == "where they are wanted: pip install 'shardline[serve]'"


def test_extras_that_are_whole_and_a_shardline_that_is_not_installed() -> None:
    assert judge_extras({"serve": (), "onnx": ()}).detail == "serve, onnx"
    assert judge_extras(find_lacking({})).detail == "shardline is not installed"


@pytest.mark.parametrize(
    ("distributions", "flavour"),
    [
        ({}, "none"),
        ({"tensorrt": "10.16.0"}, "none"),
        (STANDARD, "standard"),
        (RTX, "rtx"),
        ({**STANDARD, **RTX}, "both"),
    ],
)
def test_flavours(distributions: dict[str, str], flavour: str) -> None:
    assert find_flavour(distributions) == flavour


def test_one_whole_flavour_is_ok_and_none_is_absent() -> None:
    for distributions in (STANDARD, RTX):
        assert judged(distributions, "2.13.1+cu130").status == "ok"
    none = judged({})
    assert (none.status, none.fix) == ("absent", "pip install 'shardline[rtx]'")
    assert judge_torch_tensorrt({}, torch_version="2.13.0", has_gpu=False).fix is None


def test_both_flavours_are_an_error() -> None:
    both = judged({**STANDARD, **RTX})
    assert both.status == "error"
    assert "pip uninstall torch-tensorrt torch-tensorrt-rtx" in (both.fix or "")


def test_a_flavour_of_another_series_or_without_its_library() -> None:
    older = judged({**RTX, "torch-tensorrt-rtx": "2.11.0"})
    assert older.status == "error"
    assert older.fix == "pip install 'torch-tensorrt-rtx==2.13.*'"
    # The other flavour's library does not do.
    mixed = {"torch-tensorrt-rtx": "2.13.0", "tensorrt-cu13": "10.16.0"}
    alone = judged(mixed)
    assert (alone.status, alone.fix) == ("error", "pip install tensorrt-rtx")


def test_torch_series_and_build() -> None:
    cpu = Software(torch_version=f"{NAMED_SERIES}.0+cpu")
    assert judge_torch(cpu, has_gpu=False).status == "ok"
    wasted = judge_torch(cpu, has_gpu=True)
    assert wasted.status == "error"
    assert "without CUDA" in wasted.detail
    cuda = Software(torch_version=f"{NAMED_SERIES}.0", torch_cuda="13.0")
    assert judge_torch(cuda, has_gpu=True).status == "ok"
    older = judge_torch(Software(torch_version="2.11.0", torch_cuda="13.0"), has_gpu=True)
    assert older.status == "error"
    assert f"torch=={NAMED_SERIES}.*" in (older.fix or "")


def test_torch_that_does_not_import() -> None:
    finding = judge_torch(Software(torch_error="libcudart.so.13: cannot open"), has_gpu=True)
    assert finding.status == "error"
    assert "libcudart.so.13" in finding.detail


def test_nccl_is_needed_between_gpus() -> None:
    assert judge_nccl("2.27.5", num_gpus=8).status == "ok"
    assert judge_nccl(None, num_gpus=1).status == "absent"
    assert judge_nccl(None, num_gpus=2).status == "error"


def test_versions_are_compared_as_numbers() -> None:
    assert parse_series("2.9.1") < parse_series("2.13.0a0+git12")
    with pytest.raises(ValueError, match="nightly"):
        parse_series("nightly")
