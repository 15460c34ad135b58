"""EfficientNet-Lite0, the classifier of ImageNet's 1000 classes, and the factory of plan.yaml.

After Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (2019),
in its Lite form: ReLU6, no squeeze-and-excitation. Its names are those of the published weights.
Not here: how a photograph becomes its input; that is `MEAN` and `STD` applied to values in 0 to 1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

IMAGE_SIZE = 224
MEAN = 127 / 255
STD = 128 / 255
"""One mean and deviation for all three channels: the weights come from TensorFlow."""

BN_EPS = 1e-3


@dataclass(frozen=True)
class Group:
    """Some blocks in a row; the first of them may change the size and the channels.

    Attributes:
        expansion: a block's inner channels for one of its input channels.
    """

    num_blocks: int
    channels: int
    kernel: int
    stride: int
    expansion: int = 6


STEM_CHANNELS = 32
GROUPS = (
    Group(1, 16, kernel=3, stride=1, expansion=1),
    Group(2, 24, kernel=3, stride=2),
    Group(2, 40, kernel=5, stride=2),
    Group(3, 80, kernel=3, stride=2),
    Group(3, 112, kernel=5, stride=1),
    Group(4, 192, kernel=5, stride=2),
    Group(1, 320, kernel=3, stride=1),
)
HEAD_CHANNELS = 1280
NUM_CLASSES = 1000


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose output is as large as its input divided by its stride.

    As in TensorFlow, where the zeros that this needs are odd in number, the last edge gets one
    more, which `padding` of PyTorch cannot say.
    """

    def __init__(
        self, num_in: int, num_out: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(num_in, num_out, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, num_in, height, width) -> (batch, num_out, height / stride, width / stride)"""
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom = same_padding(x.shape[2], kernel, stride)
        left, right = same_padding(x.shape[3], kernel, stride)
        if (top, left) == (bottom, right):
            return F.conv2d(x, self.weight, stride=stride, padding=(top, left), groups=self.groups)
        return super().forward(F.pad(x, (left, right, top, bottom)))


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after `size` values so that ceil(size / stride) values come out."""
    num_out = -(-size // stride)
    total = max((num_out - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Block(nn.Module):
    """Widen by a 1 x 1 convolution, filter each channel by itself, narrow again."""

    def __init__(
        self, num_in: int, num_out: int, *, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        inner = num_in * expansion
        self._expand_conv: SameConv2d | None = None
        if expansion != 1:
            self._expand_conv = SameConv2d(num_in, inner, 1)
            self._bn0 = _norm(inner)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride=stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = SameConv2d(inner, num_out, 1)
        self._bn2 = _norm(num_out)
        self._is_residual = stride == 1 and num_in == num_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, num_in, height, width) -> (batch, num_out, height / stride, ...)."""
        inner = x
        if self._expand_conv is not None:
            inner = F.relu6(self._bn0(self._expand_conv(x)))
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        output: torch.Tensor = self._bn2(self._project_conv(inner))
        return output + x if self._is_residual else output


class EfficientNetLite0(nn.Module):
    """A stem, 16 blocks, a head and a linear layer."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM_CHANNELS, 3, stride=2)
        self._bn0 = _norm(STEM_CHANNELS)
        self._blocks = nn.Sequential(*_make_blocks())
        self._conv_head = SameConv2d(GROUPS[-1].channels, HEAD_CHANNELS, 1)
        self._bn1 = _norm(HEAD_CHANNELS)
        self._fc = nn.Linear(HEAD_CHANNELS, num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Classify images.

        Args:
            image: (batch, 3, 224, 224), RGB, normalised by `MEAN` and `STD`.

        Returns:
            (batch, num_classes) logits.
        """
        x = F.relu6(self._bn0(self._conv_stem(image)))
        x = self._blocks(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        logits: torch.Tensor = self._fc(x.mean(dim=(2, 3)))
        return logits


def classifier(*, num_classes: int = NUM_CLASSES) -> EfficientNetLite0:
    """The network in eval mode, with weights as PyTorch initialises them."""
    return EfficientNetLite0(num_classes=num_classes).eval()


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BN_EPS)


def _make_blocks() -> list[Block]:
    blocks: list[Block] = []
    num_in = STEM_CHANNELS
    for group in GROUPS:
        for index in range(group.num_blocks):
            blocks.append(
                Block(
                    num_in,
                    group.channels,
                    kernel=group.kernel,
                    stride=group.stride if index == 0 else 1,
                    expansion=group.expansion,
                )
            )
            num_in = group.channels
    return blocks
