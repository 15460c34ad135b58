"""Build, check and time on the GPUs of this host: see scripts/gpu_check.

Every step runs in processes of its own and writes what it found before the next one starts, so a
step that fails, or is stopped, loses only itself.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import torch
from gpu_llama import cuts, llama_8b, llama_70b_rank, llama_of_ranks, startup
from gpu_report import ROOT, Check
from gpu_serve import serve
from gpu_tensor import compile_model, models

TESTS_S = 500
PIPELINED = ("ResNet-50 fp16", "3-D ResNet-152 bf16")


def tests(check: Check, mark: str) -> None:
    """The tests that need one GPU ("gpu"), or several ("multigpu")."""
    name = f"tests-{mark}"
    report = check.out / f"{name}.xml"
    options = ["-m", f"{mark} and not full", "-vv", "--tb=short", f"--junitxml={report}"]
    check.python("-m", "pytest", "tests", *options, log=name, timeout_s=TESTS_S)
    if not report.exists():
        return
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        case.attrib["name"]
        for case in suite.iter("testcase")
        if any(child.tag in ("failure", "error") for child in case)
    ]
    check.found[name] = counts | {"failed": failed}
    good = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    check.row(name, "passed", good)
    check.row(name, "failed", counts["failures"] + counts["errors"])


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


def all_reduces(check: Check) -> None:
    """NCCL's all-reduce beside that of one kernel, by size."""
    result = check.out / "all-reduce.json"
    num_gpus = torch.cuda.device_count()
    arguments = ["scripts/gpu_collectives.py", str(result)]
    check.python(*arguments, log="all-reduce", num_ranks=num_gpus, timeout_s=120)
    if not result.exists():
        return
    check.found["all-reduce"] = json.loads(result.read_text())
    for row in check.found["all-reduce"]:
        subject = f"all-reduce, {num_gpus} GPUs"
        check.row(subject, f"{row['way']} {row['dtype']} {row['kib']} KiB, us", row["us"])


def pipelines(check: Check, backends: list[str]) -> None:
    """Tensor models in one stage and in two: samples a second, bubble, what runs beside what."""
    for model in models():
        if model.name not in PIPELINED:
            continue
        for backend in backends:
            rates = []
            for num_stages in (1, 2):
                subject = f"{model.name}, {backend}, pp {num_stages}"
                bundle, seconds, code = compile_model(
                    model, backend, check.out, num_stages=num_stages
                )
                if code:
                    check.row(subject, "compile FAILED, s", seconds)
                    break
                rates.append(measure_pipeline(check, bundle, subject, num_stages))
            if len(rates) == 2 and all(rates):
                subject = f"{model.name}, {backend}"
                check.row(subject, "samples/s of 2 stages over 1", rates[1] / rates[0])
            check.save()


def measure_pipeline(check: Check, bundle: Path, subject: str, num_stages: int) -> float:
    """Samples a second; 0 where it failed."""
    result = check.out / f"pipeline-{bundle.name}.json"
    arguments = ["scripts/gpu_pipeline.py", str(bundle), str(result)]
    check.python(*arguments, log=result.stem, num_ranks=num_stages)
    if not result.exists():
        check.row(subject, "measuring FAILED, see its log", 1)
        return 0.0
    found = json.loads(result.read_text())
    check.found[result.stem] = found
    best = max(found["runs"], key=lambda run: run["samples/s"])
    check.row(subject, "samples/s", best["samples/s"])
    check.row(subject, "bubble", best["bubble"])
    for rank, busy in enumerate(best["busy a batch, ms"]):
        check.row(subject, f"rank {rank}: busy a batch, ms", busy)
        for what, share in found["beside kernels"][rank].items():
            check.row(subject, f"rank {rank}: {what} beside kernels", share)
    return float(best["samples/s"])


def steps(backends: list[str]) -> dict[str, Callable[[Check], None]]:
    """What this host's GPUs allow, in order."""
    chosen: dict[str, Callable[[Check], None]] = {
        "llama-8b": partial(llama_8b, backends=backends),
        "startup": partial(startup, backends=backends),
        "serve": partial(serve, backends=backends),
        "tensor": tensor,
        "tests": partial(tests, mark="gpu"),
        "llama-70b-rank": llama_70b_rank,
        "sanitizer": sanitizer,
    }
    if torch.cuda.device_count() > 1:
        chosen["tests-of-several"] = partial(tests, mark="multigpu")
        chosen["all-reduce"] = all_reduces
        for name in ("llama-8b", "llama-70b"):
            for cut in cuts(torch.cuda.device_count()):
                chosen[f"{name}{cut.suffix}"] = partial(
                    llama_of_ranks, name=name, cut=cut, backends=backends
                )
        chosen["pipelines"] = partial(pipelines, backends=backends)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", metavar="STEP")
    parser.add_argument("--backends", nargs="+", default=["tensorrt", "auto", "inductor", "eager"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check needs an NVIDIA GPU that torch can use; see shardline doctor")
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = steps(arguments.backends)
    if unknown := set(arguments.only or ()) - set(chosen):
        sys.exit(f"--only {' '.join(unknown)}: not a step here; steps are {' '.join(chosen)}")
    check = Check(arguments.out.absolute())
    for name, step in chosen.items():
        if name in (arguments.only or chosen):
            started = time.monotonic()
            print(f"{name}", flush=True)
            step(check)
            print(f"  {name} took {time.monotonic() - started:.0f} s", flush=True)
            check.save()
    print(check.table())


if __name__ == "__main__":
    main()
