"""How well points are classified: accuracy, IoU of each class and their mean."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from examples.lidar.scenes import CLASSES, Scene


@dataclass(frozen=True)
class Scores:
    """Scores over all points of some scenes.

    Attributes:
        confusion: (num_classes, num_classes) counts; rows are the truth, columns the answers.
    """

    confusion: NDArray[np.int64]

    @property
    def accuracy(self) -> float:
        """Share of the points that got their class."""
        return float(self.confusion.trace() / self.confusion.sum())

    @property
    def iou(self) -> dict[str, float]:
        """Intersection over union of each class; 0 for one that is neither there nor answered."""
        hits = self.confusion.diagonal()
        union = self.confusion.sum(axis=0) + self.confusion.sum(axis=1) - hits
        return dict(zip(CLASSES, (hits / np.maximum(union, 1)).tolist(), strict=True))

    @property
    def mean_iou(self) -> float:
        """The mean over all classes."""
        return float(np.mean(list(self.iou.values())))


def score(pairs: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Scores:
    """The scores of (truth, answers), each (num_points,) of class indices."""
    num_classes = len(CLASSES)
    confusion = np.zeros(num_classes**2, dtype=np.int64)
    for truth, answers in pairs:
        confusion += np.bincount(truth * num_classes + answers, minlength=num_classes**2)
    return Scores(confusion.reshape(num_classes, num_classes))


def score_model(model: nn.Module, scenes: Iterable[Scene]) -> Scores:
    """The scores of a module that takes (1, 4, num_points) and gives logits."""
    return score((scene.labels, _answers(model, scene)) for scene in scenes)


def score_majority(scenes: Iterable[Scene]) -> Scores:
    """What calling every point ground, the most frequent class, would score."""
    return score((scene.labels, np.zeros_like(scene.labels)) for scene in scenes)


def score_height(scenes: Iterable[Scene], *, limit_m: float = -1.5) -> Scores:
    """What a rule would score that knows the height: ground below the limit, else building."""
    return score((s.labels, (s.points[2] > limit_m).astype(np.int64)) for s in scenes)


@torch.inference_mode()
def _answers(model: nn.Module, scene: Scene) -> NDArray[np.int64]:
    logits = model(torch.from_numpy(scene.points)[None])
    answers: NDArray[np.int64] = logits[0].argmax(dim=0).numpy()
    return answers
