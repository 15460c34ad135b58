"""Pictures against the formulas, computed here from the pixels."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from parallel.errors import ConfigError
from runner.items.item import Item, ItemError
from runner.items.preprocess import ImagePreprocess, Preprocess
from runner.items.reading import read_item
from runner.items.spec import Array, ArraySpec

RANDOM = np.random.default_rng(1)
PIXELS = RANDOM.integers(0, 256, (20, 30, 3), dtype=np.uint8)
FREE = ArraySpec("x", "float32", (None, None, None))


def read(path: Path, how: ImagePreprocess, spec: ArraySpec = FREE) -> Array:
    return read_item(Item("it", path), [spec], Preprocess(image=how))["x"]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "it.png"
    Image.fromarray(PIXELS).save(path)
    return path


def test_the_default_is_rgb_from_0_to_1_channels_first(picture: Path) -> None:
    values = read(picture, ImagePreprocess())
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    np.testing.assert_allclose(values, PIXELS.transpose(2, 0, 1) / 255, rtol=1e-6)


def test_mean_and_std_are_in_the_order_of_the_channels(picture: Path) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    values = read(picture, ImagePreprocess(mean=mean, std=std, channels="bgr", layout="hwc"))
    np.testing.assert_allclose(values, (PIXELS[..., ::-1] / 255 - mean) / std, atol=1e-6)


def test_an_integer_model_gets_the_pixels(picture: Path) -> None:
    spec = ArraySpec("x", "uint8", (20, 30, 3))
    values = read(picture, ImagePreprocess(scale=1, layout="hwc"), spec)
    np.testing.assert_array_equal(values, PIXELS)
    with pytest.raises(ItemError, match="float32, which is not converted to the model's uint8"):
        read(picture, ImagePreprocess(layout="hwc"), spec)


def test_gray(picture: Path) -> None:
    values = read(picture, ImagePreprocess(channels="gray", scale=1), FREE)
    expected = PIXELS @ np.array([0.299, 0.587, 0.114])
    assert values.shape == (1, 20, 30)
    np.testing.assert_allclose(values[0], expected, atol=1)


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((30, 20), 16, (16, 24)),
        ((20, 30), 16, (24, 16)),
        ((33, 20), 7, (7, 11)),
        ((30, 20), (5, 40), (5, 40)),
    ],
)
def test_resize(
    tmp_path: Path, size: tuple[int, int], resize: int | tuple[int, int], expected: tuple[int, int]
) -> None:
    path = tmp_path / "it.png"
    Image.new("RGB", size, (10, 20, 30)).save(path)
    values = read(path, ImagePreprocess(resize=resize, scale=1))
    assert values.shape[1:] == expected
    assert set(np.unique(values)) == {10, 20, 30}


def test_bicubic_is_not_bilinear(picture: Path) -> None:
    results = {}
    for how, pillow in (("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)):
        results[how] = read(picture, ImagePreprocess(resize=(9, 11), interpolation=how, scale=1))
        expected = np.asarray(Image.fromarray(PIXELS).resize((11, 9), pillow))
        np.testing.assert_array_equal(results[how], expected.transpose(2, 0, 1))
    assert not np.array_equal(results["bilinear"], results["bicubic"])


def test_crop_is_from_the_middle(picture: Path) -> None:
    values = read(picture, ImagePreprocess(crop=(10, 12), scale=1, layout="hwc"))
    np.testing.assert_array_equal(values, PIXELS[5:15, 9:21])
    with pytest.raises(ItemError, match=r"20 x 30 .* smaller than image\.crop 21 x 10"):
        read(picture, ImagePreprocess(crop=(21, 10)))


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90 degrees clockwise.
    Image.fromarray(PIXELS).save(tmp_path / "it.png", exif=exif)
    values = read(tmp_path / "it.png", ImagePreprocess(scale=1, layout="hwc"))
    np.testing.assert_array_equal(values, np.rot90(PIXELS, -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_of_8_bits_become_three_channels(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("it.jpg" if mode == "YCbCr" else "it.tif")
    Image.fromarray(PIXELS).convert(mode).save(path)
    assert read(path, ImagePreprocess()).shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("deep", "suffix"),
    [
        (RANDOM.integers(0, 65536, (20, 30)).astype(np.uint16), "png"),
        (RANDOM.integers(0, 65536, (20, 30)).astype(np.uint16), "tif"),
        (RANDOM.random((20, 30)).astype(np.float32), "tif"),
    ],
)
def test_deep_pixels_are_not_cut_off(
    tmp_path: Path, deep: NDArray[np.generic], suffix: str
) -> None:
    path = tmp_path / f"it.{suffix}"
    Image.fromarray(deep).save(path)
    values = read(path, ImagePreprocess(channels="gray", scale=1))
    np.testing.assert_array_equal(values[0], deep)
    with pytest.raises(ItemError, match=r"more than 8 bits .* gray only, not rgb"):
        read(path, ImagePreprocess())


def test_several_frames_are_refused(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), (100 * i, 0, 0)) for i in range(3)]
    for suffix in ("tif", "webp"):
        path = tmp_path / f"it.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        with pytest.raises(ItemError, match="it holds 3 pictures"):
            read(path, ImagePreprocess())


def test_a_decompression_bomb(picture: Path) -> None:
    data = bytearray(picture.read_bytes())
    data[16:24] = struct.pack(">II", 20_000, 20_000)  # The size in the header, then its checksum.
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    picture.write_bytes(data)
    with pytest.raises(ItemError, match="DecompressionBombError"):
        read(picture, ImagePreprocess())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": 0}, r"image\.resize=\(0,\) must hold 1 positive"),
        ({"resize": (3, 4, 5)}, r"image\.resize=\(3, 4, 5\) must hold 2 positive"),
        ({"crop": (0, 4)}, r"image\.crop"),
        ({"mean": (0.5,)}, r"image\.mean=\(0\.5,\) must hold 3 finite numbers"),
        ({"channels": "gray", "std": (1, 1, 1)}, r"image\.std=.* must hold 1 finite"),
        ({"std": (1, 0, 1)}, r"image\.std=.* must not hold 0"),
        ({"scale": 0}, r"image\.scale=0"),
        ({"channels": "rbg"}, r"image\.channels='rbg' is unknown; use rgb or bgr or gray"),
        ({"layout": "whc"}, r"image\.layout='whc' is unknown"),
        ({"interpolation": "lanczos"}, r"image\.interpolation"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImagePreprocess(**settings)  # type: ignore[arg-type]
