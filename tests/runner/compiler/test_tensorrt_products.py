"""Products that TensorRT-RTX is slow at are written anew, and compute the same."""

from pathlib import Path

import pytest
import torch
from engine_builds import engines_of
from torch import nn

from runner.compiler.segment import Segment, TensorSpec
from runner.compiler.tensorrt_forms import reform
from runner.compiler.tensorrt_io import ENGINE_FILE

aten = torch.ops.aten

FORMS = [
    pytest.param(1, 64, 96, {aten.mul.Tensor, aten.sum.dim_IntList}, id="row"),
    pytest.param(1, 8196, 32, {aten.matmul.default, aten.sum.dim_IntList}, id="long row"),
    pytest.param(2, 8196, 32, {aten.matmul.default, aten.sum.dim_IntList}, id="long rows"),
    pytest.param(64, 32, 4100, {aten.conv2d.default}, id="wide rows"),
    pytest.param(2, 64, 96, set(), id="small"),
    pytest.param(65, 32, 4100, set(), id="many rows"),
    pytest.param(1, 8194, 32, {aten.mul.Tensor, aten.sum.dim_IntList}, id="odd length"),
    pytest.param(1, 8, 40_000, set(), id="head"),
]


def segment(rows: int, length: int, columns: int, dtype: torch.dtype, *, bias: bool) -> Segment:
    with torch.device("meta"):
        module = nn.Linear(length, columns, bias=bias, dtype=dtype)
    return Segment("linear", module, (TensorSpec((rows, length), dtype),))


def operators(program: torch.export.ExportedProgram) -> set[object]:
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "length", "columns", "expected"), FORMS)
def test_a_product_takes_the_form_for_its_size(
    rows: int, length: int, columns: int, expected: set[object], bias: bool
) -> None:
    segment_ = segment(rows, length, columns, torch.bfloat16, bias=bias)
    program = segment_.export("cpu")
    reformed = reform(program, "rtx")
    if not expected:
        assert reformed is program
        return
    assert expected <= operators(reformed)
    assert aten.linear.default not in operators(reformed)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, length, generator=generator).bfloat16() for n in (rows, columns))
    inputs = (x, weight, torch.randn(columns, generator=generator).bfloat16())[: 2 + bias]
    (got,) = reformed.module()(*inputs)
    exact = nn.functional.linear(*(y.double() for y in inputs))
    assert got.shape == exact.shape
    assert got.dtype == torch.bfloat16
    assert (got - exact).norm() <= 8e-3 * exact.norm()


def test_other_precisions_and_flavours_stay_as_they_are() -> None:
    exact = segment(1, 64, 96, torch.float32, bias=False).export("cpu")
    assert reform(exact, "rtx") is exact
    program = segment(1, 64, 96, torch.bfloat16, bias=False).export("cpu")
    assert reform(program, "standard") is program


def test_every_form_becomes_an_engine(tmp_path: Path) -> None:
    sizes = [(1, 64, 96), (1, 8196, 32), (8, 32, 4100)]
    segments = [segment(*size, torch.bfloat16, bias=True) for size in sizes]
    for folder in engines_of(segments, tmp_path):
        assert (folder / ENGINE_FILE).stat().st_size
