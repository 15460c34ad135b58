"""What a tensor model takes and returns, in the protocol's words."""

from dataclasses import dataclass
from typing import Any

from parallel.graph_plan import GraphPlan
from parallel.plan import Carry
from runner.items.spec import ArraySpec
from runner.pipeline.buckets import Buckets


@dataclass(frozen=True)
class Signature:
    """Every input and output of a model, as one sample has it."""

    inputs: tuple[ArraySpec, ...]
    outputs: tuple[ArraySpec, ...]
    is_batched: bool

    @classmethod
    def of(cls, plan: GraphPlan) -> "Signature":
        """Raises ConfigError: an output has a dtype that the protocol has no name for."""
        buckets = Buckets.of(plan)
        has_one_shape = len(buckets.by_shapes) == 1
        first = 1 if plan.is_batched else 0

        def output(value: Carry) -> ArraySpec:
            dims = (int(size) if has_one_shape else None for size in value.shape[first:])
            return ArraySpec(value.name, value.dtype, tuple(dims))

        inputs = zip(plan.buckets[0], buckets.dims, strict=True)
        return cls(
            tuple(ArraySpec(value.name, value.dtype, dims) for value, dims in inputs),
            tuple(map(output, plan.outputs)),
            plan.is_batched,
        )

    def metadata(self) -> dict[str, Any]:
        """Inputs and outputs; -1 is any size."""
        return {
            "inputs": [self._told(spec) for spec in self.inputs],
            "outputs": [self._told(spec) for spec in self.outputs],
        }

    def _told(self, spec: ArraySpec) -> dict[str, Any]:
        batch = [-1] if self.is_batched else []
        shape = [*batch, *(-1 if size is None else size for size in spec.shape)]
        return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": shape}


def datatype_of(dtype: str) -> str:
    """The protocol's name of a dtype.

    >>> datatype_of("float32"), datatype_of("bfloat16"), datatype_of("uint8")
    ('FP32', 'BF16', 'UINT8')
    """
    return {"bfloat16": "BF16"}.get(dtype) or dtype.upper().replace("FLOAT", "FP")
