"""A step's sequences laid out flat and padded, number by number."""

import pytest
import torch

from runner.engine.batching import Padding, known_ids, lay_out
from runner.engine.request import Request
from runner.engine.scheduler import Scheduled
from runner.engine.sequence import Sequence

CPU = torch.device("cpu")
BUCKETS = (1, 4, 8)
SCRATCH = 11


def sequence(ids: list[int], *, computed: int, blocks: list[int], variant: int = 0) -> Sequence:
    request = Request(0, tuple(ids), 100)
    return Sequence(request, ids, num_computed=computed, blocks=blocks, rope_variant=variant)


def test_prefill_a_chunk_of_it_and_decoding_side_by_side() -> None:
    decoding = sequence([10, 11, 12, 13, 14, 15], computed=5, blocks=[7, 2], variant=1)
    whole = sequence([20, 21, 22], computed=0, blocks=[5])
    chunk = sequence([30, 31, 32, 33, 34, 35, 36, 37, 38], computed=3, blocks=[1, 9, 4])
    scheduled = [Scheduled.of(decoding, 1), Scheduled.of(whole, 3), Scheduled.of(chunk, 4)]
    batch = lay_out(scheduled, 4).to(CPU)
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
    batch = lay_out([Scheduled.of(sequence([1, 2, 3], computed=0, blocks=[0]), 2)], 16).to(CPU)
    assert batch.logits_rows.tolist() == []
    assert batch.logits_rows.dtype == torch.int64


def test_what_kernels_index_with_is_int32() -> None:
    batch = lay_out([Scheduled.of(sequence([1], computed=0, blocks=[0]), 1)], 16).to(CPU)
    short = {"block_tables", "query_offsets", "kv_lengths"}
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == (torch.int32 if name in short else torch.int64), name


def test_tokens_that_are_computed_again_go_where_they_were() -> None:
    """As when a sequence crosses to other rotary frequencies."""
    crossing = sequence([1, 2, 3, 4, 5], computed=0, blocks=[6, 3], variant=1)
    batch = lay_out([Scheduled.of(crossing, 5)], 4).to(CPU)
    assert batch.positions.tolist() == [0, 1, 2, 3, 4]
    assert batch.slots.tolist() == [24, 25, 26, 27, 12]
    assert batch.rope_variants.tolist() == [1] * 5


def unread(place: int) -> Sequence:
    """One whose third token was chosen at this place of the last step, and has not been read."""
    found = sequence([10, 11], computed=2, blocks=[7])
    found.num_unread, found.place_in_step = 1, place
    return found


@pytest.mark.parametrize("beside", [[], [20, 21]])
def test_tokens_that_were_not_read_are_put_in_on_the_device(beside: list[int]) -> None:
    others = [Scheduled.of(sequence(beside, computed=0, blocks=[5]), 2)] if beside else []
    parts = [Scheduled.of(unread(3), 1), *others, Scheduled.of(unread(0), 1)]
    batch = lay_out(parts, 4).to(CPU)
    ids = known_ids(batch.token_ids, torch.tensor([50, 51, 52, 53]))
    assert ids.tolist() == [53, *beside, 50]
    assert batch.positions.tolist()[:: len(ids) - 1] == [2, 2]
    assert batch.kv_lens[0] == 3


def mixed() -> list[Scheduled]:
    """A prompt of three tokens beside a sequence that decodes its sixth."""
    decoding = sequence([10, 11, 12, 13, 14, 15], computed=5, blocks=[7, 2], variant=1)
    return [
        Scheduled.of(decoding, 1),
        Scheduled.of(sequence([20, 21, 22], computed=0, blocks=[5]), 3),
    ]


def decoding(count: int) -> list[Scheduled]:
    return [
        Scheduled.of(sequence([10 + i, 20 + i, 30 + i], computed=2, blocks=[i]), 1)
        for i in range(count)
    ]


@pytest.mark.parametrize(("num_rows", "bucket"), [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8)])
def test_the_smallest_bucket_that_holds_them(num_rows: int, bucket: int) -> None:
    assert Padding(BUCKETS, SCRATCH).bucket(num_rows) == bucket


def test_rows_and_samples_are_padded_and_padding_writes_where_no_sequence_reads() -> None:
    parts = [*mixed(), Scheduled.of(sequence([40, 41], computed=1, blocks=[6]), 1)]
    inputs = lay_out(parts, 4, Padding(BUCKETS, SCRATCH))
    assert (inputs.num_rows, inputs.num_seqs, inputs.num_samples) == (8, 3, 3)
    assert inputs.captured is None
    padded, plain = inputs.to(CPU), lay_out(parts, 4).to(CPU)
    for name in ("token_ids", "positions", "rope_variants"):
        assert getattr(padded, name).tolist() == [*getattr(plain, name).tolist(), 0, 0, 0]
    assert padded.slots.tolist() == [*plain.slots.tolist(), *[SCRATCH * 4] * 3]
    assert padded.logits_rows.tolist() == [0, 3, 4, 0]
    # Attention must not see what is padding.
    for name in ("query_offsets", "kv_lengths", "block_tables"):
        assert getattr(padded, name).tolist() == getattr(plain, name).tolist()
    assert (padded.query_lens, padded.kv_lens) == (plain.query_lens, plain.kv_lens)


