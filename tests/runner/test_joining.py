"""What a rank on a GPU is confined to, where the GPU is a stand-in."""

import errno
import os
from collections.abc import Iterator
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.errors import PreflightError, RankLostError
from parallel.launch import RankEnv
from runner import joining
from runner.observe.nvml import Gpu

JOB: Any = SimpleNamespace(
    config=SimpleNamespace(kv_cache=SimpleNamespace(gpu_memory_utilization=0.4))
)


def rank_on(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device), rank=1)


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, torch.device]]:
    """What the allocator is told, on the stand-in at PCI bus 0001:1b:00.0."""
    told: list[tuple[float, torch.device]] = []
    gpu = SimpleNamespace(pci_domain_id=1, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *given: told.append(given)
    )
    return told


@pytest.fixture
def other_thread() -> Iterator[int]:
    """A thread that was there before; afterwards all threads may run where they could."""
    before, done = os.sched_getaffinity(0), Event()
    thread = Thread(target=done.wait)
    thread.start()
    assert thread.native_id is not None
    yield thread.native_id
    done.set()
    thread.join()
    joining._pin(before)


@pytest.mark.parametrize(
    ("device_type", "said", "told"),
    [
        ("cuda", "CUDA error: unspecified launch failure", True),
        ("cuda", "NCCL error: unhandled cuda error", True),
        ("cuda", "list index out of range", False),
        ("cpu", "CUDA error: no device", False),
    ],
)
def test_a_job_that_ends_for_a_lost_gpu_says_so(
    monkeypatch: pytest.MonkeyPatch, device_type: str, said: str, told: bool
) -> None:
    gpus = (Gpu(0), Gpu(1, fault="GPU is lost"))
    monkeypatch.setattr(joining, "read_inventory", lambda **_: SimpleNamespace(gpus=gpus))
    job: Any = SimpleNamespace(device_type=device_type)
    with pytest.raises(RankLostError) as caught, joining.as_rank(job, RankEnv(0, 1)):
        raise RuntimeError(said)
    assert said in str(caught.value)
    assert ("GPU 1: GPU is lost; nvidia-smi --gpu-reset" in str(caught.value)) == told


def test_a_full_disk_is_no_lost_rank_and_is_named() -> None:
    job: Any = SimpleNamespace(device_type="cpu")
    with pytest.raises(PreflightError) as caught, joining.as_rank(job, RankEnv(0, 1)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there/file")
    assert "no space left on the disk of /there/file; make room" in str(caught.value)
    assert "TMPDIR" in str(caught.value)


def test_a_container_that_lost_its_gpus_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = SimpleNamespace(gpus=(), reason="Unknown Error")
    monkeypatch.setattr(joining, "read_inventory", lambda **_: answer)
    job: Any = SimpleNamespace(device_type="cuda")
    with pytest.raises(RankLostError) as caught, joining.as_rank(job, RankEnv(0, 1)):
        raise RuntimeError("CUDA error: unknown error")
    assert "no GPU answers any more: Unknown Error" in str(caught.value)


def test_a_rank_gets_its_share_and_all_threads_the_cores_of_its_gpu(
    monkeypatch: pytest.MonkeyPatch,
    shares: list[tuple[float, torch.device]],
    other_thread: int,
) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) == 1:
        pytest.skip("needs two cores")
    core = max(allowed)
    near = {"0001:1b:00.0": {core, 9999}}
    monkeypatch.setattr(joining, "cores_near", near.__getitem__)
    joining.confine(JOB, rank_on("cuda:2"))
    assert shares == [(0.4, torch.device("cuda:2"))]
    assert os.sched_getaffinity(0) == os.sched_getaffinity(other_thread) == {core}


def test_cores_that_are_not_allowed_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
    shares: list[tuple[float, torch.device]],
    other_thread: int,
) -> None:
    allowed = os.sched_getaffinity(0)
    monkeypatch.setattr(joining, "cores_near", lambda _: {9999})
    joining.confine(JOB, rank_on("cuda:0"))
    assert len(shares) == 1
    assert os.sched_getaffinity(0) == os.sched_getaffinity(other_thread) == allowed


@pytest.mark.parametrize(("given", "left"), [(2, 2), (16, joining.MOST_HOST_THREADS)])
def test_a_rank_on_a_gpu_keeps_few_threads_waiting(
    monkeypatch: pytest.MonkeyPatch,
    shares: list[tuple[float, torch.device]],
    given: int,
    left: int,
) -> None:
    del shares
    monkeypatch.setattr(joining, "cores_near", lambda _: set())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(given)
        joining.confine(JOB, rank_on("cuda:0"))
        assert torch.get_num_threads() == left
    finally:
        torch.set_num_threads(before)


def test_a_rank_on_the_cpu_is_not_confined(shares: list[tuple[float, torch.device]]) -> None:
    joining.confine(JOB, rank_on("cpu"))
    assert not shares
