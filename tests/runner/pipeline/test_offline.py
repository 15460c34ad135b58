"""Items become results: sample by sample, or by windows that are joined again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graph_jobs
import numpy as np
import pytest
import torch
from graph_jobs import Case, make_job
from rank_pool import RankPool
from torch import nn

from parallel.errors import ConfigError
from runner.pipeline.offline import Inputs, outputs_of

ROI, OVERLAP = (6, 8, 4), 0.5
TILING = {"roi_size": list(ROI), "overlap": OVERLAP, "mode": "gaussian"}


class Volume(nn.Module):
    """Two convolutions over a window, so that its edges see zeros; and one of a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)
        self.head = nn.Conv3d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        early = torch.relu(self.first(x))
        output: torch.Tensor = self.head(torch.cat([early, self.second(early)], 1))
        return output


class Two(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.relu(a + b)


VOLUME = Case(Volume, [{"name": "volume", "shape": ["batch", 1, *ROI]}])
TWO = Case(Two, [{"name": n, "shape": ["batch", 1, 6, 6]} for n in "ab"])


def windowed(model: Callable[[torch.Tensor], torch.Tensor], volume: torch.Tensor) -> torch.Tensor:
    """The weighted mean of what a model makes of all windows of (1, X, Y, Z), which are large
    enough: written anew, in float64, from what the configuration says of tiling.
    """
    weight = torch.ones((), dtype=torch.float64)
    for size in ROI:
        x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
        weight = weight[..., None] * torch.exp(-((x / (0.125 * size)) ** 2) / 2)
    weight = weight.clamp(min=1e-3)
    total = torch.zeros(2, *volume.shape[1:], dtype=torch.float64)
    weights = torch.zeros(volume.shape[1:], dtype=torch.float64)
    starts = [
        sorted({*range(0, size - roi, int(roi * (1 - OVERLAP))), size - roi})
        for size, roi in zip(volume.shape[1:], ROI, strict=True)
    ]
    for corner in torch.cartesian_prod(*map(torch.tensor, starts)).tolist():
        place = tuple(slice(at, at + roi) for at, roi in zip(corner, ROI, strict=True))
        with torch.no_grad():
            total[:, *place] += model(volume[None, :, *place])[0].double() * weight
        weights[place] += weight
    return total / weights


@pytest.mark.dist
@pytest.mark.parametrize("tp_sizes", [[1], [1, 1]], ids=str)
@pytest.mark.parametrize("max_queue_size", [256, 4])
def test_volumes_by_windows(
    tp_sizes: list[int], max_queue_size: int, rank_pool: RankPool, tmp_path: Path
) -> None:
    """Sizes that windows do and do not divide; a queue that is shorter than what an item asks."""
    generator = np.random.default_rng(0)
    volumes = {
        f"v{index}": generator.standard_normal((1, *shape), dtype=np.float32)
        for index, shape in enumerate([(12, 8, 4), (13, 17, 9), (6, 9, 11)])
    }
    for name, volume in volumes.items():
        np.save(tmp_path / f"{name}.npy", volume)
    sections: dict[str, Any] = {
        "tiling": TILING,
        "scheduler": {"max_batch_size": 4, "max_queue_size": max_queue_size},
    }
    failed = rank_pool.run(
        graph_jobs.run_offline, tp_sizes, VOLUME, tmp_path, tmp_path.with_suffix(".out"), sections
    )[0]
    assert failed == {}
    for name, volume in volumes.items():
        found = np.load(tmp_path.with_suffix(".out") / f"{name}.npz")["output"]
        expected = windowed(VOLUME.module, torch.from_numpy(volume)).numpy()
        assert found.shape == (2, *volume.shape[1:])
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.dist
def test_a_bad_volume_does_not_stop_the_rest(rank_pool: RankPool, tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", np.ones((1, 6, 8, 4), dtype=np.float32))
    np.save(tmp_path / "flat.npy", np.ones((1, 6, 8), dtype=np.float32))
    np.save(tmp_path / "nothing.npy", np.full((1, 6, 8, 4), np.nan, dtype=np.float32))
    out = tmp_path.with_suffix(".out")
    failed = rank_pool.run(
        graph_jobs.run_offline, [1, 1], VOLUME, tmp_path, out, {"tiling": TILING}
    )[0]
    assert sorted(failed) == ["flat", "nothing"]
    assert "shape (1, 6, 8), the model takes (1, *, *, *)" in failed["flat"]
    lines = [json.loads(line) for line in (out / "errors.jsonl").open()]
    assert {line["item"]: line["error"] for line in lines} == failed
    assert [path.name for path in out.glob("*.npz")] == ["good.npz"]


def test_windows_that_no_input_takes_are_refused() -> None:
    job = make_job(VOLUME, [1], tiling={"roi_size": [6, 8, 5]})
    with pytest.raises(ConfigError, match=r"roi_size=\[6, 8, 5\] is in no bucket.*\[1, 6, 8, 4\]"):
        Inputs.of(job.config, job.plan)
    job = make_job(VOLUME, [1], tiling={"roi_size": [8, 4]})
    with pytest.raises(ConfigError, match="is in no bucket"):
        Inputs.of(job.config, job.plan)


def test_windows_of_two_inputs_are_refused() -> None:
    job = make_job(TWO, [1], tiling={"roi_size": [6, 6]})
    with pytest.raises(ConfigError, match="models of one input, this one has a, b"):
        Inputs.of(job.config, job.plan)


def test_dims_that_differ_between_buckets_are_left_open() -> None:
    job = make_job(graph_jobs.CASES["unet"], [1])
    (image,) = Inputs.of(job.config, job.plan).specs
    assert image.shape == (2, None, 16)
    (mask,) = outputs_of(job.plan)
    assert mask.shape == (None, None, None)
    assert [spec.shape for spec in outputs_of(make_job(VOLUME, [1]).plan)] == [(2, *ROI)]
