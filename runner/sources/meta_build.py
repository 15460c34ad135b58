"""A module made on the meta device, if a state dict alone can give it all its values.

Not here: the state dict.
"""

import gc
from collections.abc import Callable

import torch
from torch import nn


class MetaValuesError(Exception):
    """The module holds values that no state dict has."""


def build_on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Call `make` under the meta device.

    Raises:
        MetaValuesError: the module, or anything that came with it, keeps a tensor besides its
            parameters and persistent buffers.
    """
    before = _meta_tensors()
    with torch.device("meta"):
        module = make()
    saved = module.state_dict(keep_vars=True)
    lost = [name for name, _ in module.named_buffers() if name not in saved]
    if lost:
        raise MetaValuesError(f"buffer {lost[0]} is in no state dict")
    # A tensor in a list, a closure or a cache is no buffer, and would stay without values.
    known = before | {id(tensor) for tensor in saved.values()}
    gc.collect()
    stray = _meta_tensors() - known
    if stray:
        raise MetaValuesError(f"it keeps {len(stray)} tensors that are no parameter or buffer")
    return module


def _meta_tensors() -> set[int]:
    """Ids of every meta tensor alive."""
    return {
        id(candidate)
        for candidate in gc.get_objects()
        if issubclass(type(candidate), torch.Tensor) and candidate.is_meta
    }
