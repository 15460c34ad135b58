"""`Agenda`: which artefact is built next, where several processes build at once.

The longest come first, so that no process begins a long one when the others are about to end. Of
those that choose their kernels by timing, few are built at the same time: they would time each
other. Before all comes the shortest one of inductor: it precompiles the headers that all of them
include, for which the others would only wait. What another backend builds comes before them
meanwhile, and so do those that choose their kernels, which they do first.
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
    def is_inductors(self) -> bool:
        """Whether it is a library of inductor."""
        return self.backend == "inductor"

    @property
    def is_tuned(self) -> bool:
        """Whether its kernels are searched by timing; see `runner.compiler.inductor`."""
        return self.is_inductors and self.segment.num_rows == 1

    @property
    def effort(self) -> tuple[bool, bool, int]:
        """Orders builds by how long they take: inductor, which calls compilers, takes longest."""
        num_ops = sum(node.op == "call_function" for node in self.program.graph.nodes)
        return self.is_tuned, self.is_inductors, num_ops

    def __str__(self) -> str:
        return f"{self.segment.kind} x {self.segment.num_rows}"


class Agenda:
    """What is still to be built; several threads take from it."""

    def __init__(self, builds: Iterable[Build], *, most_tuned: int = MOST_TUNED) -> None:
        self._waiting = sorted(builds, key=lambda build: build.effort, reverse=True)
        libraries = [build for build in self._waiting if build.is_inductors]
        self._makes_headers = libraries[-1] if libraries else None
        self._most_tuned = most_tuned
        self._num_tuned = 0
        self._has_headers = False
        self._changed = Condition()

    def take(self) -> Build:
        """The next one that may begin; waits while there is none. Call it once for each build.

        Whoever takes one calls `finished` with it.
        """
        with self._changed:
            while True:
                for build in sorted(self._waiting, key=self._turn):
                    if not build.is_tuned or self._num_tuned < self._most_tuned:
                        self._waiting.remove(build)
                        self._num_tuned += build.is_tuned
                        return build
                self._changed.wait()

    def finished(self, build: Build) -> None:
        """It is built, or cannot be."""
        with self._changed:
            self._num_tuned -= build.is_tuned
            self._has_headers |= build is self._makes_headers
            self._changed.notify_all()

    def _turn(self, build: Build) -> int:
        """Orders what is waiting: the precompiling one, what needs no headers yet, the others."""
        if build is self._makes_headers:
            return 0
        return 2 if build.is_inductors and not (build.is_tuned or self._has_headers) else 1
