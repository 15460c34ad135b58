"""Random weights at the shape of a config, for every family: planned as a real checkpoint is, and
good to compute with.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import rank_jobs
import torch
from checkpoints import FAMILIES
from rank_pool import RankPool

from parallel.context import ParallelContext
from parallel.errors import ConfigError
from parallel.launch import RankEnv
from parallel.topology import Topology
from runner.models.spec import ModelSpec

DUMMY = {"model.load_format": "dummy"}
PROMPTS = [[3 + (7 * i + n) % 120 for i in range(n)] for n in (5, 29)]


@pytest.fixture
def config_alone(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder with nothing in it but a variant's config.json."""

    def copy(name: str) -> Path:
        shutil.copy(checkpoint(name) / "config.json", tmp_path)
        return tmp_path

    return copy


@pytest.mark.parametrize("name", FAMILIES)
def test_the_imagined_checkpoint_is_the_real_one(
    name: str, checkpoint: Callable[[str], Path], config_alone: Callable[[str], Path]
) -> None:
    """Name by name and shape by shape; a tied head is not stored."""
    real = ModelSpec.open(checkpoint(name)).checkpoint.tensors
    imagined = ModelSpec.open(config_alone(name), load_format="dummy").checkpoint.tensors
    assert {n: (t.dtype, t.shape) for n, t in imagined.items()} == {
        n: (t.dtype, t.shape) for n, t in real.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_is_that_of_the_real_checkpoint(
    name: str, checkpoint: Callable[[str], Path], config_alone: Callable[[str], Path]
) -> None:
    real = rank_jobs.prepare(str(checkpoint(name)), [2, 1], {}).plan
    assert rank_jobs.prepare(str(config_alone(name)), [2, 1], DUMMY).plan == real


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_finite_and_differ(
    name: str, dtype: str, config_alone: Callable[[str], Path]
) -> None:
    context = ParallelContext.open(Topology.of([1]), RankEnv(0, 1), device_type="cpu")
    got = rank_jobs.logits(
        context, str(config_alone(name)), PROMPTS, DUMMY | {"model.dtype": dtype}
    )
    assert got is not None
    logits = torch.cat(got)
    assert logits.isfinite().all()
    assert logits.std(dim=-1).min() > 0


@pytest.mark.dist
def test_ranks_agree_on_what_they_compute(
    config_alone: Callable[[str], Path], rank_pool: RankPool
) -> None:
    """Biases that follow a reduce, and learned positions, are equal on the ranks of a stage."""
    results = rank_pool.run(rank_jobs.logits, [1, 3], str(config_alone("gpt2")), PROMPTS, DUMMY)
    assert results[0] is None
    for rank in (2, 3):
        for first, other in zip(results[1], results[rank], strict=True):
            assert first.isfinite().all()
            assert torch.equal(first, other)


def test_dtype_is_the_configs_or_bfloat16(config_alone: Callable[[str], Path]) -> None:
    folder = config_alone("llama")
    config = json.loads((folder / "config.json").read_text())
    assert ModelSpec.open(folder, load_format="dummy").dtype == config["dtype"] == "float32"
    (folder / "config.json").write_text(json.dumps(config | {"dtype": None}))
    assert ModelSpec.open(folder, load_format="dummy").dtype == "bfloat16"


def test_a_config_that_is_not_supported_is_refused_as_ever(
    config_alone: Callable[[str], Path],
) -> None:
    folder = config_alone("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(ConfigError, match="architecture BertModel is not supported"):
        ModelSpec.open(folder, load_format="dummy")
