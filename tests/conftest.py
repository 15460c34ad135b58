"""Fixtures that several packages' tests share; each is made once a session."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from checkpoints import load_reference, make_checkpoint
from rank_pool import RankPool

POOL_SIZE = 6


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
