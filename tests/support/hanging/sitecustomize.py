"""Lets a rank of the command hang in its step loop once a file appears; its other threads live on.

For PYTHONPATH. The files are SHARDLINE_TEST_HANG with the rank behind it.
"""

import os
import threading
import time
from pathlib import Path
from typing import Any


def hang_here(*_args: Any) -> None:
    """Stands in for a step."""
    while True:
        time.sleep(3600)


def _wait_for_the_file() -> None:
    file = Path(os.environ["SHARDLINE_TEST_HANG"] + os.environ.get("RANK", "0"))
    while not file.exists():
        time.sleep(0.05)
    from runner.engine.stage_runner import StageRunner
    from runner.pipeline.stage_worker import StageWorker

    StageRunner._forward = StageRunner.rest = hang_here  # type: ignore[assignment,method-assign]
    StageWorker._compute = hang_here  # type: ignore[assignment,method-assign]


if "SHARDLINE_TEST_HANG" in os.environ:
    threading.Thread(target=_wait_for_the_file, daemon=True).start()
