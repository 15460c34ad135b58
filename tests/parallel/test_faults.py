"""What an exception in the middle of a job is taken for."""

from pathlib import Path

import pytest
import torch

from parallel.errors import DoesNotFitError, RankLostError, StalledError
from parallel.faults import as_rank_error, is_disk_full


def test_an_error_of_this_rank_names_what_it_was_doing() -> None:
    error = as_rank_error(ValueError("no such thing\nmore"), "loading weights")
    assert str(error) == "ValueError while loading weights: no such thing"
    assert isinstance(error, RankLostError)
    assert not error.peer


@pytest.mark.parametrize("doing", ["loading weights", "generating"])
def test_memory_that_runs_out_says_what_to_change(doing: str) -> None:
    error = as_rank_error(torch.OutOfMemoryError("CUDA out of memory"), doing)
    assert isinstance(error, DoesNotFitError)
    assert error.exit_code == 6
    assert doing in str(error)
    assert "--max-model-len" in str(error)


@pytest.mark.parametrize(
    ("error", "is_stalled", "is_peer"),
    [
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc] Timed out waiting"), True, True),
        (RuntimeError("Application timeout caused pair closure"), True, True),
        (torch.distributed.DistStoreError("wait timeout after 300000ms"), True, True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), False, True),
        (torch.distributed.DistNetworkError("failed to recv"), False, True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, False),
        (ValueError("Broken pipe"), False, False),
    ],
    ids=lambda value: str(value) if isinstance(value, Exception) else "",
)
def test_an_error_tells_whether_this_rank_or_another_is_at_fault(
    error: Exception, is_stalled: bool, is_peer: bool
) -> None:
    told = as_rank_error(error, "decoding")
    assert isinstance(told, StalledError) == is_stalled
    assert told.peer == is_peer
    words = str(error).rpartition("] ")[2]
    assert str(told).startswith(f"{type(error).__name__} while decoding: ")
    assert words in str(told)
    assert ("distributed." in str(told)) == is_stalled
    assert "pair.cc" not in str(told), "where in its source a library failed helps no user"


def test_only_the_first_line_of_an_error_is_told() -> None:
    error = RuntimeError("NCCL error: unhandled\nLast error:\n a stack")
    assert str(as_rank_error(error, "loading")) == (
        "RuntimeError while loading: NCCL error: unhandled"
    )


def test_a_full_disk_is_known_through_whatever_came_of_it() -> None:
    with (
        pytest.raises(OSError, match="No space left") as caught,
        Path("/dev/full").open("w") as full,
    ):
        full.write("x")
    assert is_disk_full(caught.value)
    wrapped = RuntimeError("cannot save")
    wrapped.__cause__ = caught.value
    assert is_disk_full(wrapped)
    wrapped.__cause__, wrapped.__context__ = None, caught.value
    assert not is_disk_full(wrapped)  # It says that it did not come of that.
    assert not is_disk_full(PermissionError(13, "Permission denied"))
    # Shared memory is no disk.
    nccl = "Error while creating shared memory segment /dev/shm/nccl-1: No space left on device"
    assert not is_disk_full(RuntimeError(nccl))
