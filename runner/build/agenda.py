"""`Agenda`: which artefact is built next, where several processes build at once.

The longest come first, so that no process begins a long one when the others are about to end. Of
those that choose their kernels by timing, few are built at the same time: they would time each
other.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from threading import Condition

import torch

from runner.compiler.segment import Segment

MOST_TUNED = 2
"""Builds that tune by timing at the same time."""


@dataclass(frozen=True)
class Build:
    """An artefact to be made."""

    backend: str
    segment: Segment
    program: torch.export.ExportedProgram
    key: str

    @property
    def is_tuned(self) -> bool:
        """Whether its kernels are searched by timing; see `runner.compiler.inductor`."""
        return self.backend == "inductor" and self.segment.num_rows == 1

    @property
    def effort(self) -> tuple[bool, bool, int]:
        """Orders builds by how long they take: inductor, which calls compilers, takes longest."""
        num_ops = sum(node.op == "call_function" for node in self.program.graph.nodes)
        return self.is_tuned, self.backend == "inductor", num_ops

    def __str__(self) -> str:
        return f"{self.segment.kind} x {self.segment.num_rows}"


class Agenda:
    """What is still to be built; several threads take from it."""

    def __init__(self, builds: Iterable[Build], *, most_tuned: int = MOST_TUNED) -> None:
        self._waiting = sorted(builds, key=lambda build: build.effort, reverse=True)
        self._most_tuned = most_tuned
        self._num_tuned = 0
        self._changed = Condition()

    def take(self) -> Build:
        """The longest that may begin; waits while there is none. Call it once for each build.

        Whoever takes one calls `finished` with it.
        """
        with self._changed:
            while True:
                for build in self._waiting:
                    if not build.is_tuned or self._num_tuned < self._most_tuned:
                        self._waiting.remove(build)
                        self._num_tuned += build.is_tuned
                        return build
                self._changed.wait()

    def finished(self, build: Build) -> None:
        """It is built, or cannot be."""
        with self._changed:
            self._num_tuned -= build.is_tuned
            self._changed.notify_all()
