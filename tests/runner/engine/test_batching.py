"""A step's sequences laid out flat, number by number."""

import torch

from runner.engine.batching import make_batch
from runner.engine.request import Request
from runner.engine.scheduler import Scheduled
from runner.engine.sequence import Sequence

CPU = torch.device("cpu")


def sequence(ids: list[int], *, computed: int, blocks: list[int], variant: int = 0) -> Sequence:
    request = Request(0, tuple(ids), 100)
    return Sequence(request, ids, num_computed=computed, blocks=blocks, rope_variant=variant)


def test_prefill_a_chunk_of_it_and_decoding_side_by_side() -> None:
    decoding = sequence([10, 11, 12, 13, 14, 15], computed=5, blocks=[7, 2], variant=1)
    whole = sequence([20, 21, 22], computed=0, blocks=[5])
    chunk = sequence([30, 31, 32, 33, 34, 35, 36, 37, 38], computed=3, blocks=[1, 9, 4])
    scheduled = [Scheduled(decoding, 1), Scheduled(whole, 3), Scheduled(chunk, 4)]
    batch = make_batch(scheduled, 4, CPU)
    assert batch.token_ids.tolist() == [15, 20, 21, 22, 33, 34, 35, 36]
    assert batch.positions.tolist() == [5, 0, 1, 2, 3, 4, 5, 6]
    assert batch.rope_variants.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert batch.slots.tolist() == [9, 20, 21, 22, 7, 36, 37, 38]
    assert [table[:n] for table, n in zip(batch.block_tables.tolist(), (2, 1, 3), strict=True)] == [
        [7, 2],
        [5],
        [1, 9, 4],
    ]
    assert batch.query_lens == (1, 3, 4)
    assert batch.kv_lens == (6, 3, 7)
    assert batch.kv_lengths.tolist() == [6, 3, 7]
    assert batch.query_offsets.tolist() == [0, 1, 4, 8]
    assert batch.num_tokens == 8
    # The chunk does not reach its sequence's end, so nothing is chosen from it.
    assert batch.logits_rows.tolist() == [0, 3]


def test_no_logits_where_no_sequence_reaches_its_end() -> None:
    batch = make_batch([Scheduled(sequence([1, 2, 3], computed=0, blocks=[0]), 2)], 16, CPU)
    assert batch.logits_rows.tolist() == []
    assert batch.logits_rows.dtype == torch.int64


def test_what_kernels_index_with_is_int32() -> None:
    batch = make_batch([Scheduled(sequence([1], computed=0, blocks=[0]), 1)], 16, CPU)
    short = {"block_tables", "query_offsets", "kv_lengths"}
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == (torch.int32 if name in short else torch.int64), name


def test_tokens_that_are_computed_again_go_where_they_were() -> None:
    """As when a sequence crosses to other rotary frequencies."""
    crossing = sequence([1, 2, 3, 4, 5], computed=0, blocks=[6, 3], variant=1)
    batch = make_batch([Scheduled(crossing, 5)], 4, CPU)
    assert batch.positions.tolist() == [0, 1, 2, 3, 4]
    assert batch.slots.tolist() == [24, 25, 26, 27, 12]
    assert batch.rope_variants.tolist() == [1] * 5
