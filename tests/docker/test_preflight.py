"""What a container lacks is said when it starts, with the option that mends it."""

import shutil
from pathlib import Path

from bundles import flip
from containers import CONTRACT, readable, run_image, without

SERVE = ("serve", "--model", "/models/tiny", "-pp", "2", "--device", "cpu", "--uds", "/tmp/s")


def refused(runtime: str, *command: str, mounts: list[str], options: list[str]) -> str:
    done = run_image(runtime, *command, mounts=mounts, options=options, timeout_s=300)
    assert done.returncode == 3, done.stdout + done.stderr
    return done.stderr


def test_little_shared_memory(runtime: str, tiny: Path) -> None:
    options = [*without("--shm-size"), "--shm-size", "64m"]
    said = refused(runtime, *SERVE, mounts=[f"{tiny.parent}:/models:ro"], options=options)
    assert "preflight error, shm: /dev/shm is 64 MiB" in said
    assert "fix: docker run --shm-size=1g   (compose: shm_size: 1gb)" in said
    assert "rank" not in said.partition("preflight found")[2], "no rank was started"


def test_a_cache_that_cannot_be_written(runtime: str, tiny: Path, tmp_path: Path) -> None:
    readable(tmp_path)
    mounts = [f"{tiny.parent}:/models:ro", f"{tmp_path}:/cache"]
    said = refused(runtime, *SERVE, mounts=mounts, options=list(CONTRACT))
    assert "preflight error, cache: /cache is not writable" in said
    assert "fix: docker run -v shardline-cache:/cache" in said
    assert "chown 12345" in said


def test_no_place_for_temporary_files(runtime: str, tiny: Path) -> None:
    options = without("--tmpfs")
    said = refused(runtime, *SERVE, mounts=[f"{tiny.parent}:/models:ro"], options=options)
    assert "preflight error, temp_dir: /tmp" in said
    assert "fix: docker run --tmpfs /tmp:exec,size=4g" in said


def test_a_flipped_byte_in_a_bundle(runtime: str, bundle: Path, tmp_path: Path) -> None:
    """Exit code 4, as everywhere: nothing about the host is wrong."""
    broken = tmp_path / "bundle"
    shutil.copytree(bundle, broken)
    weights = broken / "weights" / "rank0.safetensors"
    flip(weights, -5)
    readable(tmp_path)
    done = run_image(
        *(runtime, "serve", "--bundle", "/bundle", "--uds", "/tmp/s"),
        mounts=[f"{broken}:/bundle:ro"],
    )
    assert done.returncode == 4, done.stderr
    assert "weights/rank0.safetensors" in done.stderr
    assert "copy the bundle again, or build it: shardline compile" in done.stderr
    # Before there were ranks, which would have said who of them found it.
    assert "rank 0" not in done.stderr
    assert "serving" not in done.stderr


def test_a_missing_gpu(runtime: str, tiny: Path) -> None:
    command = ("serve", "--model", "/models/tiny", "-pp", "2", "--set", "compile.backend=tensorrt")
    mounts = [f"{tiny.parent}:/models:ro"]
    said = refused(runtime, *command, mounts=mounts, options=list(CONTRACT))
    assert "preflight error, gpus: 0 found; 2 demanded by compile.backend: tensorrt" in said
    assert "fix: docker run --gpus all" in said