def test_a_step_that_fills_its_bucket_is_not_padded() -> None:
    inputs = lay_out(mixed(), 4, Padding(BUCKETS, SCRATCH))
    plain = lay_out(mixed(), 4).to(CPU)
    assert inputs.num_rows == 4
    batch = inputs.to(CPU)
    assert batch.slots.tolist() == plain.slots.tolist()
    # Samples have buckets of their own: two of four.
    assert batch.logits_rows.tolist() == [0, 3, 0, 0]


def test_a_chunk_that_samples_nothing_has_no_samples_to_pad() -> None:
    chunk = [Scheduled.of(sequence([1, 2, 3, 4], computed=0, blocks=[0]), 3)]
    inputs = lay_out(chunk, 4, Padding(BUCKETS, SCRATCH))
    assert (inputs.num_rows, inputs.num_samples) == (4, 0)
    assert inputs.to(CPU).logits_rows.tolist() == []


def test_a_decode_step_for_a_captured_graph_is_padded_with_empty_sequences() -> None:
    inputs = lay_out(decoding(3), 4, Padding(BUCKETS, SCRATCH, {"decode": 4}, 3))
    assert inputs.captured == "decode"
    assert (inputs.num_rows, inputs.num_seqs, inputs.num_samples) == (4, 4, 3)
    assert inputs.ints.tolist() == [0, 1, 2, 3, 4, 3, 3, 3, 0]
    assert len(inputs.query_lens) == 3
    longs = inputs.longs.tolist()
    assert longs[12:16] == [2, 6, 10, SCRATCH * 4]
    assert longs[16:] == [0, 1, 2, 0]


def test_a_prompt_makes_a_step_that_no_graph_was_captured_of() -> None:
    padding = Padding(BUCKETS, SCRATCH, {"decode": 4}, 4)
    inputs = lay_out(mixed(), 4, padding)
    assert (inputs.captured, inputs.num_seqs) == (None, 2)
    # A prompt of one token is no different from a decoded one.
    single = [Scheduled.of(sequence([9], computed=0, blocks=[3]), 1)]
    assert lay_out(single, 4, padding).captured == "decode"
    assert lay_out(single, 4, Padding(BUCKETS, SCRATCH)).captured is None


def test_a_mixed_step_for_a_captured_graph_has_as_many_sequences_and_samples_as_there_may_be() -> (
    None
):
    padding = Padding(BUCKETS, SCRATCH, {"decode": 4, "mixed": 8}, 3)
    chunk = Scheduled.of(sequence([1, 2, 3, 4], computed=1, blocks=[0]), 2)
    inputs = lay_out([*mixed(), chunk], 4, padding)
    assert inputs.captured == "mixed"
    assert (inputs.num_rows, inputs.num_seqs, inputs.num_samples) == (8, 4, 2)
    # Three are real; the fourth has no rows and an empty cache.
    assert inputs.ints.tolist() == [0, 1, 4, 6, 6, 6, 3, 3, 0]
    assert inputs.longs[32:].tolist() == [0, 3, 0, 0]
    assert inputs.to(CPU).is_mixed
    assert not lay_out(decoding(3), 4, padding).to(CPU).is_mixed
    nothing_chosen = lay_out([chunk], 4, padding)
    assert (nothing_chosen.num_samples, len(nothing_chosen.longs)) == (0, 4 * 4 + 4)


def test_steps_are_captured_in_all_sizes_up_to_the_largest() -> None:
    padding = Padding(BUCKETS, SCRATCH, {"decode": 4, "mixed": 8}, 3)
    assert (padding.sizes("decode"), padding.sizes("mixed")) == ([1, 4], [1, 4, 8])
    assert [padding.num_seqs("mixed", num_rows) for num_rows in BUCKETS] == [1, 4, 4]
    assert not Padding(BUCKETS, SCRATCH).sizes("mixed")


@pytest.mark.parametrize(("padding", "padded"), [(None, 0), (Padding(BUCKETS, SCRATCH), 3)])
def test_the_logits_of_every_row_instead_of_the_last(padding: Padding | None, padded: int) -> None:
    parts = [*mixed(), Scheduled.of(sequence([40, 41, 42], computed=0, blocks=[6]), 1)]
    inputs = lay_out(parts, 4, padding)
    every = inputs.with_all_logits(padding)
    assert every.num_samples == 5
    assert every.to(CPU).logits_rows.tolist() == [0, 1, 2, 3, 4, *[0] * padded]
    assert every.to(CPU).slots.tolist() == inputs.to(CPU).slots.tolist()
