"""From a job to a rank's stage with its weights, and with its artefacts where it runs from a
bundle.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from parallel.collectives import Group
from parallel.context import ParallelContext
from parallel.transfer import CarryTransfer
from runner.bundle import manifest
from runner.bundle.bundle import Bundle
from runner.compiler.backends import Backends
from runner.compiler.kernels import check_kernels, watch_kernels
from runner.engine.compiled_stage import Artefacts, CompiledStage
from runner.engine.rebuilding import Artefact, build_artefacts
from runner.engine.stage_runner import StageRunner
from runner.models.attention import Attention
from runner.models.attention_choice import choose_decode, make_attention
from runner.models.decoder import DecoderStage
from runner.planning import DecoderJob


def load_stage(job: DecoderJob, context: ParallelContext) -> StageRunner:
    """Build the stage and read its weights; the KV cache comes later, by `allocate`.

    Raises:
        IntegrityError: a weight or an artefact is not what the manifest says, or cannot be read.
        IncompatibleError: an artefact was made for another host.
        PreflightError: a backend is not usable here, and was to build what the bundle holds anew.
    """
    dtype = getattr(torch, job.plan.dtype)
    if job.bundle and job.on_mismatch is None:
        watch_kernels(context.device, job.bundle.caches(context.rank))
    weights = job.weights(context.rank, dtype=dtype, device=context.device)
    runner = make_runner(job, context, weights)
    if job.bundle and job.on_mismatch != "eager":
        load = _rebuild if job.on_mismatch == "rebuild" else _load_bundled
        artefacts = load(job.bundle, runner.stage, context)
        runner.execute = CompiledStage(runner.stage, artefacts)
    if runner.execute or context.device.type == "cuda":
        runner.buckets = job.buckets
    return runner


def make_runner(
    job: DecoderJob, context: ParallelContext, weights: Iterable[tuple[str, torch.Tensor]]
) -> StageRunner:
    """A rank's stage with its weights, not compiled."""
    check_kernels(context)
    heads = job.plan.ranks[context.rank].heads
    attend = make_attention(
        heads,
        context.device,
        dtype=getattr(torch, job.plan.dtype),
        block_size=job.config.kv_cache.block_size,
        head_dim=job.spec.config.head_dim,
        decode=choose_decode(context),
    )
    stage = make_stage(job, context.rank, context.tp, attend)
    stage.load(weights)
    return StageRunner(context, stage, CarryTransfer(context, job.plan), heads.num_kv)


def make_stage(job: DecoderJob, rank: int, group: Group, attend: Attention) -> DecoderStage:
    """A rank's stage on the meta device, without weights."""
    rank_plan = job.plan.ranks[rank]
    return DecoderStage(
        job.spec.config,
        job.plan.stages[rank_plan.stage],
        rank_plan,
        group,
        attend=attend,
        max_model_len=job.plan.max_model_len,
        dtype=getattr(torch, job.plan.dtype),
    )


def load_artefacts(
    uses: Mapping[str, Mapping[int, Artefact]],
    folder_of: Callable[[str], Path],
    stage: DecoderStage,
    backends: Backends,
) -> Artefacts:
    """What runs each kind of part at each number of rows.

    Args:
        uses: kind -> number of rows -> artefact.
        folder_of: where the artefact of a key lies.
    """
    parts = stage.parts_by_kind()
    return {
        kind: {
            num_rows: backends[backend].load(folder_of(key), parts[kind].segment(num_rows))
            for num_rows, (backend, key) in by_rows.items()
        }
        for kind, by_rows in uses.items()
    }


def _load_bundled(bundle: Bundle, stage: DecoderStage, context: ParallelContext) -> Artefacts:
    """The artefacts of the bundle, with what loading them made when it was compiled."""
    backends = Backends(context.device)
    if caches := bundle.caches(context.rank):
        backends.read_caches(caches)
    return load_artefacts(uses_of(bundle, context.rank), bundle.artefact, stage, backends)


def _rebuild(bundle: Bundle, stage: DecoderStage, context: ParallelContext) -> Artefacts:
    """The same segments by the same backends, built for this rank's device and not kept."""
    backends = Backends(context.device)
    with TemporaryDirectory(prefix="shardline-rebuild-") as name:
        folder, uses = Path(name), uses_of(bundle, context.rank)
        built = build_artefacts(uses, stage, backends, context.device, folder)
        return load_artefacts(built, folder.joinpath, stage, backends)


def uses_of(bundle: Bundle, rank: int) -> dict[str, dict[int, Artefact]]:
    """What runs each kind of part at each number of rows on a rank of a bundle."""
    return with_backends(bundle.manifest.uses[rank], bundle.manifest.artefacts)


def with_backends(
    keys: Mapping[str, Mapping[int, str]], artefacts: Mapping[str, manifest.Artefact]
) -> dict[str, dict[int, Artefact]]:
    """Keys of artefacts together with the names of the backends that load them.

    Args:
        keys: kind -> number of rows -> key.
        artefacts: by key.
    """
    return {
        kind: {rows: (artefacts[key].backend, key) for rows, key in by_rows.items()}
        for kind, by_rows in keys.items()
    }
