"""`Built`: what became of one segment; travels between the ranks of a compile as JSON."""

from dataclasses import dataclass
from pathlib import Path

import torch

from runner.build.worklist import Use, Work
from runner.bundle.manifest import Artefact, Candidate, Choice


@dataclass(frozen=True)
class Built:
    """An artefact, why it is that one, and who uses it.

    Attributes:
        backend, key: of the candidate that was chosen.
        num_ops: operators in the segment's graph.
        num_bytes: of the artefact's files.
        seconds: that building took, all candidates together; 0 where they were there already.
    """

    kind: str
    num_rows: int
    backend: str
    key: str
    num_ops: int
    num_bytes: int
    seconds: float
    candidates: tuple[Candidate, ...]
    reason: str
    uses: tuple[Use, ...]

    @classmethod
    def of(
        cls,
        work: Work,
        program: torch.export.ExportedProgram,
        folder: Path,
        *,
        candidates: tuple[Candidate, ...],
        chosen: Candidate,
        seconds: float,
        reason: str,
    ) -> "Built":
        """What lies in `folder`, the artefact of the chosen candidate."""
        return cls(
            kind=work.segment.kind,
            num_rows=work.num_rows,
            backend=chosen.backend,
            key=chosen.key,
            num_ops=sum(node.op == "call_function" for node in program.graph.nodes),
            num_bytes=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
            seconds=round(seconds, 3),
            candidates=candidates,
            reason=reason,
            uses=tuple(work.uses),
        )

    @property
    def artefact(self) -> Artefact:
        return Artefact(self.backend, self.kind, self.num_rows)

    @property
    def choices(self) -> list[Choice]:
        """For the manifest: one a rank that uses it."""
        return [
            Choice(u.kind, u.num_rows, u.rank, self.candidates, self.backend, self.reason)
            for u in self.uses
        ]
