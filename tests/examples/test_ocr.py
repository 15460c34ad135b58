"""The OCR example on onnxruntime: every drawn line is found where it is, and read."""

import difflib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.ocr.boxes import find_boxes
from examples.ocr.draw_text import DrawnLine, draw_page
from examples.ocr.ocr import (
    LINE_WIDTHS,
    Line,
    Model,
    decode,
    line_input,
    load_characters,
    page_input,
    read_image,
)
from examples.ocr.read_images import onnxruntime_model, read_text, write_lines, write_pages

ROOT = Path(__file__).parents[2]
SEEDS = range(6)
MAX_CORNER_ERROR = 22  # pixels: a box has a margin of about a third of its height on each side


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ocr")
    subprocess.run([sys.executable, ROOT / "examples/ocr/fetch", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def characters(models: Path) -> list[str]:
    return load_characters(models / "characters.txt")


@pytest.fixture(scope="module")
def detect(models: Path) -> Model:
    return onnxruntime_model(models / "detect.onnx")


@pytest.fixture(scope="module")
def recognize(models: Path) -> Model:
    return onnxruntime_model(models / "recognize.onnx")


@pytest.mark.parametrize("seed", SEEDS)
def test_plain_images_are_read_exactly(
    seed: int, detect: Model, recognize: Model, characters: list[str]
) -> None:
    image, drawn = draw_page(seed)
    found = read_image(image, detect=detect, recognize=recognize, characters=characters)
    assert [line.text for line in found] == [line.text for line in drawn]
    assert _worst_corner(found, drawn) < MAX_CORNER_ERROR


@pytest.mark.parametrize("seed", SEEDS)
def test_noisy_images_are_read_nearly(
    seed: int, detect: Model, recognize: Model, characters: list[str]
) -> None:
    image, drawn = draw_page(seed, noisy=True)
    found = read_image(image, detect=detect, recognize=recognize, characters=characters)
    assert len(found) == len(drawn)
    for line, truth in zip(found, drawn, strict=True):
        assert difflib.SequenceMatcher(None, line.text, truth.text).ratio() > 0.93, line.text
    assert _worst_corner(found, drawn) < MAX_CORNER_ERROR


def test_an_image_of_another_size_gives_boxes_in_its_own_pixels(
    detect: Model, recognize: Model, characters: list[str]
) -> None:
    image, drawn = draw_page(1)
    large = image.resize((1152, 864))  # shrunk to 5/9 for the detector
    found = read_image(large, detect=detect, recognize=recognize, characters=characters)
    assert [line.text for line in found] == [line.text for line in drawn]
    scaled = [DrawnLine(d.text, tuple((1.8 * x, 1.8 * y) for x, y in d.corners)) for d in drawn]
    assert _worst_corner(found, scaled) < 1.8 * MAX_CORNER_ERROR


def test_steps_with_files_between_them_read_the_same(
    tmp_path: Path, detect: Model, recognize: Model, characters: list[str]
) -> None:
    command = [sys.executable, "-m", "examples.ocr.draw_text", str(tmp_path), "--num-images", "2"]
    subprocess.run(command, check=True, cwd=ROOT)
    images = sorted(tmp_path.glob("*.png"))
    _run(detect, write_pages(images, tmp_path / "work"), tmp_path / "work" / "maps")
    _run(recognize, write_lines(images, tmp_path / "work"), tmp_path / "work" / "characters")
    truth = json.loads((tmp_path / "truth.json").read_text())
    for image in images:
        drawn = [line["text"] for line in truth[image.name]]
        assert read_text(image, tmp_path / "work", characters) == drawn


def test_a_slanted_region_is_boxed_along_its_slant() -> None:
    rows, columns = np.mgrid[:200, :300]
    slant = 0.2
    along = (columns - 150) * np.cos(slant) + (rows - 100) * np.sin(slant)
    across = (rows - 100) * np.cos(slant) - (columns - 150) * np.sin(slant)
    probabilities = ((abs(along) <= 80) & (abs(across) <= 10)).astype(np.float32)
    (box,) = find_boxes(probabilities, unclip_ratio=0.0)
    assert box.angle == pytest.approx(slant, abs=0.02)
    assert (box.width, box.height) == pytest.approx((161, 21), abs=3)
    (grown,) = find_boxes(probabilities, unclip_ratio=2.0)
    # area * ratio / perimeter on each of two sides
    margin = 2 * box.width * box.height * 2.0 / (2 * (box.width + box.height))
    assert grown.width - box.width == pytest.approx(margin)
    assert grown.height - box.height == pytest.approx(margin)


def test_faint_and_thin_regions_are_no_text() -> None:
    probabilities = np.zeros((64, 64), dtype=np.float32)
    probabilities[10:20, 10:50] = 0.4  # above the threshold, below the score
    probabilities[40, 10:50] = 0.9  # two pixels high after dilation
    assert find_boxes(probabilities) == []


def test_decode_drops_blanks_and_repeats() -> None:
    steps = [0, 1, 1, 0, 1, 2, 2, 3, 0, 2, 3]  # blank, a, b, space
    assert decode(np.eye(4, dtype=np.float32)[steps], ["a", "b", " "]) == ("aab b", 1.0)
    assert decode(np.eye(4, dtype=np.float32)[[0, 0]], ["a", "b", " "]) == ("", 0.0)


def test_characters_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 classes, but 2 characters"):
        decode(np.eye(4, dtype=np.float32), ["a", "b"])


def test_a_line_is_padded_to_the_next_width() -> None:
    image, _ = draw_page(0)
    (box, *_) = find_boxes(np.pad(np.ones((40, 200), dtype=np.float32), 60), unclip_ratio=0.0)
    line = line_input(image, box)
    assert line.shape == (3, 48, 320)
    assert LINE_WIDTHS == (160, 320, 640)
    used = round(48 * box.width / box.height)
    assert (line[:, :, :used] != 0).all()
    assert (line[:, :, used:] == 0).all()


def test_a_page_size_that_the_detector_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        page_input(draw_page(0)[0], (480, 650))


def _run(model: Model, inputs: Path, outputs: Path) -> None:
    outputs.mkdir()
    for file in inputs.glob("*.npy"):
        np.save(outputs / file.name, model(np.load(file)[None])[0])


def _worst_corner(found: list[Line], drawn: list[DrawnLine]) -> float:
    pairs = zip(found, drawn, strict=True)
    return float(max(abs(line.box.corners() - np.array(d.corners)).max() for line, d in pairs))
