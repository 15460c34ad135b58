"""Write synthetic scenes for `shardline run`, one .npy file each, and their labels beside them.

    python -m examples.lidar.make_scenes models/lidar --num-scenes 8

points/scene-000.npy, ... are (4, num_points) float32: x, y, z in metres and the intensity.
labels/scene-000.npy, ... are (num_points,) int64, an index of `scenes.CLASSES`.
"""

import argparse
from pathlib import Path

import numpy as np

from examples.lidar.scenes import make_scene

FIRST_SEED = 2_000_000
"""Beyond the seeds of training and of the recorded scores."""


def main() -> None:
    """Make and write each scene."""
    options = _options()
    points, labels = options.folder / "points", options.folder / "labels"
    points.mkdir(parents=True, exist_ok=True)
    labels.mkdir(exist_ok=True)
    for index in range(options.num_scenes):
        scene = make_scene(options.seed + index, num_points=options.num_points)
        np.save(points / f"scene-{index:03}.npy", scene.points)
        np.save(labels / f"scene-{index:03}.npy", scene.labels)
    print(f"wrote {options.num_scenes} scenes to {points} and their labels to {labels}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to put the files; made if absent")
    parser.add_argument("--num-scenes", type=int, default=8)
    parser.add_argument("--num-points", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="of the first scene")
    return parser.parse_args()


if __name__ == "__main__":
    main()
