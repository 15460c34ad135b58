"""Read one rank's parameters, slice by slice, from safetensors files.

Memory on the host: the parameters themselves and one block of one tensor. What to read is
`RankPlan.tensors`.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from parallel.checkpoint import Checkpoint
from parallel.errors import IntegrityError
from parallel.plan import LocalTensor, Piece, RankPlan


def stream(
    checkpoint: Checkpoint, rank_plan: RankPlan, *, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, local tensor of `dtype` on `device`) for every parameter of a rank.

    Raises:
        IntegrityError: a file that cannot be read, though its header was fine.
    """
    with ExitStack() as stack:
        files = _OpenFiles(stack, checkpoint)
        for tensor in rank_plan.tensors:
            yield tensor.name, _read(tensor, files, dtype, device)


class _OpenFiles:
    """Checkpoint files, mapped at their first use."""

    def __init__(self, stack: ExitStack, checkpoint: Checkpoint) -> None:
        self._stack = stack
        self._checkpoint = checkpoint
        self._handles: dict[Path, Any] = {}

    def read(self, piece: Piece) -> torch.Tensor:
        """The block that `piece` names, in the dtype of the file."""
        file = self._checkpoint.tensors[piece.source].file
        try:
            if file not in self._handles:
                opened = safe_open(file, framework="pt", device="cpu")
                self._handles[file] = self._stack.enter_context(opened)
            stored = self._handles[file].get_slice(self._checkpoint.stored_name(piece.source))
            block: torch.Tensor = stored[_index(piece)]
            return block
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{file}: cannot read tensor {piece.source} ({error})") from None


def _index(piece: Piece) -> tuple[slice, ...]:
    if piece.dim is None:
        return (slice(None),)
    return (slice(None),) * piece.dim + (slice(*piece.range),)


def _read(
    tensor: LocalTensor, files: _OpenFiles, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    local = torch.empty(tensor.shape, dtype=dtype, device=device)
    filled = 0
    for piece in tensor.pieces:
        block = files.read(piece)
        if tensor.transposed:
            block = block.t()
        extent = block.shape[tensor.dim]
        local.narrow(tensor.dim, filled, extent).copy_(block)
        filled += extent
    # A padded vocabulary ends early: its last rows belong to no token.
    local.narrow(tensor.dim, filled, tensor.shape[tensor.dim] - filled).zero_()
    return local
