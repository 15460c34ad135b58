"""A finding: what one preflight check saw, how bad it is, and what to do about it.

Not here: the checks. They live beside what they judge (`gpu_checks`, `host_checks`, `software`).
"""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "error", "absent"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    `status` is "error" where a job will fail, "warning" where it will be slow or may fail, and
    "absent" where there is nothing to check (no GPU, an optional package that is not installed).
    """

    check: str
    status: Status
    detail: str
    fix: str | None = None


def say_bytes(num_bytes: int) -> str:
    """A size in binary units as a person reads it: `say_bytes(67108864) == "64 MiB"`."""
    size = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
