"""Kernels of 1 x 1 come into engines for TensorRT-RTX in the shape that it reads."""

from pathlib import Path

import pytest
import torch
from engine_builds import engines_of
from torch import nn

from runner.compiler.segment import Segment, TensorSpec
from runner.compiler.tensorrt_io import ENGINE_FILE, EngineIO
from runner.compiler.tensorrt_kernels import turn_kernels


class Block(nn.Module):
    """As in a residual network; in three dims as in two."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = [nn.Conv2d, nn.Conv3d][dims - 2]
        self.reduce = conv(32, 16, 1, bias=False)
        self.middle = conv(16, 16, 3, padding=1)
        self.expand = conv(16, 32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.expand(torch.relu(self.middle(self.reduce(x))))


class Shared(nn.Module):
    """Its kernel is also read as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(4, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.kernel) + self.kernel.sum()


def block(dims: int, dtype: torch.dtype) -> Segment:
    with torch.device("meta"):
        module = Block(dims).to(dtype)
    return Segment("block", module, (TensorSpec((2, 32, *[6] * dims), dtype),))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_same_numbers_in_another_shape_give_the_same(dims: int) -> None:
    segment = block(dims, torch.float32)
    turned = turn_kernels(segment.export("cpu"), "rtx")
    shapes = [node.meta["val"].shape for node in turned.graph.nodes if node.op == "placeholder"]
    ones = (1,) * dims
    changed = [(old.shape, new) for old, new in zip(segment.inputs, shapes, strict=True)]
    assert [new for old, new in changed if old != new] == [(16, *ones, 32), (32, *ones, 16)]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(spec.shape, generator=generator) for spec in segment.inputs]
    (got,) = turned.module()(*(x.view(shape) for x, shape in zip(inputs, shapes, strict=True)))
    with torch.no_grad():
        (exact,) = segment.function()(*(x.double() for x in inputs))
    assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_what_is_read_as_it_is_stays() -> None:
    program = Segment("shared", Shared(), (TensorSpec((1, 4, 5, 5), torch.float32),)).export("cpu")
    assert turn_kernels(program, "rtx") is program


def test_another_flavour_reads_them_as_they_are() -> None:
    program = block(2, torch.float16).export("cpu")
    assert turn_kernels(program, "standard") is program


def test_an_engine_takes_them_turned(tmp_path: Path) -> None:
    segments = [block(dims, torch.float16) for dims in (2, 3)]
    for folder, segment in zip(engines_of(segments, tmp_path), segments, strict=True):
        assert (folder / ENGINE_FILE).stat().st_size
        io = EngineIO.read(folder)
        assert io.takes == segment.inputs
        sizes = [spec.empty("meta").numel() for spec in io.inputs.values()]
        assert sizes == [spec.empty("meta").numel() for spec in segment.inputs]
        assert sum(a != b for a, b in zip(io.takes, io.inputs.values(), strict=True)) == 2
