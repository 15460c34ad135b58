"""Write photographs for the classifier into a folder, each with the classes that are right for it.

    python -m examples.efficientnet.make_photos FOLDER [--variants 20]

They are those that the wheel of scikit-image holds; `fetch` installs it. With variants, each
photograph is also cut out and mirrored at random, always in the same ways.
"""

import argparse
import importlib.util
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from parallel.errors import PreflightError

PHOTOS: dict[str, dict[int, str]] = {
    "camera.png": {872: "tripod"},
    "chelsea.png": {281: "tabby", 282: "tiger cat", 285: "Egyptian cat"},
    "coffee.png": {967: "espresso", 968: "cup"},
    "motorcycle_left.png": {665: "moped", 670: "motor scooter"},
    "rocket.jpg": {657: "missile", 744: "projectile", 812: "space shuttle"},
}
"""ImageNet's classes that show what a photograph shows: index and name. The camera is grey."""

SMALLEST_CUT = 0.7
"""Share of a side that is left at least when a variant is cut out."""


def main() -> None:
    """Write, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="made if it is absent")
    parser.add_argument("--variants", type=int, default=0, help="of each photograph; default: none")
    options = parser.parse_args()
    try:
        for file in write_photos(options.folder, num_variants=options.variants):
            print(f"wrote {file}")
    except PreflightError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def write_photos(folder: Path, *, num_variants: int = 0) -> Iterator[Path]:
    """Write the photographs as they are, and JPEG variants of each.

    Args:
        folder: made if it is absent.
        num_variants: of each photograph, as STEM-0.jpg and so on.

    Yields:
        Each file once it is written.

    Raises:
        PreflightError: scikit-image is not installed.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.submodule_search_locations is None:
        raise PreflightError("scikit-image is not installed; run examples/efficientnet/fetch")
    source = Path(spec.submodule_search_locations[0]) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOS:
        yield Path(shutil.copyfile(source / name, folder / name))
        # Seeded by name, so that more variants are the same ones and some.
        chance = random.Random(name)
        for index in range(num_variants):
            file = folder / f"{Path(name).stem}-{index}.jpg"
            with Image.open(source / name) as photo:
                vary(photo, chance).save(file, quality=90)
            yield file


def vary(photo: Image.Image, chance: random.Random) -> Image.Image:
    """A part of the photograph, mirrored or not."""
    width, height = (round(chance.uniform(SMALLEST_CUT, 1) * side) for side in photo.size)
    left, top = chance.randint(0, photo.width - width), chance.randint(0, photo.height - height)
    part = photo.crop((left, top, left + width, top + height))
    mirrored = chance.random() < 0.5
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else part


if __name__ == "__main__":
    main()
