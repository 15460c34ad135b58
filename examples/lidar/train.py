"""Train the PointNet on synthetic scenes and write pointnet.safetensors, with its scores on others.

    OMP_NUM_THREADS=1 python -m examples.lidar.train

One thread of a CPU, about six minutes. The same seed gives the same file with the same torch on the
same machine.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from examples.lidar.pointnet import PointNet, segmenter
from examples.lidar.scenes import CLASSES, Scene, make_scene
from examples.lidar.scores import Scores, score_height, score_majority, score_model

WEIGHTS = Path(__file__).parent / "pointnet.safetensors"
FIRST_HELD_OUT_SEED = 1_000_000
NUM_HELD_OUT = 40


def main() -> None:
    """Train, score, write."""
    options = _options()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    scenes = [make_scene(seed) for seed in range(options.scenes)]
    print(f"made {len(scenes)} scenes in {time.monotonic() - started:.0f} s", flush=True)
    model = train(scenes, steps=options.steps, batch_size=options.batch_size)
    seconds = time.monotonic() - started
    held_out = [make_scene(FIRST_HELD_OUT_SEED + i) for i in range(NUM_HELD_OUT)]
    notes = _notes(score_model(model, held_out), held_out)
    notes |= {"training": f"{options.scenes} scenes, {options.steps} steps, seed {options.seed}"}
    save_file(model.state_dict(), options.output, metadata=notes)
    for name, value in sorted(notes.items()):
        print(f"{name}: {value}")
    size = options.output.stat().st_size
    print(f"wrote {options.output}, {size} bytes, after {seconds:.0f} s")


def train(scenes: list[Scene], *, steps: int, batch_size: int, num_points: int = 1024) -> PointNet:
    """A model trained on batches of `num_points` random points of random scenes."""
    points = torch.stack([torch.from_numpy(scene.points) for scene in scenes])
    labels = torch.stack([torch.from_numpy(scene.labels) for scene in scenes])
    weight = labels.flatten().bincount(minlength=len(CLASSES)).float().rsqrt()
    model = segmenter(num_classes=len(CLASSES)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randperm(len(scenes))[:batch_size]
        kept = torch.randperm(points.shape[2])[:num_points]
        logits = model(_varied(points[chosen][:, :, kept]))
        loss = F.cross_entropy(logits, labels[chosen][:, kept], weight / weight.sum())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def _varied(points: torch.Tensor) -> torch.Tensor:
    """Each scene mirrored at random along and across the street; points: (batch, 4, num_points)."""
    flips = torch.ones(len(points), 4, 1)
    flips[:, :2] = torch.randint(0, 2, (len(points), 2, 1)) * 2.0 - 1
    return points * flips


def _notes(scores: Scores, held_out: list[Scene]) -> dict[str, str]:
    """What the weights file says about itself."""
    majority, height = score_majority(held_out), score_height(held_out)
    last = FIRST_HELD_OUT_SEED + len(held_out) - 1
    return {
        "held_out_seeds": f"{FIRST_HELD_OUT_SEED} to {last}",
        "accuracy": f"{scores.accuracy:.4f}",
        "mean_iou": f"{scores.mean_iou:.4f}",
        **{f"iou.{name}": f"{value:.4f}" for name, value in scores.iou.items()},
        "majority_class": f"accuracy {majority.accuracy:.4f}, mean IoU {majority.mean_iou:.4f}",
        "height_rule": f"accuracy {height.accuracy:.4f}, mean IoU {height.mean_iou:.4f}",
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--scenes", type=int, default=300, help="scenes to train on")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
