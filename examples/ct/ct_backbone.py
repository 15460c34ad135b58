"""The image backbone of Merlin and Astra: a ResNet-152 inflated to three dimensions.

A chest CT goes in and a map of 2048 features per place comes out. The architecture is that of
He et al., "Deep Residual Learning for Image Recognition" (2015), with the stride in the 3 x 3
convolution; its kernels were inflated as in Carreira and Zisserman, "Quo Vadis, Action
Recognition?" (2017). Names are those of the published weights. Not here: a factory's weights and
how a scan is resampled to the input's size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

NUM_BLOCKS = (3, 8, 36, 3)
"""Blocks in each of the four layers of a ResNet-152."""

EXPANSION = 4
"""A block's output channels for one of its inner channels."""


class Bottleneck(nn.Module):
    """1 x 1 x 1 to fewer channels, 3 x 3 x 3, 1 x 1 x 1 to many, and the input added."""

    def __init__(self, num_in: int, width: int, *, stride: int, projects: bool) -> None:
        super().__init__()
        num_out = width * EXPANSION
        self.conv1 = nn.Conv3d(num_in, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, num_out, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm3d(num_out)
        self.downsample: nn.Module = nn.Identity()
        if projects:
            self.downsample = nn.Sequential(
                nn.Conv3d(num_in, num_out, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm3d(num_out),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, num_in, z, x, y) -> (batch, 4 * width, z / stride, ...)."""
        inner = F.relu(self.bn1(self.conv1(x)))
        inner = F.relu(self.bn2(self.conv2(inner)))
        return F.relu(self.bn3(self.conv3(inner)) + self.downsample(x))


class CTBackbone(nn.Module):
    """A stem and four layers of bottleneck blocks.

    Args:
        num_blocks: of each of the four layers.
    """

    def __init__(self, num_blocks: Sequence[int] = NUM_BLOCKS) -> None:
        super().__init__()
        # The stem's kernel was inflated by 3 and not by 7: slices are thick.
        self.conv1 = nn.Conv3d(
            3, 64, kernel_size=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False
        )
        self.bn1 = nn.BatchNorm3d(64)
        self.maxpool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _make_layer(64, 64, num_blocks[0], stride=1)
        self.layer2 = _make_layer(256, 128, num_blocks[1], stride=2)
        self.layer3 = _make_layer(512, 256, num_blocks[2], stride=2)
        self.layer4 = _make_layer(1024, 512, num_blocks[3], stride=2)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """Features of volumes.

        Args:
            volume: (batch, 1, x, y, z), axes right, anterior, superior; -1000 to 200 HU as 0 to 1.
                It was trained at (224, 224, 160).

        Returns:
            (batch, 2048, z / 16, x / 32, y / 32), rounded up; their mean over all places is what
            classifiers are trained on.
        """
        # Three equal channels, since the kernels come from colour images.
        x = volume.permute(0, 1, 4, 2, 3).expand(-1, 3, -1, -1, -1)
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        features: torch.Tensor = self.layer4(self.layer3(x))
        return features


def backbone(*, num_blocks: Sequence[int] = NUM_BLOCKS) -> CTBackbone:
    """The backbone in eval mode, with weights as PyTorch initialises them.

    Args:
        num_blocks: of each of the four layers; fewer than the default make a network whose names
            and shapes are a part of those of the weights.
    """
    return CTBackbone(num_blocks).eval()


def _make_layer(num_in: int, width: int, num_blocks: int, *, stride: int) -> nn.Sequential:
    first = Bottleneck(num_in, width, stride=stride, projects=True)
    rest = [
        Bottleneck(width * EXPANSION, width, stride=1, projects=False)
        for _ in range(num_blocks - 1)
    ]
    return nn.Sequential(first, *rest)
