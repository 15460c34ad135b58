"""Attention of steps whose lengths the device knows: how the Triton kernels are launched.

Import it only where Triton is installed (`runner.models.attention_choice` sees to that).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from parallel.slicing import HeadShare
from runner.models.batch import Batch
from runner.models.chunk_kernel import chunk_kernel
from runner.models.decode_kernel import decode_kernel

_LOG2_E = 1.4426950408889634
_MAX_SPLITS = 32
_EVERYTHING = 1 << 30
"""A window that no sequence outgrows."""
_PRODUCT_ROWS = 16
"""The fewest rows and columns of a matrix product in Triton."""


@dataclass(frozen=True)
class DecodeTuning:
    """What is fixed for all launches on a GPU.

    Attributes:
        tile_bytes: keys (and values) of a tile; with them, the tokens of a tile.
        num_warps: of a program.
        num_stages: tiles on their way from memory at once.
        one_split_tiles: a sequence of no more is not split: joining splits takes longer than that.
        programs_per_processor: how far sequences are split so that no multiprocessor idles.
    """

    tile_bytes: int = 16 * 1024
    num_warps: int = 4
    num_stages: int = 5
    one_split_tiles: int = 4
    programs_per_processor: int = 2


def count_splits(programs: int, tiles: int, wanted: int) -> int:
    """Into how many splits at most a sequence is cut: a power of two.

    Args:
        programs: that there are without splitting.
        tiles: of the longest sequence.
        wanted: programs that fill the GPU.

    >>> count_splits(8, 64, 1056), count_splits(256, 64, 1056), count_splits(2048, 64, 1056)
    (32, 4, 1)
    """
    most = min(_MAX_SPLITS, triton.next_power_of_2(max(tiles, 1)))
    splits = 1
    while splits < most and 2 * splits * programs <= wanted:
        splits *= 2
    return splits


class TritonDecodeAttention:
    """Steps in which every sequence has exactly one token; a launch a layer, fit for a CUDA graph.

    All sizes of a launch follow from the host's numbers in the `Batch` (`kv_lens` only bounds the
    number of splits); the lengths that count are read on the device. Rows behind the last sequence,
    and sequences of length 0, get zeros. Splits are joined by counters that all calls share: calls
    of one object must be on one stream. Its part of a mixed step is another matter; see `launch`.

    Attributes:
        groups: (num_kv, a power of two) int32, the query heads of each KV head, then -1.
        largest_group: query heads of a KV head at most.
    """

    def __init__(
        self,
        heads: HeadShare,
        device: torch.device,
        *,
        dtype: torch.dtype,
        block_size: int,
        head_dim: int,
        tuning: DecodeTuning | None = None,
    ) -> None:
        """Lay out the groups of query heads.

        Raises:
            ValueError: `block_size` is not a power of two.
        """
        if block_size & (block_size - 1):
            raise ValueError(f"kv_cache.block_size={block_size} is not a power of two; use 16")
        self._tuning = tuning or DecodeTuning()
        members: list[list[int]] = [[] for _ in range(heads.num_kv)]
        for query, kv in enumerate(heads.query_to_kv):
            members[kv].append(query)
        self.largest_group = max(map(len, members))
        group = max(_PRODUCT_ROWS, triton.next_power_of_2(self.largest_group))
        self.groups = torch.tensor(
            [heads_of + [-1] * (group - len(heads_of)) for heads_of in members],
            dtype=torch.int32,
            device=device,
        )
        block_d, self._block_n = _tile(head_dim, dtype, self._tuning.tile_bytes)
        self._wanted = self._tuning.programs_per_processor * _num_processors(device)
        self._programs = max(1, self._wanted // heads.num_kv)
        # A step of more rows than this has enough programs without splits, and counts nothing.
        self._finished = torch.zeros(self._wanted, dtype=torch.int32, device=device)
        self._constants = {
            "NUM_QUERY": heads.num_query,
            "NUM_KV": heads.num_kv,
            "HEAD_DIM": head_dim,
            "BLOCK_D": block_d,
            "BLOCK_SIZE": block_size,
            "BLOCK_N": self._block_n,
            "GROUP": group,
            "LARGEST_GROUP": self.largest_group,
            "ONE_SPLIT": self._tuning.one_split_tiles,
            "MAX_SPLITS": _MAX_SPLITS,
            "num_warps": self._tuning.num_warps,
            "num_stages": self._tuning.num_stages,
        }

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
        q, k, v = _with_rows_whole(q, k, v)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if len(q):
            self.launch(q, k, v, cache, out, batch, scale=scale, window=window)
        return out.flatten(1)

    def launch(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        out: torch.Tensor,
        batch: Batch,
        *,
        scale: float,
        window: int | None,
    ) -> None:
        """Into `out`, of the shape of `q`. Of a mixed step the rows of those sequences of one token
        that come first, and no others.
        """
        grid, num_parts = self._spread(len(q), batch)
        partial_lse = torch.empty(num_parts, dtype=torch.float32, device=q.device)
        num_numbers = num_parts * self._constants["BLOCK_D"]
        partial_out = torch.empty(num_numbers, dtype=torch.float32, device=q.device)
        num_seqs = len(batch.kv_lengths) if batch.is_mixed else len(batch.query_lens)
        keys, values = cache.view(2, -1, *cache.shape[3:])
        decode_kernel[grid](
            q,
            k,
            v,
            keys,
            values,
            out,
            partial_out,
            partial_lse,
            self._finished,
            batch.slots,
            batch.block_tables,
            batch.query_offsets,
            batch.kv_lengths,
            self.groups,
            num_seqs,
            self._programs,
            *_layout(batch, q, k, v, keys, scale=scale, window=window),
            IS_MIXED=batch.is_mixed,
            **self._constants,
        )

    def _spread(self, num_rows: int, batch: Batch) -> tuple[tuple[int, int, int], int]:
        """The programs of a launch, and how many outputs of splits they may have."""
        num_query, num_kv = self._constants["NUM_QUERY"], self._constants["NUM_KV"]
        if batch.is_mixed:
            programs = max(len(batch.kv_lengths), self._programs)
            return (num_kv, programs, 1), programs * num_query
        tiles = triton.cdiv(max(batch.kv_lens, default=0), self._block_n)
        tiles = 1 if tiles <= self._tuning.one_split_tiles else tiles
        splits = count_splits(num_rows * num_kv, tiles, self._wanted)
        return (num_kv, splits, num_rows), num_rows * splits * num_query if splits > 1 else 0


@dataclass(frozen=True)
class ChunkTuning:
    """What is fixed for all launches on a GPU.

    Attributes:
        product_rows: tokens times query heads of a program; with the heads, its tokens.
        tile_bytes: keys (and values) of a tile; with them, the tokens of a tile.
        num_warps: of a program.
        num_stages: tiles on their way from memory at once.
    """

    product_rows: int = 64
    tile_bytes: int = 16 * 1024
    num_warps: int = 4
    num_stages: int = 2


class TritonMixedAttention:
    """Mixed steps (see `Batch.is_mixed`): two launches a layer, fit for a CUDA graph.

    `decode` takes the sequences of one token that come first, split where they are long;
    `chunk_kernel` all others. Neither reads what the other writes.
    """

    def __init__(
        self,
        decode: TritonDecodeAttention,
        heads: HeadShare,
        *,
        dtype: torch.dtype,
        block_size: int,
        head_dim: int,
        tuning: ChunkTuning | None = None,
    ) -> None:
        self._decode = decode
        tuning = tuning or ChunkTuning()
        group = triton.next_power_of_2(decode.largest_group)
        block_d, block_n = _tile(head_dim, dtype, tuning.tile_bytes)
        self._num_kv = heads.num_kv
        self._block_q = max(1, tuning.product_rows // group)
        self._constants = {
            "NUM_QUERY": heads.num_query,
            "HEAD_DIM": head_dim,
            "BLOCK_D": block_d,
            "BLOCK_SIZE": block_size,
            "BLOCK_N": block_n,
            "BLOCK_Q": self._block_q,
            "GROUP": group,
            "GROUP_STRIDE": decode.groups.shape[1],
            "num_warps": tuning.num_warps,
            "num_stages": tuning.num_stages,
        }

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
        q, k, v = _with_rows_whole(q, k, v)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._decode.launch(q, k, v, cache, out, batch, scale=scale, window=window)
        num_rows, num_seqs = len(q), len(batch.kv_lengths)
        keys, values = cache.view(2, -1, *cache.shape[3:])
        chunk_kernel[(triton.cdiv(num_rows, self._block_q) + num_seqs, self._num_kv)](
            q,
            k,
            v,
            keys,
            values,
            out,
            batch.slots,
            batch.block_tables,
            batch.query_offsets,
            batch.kv_lengths,
            self._decode.groups,
            num_rows,
            num_seqs,
            *_layout(batch, q, k, v, keys, scale=scale, window=window),
            **self._constants,
        )
        return out.flatten(1)


def _tile(head_dim: int, dtype: torch.dtype, tile_bytes: int) -> tuple[int, int]:
    """Numbers of a head up to a power of two, and tokens of a tile of keys."""
    block_d = max(_PRODUCT_ROWS, triton.next_power_of_2(head_dim))
    block_n = triton.next_power_of_2(tile_bytes // (block_d * dtype.itemsize))
    return block_d, min(128, max(_PRODUCT_ROWS, block_n))


def _layout(
    batch: Batch, *tensors: torch.Tensor, scale: float, window: int | None
) -> Iterator[float]:
    """What both kernels take last: stride of the tables, window, scale, and the strides of rows and
    heads of each tensor.
    """
    yield batch.block_tables.stride(0)
    yield _EVERYTHING if window is None else window
    yield scale * _LOG2_E
    for x in tensors:
        yield from x.stride()[:2]


def _with_rows_whole(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """Each with the numbers of a head side by side."""
    return (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; elsewhere, in Triton's interpreter, a few."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
