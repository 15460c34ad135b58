"""Draw images with a few lines of text, plain or noisy, and write down what they say.

    python -m examples.ocr.draw_text models/ocr/images --num-images 4
    python -m examples.ocr.draw_text models/ocr/noisy --num-images 4 --noisy

Writes page-000.png, ... and truth.json: for each image its lines with text and corners. The font is
the one that Pillow carries, so the images are the same on every machine.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter, ImageFont

IMAGE_SIZE = (640, 480)
"""Width and height in pixels."""
NOISE = 22.0
"""Standard deviation of a pixel's noise, of 255."""

Corners = tuple[tuple[float, float], ...]

_DIGITS, _LETTERS = "0123456789", "ABCDEFGHJKLMNPRSTUVWXYZ"
_FORMS = (
    "SERIAL ##-#### LOT @#",
    "MODEL @@#### REV @",
    "Date ####-##-##",
    "Torque ## Nm at ### rpm",
    "Checked by @. Holm",
    "PRESSURE MAX #.# BAR",
    "Order ######, part ## of ##",
)
"""`#` becomes a digit, `@` a letter."""
_WORD_GAP = "  "
"""Words stand two spaces apart: this font's single space is too narrow for the recogniser."""


@dataclass(frozen=True)
class DrawnLine:
    """One line of text.

    Attributes:
        text: what it says.
        corners: x and y in pixels of top left, top right, bottom right and bottom left.
    """

    text: str
    corners: Corners


def draw_page(seed: int, *, noisy: bool = False) -> tuple[Image.Image, list[DrawnLine]]:
    """An RGB image of three to five lines, and what they are.

    A noisy one is turned by up to 4 degrees, blurred, shaded from side to side, and grained.
    """
    rng = np.random.default_rng(seed)
    paper = tuple(int(v) for v in rng.integers(200, 256, 3))
    ink = tuple(int(v) for v in rng.integers(0, 70, 3))
    image = Image.new("RGB", IMAGE_SIZE, paper)
    lines = _draw_lines(image, rng, ink)
    return _worn(image, lines, rng, paper) if noisy else (image, lines)


def _draw_lines(image: Image.Image, rng: Generator, ink: tuple[int, ...]) -> list[DrawnLine]:
    pen, lines = ImageDraw.Draw(image), []
    forms = rng.permutation(len(_FORMS))[: rng.integers(3, 6)]
    row = 360 / len(forms)
    for index, form in enumerate(forms):
        text = _filled(_FORMS[form], rng)
        font = ImageFont.load_default(size=int(rng.integers(24, 37)))
        at = (float(rng.integers(60, 110)), 60 + row * index)
        spaced = text.replace(" ", _WORD_GAP)
        pen.text(at, spaced, fill=ink, font=font)
        left, top, right, bottom = pen.textbbox(at, spaced, font=font)
        corners = ((left, top), (right, top), (right, bottom), (left, bottom))
        lines.append(DrawnLine(text, corners))
    return lines


def _filled(form: str, rng: Generator) -> str:
    alphabets = {"#": _DIGITS, "@": _LETTERS}
    return "".join(str(rng.choice(list(alphabets[c]))) if c in alphabets else c for c in form)


def _worn(
    image: Image.Image, lines: list[DrawnLine], rng: Generator, paper: tuple[int, ...]
) -> tuple[Image.Image, list[DrawnLine]]:
    angle = float(rng.uniform(-4, 4))
    turned = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=paper)
    pixels = np.asarray(turned.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float64)
    left, right = rng.uniform(0.6, 1.0, 2)
    shade = np.linspace(left, right, image.width)[None, :, None]
    pixels = pixels * shade + rng.normal(0, NOISE, pixels.shape)
    worn = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return worn, [DrawnLine(line.text, _turned(line.corners, angle)) for line in lines]


def _turned(corners: Corners, angle_deg: float) -> Corners:
    """Corners after Pillow's `rotate`: against the clock, about the centre of the image."""
    centre, angle = np.array(IMAGE_SIZE) / 2, np.radians(angle_deg)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return tuple((float(x), float(y)) for x, y in (np.array(corners) - centre) @ turn.T + centre)


def main() -> None:
    """Draw the images of the seeds from --seed on."""
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    truth = {}
    for index in range(options.num_images):
        image, lines = draw_page(options.seed + index, noisy=options.noisy)
        file = options.folder / f"page-{index:03}.png"
        image.save(file)
        truth[file.name] = [asdict(line) for line in lines]
    target = options.folder / "truth.json"
    target.write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.num_images} images and {target}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to put the files; made if absent")
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noisy", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
