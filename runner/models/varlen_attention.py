"""Attention of whole steps on a GPU, by torch's FlashAttention for sequences of different lengths.

It takes float16 and bfloat16 on GPUs from compute capability 8.0, and head sizes that are multiples
of 8 up to 256; `supports` tells. Long new prompts go to cuDNN on Hopper, where it takes half the
time. Not here: decoding in Triton (`runner.models.triton_attention`).
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from parallel.slicing import HeadShare
from runner.models.attention import groups_are_even, write_kv
from runner.models.batch import Batch

_QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
PAGE_ROWS = 256
"""FlashAttention 2 reads pages only if their size is a multiple of this."""
_LONG_ROWS = 512
"""A prompt from this length on is worth a call of its own."""
_PLAN_ROWS = 256
"""Prompts are rounded up to multiples of this for cuDNN, which makes a plan for every length."""
_CUDNN_HEAD_DIM = 128
"""The largest for which cuDNN is the faster one."""


class VarlenAttention:
    """One call for all sequences of a step, but for long new prompts, where cuDNN takes them.

    A step of new prompts attends to its own keys and values. In one that goes on with sequences,
    these are first gathered from the cache; sizes come from the host, so that is no step for a CUDA
    graph. Only decoding with blocks of a multiple of 256 tokens reads the cache in place, with
    lengths from the device.
    """

    def __init__(self, heads: HeadShare, device: torch.device) -> None:
        self._is_even = groups_are_even(heads)
        self._query_to_kv = torch.tensor(heads.query_to_kv, device=device)
        self._takes_long: bool | None = None

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
        write_kv(k, v, cache, batch.slots)
        real = sum(batch.query_lens)
        if real == 0:
            return torch.zeros_like(q).flatten(1)
        # Torch counts the tokens before the own one; -1: all of them.
        sides = (-1 if window is None else window - 1, 0)
        only_decodes = all(query_len == 1 for query_len in batch.query_lens)
        if only_decodes and self.reads_pages(cache.shape[2]):
            output = _decode_pages(q[:real], cache, batch, scale, sides)
        elif self._cudnn_takes(q):
            output = self._attend_in_runs((q, k, v), cache, batch, scale, window)
        else:
            output = self._attend(q[:real], k[:real], v[:real], cache, batch, scale, sides)
        if real < len(q):
            output = torch.cat([output, torch.zeros_like(q[real:])])
        return output.flatten(1)

    def reads_pages(self, block_size: int) -> bool:
        """Whether a decoding step is taken from a cache of such blocks as it is."""
        return self._is_even and block_size % PAGE_ROWS == 0

    def _attend_in_runs(
        self, qkv: _QKV, cache: torch.Tensor, batch: Batch, scale: float, window: int | None
    ) -> torch.Tensor:
        """Long new prompts one by one, by cuDNN; what lies between them together."""
        sides = (-1 if window is None else window - 1, 0)
        outputs = []
        start = 0
        for is_long, sequences in runs_of(batch.query_lens, batch.kv_lens, window):
            lengths = batch.query_lens[sequences]
            stop = start + sum(lengths)
            if is_long:
                starts = accumulate(lengths[:-1], initial=start)
                places = zip(starts, lengths, strict=True)
                outputs += [self._prompt(qkv, *place, scale) for place in places]
            else:
                part = _part(batch, sequences, start)
                q, k, v = (x[start:stop] for x in qkv)
                outputs.append(self._attend(q, k, v, cache, part, scale, sides))
            start = stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _prompt(self, qkv: _QKV, start: int, length: int, scale: float) -> torch.Tensor:
        """The prompt that begins in row `start` of a step: (length, num_query, head_dim).

        It is rounded up to `_PLAN_ROWS` with the rows that follow, whatever they hold: no token of
        the prompt sees what comes after it.
        """
        rounded = -(-length // _PLAN_ROWS) * _PLAN_ROWS
        q, k, v = (_rows(x, start, rounded) for x in qkv)
        if not self._is_even:
            k, v = k[:, self._query_to_kv], v[:, self._query_to_kv]
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            output = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
        return output.squeeze(0).transpose(0, 1)[:length]

    def _cudnn_takes(self, q: torch.Tensor) -> bool:
        """Whether cuDNN serves long prompts with heads like these, and faster; asked once."""
        if self._takes_long is None:
            is_hopper = torch.cuda.get_device_capability(q.device)[0] == 9
            like = q.new_empty(1, q.shape[1], _LONG_ROWS, q.shape[2])
            params = SDPAParams(like, like, like, None, 0.0, True, False)
            is_small = q.shape[2] <= _CUDNN_HEAD_DIM
            self._takes_long = is_hopper and is_small and can_use_cudnn_attention(params)
        return self._takes_long

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        batch: Batch,
        scale: float,
        sides: tuple[int, int],
    ) -> torch.Tensor:
        """To the step's own keys where all sequences are new, else to what the cache holds."""
        num_seqs = len(batch.query_lens)
        offsets = kv_offsets = batch.query_offsets[: num_seqs + 1]
        if batch.query_lens != batch.kv_lens:
            k, v = _gather(cache, batch)
            ends = torch.cumsum(batch.kv_lengths[:num_seqs], 0, dtype=torch.int32)
            kv_offsets = F.pad(ends, (1, 0))
        if not self._is_even:
            k, v = k[:, self._query_to_kv], v[:, self._query_to_kv]
        output = varlen_attn(
            q,
            k,
            v,
            offsets,
            kv_offsets,
            max(batch.query_lens),
            max(batch.kv_lens),
            scale=scale,
            window_size=sides,
            enable_gqa=True,
        )
        assert isinstance(output, torch.Tensor)  # A pair only where more was asked for.
        return output


