"""`Job`: what every rank knows before it starts; of a language model, `runner.planning`; of any
other model, `runner.graph_planning`.
"""

from dataclasses import dataclass
from typing import Literal

from parallel.plan import ShardPlan
from runner.bundle.bundle import Bundle
from runner.config.schema import RunnerConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model, divided, and how it is to run.

    Attributes:
        bundle: what it runs from; None: from the model's own files.
        on_mismatch: what runs instead of the bundle's artefacts, where they are for another host.
    """

    config: RunnerConfig
    plan: ShardPlan
    bundle: Bundle | None = None
    on_mismatch: Literal["rebuild", "eager"] | None = None

    @property
    def device_type(self) -> Literal["cpu", "cuda"]:
        """Where the ranks run; auto is cuda where a GPU is usable."""
        return device_type_of(self.config)


def device_type_of(config: RunnerConfig) -> Literal["cpu", "cuda"]:
    """Where a job of this configuration runs on this host."""
    wanted = config.parallel.device
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
