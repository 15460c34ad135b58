"""Write synthetic chest CTs as .nii.gz files, in Hounsfield units; the same seed, the same files.

    python -m examples.ct.make_volume FOLDER [--count 4] [--size 512 512 320] [--seed 0]

`phantom` says what is in them. Needs nibabel, which `fetch` installs.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from examples.ct.phantom import FIELD_MM, make_phantom

SIZE = (224, 224, 160)
"""What the backbone was trained at; a scanner's own is about 512 x 512 x 320."""

SMALLEST = 16


def main() -> None:
    """Write, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="made if it is absent")
    parser.add_argument("--count", type=int, default=1, help="how many; default: %(default)s")
    parser.add_argument("--size", type=int, nargs=3, default=SIZE, help="voxels along x, y and z")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next has the next")
    options = parser.parse_args()
    if min(options.size) < SMALLEST:
        print(f"--size {options.size}: use at least {SMALLEST} along each axis", file=sys.stderr)
        sys.exit(2)
    options.folder.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seed, options.seed + options.count):
        file = options.folder / f"chest-{seed:03d}.nii.gz"
        write_volume(file, size=tuple(options.size), seed=seed)
        print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")


def write_volume(file: Path, *, size: tuple[int, int, int] = SIZE, seed: int) -> None:
    """Write one volume, its axes to the right, the front and the head (RAS)."""
    spacing = np.array(FIELD_MM) / size
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (np.array(size) - 1) / 2
    # nibabel's own constructors have no types.
    nifti: Any = nibabel.Nifti1Image
    image = nifti(make_phantom(size, seed), affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, file)


if __name__ == "__main__":
    main()
