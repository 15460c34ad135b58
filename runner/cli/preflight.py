"""`shardline --preflight COMMAND`: what the command needs of this host is checked before it.

The image's entrypoint runs every command so. What is wrong is told with the option of `docker run`,
or the line of compose.yaml, that mends it. Not here: the checks; they are `doctor`'s.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.errors import PreflightError

if TYPE_CHECKING:
    from runner.config.load import LoadedConfig
    from runner.observe.preflight import Demand

_ASKED = "SHARDLINE_PREFLIGHT"


def ask_for_preflight() -> None:
    """Let the command that follows check first; its ranks do not."""
    os.environ[_ASKED] = "1"


def check_model(loaded: "LoadedConfig", *, compiles: bool = False) -> None:
    """Check for a job that runs, or is compiled, from a model's own files, if that was asked for.

    Raises:
        PreflightError: something is missing.
    """
    if not _is_due():
        return
    from runner.observe.preflight import Demand

    config = loaded.config
    backend = config.compile.backend
    is_named = compiles or loaded.origins.get("compile.backend", "default") != "default"
    by_backend = f"compile.backend: {backend}" if is_named and backend == "tensorrt" else None
    by_device = "parallel.device: cuda" if config.parallel.device == "cuda" else None
    reason = None if config.parallel.device == "cpu" else by_device or by_backend
    _check(Demand(sum(config.parallel.tensor_parallel_sizes), gpus_for=reason))


def check_bundle(path: Path) -> None:
    """Check for a job that runs from a bundle, every file of which is read, if that was asked for.

    Raises:
        PreflightError: something is missing.
        IntegrityError: a file of the bundle is absent or was changed.
    """
    if not _is_due():
        return
    from runner.bundle.bundle import Bundle
    from runner.observe.preflight import Demand

    bundle = Bundle.open(path)
    on_gpu = bundle.manifest.host.device != "cpu"
    reason = f"{path}, which was compiled for GPUs," if on_gpu else None
    _check(Demand(len(bundle.plan.ranks), gpus_for=reason))
    bundle.verify()


def _is_due() -> bool:
    from parallel.launch import adopt

    env = adopt() if _ASKED in os.environ else None
    return _ASKED in os.environ and env is None


def _check(demand: "Demand") -> None:
    from runner.observe.preflight import inspect_host

    findings = [f for f in inspect_host(demand) if f.status in ("error", "warning")]
    for finding in findings:
        fix = f"; fix: {finding.fix}" if finding.fix else ""
        sys.stderr.write(f"shardline: preflight {finding.status}, {finding.check}: ")
        sys.stderr.write(f"{finding.detail}{fix}\n")
    errors = [finding.check for finding in findings if finding.status == "error"]
    if errors:
        raise PreflightError(
            f"preflight found {len(errors)} error{'s' * (len(errors) > 1)} ({', '.join(errors)}); "
            "each line above says what mends it"
        )
