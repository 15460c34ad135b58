"""A bundle runs on hosts like the one it was built on, by what its backends need."""

import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.errors import IncompatibleError, PreflightError
from runner.bundle.host import Host, check_host, differences

H200 = Host(
    device="cuda",
    cpu="x86_64 AVX512",
    cpu_features=("avx2", "avx512_f"),
    gpu="NVIDIA H200",
    compute_capability="9.0",
    versions={
        "torch": "2.13.0+cu130",
        "shardline": "0.1.0",
        "tensorrt-rtx": "1.5.0.1",
        "torch-tensorrt-rtx": "2.13.0",
    },
)
H100 = replace(H200, gpu="NVIDIA H100 80GB HBM3")
A100 = replace(H200, gpu="NVIDIA A100", compute_capability="8.0")
CPU = replace(H200, device="cpu", gpu=None, compute_capability=None)
SM90 = replace(H200, gpu=None, versions={**H200.versions, "torch": "2.13.0+cpu"})
AVX2 = replace(CPU, cpu="x86_64 AVX2", cpu_features=("avx2",))
MORE = replace(CPU, cpu_features=("amx_tile", "avx2", "avx512_f"))


def with_version(host: Host, **versions: str) -> Host:
    changed = {name.replace("_", "-"): version for name, version in versions.items()}
    return replace(host, versions={**host.versions, **changed})


def without(host: Host, name: str) -> Host:
    return replace(host, versions={n: v for n, v in host.versions.items() if n != name})


PATCH = with_version(H200, torch="2.13.1+cu130", shardline="0.1.7")


@pytest.mark.parametrize(
    ("built", "here", "backends", "expected"),
    [
        (H200, H200, {"tensorrt", "inductor", "eager"}, []),
        (H200, A100, {"eager"}, []),
        (H200, PATCH, {"eager"}, []),
        (CPU, AVX2, {"eager"}, []),
        (H200, CPU, {"eager"}, ["device is cpu, it was built for cuda"]),
        (
            H200,
            with_version(H200, torch="2.14.0"),
            {"eager"},
            ["torch is 2.14.0, it was built for 2.13.0+cu130"],
        ),
        (
            H200,
            with_version(H200, shardline="0.2.0"),
            set(),
            ["shardline is 0.2.0, it was built for 0.1.0"],
        ),
        (H200, PATCH, {"inductor"}, ["torch is 2.13.1+cu130, it was built for 2.13.0+cu130"]),
        (H200, H100, {"inductor"}, []),
        (H200, A100, {"inductor"}, ["GPU is SM 8.0, it was built for SM 9.0"]),
        (H200, without(H200, "tensorrt-rtx"), {"inductor"}, []),
        (CPU, MORE, {"inductor"}, []),
        (
            CPU,
            AVX2,
            {"inductor"},
            [
                "CPU is x86_64 AVX2, it was built for x86_64 AVX512",
                "CPU is without avx512_f, it was built for one with avx512_f",
            ],
        ),
        (
            H200,
            H100,
            {"tensorrt"},
            ["GPU is NVIDIA H100 80GB HBM3, it was built for NVIDIA H200"],
        ),
        (
            H200,
            with_version(H200, tensorrt_rtx="1.6.0"),
            {"tensorrt"},
            ["tensorrt-rtx is 1.6.0, it was built for 1.5.0.1"],
        ),
        (
            H200,
            without(H200, "tensorrt-rtx"),
            {"tensorrt", "eager"},
            ["tensorrt-rtx is not installed, it was built for 1.5.0.1"],
        ),
        (SM90, H200, {"tensorrt"}, []),
        (SM90, H100, {"tensorrt"}, []),
        (SM90, PATCH, {"tensorrt"}, []),
        (SM90, A100, {"tensorrt"}, ["GPU is SM 8.0, it was built for SM 9.0"]),
        (
            SM90,
            with_version(H200, torch="2.14.0", tensorrt_rtx="1.6.0"),
            {"tensorrt"},
            [
                "torch is 2.14.0, it was built for 2.13.0+cpu",
                "tensorrt-rtx is 1.6.0, it was built for 1.5.0.1",
            ],
        ),
        (
            SM90,
            CPU,
            {"tensorrt"},
            ["device is cpu, it was built for cuda", "GPU is none, it was built for SM 9.0"],
        ),
        (
            H200,
            A100,
            {"one of tomorrow"},
            [
                "GPU is SM 8.0, it was built for SM 9.0",
                "GPU is NVIDIA A100, it was built for NVIDIA H200",
            ],
        ),
    ],
)
def test_each_backend_asks_for_what_it_needs(
    built: Host, here: Host, backends: set[str], expected: list[str]
) -> None:
    assert [str(found) for found in differences(built, here, backends)] == expected


def test_the_error_names_both_sides_and_the_command() -> None:
    with pytest.raises(IncompatibleError) as caught:
        check_host(H200, A100, {"tensorrt"}, bundle=Path("/b/llama"))
    assert caught.value.exit_code == 5
    message = str(caught.value)
    assert message.startswith("/b/llama was compiled for another host: ")
    assert "GPU is NVIDIA A100, it was built for NVIDIA H200" in message
    assert message.endswith("shardline compile --config PLAN.YAML --output /b/llama --overwrite")
    check_host(H200, H200, {"tensorrt"}, bundle=Path("/b/llama"))


def test_this_host_is_like_itself() -> None:
    here = Host.current("cpu")
    assert here == Host.current("cpu")
    assert differences(here, here, {"inductor", "tensorrt"}) == []
    assert here.cpu.startswith(platform.machine())
    assert here.versions["torch"] == torch.__version__
    assert here.versions["shardline"] == metadata.version("shardline")
    assert here.cpu_features
    assert here.describe().startswith(f"CPU {here.cpu}")


@pytest.mark.parametrize(("target", "capability"), [("sm89", "8.9"), ("sm120", "12.0")])
def test_a_target_is_any_gpu_of_its_compute_capability(target: str, capability: str) -> None:
    host, here = Host.of_target(target), Host.current("cpu")
    assert host == replace(here, device="cuda", compute_capability=capability)
    assert host.is_target
    assert not here.is_target
    assert host.describe().startswith(f"any GPU (SM {capability}), torch ")


def test_a_gpu_that_is_not_there_is_a_matter_of_the_host() -> None:
    device: Any = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(PreflightError, match=f"{device}: .* see `shardline doctor`"):
        Host.current(device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_known_by_name_and_sm() -> None:
    here = Host.current("cuda:0")
    assert here.gpu == torch.cuda.get_device_name(0)
    assert here.compute_capability == "{}.{}".format(*torch.cuda.get_device_capability(0))
    assert here.describe().startswith(f"{here.gpu} (SM ")
