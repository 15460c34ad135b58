"""Which attention a rank runs, by its device, its dtype and what a step consists of.

Not here: the attentions themselves (`attention`, `varlen_attention`, `triton_attention`).
"""

import logging
from dataclasses import replace
from itertools import takewhile
from typing import Any, Literal

import torch

from parallel.collectives import minimum
from parallel.context import ParallelContext
from parallel.slicing import HeadShare
from runner.compiler.triton_driver import find_obstacle
from runner.models.attention import Attention, GatherAttention
from runner.models.batch import Batch

Decode = Literal["triton", "varlen"]
"""What decodes on a GPU."""

KERNELS = ("decode_kernel", "chunk_kernel")
"""The functions that Triton compiles for it, and for mixed steps."""

_log = logging.getLogger(__name__)


class StepAttention:
    """One attention for tokens that come alone, another for those that come in chunks.

    The scheduler puts decoding sequences first, so a step of both is cut in two. A step in which
    every sequence has one token goes to `decode` whole, with its padding.

    Attributes:
        mixed: takes a captured step of both whole; None: it cannot be captured.
    """

    def __init__(
        self, decode: Attention, chunks: Attention, mixed: Attention | None = None
    ) -> None:
        self.decode = decode
        self.mixed = mixed
        self._chunks = chunks
        self._last: tuple[Batch, Batch, Batch] | None = None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        batch: Batch,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """See `runner.models.attention.Attention`."""
        if batch.is_mixed:
            assert self.mixed is not None, "no other step is captured"
            return self.mixed(q, k, v, cache, batch, scale=scale, window=window)
        alone = sum(1 for _ in takewhile(lambda query_len: query_len == 1, batch.query_lens))
        if alone in (0, len(batch.query_lens)):
            attend = self.decode if alone else self._chunks
            return attend(q, k, v, cache, batch, scale=scale, window=window)
        head, tail = self._cut(batch, alone)
        first = self.decode(
            q[:alone], k[:alone], v[:alone], cache, head, scale=scale, window=window
        )
        rest = self._chunks(
            q[alone:], k[alone:], v[alone:], cache, tail, scale=scale, window=window
        )
        return torch.cat([first, rest])

    def _cut(self, batch: Batch, count: int) -> tuple[Batch, Batch]:
        """The first `count` sequences of one token each, and the others; once for all layers."""
        if self._last is None or self._last[0] is not batch:
            head = _part(batch, slice(None, count), slice(None, count))
            tail = _part(batch, slice(count, None), slice(count, None))
            tail = replace(tail, query_offsets=batch.query_offsets[count:] - count)
            self._last = batch, head, tail
        return self._last[1], self._last[2]


def choose_decode(context: ParallelContext) -> Decode:
    """Triton, where it starts on the GPUs of all ranks; every rank must call this."""
    if context.device.type != "cuda":
        return "triton"
    obstacle = find_obstacle()
    if minimum(obstacle is None, context.setup):
        return "triton"
    _log.warning(
        "decoding: FlashAttention, which is slower, as Triton does not start (%s); "
        "it needs a C compiler, or a bundle that was compiled beside this Triton and Python",
        obstacle or "on another rank",
    )
    return "varlen"


def make_attention(
    heads: HeadShare,
    device: torch.device,
    *,
    dtype: torch.dtype,
    block_size: int,
    head_dim: int,
    decode: Decode = "triton",
) -> Attention:
    """The attention of one rank.

    On the CPU, `GatherAttention`. On a GPU, decoding runs in Triton and chunks of prompts in
    torch's FlashAttention, or in a captured step in Triton; where FlashAttention does not take the
    dtype or head size, `GatherAttention` does it. Without Triton, what takes chunks decodes, too.

    Args:
        block_size: tokens of a KV block, where Triton decodes.
    """
    gather = GatherAttention(heads, device)
    if device.type != "cuda":
        return gather
    # Both are of no use, and Triton is not installed, where there is no GPU.
    from runner.models.varlen_attention import VarlenAttention, supports

    chunks: Attention = gather
    if supports(dtype, head_dim, device):
        chunks = VarlenAttention(heads, device)
    else:
        _log.info("prompts: SDPA, as FlashAttention does not take %s x %d", dtype, head_dim)
    if decode == "varlen":
        return StepAttention(chunks, chunks)
    from runner.models.triton_attention import TritonDecodeAttention, TritonMixedAttention

    sizes: dict[str, Any] = {"dtype": dtype, "block_size": block_size, "head_dim": head_dim}
    kernel = TritonDecodeAttention(heads, device, **sizes)
    if chunks is gather:
        return StepAttention(kernel, chunks)
    return StepAttention(kernel, chunks, TritonMixedAttention(kernel, heads, **sizes))


def fit_block_size(attend: Attention, block_size: int) -> int:
    """`block_size`, or where FlashAttention decodes the smallest one that it takes from the cache
    as it is.
    """
    from runner.models.varlen_attention import PAGE_ROWS, VarlenAttention

    is_paged = isinstance(_decoder(attend), VarlenAttention)
    return max(block_size, PAGE_ROWS) if is_paged else block_size


def is_capturable(attend: Attention, block_size: int) -> bool:
    """Whether a decoding step can be a CUDA graph: all of its lengths are read on the device."""
    from runner.models.varlen_attention import VarlenAttention

    decode = _decoder(attend)
    if isinstance(decode, VarlenAttention):
        return decode.reads_pages(block_size)
    return not isinstance(decode, GatherAttention)


def captures_prompts(attend: Attention) -> bool:
    """Whether a step with prompts in it can be a CUDA graph."""
    return isinstance(attend, StepAttention) and attend.mixed is not None


def _decoder(attend: Attention) -> Attention:
    return attend.decode if isinstance(attend, StepAttention) else attend


def _part(batch: Batch, sequences: slice, rows: slice) -> Batch:
    """Some sequences of a step with their rows; its samples are left out, and offsets are those of
    the whole.
    """
    return replace(
        batch,
        token_ids=batch.token_ids[rows],
        positions=batch.positions[rows],
        rope_variants=batch.rope_variants[rows],
        slots=batch.slots[rows],
        block_tables=batch.block_tables[sequences],
        kv_lengths=batch.kv_lengths[sequences],
        query_lens=batch.query_lens[sequences],
        kv_lens=batch.kv_lens[sequences],
        logits_rows=batch.logits_rows[:0],
    )
