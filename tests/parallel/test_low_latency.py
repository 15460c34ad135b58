"""All-reduce by inboxes: what it compiles to, and two ranks of it as two streams of one GPU."""

from collections.abc import Iterator, Sequence

import pytest
import torch

from parallel.collectives import Group, all_reduce
from parallel.low_latency import KERNEL, MAX_BYTES, LowLatency, inbox_words

pytest.importorskip("triton", reason="Triton is for Linux")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [8, 16, 4096, 264, 3 * 4096 + 8, 64 * 2048, 8]
"""Elements, in the order in which they are added up: inboxes hold what was larger before."""

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_word_is_sent_and_taken_in_one_piece(size: int, dtype: str) -> None:
    """By the code that a GPU gets, which Triton's interpreter would not run."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from parallel.low_latency_kernel import low_latency_kernel

    assert low_latency_kernel.__name__ == KERNEL
    constants = {"SIZE": size, "MAX_WORDS": MAX_BYTES // 4, "BLOCK": 256}
    signature = {"x": f"*{dtype}", "total": f"*{dtype}", "outboxes": "*i64", "inbox": "*i64"}
    signature |= {"calls": "*i32", "num_words": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(low_latency_kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    code = made.asm["ptx"]
    assert code.count("st.relaxed.sys.global.b64") == size
    assert code.count("ld.relaxed.sys.global.b64") == size
    # All threads have read the number of the call before one of them counts it.
    numbers = [code.index("ld.global", code.index("ld.global") + 1), code.rindex("st.global")]
    assert numbers[0] < code.index("bar.sync") < numbers[1]


def test_what_does_not_fit_is_left_to_the_process_group() -> None:
    way = LowLatency(0, [0, 0], torch.zeros(1, dtype=torch.int64))
    assert way.takes(torch.zeros(MAX_BYTES // 2, dtype=torch.bfloat16))
    assert not way.takes(torch.zeros(MAX_BYTES // 2 + 8, dtype=torch.bfloat16))
    assert not way.takes(torch.zeros(1)), "what idle ranks tell one another"
    assert not way.takes(torch.zeros(9, dtype=torch.float16)[1:]), "begins within a word"
    assert not way.takes(torch.zeros(0, 4)), "no words"
    assert not way.takes(torch.zeros(4, 4).T)
    assert not way.takes(torch.zeros(4, dtype=torch.float64))


class Pair:
    """Two ranks on one GPU, each with a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        inboxes = [torch.zeros(inbox_words(2), dtype=torch.int64, device=device) for _ in range(2)]
        places = [inbox.data_ptr() for inbox in inboxes]
        self.ranks = [LowLatency(rank, places, inbox) for rank, inbox in enumerate(inboxes)]
        self.groups = [Group((0, 1), rank, small_sums=way) for rank, way in enumerate(self.ranks)]
        self.streams = [torch.cuda.Stream(device) for _ in range(2)]
        # While one rank waits for the other nothing may be loaded onto the GPU, or allocated.
        for stream in self.streams:
            with torch.cuda.stream(stream):
                torch.empty(1, device=device)
        answering = torch.zeros(inbox_words(2), dtype=torch.int64, device=device)
        own = [answering.data_ptr(), answering.data_ptr() + MAX_BYTES // 4 * 8]
        self.alone = LowLatency(0, own, answering)
        torch.cuda._sleep(1)
        for dtype in DTYPES:
            x = torch.ones(8, dtype=dtype, device=device)
            assert self.alone.all_reduce(x).tolist() == [2] * 8, "of what it sent itself"
        torch.cuda.synchronize(device)

    def sums(
        self, given: list[torch.Tensor], *, late: Sequence[int] = (0, 0)
    ) -> list[torch.Tensor]:
        """
        Args:
            late: by how many cycles each rank is.
        """
        torch.cuda.synchronize()
        found = []
        ranks = zip(given, self.groups, self.streams, late, strict=True)
        for x, group, stream, cycles in ranks:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(cycles)
                found.append(all_reduce(x, group))
        torch.cuda.synchronize()
        return found


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def pair(device: torch.device) -> Iterator[Pair]:
    yield Pair(device)
    torch.cuda.synchronize()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ranks_get_the_sum(dtype: torch.dtype, pair: Pair, device: torch.device) -> None:
    for round_ in range(20):
        for size in SIZES:
            generator = torch.Generator(device).manual_seed(1000 * round_ + size)
            given = [
                torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(2)
            ]
            wanted = (given[0].float() + given[1].float()).to(dtype)
            for found in pair.sums(given):
                assert torch.equal(found, wanted)


@pytest.mark.gpu
@needs_gpu
def test_a_rank_that_is_late_is_waited_for_and_numbers_begin_again(
    pair: Pair, device: torch.device
) -> None:
    for rank in pair.ranks:
        rank._calls.fill_(-3)
    for call, late in enumerate([(10**6, 0), (0, 10**6)] * 3):
        given = [torch.full((1024,), float(call + rank), device=device) for rank in range(2)]
        for found in pair.sums(given, late=late):
            assert torch.equal(found, torch.full_like(found, 2 * call + 1))
    assert [int(rank._calls[0]) for rank in pair.ranks] == [5, 5], "2 comes after -1"


@pytest.mark.gpu
@needs_gpu
def test_a_graph_of_many_adds_up_what_is_there_when_it_runs(
    pair: Pair, device: torch.device
) -> None:
    """As a decoding step has them: each sum goes into the next."""
    num_layers = 40
    given = [torch.zeros(2, 1024, device=device) for _ in range(2)]
    graphs, results = [], []
    for x, group, stream in zip(given, pair.groups, pair.streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            total = x
            for _ in range(num_layers):
                total = all_reduce(total, group) / 2
        graphs.append(graph)
        results.append(total)
    for replay in range(5):
        for rank, x in enumerate(given):
            x.fill_(10 * replay + 2 * rank)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, pair.streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for result in results:
            assert torch.equal(result, torch.full_like(result, 10 * replay + 1))
