"""`bench --profile`: traces of a benchmark's steps, and how to have them from Nsight Systems."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parallel.errors import ConfigError

if TYPE_CHECKING:
    from runner.engine.step_profile import StepProfile

Profile = Annotated[
    Path | None,
    typer.Option(
        "--profile", metavar="DIR", help="Write a trace a rank of one more warm-up round there."
    ),
]
ProfileSteps = Annotated[
    int, typer.Option("--profile-steps", min=1, help="Most steps of the trace.")
]
DEFAULT_STEPS = 16


@dataclass(frozen=True)
class Traces:
    """Of all ranks, one file each.

    Attributes:
        round_index: the round that is recorded; its times must not count.
    """

    folder: Path
    round_index: int
    num_steps: int

    def prepare(self) -> None:
        """Raises ConfigError: the folder cannot be written to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--profile {self.folder}: {error.strerror}") from None
        if not os.access(self.folder, os.W_OK):
            raise ConfigError(f"--profile {self.folder}: give a directory that can be written to")

    def of_rank(self, rank: int) -> "StepProfile":
        from runner.engine.step_profile import StepProfile

        return StepProfile(self._file(rank), round_index=self.round_index, num_steps=self.num_steps)

    def describe(self, num_ranks: int, arguments: Sequence[str]) -> str:
        """Where the traces are, and the command that has Nsight Systems record the same.

        Args:
            arguments: those of this command.
        """
        files = ", ".join(str(self._file(rank)) for rank in range(num_ranks))
        nsys = ["nsys", "profile", "--trace=cuda,nvtx", "--cuda-graph-trace=node", "--sample=none"]
        nsys.append(f"--output={self.folder / 'nsys'}")
        again = ["shardline", *_without_profile(arguments), "--set", "observability.nvtx=true"]
        return (
            f"shardline: traces, for Perfetto or chrome://tracing: {files}\n"
            f"shardline: the same by Nsight Systems: {shlex.join([*nsys, *again])}"
        )

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.json"


def _without_profile(arguments: Sequence[str]) -> list[str]:
    """Nsight and PyTorch's profiler cannot both watch a GPU."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--profile", "--profile-steps"):
            next(rest, None)
        elif not argument.startswith(("--profile=", "--profile-steps=")):
            kept.append(argument)
    return kept
