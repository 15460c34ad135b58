"""The Triton kernel and its launches equal `GatherAttention` in float32 on the CPU.

Where there is a GPU the kernel is compiled for it; elsewhere the same tests run in Triton's
interpreter, in a process of their own, as Triton is told so before it is imported.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from parallel.slicing import HeadShare, split_heads
from runner.models.attention import Attention, GatherAttention
from runner.models.attention_choice import KERNELS, StepAttention, captures_prompts, make_attention
from runner.models.batch import Batch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
DEVICE = CPU if INTERPRETED or not torch.cuda.is_available() else torch.device("cuda")

kernel = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == CPU and not INTERPRETED), reason="runs in the interpreter"
)
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == CPU, reason="needs a GPU")]

SCALE = 0.21
HEADS = {
    "as-many-kv-heads": split_heads(3, 3, 1)[0],
    "grouped": split_heads(8, 2, 1)[0],
    "one-kv-head": split_heads(20, 1, 1)[0],
    "uneven-groups": split_heads(10, 2, 3)[1],
}
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
KERNEL_FLOATS = FLOATS[:1] if INTERPRETED else FLOATS  # It has no bfloat16 product.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Step:
    """A step on a cache of random numbers: query and KV lengths, and rows of padding behind."""

    def __init__(
        self,
        heads: HeadShare,
        query_lens: Seq[int],
        kv_lens: Seq[int],
        *,
        padding: int = 0,
        block_size: int = 4,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        width: int | None = None,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_rows = sum(query_lens) + padding
        counts = [-(-length // block_size) for length in kv_lens]
        order = (1 + torch.randperm(sum(counts), generator=generator)).tolist()
        tables = [[order.pop() for _ in range(count)] for count in counts]
        # What has no length, and padding, writes to block 0, which nobody reads.
        slots = [
            table[place // block_size] * block_size + place % block_size if length else 0
            for table, queries, length in zip(tables, query_lens, kv_lens, strict=True)
            for place in range(length - queries, length)
        ]
        slots += [0] * padding
        width = width or max(counts, default=0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.q = random(num_rows, heads.num_query, head_dim)
        self.k = random(num_rows, heads.num_kv, head_dim)
        self.v = random(num_rows, heads.num_kv, head_dim)
        self.cache = random(2, 1 + sum(counts), block_size, heads.num_kv, head_dim)
        self.heads = heads
        unused = torch.zeros(num_rows, dtype=torch.int64)
        self.batch = Batch(
            token_ids=unused,
            positions=unused,
            rope_variants=unused,
            slots=torch.tensor(slots),
            block_tables=torch.tensor(
                [table + [0] * (width - len(table)) for table in tables], dtype=torch.int32
            ).view(len(tables), width),
            query_offsets=torch.tensor(list(accumulate(query_lens, initial=0))).int(),
            kv_lengths=torch.tensor(kv_lens, dtype=torch.int32),
            query_lens=tuple(query_lens),
            kv_lens=tuple(kv_lens),
            logits_rows=unused[:0],
        )
        self.known = self.batch

    def expected(self, window: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and cache of `GatherAttention` in float32."""
        q, k, v, cache = (x.float() for x in (self.q, self.k, self.v, self.cache))
        attend = GatherAttention(self.heads, CPU)
        return attend(q, k, v, cache, self.known, scale=SCALE, window=window), cache

    def on_device(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Batch]:
        """q, k, v, cache and batch; q, k and v as parts of one tensor, as a merged projection
        gives them.
        """
        sizes = [self.q.shape[1], self.k.shape[1], self.v.shape[1]]
        qkv = torch.cat([self.q, self.k, self.v], dim=1).to(DEVICE)
        q, k, v = torch.split(qkv, sizes, dim=1)
        return q, k, v, self.cache.to(DEVICE), to_device(self.batch)

    def unknown_to_the_host(self, num_seqs: int) -> "Step":
        """The same step as a captured one has it, filled up with empty sequences."""
        batch = self.batch
        missing = num_seqs - len(batch.kv_lengths)
        offsets = F.pad(batch.query_offsets, (0, missing), value=int(batch.query_offsets[-1]))
        other = copy(self)
        other.known = batch
        other.batch = replace(
            batch,
            block_tables=F.pad(batch.block_tables, (0, 0, 0, missing)),
            query_offsets=offsets,
            kv_lengths=F.pad(batch.kv_lengths, (0, missing)),
            query_lens=(),
            kv_lens=(1 << 20,) * num_seqs,
            is_mixed=True,
        )
        return other

    def check(self, attend: Attention, window: int | None = None) -> None:
        q, k, v, cache, batch = self.on_device()
        output = attend(q, k, v, cache, batch, scale=SCALE, window=window)
        expected, expected_cache = self.expected(window)
        tolerance = TOLERANCE[self.q.dtype]
        assert_close(output.cpu().float(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(cache[:, 1:].cpu().float(), expected_cache[:, 1:])


def to_device(batch: Batch) -> Batch:
    tensors = {
        name: value.to(DEVICE)
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor)
    }
    return replace(batch, **tensors)


def decode_attention(step: Step, **tuning: int) -> Any:
    from runner.models.triton_attention import DecodeTuning, TritonDecodeAttention

    return TritonDecodeAttention(
        step.heads,
        DEVICE,
        dtype=step.q.dtype,
        block_size=step.cache.shape[2],
        head_dim=step.q.shape[2],
        tuning=DecodeTuning(**tuning),
    )


def mixed_attention(step: Step, *, decode: dict[str, int] | None = None, **tuning: int) -> Any:
    from runner.models.triton_attention import ChunkTuning, TritonMixedAttention

    return TritonMixedAttention(
        decode_attention(step, **decode or {}),
        step.heads,
        dtype=step.q.dtype,
        block_size=step.cache.shape[2],
        head_dim=step.q.shape[2],
        tuning=ChunkTuning(**tuning),
    )


@pytest.mark.skipif(INTERPRETED or DEVICE != CPU, reason="the tests below run here")
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_kernel_in_triton_s_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "kernel", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@kernel
@pytest.mark.parametrize("dtype", KERNEL_FLOATS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 37])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_kernel_equals_softmax(heads: HeadShare, window: int | None, dtype: torch.dtype) -> None:
    step = Step(heads, [1] * 4, [1, 50, 0, 83], padding=1, dtype=dtype)
    step.check(decode_attention(step, programs_per_processor=1), window)
    splits = decode_attention(step, tile_bytes=16 * 16 * dtype.itemsize, one_split_tiles=1)
    # Twice: the first call leaves the counters of finished splits as it found them.
    step.check(splits, window)
    assert not splits._finished.any()
    step.check(splits, window)


