"""The installed packages that shardline runs on: PyTorch, NCCL, the Torch-TensorRT flavour, and
what its extras ask for.

`torch_tensorrt` is found by its distribution and never imported: its import raises where there is
no NVIDIA driver. Not here: the driver itself (`nvml`).
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Literal

from runner.observe.finding import Finding

# The series that pyproject.toml pins; a test compares the two.
TORCH_SERIES = (2, 13)

_EXTRAS = ("serve", "bench", "import", "onnx", "images", "volumes", "sign")
"""What a user may want of this host; the flavours of Torch-TensorRT are judged apart."""

_REQUIRED_BY_EXTRA = re.compile(r"""([\w.-]+).*;.*\bextra == ["']([\w-]+)["']""")

Flavour = Literal["none", "standard", "rtx", "both"]

_TORCH_TENSORRT = {"standard": "torch-tensorrt", "rtx": "torch-tensorrt-rtx"}
_TENSORRT = {
    "standard": re.compile(r"tensorrt(-cu\d+)?"),
    "rtx": re.compile(r"tensorrt-rtx(-cu\d+)?"),
}


@dataclass(frozen=True)
class Software:
    """What is installed.

    Attributes:
        torch_version: None where torch does not import; `torch_error` says why.
        torch_cuda: the CUDA version torch was built with; None in a build without CUDA.
        num_torch_gpus: the GPUs torch can use; None in a build without CUDA.
        cuda_error: torch's words where CUDA does not start.
        nccl_version: for example "2.27.5"; None where torch has no NCCL.
        distributions: {normalised name: version} of the TensorRT family.
        lacking: by extra the names of what it asks for and is not there, whatever its version;
            empty where shardline itself is not installed.
    """

    torch_version: str | None = None
    torch_error: str | None = None
    torch_cuda: str | None = None
    num_torch_gpus: int | None = None
    cuda_error: str | None = None
    nccl_version: str | None = None
    distributions: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_software() -> Software:
    """Import torch and look up the distributions; takes a second or two."""
    installed = distributions_by_name(metadata.distributions())
    distributions, lacking = find_distributions(installed), find_lacking(installed)
    try:
        import torch
    except (ImportError, OSError) as error:
        return Software(torch_error=str(error), distributions=distributions, lacking=lacking)
    num_gpus, cuda_error = _start_cuda() if torch.version.cuda else (None, None)
    return Software(
        torch_version=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        num_torch_gpus=num_gpus,
        cuda_error=cuda_error,
        nccl_version=_read_nccl_version(),
        distributions=distributions,
        lacking=lacking,
    )


def distributions_by_name(
    installed: Iterable[metadata.Distribution],
) -> dict[str, metadata.Distribution]:
    """Distributions by their normalised names, whose metadata are read once for that."""
    # Metadata of a half-removed package has no name.
    return {_normal(one.metadata["Name"] or ""): one for one in installed}


def find_distributions(installed: Mapping[str, metadata.Distribution]) -> dict[str, str]:
    """The installed distributions of the TensorRT family as {normalised name: version}."""
    return {
        name: distribution.version
        for name, distribution in installed.items()
        if name.startswith(("torch-tensorrt", "tensorrt"))
    }


def find_lacking(installed: Mapping[str, metadata.Distribution]) -> dict[str, tuple[str, ...]]:
    """See `Software.lacking`."""
    if "shardline" not in installed:
        return {}
    lacking: dict[str, tuple[str, ...]] = dict.fromkeys(_EXTRAS, ())
    for requirement in installed["shardline"].requires or ():
        found = _REQUIRED_BY_EXTRA.match(requirement)
        if found and found[2] in lacking and _normal(found[1]) not in installed:
            lacking[found[2]] += (found[1],)
    return lacking


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def find_flavour(distributions: dict[str, str]) -> Flavour:
    """Which flavour of Torch-TensorRT is installed; both share the import name."""
    flavours: list[Flavour] = ["standard", "rtx"]
    found = [flavour for flavour in flavours if _TORCH_TENSORRT[flavour] in distributions]
    return "both" if len(found) == 2 else found[0] if found else "none"


def parse_series(version: str) -> tuple[int, int]:
    """Major and minor of a version: `parse_series("2.13.0+cpu") == (2, 13)`.

    Raises:
        ValueError: the text does not begin with two numbers.
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(f"version {version!r} does not begin with major.minor")
    return int(match[1]), int(match[2])


def judge_torch(software: Software, *, has_gpu: bool) -> Finding:
    """torch imports, is of the series that shardline is made for, and can use a GPU if there is."""
    wanted = ".".join(map(str, TORCH_SERIES))
    install = f"pip install --force-reinstall 'torch=={wanted}.*'"
    version = software.torch_version
    if version is None:
        return Finding("torch", "error", f"does not import: {software.torch_error}", install)
    if parse_series(version) != TORCH_SERIES:
        return Finding("torch", "error", f"{version} is installed; {wanted} is needed", install)
    if software.torch_cuda is None and has_gpu:
        detail = f"{version} is a build without CUDA, and this host has a GPU"
        fix = f"{install}   (from PyPI, not from PyTorch's cpu index)"
        return Finding("torch", "error", detail, fix)
    build = f"with CUDA {software.torch_cuda}" if software.torch_cuda else "without CUDA"
    return Finding("torch", "ok", f"{version}, built {build}")


def judge_nccl(version: str | None, *, num_gpus: int) -> Finding:
    """NCCL, over which the ranks of several GPUs talk; one GPU and CPU runs do without."""
    if version is not None:
        return Finding("nccl", "ok", version)
    if num_gpus < 2:
        return Finding("nccl", "absent", "not in this torch; CPU ranks talk over gloo")
    fix = "install a CUDA build of torch for Linux; it brings NCCL"
    return Finding("nccl", "error", f"not in this torch, and {num_gpus} GPUs need it", fix)


def judge_extras(lacking: dict[str, tuple[str, ...]]) -> Finding:
    """What the extras ask for; each is only needed for what it is named after."""
    whole = ", ".join(extra for extra, names in lacking.items() if not names)
    absent = {extra: names for extra, names in lacking.items() if names}
    if not absent:
        return Finding("extras", "ok" if whole else "absent", whole or "shardline is not installed")
    told = ", ".join(f"{extra} (lacks {', '.join(names)})" for extra, names in absent.items())
    fix = f"where they are wanted: pip install 'shardline[{','.join(absent)}]'"
    return Finding("extras", "absent", f"{f'{whole}; ' if whole else ''}not there: {told}", fix)


def judge_torch_tensorrt(
    distributions: dict[str, str], *, torch_version: str | None, has_gpu: bool
) -> Finding:
    """One flavour of Torch-TensorRT, with its TensorRT, of torch's own series; none is allowed."""
    flavour = find_flavour(distributions)
    if flavour == "none":
        detail = "none; the backends inductor and eager remain"
        fix = "pip install 'shardline[rtx]'" if has_gpu else None
        return Finding("torch_tensorrt", "absent", detail, fix)
    if flavour == "both":
        names = " and ".join(_TORCH_TENSORRT.values())
        fix = "pip uninstall torch-tensorrt torch-tensorrt-rtx, then install one of them"
        return Finding("torch_tensorrt", "error", f"{names} overwrite each other", fix)
    name = _TORCH_TENSORRT[flavour]
    version = distributions[name]
    if torch_version is not None and parse_series(version) != parse_series(torch_version):
        detail = f"{name} {version} is not made for torch {torch_version}"
        fix = f"pip install '{name}=={'.'.join(torch_version.split('.')[:2])}.*'"
        return Finding("torch_tensorrt", "error", detail, fix)
    engine = next((n for n in sorted(distributions) if _TENSORRT[flavour].fullmatch(n)), None)
    if engine is None:
        library = name.removeprefix("torch-")
        detail = f"{name} {version} without {library}"
        return Finding("torch_tensorrt", "error", detail, f"pip install {library}")
    detail = f"{flavour}: {name} {version}, {engine} {distributions[engine]}"
    return Finding("torch_tensorrt", "ok", detail)


def _start_cuda() -> tuple[int, str | None]:
    """The number of GPUs that torch can use, and its complaint where CUDA does not start."""
    import torch

    # torch says why CUDA does not start in a warning, not in an exception.
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return torch.cuda.device_count(), None
    return 0, " ".join(str(complaints[0].message).split()) if complaints else None


def _read_nccl_version() -> str | None:
    import torch.distributed

    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
