"""Volumes: orientation, scaling, resampling against torch's, window, padding and cropping."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from parallel.errors import ConfigError
from runner.items.item import Item, ItemError
from runner.items.preprocess import Preprocess, VolumePreprocess
from runner.items.reading import read_item
from runner.items.spec import Array, ArraySpec

VALUES = np.random.default_rng(2).normal(size=(5, 6, 7)).astype(np.float32)
FREE = ArraySpec("x", "float32", (None, None, None, None))
PLAIN = VolumePreprocess()


def save(
    folder: Path, values: NDArray[np.generic], affine: NDArray[np.float64] | None = None
) -> Path:
    path = folder / "it.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def read(path: Path, how: VolumePreprocess = PLAIN, spec: ArraySpec = FREE) -> Array:
    return read_item(Item("it", path), [spec], Preprocess(volume=how))["x"]


def test_channels_as_declared(tmp_path: Path) -> None:
    path = save(tmp_path, VALUES)
    np.testing.assert_array_equal(read(path), VALUES[None])
    np.testing.assert_array_equal(read(path, spec=ArraySpec("x", "float32", (5, 6, 7))), VALUES)


def test_a_fourth_dimension_is_channels(tmp_path: Path) -> None:
    both = np.stack([VALUES, 2 * VALUES], axis=-1)
    path = save(tmp_path, both)
    np.testing.assert_array_equal(read(path), np.stack([VALUES, 2 * VALUES]))
    with pytest.raises(ItemError, match=r"shape \(2, 5, 6, 7\), the model takes \(5, 6, 7\)"):
        read(path, spec=ArraySpec("x", "float32", (5, 6, 7)))


def test_axes_are_turned_to_ras(tmp_path: Path) -> None:
    # Stored axes: head to foot, right to left, back to front; x = -j, y = k, z = -i.
    affine = np.array([[0, -1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, 0], [0, 0, 0, 1]], dtype=float)
    stored = VALUES[::-1, :, ::-1].transpose(2, 0, 1)
    np.testing.assert_array_equal(read(save(tmp_path, stored, affine))[0], VALUES)


def test_the_scaling_of_the_file_applies(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.arange(210, dtype=np.int16).reshape(5, 6, 7), np.eye(4))
    image.header.set_slope_inter(2, -1024)
    nibabel.save(image, tmp_path / "it.nii")
    assert read(tmp_path / "it.nii")[0, 4, 5, 6] == pytest.approx(209 * 2 - 1024)


def test_integers_stay_integers_for_an_integer_model(tmp_path: Path) -> None:
    labels = np.arange(210, dtype=np.int16).reshape(5, 6, 7)
    spec = ArraySpec("x", "int64", (1, 5, 6, 7))
    np.testing.assert_array_equal(read(save(tmp_path, labels), spec=spec)[0], labels)
    with pytest.raises(ItemError, match="not converted to the model's int64"):
        read(save(tmp_path, VALUES), spec=spec)


@pytest.mark.parametrize("size", [(10, 12, 14), (3, 9, 7), (1, 1, 1)])
def test_resampling_is_torchs_trilinear(tmp_path: Path, size: tuple[int, int, int]) -> None:
    values = read(save(tmp_path, VALUES), VolumePreprocess(resample_to=size))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(VALUES)[None, None], size, mode="trilinear", align_corners=False
    )
    np.testing.assert_allclose(values, expected[0].numpy(), atol=1e-5)


def test_spacing_after_the_axes_are_turned(tmp_path: Path) -> None:
    affine = np.array([[0, -2.0, 0, 0], [0, 0, 1.0, 0], [-3.0, 0, 0, 0], [0, 0, 0, 1]])
    values = read(save(tmp_path, VALUES, affine), VolumePreprocess(spacing=(1, 1, 1.5)))
    # Stored (5, 6, 7) at (3, 2, 1) mm are (6, 7, 5) at (2, 1, 3) mm.
    assert values.shape == (1, 12, 7, 10)


def test_window(tmp_path: Path) -> None:
    values = read(save(tmp_path, VALUES), VolumePreprocess(window=(-0.5, 1.5)))
    assert (values.min(), values.max()) == (0, 1)
    np.testing.assert_allclose(values[0], np.clip((VALUES + 0.5) / 2, 0, 1), atol=1e-6)


def test_pad_and_crop(tmp_path: Path) -> None:
    values = read(save(tmp_path, VALUES), VolumePreprocess(pad_or_crop_to=(8, 3, 7)))[0]
    np.testing.assert_array_equal(values[1:6], VALUES[:, 1:4])
    assert not values[0].any()
    assert not values[6:].any()


def test_values_beyond_float32_are_refused_not_infinite(tmp_path: Path) -> None:
    with pytest.raises(ItemError, match="values beyond float32"):
        read(save(tmp_path, np.full((2, 2, 2), 1e300)))


def test_what_is_no_volume(tmp_path: Path) -> None:
    with pytest.raises(ItemError, match="it has 2 dimensions; a volume has 3"):
        read(save(tmp_path, VALUES[0]))
    with pytest.raises(ItemError, match="complex64 cannot become float32"):
        read(save(tmp_path, VALUES.astype(np.complex64)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": (1, 1)}, r"volume\.window=\(1, 1\) must be \(lo, hi\) with lo < hi"),
        ({"window": (0, float("nan"))}, r"volume\.window"),
        ({"spacing": (1, 1, 0)}, r"volume\.spacing=\(1, 1, 0\) must hold 3 positive numbers"),
        ({"resample_to": (4, 4)}, r"volume\.resample_to"),
        ({"pad_or_crop_to": (4, 4, -1)}, r"volume\.pad_or_crop_to"),
        ({"spacing": (1, 1, 1), "resample_to": (4, 4, 4)}, "give one of them"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VolumePreprocess(**settings)  # type: ignore[arg-type]
