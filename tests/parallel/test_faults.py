"""What an exception in the middle of a job is taken for."""

import pytest
import torch

from parallel.errors import DoesNotFitError, RankLostError, StalledError
from parallel.faults import as_rank_error


def test_an_error_of_this_rank_names_what_it_was_doing() -> None:
    error = as_rank_error(ValueError("no such thing\nmore"), "loading weights")
    assert str(error) == "ValueError while loading weights: no such thing"
    assert isinstance(error, RankLostError)
    assert not error.peer


def test_a_lost_connection_is_another_ranks_fault() -> None:
    text = "[/src/third_party/gloo/pair.cc:537] Connection closed by peer [127.0.0.1]:31245"
    error = as_rank_error(RuntimeError(text), "generating")
    assert isinstance(error, RankLostError)
    assert error.peer
    expected = "RuntimeError while generating: Connection closed by peer [127.0.0.1]:31245"
    assert str(error) == expected


def test_a_timeout_is_a_stall() -> None:
    error = as_rank_error(RuntimeError("Timed out waiting 3000ms for recv operation"), "generating")
    assert isinstance(error, StalledError)
    assert error.exit_code == 9
    assert error.peer


@pytest.mark.parametrize("doing", ["loading weights", "generating"])
def test_memory_that_runs_out_says_what_to_change(doing: str) -> None:
    error = as_rank_error(torch.OutOfMemoryError("CUDA out of memory"), doing)
    assert isinstance(error, DoesNotFitError)
    assert error.exit_code == 6
    assert doing in str(error)
    assert "--max-model-len" in str(error)
