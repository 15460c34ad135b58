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
    from runner.bundle.bundle import Bundle
    from runner.config.load import LoadedConfig
    from runner.observe.finding import Finding
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
    if _is_due():
        _check(_demand_of_model(loaded, compiles=compiles))


def check_bundle(path: Path, *, on_mismatch: str) -> None:
    """Check for a job that runs from a bundle, every file of which is read, if that was asked for.

    Args:
        on_mismatch: see `runner.bundled.open_job`; without a GPU, what is not refused runs on the
            CPU.

    Raises:
        PreflightError: something is missing.
        IntegrityError: a file of the bundle is absent or was changed.
    """
    if not _is_due():
        return
    from runner.bundle.bundle import Bundle

    bundle = Bundle.open(path)
    _check(_demand_of_bundle(bundle, on_mismatch))
    bundle.verify()


def check_socket(uds: str | None) -> None:
    """Check for a server at a Unix socket whether it can be made, if that was asked for.

    Raises:
        PreflightError: it cannot.
    """
    if uds is None or not _is_due():
        return
    from runner.observe.preflight import inspect_socket_dir

    _tell([inspect_socket_dir(uds)])


def _demand_of_model(loaded: "LoadedConfig", *, compiles: bool) -> "Demand":
    from runner.observe.preflight import Demand

    config = loaded.config
    num_ranks, device = sum(config.parallel.tensor_parallel_sizes), config.parallel.device
    is_named = compiles or loaded.origins.get("compile.backend", "default") != "default"
    by_backend = is_named and config.compile.backend == "tensorrt"
    on_cpu = "--device cpu" + ", and another compile.backend" * by_backend
    if device == "cpu":
        return Demand(num_ranks)
    if device == "cuda" or by_backend:
        reason = "parallel.device: cuda" if device == "cuda" else "compile.backend: tensorrt"
        return Demand(num_ranks, "needed", reason, on_cpu)
    return Demand(num_ranks, "expected", "parallel.device: auto", on_cpu)


def _demand_of_bundle(bundle: "Bundle", on_mismatch: str) -> "Demand":
    from runner.observe.preflight import Demand

    num_ranks, manifest = len(bundle.plan.ranks), bundle.manifest
    if manifest.host.device == "cpu":
        return Demand(num_ranks)
    reason = f"{bundle.path}, which was compiled for GPUs,"
    rebuilds_on_cpu = on_mismatch == "rebuild" and "tensorrt" not in manifest.backends
    if on_mismatch == "eager" or rebuilds_on_cpu:
        return Demand(num_ranks, "taken", reason)
    return Demand(num_ranks, "needed", reason, "--on-mismatch eager")


def _is_due() -> bool:
    from parallel.launch import adopt

    env = adopt() if _ASKED in os.environ else None
    return _ASKED in os.environ and env is None


def _check(demand: "Demand") -> None:
    from runner.observe.preflight import inspect_host

    _tell(inspect_host(demand))


def _tell(found: "list[Finding]") -> None:
    findings = [finding for finding in found if finding.status in ("error", "warning")]
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
