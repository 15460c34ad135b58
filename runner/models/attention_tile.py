# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False
"""What the Triton kernels of attention have in common.

Imported only where Triton is installed.
"""

import triton
import triton.language as tl

SEQUENCES = tl.constexpr(512)
"""Whose offsets are looked at together."""


@triton.jit
def take_in(
    queries,  # (rows, head_dim)
    tile_k,  # (keys, head_dim)
    tile_v,  # as tile_k
    is_seen,  # broadcasts to (rows, keys)
    scale,  # factor on the scores, times log2(e)
    highest,  # (rows,) float32: of the scores so far, times log2(e)
    total,  # (rows,) float32: sum of the weights so far, 1 for the highest score
    mixed,  # (rows, head_dim) float32: sum of the values so far, by their weights
):
    """The softmax goes on over a tile of keys: `highest`, `total` and `mixed` with it in them."""
    scores = tl.dot(queries, tl.trans(tile_k), input_precision="ieee") * scale
    scores = tl.where(is_seen, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    decay = tl.exp2(highest - new_highest)
    weights = tl.exp2(scores - new_highest[:, None])
    total = total * decay + tl.sum(weights, axis=1)
    mixed = mixed * decay[:, None]
    mixed += tl.dot(weights.to(tile_v.dtype), tile_v, input_precision="ieee")
    return new_highest, total, mixed
