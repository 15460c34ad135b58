"""The formulas, on timelines made by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.bench.load.result import load_result
from runner.bench.load.slo import Slo
from runner.bench.load.timeline import FORMULAS, Timeline


def timeline(sent_at: float, *chunks_at: float, tokens: int | None = None) -> Timeline:
    return Timeline(sent_at, sent_at, list(chunks_at), chunks_at[-1], 10, tokens)


def failed(sent_at: float, kind: str, detail: str = "") -> Timeline:
    return Timeline(sent_at, sent_at, ended_at=sent_at + 0.1, error=kind, detail=detail)


def test_latencies_of_one_request() -> None:
    """Seven tokens in three chunks: tpot counts tokens, itl chunks."""
    one = timeline(10.0, 10.5, 11.0, 13.5, tokens=7)
    assert (one.ttft_s, one.e2e_s) == (0.5, 3.5)
    assert one.tpot_s == pytest.approx(3.0 / 6)
    assert one.itls_s == [0.5, 2.5]


def test_without_usage_chunks_are_counted() -> None:
    one = timeline(0.0, 1.0, 2.0, 4.0)
    assert one.num_output_tokens == 3
    assert one.tpot_s == pytest.approx(3.0 / 2)
    assert load_result([one], [])["counted_by"] == ["chunks"]


def test_one_token_has_no_tpot() -> None:
    one = timeline(0.0, 1.0, tokens=1)
    assert one.tpot_s is None
    result = load_result([one], [])
    assert result["tpot_ms"] is result["itl_ms"] is None


@given(
    st.lists(st.floats(0.001, 10), min_size=1, max_size=20), st.floats(0, 100), st.integers(2, 99)
)
def test_parts_make_the_whole(gaps: list[float], sent_at: float, tokens: int) -> None:
    times = [sent_at + sum(gaps[: i + 1]) for i in range(len(gaps))]
    one = timeline(sent_at, *times, tokens=tokens)
    assert one.ttft_s + sum(one.itls_s) == pytest.approx(one.e2e_s)
    assert one.tpot_s is not None
    assert one.ttft_s + one.tpot_s * (tokens - 1) == pytest.approx(one.e2e_s)


def test_rates_leave_failures_out_but_not_their_time() -> None:
    """Two complete of four, from 0 to 5 s: 7 + 5 tokens out, 10 in for each."""
    timelines = [
        timeline(0.0, 1.0, 2.0, tokens=7),
        failed(0.0, "HTTP 429", "full"),
        timeline(1.0, 2.0, 5.0, tokens=5),
        failed(0.5, "HTTP 429", "full again"),
    ]
    result = load_result(timelines, [Slo("ttft", 1000), Slo("tpot", 500)])
    assert (result["num_requests"], result["num_complete"]) == (4, 2)
    assert result["errors"] == {"HTTP 429": {"count": 2, "first": "full"}}
    assert result["requests_per_s"] == pytest.approx(2 / 5)
    assert result["output_tokens_per_s"] == pytest.approx(12 / 5)
    assert result["total_tokens_per_s"] == pytest.approx(32 / 5)
    assert result["tokens_per_chunk"] == pytest.approx(12 / 4)
    # The second takes 3 s for the 4 tokens after its first, so 750 ms each.
    assert result["goodput_requests_per_s"] == pytest.approx(1 / 5)
    assert result["e2e_ms"]["mean"] == pytest.approx(3000)
    assert result["formulas"] == FORMULAS


def test_only_failures_have_no_latencies() -> None:
    result = load_result([failed(0.0, "timeout")], [Slo("e2e", 1)])
    assert result["e2e_ms"] is result["tokens_per_chunk"] is None
    assert result["requests_per_s"] == result["goodput_requests_per_s"] == 0


def test_without_an_slo_there_is_no_goodput() -> None:
    assert load_result([timeline(0.0, 1.0)], [])["goodput_requests_per_s"] is None
