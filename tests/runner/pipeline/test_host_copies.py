"""Samples come into a stage's buffers as they are, what lies beyond them is zero, and results are
copies.
"""

import pytest
import torch

from parallel.errors import InternalError
from runner.pipeline.host_copies import DirectCopies, HostCopies, StreamedCopies, fill

CPU = pytest.param("cpu")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = pytest.mark.parametrize("device", [CPU, GPU])


def copies_on(device: str) -> HostCopies:
    return DirectCopies() if device == "cpu" else StreamedCopies(torch.device(device))


@pytest.mark.parametrize("count", [1, 3, 4])
def test_samples_fill_a_batch_and_zeros_the_rest(count: int) -> None:
    buffer = torch.full((4, 2), 7.0)
    samples = [torch.full((2,), float(index)) for index in range(1, count + 1)]
    fill(samples, buffer)
    assert torch.equal(buffer[:count], torch.stack(samples))
    assert not buffer[count:].any()


@pytest.mark.parametrize("shape", [(), (3,), (1, 3)], ids=str)
def test_a_sample_of_the_buffers_own_shape_is_all_of_it(shape: tuple[int, ...]) -> None:
    buffer, sample = torch.zeros(shape), torch.randn(shape)
    fill([sample], buffer)
    assert torch.equal(buffer, sample)


def test_a_sample_becomes_what_the_buffer_holds() -> None:
    buffer = torch.zeros(2, 3, dtype=torch.bfloat16)
    fill([torch.tensor([1.0, 2.0, 3.001])], buffer)
    assert buffer[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("shapes", [[(4,), (4,)], [(3,), (1,)], [(2,)]], ids=str)
def test_samples_of_another_shape_touch_nothing(shapes: list[tuple[int, ...]]) -> None:
    block = torch.full((12,), 7.0)
    with pytest.raises(InternalError, match=r"for a buffer of \[2, 3\]"):
        fill([torch.ones(shape) for shape in shapes], block[:6].view(2, 3))
    assert (block == 7).all()


@DEVICES
def test_what_was_sent_from_a_buffer_is_waited_for_first(device: str) -> None:
    copies, buffer = copies_on(device), torch.zeros(1, 2, device=device)
    seen = []
    copies.put(
        [[torch.ones(2)]], {"x": buffer}, 0, after=lambda: seen.append(buffer.cpu().any().item())
    )
    assert seen == [False]
    assert buffer.cpu().tolist() == [[1, 1]]


@DEVICES
def test_results_are_copies(device: str) -> None:
    """The next batch overwrites what a result may be a view of."""
    copies, buffer = copies_on(device), torch.zeros(2, 2, device=device)
    put(copies, buffer, 1.0)
    fetched = copies.fetch([buffer, buffer[1]], 0)
    put(copies, buffer, 2.0)
    fetched.wait()
    assert [tensor.tolist() for tensor in fetched.tensors] == [[[1, 1], [0, 0]], [0, 0]]


@DEVICES
def test_a_late_reader_still_finds_its_own_batch(device: str) -> None:
    """Several batches go through one slot before anyone looks at their results."""
    copies, buffer = copies_on(device), torch.zeros(4, 1000, device=device)
    fetched = []
    for index in range(8):
        put(copies, buffer, float(index))
        result = buffer * 2
        copies.computed(0)
        fetched.append(copies.fetch([result], 0))
        del result
    for index, one in enumerate(fetched):
        one.wait()
        assert (one.tensors[0][0] == 2 * index).all()


def put(copies: HostCopies, buffer: torch.Tensor, value: float) -> None:
    sample = torch.full(buffer.shape[1:], value)
    copies.put([[sample]], {"x": buffer}, 0, after=lambda: None)