@kernel
def test_kernel_splits_what_is_longer_than_joining_takes() -> None:
    """Of tiles of 16 keys: just as many as are not split, one more, and many more than splits."""
    lengths = [4 * 16, 4 * 16 + 1, 4 * 16 + 2, 5 * 16 + 1, 33 * 16]
    step = Step(HEADS["grouped"], [1] * len(lengths), lengths)
    attend = decode_attention(step, tile_bytes=16 * 16 * 4, programs_per_processor=32)
    for window in (None, 40):
        step.check(attend, window)


@kernel
@pytest.mark.parametrize(("block_size", "head_dim"), [(1, 16), (2, 24), (16, 80), (256, 64)])
def test_kernel_with_blocks_and_heads_of_any_size(block_size: int, head_dim: int) -> None:
    sizes: dict[str, Any] = {"block_size": block_size, "head_dim": head_dim}
    step = Step(HEADS["grouped"], [1] * 3, [40, 1, 300], dtype=torch.float16, **sizes)
    step.check(decode_attention(step, tile_bytes=2048, one_split_tiles=2), 128)


@kernel
def test_kernel_reads_lengths_on_the_device() -> None:
    """The host's lengths only bound the splits: a captured step has them at their longest."""
    step = Step(HEADS["grouped"], [1] * 3, [33, 5, 200], width=100)
    attend = decode_attention(step, tile_bytes=1024, one_split_tiles=1)
    q, k, v, cache, batch = step.on_device()
    captured = replace(batch, kv_lens=(400, 400, 400))
    output = attend(q, k, v, cache, captured, scale=SCALE, window=None)
    assert_close(output.cpu(), step.expected()[0], rtol=1e-5, atol=1e-5)


@kernel
def test_kernel_takes_a_step_of_padding_alone_and_an_empty_one() -> None:
    step = Step(HEADS["grouped"], [1], [3], padding=4)
    attend = decode_attention(step)
    q, k, v, cache, batch = step.on_device()
    for rows in (4, 0):
        padding = replace(batch, slots=batch.slots[:rows] * 0, query_lens=(), kv_lens=())
        output = attend(q[:rows], k[:rows], v[:rows], cache, padding, scale=SCALE, window=None)
        assert output.shape == (rows, q.shape[1] * q.shape[2])
        assert not output.any()


