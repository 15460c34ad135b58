"""A bundle that is signed, packed in parts, unpacked elsewhere, and run only if it is signed."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import flip, tree
from checkpoints import add_tokenizer
from processes import run_command

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def compiled(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compiled") / "bundle"
    done = run_command(
        *("compile", "--model", str(add_tokenizer(checkpoint("llama"))), "--device", "cpu"),
        *("--output", str(out), "--set", "compile.backend=eager", "--set", "compile.buckets=[8]"),
        *("--set", "scheduler.max_num_batched_tokens=8", "--set", "scheduler.max_num_seqs=2"),
        timeout_s=300,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("keys")
    private, public = str(folder / "private.pem"), str(folder / "public.pem")
    make = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", private]
    subprocess.run(make, check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


def generate(bundle: Path, public: str) -> "subprocess.CompletedProcess[str]":
    given = ["--bundle", str(bundle), "--set", f"security.bundle_key={public}"]
    return run_command("generate", *given, "--prompt", "a", "--max-tokens", "2", timeout_s=200)


def test_from_hand_to_hand(compiled: Path, keys: tuple[str, str], tmp_path: Path) -> None:
    private, public = keys
    unsigned = generate(compiled, public)
    assert unsigned.returncode == 4
    assert "is not signed" in unsigned.stderr

    archive, out = tmp_path / "b.tar", tmp_path / "out"
    given = ["pack", str(compiled), str(archive), "--key", private, "--split-size", "64K"]
    packed = run_command("bundle", *given)
    assert packed.returncode == 0, packed.stderr
    parts = [Path(line) for line in packed.stdout.splitlines()]
    assert len(parts) > 2
    assert parts[-1].name == "b.tar.sha256"

    told = run_command("bundle", "verify", str(archive), "--json")
    assert json.loads(told.stdout)["whole"] is True
    done = run_command("bundle", "unpack", str(archive), str(out), "--public-key", public)
    assert done.returncode == 0, done.stderr
    assert tree(out) == tree(compiled)
    assert run_command("bundle", "verify", str(out), "--public-key", public).returncode == 0
    signed = generate(out, public)
    assert signed.returncode == 0, signed.stderr

    flip(parts[0], 3000)
    changed = run_command("bundle", "verify", str(archive))
    assert changed.returncode == 4
    assert f"{parts[0]} was changed" in changed.stderr
    flip(out / "weights" / "rank0.safetensors", -1)
    assert run_command("bundle", "verify", str(out)).returncode == 4
    flip(out / "manifest.json.sig", 3)
    refused = generate(out, public)
    assert refused.returncode == 4
    assert "is no signature of manifest.json" in refused.stderr


@pytest.mark.parametrize("size", ["0", "4X", "-1"])
def test_sizes_that_are_none(compiled: Path, tmp_path: Path, size: str) -> None:
    given = ["pack", str(compiled), str(tmp_path / "b.tar"), "--split-size", size]
    done = run_command("bundle", *given)
    assert done.returncode == 2
    assert f"--split-size {size} is no size" in done.stderr
