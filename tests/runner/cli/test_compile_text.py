"""What a person reads at the end of a compile."""

from dataclasses import replace
from pathlib import Path

from runner.build.built import Built
from runner.build.compile import Outcome
from runner.build.parity import ParityReport, UnitParity
from runner.build.recipe import Verdict
from runner.build.whole_parity import WholeParity
from runner.build.worklist import Use
from runner.bundle.manifest import Candidate
from runner.cli.compile_text import summary

MEASURED = Built(
    kind="qkv",
    num_rows=16,
    backend="tensorrt",
    key="a",
    num_ops=38,
    num_bytes=12_345,
    seconds=2.25,
    candidates=(
        Candidate("inductor", "b", 60.0, True, ""),
        Candidate("tensorrt", "a", 52.25, True, ""),
    ),
    reason="fastest of those that pass",
    uses=(Use(0, "qkv", 16), Use(2, "qkv", 16), Use(2, "first", 16)),
)
KEPT = replace(
    MEASURED,
    kind="add",
    num_rows=1,
    backend="eager",
    key="c",
    num_ops=1,
    num_bytes=0,
    seconds=0.0,
    candidates=(Candidate("eager", "c", None, None, ""),),
    uses=(Use(1, "add", 1),),
)
SAME = replace(MEASURED, kind="twin", seconds=0.0, uses=(Use(1, "twin", 16),))
UNITS = (
    UnitParity("layers.0", 1, 0.999999, 0.004, 0.004, 1.0, True),
    UnitParity("layers.1", 16, 0.9995, 0.009, 0.003, 1.0, True),
    UnitParity("head", 16, 0.9998, 0.02, 0.02, 1.0, True),
)
PASSED = ParityReport(True, "", UNITS, WholeParity(128, 0.9921875, 0.00125, True))


def test_a_line_a_segment_then_totals_and_the_comparison() -> None:
    text = summary(Outcome((MEASURED, SAME, KEPT), PASSED), Path("/out"))
    lines = text.splitlines()
    heading = "segment rows backend ops in TensorRT us build s bytes ranks"
    assert lines[0].split() == heading.split()
    assert [line.split() for line in lines[1:4]] == [
        ["add", "1", "eager", "0", "of", "1", "-", "0.0", "0", "1"],
        ["qkv", "16", "tensorrt", "38", "of", "38", "52.2", "2.2", "12,345", "0,2"],
        ["twin", "16", "tensorrt", "38", "of", "38", "52.2", "0.0", "12,345", "1"],
    ]
    # Two segments that are one artefact count once.
    assert lines[5] == "2 artefacts, 1 built in 2.2 s of work, 12,345 bytes"
    assert lines[6].startswith("parity: passed; ")
    assert lines[7:] == ["/out"]


def test_where_tensorrt_was_no_candidate_it_has_no_column() -> None:
    lines = summary(Outcome((KEPT,), PASSED), Path("/out")).splitlines()
    assert lines[0].split() == ["segment", "rows", "backend", "us", "build", "s", "bytes", "ranks"]
    assert lines[1].split() == ["add", "1", "eager", "-", "0.0", "0", "1"]


def test_candidates_that_could_not_run_are_told_with_the_first_reason() -> None:
    refused = Candidate("inductor", "", None, None, "no header")
    without = replace(MEASURED, candidates=(refused, MEASURED.candidates[1]))
    lines = summary(Outcome((without, KEPT), PASSED), Path("/out")).splitlines()
    assert "inductor: left out of 1 of 2 segments; no header" in lines


def test_the_worst_unit_is_the_one_that_points_farthest_away() -> None:
    assert PASSED.line() == (
        "parity: passed; smallest cosine of a layer's contribution 0.999500 (layers.1 at 16 "
        "tokens); top-1 0.992, KL 0.0013 over 128 positions"
    )


def test_a_comparison_that_failed_and_one_that_was_not_made() -> None:
    assert replace(PASSED, passed=False, reason="layers.1 is wrong").line() == (
        "parity: FAILED: layers.1 is wrong"
    )
    assert Verdict(False, "not compared: compiled with --no-run").line() == (
        "parity: not compared: compiled with --no-run"
    )