@kernel
def test_kernel_serves_the_decoding_part_of_a_mixed_step() -> None:
    heads = HEADS["uneven-groups"]
    step = Step(heads, [1, 1, 7, 1, 12], [9, 40, 7, 3, 20], padding=3)
    chunks = GatherAttention(heads, DEVICE)
    attend = StepAttention(decode_attention(step), chunks)
    for _ in range(2):
        step.check(attend, 6)
    Step(heads, [5, 2], [5, 9], padding=1).check(attend)


MIXED = {
    "prompts": ([5, 40, 19], [5, 40, 19]),
    "chunks": ([7, 21], [90, 33]),
    "beside-decoding": ([1, 1, 17, 1, 4, 1], [83, 1, 60, 9, 4, 1]),
    "decoding": ([1, 1, 1], [40, 3, 200]),
    "one-of-many-tokens": ([33], [150]),
    "nothing": ([], []),
}


def check_mixed(step: Step, window: int | None) -> None:
    """With splits and tiles so small that there are several of each."""
    step = step.unknown_to_the_host(8)
    small = {"tile_bytes": 16 * 16 * step.q.dtype.itemsize}
    decode = {**small, "one_split_tiles": 1, "programs_per_processor": 4}
    attend = mixed_attention(step, decode=decode, product_rows=32, **small)
    # Twice: the first call leaves the counters of finished splits as it found them.
    step.check(attend, window)
    step.check(attend, window)
    assert not attend._decode._finished.any()


@kernel
@pytest.mark.parametrize("window", [None, 1, 18])
@pytest.mark.parametrize(("query_lens", "kv_lens"), MIXED.values(), ids=MIXED)
def test_kernels_take_a_step_whose_lengths_only_the_device_knows(
    query_lens: list[int], kv_lens: list[int], window: int | None
) -> None:
    check_mixed(Step(HEADS["grouped"], query_lens, kv_lens, padding=5, width=60), window)


