"""From scheduled sequences to the flat tensors of one step, padded where it runs compiled."""

from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from runner.engine.scheduler import Scheduled
from runner.engine.upload import upload
from runner.models.batch import Batch

Captured = Literal["decode", "mixed"]
"""Steps that are captured: those in which each sequence has one token, and others."""


@dataclass(frozen=True)
class Padding:
    """How a step is filled up to what was compiled or captured.

    Attributes:
        buckets: numbers of rows for which there are artefacts, ascending.
        scratch_block: the KV block that padding writes to and no sequence reads.
        captured: for each kind of step the most rows of one that is captured, a bucket or 0; its
            sequences are padded, too.
        most_seqs: real sequences of a captured step at most.
    """

    buckets: tuple[int, ...]
    scratch_block: int
    captured: Mapping[Captured, int] = field(default_factory=dict)
    most_seqs: int = 0

    def bucket(self, num_rows: int) -> int:
        """The smallest bucket that holds so many rows."""
        return self.buckets[bisect_left(self.buckets, num_rows)]

    def sizes(self, kind: Captured) -> list[int]:
        """Numbers of rows with which steps of a kind are captured, ascending."""
        return [bucket for bucket in self.buckets if bucket <= self.captured.get(kind, 0)]

    def num_seqs(self, kind: Captured, num_rows: int) -> int:
        """Sequences of a captured step, and its samples."""
        return num_rows if kind == "decode" else self.bucket(min(num_rows, self.most_seqs))


@dataclass(frozen=True)
class StepInputs:
    """A step's numbers on the host, packed so that few copies take them to the device.

    Attributes:
        longs: (4 * num_rows + num_samples,) int64: token ids (see `known_ids`), positions, rope
            variants, slots, and the rows whose logits are wanted; padding included.
        ints: (2 * num_seqs + 1,) int32: where each sequence's rows begin and the end, then the
            lengths in the KV cache.
        tables: the KV blocks of each sequence.
        query_lens, kv_lens: of the real sequences; see `Batch`.
        num_rows, num_seqs: with padding.
        num_samples: without padding.
        captured: which graph the step is padded for; None: for none.
    """

    longs: torch.Tensor
    ints: torch.Tensor
    tables: tuple[list[int], ...]
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_rows: int
    num_seqs: int
    num_samples: int
    captured: Captured | None

    def to(self, device: torch.device) -> Batch:
        """The step in fresh tensors on a device."""
        width = max(map(len, self.tables), default=0)
        rows = [table + [0] * (width - len(table)) for table in self.tables]
        shape = len(rows), width
        # From a list numpy makes an array several times as fast as torch makes a tensor.
        tables = torch.from_numpy(np.array(rows, dtype=np.int32).reshape(shape))
        longs, ints, tables = (upload(x, device) for x in (self.longs, self.ints, tables))
        return self.over(longs, ints, tables)

    def with_all_logits(self, padding: Padding | None) -> "StepInputs":
        """The same step with the logits of every real row wanted."""
        num_samples = sum(self.query_lens)
        wanted = torch.zeros(padding.bucket(num_samples) if padding else num_samples).long()
        wanted[:num_samples] = torch.arange(num_samples)
        longs = torch.cat([self.longs[: 4 * self.num_rows], wanted])
        return replace(self, longs=longs, num_samples=num_samples, captured=None)

    def over(self, longs: torch.Tensor, ints: torch.Tensor, tables: torch.Tensor) -> Batch:
        """The step as views of tensors that hold, or will hold, its numbers."""
        n = self.num_rows
        token_ids, positions, variants, slots = longs[: 4 * n].view(4, n).unbind()
        return Batch(
            token_ids=token_ids,
            positions=positions,
            rope_variants=variants,
            slots=slots,
            block_tables=tables,
            query_offsets=ints[: self.num_seqs + 1],
            kv_lengths=ints[self.num_seqs + 1 :],
            query_lens=self.query_lens,
            kv_lens=self.kv_lens,
            logits_rows=longs[4 * n :],
            is_mixed=self.captured == "mixed",
        )


