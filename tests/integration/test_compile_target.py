"""`shardline compile --target`: the real builder of TensorRT-RTX, for a GPU that is not here."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import flip
from checkpoints import add_tokenizer, load_reference, make_checkpoint, reference_greedy
from processes import processes_naming, run_command, start_command, wait_until_gone
from typer.testing import CliRunner

from parallel.errors import ConfigError, IntegrityError
from runner.bundle.bundle import Bundle
from runner.cli.app import app
from runner.compiler.tensorrt_io import ENGINE_FILE, IO_FILE
from runner.text.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(300)

TARGET = ("--target", "sm89", "--no-run")
SIZES = {
    "scheduler.max_num_batched_tokens": "2",
    "scheduler.max_num_seqs": "1",
    "compile.buckets": "[2]",
}
# The ranks' MLPs have 49 and 48 columns; all other parts of the two are alike.
NUM_SEGMENTS = {"qkv": 1, "o_proj": 1, "add_mlp": 2, "add_qkv": 1, "add": 1, "head": 1}
NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="of a host without a GPU")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target") / "model"
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return add_tokenizer(make_checkpoint("llama", folder, vocab_size=260, **heads))


def arguments(model: Path, *more: str) -> list[str]:
    sizes = [part for key, value in SIZES.items() for part in ("--set", f"{key}={value}")]
    return ["compile", "--model", str(model), "--dtype", "float32", "-tp", "2", *sizes, *more]


def events(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines if line.startswith("{")]


def keys_of(outcome: dict[str, Any]) -> set[str]:
    return {built["key"] for built in outcome["built"]}


@dataclass(frozen=True)
class Compiled:
    """A bundle whose first compile was killed.

    Attributes:
        outcome: what the second compile printed.
        progress: its events.
        num_finished: segments that the first one had finished.
    """

    bundle: Path
    outcome: dict[str, Any]
    progress: list[dict[str, Any]]
    num_finished: int


@pytest.fixture(scope="module")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("bundle")
    asked = arguments(model, *TARGET, "--output", str(folder / "bundle"), "--json")
    with pytest.MonkeyPatch.context() as patch:
        # So that the builder can be told from others by its command line.
        patch.setenv("TMPDIR", str(folder))
        killed = start_command(*asked)
        assert killed.stderr is not None
        lines = []
        while len(events(lines)) < 2 and (line := killed.stderr.readline()):
            lines.append(line)
        assert processes_naming(f"{folder}/shardline-build-")
        killed.kill()
        killed.communicate()
    assert len(events(lines)) == 2, lines
    assert not (folder / "bundle").exists()
    assert wait_until_gone(f"{folder}/shardline-build-", timeout_s=20) == []
    done = run_command(*asked)
    assert done.returncode == 0, done.stderr
    outcome, progress = json.loads(done.stdout), events(done.stderr.splitlines())
    return Compiled(folder / "bundle", outcome, progress, 2)


def test_each_distinct_segment_of_all_ranks_is_one_engine(compiled: Compiled) -> None:
    built = compiled.outcome["built"]
    assert Counter(b["kind"] for b in built) == NUM_SEGMENTS
    assert len(keys_of(compiled.outcome)) == sum(NUM_SEGMENTS.values())
    manifest = Bundle.open(compiled.bundle).manifest
    assert set(manifest.artefacts) == keys_of(compiled.outcome)
    assert manifest.backends == {"tensorrt"}
    assert [set(uses) for uses in manifest.uses] == [set(NUM_SEGMENTS)] * 2
    different = {kind for kind in NUM_SEGMENTS if manifest.uses[0][kind] != manifest.uses[1][kind]}
    assert different == {"add_mlp"}


def test_a_killed_compile_goes_on_with_what_it_had_finished(compiled: Compiled) -> None:
    total = sum(NUM_SEGMENTS.values())
    assert [e["done"] for e in compiled.progress] == list(range(1, total + 1))
    how = Counter(e["how"] for e in compiled.progress)
    # It may have finished one more before the signal reached it.
    assert compiled.num_finished <= how["kept"] < total
    assert how["kept"] + how["tensorrt"] == total
    assert sum(b["seconds"] > 0 for b in compiled.outcome["built"]) == how["tensorrt"]


def test_the_bundle_is_whole_and_says_that_it_was_not_compared(compiled: Compiled) -> None:
    bundle = Bundle.open(compiled.bundle)
    bundle.verify()
    assert bundle.manifest.parity["passed"] is False
    reason = "not compared: built for sm89 without a device"
    assert bundle.manifest.parity["reason"] == reason
    host = bundle.manifest.host
    assert (host.device, host.gpu, host.compute_capability) == ("cuda", None, "8.9")
    assert bundle.manifest.config["parallel"]["device"] == "cuda"
    shown = CliRunner().invoke(app, ["inspect", str(compiled.bundle), "--verify"])
    assert shown.exit_code == 0
    assert "built on any GPU (SM 8.9)" in shown.stdout
    assert reason in shown.stdout


def _halve(engine: Path) -> None:
    data = engine.read_bytes()
    engine.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("spoil", "is_seen_at_once"),
    [
        (lambda engine: flip(engine, 1000), False),
        (lambda engine: flip(engine.with_name(IO_FILE), 20), False),
        (_halve, True),
        (Path.unlink, True),
    ],
    ids=["flipped engine", "flipped description", "truncated engine", "no engine"],
)
def test_a_damaged_engine_is_refused(
    spoil: Callable[[Path], None], is_seen_at_once: bool, compiled: Compiled, tmp_path: Path
) -> None:
    """Engines of the real builder. Sizes are compared when a bundle is opened, hashes when an
    artefact is about to be loaded, which asks for the GPU first.
    """
    path = Path(shutil.copytree(compiled.bundle, tmp_path / "bundle"))
    key = min(Bundle.open(path).manifest.artefacts)
    spoil(path / "artefacts" / key / ENGINE_FILE)
    for asked in (["inspect", str(path), "--verify"], ["generate", "--bundle", str(path)]):
        if asked[0] == "generate" and not is_seen_at_once:
            continue
        more = ["--accept-parity", "--prompt", "One"] if asked[0] == "generate" else []
        done = CliRunner().invoke(app, [*asked, *more])
        assert isinstance(done.exception, IntegrityError), done.exception
        assert f"artefacts/{key}/" in done.stdout + str(done.exception)
    with pytest.raises(IntegrityError, match=f"artefacts/{key}/.*build it: shardline compile"):
        Bundle.open(path).artefact(key)


def test_another_cut_takes_every_engine_over(model: Path, compiled: Compiled) -> None:
    out = compiled.bundle.with_name("pp2")
    more = ("-pp", "2", "--output", str(out), "--reuse-from", str(compiled.bundle), "--json")
    done = CliRunner().invoke(app, arguments(model, *TARGET, *more))
    assert done.exception is None, done.exception
    assert {event["how"] for event in events(done.stderr.splitlines())} == {"kept"}
    assert keys_of(json.loads(done.stdout)) == keys_of(compiled.outcome)
    bundle = Bundle.open(out)
    assert len(bundle.plan.ranks) == 4
    bundle.verify()


def generate(bundle: Path, *more: str) -> Any:
    asked = ("generate", "--bundle", str(bundle), "--prompt", "One two", "--max-tokens", "6")
    return run_command(*asked, "--json", *more)


@NEEDS_NO_GPU
@pytest.mark.parametrize(
    ("more", "exit_code", "message"),
    [
        ((), 7, "not compared: built for sm89 without a device; .* --accept-parity"),
        (("--accept-parity",), 5, "GPU is none, it was built for SM 8.9"),
    ],
)
def test_it_is_not_run_on_a_host_without_such_a_gpu(
    more: tuple[str, ...], exit_code: int, message: str, compiled: Compiled
) -> None:
    done = generate(compiled.bundle, *more)
    assert done.returncode == exit_code
    assert done.stdout == ""
    assert re.search(message, done.stderr)


@NEEDS_NO_GPU
@pytest.mark.dist
def test_its_weights_run_eagerly_on_any_host(model: Path, compiled: Compiled) -> None:
    done = generate(compiled.bundle, "--accept-parity", "--on-mismatch", "eager")
    assert done.returncode == 0, done.stderr
    prompt_ids = Tokenizer.load(model).encode("One two")
    expected = reference_greedy(load_reference(model), prompt_ids, 6)
    assert json.loads(done.stdout)["token_ids"] == expected
    assert "eager (the bundle was compiled for another host)" in done.stderr


@NEEDS_NO_GPU
@pytest.mark.dist
def test_it_cannot_be_rebuilt_without_a_gpu(compiled: Compiled) -> None:
    done = generate(compiled.bundle, "--accept-parity", "--on-mismatch", "rebuild")
    assert done.returncode == 3
    assert "tensorrt needs a GPU, and this rank runs on cpu" in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--target", "sm89"), "--target sm89 .*nothing can be compared; add --no-run"),
        (
            (*TARGET, "--set", "compile.backend=auto"),
            r"--target sm89 needs compile\.backend: tensorrt, and it is auto",
        ),
        ((*TARGET, "--device", "cpu"), r"parallel\.device is cpu; make it cuda or auto"),
        (("--target", "sm90", "--no-run"), "target sm90 is not one of sm75, .*has it"),
    ],
)
def test_a_target_that_cannot_be_had_is_refused_at_once(
    more: tuple[str, ...], message: str, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "bundle"
    done = CliRunner().invoke(app, arguments(model, *more, "--output", str(out)))
    assert isinstance(done.exception, ConfigError)
    assert re.search(message, str(done.exception))
    assert not out.parent.exists()


def test_torchrun_is_not_needed_for_a_target(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = arguments(model, *TARGET, "--output", str(tmp_path / "bundle"))
    done = CliRunner().invoke(app, asked)
    assert isinstance(done.exception, ConfigError)
    assert "torchrun started 2" in str(done.exception)
