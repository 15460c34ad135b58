"""`Agenda`: which artefact is built next, where several processes build at once.

The longest come first, so that no process begins a long one when the others are about to end. Of
those that choose their kernels by timing, few are built at the same time: they would time each
other. The first one of inductor precompiles the headers that all of them include, for which the
others would only wait, so what another backend builds comes before them meanwhile.
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
        self._most_tuned = most_tuned
        self._num_tuned = 0
        self._first_of_inductor: Build | None = None
        self._has_headers = False
        self._changed = Condition()

    def take(self) -> Build:
        """The next one that may begin; waits while there is none. Call it once for each build.

        Whoever takes one calls `finished` with it.
        """
        with self._changed:
            while True:
                for build in sorted(self._waiting, key=self._comes_later):
                    if not build.is_tuned or self._num_tuned < self._most_tuned:
                        self._waiting.remove(build)
                        self._num_tuned += build.is_tuned
                        if build.is_inductors and self._first_of_inductor is None:
                            self._first_of_inductor = build
                        return build
                self._changed.wait()

    def finished(self, build: Build) -> None:
        """It is built, or cannot be."""
        with self._changed:
            self._num_tuned -= build.is_tuned
            self._has_headers |= build is self._first_of_inductor
            self._changed.notify_all()

    def _comes_later(self, build: Build) -> bool:
        """Whether it would wait for headers that another one is precompiling."""
        are_under_way = self._first_of_inductor is not None and not self._has_headers
        return build.is_inductors and are_under_way
