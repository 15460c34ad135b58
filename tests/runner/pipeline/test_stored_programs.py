"""Programs written and read: the same steps, and graphs that compute the same."""

import json
from pathlib import Path

import pytest
import torch
from graph_jobs import CASES, make_job

from parallel.errors import IntegrityError
from parallel.graph_stage import Collective
from runner.compiler.inductor import InductorBackend
from runner.pipeline.programs import programs_to_compile
from runner.pipeline.stage_program import Compute, StageProgram
from runner.pipeline.stored_programs import FILE, read_programs, write_programs

CUTS = {"unet": [1, 1, 1], "text": [2], "branches": [1, 1], "no batch": [1, 2]}


def write(name: str, folder: Path) -> tuple[list[list[StageProgram]], list[str]]:
    programs = programs_to_compile(make_job(CASES[name], CUTS[name]), device="cpu")
    return programs, write_programs(programs, folder)


@pytest.mark.parametrize("name", CUTS)
def test_what_is_read_is_what_was_written(name: str, tmp_path: Path) -> None:
    written, files = write(name, tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")]
    assert sorted(found) == sorted(files)
    for rank, programs in enumerate(written):
        for old, new in zip(programs, read_programs(tmp_path, rank, device="cpu"), strict=True):
            assert (new.receives, new.sends, new.results) == (old.receives, old.sends, old.results)
            assert list(new.weights.items()) == list(old.weights.items())
            for a, b in zip(old.steps, new.steps, strict=True):
                if isinstance(a, Collective):
                    assert a == b
                    continue
                assert isinstance(b, Compute)
                assert (a.inputs, a.outputs) == (b.inputs, b.outputs)
                assert (a.segment.kind, a.segment.inputs) == (b.segment.kind, b.segment.inputs)
                assert_same_function(a, b)


def assert_same_function(old: Compute, new: Compute) -> None:
    tensors = [
        torch.randn(spec.shape)
        if spec.dtype.is_floating_point
        else torch.ones(spec.shape).to(spec.dtype)
        for spec in old.segment.inputs
    ]
    with torch.no_grad():
        expected = old.segment.function()(*tensors)
        found = new.segment.function()(*tensors)
    for a, b in zip(expected, found, strict=True):
        assert b.is_contiguous()
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


def test_two_writes_are_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        _, files = write("unet", folder)
        contents.append({name: (folder / name).read_bytes() for name in files})
    assert contents[0] == contents[1]


def test_equal_graphs_are_written_once(tmp_path: Path) -> None:
    """The ranks of a stage run graphs that are alike, but for layers that divide unevenly."""
    _, files = write("text", tmp_path)
    ranks = json.loads((tmp_path / FILE).read_text())["ranks"]
    zero, one = ([s["graph"] for p in rank for s in p["steps"] if s["graph"]] for rank in ranks)
    assert set(zero) & set(one)
    assert len(files) - 1 == len({*zero, *one}) < len(zero) + len(one)


@pytest.mark.full
def test_a_stored_segment_can_be_compiled_anew(tmp_path: Path) -> None:
    """As `--on-mismatch rebuild` does it."""
    write("branches", tmp_path)
    (program,) = read_programs(tmp_path, 1, device="cpu")
    segment = program.computations[0].segment
    backend = InductorBackend(torch.device("cpu"))
    (tmp_path / "made").mkdir()
    backend.build(segment, segment.export("cpu"), tmp_path / "made")
    run = backend.load(tmp_path / "made", segment)
    inputs = [torch.ones(spec.shape).to(spec.dtype) for spec in segment.inputs]
    for a, b in zip(segment.function()(*inputs), run(*inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("old", "new"), [('"kind"', '"kin"'), ('"steps": [', '"steps": {')])
def test_something_else_is_refused(old: str, new: str, tmp_path: Path) -> None:
    write("unet", tmp_path)
    file = tmp_path / FILE
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(IntegrityError, match="programs"):
        read_programs(tmp_path, 0, device="cpu")
