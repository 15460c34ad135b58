"""`shardline compile` and `generate --bundle` as a user runs them: what is built, and what of it
runs where there is no compiler.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import build_jobs
import pytest
from barren import barren, left_in
from checkpoints import add_tokenizer, make_checkpoint
from processes import processes_naming, run_command
from rank_pool import RankPool
from typer.testing import CliRunner

from runner.build.compile import Outcome
from runner.bundle.manifest import Manifest
from runner.cli.app import app
from runner.compiler.counter import counted

pytestmark = pytest.mark.timeout(180)

BUCKETS = [2, 8, 16]
SETTINGS: dict[str, Any] = {
    "compile.backend": "eager",
    "compile.buckets": BUCKETS,
    "scheduler.max_num_seqs": 3,
    "scheduler.max_num_batched_tokens": BUCKETS[-1],
    "compile.parity.num_tokens": 32,
}
PROMPTS = ("One two three, and four more", "é🙂")
ASKED = ("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--max-tokens", "12", "--json")

# For each bucket of 2, 8, 16 and, as no step has more than three samples, the head for 2 and 8.
WHOLE_LAYERS = {"qkv": 3, "block": 3, "last_block": 3, "head": 2}


def make_model(folder: Path, num_layers: int) -> Path:
    """A small model that never ends by itself."""
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    make_checkpoint(
        "llama",
        folder,
        vocab_size=259,
        num_hidden_layers=num_layers,
        rope_parameters=plain,
        eos_token_id=None,
    )
    return add_tokenizer(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("compiled") / "model", num_layers=4)


@pytest.fixture(scope="module")
def uncompiled(model: Path) -> list[dict[str, Any]]:
    """What `generate --model` prints."""
    done = CliRunner().invoke(
        app, ["generate", "--device", "cpu", "--model", str(model), "--dtype", "float32", *ASKED]
    )
    assert done.exception is None, done.exception
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_bundle_runs_elsewhere_in_a_process_that_can_compile_nothing(
    model: Path, uncompiled: list[dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = run_command(*build_jobs.arguments(model, out, [1], SETTINGS))
    assert made.returncode == 0, made.stderr
    table, totals = made.stdout.split("\n\n")
    rows = [line.split()[:3] for line in table.splitlines()[1:]]
    assert rows == sorted(rows, key=lambda row: (row[0], int(row[1])))
    assert [row[0] for row in rows] == sorted(k for k, n in WHOLE_LAYERS.items() for _ in range(n))
    assert {row[2] for row in rows} == {"eager"}
    assert totals.splitlines()[0].startswith("11 artefacts, 11 built in ")
    assert totals.splitlines()[1].startswith("parity: passed; smallest cosine ")
    assert totals.splitlines()[2] == str(out)

    moved = out.rename(tmp_path / "moved")
    environment = barren(tmp_path / "barren")
    done = run_command("generate", "--bundle", str(moved), *ASKED, environment=environment)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == uncompiled
    assert done.stderr.splitlines() == [
        "shardline: compiled (eager), float32, 1 rank, tensor-parallel sizes [1]",
        "shardline: rank 0 compiled: nothing",
    ]
    assert left_in(tmp_path / "barren") == []
    assert str(model) not in (moved / "manifest.json").read_text()


def test_a_rank_that_has_compiled_says_what(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with counted("planted"):
        pass
    with caplog.at_level(logging.DEBUG, "runner.engine.rank"):
        done = CliRunner().invoke(
            app, ["generate", "--device", "cpu", "--model", str(model), *ASKED]
        )
    assert done.exception is None, done.exception
    (told,) = (record.getMessage() for record in caplog.records if "compiled" in record.msg)
    assert told.startswith("rank 0 compiled: {")
    assert "'planted': 1" in told


def by_kind(outcome: Outcome) -> dict[str, int]:
    """Distinct artefacts of each kind."""
    keys: dict[str, set[str]] = {}
    for built in outcome.built:
        keys.setdefault(built.kind, set()).add(built.key)
    return {kind: len(found) for kind, found in keys.items()}


@pytest.mark.dist
def test_32_layers_are_few_segments_and_another_cut_reuses_them_all(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", num_layers=32)
    one = build_jobs.build_here(model, tmp_path / "one", SETTINGS)
    assert by_kind(one) == WHOLE_LAYERS
    assert all(built.seconds > 0 for built in one.built)
    layers = {unit.name for unit in one.parity.units} - {"embedding", "head"}
    assert layers == {f"layers.{index}" for index in range(32)}

    options = {"reuse_from": (tmp_path / "one",)}
    job = (build_jobs.build, [1, 1], str(model), tmp_path / "two", SETTINGS, None, options)
    two = rank_pool.run(*job)[0]
    assert two.parity.passed, two.parity
    assert [built.seconds for built in two.built] == [0.0] * len(two.built)
    manifests = [Manifest.read(tmp_path / name) for name in ("one", "two")]
    assert manifests[0].artefacts.keys() == manifests[1].artefacts.keys()
    assert len(manifests[1].plan["ranks"]) == 2


def compiling(*more: str, **settings: Any) -> Callable[[Path, Path], list[str]]:
    """Arguments of a compile on two ranks."""

    def make(model: Path, out: Path) -> list[str]:
        return [*build_jobs.arguments(model, out, [2], SETTINGS | settings), *more]

    return make


def _reusing_nothing(model: Path, out: Path) -> list[str]:
    nowhere = str(out.with_name("nowhere"))
    return [*build_jobs.arguments(model, out, [1], SETTINGS), "--reuse-from", nowhere]


def _in_a_taken_place(model: Path, out: Path) -> list[str]:
    out.mkdir()
    (out / "a file").touch()
    return compiling()(model, out)


BUCKETS_TOO_SMALL = compiling(**{"compile.buckets": [2, 8]})
UNKNOWN_BACKEND = compiling(**{"compile.backend": "tensort"})
TENSORRT_ON_A_CPU = compiling(**{"compile.backend": "tensorrt"})


@pytest.mark.parametrize(
    ("make", "exit_code", "words"),
    [
        (_in_a_taken_place, 2, ["out", "--overwrite"]),
        (BUCKETS_TOO_SMALL, 2, ["compile.buckets", "8", "max_num_batched_tokens=16"]),
        (UNKNOWN_BACKEND, 2, ["compile.backend", "tensort", "tensorrt, inductor, eager or auto"]),
        (TENSORRT_ON_A_CPU, 3, ["tensorrt", "compile.backend=inductor or eager", "--target"]),
        (_reusing_nothing, 2, ["--reuse-from", "nowhere", "no bundle is there"]),
    ],
    ids=["taken", "buckets", "backend", "tensorrt", "reuse"],
)
def test_a_mistake_is_found_before_any_rank_starts(
    make: Callable[[Path, Path], list[str]],
    exit_code: int,
    words: list[str],
    model: Path,
    tmp_path: Path,
) -> None:
    done = run_command(*make(model, tmp_path / "out"))
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert [word for word in words if word not in done.stderr] == [], done.stderr
    assert "rank" not in done.stderr
    assert not (tmp_path / "out.partial").exists()


def test_inductor_without_a_compiler(model: Path, tmp_path: Path) -> None:
    arguments = compiling(**{"compile.backend": "inductor"})(model, tmp_path / "out")
    environment = barren(tmp_path / "barren")
    del environment["CXX"], environment["SHARDLINE_DEBUG"]
    done = run_command(*arguments, environment=environment)
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert line.startswith("shardline: backend inductor needs a C++ compiler, g++ is not on PATH;")
    assert "compile.backend: eager" in line
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("more", "exit_code", "words"),
    [
        (("--model", "/models/a"), 2, ["--model", "--bundle", "compile again"]),
        (("--dtype", "float16"), 2, ["--dtype", "--bundle"]),
        (("--set", "model.dtype=float16"), 2, ["--set model.dtype", "scheduler.max_num_seqs"]),
        (("--set", "scheduler.max_num_seqs=4"), 2, ["max_num_seqs=4", "exceeds the 3"]),
        ((), 4, ["is no bundle", "shardline compile"]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and value else "",
)
def test_what_does_not_go_with_a_bundle(
    more: tuple[str, ...], exit_code: int, words: list[str], model: Path, tmp_path: Path
) -> None:
    bundle = model if not more else tmp_path / "out"
    if more[:1] == ("--set",):
        build_jobs.build_here(model, bundle, SETTINGS)
    done = CliRunner().invoke(app, ["generate", "--bundle", str(bundle), *ASKED, *more])
    assert getattr(done.exception, "exit_code", None) == exit_code, done.exception
    assert [word for word in words if word not in str(done.exception)] == [], done.exception


@pytest.mark.parametrize("option", [["--accept-parity"], ["--on-mismatch", "eager"]])
def test_what_is_about_a_bundle_needs_one(option: list[str], model: Path) -> None:
    done = CliRunner().invoke(app, ["generate", "--model", str(model), *ASKED, *option])
    assert getattr(done.exception, "exit_code", None) == 2
    assert "give --bundle DIR" in str(done.exception)


def test_steps_of_more_sequences_than_run_at_once_are_compared_all_the_same(
    model: Path, tmp_path: Path
) -> None:
    """16 tokens of a model of length 4 are four prompts, and the head is made for three."""
    settings = SETTINGS | {"model.max_model_len": 4, "compile.parity.num_tokens": 4}
    outcome = build_jobs.build_here(model, tmp_path / "out", settings)
    assert outcome.parity.passed, outcome.parity.reason


def test_the_bundle_is_not_touched_by_a_compile_that_may_not_replace_it(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    build_jobs.build_here(model, out, SETTINGS)
    before = out.stat().st_ino
    arguments = build_jobs.arguments(model, out, [1], SETTINGS)
    done = CliRunner().invoke(app, arguments)
    assert getattr(done.exception, "exit_code", None) == 2
    assert out.stat().st_ino == before
    done = CliRunner().invoke(app, [*arguments, "--overwrite", "--json"])
    assert done.exception is None, done.exception
    told = json.loads(done.stdout)
    assert out.stat().st_ino != before
    assert {built["key"] for built in told["built"]} == set(Manifest.read(out).artefacts)
    assert told["parity"]["passed"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert processes_naming(str(out)) == []
