"""A bundle that is built once, and a copy of it for every test that spoils one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import build_bundle


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="session")
def built(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tmp_path_factory.mktemp("built") / "bundle", checkpoint("llama"))


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "bundle")
