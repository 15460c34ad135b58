"""`generate --bundle` on bundles that are not what was compiled: it says which file it is, and runs
nothing.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import build_jobs
import pytest
from bundles import flip, rewrite_manifest
from checkpoints import add_tokenizer, make_checkpoint
from processes import processes_naming, run_command
from rank_pool import RankPool
from typer.testing import CliRunner

from parallel.errors import ShardlineError
from runner.cli.app import app
from runner.compiler.eager import EagerBackend

pytestmark = pytest.mark.dist

SETTINGS: dict[str, Any] = {
    "compile.backend": "eager",
    "compile.buckets": [8],
    "scheduler.max_num_seqs": 2,
    "scheduler.max_num_batched_tokens": 8,
    "compile.parity.num_tokens": 16,
}
CODE = "code.bin"
ASKED = ("--prompt", "One two", "--max-tokens", "6", "--json")
WEIGHTS = "weights/rank0.safetensors"


def _write_code(self: EagerBackend, segment: Any, program: Any, folder: Path) -> None:
    del self, segment, program
    (folder / CODE).write_bytes(b"code" * 100)


def _with_files(patch: pytest.MonkeyPatch, rank: int) -> None:
    """An artefact of eager has no files; here it gets one, to be spoilt."""
    del rank
    patch.setattr(EagerBackend, "build", _write_code)


@pytest.fixture(scope="module")
def built(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Bundles of one model for one rank and for two."""
    folder = tmp_path_factory.mktemp("damage")
    model = make_checkpoint("llama", folder / "model", vocab_size=259, eos_token_id=None)
    add_tokenizer(model)
    bundles = {size: folder / f"tp{size}" for size in (1, 2)}
    for size, out in bundles.items():
        rank_pool.run(build_jobs.build, [size], str(model), out, SETTINGS, _with_files)
    return bundles


@pytest.fixture
def bundle(built: dict[int, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built[1], tmp_path / "bundle"))


def artefact_of(bundle: Path) -> str:
    """A file of the first artefact, by its name in the manifest."""
    first = min(path for path in (bundle / "artefacts").iterdir())
    return f"artefacts/{first.name}/{CODE}"


def refused(bundle: Path, *more: str) -> ShardlineError:
    """How `generate` ends, in this process, which is the only rank."""
    done = CliRunner().invoke(app, ["generate", "--bundle", str(bundle), *ASKED, *more])
    assert isinstance(done.exception, ShardlineError), done.exception
    assert done.stdout == ""
    assert "\n" not in str(done.exception)
    return done.exception


def test_a_whole_bundle_runs(bundle: Path) -> None:
    done = CliRunner().invoke(app, ["generate", "--bundle", str(bundle), *ASKED])
    assert done.exception is None, done.exception
    assert done.stdout.count("\n") == 1


def _flip(name: str, offset: int) -> Callable[[Path], str]:
    def spoil(bundle: Path) -> str:
        file = name or artefact_of(bundle)
        flip(bundle / file, offset)
        return file

    return spoil


def _remove(name: str) -> Callable[[Path], str]:
    def spoil(bundle: Path) -> str:
        file = name or artefact_of(bundle)
        (bundle / file).unlink()
        return file

    return spoil


def _truncate(name: str) -> Callable[[Path], str]:
    def spoil(bundle: Path) -> str:
        file = name or artefact_of(bundle)
        data = (bundle / file).read_bytes()
        (bundle / file).write_bytes(data[: len(data) // 2])
        return file

    return spoil


def _edit_manifest(bundle: Path) -> str:
    file = bundle / "manifest.json"
    file.write_text(file.read_text().replace('"eager"', '"eagre"', 1))
    return "manifest.json"


def _add_a_file(bundle: Path) -> str:
    (bundle / "model" / "chat_template.jinja").write_text("{{ messages }}")
    return "model/chat_template.jinja"


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(_flip(WEIGHTS, -5), id="flipped weights"),
        pytest.param(_flip("", 7), id="flipped artefact"),
        pytest.param(_flip("model/tokenizer.json", 300), id="flipped tokenizer"),
        pytest.param(_flip("manifest.json", 1000), id="flipped manifest"),
        pytest.param(_remove(WEIGHTS), id="no weights"),
        pytest.param(_remove(""), id="no artefact"),
        pytest.param(_remove("model/config.json"), id="no config"),
        pytest.param(_truncate(""), id="truncated artefact"),
        pytest.param(_truncate(WEIGHTS), id="truncated weights"),
        pytest.param(_edit_manifest, id="edited manifest"),
        pytest.param(_add_a_file, id="a file too many"),
    ],
)
def test_a_damaged_file_is_named(spoil: Callable[[Path], str], bundle: Path) -> None:
    name = spoil(bundle)
    error = refused(bundle)
    assert error.exit_code == 4
    assert name in str(error)
    assert f"build it: shardline compile --config PLAN.YAML --output {bundle}" in str(error)


