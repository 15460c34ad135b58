"""One process holds a lock, and a process that is killed holds none."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from processes import ROOT

from parallel.errors import PreflightError
from runner.bundle.lock import exclusive

HOLD = """
import sys, time
from pathlib import Path
from runner.bundle.lock import exclusive
with exclusive(Path(sys.argv[1]), writer="test", written="file"):
    print("held", flush=True)
    time.sleep(600)
"""

held = partial(exclusive, writer="test", written="file")


def test_a_killed_holder_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    refused = pytest.raises(PreflightError, match=rf"lock: .* \(process {holder.pid}\) writes")
    with refused, held(path):
        pytest.fail("it was held")
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=30)
    with held(path):
        assert path.read_text() == str(os.getpid())
    assert not path.exists()


def test_it_is_freed_when_the_body_raises(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), held(tmp_path / "lock"):
            raise KeyError


def test_a_longer_number_of_an_earlier_holder_does_not_show(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("9" * 30)
    with held(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text() == str(os.getpid())
