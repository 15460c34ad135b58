"""A plan as data: what it says of bytes is true, and its digest names it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.decoder_plan import DecoderPlan
from parallel.errors import IntegrityError
from parallel.plan import Carry
from parallel.planner import Limits, make_plan
from parallel.topology import Topology
from parallel.weights import stream
from runner.models.spec import ModelSpec

# The variants have three layers, 6 query heads and 131 tokens.
BY_HAND = [
    ["model.embed_tokens", "model.layers.0"],
    ["model.layers.{1..2}", "model.norm", "lm_head"],
]


def divide(folder: Path, tp_sizes: list[int], **changes: Any) -> DecoderPlan:
    spec = ModelSpec.open(folder)
    arguments: dict[str, Any] = {
        "architecture": spec.config.architecture,
        "dtype": "bfloat16",
        "limits": Limits(max_model_len=32, max_num_seqs=2, max_num_batched_tokens=16),
    }
    topology = Topology.of(tp_sizes, changes.pop("devices", None))
    return make_plan(spec.layout, spec.checkpoint, topology, **arguments | changes)


@pytest.fixture
def folder(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.mark.parametrize("name", ["llama", "llama_bias_tied_linear", "phi3", "gpt2"])
@pytest.mark.parametrize("tp_sizes", [[1], [4], [2, 3]], ids=str)
def test_weight_bytes_are_those_that_are_read(
    name: str, tp_sizes: list[int], checkpoint: Callable[[str], Path]
) -> None:
    plan = divide(checkpoint(name), tp_sizes)
    tensors = ModelSpec.open(checkpoint(name)).checkpoint
    for rank in plan.ranks:
        read = stream(tensors, rank, dtype=torch.bfloat16, device=torch.device("cpu"))
        assert sum(tensor.nbytes for _, tensor in read) == rank.weight_bytes


def test_every_module_is_in_exactly_one_stage(folder: Path) -> None:
    plan = divide(folder, [1, 2, 1])
    assert [module for stage in plan.stages for module in stage.modules] == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.layers.2",
        "model.norm",
        "lm_head",
    ]


def test_a_plan_is_json(folder: Path) -> None:
    plan = divide(folder, [2, 1])
    read = json.loads(json.dumps(plan.to_dict()))
    assert read["tp_sizes"] == [2, 1]
    assert read["ranks"][1]["heads"]["query"] == [4, 6]
    assert read["ranks"][1]["tensors"][0] == {
        "name": "embed_tokens.weight",
        "shape": [66, 48],
        "dim": 0,
        "pieces": [{"source": "model.embed_tokens.weight", "dim": 0, "range": [66, 131]}],
        "transposed": False,
    }


def test_a_digest_is_that_of_the_json(folder: Path) -> None:
    plan = divide(folder, [2, 1])
    text = json.dumps(plan.to_dict(), sort_keys=True, separators=(",", ":"))
    assert plan.digest() == hashlib.sha256(text.encode()).hexdigest()


def test_equal_plans_have_equal_digests_wherever_the_model_lies(
    folder: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert divide(folder, [2, 1]).digest() == divide(moved, [2, 1]).digest()


DIGEST = """
import sys
from runner.config.load import load
from runner.planning import DecoderJob
print(DecoderJob.prepare(load(None, overrides=[f"model.path={sys.argv[1]}"]).config).plan.digest())
"""


def test_a_digest_is_the_same_in_every_process(folder: Path) -> None:
    """Python orders sets differently from process to process; a plan must not."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST, str(folder)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    (digest,) = digests
    assert len(digest.strip()) == 64


@pytest.mark.parametrize(
    ("tp_sizes", "changes"),
    [
        ([2, 2], {}),
        ([1, 2], {}),
        ([3], {}),
        ([2, 1], {"stages": BY_HAND}),
        ([2, 1], {"dtype": "float16"}),
        ([2, 1], {"devices": [2, 1, 0]}),
        ([2, 1], {"limits": Limits(32, 2, max_num_batched_tokens=8)}),
        ([2, 1], {"limits": Limits(16, 2, max_num_batched_tokens=16)}),
    ],
    ids=str,
)
def test_every_difference_changes_the_digest(
    folder: Path, tp_sizes: list[int], changes: dict[str, Any]
) -> None:
    assert divide(folder, tp_sizes, **changes).digest() != divide(folder, [2, 1]).digest()


def test_another_model_changes_the_digest(checkpoint: Callable[[str], Path]) -> None:
    untied, biased = (
        divide(checkpoint(name), [2]).digest() for name in ("llama", "llama_bias_tied_linear")
    )
    assert untied != biased


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_a_carry_knows_its_bytes(dtype: str, num_bytes: int) -> None:
    carry = Carry("skip", dtype, ("num_tokens", 3, 5))
    assert carry.num_bytes == 15 * num_bytes


def test_one_batch_leaves_each_stage_waiting_for_the_others(folder: Path) -> None:
    assert divide(folder, [2]).pipeline_bubble == 0
    assert divide(folder, [1, 1, 1, 1]).pipeline_bubble == 0.75


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("tp_sizes", [[1], [2, 1]], ids=str)
def test_a_plan_comes_back_from_json(
    name: str, tp_sizes: list[int], checkpoint: Callable[[str], Path]
) -> None:
    plan = divide(checkpoint(name), tp_sizes)
    read = DecoderPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert read == plan
    assert read.digest() == plan.digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("dtype"), "plan.dtype is missing"),
        (lambda values: values.update(dtype="int3"), "plan.dtype is 'int3'; it must be one of"),
        (lambda values: values["tp_sizes"].append(1), "tp_sizes|devices"),
        (lambda values: values.update(tp_sizes=[3]), "2 stages and 3 ranks; .* need 1 and 3"),
        (lambda values: values["ranks"].reverse(), r"plan.ranks\[0\] has rank, .* must be"),
        (lambda values: values["ranks"][1].update(tp_rank=0), r"ranks\[1\] has .* \[1, 0, 0, 1\]"),
        (lambda values: values["ranks"][0].update(mlp=[0]), r"ranks\[0\].mlp is \[0\]"),
    ],
)
def test_a_plan_that_cannot_be_right_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, folder: Path
) -> None:
    values = json.loads(json.dumps(divide(folder, [2, 1]).to_dict()))
    change(values)
    with pytest.raises(IntegrityError, match=message):
        DecoderPlan.from_dict(values)
