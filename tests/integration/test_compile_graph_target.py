"""`shardline compile --target` of tensor models: every segment is one engine of the real builder of
TensorRT-RTX, for a GPU that is not here.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_builds import assert_equal, make_model, run_here, samples
from typer.testing import CliRunner

from examples.ct.join_weights import write_weights as write_ct_weights
from examples.efficientnet.convert_weights import write_weights as write_efficientnet_weights
from runner.bundle.bundle import Bundle
from runner.cli.app import app

ROOT = Path(__file__).parents[2]
NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="of a host without a GPU")

EXAMPLES = {
    "examples/efficientnet/plan.yaml": ("efficientnet_lite0.safetensors", 2),
    "examples/ocr/plan.yaml": ("detect.onnx", 2),
    "examples/ocr/recognize.yaml": ("recognize.onnx", 6),
    "examples/ct/plan.yaml": ("ct_backbone.safetensors", 4),
}
"""Configuration -> a file of its model, and the number of its segments with batches of one."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the examples, from the packages that scripts/setup dev installs."""
    folder = tmp_path_factory.mktemp("models")
    write_efficientnet_weights(folder)
    write_ct_weights(folder)
    subprocess.run([sys.executable, ROOT / "examples/ocr/fetch", folder], check=True)
    return folder


def compile_for_target(plan: Path, out: Path, *more: str) -> dict[str, Any]:
    """What the command prints."""
    asked = ["compile", "--config", str(plan), "--output", str(out), "--target", "sm89", "--no-run"]
    done = CliRunner().invoke(app, [*asked, "--json", *more])
    assert done.exception is None, done.exception
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.timeout(180)
def test_a_net_of_two_stages_is_two_engines(tmp_path: Path) -> None:
    parallel = {"device": "auto", "pipeline_parallel_size": 2}
    compiling = {"backend": "tensorrt", "buckets": [2]}
    model = make_model(tmp_path / "model", "Net", parallel=parallel, compile=compiling)
    told = compile_for_target(model.plan, tmp_path / "out", "--set", "model.dims={height: [8]}")
    kinds = [(built["kind"], built["backend"]) for built in told["built"]]
    assert kinds == [("stage0.0", "tensorrt"), ("stage1.0", "tensorrt")]
    bundle = Bundle.open(tmp_path / "out")
    bundle.verify()
    assert bundle.manifest.parity["reason"] == "not compared: built for sm89 without a device"
    assert bundle.manifest.config["parallel"]["device"] == "cuda"
    assert bundle.manifest.host.compute_capability == "8.9"


@NEEDS_NO_GPU
@pytest.mark.timeout(180)
def test_its_graphs_and_weights_run_uncompiled_on_any_host(tmp_path: Path) -> None:
    compiling = {"backend": "tensorrt", "buckets": [2]}
    model = make_model(tmp_path / "model", "Net", parallel={"device": "cuda"}, compile=compiling)
    compile_for_target(model.plan, tmp_path / "out", "--set", "model.dims={height: [8]}")
    batches = samples("Net", 2, 1)
    found = run_here(tmp_path / "out", batches, accept_parity=True, on_mismatch="eager")
    assert_equal(found, model.module, batches)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("plan", EXAMPLES)
def test_every_stage_of_an_example_is_one_engine(
    plan: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    file, num_segments = EXAMPLES[plan]
    settings = (
        f"model.path={models / file}",
        "scheduler.max_batch_size=1",
        "scheduler.preferred_batch_size=null",
        "compile.buckets=[1]",
    )
    more = [part for given in settings for part in ("--set", given)]
    if "ct" in plan:
        more += ["--dtype", "bfloat16"]
    told = compile_for_target(Path(plan), tmp_path / "out", *more)
    assert [built["backend"] for built in told["built"]] == ["tensorrt"] * num_segments
    assert len({built["key"] for built in told["built"]}) == num_segments
    Bundle.open(tmp_path / "out").verify()
