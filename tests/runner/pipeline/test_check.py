"""The shards are compared with the whole model before they are used."""

from functools import partial
from typing import Any

import graph_jobs
import pytest
import torch
from graph_jobs import CASES, Case
from rank_pool import RankPool
from torch import nn

from parallel.graph_stage import Value
from runner.pipeline.check import must_check, random_inputs

INPUT = [{"name": "x", "shape": ["batch", 4]}]


class Pooled(nn.Module):
    """Its mean is of all columns, which a rank that holds some of them does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"given": x * 2, "mean": self.up(x).mean(-1, keepdim=True)}


class Labels(nn.Module):
    """Nothing of floating point; or NaN in some places, on purpose."""

    def __init__(self, *, has_nan: bool) -> None:
        super().__init__()
        self.up, self.down, self.has_nan = nn.Linear(4, 6), nn.Linear(6, 4), has_nan

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.relu(self.up(x)))
        return torch.log(y) if self.has_nan else y.argmax(-1)


RIGHT = {"up": "colwise", "down": "rowwise"}


def complaint(pool: RankPool, case: Case, tp_sizes: list[int], **model: Any) -> str | None:
    found: str | None = pool.run(graph_jobs.checked, tp_sizes, case, {"model": model})[0]
    return found


@pytest.mark.dist
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_right_plan_passes(dtype: str, rank_pool: RankPool) -> None:
    assert complaint(rank_pool, CASES["vision"], [2], dtype=dtype) is None


@pytest.mark.dist
@pytest.mark.parametrize("has_nan", [False, True])
def test_outputs_that_are_not_finite_numbers(has_nan: bool, rank_pool: RankPool) -> None:
    case = Case(partial(Labels, has_nan=has_nan), INPUT, tp_plan=RIGHT)
    assert complaint(rank_pool, case, [2]) is None


@pytest.mark.dist
@pytest.mark.parametrize("tp_sizes", [[2], [3]], ids=str)
def test_a_wrong_plan_is_named_with_the_output_and_the_figures(
    tp_sizes: list[int], rank_pool: RankPool
) -> None:
    case = Case(Pooled, INPUT, tp_plan={"up": "colwise"})
    said = complaint(rank_pool, case, tp_sizes)
    assert said is not None
    assert f"sizes {tp_sizes}, output mean is not that of the whole model" in said
    assert "it differs by up to" in said
    assert "correct parallel.tp_plan" in said


def test_only_a_split_model_is_checked() -> None:
    assert must_check(graph_jobs.make_job(CASES["no batch"], [2]))
    assert not must_check(graph_jobs.make_job(CASES["no batch"], [1, 1]))


def test_random_inputs_are_the_same_each_time_and_fit_small_tables() -> None:
    values = [Value("x", "bfloat16", (2, 3)), Value("ids", "int32", (64,)), Value("m", "bool", ())]
    x, ids, mask = random_inputs(values)
    assert (x.dtype, ids.dtype, mask.dtype) == (torch.bfloat16, torch.int32, torch.bool)
    assert set(ids.tolist()) == {0, 1}
    assert all(map(torch.equal, random_inputs(values), [x, ids, mask]))
