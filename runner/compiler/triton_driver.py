"""Whether Triton can launch kernels in this process.

It launches them through a C module of its own, which it compiles once and keeps in its cache, and
needs no other compiler of the host. Not here: the kernels.
"""

from subprocess import CalledProcessError

CAUSES = (
    ImportError,
    AttributeError,
    OSError,
    RuntimeError,
    AssertionError,
    CalledProcessError,
)
"""Triton, a library or Python's headers are absent; there is no compiler, or it fails; a class that
Triton is told to use is not there.
"""


def find_obstacle() -> str | None:
    """Why Triton cannot start on this process's GPU, in its own words; None: it has started."""
    try:
        from triton.runtime import driver

        _ = driver.active  # It starts when it is first asked for.
    except CAUSES as error:
        return " ".join(str(error).split())
    return None
