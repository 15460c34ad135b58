"""Which bucket a request belongs to: its shapes choose among the plan's, the batch fills one up."""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.errors import ConfigError
from parallel.graph_plan import GraphPlan
from runner.pipeline.programs import batch_size, sample_shapes

Shapes = tuple[tuple[int, ...], ...]
"""Of every input of one sample."""


@dataclass(frozen=True)
class Buckets:
    """The plan's buckets by the shapes of their samples."""

    by_shapes: dict[Shapes, dict[int, int]]

    @classmethod
    def of(cls, plan: GraphPlan) -> "Buckets":
        found: dict[Shapes, dict[int, int]] = {}
        for index, bucket in enumerate(plan.buckets):
            sizes = found.setdefault(sample_shapes(bucket, plan), {})
            sizes[batch_size(bucket, plan)] = index
        return cls(found)

    @property
    def dims(self) -> tuple[tuple[int | None, ...], ...]:
        """The sizes of every input's dims; None where buckets differ."""
        return tuple(
            tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))
            for shapes in zip(*self.by_shapes, strict=True)
        )

    def check(self, shapes: Shapes) -> None:
        """Raises ConfigError: no bucket is for samples of these shapes."""
        if shapes not in self.by_shapes:
            raise ConfigError(
                f"inputs of shapes {_say(shapes)} are in no bucket; the plan has "
                f"{'; '.join(map(_say, self.by_shapes))}; resize, or add sizes to model.dims"
            )

    def choose(self, shapes: Shapes, num_samples: int) -> int:
        """The smallest bucket that holds so many samples."""
        sizes = self.by_shapes[shapes]
        return sizes[min(size for size in sizes if size >= num_samples)]

    def largest(self, shapes: Shapes) -> int:
        """The most samples of one batch."""
        return max(self.by_shapes[shapes])


def _say(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)
