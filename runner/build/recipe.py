"""`Recipe`: what differs between kinds of models when they are compiled."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from parallel.context import ParallelContext
from runner.build.built import Built
from runner.build.worklist import Work
from runner.bundle.builder import BundleBuilder
from runner.compiler.backends import Backends
from runner.job import Job


@dataclass(frozen=True)
class Verdict:
    """What comparing a compiled model with the original came to.

    Attributes:
        passed: false where nothing was compared, too.
        reason: what failed first, or why something was not compared; empty if all is well.
    """

    passed: bool
    reason: str

    def line(self) -> str:
        """The comparison in a line."""
        return "parity: passed" if self.passed else f"parity: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Recipe(Protocol):
    """How the model of one job becomes a bundle."""

    @property
    def job(self) -> Job: ...

    @property
    def source_files(self) -> Sequence[Path]:
        """What the weights are read from; none where they are random."""
        ...

    @property
    def kernels(self) -> Collection[str]:
        """Names of the Triton kernels that a run launches itself, beside the artefacts."""
        ...

    def works(self) -> list[Work]:
        """The segments of all ranks, each once, in one order on every rank."""
        ...

    def write_weights(self, rank: int, builder: BundleBuilder, *, source: str) -> None:
        """Write a rank's weights into the bundle.

        Args:
            source: the digest of the source files.
        """
        ...

    def copy_files(self, builder: BundleBuilder) -> None:
        """Write what else a run needs; called on rank 0."""
        ...

    def portable_config(self, device_type: str) -> dict[str, Any]:
        """The configuration in effect, with nothing in it that only this host has."""
        ...

    def compare(
        self,
        context: ParallelContext,
        builder: BundleBuilder,
        built: list[Built],
        backends: Backends,
    ) -> Verdict:
        """Load what was built as a run will, judge it together with the other ranks, and launch
        each of the `kernels`.
        """
        ...


def recipe_of(job: Job, *, traced_on: str | None = None) -> Recipe:
    """The recipe for the kind of model that a job is about.

    Args:
        traced_on: type of the device that segments are exported on; None: where the job runs.
    """
    if job.config.model.kind == "graph":
        from runner.build.graph_recipe import GraphRecipe
        from runner.graph_planning import GraphJob

        assert isinstance(job, GraphJob)
        return GraphRecipe(job, traced_on or job.device_type)
    from runner.build.decoder_recipe import DecoderRecipe
    from runner.planning import DecoderJob

    assert isinstance(job, DecoderJob)
    return DecoderRecipe(job)
