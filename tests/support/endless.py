"""Jobs that generate until something ends them, and how they end."""

import subprocess
import time
from pathlib import Path
from typing import Any

from checkpoints import add_tokenizer, make_checkpoint
from processes import start_command, wait_until_gone


def make_endless(folder: Path, **changes: Any) -> Path:
    """A small model that can generate for minutes; `changes` are values of its config."""
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    make_checkpoint(
        "llama",
        folder,
        vocab_size=300,
        max_position_embeddings=200_000,
        rope_parameters=plain,
        eos_token_id=None,
        **changes,
    )
    return add_tokenizer(folder)


def generating(model: Path, *arguments: str) -> subprocess.Popen[str]:
    """A job whose first text is out."""
    common = ["generate", "--prompt", "Hello", "--model", str(model), "--max-tokens", "20000"]
    job = start_command(*common, *arguments)
    assert job.stdout is not None
    assert job.stdout.read(1)
    return job


def ends(job: subprocess.Popen[str], model: Path, *, within_s: float) -> tuple[int, str]:
    """Exit code and last line of standard error, once the job and all its ranks are gone."""
    started = time.monotonic()
    _, errors = job.communicate(timeout=within_s)
    left = wait_until_gone(str(model), timeout_s=within_s - (time.monotonic() - started))
    assert left == []
    return job.returncode, errors.splitlines()[-1]
