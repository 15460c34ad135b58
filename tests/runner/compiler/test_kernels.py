"""Triton's kernels come out of a bundle's caches as they went into them. Triton compiles here for a
GPU that is not there; each process starts with nothing in memory, as a start does.
"""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT

pytest.importorskip("triton")

KERNEL = """
import triton
import triton.language as tl

@triton.jit
def doubled(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) * 2)

@triton.jit
def halved(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) / 2)
"""

LAUNCHER = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "cuda_utils", "launches", -1, NULL};
PyMODINIT_FUNC PyInit_cuda_utils(void) { return PyModule_Create(&module); }
"""

START = f"""
import json, sys
from pathlib import Path
import torch, triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.build import compile_module_from_src
import kernel_of_test
from runner.compiler.kernels import keep_kernels, watch_kernels

caches, ends = Path(sys.argv[1]), sys.argv[2]
gpu = torch.device("cuda", 0)
watch_kernels(gpu, caches if ends == "run" else None)
found = {{}}
def listen(*, src, cache_hit, **_): found[src.name] = cache_hit
knobs.compilation.listener = listen
launcher = compile_module_from_src({LAUNCHER!r}, "cuda_utils")
found["launcher"] = launcher.__file__
for kernel in (kernel_of_test.doubled, kernel_of_test.halved):
    source = ASTSource(kernel, {{"x": "*fp32", "out": "*fp32", "N": "constexpr"}}, {{"N": 16}})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    found[kernel.__name__ + ".cubin"] = len(made.kernel)
if ends == "keep":
    keep_kernels(gpu, ["doubled"], caches)
print(json.dumps(found))
"""

Start = Callable[..., dict[str, Any]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """A process that needs the launcher and both kernels."""
    (tmp_path / "kernel_of_test.py").write_text(KERNEL)

    def run(ends: str, cache: str, **environment: str) -> dict[str, Any]:
        paths = os.pathsep.join([str(tmp_path), str(ROOT)])
        own = {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path / cache)}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(START), str(tmp_path / "caches"), ends],
            env={**os.environ, **own, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run


def test_a_start_compiles_nothing_that_the_bundle_brings(start: Start, tmp_path: Path) -> None:
    made = start("keep", "where it was compiled")
    assert made["doubled"] is made["halved"] is False
    # Wherever the bundle has been carried to, on a host without a compiler.
    found = start("run", "another host's", CC=str(tmp_path / "no compiler"))
    assert found["doubled"] is True
    assert found["doubled.cubin"] == made["doubled.cubin"] > 0
    assert found["launcher"].startswith(str(tmp_path / "caches" / "triton"))
    assert found["halved"] is False, "it was not asked for, so it is compiled"
    own = [file.name for file in (tmp_path / "another host's").rglob("*") if file.is_file()]
    assert any(name.startswith("halved") for name in own)
    assert not any(name.startswith(("doubled", "cuda_utils")) for name in own)


def test_only_what_a_start_needs_is_kept(start: Start, tmp_path: Path) -> None:
    start("keep", "own")
    kept = sorted(file.name for file in (tmp_path / "caches").rglob("*") if file.is_file())
    assert [name.split(".")[0] for name in kept] == ["cuda_utils", "doubled", "doubled"]
    assert [Path(name).suffix for name in kept] == [".so", ".cubin", ".json"]
    # Of another start, whose own cache had all of it.
    start("keep", "own")
    assert sorted(f.name for f in (tmp_path / "caches").rglob("*") if f.is_file()) == kept


@pytest.mark.parametrize("fault", ["does not load", "is for another Python"])
def test_what_does_not_fit_is_compiled_once(start: Start, tmp_path: Path, fault: str) -> None:
    start("keep", "own")
    library = next((tmp_path / "caches").rglob("cuda_utils*"))
    if fault == "does not load":
        library.write_bytes(b"of another machine")
    else:
        library.rename(library.with_name("cuda_utils.cpython-310-x86_64-linux-gnu.so"))
    found = start("run", "another host's")
    assert found["launcher"].startswith(str(tmp_path / "another host's"))
    assert start("run", "another host's", CC=str(tmp_path / "no compiler")) == found | {
        "halved": True
    }


def test_a_cache_that_is_not_there_is_no_defect_of_ours() -> None:
    code = "import torch; from runner.compiler.kernels import watch_kernels; "
    done = subprocess.run(
        [sys.executable, "-c", f"{code} watch_kernels(torch.device('cuda', 0))"],
        env={**os.environ, "TRITON_CACHE_MANAGER": "nosuch:Thing"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_cache_that_the_user_wants_is_left_to_work(start: Start, tmp_path: Path) -> None:
    manager = "triton.runtime.cache:FileCacheManager"
    start("keep", "own", TRITON_CACHE_MANAGER=manager)
    assert not (tmp_path / "caches").exists()
