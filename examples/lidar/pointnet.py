"""A PointNet that gives every point of a cloud a class, and the factory that plan.yaml names.

After Qi et al., "PointNet: Deep Learning on Point Sets for 3D Classification and Segmentation"
(2017), without its transform networks. Not here: what the classes mean (`scenes`).
"""

import torch
from torch import nn


class SharedLayer(nn.Module):
    """One linear layer, normalisation and ReLU, applied to every point alike."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.linear = nn.Conv1d(num_in, num_out, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm1d(num_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, num_in, num_points) -> (batch, num_out, num_points)."""
        return torch.relu(self.norm(self.linear(x)))


class PointNet(nn.Module):
    """Features of each point, one feature of the whole cloud, and from both a class per point."""

    scale: torch.Tensor

    def __init__(self, *, num_classes: int, width: int, global_width: int) -> None:
        super().__init__()
        # Metres to about -1 to 1; a buffer, so that the weights file says how it was trained.
        scale = torch.tensor([1 / 20, 1 / 10, 1 / 4, 1.0]).reshape(1, 4, 1)
        self.register_buffer("scale", scale)
        self.point = nn.Sequential(
            SharedLayer(4, width), SharedLayer(width, width), SharedLayer(width, 2 * width)
        )
        self.cloud = SharedLayer(2 * width, global_width)
        # The same as one linear layer over the two features side by side, but the cloud's share of
        # it is computed once and not for every point.
        self.from_point = nn.Conv1d(2 * width, 4 * width, kernel_size=1)
        self.from_cloud = nn.Conv1d(global_width, 4 * width, kernel_size=1, bias=False)
        self.mixed_norm = nn.BatchNorm1d(4 * width)
        self.head = nn.Sequential(
            SharedLayer(4 * width, 2 * width), nn.Conv1d(2 * width, num_classes, kernel_size=1)
        )

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """points: (batch, 4, num_points) -> logits (batch, num_classes, num_points)."""
        local = self.point(points * self.scale)
        whole = self.cloud(local).amax(dim=2, keepdim=True)
        mixed = torch.relu(self.mixed_norm(self.from_point(local) + self.from_cloud(whole)))
        logits: torch.Tensor = self.head(mixed)
        return logits


def segmenter(*, num_classes: int = 5, width: int = 64, global_width: int = 512) -> PointNet:
    """The module that `pointnet.safetensors` fits, in evaluation mode, with random weights."""
    return PointNet(num_classes=num_classes, width=width, global_width=global_width).eval()
