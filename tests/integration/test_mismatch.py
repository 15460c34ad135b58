"""`--on-mismatch`: a bundle that was compiled for another host, on this one."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
from bundles import flip, rewrite_manifest
from checkpoints import add_tokenizer, load_reference, make_checkpoint, reference_greedy
from processes import run_command
from typer.testing import CliRunner, Result

from parallel.errors import IncompatibleError, PreflightError
from parallel.launch import RankEnv
from runner.build.compile import Destination, compile_on_rank
from runner.cli.app import app
from runner.compiler.counter import compilations
from runner.text.tokenizer import Tokenizer

PROMPT, NUM_TOKENS = "One two", 12
SETTINGS = {
    "scheduler.max_num_batched_tokens": 4,
    "scheduler.max_num_seqs": 2,
    "compile.buckets": [4],
    "compile.backend": "eager",
}


@dataclass(frozen=True)
class Made:
    """A bundle that has eager's artefacts and was not compared, and what its model says."""

    bundle: Path
    token_ids: list[int]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("mismatch")
    model = make_checkpoint("llama", folder / "model", vocab_size=259, num_hidden_layers=1)
    add_tokenizer(model)
    job = rank_jobs.prepare(str(model), [1], SETTINGS)
    compile_on_rank(job, RankEnv(0, 1), Destination(folder / "bundle", no_run=True))
    prompt_ids = Tokenizer.load(model).encode(PROMPT)
    token_ids = reference_greedy(load_reference(model), prompt_ids, NUM_TOKENS)
    return Made(folder / "bundle", token_ids)


@pytest.fixture
def altered(made: Made, tmp_path: Path) -> Callable[[Any], Path]:
    """Makes a copy of the bundle whose manifest was changed by a function."""

    def alter(change: Any) -> Path:
        bundle = Path(shutil.copytree(made.bundle, tmp_path / "bundle"))
        rewrite_manifest(bundle, change)
        return bundle

    return alter


def older_torch(manifest: dict[str, Any]) -> None:
    manifest["host"]["versions"]["torch"] = "2.12.0"


def other_processor(backend: str) -> Callable[[dict[str, Any]], None]:
    """The artefacts become those of a backend that compiles for one kind of processor."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["host"] |= {"cpu": "x86_64 AVX1024", "cpu_features": ["avx1024_f"]}
        for artefact in manifest["artefacts"].values():
            artefact["backend"] = backend

    return change


def arguments(bundle: Path, *more: str) -> list[str]:
    asked = ["generate", "--bundle", str(bundle), "--accept-parity", "--prompt", PROMPT]
    return [*asked, "--max-tokens", str(NUM_TOKENS), "--json", *more]


def generate(bundle: Path, *more: str) -> Result:
    return CliRunner().invoke(app, arguments(bundle, *more))


def token_ids(done: Result) -> Any:
    assert done.exception is None, done.exception
    return json.loads(done.stdout)["token_ids"]


def test_a_bundle_that_was_not_run_is_not_run_by_itself(made: Made) -> None:
    done = run_command(*[part for part in arguments(made.bundle) if part != "--accept-parity"])
    assert done.returncode == 7
    assert "not compared: compiled with --no-run; " in done.stderr
    done = generate(made.bundle, "--on-mismatch", "rebuild")
    assert token_ids(done) == made.token_ids
    assert "compiled (eager), float32" in done.stderr


def test_a_mismatch_fails_unless_told_otherwise(altered: Callable[[Any], Path]) -> None:
    bundle = altered(older_torch)
    done = run_command(*arguments(bundle))
    assert done.returncode == 5
    assert "compiled for another host: torch is 2." in done.stderr
    assert isinstance(generate(bundle, "--on-mismatch", "fail").exception, IncompatibleError)


@pytest.mark.parametrize(
    ("on_mismatch", "said"),
    [
        ("eager", "eager (the bundle was compiled for another host), float32, 1 rank"),
        ("rebuild", "compiling anew, the bundle is for another host (eager), float32, 1 rank"),
    ],
)
def test_what_runs_instead_says_the_same(
    on_mismatch: str, said: str, made: Made, altered: Callable[[Any], Path]
) -> None:
    done = generate(altered(older_torch), "--on-mismatch", on_mismatch)
    assert token_ids(done) == made.token_ids
    assert said in done.stderr


def test_eager_reads_no_artefact_and_compiles_nothing(
    made: Made, altered: Callable[[Any], Path]
) -> None:
    before = compilations()
    done = generate(altered(other_processor("inductor")), "--on-mismatch", "eager")
    assert token_ids(done) == made.token_ids
    assert compilations() == before


def test_a_backend_that_is_not_usable_here_is_named(altered: Callable[[Any], Path]) -> None:
    bundle = altered(other_processor("tensorrt"))
    done = generate(bundle, "--on-mismatch", "rebuild")
    assert isinstance(done.exception, PreflightError)
    assert "tensorrt needs a GPU" in str(done.exception)


def test_weights_are_checked_all_the_same(altered: Callable[[Any], Path]) -> None:
    bundle = altered(older_torch)
    flip(bundle / "weights" / "rank0.safetensors", -1)
    for on_mismatch in ("eager", "rebuild"):
        done = run_command(*arguments(bundle, "--on-mismatch", on_mismatch))
        assert done.returncode == 4, done.stderr


@pytest.mark.full
@pytest.mark.timeout(300)
def test_inductor_compiles_each_segment_once_more(
    made: Made, altered: Callable[[Any], Path]
) -> None:
    bundle = altered(other_processor("inductor"))
    before = compilations().get("inductor", 0)
    done = generate(bundle, "--on-mismatch", "rebuild")
    assert token_ids(done) == made.token_ids
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert compilations()["inductor"] - before >= len(manifest["artefacts"])
    assert "compiling anew, the bundle is for another host (inductor)" in done.stderr
