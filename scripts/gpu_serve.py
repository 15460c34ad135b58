"""A server of Llama's 8B shape and its load, on one GPU: a step of `gpu_check`."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from gpu_llama import LLAMA
from gpu_report import ROOT, Check, child_environment

START_S = 120
REQUESTS = {1: 5, 32: 96, 128: 384}
"""How many, by how many at a time."""
LENGTHS = ["--input-len", "128", "--output-len", "128"]
FIGURES = (("ttft", "median"), ("ttft", "p99"), ("tpot", "median"))


class NoServerError(Exception):
    """It has ended, or takes too long to start."""


def serve(check: Check, backends: list[str]) -> None:
    """Each backend's bundle behind a server, asked for random prompts."""
    for backend in backends:
        bundle = check.out / f"llama-8b-{backend}"
        if not bundle.exists():
            continue
        try:
            with served(check, bundle) as (url, seconds):
                check.row(backend, "serve: start to ready, s", seconds)
                for concurrency, count in REQUESTS.items():
                    load(check, backend, url, concurrency, count)
        except NoServerError:
            check.row(backend, "serve: did NOT start, see its log", 1)
        check.save()


def load(check: Check, backend: str, url: str, concurrency: int, count: int) -> None:
    """So many requests, so many at a time."""
    result = check.out / f"serve-{backend}-{concurrency}.json"
    asked = ["--concurrency", str(concurrency), "--requests", str(count), *LENGTHS]
    vocabulary = ["--vocab-size", str(LLAMA["vocab_size"])]
    command = ["bench", "serve", "--url", url, *asked, *vocabulary, "--output", str(result)]
    check.python("-P", "-m", "runner", *command, log=result.stem)
    found = json.loads(result.read_text())["result"] if result.exists() else {}
    if found.get("num_complete") != count:
        check.row(backend, f"serve {concurrency}: FAILED, see its log", 1)
        return
    for figure, statistic in FIGURES:
        what = f"serve {concurrency}: {figure} {statistic}, ms"
        check.row(backend, what, found[f"{figure}_ms"][statistic])
    check.row(backend, f"serve {concurrency}: output tokens/s", found["output_tokens_per_s"])


@contextmanager
def served(check: Check, bundle: Path) -> Iterator[tuple[str, float]]:
    """A server of a bundle: its address, and the seconds until it was ready."""
    log = check.out / f"serve-{bundle.name}.log"
    options = ["--accept-parity", "--set", "server.port=0"]
    command = [sys.executable, "-P", "-m", "runner", "serve", "--bundle", str(bundle), *options]
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, cwd=ROOT, env=child_environment())
    try:
        while not (url := ready_at(log)):
            if process.poll() is not None or time.monotonic() > started + START_S:
                raise NoServerError
            time.sleep(0.1)
        yield url, time.monotonic() - started
    finally:
        process.terminate()
        process.wait()


def ready_at(log: Path) -> str:
    """Where the server listens that writes this log; empty until it is ready."""
    found = re.search(r" at (http://\S+)", log.read_text())
    if found is None:
        return ""
    try:
        with urlopen(f"{found[1]}/health/ready"):
            return found[1]
    except URLError:
        return ""
