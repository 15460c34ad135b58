"""`import` of a TensorFlow SavedModel: a script converts it to ONNX in an environment of its own.

TensorFlow is no requirement of ours and is never imported here. Not here: opening the ONNX graph.
"""

import os
import subprocess
import sys
from pathlib import Path

from parallel.errors import ConfigError, IntegrityError, PreflightError

_SCRIPT = Path(__file__).parents[2] / "scripts" / "savedmodel-to-onnx"
_NOT_INSTALLED = PreflightError.exit_code
_MODEL_FILE = "saved_model.pb"


def import_saved_model(folder: Path, out: Path) -> None:
    """Write the serving signature of a SavedModel as an ONNX file.

    The first call installs TensorFlow under ${XDG_CACHE_HOME:-~/.cache}/shardline, which takes a
    minute and a package index; PYTHON names another interpreter than ours for it.

    Raises:
        ConfigError: `out` is not to be written, or the model cannot be expressed in ONNX.
        IntegrityError: `folder` is no SavedModel.
        PreflightError: the script is absent, or TensorFlow could not be installed.
    """
    if not (folder / _MODEL_FILE).is_file():
        raise IntegrityError(
            f"{folder}: holds no {_MODEL_FILE}; give the folder of a TensorFlow SavedModel"
        )
    if out.suffix != ".onnx" or not out.parent.is_dir() or out.exists():
        raise ConfigError(f"{out}: give a new .onnx file in a folder that exists")
    if not _SCRIPT.is_file():
        raise PreflightError(
            f"{_SCRIPT} is absent; a SavedModel is converted by a checkout of shardline, not by "
            "the installed package"
        )
    environment = {"PYTHON": sys.executable, **os.environ}
    done = subprocess.run(
        [str(_SCRIPT), str(folder.resolve()), str(out.resolve())],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == _NOT_INSTALLED:
        raise PreflightError(last)
    raise ConfigError(f"{folder}: tf2onnx cannot convert it ({last})")
