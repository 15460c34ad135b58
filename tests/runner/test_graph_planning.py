"""A configuration becomes buckets: every combination of batch sizes and of the sizes of dims."""

from typing import Any

import graph_jobs
import pytest
from graph_jobs import CASES, Case, make_job
from torch import nn

from parallel.errors import ConfigError
from runner.config.schema import RunnerConfig
from runner.graph_planning import GraphJob, graph_buckets
from runner.sources.tensor_model import TensorModel


def config_of(*inputs: dict[str, Any], dims: dict[str, list[int]], **sections: Any) -> RunnerConfig:
    model = {"path": ".", "factory": "none:none", "inputs": list(inputs), "dims": dims}
    return RunnerConfig.model_validate({"version": 1, "model": model, **sections})


IMAGE = {"name": "image", "shape": ["batch", 3, "height", "width"]}
IDS = {"name": "ids", "shape": ["batch", "width"], "dtype": "int64"}


def test_every_combination_is_a_bucket_the_largest_last() -> None:
    config = config_of(
        IMAGE,
        IDS,
        dims={"height": [8, 16], "width": [4, 6]},
        scheduler={"max_batch_size": 3},
        compile={"buckets": [1, 3]},
    )
    buckets = graph_buckets(config, "bfloat16")
    expected = [(b, h, w) for h in (8, 16) for w in (4, 6) for b in (1, 3)]
    assert [image.shape for image, _ in buckets] == [(b, 3, h, w) for b, h, w in expected]
    assert [ids.shape for _, ids in buckets] == [(b, w) for b, _, w in expected]
    assert {(image.dtype, ids.dtype) for image, ids in buckets} == {("bfloat16", "int64")}


def test_batch_sizes_are_powers_of_two_up_to_the_largest_batch() -> None:
    config = config_of(IDS, dims={"width": [4]}, scheduler={"max_batch_size": 6})
    assert [ids.shape[0] for (ids,) in graph_buckets(config, "float32")] == [1, 2, 4, 6]


def test_batch_sizes_that_end_below_the_largest_batch_are_refused() -> None:
    config = config_of(
        IDS, dims={"width": [4]}, scheduler={"max_batch_size": 6}, compile={"buckets": [1, 4]}
    )
    with pytest.raises(ConfigError, match="max_batch_size"):
        graph_buckets(config, "float32")


def test_inputs_with_and_without_a_batch_are_refused() -> None:
    config = config_of(IDS, {"name": "scale", "shape": [1]}, dims={"width": [4]})
    with pytest.raises(ConfigError, match="scale does not begin with batch and others do"):
        graph_buckets(config, "float32")


def test_a_job_says_what_it_is_made_of() -> None:
    job = make_job(CASES["text"], [2, 1])
    assert job.plan.tp_sizes == (2, 1)
    assert job.plan.is_batched
    assert job.source_files == ()
    assert [len(bucket) for bucket in job.plan.buckets] == [2]
    assert not make_job(CASES["no batch"], [1]).plan.is_batched


@pytest.mark.parametrize("file", ["m.onnx", "m.pt2"])
@pytest.mark.parametrize("tp_plan", [{"gemm": "colwise"}, None])
def test_a_graph_is_not_split(file: str, tp_plan: dict[str, str] | None) -> None:
    """Though one of its operators may be a layer that could be."""
    config = RunnerConfig.model_validate(
        {
            "version": 1,
            "model": {"path": file, "inputs": [{"name": "x", "shape": ["batch", 4]}]},
            "parallel": {"tensor_parallel_size": 2, "tp_plan": tp_plan},
        }
    )
    model = TensorModel(nn.ModuleDict({"gemm": nn.Linear(4, 4)}), file, "float32", ())
    with pytest.raises(
        ConfigError, match=r"ONNX graphs and .* are not split.*pipeline_parallel_size"
    ):
        GraphJob.of(config, model)


def test_stages_by_modules() -> None:
    case = Case(graph_jobs.CASES["chain"].make, graph_jobs.CASES["chain"].inputs)
    stages = [{"modules": ["parts.{0..1}"]}, {"modules": ["parts.{2..5}"]}]
    job = make_job(case, [1, 1], parallel={"stages": stages})
    assert "parts.1" in job.plan.stages[0].modules
    assert "parts.2" in job.plan.stages[1].modules