@kernel
@pytest.mark.parametrize("dtype", KERNEL_FLOATS, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_kernels_take_a_mixed_step_with_any_heads(heads: HeadShare, dtype: torch.dtype) -> None:
    check_mixed(Step(heads, *MIXED["beside-decoding"], padding=5, width=60, dtype=dtype), 18)


@kernel
@pytest.mark.parametrize(("block_size", "head_dim"), [(1, 16), (16, 80), (256, 64)])
def test_kernel_takes_chunks_with_blocks_and_heads_of_any_size(
    block_size: int, head_dim: int
) -> None:
    sizes: dict[str, Any] = {"block_size": block_size, "head_dim": head_dim}
    step = Step(HEADS["grouped"], [1, 70, 9], [300, 270, 9], dtype=torch.float16, **sizes)
    # As many sequences as there may be, and one more than there are.
    for num_seqs in (3, 4):
        unknown = step.unknown_to_the_host(num_seqs)
        unknown.check(mixed_attention(unknown), 128)


@pytest.mark.parametrize("padding", [0, 3])
def test_the_cpu_gathers(padding: int) -> None:
    attend = make_attention(
        HEADS["grouped"], CPU, dtype=torch.float32, block_size=4, head_dim=16, decode="varlen"
    )
    assert isinstance(attend, GatherAttention)
    step = Step(HEADS["grouped"], [1, 3, 0], [0, 3, 0], padding=padding)
    output = attend(step.q, step.k, step.v, step.cache, step.batch, scale=SCALE, window=None)
    assert output.shape == (4 + padding, 8 * 16)
    assert not output[0].any()
    assert output[1:4].any(dim=1).all()
    assert not output[4:].any()


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("window", [None, 100])
    @pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
    @pytest.mark.parametrize(
        ("query_lens", "kv_lens"),
        [
            ([300, 5, 1], [300, 5, 1]),
            ([1, 1, 1], [700, 1, 256]),
            ([1, 1, 200, 64], [513, 2, 200, 400]),
        ],
        ids=["prompts", "decode", "mixed"],
    )
    def test_steps_equal_softmax(
        self,
        query_lens: list[int],
        kv_lens: list[int],
        heads: HeadShare,
        window: int | None,
        dtype: torch.dtype,
    ) -> None:
        sizes: dict[str, Any] = {"block_size": 16, "head_dim": 64, "dtype": dtype}
        step = Step(heads, query_lens, kv_lens, padding=5, **sizes)
        step.check(make_attention(heads, DEVICE, **sizes), window)

    @pytest.mark.parametrize("window", [None, 100])
    def test_flash_attention_decodes(self, window: int | None) -> None:
        heads = HEADS["grouped"]
        sizes: dict[str, Any] = {"block_size": 256, "head_dim": 128, "dtype": torch.bfloat16}
        step = Step(heads, [1] * 4, [700, 1, 256, 0], **sizes)
        attend = make_attention(heads, DEVICE, decode="varlen", **sizes)
        step.check(attend, window)

    @pytest.mark.parametrize(("decode", "block_size"), [("triton", 16), ("varlen", 256)])
    @pytest.mark.parametrize("window", [None, 100])
    def test_a_graph_follows_its_inputs(
        self, decode: Any, block_size: int, window: int | None
    ) -> None:
        """Replayed after lengths, slots, tables, rows and cache changed in place."""
        heads = split_heads(32, 8, 1)[0]
        sizes: dict[str, Any] = {"block_size": block_size, "head_dim": 128}
        sizes["dtype"] = torch.bfloat16
        attend = make_attention(heads, DEVICE, decode=decode, **sizes)
        lengths = [[900, 3, 1, 17], [901, 4, 0, 0], [5, 2000, 64, 65], [1, 1, 1, 1]]
        width = 2048 // block_size
        steps = [
            Step(heads, [1] * 4, kv_lens, width=width, seed=seed, **sizes)
            for seed, kv_lens in enumerate(lengths)
        ]
        check_replays(attend, steps, window)

    @pytest.mark.parametrize("window", [None, 100])
    def test_a_graph_follows_which_rows_are_whose(self, window: int | None) -> None:
        """One graph of 256 rows and 8 sequences for prompts, chunks, decoding, and all of them."""
        heads = split_heads(32, 8, 1)[0]
        sizes: dict[str, Any] = {"block_size": 16, "head_dim": 128, "dtype": torch.bfloat16}
        attend = make_attention(heads, DEVICE, **sizes)
        assert captures_prompts(attend)
        lengths = [
            ([128], [128]),
            ([1, 1, 200, 1], [900, 3, 1500, 1]),
            ([1] * 8, [2000, 1, 64, 65, 5, 300, 301, 17]),
            ([100, 156], [100, 2000]),
            ([7] * 8, [7] * 8),
        ]
        steps = [
            Step(heads, *both, padding=256 - sum(both[0]), width=128, seed=seed, **sizes)
            for seed, both in enumerate(lengths)
        ]
        steps = [step.unknown_to_the_host(8) for step in steps]
        check_replays(attend, steps, window)


def check_replays(attend: Attention, steps: Seq[Step], window: int | None) -> None:
    """One graph is replayed after its inputs and the cache have changed in place."""
    largest = max(steps, key=lambda step: step.cache.shape[1])
    q, k, v, _, batch = largest.on_device()
    cache = largest.cache.to(DEVICE)
    batch = replace(batch, kv_lens=(2048,) * len(batch.kv_lens))

    def run() -> torch.Tensor:
        return attend(q, k, v, cache, batch, scale=SCALE, window=window)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    for step in [*steps, *steps]:
        new_q, new_k, new_v, new_cache, new = step.on_device()
        for old, fresh in [
            (q, new_q),
            (k, new_k),
            (v, new_v),
            (cache[:, : new_cache.shape[1]], new_cache),
            (batch.slots, new.slots),
            (batch.block_tables, new.block_tables),
            (batch.query_offsets, new.query_offsets),
            (batch.kv_lengths, new.kv_lengths),
        ]:
            old.copy_(fresh)
        graph.replay()
        expected, expected_cache = step.expected(window)
        assert_close(output.cpu().float(), expected, rtol=2e-2, atol=2e-2)
        written = cache[:, 1 : new_cache.shape[1]].cpu().float()
        assert torch.equal(written, expected_cache[:, 1:])


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_bundles_keep_the_kernels_by_their_names() -> None:
    from runner.models.chunk_kernel import chunk_kernel
    from runner.models.decode_kernel import decode_kernel

    assert tuple(kernel.fn.__name__ for kernel in (decode_kernel, chunk_kernel)) == KERNELS
