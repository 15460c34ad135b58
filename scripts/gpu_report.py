"""What `gpu_check` finds: rows of figures, held against their bars and written as they come."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]

GRACE_S = 20
"""What an interrupted process has to tell how far it came."""


@dataclass(frozen=True)
class Bar:
    """What a figure is held against: at least `least`, or at most `most`."""

    least: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        return value >= (self.least or 0) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        return f">= {self.least}" if self.least is not None else f"<= {self.most}"


BARS = {
    ("auto", "decode 1, share of the floor"): Bar(least=0.75),
    ("auto", "decode 32, times the floor"): Bar(most=1.6),
    ("auto", "decode 128, times the floor"): Bar(most=2.1),
    ("auto", "prefill 8 x 2048, share of the matmul rate"): Bar(least=0.75),
    ("tensorrt", "decode 1, share of the floor"): Bar(least=0.6),
    ("tensorrt", "prefill 8 x 2048, share of the matmul rate"): Bar(least=0.7),
    ("auto", "start to first token, s"): Bar(most=15),
    ("tensorrt", "start to first token, s"): Bar(most=15),
    ("auto", "compile, s"): Bar(most=120),
    ("tensorrt", "compile, s"): Bar(most=120),
    ("tensorrt", "compile of a 70B rank, s"): Bar(most=180),
    ("auto-tp2-pp1", "decode 1, share of the floor with all-reduces"): Bar(least=0.7),
    ("auto-tp2-pp1", "70B, decode 1, share of the floor with all-reduces"): Bar(least=0.75),
    ("ResNet-50 fp16, auto", "samples/s of 2 stages over 1"): Bar(least=1.8),
    ("3-D ResNet-152 bf16, auto", "samples/s of 2 stages over 1"): Bar(least=1.8),
}


class Check:
    """Runs steps and keeps what they found, on disk after each."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.found: dict[str, Any] = {}
        self.rows: list[tuple[str, str, float]] = []

    def row(self, subject: str, what: str, value: float) -> None:
        self.rows.append((subject, what, value))
        print(f"  {subject}: {what}: {value:.4g}", flush=True)

    def python(
        self, *arguments: str, log: str, timeout_s: float = 600, num_ranks: int = 1
    ) -> tuple[int, float]:
        """Run Python to its end, both outputs into a file; its exit code and seconds.

        At its time limit it is interrupted as by Ctrl-C, upon which pytest tells what has failed.
        """
        environment = child_environment()
        if num_ranks > 1:
            # As our launcher does; torchrun would give each rank one.
            threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            arguments = (*torchrun, "--nproc-per-node", str(num_ranks), *arguments)
        started = time.monotonic()
        with (self.out / f"{log}.log").open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
            )
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = 124
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        return code, time.monotonic() - started

    def save(self) -> None:
        rows = [
            {"subject": s, "what": w, "value": v, "bar": str(BARS[s, w]) if (s, w) in BARS else ""}
            for s, w, v in self.rows
        ]
        content = {"environment": environment(), "rows": rows, **self.found}
        (self.out / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n")

    def table(self) -> str:
        lines = []
        for subject, what, value in self.rows:
            bar = BARS.get((subject, what))
            told = "" if bar is None else f"{bar}: {'met' if bar.holds(value) else 'MISSED'}"
            lines.append(f"{subject:16} {what:46} {value:10.4g}  {told}".rstrip())
        return "\n".join(lines)


def child_environment() -> dict[str, str]:
    """Of a process that imports what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}


def environment() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
        "commit": commit.stdout.strip(),
    }
