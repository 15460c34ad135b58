"""The kit on a clean machine: an engine of its own that has no images, in a namespace of its own
that has no network.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from bundles import flip
from processes import ROOT

SCRIPT = ROOT / "scripts" / "airgap-kit"
pytestmark = pytest.mark.full


@pytest.fixture
def there() -> Iterator[Path]:
    """A folder of the clean machine; its path is short, since a socket's is."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def machine(there: Path) -> Iterator[dict[str, str]]:
    """The environment in which `docker` and everything else runs there."""
    socket = there / "docker.sock"
    command = [
        *("unshare", "--net", "--fork", "--kill-child", "sh", "-c"),
        f"ip link set lo up 2> /dev/null; exec dockerd --host unix://{socket} --bridge none "
        f"--iptables=false --ip6tables=false --data-root {there}/data --exec-root {there}/exec "
        f"--pidfile {there}/pid",
    ]
    log = (there / "log").open("w")
    daemon = subprocess.Popen(command, stdout=log, stderr=log)
    environment = {**os.environ, "DOCKER_HOST": f"unix://{socket}"}
    try:
        deadline = time.monotonic() + 120
        while subprocess.run(["docker", "info"], env=environment, capture_output=True).returncode:
            assert daemon.poll() is None, (there / "log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield environment
    finally:
        if (there / "pid").exists():
            subprocess.run(["kill", (there / "pid").read_text().strip()], check=False)
        try:
            daemon.wait(60)
        finally:
            daemon.kill()
            log.close()


def run(command: list[str | Path], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Where no network is, as the engine is."""
    return subprocess.run(
        ["unshare", "--net", *command], env=environment, capture_output=True, text=True, check=False
    )


def generate(socket: Path) -> int:
    """Ask a server that it put up for five tokens; how many came."""
    transport = httpx.HTTPTransport(uds=str(socket))
    with httpx.Client(transport=transport, base_url="http://kit", timeout=60) as client:
        answer = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5})
    count: int = answer.json()["usage"]["completion_tokens"]
    return count


@pytest.fixture(scope="module")
def kit(
    runtime: str,
    builder: str,
    bundle: Path,
    tiny: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("kits") / "kit"
    given = ["--bundle", bundle, "--model", tiny, "--runtime", runtime, "--builder", builder]
    subprocess.run([SCRIPT, "build", out, *given, "--split-size", "400M"], check=True, timeout=500)
    return out


def test_a_flipped_byte_in_any_file_is_found_and_named(kit: Path, tmp_path: Path) -> None:
    copy = tmp_path / "kit"
    shutil.copytree(kit, copy, copy_function=lambda a, b: Path(b).hardlink_to(a))
    # The images are the largest by far; one byte of them and one of every other file.
    # The list itself is a test of `airgap-kit` without an engine.
    spoilt = [p for p in sorted(copy.rglob("*")) if p.is_file() and p.name != "SHA256SUMS"]
    for path in spoilt:
        data = path.read_bytes() if path.name != "images.tar" else None
        if data is None:
            shutil.copyfile(path, path.with_suffix(".copy"))
            path.with_suffix(".copy").replace(path)
            with path.open("r+b") as file:
                file.seek(12345)
                byte = file.read(1)
                file.seek(12345)
                file.write(bytes([byte[0] ^ 1]))
        else:
            path.unlink()
            path.write_bytes(data)
            if data:
                flip(path, len(data) // 2)
            else:
                path.write_bytes(b"x")
    done = subprocess.run([SCRIPT, "verify", copy], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    named = {line.split(": ")[1] for line in done.stderr.splitlines() if "was changed" in line}
    assert named == {f"./{path.relative_to(copy)}" for path in spoilt}


def test_a_clean_machine_serves_after_two_commands(
    kit: Path, there: Path, machine: dict[str, str]
) -> None:
    """Carried in parts, joined, verified; then load and up."""
    assert run(["docker", "images", "-q"], machine).stdout == ""
    carry, parts = kit.parent / "carry", kit.parent / "kit.tar.sha256"
    joined = run(["sh", "-c", f"cd {there} && {carry} join {parts}"], machine)
    assert joined.returncode == 0, joined.stderr

    loaded = run([there / "kit" / "airgap-kit", "load"], machine)
    assert loaded.returncode == 0, loaded.stderr
    machine["SOCKETS"] = str(there / "sockets")
    up = run([there / "kit" / "airgap-kit", "up"], machine)
    assert up.returncode == 0, up.stdout + up.stderr

    socket = there / "sockets" / "shardline.sock"
    assert generate(socket) == 5
    inspect = ["docker", "inspect", "--format", "{{json .HostConfig.NetworkMode}}"]
    assert json.loads(run([*inspect, "shardline"], machine).stdout) == "none"
    run(["docker", "rm", "--force", "--volumes", "shardline"], machine)

    other = there / "other"
    command = ["compile", other, "--model", "/models/tiny", "-pp", "2", "--device", "cpu"]
    settings = ("compile.backend=inductor", "compile.buckets=[16]")
    settings += ("scheduler.max_num_batched_tokens=16", "scheduler.max_num_seqs=8")
    command += [word for setting in settings for word in ("--set", setting)]
    made = run([there / "kit" / "airgap-kit", *command], machine)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "inductor" in (other / "manifest.json").read_text()
    machine |= {"BUNDLE": str(other), "NAME": "other"}
    up = run([there / "kit" / "airgap-kit", "up"], machine)
    assert up.returncode == 0, up.stdout + up.stderr
    assert generate(socket) == 5
    run(["docker", "rm", "--force", "--volumes", "other"], machine)


def test_a_clean_machine_builds_the_image_of_a_wheelhouse(
    wheelhouse: Path, machine: dict[str, str]
) -> None:
    loaded = run(["docker", "load", "--input", wheelhouse / "base.tar"], machine)
    assert loaded.returncode == 0, loaded.stderr
    given = ["--network", "none", "--target", "runtime", "--tag", "shardline:runtime"]
    file = wheelhouse / "docker" / "Dockerfile"
    built = run(["docker", "build", *given, "-f", file, wheelhouse], machine)
    assert built.returncode == 0, built.stdout + built.stderr
    isolated = ["--network", "none", "--read-only", "--tmpfs", "/tmp:exec"]
    told = run(["docker", "run", *isolated, "shardline:runtime", "--version"], machine)
    assert told.returncode == 0, told.stderr


def test_the_kit_has_what_it_says(kit: Path) -> None:
    have = {path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file()}
    assert {"images.tar", "sbom.cdx.json", "system-packages.tsv", "docs/README.md"} <= have
    assert {"docker/compose.yaml", "docker/shardline.service", "bundle/manifest.json"} <= have
    assert "models/tiny/config.json" in have
    assert "libc6\t" in (kit / "system-packages.tsv").read_text()
    parts = sorted(kit.parent.glob("kit.tar.[0-9]*"))
    assert all(part.stat().st_size <= 400 << 20 for part in parts)
