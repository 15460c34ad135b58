"""What is streamed into a file comes back, also with safetensors' own reader."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bundles import flip, make_plan_of
from processes import ROOT
from safetensors.torch import load_file

from parallel.errors import ConfigError, IntegrityError, InternalError
from parallel.weights import stream
from runner.bundle.files import CHUNK_BYTES, hash_file
from runner.bundle.weights_file import (
    Owner,
    TensorHeader,
    headers_of,
    read_header,
    read_weights,
    write_weights,
)
from runner.models.spec import ModelSpec

CPU = torch.device("cpu")
OWNER = Owner("a1" * 32, 3)

TENSORS = {
    "norm.weight": torch.randn(41).to(torch.bfloat16),
    "odd.weight": torch.randn(3, 5, 7),
    "half.weight": torch.randn(4, 2).to(torch.float16),
    "int8.weight": torch.arange(-3, 3, dtype=torch.int8),
    "fp8.weight": torch.randn(5).to(torch.float8_e4m3fn),
    "wide-fp8.weight": torch.randn(5).to(torch.float8_e5m2),
    "spectrum": torch.randn(3, 2, dtype=torch.complex64),
    "places": torch.tensor([1, 65535]).to(torch.uint16),
    "turned.weight": torch.randn(6, 4).t(),
    "empty.weight": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
}


def headers_for(tensors: dict[str, torch.Tensor]) -> dict[str, TensorHeader]:
    return {name: TensorHeader.of(name, tensor) for name, tensor in tensors.items()}


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), data


def test_a_dtype_that_no_file_can_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^wave is of type complex128, .* one of float64, "):
        TensorHeader.of("wave", torch.zeros(2, dtype=torch.complex128))


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "rank3.safetensors"
    written = write_weights(file, headers_for(TENSORS), TENSORS.items(), OWNER)
    assert written == hash_file(file)
    for read in (dict(read_weights(file, device=CPU)), load_file(file)):
        assert {name: bits(t) for name, t in read.items()} == {
            name: bits(t) for name, t in TENSORS.items()
        }
    owner, shapes = read_header(file)
    assert owner == OWNER
    assert shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def test_a_rank_of_a_plan_comes_back(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = checkpoint("llama")
    plan, tensors = make_plan_of(model), ModelSpec.open(model).checkpoint
    for rank in plan.ranks:

        def share(rank_plan=rank) -> Iterator[tuple[str, torch.Tensor]]:
            return stream(tensors, rank_plan, dtype=torch.bfloat16, device=CPU)

        file = tmp_path / f"{rank.rank}.safetensors"
        write_weights(file, headers_of(rank, plan.dtype), share(), Owner("p", rank.rank))
        read = dict(read_weights(file, device=CPU))
        assert all(torch.equal(read[name], tensor) for name, tensor in share())
        assert sum(tensor.nbytes for tensor in read.values()) == rank.weight_bytes


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", torch.zeros(2))], "no tensor came for b"),
        ([("b", torch.zeros(2)), ("a", torch.zeros(2))], "the header has"),
        ([("a", torch.zeros(3))], "the header has"),
        ([("a", torch.zeros(2, dtype=torch.float16))], "the header has"),
        ([("a", torch.zeros(2)), ("b", torch.zeros(2)), ("c", torch.zeros(1))], "has None"),
    ],
)
def test_tensors_that_are_not_those_of_the_header_are_a_defect(
    tensors: list[tuple[str, torch.Tensor]], message: str, tmp_path: Path
) -> None:
    headers = {"a": TensorHeader("float32", (2,)), "b": TensorHeader("float32", (2,))}
    with pytest.raises(InternalError, match=message):
        write_weights(tmp_path / "file", headers, tensors, OWNER)


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_file_that_was_cut_short_is_refused(kept: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_weights(file, headers_for(TENSORS), TENSORS.items(), OWNER)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(IntegrityError, match=f"{file}: truncated or corrupt"):
        read_header(file)
    with pytest.raises(IntegrityError, match=f"{file}: cannot be read"):
        list(read_weights(file, device=CPU))


def test_a_header_that_is_no_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_weights(file, headers_for(TENSORS), TENSORS.items(), OWNER)
    flip(file, 8)
    with pytest.raises(IntegrityError, match="truncated or corrupt"):
        read_header(file)


def test_a_file_of_another_writer_belongs_to_nobody(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "file", metadata={"plan": "x", "rank": "one"})
    assert read_header(tmp_path / "file") == (None, {"a": (2,)})


MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from runner.bundle.weights_file import Owner, TensorHeader, write_weights

count, elements = 5, 8 * 2**20
headers = {str(n): TensorHeader("float32", (elements,)) for n in range(count)}
tensors = ((str(n), torch.full((elements,), float(n))) for n in range(count))
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
torch.full((1024,), 1.0).contiguous().view(torch.uint8).numpy()
before = peak()
found = write_weights(Path(sys.argv[1]), headers, tensors, Owner("p", 0))
print(json.dumps([peak() - before, found.size, len(found.chunks)]))
"""


def test_there_is_one_tensor_at_a_time(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "file")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    grown, size, num_chunks = json.loads(done.stdout)
    tensor_bytes = 32 * 2**20
    assert size > 5 * tensor_bytes
    assert num_chunks == math.ceil(size / CHUNK_BYTES)
    assert tensor_bytes * 0.9 < grown < tensor_bytes * 1.5