def supports(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether torch's FlashAttention takes these."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def runs_of(
    query_lens: tuple[int, ...], kv_lens: tuple[int, ...], window: int | None
) -> Iterator[tuple[bool, slice]]:
    """The sequences of a step in runs: those that are long new prompts, and those that are not.

    >>> list(runs_of((1, 600, 900, 700), (40, 600, 900, 900), 800))
    [(False, slice(0, 1, None)), (True, slice(1, 2, None)), (False, slice(2, 4, None))]
    """

    def is_long(index: int) -> bool:
        query_len = query_lens[index]
        is_cut = window is not None and window < query_len
        return query_len == kv_lens[index] and query_len >= _LONG_ROWS and not is_cut

    for kind, run in groupby(range(len(query_lens)), is_long):
        indices = list(run)
        yield kind, slice(indices[0], indices[-1] + 1)


def _part(batch: Batch, sequences: slice, start: int) -> Batch:
    """Some sequences of a step, which begin in row `start`, as far as `VarlenAttention` looks."""
    return replace(
        batch,
        block_tables=batch.block_tables[sequences],
        query_offsets=batch.query_offsets[sequences.start : sequences.stop + 1] - start,
        kv_lengths=batch.kv_lengths[sequences],
        query_lens=batch.query_lens[sequences],
        kv_lens=batch.kv_lens[sequences],
    )


def _rows(x: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """`count` rows from `start` on; zeros behind the last one."""
    rows = x[start : start + count]
    missing = count - len(rows)
    return F.pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows


def _decode_pages(
    q: torch.Tensor, cache: torch.Tensor, batch: Batch, scale: float, sides: tuple[int, int]
) -> torch.Tensor:
    """Decode from the cache in place: q (num_seqs, num_query, head_dim) -> its shape.

    One query at the end of its sequence sees all of it, so that no mask is needed without a window;
    the kernel packs the heads of a group only then. One split: torch 2.13 is silently wrong, or
    gives NaN, with more over pages (pytorch issue 194167).
    """
    num_seqs = len(batch.query_lens)
    offsets = batch.query_offsets[: num_seqs + 1]
    output = varlen_attn(
        q,
        cache[0],
        cache[1],
        offsets,
        offsets,  # Not used: the lengths are in seqused_k.
        1,
        max(batch.kv_lens),
        scale=scale,
        window_size=(-1, -1) if sides[0] < 0 else sides,
        enable_gqa=True,
        seqused_k=batch.kv_lengths[:num_seqs],
        block_table=batch.block_tables,
        num_splits=1,
    )
    assert isinstance(output, torch.Tensor)  # A pair only where more was asked for.
    return output


def _gather(cache: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all sequences one after the other: (sum(kv_lens), num_kv, head_dim)."""
    block_size = cache.shape[2]
    parts = [
        cache[:, table[: -(-kv_len // block_size)]].flatten(1, 2)[:, :kv_len]
        for table, kv_len in zip(batch.block_tables, batch.kv_lens, strict=True)
    ]
    k, v = torch.cat(parts, dim=1).unbind()
    return k, v
