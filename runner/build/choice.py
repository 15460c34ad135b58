"""Which backend runs a segment: the one that was named, or the fastest of all that pass.

Candidates of `auto` are measured on the device at hand (`runner.build.measure`), segment by segment
and bucket by bucket; every time and every reason is kept.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from parallel.errors import PreflightError, ShardlineError, UnsupportedSegmentError
from runner.build.built import Built
from runner.build.measure import Samples, microseconds
from runner.build.worklist import Work
from runner.bundle.builder import BundleBuilder
from runner.bundle.manifest import Candidate
from runner.compiler.backend import Backend, Compiled, artefact_key
from runner.compiler.segment import Segment

NAMED = "named in the configuration"
"""Why the one backend that was tried was chosen."""


@dataclass(frozen=True)
class Chooser:
    """Builds segments with one backend, or with several and picks.

    Attributes:
        backends: the candidates; one: it was named, and what it cannot do is an error.
        max_error_ratio: of a candidate's error to that of eager, for it to pass.
        allow_tf32: see `CompileConfig`.
        seconds_ahead: what building took of artefacts, by key, that others have made for this.
    """

    backends: Sequence[Backend]
    builder: BundleBuilder
    device: torch.device
    max_error_ratio: float
    allow_tf32: bool = False
    seconds_ahead: Mapping[str, float] = field(default_factory=dict)

    def build(self, work: Work) -> Built:
        """Make the artefacts of a segment that are not there yet, and choose one.

        Raises:
            UnsupportedSegmentError: the backend that was named cannot compile it, or of several
                none computes what it computes.
            PreflightError: the backend that was named is not usable here.
        """
        started = time.monotonic()
        segment = work.segment
        program = segment.export(self.device)
        digest = segment.digest(program)
        candidates: list[Candidate] = []
        made = False
        for backend in self.backends:
            try:
                with _refusals():
                    key = artefact_key(digest, backend)
                if not self.builder.finished_artefact(key):
                    made = True
                    with self.builder.artefact(key) as folder, _refusals():
                        backend.build(segment, program, folder)
                candidates.append(Candidate(backend.name, key))
            except _RefusalError as refusal:
                if len(self.backends) == 1:
                    raise refusal.reason from None
                candidates.append(Candidate(backend.name, "", note=str(refusal.reason)))
        seconds = time.monotonic() - started if made else 0.0
        seconds += sum(self.seconds_ahead.get(candidate.key, 0.0) for candidate in candidates)
        reason = NAMED
        if len(self.backends) > 1:
            candidates = self._measured(segment, candidates)
            reason = "fastest of those that pass"
        chosen = _fastest(segment, candidates)
        return Built.of(
            work,
            program,
            self.builder.artefact_folder(chosen.key),
            candidates=tuple(candidates),
            chosen=chosen,
            seconds=seconds,
            reason=reason,
        )

    def _measured(self, segment: Segment, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates with their times and whether they compute what the segment computes."""
        samples = Samples.draw(segment, self.device, allow_tf32=self.allow_tf32)
        by_name = {backend.name: backend for backend in self.backends}
        found = []
        for candidate in candidates:
            if not candidate.key:
                found.append(candidate)
                continue
            folder = self.builder.artefact_folder(candidate.key)
            try:
                run = by_name[candidate.backend].load(folder, segment)
                found.append(self._measure(candidate, run, samples))
            except (ShardlineError, RuntimeError) as error:
                # Whatever a candidate fails of, the others can still run.
                found.append(replace(candidate, parity=False, note=str(error).partition("\n")[0]))
        return found

    def _measure(self, candidate: Candidate, run: Compiled, samples: Samples) -> Candidate:
        ratio = samples.error_ratio(run)
        passes = ratio <= self.max_error_ratio
        return replace(
            candidate,
            microseconds=round(microseconds(run, samples.inputs), 2) if passes else None,
            parity=passes,
            note="" if passes else f"error {ratio:.1f} times that of eager",
        )


def _fastest(segment: Segment, candidates: Sequence[Candidate]) -> Candidate:
    """Raises UnsupportedSegmentError: none computes what the segment computes."""
    passing = [c for c in candidates if c.key and c.parity is not False]
    if not passing:
        notes = "; ".join(f"{c.backend}: {c.note}" for c in candidates)
        raise UnsupportedSegmentError(f"{segment.kind}: no backend can run it ({notes})")
    return min(passing, key=lambda c: c.microseconds or 0)


class _RefusalError(Exception):
    """A backend cannot do it; not that the disk is full, for example."""

    def __init__(self, reason: ShardlineError) -> None:
        super().__init__(str(reason))
        self.reason = reason


@contextmanager
def _refusals() -> Iterator[None]:
    """Tell what a backend says of itself from what goes wrong around it."""
    try:
        yield
    except (PreflightError, UnsupportedSegmentError) as error:
        raise _RefusalError(error) from error
