"""From a bundle to a job: its own configuration, what may differ at run time, and whether it may
run at all.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from parallel.errors import ConfigError, IncompatibleError, ParityError
from runner.bundle.bundle import Bundle
from runner.bundle.host import Host
from runner.bundle.layout import MODEL
from runner.bundle.signature import check_signature
from runner.config.load import load
from runner.config.schema import RunnerConfig
from runner.graph_planning import GraphJob
from runner.job import Job
from runner.planning import DecoderJob

AT_RUN_TIME = {
    "decoder": (
        "compile.enforce_eager",
        "distributed.",
        "kv_cache.gpu_memory_utilization",
        "observability.",
        "scheduler.max_num_seqs",
        "scheduler.max_queue_size",
        "security.bundle_key",
        "security.network_",
        "server.",
    ),
    "graph": (
        "compile.enforce_eager",
        "distributed.",
        "model.preprocess.",
        "observability.",
        "scheduler.max_queue_delay_ms",
        "scheduler.max_queue_size",
        "scheduler.preferred_batch_size",
        "security.bundle_key",
        "security.network_",
        "server.",
        "tiling",
    ),
}
"""Keys, or the beginnings of keys, that do not change what was compiled."""


def open_job(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    accept_parity: bool = False,
    on_mismatch: Literal["fail", "rebuild", "eager"] = "fail",
) -> Job:
    """Check a bundle and make a job of it.

    Args:
        overrides: the `a.b=value` strings of `--set`.
        accept_parity: run it though it failed its parity check, or was not checked.
        on_mismatch: what to do where it was compiled for another host.

    Raises:
        IntegrityError: a file is absent, damaged or of another rank, or the bundle is not signed as
            `security.bundle_key` asks.
        IncompatibleError: it was compiled for another host.
        ParityError: it did not compute what the model computes.
        ConfigError: an override of what was compiled.
    """
    bundle = Bundle.open(path)
    allowed = AT_RUN_TIME[bundle.plan.kind]
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not key.startswith(allowed):
            raise ConfigError(
                f"--set {key} would change what was compiled; with --bundle, set "
                f"{', '.join(allowed)}, or compile again"
            )
    parity = bundle.manifest.parity
    if parity.get("passed") is not True and not accept_parity:
        raise ParityError(
            f"{path}: {parity.get('reason')}; compile again, or run it with --accept-parity"
        )
    base = dict(bundle.manifest.config)
    # The folder of the model's files, or one of them.
    below = Path(base["model"]["path"]).relative_to(MODEL)
    base["model"] = {**base["model"], "path": str(bundle.model_folder / below)}
    config = load(None, base=base, overrides=overrides).config
    if config.security.bundle_key:
        check_signature(path, Path(config.security.bundle_key))
    if bundle.plan.kind == "decoder":
        _check_num_seqs(config, bundle)
    here = _host(config, bundle)
    try:
        bundle.check_host(here)
    except IncompatibleError:
        if on_mismatch == "fail":
            raise
        base["parallel"] = {**base["parallel"], "device": here.device}
        job = _job_of(bundle, load(None, base=base, overrides=overrides).config)
        return replace(job, on_mismatch=on_mismatch)
    return _job_of(bundle, config)


def _job_of(bundle: Bundle, config: RunnerConfig) -> Job:
    kind: type[DecoderJob] | type[GraphJob]
    kind = DecoderJob if bundle.plan.kind == "decoder" else GraphJob
    return kind.from_bundle(bundle, config)


def _check_num_seqs(config: RunnerConfig, bundle: Bundle) -> None:
    """Raises ConfigError: more sequences at once than there are artefacts for."""
    asked, compiled = config.scheduler.max_num_seqs, bundle.manifest.config["scheduler"]
    if asked > compiled["max_num_seqs"]:
        raise ConfigError(
            f"scheduler.max_num_seqs={asked} exceeds the {compiled['max_num_seqs']} that "
            f"{bundle.path} was compiled for; use fewer, or compile again"
        )


def _host(config: RunnerConfig, bundle: Bundle) -> Host:
    """This host; with its CPU, where the bundle is for a GPU and there is none."""
    import torch

    if config.parallel.device == "cpu" or not torch.cuda.is_available():
        return Host.current("cpu")
    return Host.current(f"cuda:{bundle.plan.devices[0]}")
