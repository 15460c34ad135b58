"""Results are whole or absent, whatever kills a run; folders of two runs are kept apart."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import ROOT

from parallel.errors import ConfigError, InternalError, PreflightError
from runner.items.formats import MAX_JSON_VALUES, Format
from runner.items.item import Item, ItemError
from runner.items.spec import ArraySpec
from runner.items.writing import OutputFolder, open_output_folder

LOGITS = ArraySpec("logits", "float32", (3,))
MASK = ArraySpec("mask", "bool", (2, None))
VALUES = {"logits": np.array([0.1, -2, 3], dtype=np.float32)}
A, B, C = (Item(name, Path("in") / f"{name}.npy") for name in ("a", "sub/b", "c"))


def opened(
    folder: Path, chosen: Format = "npy", *outputs: ArraySpec, model: Any = "m1", **options: bool
) -> AbstractContextManager[OutputFolder]:
    settings = {"model": model}
    return open_output_folder(
        folder, outputs or (LOGITS,), chosen=chosen, settings=settings, **options
    )


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_npy(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as output:
        output.write(B, VALUES)
        assert (output.finished(A), output.finished(B)) == (False, True)
        assert output.remaining([A, B, C]) == [A, C]
    assert files(tmp_path / "out") == {"sub/b.npy", "run.json"}
    written = np.load(tmp_path / "out/sub/b.npy")
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, VALUES["logits"])


def test_npz_by_output_names_and_equal_bytes(tmp_path: Path) -> None:
    names = [ArraySpec(name, "float32", (3,)) for name in ("file", "layer/0")]
    outputs = {spec.name: VALUES["logits"] for spec in names}
    with opened(tmp_path, "npz", *names) as output:
        output.write(A, outputs)
        time.sleep(0.01)
        output.write(B, outputs)
    with np.load(tmp_path / "a.npz") as archive:
        assert list(archive) == ["file", "layer/0"]
        np.testing.assert_array_equal(archive["layer/0"], VALUES["logits"])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "sub/b.npz").read_bytes()


def test_json(tmp_path: Path) -> None:
    mask = np.array([[True], [False]])
    with opened(tmp_path, "json", LOGITS, MASK) as output:
        output.write(B, {**VALUES, "mask": mask})
    result = json.loads((tmp_path / "sub/b.json").read_text())
    assert result["item"] == "sub/b"
    assert result["outputs"]["mask"] == {
        "dtype": "bool",
        "shape": [2, 1],
        "data": [[True], [False]],
    }
    values = np.array(result["outputs"]["logits"]["data"], dtype=np.float32)
    np.testing.assert_array_equal(values, VALUES["logits"])


def test_json_has_no_nan_and_a_bad_item_leaves_no_file(tmp_path: Path) -> None:
    with opened(tmp_path, "json") as output:
        with pytest.raises(ValueError, match=r"item a: .* NaN or infinite .* use --format npz"):
            output.write(A, {"logits": np.array([1, np.nan, 2])})
        assert files(tmp_path) == {"run.json", ".lock"}


def test_formats_that_cannot_hold_the_outputs(tmp_path: Path) -> None:
    large = ArraySpec("x", "float32", (MAX_JSON_VALUES, 1))
    with pytest.raises(ConfigError, match="npy holds one output, the model has logits, mask"):
        opened(tmp_path / "out", "npy", LOGITS, MASK).__enter__()
    with pytest.raises(ConfigError, match="100003 values, format json holds up to 100000"):
        opened(tmp_path / "out", "json", large, LOGITS).__enter__()
    with pytest.raises(ConfigError, match="format 'csv' is unknown; use npy, npz, json"):
        opened(tmp_path / "out", "csv").__enter__()  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    with opened(tmp_path / "out", "json", MASK) as output:
        wide = {"mask": np.zeros((2, MAX_JSON_VALUES), dtype=bool)}
        with pytest.raises(ItemError, match="200000 values"):
            output.write(A, wide)


def test_an_item_may_not_take_the_records_name(tmp_path: Path) -> None:
    run = Item("run", Path("in/run.npy"))
    with (
        opened(tmp_path, "json") as output,
        pytest.raises(ConfigError, match=r"the result of in/run\.npy would be run\.json"),
    ):
        output.remaining([A, run])


def test_outputs_are_those_that_were_declared(tmp_path: Path) -> None:
    with opened(tmp_path) as output, pytest.raises(InternalError, match="declared as"):
        output.write(A, {"mask": np.zeros(3)})


def test_a_folder_has_results_of_one_run(tmp_path: Path) -> None:
    with opened(tmp_path, "npz", model={"sha": (1, 2)}) as output:
        output.write(A, VALUES)
    with opened(tmp_path, "npz", model={"sha": (1, 2)}) as output:
        assert output.finished(A)
    with pytest.raises(ConfigError, match=r'run with model=\{"sha": \[1, 2\]\}, this one has "m2"'):
        opened(tmp_path, "npz", model="m2").__enter__()
    with pytest.raises(ConfigError, match=r'format="npz", this one has "npy"; .* --overwrite'):
        opened(tmp_path, "npy", model={"sha": [1, 2]}).__enter__()
    assert "a.npz" in files(tmp_path)


def test_overwrite_empties_a_folder_of_a_run_and_no_other(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as output:
        output.write(A, VALUES)
        output.write(B, VALUES)
        output.record_failure(C, C.error("bad"))
    with opened(tmp_path / "out", model="m2", overwrite=True) as output:
        assert output.remaining([A, B, C]) == [A, B, C]
        assert files(tmp_path / "out") == {"run.json", ".lock"}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.npy").touch()
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"holds thesis\.npy and no run\.json"):
            opened(mine, overwrite=overwrite).__enter__()
    assert (mine / "thesis.npy").exists()


def test_a_damaged_record_and_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        opened(tmp_path / "file").__enter__()
    with opened(tmp_path / "out"):
        pass
    (tmp_path / "out/run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json is not valid JSON .* --overwrite"):
        opened(tmp_path / "out").__enter__()


def test_bad_items_are_recorded_and_tried_again(tmp_path: Path) -> None:
    items = [A, B, C]
    with opened(tmp_path) as output:
        output.write(A, VALUES)
        output.record_failure(B, B.error("it is\nbroken"))
        summary = output.summary(items)
        assert (summary.finished, summary.untried) == (1, 1)
        assert summary.failed == {"sub/b": "item sub/b: it is broken"}
    with opened(tmp_path) as output:
        assert output.remaining(items) == [B, C]
        output.record_failure(C, C.error("no"))
        output.record_failure(C, C.error("still no"))
        output.write(B, VALUES)
        summary = output.summary(items)
        assert (summary.finished, summary.untried) == (2, 0)
        assert summary.failed == {"c": "item c: still no"}
    lines = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert [line["item"] for line in lines] == ["sub/b", "c", "c"]
    assert lines[0]["path"] == "in/sub/b.npy"


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    with opened(tmp_path) as output:
        output.record_failure(A, A.error("no"))
    with (tmp_path / "errors.jsonl").open("a") as file:
        file.write('{"item": "sub/b", "pa')
    with opened(tmp_path) as output:
        output.record_failure(C, C.error("no"))
        assert set(output.summary([A, B, C]).failed) == {"a", "c"}


def test_a_half_written_result_is_removed_though_its_item_is_gone(tmp_path: Path) -> None:
    with opened(tmp_path) as output:
        output.write(B, VALUES)
    for name in ("sub/.old.npy.partial", ".run.json.partial"):
        (tmp_path / name).write_bytes(b"half")
    with opened(tmp_path) as output:
        assert output.finished(B)
    assert files(tmp_path) == {"sub/b.npy", "run.json"}


def test_a_line_of_someone_else_is_named(tmp_path: Path) -> None:
    with opened(tmp_path) as output:
        (tmp_path / "errors.jsonl").write_text("[]\n")
        with pytest.raises(ValueError, match=r"errors\.jsonl, line 1 does not name an item"):
            output.summary([A])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PreflightError, match="cannot write"):
        opened(tmp_path / "file/out").__enter__()
    with opened(tmp_path / "out") as output:
        (tmp_path / "out/sub").touch()
        with pytest.raises(PreflightError, match=r"cannot write .*sub/b\.npy"):
            output.write(B, VALUES)


HOLD = """
import sys, time
from pathlib import Path
from runner.items.spec import ArraySpec
from runner.items.writing import open_output_folder
outputs = [ArraySpec("logits", "float32", (3,))]
with open_output_folder(Path(sys.argv[1]), outputs, chosen="npy", settings={"model": "m1"}):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_at_once(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(PreflightError, match=rf"another run \(process {holder.pid}\) writes"):
        opened(tmp_path, overwrite=True).__enter__()
    holder.kill()
    holder.communicate(timeout=30)
    with opened(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


WRITE = """
import sys
from pathlib import Path
import numpy as np
from runner.items.item import Item, ItemError
from runner.items.spec import ArraySpec
from runner.items.writing import open_output_folder
items = [Item(f"sub{i % 3}/{i}", Path("in")) for i in range(50)]
outputs = [ArraySpec("x", "float32", (500_000,))]
with open_output_folder(Path(sys.argv[1]), outputs, chosen="npy", settings={}) as output:
    for item in output.remaining(items):
        number = float(item.name.split("/")[1])
        output.write(item, {"x": np.full(500_000, number, dtype=np.float32)})
        print(item.name, flush=True)
"""


def start(program: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def results(folder: Path) -> dict[str, tuple[int, int]]:
    """{name: (inode, time of change)}."""
    found = {}
    for path in folder.rglob("*.npy"):
        status = path.stat()
        found[str(path.relative_to(folder))] = (status.st_ino, status.st_mtime_ns)
    return found


def test_a_killed_run_goes_on_and_touches_nothing_finished(tmp_path: Path) -> None:
    before: dict[str, tuple[int, int]] = {}
    saw_half_written = False
    for told in (3, 5, 7, 4):
        run = start(WRITE, tmp_path)
        assert run.stdout is not None
        names = [run.stdout.readline().strip() for _ in range(told)]
        # Not between two items: while the next one is written.
        deadline = time.monotonic() + 5
        while not list(tmp_path.rglob(".*.partial")) and time.monotonic() < deadline:
            pass
        run.send_signal(signal.SIGKILL)
        run.communicate(timeout=30)
        saw_half_written |= bool(list(tmp_path.rglob(".*.partial")))
        after = results(tmp_path)
        assert after.items() >= before.items()
        assert {f"{name}.npy" for name in names} <= after.keys() - before.keys()
        before = after
    assert saw_half_written
    assert 0 < len(before) < 50
    run = start(WRITE, tmp_path)
    assert run.communicate(timeout=60)[0].count("\n") == 50 - len(before)
    assert run.returncode == 0
    after = results(tmp_path)
    assert len(after) == 50
    assert after.items() >= before.items()
    assert files(tmp_path) == {*after, "run.json"}
    for name in after:
        values = np.load(tmp_path / name)
        assert values.shape == (500_000,)
        assert (values == float(Path(name).stem)).all()
