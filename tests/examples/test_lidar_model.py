"""The LiDAR example: its weights fit, classify fresh scenes, and its module traces."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from examples.lidar.make_scenes import FIRST_SEED
from examples.lidar.pointnet import PointNet, segmenter
from examples.lidar.scenes import CAR, CLASSES, GROUND, POLE, SENSOR_HEIGHT_M, Scene, make_scene
from examples.lidar.scores import score, score_height, score_majority, score_model
from examples.lidar.shapes import Box, Cylinder, Ellipsoid, Plane
from examples.lidar.train import FIRST_HELD_OUT_SEED, NUM_HELD_OUT, WEIGHTS, train

ROOT = Path(__file__).parents[2]
MIN_MEAN_IOU = 0.85


@pytest.fixture(scope="module")
def model() -> PointNet:
    with torch.device("meta"):
        module = segmenter()
    module.load_state_dict(load_file(WEIGHTS), strict=True, assign=True)
    return module


@pytest.fixture(scope="module")
def fresh() -> list[Scene]:
    assert FIRST_SEED > FIRST_HELD_OUT_SEED + NUM_HELD_OUT
    return [make_scene(FIRST_SEED + index) for index in range(12)]


def test_fresh_scenes_are_classified(model: PointNet, fresh: list[Scene]) -> None:
    scores = score_model(model, fresh)
    assert scores.mean_iou > MIN_MEAN_IOU
    assert min(scores.iou.values()) > 0.5
    assert score_majority(fresh).mean_iou < 0.1
    assert score_height(fresh).mean_iou < 0.35


def test_the_file_says_what_the_weights_score(model: PointNet, fresh: list[Scene]) -> None:
    with safe_open(WEIGHTS, "pt") as file:
        notes = file.metadata()
    scores = score_model(model, fresh)
    assert float(notes["accuracy"]) == pytest.approx(scores.accuracy, abs=0.01)
    assert float(notes["mean_iou"]) == pytest.approx(scores.mean_iou, abs=0.03)
    assert WEIGHTS.stat().st_size < 2e6


@pytest.mark.parametrize("batch", [1, 4])
def test_it_traces_at_fixed_shapes(model: PointNet, fresh: list[Scene], batch: int) -> None:
    points = torch.from_numpy(np.stack([scene.points for scene in fresh[:batch]]))
    program = torch.export.export(model, (points,), strict=False).run_decompositions({})
    with torch.inference_mode():
        expected = model(points)
        assert expected.shape == (batch, len(CLASSES), 4096)
        torch.testing.assert_close(program.module()(points), expected)


def test_the_order_of_points_and_the_rest_of_the_batch_do_not_matter(
    model: PointNet, fresh: list[Scene]
) -> None:
    points = torch.from_numpy(np.stack([scene.points for scene in fresh[:2]]))
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(points)[:1, :, order]
        torch.testing.assert_close(model(points[:1, :, order]), expected, atol=1e-4, rtol=1e-4)


def test_training_repeats() -> None:
    scenes = [make_scene(seed, num_points=256) for seed in range(4)]
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(train(scenes, steps=3, batch_size=2, num_points=128).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_a_scene_follows_from_its_seed(fresh: list[Scene]) -> None:
    again, other = make_scene(FIRST_SEED), make_scene(FIRST_SEED + 1)
    assert np.array_equal(again.points, fresh[0].points)
    assert np.array_equal(again.labels, fresh[0].labels)
    assert not np.array_equal(other.points, again.points)
    assert set(np.concatenate([scene.labels for scene in fresh])) == set(range(len(CLASSES)))


def test_labels_lie_where_their_things_are(fresh: list[Scene]) -> None:
    points = np.concatenate([scene.points for scene in fresh], axis=1)
    labels = np.concatenate([scene.labels for scene in fresh])
    height = points[2] + SENSOR_HEIGHT_M
    assert np.abs(np.median(height[labels == GROUND])) < 0.1
    assert 0.3 < np.median(height[labels == CAR]) < 1.5
    assert height[labels == CAR].max() < 2.2
    assert height[labels == POLE].max() > 4


def test_rays_meet_shapes_where_geometry_says() -> None:
    ahead, down, up = np.eye(3)[0], np.array([0.6, 0.0, -0.8]), np.array([0.0, 0.0, 1.0])
    rays = np.stack([ahead, down, up, -ahead])
    inf = np.inf
    assert Plane(-1.6).hit(rays) == pytest.approx([inf, 2.0, inf, inf])
    assert Box((10, 0, 0), (2, 4, 6)).hit(rays) == pytest.approx([9, inf, inf, inf])
    assert Box((10, 0, 0), (2, 4, 6), np.pi / 2).hit(rays) == pytest.approx([8, inf, inf, inf])
    assert Cylinder(5, 0, 0.5, -1, 1).hit(rays) == pytest.approx([4.5, inf, inf, inf])
    assert Cylinder(5, 0, 0.5, 1, 2).hit(rays) == pytest.approx([inf] * 4)
    assert Ellipsoid((0, 0, 7), (1, 1, 3)).hit(rays) == pytest.approx([inf, inf, 4, inf])


def test_scores_of_a_small_case() -> None:
    truth, answers = np.array([0, 0, 0, 1, 3]), np.array([0, 0, 1, 1, 0])
    scores = score([(truth, answers)])
    assert scores.accuracy == pytest.approx(3 / 5)
    assert scores.iou == pytest.approx(
        {"ground": 2 / 4, "building": 1 / 2, "pole": 0, "car": 0, "vegetation": 0}
    )
    assert scores.mean_iou == pytest.approx(0.2)


def test_scenes_are_written_for_a_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.lidar.make_scenes", str(tmp_path)]
    subprocess.run([*command, "--num-scenes", "2"], check=True, cwd=ROOT)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.npy"))
    names = ("scene-000.npy", "scene-001.npy")
    assert files == [f"{folder}/{name}" for folder in ("labels", "points") for name in names]
    points = np.load(tmp_path / "points" / "scene-001.npy")
    assert points.dtype == np.float32
    assert np.array_equal(points, make_scene(FIRST_SEED + 1).points)
