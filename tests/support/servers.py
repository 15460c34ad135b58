"""A server of the command, started as a user does, and clients of it."""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import httpx
from openai import OpenAI
from processes import start_command

_START_S = 600


@dataclass
class Server:
    """A running `shardline serve`.

    Attributes:
        said: lines of its standard error so far.
    """

    process: "subprocess.Popen[str]"
    said: list[str] = field(default_factory=list)
    url: str = ""

    @classmethod
    @contextmanager
    def start(cls, model: Path, *options: str) -> Iterator["Server"]:
        """Ready when the body runs, otherwise as `launch`."""
        with cls.launch(model, *options) as server:
            server.wait_until_ready()
            yield server

    @classmethod
    @contextmanager
    def launch(cls, model: Path, *options: str) -> Iterator["Server"]:
        """Not ready yet when the body runs; gone after it.

        Args:
            model: its folder, or a configuration.
        """
        source = "--config" if model.suffix == ".yaml" else "--model"
        given = [source, str(model), "--device", "cpu", "--port", "0", *options]
        process = start_command("serve", *given)
        server = cls(process)
        Thread(target=server._listen, daemon=True).start()
        try:
            yield server
        finally:
            process.kill()
            process.wait()

    def client(self, *, key: str = "none", timeout_s: float = 60) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=timeout_s)

    def metric(self, name: str) -> float:
        """The value of a metric; its labels, if it has any, are part of the name."""
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf"^shardline_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, text
        return float(found[1])

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)

    def startup(self) -> httpx.Response:
        """How far the start is."""
        return httpx.get(f"{self.url}/health/startup")

    def wait_until_listening(self) -> None:
        self._wait_until(self._listens)

    def wait_until_ready(self) -> None:
        self._wait_until(lambda: self._listens() and self.startup().status_code == 200)

    def _listens(self) -> bool:
        if found := re.search(r" at (http://\S+)", "".join(self.said)):
            self.url = found[1]
        return bool(self.url)

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_S
        while not holds():
            assert self.process.poll() is None, "".join(self.said)
            if time.monotonic() > deadline:
                raise TimeoutError("".join(self.said))
            time.sleep(0.1)


def wait_for(condition: Callable[[], bool], *, seconds: float = 20) -> None:
    """Until it holds; that it never does is a failure."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
