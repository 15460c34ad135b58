"""The inductor backend beside a compiler that does not do its work."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from spoilt_compiler import use_spoiler
from torch import nn
from torch._inductor.exc import CppCompileError

from parallel.errors import PreflightError, UnsupportedSegmentError
from runner.compiler.inductor import InductorBackend, check_compiler
from runner.compiler.segment import Segment, TensorSpec


def linear() -> Segment:
    return Segment("linear", nn.Linear(8, 4), (TensorSpec((1, 8), torch.float32),))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(64, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * self.weight


class AddProduct(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False, device="meta", dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.linear(inner)
        return x + product


def test_what_the_compiler_says_first_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor keeps in mind what has failed, so the error is raised in its place."""
    said = "x.h:1:10: fatal error: y.h: No such file or directory"

    def fail(*_args: object, **_options: object) -> None:
        raise CppCompileError(["g++", "x.cpp"], f"In file z\n{said}\ncompilation terminated.")

    monkeypatch.setattr("torch._inductor.aot_compile", fail)
    backend, segment = InductorBackend(torch.device("cpu")), linear()
    with pytest.raises(UnsupportedSegmentError) as raised:
        backend.build(segment, segment.export("cpu"), tmp_path)
    assert f"(CppCompileError: {said})" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("shape", "dtype", "searches", "is_vector", "tries_tiles"),
    [
        ((1, 8), torch.bfloat16, True, True, False),
        ((2, 8), torch.bfloat16, False, False, True),
        ((64, 8), torch.float16, False, False, True),
        ((65, 8), torch.bfloat16, False, False, False),
        ((2, 8), torch.float32, False, False, False),
        ((2, 3, 8, 8), torch.bfloat16, False, False, False),
        ((1, 3, 8, 8), torch.float32, True, False, False),
        ((1, 128), torch.int64, True, False, False),
        ((), torch.float32, False, False, False),
    ],
    ids=["vector", "few", "64", "many", "floats", "images", "image", "tokens", "number"],
)
def test_on_a_gpu_kernels_are_searched_for_as_far_as_it_pays(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    searches: bool,
    is_vector: bool,
    tries_tiles: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: gpu)
    segment = Segment("relu", nn.ReLU(), (TensorSpec(shape, dtype),))
    backend = InductorBackend(torch.device("cuda", 0))
    options = backend._options(segment)
    assert options["aot_inductor.embed_kernel_binary"]
    assert ("coordinate_descent_tuning" in options) == searches
    assert ("max_autotune_gemm" in options) == tries_tiles
    assert ("coordinate_descent_check_all_directions" in options) == is_vector
    assert ("realize_opcount_threshold" in options) == is_vector
    for name, value in options.items():
        with torch._inductor.config.patch({name: value}):
            pass  # It knows all of them.
    gpu.multi_processor_count = 40  # For which inductor would say that it tries nothing.
    assert "max_autotune_gemm" not in backend._options(segment)


def test_without_openssl_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "g++").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(PreflightError, match="install openssl"):
        check_compiler()


@pytest.mark.full
def test_libraries_that_do_not_load_are_found_before_they_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiler = tmp_path / "spoiler"
    use_spoiler(spoiler, monkeypatch)
    segment = linear()
    backend = InductorBackend(torch.device("cpu"))
    folder = tmp_path / "artefact"
    folder.mkdir()
    # It was read when inductor was first imported.
    with torch._inductor.config.patch({"cpp.cxx": (None, str(spoiler))}):
        for _ in range(2):
            with pytest.raises(PreflightError, match="spoiler makes here do not load"):
                backend.build(segment, segment.export("cpu"), folder)
    assert list(folder.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_library_holds_a_kernel_that_an_earlier_one_holds_too(tmp_path: Path) -> None:
    """Inductor writes a kernel out when it first launches it, and keeps it for the next library."""
    device = torch.device("cuda", 0)
    segment = Segment("scale", Scale(), (TensorSpec((8, 64), torch.float32),))
    backend = InductorBackend(device)
    x, weight = torch.randn(8, 64, device=device), torch.randn(64, device=device)
    # In this process, as while the pool of others is still starting.
    with torch._inductor.config.patch(compile_threads=1):
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            backend.build(segment, segment.export(device), tmp_path / name)
    (scaled,) = backend.load(tmp_path / "second", segment)(x, weight)
    torch.testing.assert_close(scaled, torch.relu(x) * weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_product_of_few_rows_adds_what_is_added_to_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The library would copy it first, and add up parts of the product in another kernel."""
    device, width = torch.device("cuda", 0), 4096
    rows = TensorSpec((8, width), torch.bfloat16)
    segment = Segment("residual", AddProduct(width), (rows, rows))
    backend = InductorBackend(device)
    backend.build(segment, segment.export(device), tmp_path)
    assert "AUTOTUNE" not in "".join(capfd.readouterr())
    x, inner = torch.randn(2, 8, width, device=device).bfloat16()
    weight = torch.randn(width, width, device=device).bfloat16() / 64
    run = backend.load(tmp_path, segment)
    exact = x.double() + inner.double() @ weight.double().T
    (computed,) = run(x, inner, weight)
    assert (computed.double() - exact).norm() < 3e-3 * exact.norm()
    if torch.cuda.get_device_capability(device)[0] == 9:
        assert b"triton_tem_" in (tmp_path / "segment.so").read_bytes()
