"""Arrays and archives as a model takes them; damaged files of every kind end in one line."""

import gzip
import io
import sys
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from parallel.errors import ConfigError, PreflightError
from runner.items.extras import require_extras
from runner.items.item import Item, ItemError
from runner.items.preprocess import Preprocess
from runner.items.reading import read_item
from runner.items.spec import Array, ArraySpec

SPEC = ArraySpec("x", "float32", (2, None))


def read(path: Path, *specs: ArraySpec) -> dict[str, Array]:
    return read_item(Item("it", path), specs or (SPEC,), Preprocess())


def saved(folder: Path, array: NDArray[np.generic]) -> Path:
    path = folder / "it.npy"
    np.save(path, array)
    return path


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("float64", "float32"),
        ("float16", "float32"),
        ("float32", "float16"),
        ("uint8", "float32"),
        ("int64", "float32"),
        ("bool", "float32"),
        ("int64", "int32"),
        ("uint8", "int64"),
        ("bool", "int64"),
        ("bool", "bool"),
    ],
)
def test_dtypes_that_are_converted(tmp_path: Path, source: str, target: str) -> None:
    values = np.array([[0, 1, 1], [1, 0, 1]], dtype=source)
    array = read(saved(tmp_path, values), ArraySpec("x", target, (2, None)))["x"]
    assert array.dtype == target
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, values.astype(target))


def test_bfloat16_is_handed_on_as_float32(tmp_path: Path) -> None:
    values = np.full((2, 1), 1.00390625)  # Exact in float32, not in bfloat16.
    array = read(saved(tmp_path, values), ArraySpec("x", "bfloat16", (2, 1)))["x"]
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, values)


@pytest.mark.parametrize(
    ("values", "target", "message"),
    [
        (np.ones((2, 3), dtype=complex), "float32", "complex128 cannot become float32"),
        (np.array([["a"], ["b"]]), "float32", "cannot become float32"),
        (np.ones((2, 3)), "int64", "float64, which is not converted to the model's int64"),
        (np.ones((2, 3), dtype=int), "bool", "int64, which is not converted to the model's bool"),
        (np.full((2, 3), 300), "uint8", "values 300 to 300, beyond uint8"),
        (np.full((2, 3), -1), "uint8", "values -1 to -1, beyond uint8"),
        (np.full((2, 3), 1e5), "float16", "values beyond float16"),
        (np.full((2, 3), np.nan), "float32", "nothing but NaN"),
        (np.ones((3, 2)), "float32", r"shape \(3, 2\), the model takes \(2, \*\)"),
        (np.ones((1, 2, 3)), "float32", r"\(1, 2, 3\), .* no batch dimension"),
        (np.ones(2), "float32", r"shape \(2,\)"),
        (np.ones((2, 0)), "float32", "it is empty"),
    ],
)
def test_values_that_are_refused(
    tmp_path: Path, values: NDArray[np.generic], target: str, message: str
) -> None:
    with pytest.raises(ItemError, match=f"^item it: .*{message}"):
        read(saved(tmp_path, values), ArraySpec("x", target, (2, None)))


def test_some_nan_and_infinity_are_values(tmp_path: Path) -> None:
    values = np.array([[np.nan, np.inf], [1, -np.inf]])
    np.testing.assert_array_equal(read(saved(tmp_path, values))["x"], values)


def test_an_archive_by_input_names(tmp_path: Path) -> None:
    path = tmp_path / "it.npz"
    np.savez_compressed(path, x=np.ones((2, 3)), ids=np.arange(4), label=np.array(["cat"]))
    specs = (ArraySpec("ids", "int32", (4,)), SPEC)
    arrays = read(path, *specs)
    assert list(arrays) == ["ids", "x"]
    assert arrays["ids"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ItemError, match="it holds x, ids, label; the model's input mask is absent"):
        read(path, SPEC, ArraySpec("mask", "bool", (4,)))


