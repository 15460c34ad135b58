"""The images under test and what they run.

`scripts/test-docker` starts the engine, makes the base image and the wheelhouse, builds the images,
and says where the wheelhouse is; without it these tests have nothing to run on.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import add_tokenizer, make_checkpoint
from containers import compile_in, docker, readable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.docker)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def wheelhouse() -> Path:
    path = os.environ.get("SHARDLINE_WHEELHOUSE")
    assert path, "run scripts/test-docker, which makes a wheelhouse and names it"
    return Path(path)


def _built(target: str) -> str:
    name = f"shardline-test:{target}"
    found = docker("image", "inspect", name, check=False).returncode == 0
    assert found, f"run scripts/test-docker, which builds {name}"
    return name


@pytest.fixture(scope="session")
def runtime() -> str:
    return _built("runtime")


@pytest.fixture(scope="session")
def builder() -> str:
    """For tests with the mark `full`, without which it is not built."""
    return _built("builder")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of a few layers, whose answers end by their length alone."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    changes = {"vocab_size": 259, "max_position_embeddings": 4096, "eos_token_id": None}
    make_checkpoint("llama", folder, **changes)
    add_tokenizer(folder)
    readable(folder.parent)
    return folder


@pytest.fixture(scope="session")
def bundle(runtime: str, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny model, by `eager`, which needs no compiler."""
    return compile_in(runtime, tiny, tmp_path_factory.mktemp("bundles"), "eager")


@pytest.fixture(scope="session")
def compiled(builder: str, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny model, compiled by the builder's g++."""
    return compile_in(builder, tiny, tmp_path_factory.mktemp("compiled"), "inductor")


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder whose name leaves room for that of a socket."""
    done = subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    yield folder
    subprocess.run(["rm", "-rf", folder], check=True)
