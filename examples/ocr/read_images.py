"""Read the text of images in three steps, with `shardline run` between them; or all at once.

    python -m examples.ocr.read_images pages IMAGES WORK         writes WORK/pages/*.npy
    shardline run ... WORK/pages --output WORK/maps --format npy         the detector
    python -m examples.ocr.read_images lines IMAGES WORK         writes WORK/lines/*.npy
    shardline run ... WORK/lines --output WORK/characters --format npy   the recogniser
    python -m examples.ocr.read_images text IMAGES WORK --models MODELS      prints the text

    python -m examples.ocr.read_images reference IMAGES --models MODELS      with onnxruntime

IMAGES is a folder of .png files, MODELS what `fetch` wrote.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from examples.ocr.ocr import (
    Floats,
    Model,
    decode,
    image_boxes,
    line_input,
    load_characters,
    page_input,
    read_image,
)


def write_pages(images: Sequence[Path], work: Path) -> Path:
    """Write what the detector sees of each image, WORK/pages/NAME.npy; returns the folder."""
    folder = _made(work / "pages")
    for file in images:
        np.save(folder / f"{file.stem}.npy", page_input(Image.open(file)))
    return folder


def write_lines(images: Sequence[Path], work: Path) -> Path:
    """Write what the recogniser sees of each line, WORK/lines/NAME-NN.npy; returns the folder.

    Reads the detector's results, WORK/maps/NAME.npy.
    """
    folder = _made(work / "lines")
    for file in images:
        image = Image.open(file)
        for number, box in enumerate(image_boxes(_result(work / "maps", file.stem)[0], image)):
            np.save(folder / f"{file.stem}-{number:02}.npy", line_input(image, box))
    return folder


def read_text(image: Path, work: Path, characters: Sequence[str]) -> list[str]:
    """The lines of an image from the recogniser's results, WORK/characters/NAME-NN.npy."""
    names = sorted(file.stem for file in (work / "lines").glob(f"{image.stem}-[0-9][0-9].npy"))
    return [decode(_result(work / "characters", name), characters)[0] for name in names]


def onnxruntime_model(file: Path) -> Model:
    """An ONNX file as a callable, on one thread of the CPU."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(x: Floats) -> Floats:
        output: Floats = session.run(None, {name: x})[0]
        return output

    return call


def _result(folder: Path, name: str) -> Floats:
    file = folder / f"{name}.npy"
    if not file.is_file():
        sys.exit(
            f"{file} is absent; write it with shardline run ... --output {folder} --format npy"
        )
    array: Floats = np.load(file).astype(np.float32)
    return array


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    """Run one step."""
    options = _options()
    images = sorted(options.images.glob("*.png"))
    if not images:
        sys.exit(f"{options.images} holds no .png file; draw some with examples.ocr.draw_text")
    if options.step in ("pages", "lines"):
        write = write_pages if options.step == "pages" else write_lines
        print(f"wrote {write(images, options.work)}")
        return
    characters = load_characters(options.models / "characters.txt")
    if options.step == "text":
        texts = [read_text(image, options.work, characters) for image in images]
    else:
        texts = _reference(images, options.models, characters)
    for image, lines in zip(images, texts, strict=True):
        print("\n  ".join([image.name, *lines]))


def _reference(images: list[Path], models: Path, characters: list[str]) -> list[list[str]]:
    detect, recognize = (onnxruntime_model(models / f"{n}.onnx") for n in ("detect", "recognize"))
    lines = [
        read_image(Image.open(file), detect=detect, recognize=recognize, characters=characters)
        for file in images
    ]
    return [[line.text for line in found] for found in lines]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    for step in ("pages", "lines", "text", "reference"):
        command = steps.add_parser(step)
        command.add_argument("images", type=Path, help="a folder of .png files")
        if step != "reference":
            command.add_argument("work", type=Path, help="where the steps put their files")
        if step in ("text", "reference"):
            command.add_argument("--models", type=Path, required=True, help="what fetch wrote")
    return parser.parse_args()


if __name__ == "__main__":
    main()
