"""`inspect` as a user calls it: text, JSON and exit codes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import CHOICE, ENGINE, build_bundle, flip, rewrite_manifest
from processes import ROOT, run_command

from runner.bundle.bundle import Bundle


@pytest.fixture(scope="module")
def built(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tmp_path_factory.mktemp("inspected") / "bundle", checkpoint("llama"))


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "bundle")


def test_text_tells_what_a_bundle_is(built: Path) -> None:
    done = run_command("inspect", str(built))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    opened = Bundle.open(built)
    assert lines[0].startswith("LlamaForCausalLM, bfloat16, 2 stages, 3 ranks, max_model_len 32")
    assert opened.plan.digest()[:12] in lines[0]
    assert lines[1] == f"built on {opened.manifest.host.describe()}"
    assert lines[2].startswith("made from 1 file, ")
    rows = [line.split() for line in lines]
    ranks = [row[:3] for row in rows if row and row[0].isdecimal() and "model" in row[3]]
    assert ranks == [["0", "0", "0"], ["1", "0", "1"], ["2", "1", "0"]]
    assert ["mlp", "1", "tensorrt", "0,1,2", ENGINE[:12], "4.5", "kB"] in rows
    assert any(row[:3] == ["qkv", "16", "eager"] for row in rows)
    assert any(line.endswith(CHOICE.reason) and "tensorrt 52.2 us" in line for line in lines)
    assert "Parity: passed, min_cosine 0.9997" in lines
    assert any("9 files" in line and "3 artefacts" in line for line in lines)
    assert "Verified" not in done.stdout


def test_verify_says_that_every_hash_is_right(built: Path) -> None:
    done = run_command("inspect", str(built), "--verify")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("Verified 9 files, ")
    assert done.stdout.rstrip().endswith("every sha256 is right.")


def test_verify_names_every_changed_file_and_exits_with_4(bundle: Path) -> None:
    names = [f"artefacts/{ENGINE}/engine.trt", "model/config.json"]
    for name in names:
        flip(bundle / name, 9)
    assert run_command("inspect", str(bundle)).returncode == 0
    done = run_command("inspect", str(bundle), "--verify")
    assert done.returncode == 4
    assert all(f"  {name}: sha256 of bytes 0 to" in done.stdout for name in names)
    assert done.stderr.startswith(f"shardline: {bundle}: {names[0]}: sha256")
    assert "(and 1 more)" in done.stderr
    assert done.stderr.rstrip().endswith(f"--output {bundle} --overwrite")

    as_json = run_command("inspect", str(bundle), "--verify", "--json")
    assert as_json.returncode == 4
    assert [fault["file"] for fault in json.loads(as_json.stdout)["faults"]] == names


def test_json_holds_the_manifest_as_it_is(built: Path) -> None:
    shown = json.loads(run_command("inspect", str(built), "--json").stdout)
    stored = json.loads((built / "manifest.json").read_text())
    del stored["self"]
    assert shown == {"path": str(built), "manifest": stored, "faults": None}
    verified = json.loads(run_command("inspect", str(built), "--json", "--verify").stdout)
    assert verified["faults"] == []


def test_a_failed_parity_is_loud(bundle: Path) -> None:
    rewrite_manifest(bundle, lambda values: values["parity"].update(passed=False))
    assert "Parity: NOT PASSED, min_cosine 0.9997" in run_command("inspect", str(bundle)).stdout


def test_what_is_no_bundle_ends_with_4_and_another_version_with_5(
    bundle: Path, tmp_path: Path
) -> None:
    done = run_command("inspect", str(tmp_path))
    assert (done.returncode, done.stdout) == (4, "")
    assert "is no bundle" in done.stderr
    (bundle / "manifest.json").write_text('{"schema": 1}')
    done = run_command("inspect", str(bundle))
    assert done.returncode == 5
    assert "schema version 1" in done.stderr


def test_it_needs_no_torch(built: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from runner.cli.inspect import inspect\n"
        "inspect(Path(sys.argv[1]), verify=True)\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, str(built)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"
