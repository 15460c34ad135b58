"""`Built`: what became of one segment; travels between the ranks of a compile as JSON."""

from dataclasses import dataclass

from runner.build.worklist import Use
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