def test_weights_of_another_rank(built: dict[int, Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(built[2], tmp_path / "bundle"))
    zero, one = (bundle / "weights" / f"rank{rank}.safetensors" for rank in (0, 1))
    aside = zero.rename(bundle / "aside")
    one.rename(zero)
    aside.rename(one)
    error = refused(bundle)
    assert error.exit_code == 5
    assert "weights/rank0.safetensors holds the weights of rank 1" in str(error)


def test_damage_that_only_a_rank_finds_ends_all_ranks(
    built: dict[int, Path], tmp_path: Path
) -> None:
    """Each rank reads its own weights, so the launcher has not seen this file."""
    bundle = Path(shutil.copytree(built[2], tmp_path / "bundle"))
    flip(bundle / "weights" / "rank1.safetensors", -5)
    done = run_command("generate", "--bundle", str(bundle), *ASKED)
    assert (done.returncode, done.stdout) == (4, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("shardline: rank 1 (stage 0, tp rank 1): ")
    assert "weights/rank1.safetensors: sha256" in last
    assert processes_naming(str(bundle)) == []


def _of_another_torch(values: dict[str, Any]) -> None:
    values["host"]["versions"]["torch"] = "1.13.1"


def _of_a_gpu(values: dict[str, Any]) -> None:
    values["host"] |= {"device": "cuda", "gpu": "NVIDIA H200", "compute_capability": "9.0"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_of_another_torch, ["torch is 2.", "built for 1.13.1"]),
        (_of_a_gpu, ["device is cpu", "built for cuda"]),
    ],
)
def test_a_bundle_of_another_host(
    change: Callable[[dict[str, Any]], None], words: list[str], bundle: Path
) -> None:
    rewrite_manifest(bundle, change)
    error = refused(bundle)
    assert error.exit_code == 5
    assert "was compiled for another host" in str(error)
    assert [word for word in words if word not in str(error)] == [], error


def test_a_bundle_that_failed_its_check_runs_only_when_that_is_accepted(bundle: Path) -> None:
    def fail(values: dict[str, Any]) -> None:
        values["parity"] |= {"passed": False, "reason": "layers.1 at 8 tokens is wrong"}

    rewrite_manifest(bundle, fail)
    error = refused(bundle)
    assert error.exit_code == 7
    assert "layers.1 at 8 tokens is wrong" in str(error)
    assert "--accept-parity" in str(error)
    done = CliRunner().invoke(app, ["generate", "--bundle", str(bundle), "--accept-parity", *ASKED])
    assert done.exception is None, done.exception
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("more", [(), ("--no-run",)], ids=["failed", "not compared"])
def test_a_compile_that_fails_its_check_ends_with_7_and_one_that_makes_none_does_not(
    more: tuple[str, ...],
    built: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build_jobs.scale("layers.1.mlp.down_proj.weight", 1.1)(monkeypatch, 0)
    out = tmp_path / "out"
    arguments = build_jobs.arguments(built[1].with_name("model"), out, [1], SETTINGS)
    done = CliRunner().invoke(app, [*arguments, *more])
    error = refused(out)
    assert error.exit_code == 7
    if more:
        assert done.exception is None, done.exception
        assert "parity: not compared: compiled with --no-run" in done.stdout
        assert "compiled with --no-run" in str(error)
    else:
        assert getattr(done.exception, "exit_code", None) == 7, done.exception
        assert "parity: FAILED: layers.1 at 8 tokens" in done.stdout
        assert "layers.1 at 8 tokens" in str(error)
