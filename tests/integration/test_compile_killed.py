"""A compile that is killed leaves nothing that could be taken for a bundle; the next one goes on
where it was.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import build_jobs
import pytest
from barren import barren, left_in
from bundles import tree
from checkpoints import add_tokenizer, make_checkpoint
from processes import processes_naming, rank_pid, run_command, start_command, wait_until_gone
from rank_pool import RankPool
from typer.testing import CliRunner

from runner.bundle.manifest import Manifest
from runner.cli.app import app

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]

SETTINGS: dict[str, Any] = {
    "compile.buckets": [8],
    "scheduler.max_num_seqs": 2,
    "scheduler.max_num_batched_tokens": 8,
    "compile.parity.num_tokens": 24,
}
EAGER = SETTINGS | {"compile.backend": "eager"}
INDUCTOR = SETTINGS | {"compile.backend": "inductor"}
KINDS = {"qkv", "o_proj", "add_mlp", "add_qkv", "add", "head"}
"""Of two ranks with equal shares."""

ASKED = ("--prompt", "One two three four", "--prompt", "é", "--max-tokens", "10", "--json")
GONE_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers that two ranks share evenly."""
    folder = tmp_path_factory.mktemp("killed") / "model"
    make_checkpoint(
        "llama",
        folder,
        vocab_size=260,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=None,
    )
    return add_tokenizer(folder)


@pytest.fixture(autouse=True)
def _leave_nothing(model: Path) -> Iterator[None]:
    """A test that fails must not spoil the next one."""
    yield
    for pid in processes_naming(str(model)):
        os.kill(pid, signal.SIGKILL)


def begin(model: Path, out: Path, settings: dict[str, Any]) -> subprocess.Popen[str]:
    """A compile on two ranks that has finished two segments and not all."""
    job = start_command(*build_jobs.arguments(model, out, [2], settings))
    assert job.stderr is not None
    finished = 0
    while finished < 2:
        line = job.stderr.readline()
        assert line, "it ended"
        finished += '"event": "segment"' in line
    return job