def test_one_array_for_several_inputs(tmp_path: Path) -> None:
    with pytest.raises(ItemError, match=r"takes 2 inputs; give a \.npz with x, y"):
        read(saved(tmp_path, np.ones((2, 3))), SPEC, ArraySpec("y", "bool", (4,)))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    objects = np.array([[{}], [{}]], dtype=object)
    np.save(tmp_path / "it.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "it.npz", x=objects)
    for name in ("it.npy", "it.npz"):
        with pytest.raises(ItemError, match="object cannot become float32"):
            read(tmp_path / name)


def huge_header() -> bytes:
    stream = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (2, 10**13)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def test_a_header_may_not_claim_too_much(tmp_path: Path) -> None:
    (tmp_path / "it.npy").write_bytes(huge_header())
    with zipfile.ZipFile(tmp_path / "it.npz", "w") as archive:
        archive.writestr("x.npy", huge_header())
    claim = nibabel.Nifti1Header()
    claim.set_data_shape((30_000, 30_000, 30_000))
    claim["magic"], claim["vox_offset"] = b"n+1", 352
    with gzip.open(tmp_path / "it.nii.gz", "wb") as file:
        file.write(claim.binaryblock + bytes(1000))
    for name in ("it.npy", "it.npz", "it.nii.gz"):
        with pytest.raises(ItemError, match="the limit is 8 GiB"):
            read(tmp_path / name)


# The decoders warn of what they meet.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_every_kind_of_damage_is_one_line(tmp_path: Path) -> None:
    """Truncated anywhere, empty, or other bytes: always an ItemError."""
    random = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", random.random((2, 50)))
    np.savez_compressed(tmp_path / "b.npz", x=random.random((2, 50)))
    pixels = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "bmp", "tif", "webp"):
        Image.fromarray(pixels).save(tmp_path / f"c.{suffix}")
    volume = nibabel.Nifti1Image(random.random((5, 6, 7)), np.eye(4))
    nibabel.save(volume, tmp_path / "d.nii")
    nibabel.save(volume, tmp_path / "e.nii.gz")
    wanted = {".npy": (2, 50), ".npz": (2, 50), ".nii": (1, 5, 6, 7), ".gz": (1, 5, 6, 7)}
    for path in sorted(tmp_path.iterdir()):
        spec = ArraySpec("x", "float32", wanted.get(path.suffix, (3, 20, 30)))
        whole = path.read_bytes()
        assert read(path, spec)["x"].shape == spec.shape
        for part in (0, 1, 10, 100, len(whole) // 2, len(whole) - 60):
            path.write_bytes(whole[:part])
            with pytest.raises(ItemError) as caught:
                read(path, spec)
            assert "\n" not in str(caught.value)
        for _ in range(60):
            path.write_bytes(damaged(whole, random))
            try:
                read(path, spec)
            except ItemError as error:
                assert "\n" not in str(error)  # noqa: PT017 - it may also read


def damaged(whole: bytes, random: np.random.Generator) -> bytes:
    data = bytearray(whole)
    for place in random.integers(0, min(len(data), 400), 8):
        data[place] = random.integers(0, 256)
    return bytes(data)


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ItemError, match="cannot be read \\(No such file"):
        read(tmp_path / "it.npy")


@pytest.mark.parametrize(
    ("file", "module", "install"),
    [
        ("a.png", "PIL.Image", r"pip install shardline\[images\]"),
        ("a.nii", "nibabel", r"pip install shardline\[volumes\]"),
    ],
)
def test_a_missing_library_is_found_before_the_run(
    monkeypatch: pytest.MonkeyPatch, file: str, module: str, install: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    require_extras([Item("b", Path("b.npy"))])
    with pytest.raises(PreflightError, match=install):
        require_extras([Item("b", Path("b.npy")), Item("a", Path(file))])
    with pytest.raises(PreflightError, match=install):
        read(Path(file))


def test_a_dtype_that_items_cannot_have() -> None:
    with pytest.raises(ConfigError, match="x: an item cannot have dtype 'complex64'"):
        ArraySpec("x", "complex64", (2,))
