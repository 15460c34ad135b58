"""Spoils a rank's step loop of the command once a file appears; its other threads live on.

For PYTHONPATH. The files are SHARDLINE_TEST_HANG with the rank behind it; they say what goes wrong.
"""

import os
import threading
import time
from pathlib import Path
from typing import Any


def hang_here(*_args: Any) -> None:
    """Stands in for a step, or for what rank 0 does with its tokens."""
    while True:
        time.sleep(3600)


def raise_here(*_args: Any) -> None:
    """Stands in for a step."""
    raise ValueError("the step went wrong")


def _wait_for_the_file() -> None:
    file = Path(os.environ["SHARDLINE_TEST_HANG"] + os.environ.get("RANK", "0"))
    while not file.exists():
        time.sleep(0.05)
    from runner.engine.stage_runner import StageRunner
    from runner.pipeline.stage_worker import StageWorker

    if (how := file.read_text()) == "hang in take":
        from runner.serve.front import ServeFront

        ServeFront._take = hang_here  # type: ignore[assignment,method-assign]
        return
    step = {"hang": hang_here, "raise": raise_here}[how]
    StageRunner._forward = StageRunner.rest = step  # type: ignore[assignment,method-assign]
    StageWorker._compute = step  # type: ignore[assignment,method-assign]


if "SHARDLINE_TEST_HANG" in os.environ:
    threading.Thread(target=_wait_for_the_file, daemon=True).start()