def finish(model: Path, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Compile to the end: what --json prints."""
    arguments = build_jobs.arguments(model, out, [2], settings)
    done = run_command(*arguments, "--json", timeout_s=300)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def complaint_of_generate(bundle: Path) -> str:
    done = CliRunner().invoke(app, ["generate", "--bundle", str(bundle), *ASKED])
    assert getattr(done.exception, "exit_code", None) == 4, done.exception
    return str(done.exception)


def finished_artefacts(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each artefact that is recorded as whole, or of its library."""
    found = {}
    for path in (folder / "artefacts").iterdir():
        if (folder / "finished" / f"{path.name}.json").exists():
            file = next(path.iterdir(), path)
            found[path.name] = (file.stat().st_ino, file.stat().st_mtime_ns)
    return found


def test_a_killed_rank_ends_the_compile_and_the_next_one_makes_the_same_bundle(
    model: Path, rank_pool: RankPool, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    rank_pool.run(build_jobs.build, [2], str(model), whole, EAGER)
    job = begin(model, out, EAGER)
    os.kill(rank_pid(str(out), 1), signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 8
    assert errors.splitlines()[-1].endswith(
        "rank 1 (stage 0, tp rank 1): killed by SIGKILL while compiling"
    )
    assert wait_until_gone(str(out), timeout_s=GONE_WITHIN_S) == []
    assert not out.exists()
    assert "is an unfinished bundle; finish it: shardline compile" in complaint_of_generate(out)
    kept = finished_artefacts(tmp_path / "out.partial")
    assert len(kept) >= 2
    # What was being written when the rank was killed, and a record that was cut short.
    half = tmp_path / "out.partial" / "building" / "half"
    half.mkdir(parents=True, exist_ok=True)
    (half / "segment.so").write_bytes(b"\x7fELF")
    (tmp_path / "out.partial" / "finished" / "rank1.json").write_text('{"made_from": "')

    finish(model, out, EAGER)
    files = tree(out)
    assert files.pop("report.json") != tree(whole)["report.json"]
    assert files == {n: data for n, data in tree(whole).items() if n != "report.json"}
    inodes = {name: (out / "artefacts" / name).stat().st_ino for name in kept}
    assert inodes == {name: inode for name, (inode, _) in kept.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@dataclass(frozen=True)
class Resumed:
    """A bundle whose compile was killed and resumed.

    Attributes:
        kept: finished artefacts at the time of the kill; see `finished_artefacts`.
        told: what the second compile printed.
    """

    bundle: Path
    kept: dict[str, tuple[int, int]]
    told: dict[str, Any]


@pytest.fixture(scope="module")
def resumed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """Inductor's libraries; the launcher was killed after two of six."""
    out = tmp_path_factory.mktemp("resumed") / "out"
    job = begin(model, out, INDUCTOR)
    job.kill()
    job.communicate()
    assert wait_until_gone(str(out), timeout_s=GONE_WITHIN_S) == []
    assert not out.exists()
    assert "is an unfinished bundle" in complaint_of_generate(out)
    kept = finished_artefacts(out.with_name("out.partial"))
    return Resumed(out, kept, finish(model, out, INDUCTOR))


@pytest.mark.full
def test_a_resumed_compile_builds_only_what_was_not_finished(resumed: Resumed) -> None:
    built = {made["key"]: made["seconds"] for made in resumed.told["built"]}
    assert {made["kind"] for made in resumed.told["built"]} == KINDS
    assert len(built) == len(KINDS)
    assert 2 <= len(resumed.kept) < len(built)
    assert {key for key, seconds in built.items() if not seconds} == resumed.kept.keys()
    for key, (inode, time_ns) in resumed.kept.items():
        library = (resumed.bundle / "artefacts" / key / "segment.so").stat()
        assert (library.st_ino, library.st_mtime_ns) == (inode, time_ns)
    assert not (resumed.bundle / "building").exists()
    manifest = Manifest.read(resumed.bundle)
    assert manifest.parity["passed"] is True
    assert set(manifest.uses[0]) == set(manifest.uses[1]) == KINDS
    assert manifest.artefacts.keys() == built.keys()
    assert {artefact.backend for artefact in manifest.artefacts.values()} == {"inductor"}


@pytest.mark.full
def test_another_cut_takes_the_libraries_over_and_they_run_without_a_compiler(
    model: Path, resumed: Resumed, tmp_path: Path
) -> None:
    """Two stages of one layer each need no `add_qkv`, and nothing that is not there."""
    out = tmp_path / "out"
    arguments = build_jobs.arguments(model, out, [2, 2], INDUCTOR)
    more = ("--reuse-from", str(resumed.bundle), "--json")
    made = run_command(*arguments, *more, timeout_s=200)
    assert made.returncode == 0, made.stderr
    built = json.loads(made.stdout)["built"]
    assert [one["seconds"] for one in built] == [0.0] * len(built)
    before = Manifest.read(resumed.bundle).artefacts
    artefacts = Manifest.read(out).artefacts
    assert {a.kind for a in artefacts.values()} == KINDS - {"add_qkv"}
    assert artefacts.keys() <= before.keys()

    environment = barren(tmp_path / "barren")
    generate = ("generate", "--bundle", str(out), *ASKED)
    compiled = run_command(*generate, environment=environment, timeout_s=150)
    assert compiled.returncode == 0, compiled.stderr
    lines = compiled.stderr.splitlines()
    assert lines[0].startswith("shardline: compiled (inductor), float32, 4 ranks")
    nothing = [f"shardline: rank {rank} compiled: nothing" for rank in range(4)]
    assert sorted(lines[1:]) == nothing
    assert left_in(tmp_path / "barren") == []
    uncompiled = CliRunner().invoke(
        app, ["generate", "--device", "cpu", "--model", str(model), "--dtype", "float32", *ASKED]
    )
    assert compiled.stdout == uncompiled.stdout
    assert compiled.stdout
