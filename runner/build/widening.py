"""Run a module in a wider dtype than it was written for, as the truth that errors are measured by.

Casting its weights is not enough: a module, or the graph that was traced of it, names dtypes in its
operations, too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_NARROW = (torch.float16, torch.bfloat16, torch.float32)


def wider_than(dtype: torch.dtype) -> torch.dtype:
    """float64 for float32, float32 for the half precisions."""
    return torch.float64 if dtype == torch.float32 else torch.float32


@torch.no_grad()
def run_widened(
    module: nn.Module, inputs: Sequence[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """The tensors that a module returns for `inputs`, every operation computed in `dtype`.

    Args:
        module: its weights, and the dtypes that it names, may be narrower.
        dtype: see `wider_than`.
    """
    with _Widening(dtype) as widening:
        weights = {
            name: widening.widen(tensor)
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        arguments = tuple(map(widening.widen, inputs))
        outputs = pytree.tree_leaves(torch.func.functional_call(module, weights, arguments))
    return [output for output in outputs if isinstance(output, torch.Tensor)]


class _Widening(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operator gets and gives `dtype` in place of narrower floating-point ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype
        self._narrow = [narrow for narrow in _NARROW if narrow.itemsize < dtype.itemsize]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        wide_args, wide_kwargs = pytree.tree_map(self.widen, (args, kwargs or {}))
        return pytree.tree_map(self.widen, func(*wide_args, **wide_kwargs))

    def widen(self, value: Any) -> Any:
        """The same in the dtype, if it is a narrower tensor or the name of a narrower dtype."""
        if isinstance(value, torch.Tensor):
            return value.to(self._dtype) if value.dtype in self._narrow else value
        is_narrow = isinstance(value, torch.dtype) and value in self._narrow
        return self._dtype if is_narrow else value
