"""Every kind of compilation is counted, and nothing else is: a compilation of each is planted."""

import json
import subprocess
import sys
from pathlib import Path

from barren import barren
from processes import ROOT

LOADED = """
import json
import torch
from runner.compiler.counter import compilations, count_compilations, counted, watch_triton
torch.export.export(torch.nn.Linear(2, 3), (torch.ones(1, 2),))
told = [compilations()]
"""
PLANTED = """
# A matrix product alone: inductor's C++ would take ten seconds.
torch.compile(lambda x: x @ x)(torch.ones(8, 8))
told.append(compilations())
with counted("tensorrt"):
    pass
watch_triton()
watch_triton()
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import planted_kernel
source = ASTSource(planted_kernel.copied, {"x": "*fp32", "out": "*fp32"}, {})
for _ in range(2):  # The second time Triton finds it in its cache.
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
told.append(compilations())
told.append(count_compilations())
"""


KERNEL = """
import triton
import triton.language as tl

@triton.jit
def copied(x, out):
    tl.store(out, tl.load(x))
"""


def run(code: str, folder: Path) -> list[object]:
    """In a process of its own, whose caches are empty; what it tells as JSON."""
    (folder / "planted_kernel.py").write_text(KERNEL)
    caches = {k: v for k, v in barren(folder).items() if k not in ("PATH", "CXX")}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(json.dumps(told))"],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", **caches, "PYTHONPATH": str(folder)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: list[object] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_each_kind_is_seen(tmp_path: Path) -> None:
    before, compiled, planted, total = run(LOADED + PLANTED, tmp_path)
    assert before == {}
    assert compiled == {"dynamo": 1, "inductor": 1}
    assert planted == {"dynamo": 1, "inductor": 1, "tensorrt": 1, "triton": 1}
    assert total == 4
