"""Whether Triton can start, by its own words, where its driver takes this CPU for a GPU.

In processes of their own, since Triton starts once. Nothing is loaded: a stand-in is.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

pytest.importorskip("triton")

PROBE = """
import hashlib, sys, sysconfig
from pathlib import Path
from unittest.mock import MagicMock
from triton.backends.nvidia import driver
from triton.runtime import build
from triton.runtime.cache import get_cache_manager
from runner.compiler.triton_driver import find_obstacle

driver.CudaDriver.is_active = staticmethod(lambda: True)
build._load_module_from_path = lambda name, path: MagicMock()
if "filled" in sys.argv:
    source = (Path(driver.dirname) / "driver.c").read_text() + build.platform_key()
    cache = get_cache_manager(hashlib.sha256(source.encode()).hexdigest())
    cache.put(b"", "cuda_utils" + sysconfig.get_config_var("EXT_SUFFIX"))
print(find_obstacle())
"""


def probe(folder: Path, *arguments: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("CC", "TRITON_INTERPRET")}
    places = {"TRITON_CACHE_DIR": str(folder), "TRITON_LIBCUDA_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        cwd=ROOT,
        env={**kept, **places, "PATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout.strip()


def test_no_compiler_and_an_empty_cache(tmp_path: Path) -> None:
    assert probe(tmp_path).startswith("Failed to find C compiler")


def test_a_cache_that_was_filled_needs_no_compiler(tmp_path: Path) -> None:
    assert probe(tmp_path, "filled") == "None"


@pytest.mark.parametrize(
    ("compiler", "said"), [("/absent/cc", "/absent/cc"), (sys.executable, "non-zero exit status")]
)
def test_a_compiler_that_fails(tmp_path: Path, compiler: str, said: str) -> None:
    assert said in probe(tmp_path, CC=compiler)
