"""ResNet-50's shape, for measuring; a factory for `gpu_tensor`, with random weights.

After He et al., "Deep Residual Learning for Image Recognition" (2015), with the stride in the 3 x 3
convolution.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))
"""Blocks, inner channels, stride of the first."""
EXPANSION = 4


class Bottleneck(nn.Module):
    def __init__(self, num_in: int, width: int, stride: int) -> None:
        super().__init__()
        num_out = width * EXPANSION
        self.reduce = _convolution(num_in, width, 1, 1)
        self.middle = _convolution(width, width, 3, stride)
        self.expand = _convolution(width, num_out, 1, 1)
        changes = stride > 1 or num_in != num_out
        self.shortcut = _convolution(num_in, num_out, 1, stride) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.middle(F.relu(self.reduce(x))))
        return F.relu(self.expand(inner) + self.shortcut(x))


def resnet50() -> nn.Module:
    """(batch, 3, 224, 224) -> (batch, 1000)."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["stem"] = nn.Sequential(
        _convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)
    )
    num_in = 64
    for index, (count, width, stride) in enumerate(GROUPS):
        blocks = []
        for block in range(count):
            blocks.append(Bottleneck(num_in, width, 1 if block else stride))
            num_in = width * EXPANSION
        parts[f"group{index}"] = nn.Sequential(*blocks)
    parts["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_in, 1000))
    return nn.Sequential(parts).eval()


def _convolution(num_in: int, num_out: int, size: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(num_in, num_out, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(num_out))
