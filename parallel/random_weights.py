"""Random parameters in place of a checkpoint's, to measure a model of which only the shape is
known.

They are made on the rank's own device, so that tens of GB take seconds. They do not form one model
that is the same at every cut: each rank draws the block that it holds.
"""

import hashlib
from collections.abc import Iterator

import torch

from parallel.plan import LocalTensor, RankPlan

_STD = 0.02
"""What transformers draws most decoders with; activations stay finite in every dtype."""


def random_weights(
    rank_plan: RankPlan, *, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, local tensor of `dtype` on `device`) for every parameter of a rank.

    Takes the place of `parallel.weights.stream`. Matrices and biases are normal around 0, norms are
    1, and what a checkpoint would pad with zeros is zero. Equal calls yield equal numbers.
    """
    generator = torch.Generator(device)
    for tensor in rank_plan.tensors:
        yield tensor.name, _draw(tensor, rank_plan.tp_rank, generator, dtype, device)


def _draw(
    tensor: LocalTensor,
    tp_rank: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    if _is_norm(tensor):
        return torch.ones(tensor.shape, dtype=dtype, device=device)
    generator.manual_seed(_seed(tensor, tp_rank))
    local = torch.empty(tensor.shape, dtype=dtype, device=device)
    local.normal_(0.0, _STD, generator=generator)
    if not _is_replicated(tensor):
        filled = sum(piece.range[1] - piece.range[0] for piece in tensor.pieces)
        local.narrow(tensor.dim, filled, tensor.shape[tensor.dim] - filled).zero_()
    return local


def _is_norm(tensor: LocalTensor) -> bool:
    """Only norms have a weight of one dim."""
    return len(tensor.shape) == 1 and tensor.name.endswith(".weight")


def _is_replicated(tensor: LocalTensor) -> bool:
    return [piece.dim for piece in tensor.pieces] == [None]


def _seed(tensor: LocalTensor, tp_rank: int) -> int:
    """Ranks that hold a tensor whole must hold the same numbers, or their activations part."""
    owner = "" if _is_replicated(tensor) else str(tp_rank)
    digest = hashlib.sha256(f"{tensor.name} {owner}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
