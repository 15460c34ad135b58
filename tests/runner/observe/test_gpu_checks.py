"""Driver, GPU count and CUDA version against what a job needs."""

import pytest

from runner.observe.gpu_checks import judge_cuda, judge_driver, judge_gpu_count, judge_gpus
from runner.observe.nvml import Gpu, Inventory
from runner.observe.software import Software

NO_DRIVER = Inventory("absent", "no NVIDIA driver: libnvidia-ml.so.1 not found")
CUDA_TORCH = Software(torch_version="2.13.0", torch_cuda="13.0", num_torch_gpus=8)


def with_cuda(version: tuple[int, int] | None) -> Inventory:
    return Inventory("present", cuda_version=version, gpus=(Gpu(0),))


def count(found: int, *, software: Software = CUDA_TORCH, demanded: int = 0) -> tuple[str, str]:
    finding = judge_gpu_count(found, software=software, demanded=demanded, in_container=True)
    return finding.status, finding.detail


def test_no_driver_is_no_error() -> None:
    finding = judge_driver(NO_DRIVER, in_container=True)
    assert finding.status == "absent"
    assert "CPU runs only" in finding.detail
    assert "docker run --gpus all" in (finding.fix or "")
    assert judge_driver(NO_DRIVER, in_container=False).fix is None


def test_a_silent_driver_is_an_error_that_asks_for_a_new_container() -> None:
    broken = Inventory("broken", "the NVIDIA driver does not answer: Unknown Error")
    finding = judge_driver(broken, in_container=True)
    assert finding.status == "error"
    assert "new container" in (finding.fix or "")


@pytest.mark.parametrize(
    ("driver", "built", "status"),
    [
        ((13, 0), "13.0", "ok"),
        ((13, 1), "12.8", "ok"),
        ((12, 10), "12.8", "ok"),
        ((12, 4), "12.8", "warning"),
        ((12, 9), "13.0", "error"),
        ((13, 0), None, "absent"),
        (None, "13.0", "error"),
    ],
)
def test_cuda_of_driver_and_torch(
    driver: tuple[int, int] | None, built: str | None, status: str
) -> None:
    assert judge_cuda(with_cuda(driver), torch_cuda=built, in_container=True).status == status


def test_a_container_without_libcuda_gets_the_capability_flag() -> None:
    finding = judge_cuda(with_cuda(None), torch_cuda="13.0", in_container=True)
    assert finding.fix == "docker run -e NVIDIA_DRIVER_CAPABILITIES=compute,utility"


def test_cuda_is_absent_without_a_driver() -> None:
    assert judge_cuda(NO_DRIVER, torch_cuda="13.0", in_container=True).status == "absent"


def test_gpus_are_demanded() -> None:
    assert count(0) == ("absent", "none; CPU runs only")
    assert count(0, demanded=1) == ("error", "0 found; 1 demanded")
    assert count(2, demanded=2) == ("ok", "2 found")
    assert count(2, demanded=4) == ("error", "2 found; 4 demanded")


def test_gpus_that_torch_does_not_see_do_not_count() -> None:
    two_visible = Software(torch_cuda="13.0", num_torch_gpus=2)
    assert count(8, software=two_visible, demanded=2)[0] == "ok"
    assert count(8, software=two_visible, demanded=4) == (
        "error",
        "8 found, 2 usable by torch; 4 demanded",
    )
    assert count(8, software=Software(torch_cuda="13.0", num_torch_gpus=0))[0] == "warning"


def test_gpus_count_as_found_where_torch_has_no_cuda() -> None:
    assert count(2, software=Software(), demanded=2) == ("ok", "2 found")


def test_cuda_that_does_not_start_is_an_error_in_torchs_words() -> None:
    failed = Software(torch_cuda="13.0", num_torch_gpus=0, cuda_error="driver is too old")
    status, detail = count(2, software=failed)
    assert status == "error"
    assert "driver is too old" in detail


def test_without_a_gpu_every_finding_is_absent() -> None:
    findings = judge_gpus(NO_DRIVER, software=Software(), demanded=0, in_container=False)
    assert {finding.status for finding in findings} == {"absent"}
    assert len(findings) == 10
