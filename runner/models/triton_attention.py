"""Attention of decoding steps on a GPU: how the Triton kernel of `decode_kernel` is launched.

Import it only where Triton is installed (`runner.models.attention_choice` sees to that).
"""

from dataclasses import dataclass

import torch
import triton

from parallel.slicing import HeadShare
from runner.models.batch import Batch
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
    of one object must be on one stream.
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
        largest = max(map(len, members))
        group = max(_PRODUCT_ROWS, triton.next_power_of_2(largest))
        self._groups = torch.tensor(
            [heads_of + [-1] * (group - len(heads_of)) for heads_of in members],
            dtype=torch.int32,
            device=device,
        )
        block_d = max(_PRODUCT_ROWS, triton.next_power_of_2(head_dim))
        block_n = self._tuning.tile_bytes // (block_d * dtype.itemsize)
        self._block_n = min(128, max(_PRODUCT_ROWS, triton.next_power_of_2(block_n)))
        self._wanted = self._tuning.programs_per_processor * _num_processors(device)
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
            "LARGEST_GROUP": largest,
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
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if len(q) == 0:
            return out.flatten(1)
        longest = max(batch.kv_lens, default=0)
        tiles = triton.cdiv(longest, self._block_n)
        tiles = 1 if tiles <= self._tuning.one_split_tiles else tiles
        num_kv, block_d = self._constants["NUM_KV"], self._constants["BLOCK_D"]
        splits = count_splits(len(q) * num_kv, tiles, self._wanted)
        parts = q.shape[0] * q.shape[1] * splits if splits > 1 else 0
        partial_lse = torch.empty(parts, dtype=torch.float32, device=q.device)
        partial_out = torch.empty(parts * block_d, dtype=torch.float32, device=q.device)
        keys, values = cache.view(2, -1, *cache.shape[3:])
        decode_kernel[(num_kv, splits, len(q))](
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
            batch.kv_lengths,
            self._groups,
            len(batch.query_lens),
            batch.block_tables.stride(0),
            _EVERYTHING if window is None else window,
            scale * _LOG2_E,
            *(stride for x in (q, k, v, keys) for stride in x.stride()[:2]),
            **self._constants,
        )
        return out.flatten(1)


def _num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; elsewhere, in Triton's interpreter, a few."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