def lay_out(
    scheduled: Seq[Scheduled], block_size: int, padding: Padding | None = None
) -> StepInputs:
    """Lay a step's tokens out one sequence after the other."""
    num_tokens = sum(part.num_tokens for part in scheduled)
    num_samples = sum(part.samples for part in scheduled)
    num_rows, sample_rows, num_seqs = num_tokens, num_samples, len(scheduled)
    captured: Captured | None = None
    scratch_slot = 0
    if padding:
        num_rows = padding.bucket(num_tokens)
        sample_rows = padding.bucket(num_samples) if num_samples else 0
        scratch_slot = padding.scratch_block * block_size
        kind: Captured = "decode" if num_samples == num_tokens else "mixed"
        if num_rows <= padding.captured.get(kind, 0):
            captured = kind
            num_seqs = sample_rows = padding.num_seqs(kind, num_rows)
    longs = np.zeros(4 * num_rows + sample_rows, dtype=np.int64)
    columns, samples = longs[: 4 * num_rows].reshape(4, num_rows), longs[4 * num_rows :]
    columns[3] = scratch_slot
    samples[:num_samples] = _fill(columns, scheduled, block_size)
    query_lens = tuple(part.num_tokens for part in scheduled)
    kv_lens = tuple(part.start + part.num_tokens for part in scheduled)
    unused = num_seqs - len(scheduled)
    # A sequence of padding has an empty cache, and a row of its own where each has one.
    step = int(captured == "decode")
    ends = [num_tokens + step * (1 + i) for i in range(unused)]
    offsets = [*accumulate(query_lens, initial=0), *ends]
    return StepInputs(
        longs=torch.from_numpy(longs),
        ints=torch.from_numpy(np.array([*offsets, *kv_lens, *[0] * unused], dtype=np.int32)),
        tables=tuple(part.sequence.blocks for part in scheduled),
        query_lens=query_lens,
        kv_lens=kv_lens,
        num_rows=num_rows,
        num_seqs=num_seqs,
        num_samples=num_samples,
        captured=captured,
    )


def known_ids(token_ids: torch.Tensor, latest: torch.Tensor) -> torch.Tensor:
    """A step's token ids, where some were laid out before the host had read them.

    Args:
        token_ids: (num_rows,) int64; -1 - i stands for the one at place i of `latest`.
        latest: what the step before chose.
    """
    places = (-1 - token_ids).clamp(min=0)
    return torch.where(token_ids < 0, latest[places], token_ids)


def _fill(columns: NDArray[np.int64], scheduled: Seq[Scheduled], block_size: int) -> list[int]:
    """Write token ids, positions, rope variants and slots of all tokens.

    Returns:
        The rows that sample.
    """
    if all(part.num_tokens == 1 and part.samples for part in scheduled):
        return _fill_decoding(columns, scheduled, block_size)
    samples: list[int] = []
    start = 0
    for part in scheduled:
        sequence, stop = part.sequence, start + part.num_tokens
        first = part.start
        if part.num_tokens == 1:
            # The usual case, for which the arrays below take five times as long.
            slot = sequence.blocks[first // block_size] * block_size + first % block_size
            columns[:, start] = _only_id(part), first, sequence.rope_variant, slot
        else:
            positions = np.arange(first, first + part.num_tokens)
            blocks = np.array(sequence.blocks)[positions // block_size]
            columns[0, start:stop] = sequence.token_ids[first : first + part.num_tokens]
            columns[1, start:stop] = positions
            columns[2, start:stop] = sequence.rope_variant
            columns[3, start:stop] = blocks * block_size + positions % block_size
        if part.samples:
            samples.append(stop - 1)
        start = stop
    return samples


def _fill_decoding(
    columns: NDArray[np.int64], scheduled: Seq[Scheduled], block_size: int
) -> list[int]:
    """The same where each sequence has one token, which is most steps: no arrays for each."""
    rows = [
        (
            _only_id(part),
            part.start,
            part.sequence.rope_variant,
            part.sequence.blocks[part.start // block_size] * block_size + part.start % block_size,
        )
        for part in scheduled
    ]
    columns[:, : len(rows)] = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    return list(range(len(rows)))


def _only_id(part: Scheduled) -> int:
    """Of a part of one token; see `known_ids`."""
    return part.sequence.token_ids[part.start] if part.follows is None else -1 - part.follows
