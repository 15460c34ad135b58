"""`inspect` of a tensor model's bundle: its modules, shapes and artefacts as text."""

from pathlib import Path

import pytest
import yaml
from bundles import EAGER, make_manifest, write_artefact
from typer.testing import CliRunner

from runner.bundle.builder import BundleBuilder
from runner.bundle.manifest import Artefact, Candidate, Choice
from runner.cli.app import app
from runner.config.load import load
from runner.graph_planning import GraphJob

SUPPORT = Path(__file__).parents[2] / "support"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Of a U-Net in two stages; its artefact is eager, so it holds no file."""
    model = {"path": str(tmp_path), "factory": "graph_models:UNet", "factory_path": str(SUPPORT)}
    inputs = [{"name": "image", "shape": ["batch", 2, 32, 32]}]
    values = {
        "version": 1,
        "model": model | {"load_format": "dummy", "inputs": inputs},
        "security": {"factories": ["graph_models:UNet"]},
        "parallel": {"device": "cpu", "split_points": ["up"]},
        "scheduler": {"max_batch_size": 2},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    plan = GraphJob.prepare(load(tmp_path / "plan.yaml").config).plan
    candidates = (Candidate("eager", EAGER, None, None, ""),)
    manifest = make_manifest(
        tmp_path,
        plan,  # type: ignore[arg-type]
        artefacts={EAGER: Artefact("eager", "stage0.0", 2)},
        uses=({"stage0.0": {2: EAGER}}, {"stage1.0": {2: EAGER}}),
        choices=(Choice("stage0.0", 2, 0, candidates, "eager", "the only one"),),
    )
    with BundleBuilder.lead(tmp_path / "bundle", plan) as builder:
        write_artefact(builder, EAGER)
        builder.publish(manifest, report={})
    return tmp_path / "bundle"


def test_a_tensor_models_bundle_tells_modules_shapes_and_samples(bundle: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(bundle)])
    assert result.exception is None, result.exception
    lines = result.stdout.splitlines()
    assert lines[0].startswith("graph_models:UNet, float32, 2 stages, 2 ranks, 2 buckets, plan ")
    rows = [line.split() for line in lines]
    held = [" ".join(row[3:6]) for row in rows if row[:3] in (["0", "0", "0"], ["1", "1", "0"])]
    assert held == ["down.0.0 .. (root)", "up.0.0 .. head"]
    assert "2 buckets: image float32 [1|2, 2, 32, 32]; the first dim counts samples" in lines
    assert "Outputs: output float32 [2, 3, 32, 32]" in lines
    titles = [row[:2] for row in rows if row[:1] == ["segment"]]
    assert titles == [["segment", "samples"]] * 2
    assert any(row[:4] == ["stage1.0", "2", "eager", "1"] for row in rows)
    assert any(row[:4] == ["stage0.0", "2", "0", "eager"] for row in rows)
