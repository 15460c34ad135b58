"""A step's attention on a GPU, with long new prompts, equals `GatherAttention` in float32."""

from collections.abc import Sequence as Seq
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from parallel.slicing import HeadShare, split_heads
from runner.models import varlen_attention
from runner.models.attention import GatherAttention
from runner.models.batch import Batch
from runner.models.varlen_attention import VarlenAttention, runs_of

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SCALE, BLOCK_SIZE, HEAD_DIM = 0.11, 16, 128
HEADS = {"grouped": split_heads(8, 2, 1)[0], "uneven-groups": split_heads(10, 2, 3)[1]}
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(
    ("query_lens", "kv_lens", "window", "expected"),
    [
        ((2048,), (2048,), None, [(True, 0, 1)]),
        ((512, 511), (512, 511), None, [(True, 0, 1), (False, 1, 2)]),
        ((600, 600, 600), (600, 900, 600), None, [(True, 0, 1), (False, 1, 2), (True, 2, 3)]),
        ((5, 7, 600, 600), (5, 7, 600, 600), None, [(False, 0, 2), (True, 2, 4)]),
        ((600, 601), (600, 601), 600, [(True, 0, 1), (False, 1, 2)]),
    ],
    ids=["one", "at-the-limit", "goes-on", "short-first", "window"],
)
def test_long_new_prompts_are_told_apart(
    query_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    window: int | None,
    expected: list[tuple[bool, int, int]],
) -> None:
    runs = runs_of(query_lens, kv_lens, window)
    assert [(is_long, run.start, run.stop) for is_long, run in runs] == expected


class Step:
    """A step on a cache of random numbers; its blocks lie in no order, and block 0 is padding's."""

    def __init__(
        self,
        heads: HeadShare,
        lengths: Seq[tuple[int, int]],
        *,
        padding: int,
        dtype: torch.dtype,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        query_lens, kv_lens = zip(*lengths, strict=True)
        counts = [-(-length // BLOCK_SIZE) for length in kv_lens]
        order = (1 + torch.randperm(sum(counts), generator=generator)).tolist()
        tables = [[order.pop() for _ in range(count)] for count in counts]
        slots = [
            table[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
            for table, (queries, length) in zip(tables, lengths, strict=True)
            for place in range(length - queries, length)
        ]
        num_rows = sum(query_lens) + padding
        num_heads = (heads.num_query, heads.num_kv, heads.num_kv)
        sizes = [count * HEAD_DIM for count in num_heads]
        # Parts of one tensor, as a merged projection gives them.
        rows = torch.randn(num_rows, sum(sizes), generator=generator).to(dtype).cuda()
        self.q, self.k, self.v = (
            x.view(num_rows, count, HEAD_DIM)
            for x, count in zip(torch.split(rows, sizes, dim=1), num_heads, strict=True)
        )
        shape = (2, 1 + sum(counts), BLOCK_SIZE, heads.num_kv, HEAD_DIM)
        self.cache = torch.randn(shape, generator=generator).to(dtype).cuda()
        self.heads = heads
        unused = torch.zeros(num_rows, dtype=torch.int64, device="cuda")
        width = max(counts)
        padded_tables = [table + [0] * (width - len(table)) for table in tables]
        self.batch = Batch(
            token_ids=unused,
            positions=unused,
            rope_variants=unused,
            slots=torch.tensor([*slots, *[0] * padding], device="cuda"),
            block_tables=torch.tensor(padded_tables, dtype=torch.int32, device="cuda"),
            query_offsets=torch.tensor(list(accumulate(query_lens, initial=0))).int().cuda(),
            kv_lengths=torch.tensor(kv_lens, dtype=torch.int32, device="cuda"),
            query_lens=query_lens,
            kv_lens=kv_lens,
            logits_rows=unused[:0],
        )

    def check(self, window: int | None) -> None:
        """Equal outputs and equal caches, but for the block of padding."""
        expected, expected_cache = self._run(
            GatherAttention(self.heads, torch.device("cuda")), torch.float32, window
        )
        attend = VarlenAttention(self.heads, torch.device("cuda"))
        output, cache = self._run(attend, self.q.dtype, window)
        tolerance = TOLERANCE[self.q.dtype]
        assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(cache[:, 1:].float(), expected_cache[:, 1:])

    def _run(
        self, attend: Any, dtype: torch.dtype, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (x.to(dtype) for x in (self.q, self.k, self.v))
        cache = self.cache.to(dtype, copy=True)
        return attend(q, k, v, cache, self.batch, scale=SCALE, window=window), cache


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("window", [None, 700, 300])
    @pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
    @pytest.mark.parametrize(
        "lengths",
        [
            [(1024, 1024)],
            [(513, 513), (600, 600)],
            [(9, 40), (5, 5), (700, 700), (600, 900), (512, 512)],
        ],
        ids=["one", "two", "mixed"],
    )
    def test_long_prompts_equal_softmax(
        self,
        lengths: list[tuple[int, int]],
        heads: HeadShare,
        window: int | None,
        dtype: torch.dtype,
    ) -> None:
        for padding in (0, 300):
            Step(heads, lengths, padding=padding, dtype=dtype).check(window)

    def test_hopper_uses_cudnn_for_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("needs Hopper")
        monkeypatch.delattr(varlen_attention, "varlen_attn")
        Step(HEADS["grouped"], [(600, 600)], padding=5, dtype=torch.bfloat16).check(None)
