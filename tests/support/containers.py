"""Containers of the images under test, run as the contract says: no network, nothing writable but
/tmp and /cache, no capabilities, any uid.
"""

import json
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

CONTRACT = (
    *("--network", "none", "--read-only", "--tmpfs", "/tmp:rw,exec,size=1g"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--user", "12345:0", "--shm-size", "1g"),
)


def without(option: str, *, of: Sequence[str] = CONTRACT) -> list[str]:
    """The contract without one of its options and that option's value."""
    at = list(of).index(option)
    return [*of[:at], *of[at + 2 :]]


def docker(
    *arguments: str, timeout_s: float = 300, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """One command of the client; its output is text."""
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def run_image(
    image: str,
    *command: str,
    mounts: Sequence[str] = (),
    options: Sequence[str] = CONTRACT,
    timeout_s: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a command of an image to its end; the exit code is the container's.

    Args:
        mounts: as `--volume` takes them.
    """
    volumes = [word for mount in mounts for word in ("--volume", mount)]
    given = ["run", "--rm", *options, *volumes, image, *command]
    return docker(*given, timeout_s=timeout_s, check=False)


def compile_in(image: str, model: Path, out: Path, backend: str, *options: str) -> Path:
    """The bundle that an image makes of a model in a folder; without a network.

    Args:
        out: what /out is in the container.
        options: of `compile`; last.
    """
    writable(out)
    done = run_image(
        *(image, "compile", "--model", "/models/" + model.name, "--output", f"/out/{backend}"),
        *(
            "--device",
            "cpu",
            "--set",
            f"compile.backend={backend}",
            "--set",
            "compile.buckets=[16]",
        ),
        *("--set", "scheduler.max_num_batched_tokens=16", "--set", "scheduler.max_num_seqs=8"),
        *options,
        mounts=[f"{model.parent}:/models:ro", f"{out}:/out"],
        timeout_s=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / backend


@dataclass(frozen=True)
class Served:
    """A container that serves, and the socket by which it is reached from outside."""

    name: str
    socket: Path

    @classmethod
    @contextmanager
    def start(
        cls,
        image: str,
        folder: Path,
        *command: str,
        mounts: Sequence[str] = (),
        options: Sequence[str] = CONTRACT,
        wait: bool = True,
    ) -> Iterator["Served"]:
        """Ready when the body runs; gone after it.

        Args:
            folder: for the socket; short, since a socket's path is.
            wait: until it is ready.
        """
        name = f"shardline-test-{uuid.uuid4().hex[:8]}"
        folder.mkdir(exist_ok=True)
        folder.chmod(0o770)  # of root's group, which is the container's, whatever its user is
        volumes = [w for mount in (*mounts, f"{folder}:/sockets") for w in ("--volume", mount)]
        served = cls(name, folder / "s")
        try:
            docker(
                *("run", "--detach", "--name", name, "--health-interval", "2s"),
                *("--health-retries", "1", "--health-timeout", "30s", "--stop-timeout", "60"),
                *options,
                *volumes,
                *(image, "serve", "--uds", "/sockets/s", *command),
            )
            if wait:
                served.wait_until_ready()
            yield served
        finally:
            docker("rm", "--force", "--volumes", name, check=False)

    def client(self, *, timeout_s: float = 60) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.socket))
        return httpx.Client(transport=transport, base_url="http://server", timeout=timeout_s)

    def complete(self, prompt: str, max_tokens: int) -> Any:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        with self.client() as client:
            answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait_until_ready(self, timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.state["Running"], self.logs()
            if self.is_ready():
                return
            time.sleep(0.3)
        raise TimeoutError(self.logs())

    def is_ready(self) -> bool:
        """Whether the server itself says so."""
        try:
            with self.client(timeout_s=5) as client:
                return client.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def wait_for_health(self, status: str, timeout_s: float = 180) -> None:
        """Until Docker itself says so."""
        deadline = time.monotonic() + timeout_s
        while self.health != status:
            assert time.monotonic() < deadline, (self.health, self.logs())
            time.sleep(0.2)

    @property
    def state(self) -> Any:
        return json.loads(docker("inspect", "--format", "{{json .State}}", self.name).stdout)

    @property
    def health(self) -> str:
        return str(self.state["Health"]["Status"])

    def exit_code(self, timeout_s: float = 60) -> int:
        """Of a container that ends."""
        return int(docker("wait", self.name, timeout_s=timeout_s).stdout)

    def logs(self) -> str:
        done = docker("logs", self.name, check=False)
        return done.stdout + done.stderr


def readable(folder: Path) -> None:
    """Let any uid read it; pytest's folders are its own user's."""
    for path in (folder, *folder.parents[:2]):
        path.chmod(path.stat().st_mode | 0o055)
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)


def writable(folder: Path) -> None:
    """Let any uid write into it."""
    readable(folder)
    folder.chmod(0o777)
