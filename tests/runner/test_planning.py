"""From a configuration to a plan: what each key changes, and the mistakes found on the way."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import ConfigError, IntegrityError
from runner.config.load import load
from runner.config.schema import RunnerConfig
from runner.planning import DecoderJob, budget_of, topology_of, with_sizes


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


def config_of(model: Path, **settings: Any) -> RunnerConfig:
    """Keys with `__` for the dot."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return load(None, overrides=[f"model.path={model}", *overrides]).config


def test_a_bare_configuration_is_one_rank_with_the_models_own_limits(model: Path) -> None:
    plan = DecoderJob.prepare(config_of(model)).plan
    assert plan.tp_sizes == (1,)
    assert (plan.architecture, plan.dtype) == ("LlamaForCausalLM", "float32")
    assert (plan.max_model_len, plan.max_num_batched_tokens) == (128, 8192)


def test_sizes_and_limits_reach_the_plan(model: Path) -> None:
    config = config_of(
        model,
        model__dtype="bfloat16",
        model__max_model_len=50,
        parallel__tensor_parallel_size=3,
        parallel__pipeline_parallel_size=2,
        scheduler__max_num_batched_tokens=77,
    )
    plan = DecoderJob.prepare(config).plan
    assert plan.tp_sizes == (3, 3)
    assert (plan.dtype, plan.max_model_len, plan.max_num_batched_tokens) == ("bfloat16", 50, 77)


def test_more_sequences_need_more_room_for_logits(model: Path) -> None:
    few, many = (
        DecoderJob.prepare(config_of(model, scheduler__max_num_seqs=n))
        .plan.ranks[0]
        .activation_bytes
        for n in (1, 1000)
    )
    assert many > few


def test_stages_cut_by_hand(model: Path) -> None:
    stages = (
        "[{modules: [model.embed_tokens, model.layers.0], tensor_parallel_size: 2,"
        " devices: [5, 4]},"
        " {modules: ['model.layers.{1..2}', model.norm, lm_head], devices: [1]}]"
    )
    config = config_of(model, parallel__stages=stages)
    assert topology_of(config).devices == (5, 4, 1)
    plan = DecoderJob.prepare(config).plan
    assert plan.tp_sizes == (2, 1)
    assert [stage.layers for stage in plan.stages] == [(0, 1), (1, 3)]


def test_stages_without_modules_are_cut_by_cost(model: Path) -> None:
    config = config_of(model, parallel__stages="[{tensor_parallel_size: 2}, {}]")
    plan = DecoderJob.prepare(config).plan
    assert plan.tp_sizes == (2, 1)
    assert plan.stages[0].layers[1] == plan.stages[1].layers[0]


def test_other_sizes_replace_stages_and_keep_the_rest(model: Path) -> None:
    config = config_of(
        model, parallel__stages="[{tensor_parallel_size: 2}, {}]", parallel__device="cpu"
    )
    changed = with_sizes(config, tp_size=3, pp_size=1)
    assert topology_of(changed).tp_sizes == (3,)
    assert changed.parallel.device == "cpu"
    assert changed.model == config.model
    assert topology_of(config).tp_sizes == (2, 1)


def test_budget_is_the_kv_cache_section(model: Path) -> None:
    config = config_of(model, kv_cache__gpu_memory_utilization=0.5, kv_cache__block_size=32)
    budget = budget_of(config, 1000)
    assert (budget.usable_bytes, budget.block_size) == (500, 32)


def test_plans_are_equal_exactly_where_their_configurations_are(model: Path) -> None:
    def digest(**settings: Any) -> str:
        return DecoderJob.prepare(config_of(model, **settings)).plan.digest()

    assert digest() == digest()
    assert digest() != digest(model__max_model_len=100)
    assert digest() != digest(parallel__tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"model__max_model_len": 129}, "max_model_len=129 exceeds the 128 tokens"),
        ({"parallel__tensor_parallel_size": 7}, "tensor_parallel_size=7 exceeds num_attention"),
        ({"parallel__stages": "[{modules: [model.norm]}]"}, "no stage"),
    ],
)
def test_mistakes(model: Path, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        DecoderJob.prepare(config_of(model, **settings))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"config\.json: absent"):
        DecoderJob.prepare(config_of(tmp_path))


def test_planning_does_without_torch() -> None:
    """So `shardline plan` answers at once, and runs where torch is not installed."""
    check = "import runner.planning, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
