"""Build, check and time on the GPUs of this host: see scripts/gpu_check.

Every step runs in processes of its own and writes what it found before the next one starts, so a
step that fails, or is stopped, loses only itself.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parents[1]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_70B_RANK = LLAMA | {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 64128,
}
"""What one of two tensor-parallel ranks holds: half of the heads, of the MLP and of the head."""

SIZES = {
    "llama-8b": ("[1,8,32,128,256,2048,8192]", 8192, 256),
    "llama-70b-rank": ("[1,32,2048]", 2048, 32),
}
"""Buckets, the most tokens of a step, and the most sequences."""

GIB = 2**30
TESTS_S = 500
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

    def python(self, *arguments: str, log: str, timeout_s: float = 600) -> tuple[int, float]:
        """Run Python to its end, both outputs into a file; its exit code and seconds.

        At its time limit it is interrupted as by Ctrl-C, upon which pytest tells what has failed.
        """
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
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


def tests(check: Check) -> None:
    """The tests that need one GPU."""
    report = check.out / "tests.xml"
    options = ["-m", "gpu and not full and not multigpu", "-vv", "--tb=short"]
    options.append(f"--junitxml={report}")
    check.python("-m", "pytest", "tests", *options, log="tests", timeout_s=TESTS_S)
    if not report.exists():
        return
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        case.attrib["name"]
        for case in suite.iter("testcase")
        if any(child.tag in ("failure", "error") for child in case)
    ]
    check.found["tests"] = counts | {"failed": failed}
    good = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    check.row("tests", "passed", good)
    check.row("tests", "failed", counts["failures"] + counts["errors"])


def compile_llama(check: Check, name: str, backend: str, *more: str) -> tuple[Path | None, float]:
    """A bundle with random weights, and how long it took to make."""
    model, bundle = check.out / name, check.out / f"{name}-{backend}"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(LLAMA_70B_RANK if "70b" in name else LLAMA))
    buckets, max_num_tokens, max_num_seqs = SIZES[name]
    settings = {
        "compile.backend": backend,
        "compile.buckets": buckets,
        "scheduler.max_num_batched_tokens": max_num_tokens,
        "scheduler.max_num_seqs": max_num_seqs,
    }
    command = ["compile", "--model", str(model), "--load-format", "dummy", "--output", str(bundle)]
    command.append("--overwrite")
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    code, seconds = check.python(
        "-P", "-m", "runner", *command, *more, log=f"compile-{bundle.name}"
    )
    return (bundle if code == 0 else None), seconds


def llama_8b(check: Check, backends: list[str]) -> None:
    """Compile, start, decode and prefill with each backend."""
    for backend in backends:
        bundle, seconds = compile_llama(check, "llama-8b", backend)
        if bundle is None:
            check.row(backend, "compile FAILED, s", seconds)
            continue
        check.row(backend, "compile, s", seconds)
        artefacts = sum(f.stat().st_size for f in (bundle / "artefacts").rglob("*") if f.is_file())
        check.row(backend, "artefacts, MB", artefacts / 1e6)
        measure_language(check, bundle, backend, "8b")
        check.save()


def measure_language(check: Check, bundle: Path, backend: str, which: str) -> None:
    log = f"measure-{bundle.name}"
    result = check.out / f"{log}.json"
    check.python("scripts/gpu_language.py", str(bundle), which, str(result), log=log)
    if not result.exists():
        return
    found = json.loads(result.read_text())
    check.found[log] = found
    for what, value in found["figures"].items():
        check.row(backend, what, value)


def startup(check: Check, backends: list[str]) -> None:
    """From the start of a process to its first token."""
    for backend in backends:
        bundle = check.out / f"llama-8b-{backend}"
        if not bundle.exists():
            continue
        result = check.out / f"startup-{backend}.json"
        command = ["bench", "startup", "--bundle", str(bundle), "--starts", "2"]
        check.python("-P", "-m", "runner", *command, "--output", str(result), log=result.stem)
        if result.exists():
            later = json.loads(result.read_text())["result"]["later_s"]["median"]
            check.row(backend, "start to first token, s", later)


def llama_70b_rank(check: Check) -> None:
    """One of two ranks: compile, load, decode; without the other's all-reduces."""
    memory = torch.cuda.get_device_properties(0).total_memory
    if memory < 90 * GIB:
        print(f"  left out: 71 GB of weights, and this GPU has {memory / 1e9:.0f} GB")
        return
    bundle, seconds = compile_llama(check, "llama-70b-rank", "tensorrt")
    check.row("tensorrt", "compile of a 70B rank, s", seconds)
    if bundle:
        measure_language(check, bundle, "tensorrt", "70b")


def tensor(check: Check) -> None:
    """Tensor models: answers against plain torch, images a second, overlap of copies."""
    result = check.out / "tensor.json"
    check.python("scripts/gpu_tensor.py", str(check.out), str(result), log="tensor")
    if not result.exists():
        return
    found = json.loads(result.read_text())
    check.found["tensor"] = found
    for row in found:
        check.row(row["subject"], row["what"], row["value"])


def sanitizer(check: Check) -> None:
    """compute-sanitizer's memcheck over the attention kernel."""
    log = check.out / "sanitizer.log"
    test = "tests/runner/models/test_triton_attention.py"
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    options = ["-m", "pytest", test, "-m", "gpu", "-k", "captured or graph", "-x"]
    with log.open("w") as file:
        try:
            code = subprocess.run(
                [*command, *options], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=120
            ).returncode
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            print(f"  left out: {type(error).__name__}")
            return
    check.row("memcheck", "exit code (9: bad access)", code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", metavar="STEP")
    parser.add_argument("--backends", nargs="+", default=["tensorrt", "auto", "inductor", "eager"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check needs an NVIDIA GPU that torch can use; see shardline doctor")
    arguments.out.mkdir(parents=True, exist_ok=True)
    steps: dict[str, Callable[[Check], None]] = {
        "llama-8b": lambda check: llama_8b(check, arguments.backends),
        "startup": lambda check: startup(check, arguments.backends),
        "tensor": tensor,
        "tests": tests,
        "llama-70b-rank": llama_70b_rank,
        "sanitizer": sanitizer,
    }
    unknown = set(arguments.only or ()) - set(steps)
    if unknown:
        sys.exit(f"--only {' '.join(unknown)}: not a step; steps are {' '.join(steps)}")
    check = Check(arguments.out.absolute())
    for name, step in steps.items():
        if name in (arguments.only or steps):
            started = time.monotonic()
            print(f"{name}", flush=True)
            step(check)
            print(f"  {name} took {time.monotonic() - started:.0f} s", flush=True)
            check.save()
    print(check.table())


if __name__ == "__main__":
    main()
