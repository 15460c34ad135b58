"""What has to be compiled: counted by hand for models that are nothing but a config.json."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
from dummy_model import make_dummy

from runner.build.worklist import Use, Work, stages_of, worklist
from runner.planning import DecoderJob

BUCKETS = (1, 8, 32)
NUM_LAYERS = 32
EVEN = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
UNEVEN = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24}
ODD = UNEVEN | {"intermediate_size": 25}


def job_of(folder: Path, tp_sizes: list[int], sizes: dict[str, Any]) -> DecoderJob:
    model = make_dummy(folder, num_hidden_layers=NUM_LAYERS, **sizes)
    return rank_jobs.prepare(str(model), tp_sizes, {"model.load_format": "dummy"})


def work_of(job: DecoderJob, *, max_num_seqs: int = 4) -> list[Work]:
    return worklist(stages_of(job), BUCKETS, max_num_seqs)


@pytest.mark.parametrize(
    ("tp_sizes", "sizes", "distinct"),
    [
        ([1], EVEN, {"qkv": 1, "block": 1, "last_block": 1, "head": 1}),
        ([1, 1, 1], EVEN, {"qkv": 1, "block": 1, "last_block": 1, "head": 1}),
        (
            [2],
            EVEN,
            {"qkv": 1, "o_proj": 1, "add_mlp": 1, "add_qkv": 1, "add": 1, "head": 1},
        ),
        (
            [2, 2],
            UNEVEN,
            {"qkv": 2, "o_proj": 2, "add_mlp": 1, "add_qkv": 2, "add": 1, "head": 1},
        ),
        ([2], ODD, {"qkv": 2, "o_proj": 2, "add_mlp": 2, "add_qkv": 2, "add": 1, "head": 1}),
    ],
    ids=["tp 1", "pp 3", "even", "uneven heads", "uneven heads and MLP"],
)
def test_as_many_as_there_are_distinct_segments(
    tp_sizes: list[int], sizes: dict[str, Any], distinct: dict[str, int], tmp_path: Path
) -> None:
    """Of 32 layers; the head only up to the bucket that holds four samples."""
    todo = work_of(job_of(tmp_path, tp_sizes, sizes))
    per_bucket = {1: distinct, 8: distinct, 32: {k: n for k, n in distinct.items() if k != "head"}}
    found = {
        bucket: dict(Counter(w.segment.kind for w in todo if w.num_rows == bucket))
        for bucket in BUCKETS
    }
    assert found == per_bucket
    assert [work.num_rows for work in todo] == sorted(work.num_rows for work in todo)


@pytest.mark.parametrize(("max_num_seqs", "buckets"), [(1, [1]), (2, [1, 8]), (9, [1, 8, 32])])
def test_the_head_is_compiled_for_as_many_samples_as_a_step_may_have(
    max_num_seqs: int, buckets: list[int], tmp_path: Path
) -> None:
    todo = work_of(job_of(tmp_path, [1], EVEN), max_num_seqs=max_num_seqs)
    assert [work.num_rows for work in todo if work.segment.kind == "head"] == buckets


def test_every_rank_is_given_all_that_it_runs(tmp_path: Path) -> None:
    todo = work_of(job_of(tmp_path, [2, 1], UNEVEN))
    uses = [use for work in todo for use in work.uses]
    assert len(uses) == len(set(uses))
    shared = {"qkv", "o_proj", "add_mlp", "add_qkv", "add"}
    kinds = [shared, shared, {"qkv", "block", "last_block"}]
    expected = {
        Use(rank, kind, bucket) for rank in range(3) for kind in kinds[rank] for bucket in BUCKETS
    }
    assert set(uses) == expected | {Use(2, "head", 1), Use(2, "head", 8)}
    assert str(todo[0]) == f"{todo[0].segment.kind} x 1"


@pytest.mark.parametrize("name", ["gemma3", "qwen2", "gpt2"])
def test_parts_of_one_kind_are_one_function_in_every_layer(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    """Also where layers differ in window and rotary frequencies, which come from outside."""
    (stage,) = stages_of(rank_jobs.prepare(str(checkpoint(name)), [1], {}))
    digests: dict[str, set[str]] = {}
    for part in stage.parts.values():
        segment = part.segment(4)
        digests.setdefault(part.kind, set()).add(segment.digest(segment.export("cpu")))
    assert {kind: len(found) for kind, found in digests.items()} == dict.fromkeys(digests, 1)
    assert len(set.union(*digests.values())) == len(digests)
