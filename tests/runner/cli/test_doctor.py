"""`doctor` as a user calls it: table, JSON and exit codes, on this host."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from runner.cli.doctor import doctor

# No host has as many: the demand fails everywhere.
TOO_MANY_GPUS = "4096"
STATUSES = ("ok ", "warning ", "error ", "absent ")


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)  # makes `doctor` a command beside others
    app.command("doctor")(doctor)
    return app


def test_table_has_a_line_a_check_and_a_line_a_fix(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["doctor"])
    lines = result.stdout.splitlines()
    checks = {line.split()[1]: line for line in lines if line.startswith(STATUSES)}
    assert {"driver", "gpus", "torch", "shm", "loopback"} <= set(checks)
    starts = {line.index(line.split(maxsplit=2)[2]) for line in checks.values()}
    assert len(starts) == 1, "details are aligned"
    indent = " " * starts.pop()
    assert all(line.startswith(f"{indent}fix: ") for line in lines if "fix: " in line)
    assert "\x1b" not in result.stdout, "no colour when it is not a terminal"
    assert result.exit_code == (3 if any(line.startswith("error") for line in lines) else 0)


def test_a_demand_that_fails_names_itself_and_exits_with_3(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["doctor", "--gpus", TOO_MANY_GPUS])
    assert result.exit_code == 3
    line = next(line for line in result.stdout.splitlines() if line.split()[1:2] == ["gpus"])
    assert line.startswith("error")
    assert f"{TOO_MANY_GPUS} demanded" in line


def test_json_is_one_object_that_agrees_with_the_exit_code(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["doctor", "--json", "--gpus", TOO_MANY_GPUS])
    data = json.loads(result.stdout)
    assert set(data) == {"findings", "gpus", "gpu_pairs", "versions", "exit_code"}
    assert data["exit_code"] == result.exit_code == 3
    assert [f["check"] for f in data["findings"] if f["status"] == "error"].count("gpus") == 1


def test_a_negative_number_of_gpus_is_a_usage_error(app: typer.Typer) -> None:
    assert CliRunner().invoke(app, ["doctor", "--gpus", "-1"]).exit_code == 2


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, runner.cli.doctor;"
        "heavy = {'torch', 'rich', 'pynvml', 'pydantic', 'runner.observe.doctor'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
