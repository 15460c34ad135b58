"""A module's products in TF32, as TensorRT-RTX multiplies float32 whatever it is told: what TF32
costs this module says how much it may cost a compiled one.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

_FACTORS = {
    _aten.mm: slice(0, 2),
    _aten.bmm: slice(0, 2),
    _aten.mv: slice(0, 2),
    _aten.dot: slice(0, 2),
    _aten.convolution: slice(0, 2),
    _aten.addmm: slice(1, 3),
    _aten.baddbmm: slice(1, 3),
    _aten.addmv: slice(1, 3),
    _aten._scaled_dot_product_flash_attention: slice(0, 3),
    _aten._scaled_dot_product_flash_attention_for_cpu: slice(0, 3),
    _aten._scaled_dot_product_efficient_attention: slice(0, 3),
    _aten._scaled_dot_product_cudnn_attention: slice(0, 3),
}
"""Where the factors of a product stand among its arguments; others are made of these."""

_DROPPED_BITS = 13
"""float32 keeps 24 bits of a number, the leading one included, TF32 11."""


def products_in_tf32(enabled: bool = True) -> AbstractContextManager[object]:
    """Inside, PyTorch rounds the float32 factors of every product to TF32, on any device; other
    dtypes are as they were. If not `enabled`, nothing happens.
    """
    return _Tf32Products() if enabled else nullcontext()  # type: ignore[no-untyped-call]


class _Tf32Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if factors := _FACTORS.get(func.overloadpacket):
            rounded = list(args)
            rounded[factors] = map(_rounded, args[factors])
            return func(*rounded, **kwargs)
        # In inference mode what is made of other operators, such as linear, comes whole.
        with self:
            composed = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if composed is NotImplemented else composed


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """To the nearest number of TF32; of two, to that which is farther from zero."""
    if x.dtype != torch.float32:
        return x
    half, mask = 1 << (_DROPPED_BITS - 1), ~((1 << _DROPPED_BITS) - 1)
    nearest = ((x.contiguous().view(torch.int32) + half) & mask).view(torch.float32)
    return torch.where(x.isfinite(), nearest, x)
