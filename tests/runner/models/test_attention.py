"""Attention over a paged cache equals softmax(q k) v, written out for each token in float64."""

import itertools
import random
from collections.abc import Sequence as Seq

import pytest
import torch
from torch.testing import assert_close

from parallel.slicing import HeadShare, split_heads
from runner.engine.batching import lay_out
from runner.engine.request import Request
from runner.engine.scheduler import Scheduled
from runner.engine.sequence import Sequence
from runner.models.attention import GatherAttention, causal_mask

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS, HEAD_DIM, SCALE = 4, 40, 8, 0.21

HEADS = {
    "as-many-kv-heads": split_heads(3, 3, 1)[0],
    "grouped": split_heads(6, 2, 1)[0],
    "one-kv-head": split_heads(4, 1, 1)[0],
    "uneven-groups": split_heads(10, 2, 3)[1],
}


class Tokens:
    """Sequences with random queries, keys and values, and their blocks anywhere in the cache."""

    def __init__(self, heads: HeadShare, lengths: Seq[int]) -> None:
        torch.manual_seed(1)
        self.heads = heads
        self.q = [torch.randn(n, heads.num_query, HEAD_DIM) for n in lengths]
        self.k = [torch.randn(n, heads.num_kv, HEAD_DIM) for n in lengths]
        self.v = [torch.randn(n, heads.num_kv, HEAD_DIM) for n in lengths]
        blocks = random.Random(0).sample(range(NUM_BLOCKS), NUM_BLOCKS)
        self.sequences = []
        for index, length in enumerate(lengths):
            sequence = Sequence.of(Request(index, (0,) * length, 1))
            sequence.blocks = [blocks.pop() for _ in range(-(-length // BLOCK_SIZE) + 1)]
            self.sequences.append(sequence)
        # Whatever is read without having been written shows as NaN.
        shape = (2, NUM_BLOCKS, BLOCK_SIZE, heads.num_kv, HEAD_DIM)
        self.cache = torch.full(shape, torch.nan)

    def step(self, parts: Seq[tuple[int, int]], window: int | None = None) -> list[torch.Tensor]:
        """Attend with the next tokens of some sequences: pairs of (sequence, number of tokens)."""
        spans = [(i, slice(self.sequences[i].num_computed, None)) for i, _ in parts]
        scheduled = [Scheduled.of(self.sequences[i], n) for i, n in parts]
        batch = lay_out(scheduled, BLOCK_SIZE).to(CPU)

        def flat(of: list[torch.Tensor]) -> torch.Tensor:
            rows = [of[i][span][:n] for (i, span), (_, n) in zip(spans, parts, strict=True)]
            return torch.cat(rows)

        attend = GatherAttention(self.heads, CPU)
        q, k, v = flat(self.q), flat(self.k), flat(self.v)
        output = attend(q, k, v, self.cache, batch, scale=SCALE, window=window)
        for i, n in parts:
            self.sequences[i].num_computed += n
        return list(torch.split(output, [n for _, n in parts]))

    def expected(self, index: int, window: int | None = None) -> torch.Tensor:
        """(length, num_query * head_dim) for a whole sequence."""
        q, k, v = (x[index].double() for x in (self.q, self.k, self.v))
        rows = []
        for place, head in itertools.product(range(len(q)), range(self.heads.num_query)):
            seen = slice(0 if window is None else max(0, place - window + 1), place + 1)
            kv = self.heads.query_to_kv[head]
            weights = torch.softmax(k[seen, kv] @ q[place, head] * SCALE, dim=0)
            rows.append(weights @ v[seen, kv])
        return torch.stack(rows).view(len(q), -1).float()


@pytest.mark.parametrize("window", [None, 1, 3, 9])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_equals_softmax_in_one_step_and_in_chunks(heads: HeadShare, window: int | None) -> None:
    lengths = [9, 1, 14, 4]
    whole = Tokens(heads, lengths)
    outputs = whole.step(list(enumerate(lengths)), window)
    chunked = Tokens(heads, lengths)
    # Chunks begin within a block, at its start and behind its end; some sequences skip a step.
    steps = [[(0, 5), (2, 4)], [(2, 3), (1, 1), (0, 3)], [(3, 4), (0, 1), (2, 6)], [(2, 1)]]
    chunks: dict[int, list[torch.Tensor]] = {i: [] for i in range(4)}
    for parts in steps:
        for (index, _), output in zip(parts, chunked.step(parts, window), strict=True):
            chunks[index].append(output)
    for index in range(4):
        expected = whole.expected(index, window)
        assert_close(outputs[index], expected, rtol=1e-5, atol=1e-6)
        assert_close(torch.cat(chunks[index]), expected, rtol=1e-5, atol=1e-6)


def test_decoding_token_by_token_equals_prefill() -> None:
    tokens = Tokens(HEADS["uneven-groups"], [11])
    outputs = [tokens.step([(0, 1)], window=5)[0] for _ in range(11)]
    assert_close(torch.cat(outputs), tokens.expected(0, window=5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 6])
def test_a_result_does_not_depend_on_the_rest_of_the_batch(window: int | None) -> None:
    """To the last bit, whoever comes before or after and however long they are."""
    lengths = [12, 30, 1, 7]
    together = Tokens(HEADS["grouped"], lengths)
    joint = together.step([(3, 7), (1, 30), (0, 12), (2, 1)], window)
    alone = Tokens(HEADS["grouped"], lengths)
    for output, index in zip(joint, (3, 1, 0, 2), strict=True):
        assert torch.equal(output, alone.step([(index, lengths[index])], window)[0])


def test_only_the_slots_of_the_step_are_written() -> None:
    tokens = Tokens(HEADS["grouped"], [6, 5])
    tokens.step([(0, 6), (1, 2)])
    written = {
        (sequence.blocks[place // BLOCK_SIZE], place % BLOCK_SIZE)
        for sequence, length in zip(tokens.sequences, (6, 2), strict=True)
        for place in range(length)
    }
    places = (~tokens.cache.isnan()).all(-1).all(-1).all(0).nonzero().tolist()
    assert {tuple(place) for place in places} == written


@pytest.mark.parametrize("window", [None, 1, 2, 5, 8])
@pytest.mark.parametrize(("query_len", "kv_len"), [(1, 1), (1, 6), (3, 3), (3, 7), (7, 7)])
def test_mask(query_len: int, kv_len: int, window: int | None) -> None:
    mask = causal_mask(query_len, kv_len, window, CPU)
    span = window or kv_len
    sees = [
        [place - span < key <= place for key in range(kv_len)]
        for place in range(kv_len - query_len, kv_len)
    ]
    if mask is None:
        assert all(map(all, sees))
    else:
        assert mask.tolist() == sees
