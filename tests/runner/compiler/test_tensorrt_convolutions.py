"""Convolutions of few channels are written anew for TensorRT-RTX, and compute the same."""

from pathlib import Path

import pytest
import torch
from engine_builds import engines_of
from torch import nn

from runner.compiler.segment import Segment, TensorSpec
from runner.compiler.tensorrt_forms import reform
from runner.compiler.tensorrt_io import ENGINE_FILE

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d.default, aten.conv3d.default)

Sizes = tuple[int, ...]

SHAPES = [
    pytest.param((2, 3, 32, 32), 7, 2, 3, id="stem"),
    pytest.param((1, 3, 33, 30), 3, 2, 1, id="odd"),
    pytest.param((1, 1, 16, 16), 3, 1, 1, id="of one channel, without strides"),
    pytest.param((1, 3, 32, 48), 16, 16, 0, id="patches"),
    pytest.param((1, 3, 35, 37), 4, 4, 0, id="patches that leave something over"),
    pytest.param((1, 2, 19, 21), (5, 2), (3, 1), (4, 0), id="uneven"),
    pytest.param((1, 8, 12, 12), 2, 2, 0, id="of eight channels"),
    pytest.param((1, 3, 6, 20, 20), (3, 7, 7), (1, 2, 2), (1, 3, 3), id="volume, flat kernel"),
    pytest.param((1, 1, 11, 12, 13), 3, 2, 1, id="volume"),
]

FAST = [
    pytest.param((1, 16, 8, 8), {"kernel_size": 3}, id="many channels"),
    pytest.param((1, 4, 8, 8), {"kernel_size": 3, "groups": 4}, id="grouped"),
    pytest.param((1, 3, 8, 8), {"kernel_size": 3, "dilation": 2}, id="dilated"),
    pytest.param((1, 3, 9, 9), {"kernel_size": 2, "stride": 3}, id="with gaps"),
    pytest.param((3, 8, 8), {"kernel_size": 3}, id="without a batch"),
    pytest.param(
        (1, 15, 8, 8, 8), {"kernel_size": 3, "stride": 2, "padding": 1}, id="too much to fill up"
    ),
]


def segment(shape: Sizes, dtype: torch.dtype, num_out: int = 8, **options: object) -> Segment:
    kind = nn.Conv3d if len(shape) == 5 else nn.Conv2d
    channels = shape[-3] if len(shape) < 5 else shape[1]
    with torch.device("meta"):
        module = kind(channels, num_out, dtype=dtype, **options)  # type: ignore[arg-type]
    return Segment("stem", module, (TensorSpec(shape, dtype),))


def channels_seen(program: torch.export.ExportedProgram) -> list[int]:
    """By each convolution."""
    nodes = [node for node in program.graph.nodes if node.target in CONVOLUTIONS]
    return [node.args[0].meta["val"].shape[1] for node in nodes]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), SHAPES)
def test_a_convolution_of_few_channels_sees_sixteen_and_finds_the_same(
    shape: Sizes, kernel: int | Sizes, stride: int | Sizes, padding: int | Sizes, bias: bool
) -> None:
    options = {"kernel_size": kernel, "stride": stride, "padding": padding, "bias": bias}
    segment_ = segment(shape, torch.float64, **options)
    program = segment_.export("cpu")
    assert reform(program, "rtx") is program  # of a dtype that no GPU is fast at
    segment_ = segment(shape, torch.float32, **options)
    reformed = reform(segment_.export("cpu"), "rtx")
    (channels,) = channels_seen(reformed)
    assert channels % 16 == 0
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(spec.shape, generator=generator) for spec in segment_.inputs]
    (got,) = reformed.module()(*inputs)
    with torch.no_grad():
        (exact,) = segment_.function()(*(x.double() for x in inputs))
    assert got.shape == exact.shape
    assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize(("shape", "options"), FAST)
def test_other_convolutions_stay(shape: Sizes, options: dict[str, object]) -> None:
    program = segment(shape, torch.float16, **options).export("cpu")
    assert reform(program, "rtx") is program


def test_a_kernel_of_one_place_keeps_its_channels() -> None:
    program = segment((1, 3, 8, 8), torch.float16, kernel_size=1).export("cpu")
    assert channels_seen(reform(program, "rtx")) == [3]


def test_another_flavour_has_its_own_forms() -> None:
    program = segment((1, 3, 8, 8), torch.float16, kernel_size=3).export("cpu")
    assert reform(program, "standard") is program


def test_one_among_others_is_written_anew() -> None:
    with torch.device("meta"):
        module = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.ReLU()
        ).half()
    seen = Segment("vision", module, (TensorSpec((1, 3, 16, 16), torch.float16),))
    assert channels_seen(reform(seen.export("cpu"), "rtx")) == [16, 32]


def test_they_become_engines(tmp_path: Path) -> None:
    options = {"kernel_size": 7, "stride": 2, "padding": 3}
    shapes = [(2, 3, 32, 32), (1, 3, 8, 32, 32)]
    segments = [segment(shape, torch.float16, **options) for shape in shapes]
    for folder in engines_of(segments, tmp_path):
        assert (folder / ENGINE_FILE).stat().st_size
