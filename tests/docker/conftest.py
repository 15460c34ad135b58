"""The images under test, built once a session from a wheelhouse, and what they run.

`scripts/test-docker` starts the engine, makes the base image and the wheelhouse, and says where
they are; without it these tests have nothing to run on.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import add_tokenizer, make_checkpoint
from containers import Images, docker, readable, run_image, writable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.docker)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def wheelhouse() -> Path:
    path = os.environ.get("SHARDLINE_WHEELHOUSE")
    assert path, "run scripts/test-docker, which makes a wheelhouse and names it"
    return Path(path)


@pytest.fixture(scope="session")
def images(wheelhouse: Path) -> Images:
    """Both targets, from the wheelhouse alone."""
    about = json.loads((wheelhouse / "wheelhouse.json").read_text())
    seconds = {}
    for target in ("runtime", "builder"):
        started = time.monotonic()
        docker(
            *("build", "--network", "none", "--target", target),
            *("--tag", f"shardline-test:{target}", "--build-arg", f"BASE={about['base']}"),
            *("--build-arg", f"VERSION={about['version']}"),
            *("--build-arg", f"REVISION={about['revision']}"),
            *("--file", str(wheelhouse / "docker" / "Dockerfile"), str(wheelhouse)),
            timeout_s=880,
        )
        seconds[target] = time.monotonic() - started
    return Images("shardline-test:runtime", "shardline-test:builder", seconds)


@pytest.fixture(scope="session")
def runtime(images: Images) -> str:
    return images.runtime


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
def bundle(images: Images, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, compiled in the builder by whatever measures fastest; without a network."""
    out = tmp_path_factory.mktemp("bundles")
    writable(out)
    done = run_image(
        images.builder,
        *("compile", "--model", "/models/tiny", "--output", "/out/bundle", "--device", "cpu"),
        *("--set", "compile.backend=auto", "--set", "compile.buckets=[16]"),
        *("--set", "scheduler.max_num_batched_tokens=16", "--set", "scheduler.max_num_seqs=8"),
        mounts=[f"{tiny.parent}:/models:ro", f"{out}:/out"],
        timeout_s=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "bundle"


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder whose name leaves room for that of a socket."""
    done = subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    yield folder
    subprocess.run(["rm", "-rf", folder], check=True)
