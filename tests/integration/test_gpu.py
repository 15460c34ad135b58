"""The whole way on one GPU: eager and compiled, captured and call by call, the same tokens."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import rank_jobs
import torch
from margins import assert_same_where_clear
from rank_pool import RankPool

from parallel.context import ParallelContext
from parallel.launch import RankEnv
from parallel.topology import Topology
from runner.build.compile import Destination, compile_on_rank
from runner.bundled import open_job
from runner.compiler.counter import count_compilations
from runner.engine.batching import StepInputs
from runner.engine.loading import load_stage
from runner.engine.rank import loop, make_engine
from runner.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

PROMPTS = [[3 + (7 * i + n) % 120 for i in range(n)] for n in (5, 19, 2)]
GREEDY = {"temperature": 0.0}
SIZES = {"scheduler.max_num_batched_tokens": 32, "scheduler.max_num_seqs": 4}

ENGINE_MARGIN = 1e-2
"""By so much of all logits' size a token must be the likeliest, for TensorRT in float32 to choose
it, too: its products are in TF32 (docs/measurements.md).
"""


def open_context(device_type: str) -> ParallelContext:
    return ParallelContext.open(Topology.of([1]), RankEnv(0, 1), device_type=device_type)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt2"])
def test_captured_steps_give_the_tokens_of_the_cpu(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    model, cuda = str(checkpoint(name)), open_context("cuda")
    expected = rank_jobs.complete(open_context("cpu"), model, PROMPTS, 12, GREEDY, SIZES)
    for eager in (False, True):
        settings = SIZES | {"parallel.device": "cuda", "compile.enforce_eager": eager}
        assert rank_jobs.complete(cuda, model, PROMPTS, 12, GREEDY, settings) == expected


def test_steps_that_run_ahead_or_not_choose_the_same_on_a_gpu(
    checkpoint: Callable[[str], Path],
) -> None:
    """Captured steps, which take the tokens of the one before from where it put them."""
    ways = [GREEDY, {"temperature": 1.3, "seed": 4}, {"repetition_penalty": 1.6}]
    settings = {"parallel.device": "cuda", "scheduler.max_num_seqs": 2}
    given = (str(checkpoint("llama")), PROMPTS, 12, ways, frozenset[int](), settings)
    found = rank_jobs.complete_ahead_or_not(open_context("cuda"), *given)
    assert found is not None
    assert found[0][0] == found[1][0]


def test_uneven_ranks_on_one_gpu_give_the_tokens_of_one(smollm2: Path, tmp_path: Path) -> None:
    """Nine heads over two ranks are six and three."""
    tokenizer = Tokenizer.load(smollm2)
    prompts = [tokenizer.encode(text) for text in ("The capital of France is", "def fib(n):")]
    settings = {"parallel.device": "cuda", "compile.enforce_eager": True}
    arguments = str(smollm2), prompts, 48, GREEDY, settings
    pool = RankPool(2, tmp_path, device_type="cuda", share_gpu=True)
    try:
        found = pool.run(rank_jobs.complete, [2], *arguments)[0]
    finally:
        pool.close()
    assert tokenizer.decode(found[0]).startswith(" Paris.")
    assert found == rank_jobs.complete(open_context("cuda"), *arguments)


@pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    [
        ("llama", "eager", "float32"),
        ("llama", "tensorrt", "float32"),
        ("llama", "tensorrt", "bfloat16"),
        ("gemma3", "tensorrt", "bfloat16"),
        ("gpt2", "tensorrt", "float16"),
        ("llama", "inductor", "float32"),
        ("llama", "auto", "bfloat16"),
    ],
)
def test_a_bundle_gives_the_tokens_of_the_uncompiled_model(
    name: str,
    backend: str,
    dtype: str,
    checkpoint: Callable[[str], Path],
    reference: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    settings = SIZES | {
        "parallel.device": "cuda",
        "model.dtype": dtype,
        "compile.backend": backend,
        "compile.buckets": [4, 32],
        "compile.allow_tf32": backend == "tensorrt",
    }
    job = rank_jobs.prepare(str(checkpoint(name)), [1], settings)
    outcome = compile_on_rank(job, RankEnv(0, 1), Destination(tmp_path / "bundle"))
    assert outcome.parity.passed, "\n".join(
        map(str, [outcome.parity.line(), *outcome.parity.units])
    )
    bundled = open_job(tmp_path / "bundle")
    cuda = open_context("cuda")
    before = count_compilations()
    got = rank_jobs.complete_job(cuda, bundled, PROMPTS, 12, GREEDY)
    again = rank_jobs.complete_job(cuda, bundled, PROMPTS, 12, GREEDY)
    assert got == again
    assert count_compilations() == before
    if dtype == "float32":
        expected = rank_jobs.complete_job(cuda, job, PROMPTS, 12, GREEDY)
        assert got is not None
        assert expected is not None
        if backend == "tensorrt":
            model = reference(checkpoint(name))
            assert_same_where_clear(model, PROMPTS, got, expected, margin=ENGINE_MARGIN)
        else:
            assert got == expected
    torch.cuda.synchronize()


def test_products_in_tf32_are_refused_where_nobody_allows_them(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = SIZES | {
        "parallel.device": "cuda",
        "compile.backend": "tensorrt",
        "compile.buckets": [32],
    }
    job = rank_jobs.prepare(str(checkpoint("llama")), [1], settings)
    outcome = compile_on_rank(job, RankEnv(0, 1), Destination(tmp_path / "bundle"))
    assert not outcome.parity.passed
    assert "set compile.allow_tf32 to true" in outcome.parity.line()


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_captured_steps_with_prompts_give_what_calls_give(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    """Each step twice: by its graph, then call by call on the cache as it was before."""
    settings = SIZES | {"parallel.device": "cuda", "model.dtype": "float16"}
    job = rank_jobs.prepare(str(checkpoint(name)), [1], settings)
    prompts = [[3 + (7 * i + n) % 120 for i in range(n)] for n in (70, 5, 1, 33, 40, 2)]
    front = rank_jobs.ListFront(rank_jobs.requests_of(job, prompts, 6, GREEDY))
    engine = make_engine(job, load_stage(job, open_context("cuda")), front)
    runner, kinds = engine.stage_runner, []
    assert runner._graphs is not None
    replay = runner._graphs.run

    def both(inputs: StepInputs) -> tuple[torch.Tensor, ...]:
        before = {index: cache.clone() for index, cache in runner.caches.items()}
        outputs = tuple(output.clone() for output in replay(inputs))
        after = {index: cache.clone() for index, cache in runner.caches.items()}
        for index, cache in before.items():
            runner.caches[index].copy_(cache)
        called = runner._forward(replace(inputs, captured=None).to(runner.context.device), None)
        rows = slice(inputs.num_samples)
        # All blocks but the last, which padding writes to.
        pairs = [(outputs[0][rows], called[0][rows])]
        pairs += [(after[i][:, :-1], cache[:, :-1]) for i, cache in runner.caches.items()]
        for by_graph, by_calls in pairs:
            largest = float(by_calls.abs().max()) if by_calls.numel() else 0.0
            torch.testing.assert_close(by_graph, by_calls, rtol=0, atol=1e-2 * largest)
        for index, cache in after.items():
            runner.caches[index].copy_(cache)
        kinds.append(inputs.captured)
        return outputs

    with patch.object(runner._graphs, "run", both):
        loop(engine, front)
    assert set(kinds) == {"decode", "mixed"}
    assert all(len(ids) == 6 for ids in front.token_ids.values())


def test_captured_steps_allocate_nothing(checkpoint: Callable[[str], Path]) -> None:
    """Once every sequence decodes, each step runs in the memory that its graph was captured in."""
    settings = SIZES | {"parallel.device": "cuda"}
    job = rank_jobs.prepare(str(checkpoint("llama")), [1], settings)
    stage_runner = load_stage(job, open_context("cuda"))
    front = rank_jobs.ListFront(rank_jobs.requests_of(job, PROMPTS, 30, GREEDY))
    engine = make_engine(job, stage_runner, front)
    engine.admit(front.next())
    for _ in range(5):
        engine.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(10):
        engine.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
