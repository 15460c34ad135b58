"""Names for profilers: what they cost when nobody looks, and when somebody does."""

from collections.abc import Iterator

from torch.profiler import profile

from parallel.annotate import for_torch, unnamed


def never() -> Iterator[int]:
    raise AssertionError("ids are not looked at")
    yield 0


def test_no_profiler_no_range() -> None:
    """One object, made once; the ids of a name are not asked for, and no event is recorded."""
    with profile() as recorded:
        assert unnamed("a", never()) is unnamed("b")
        with unnamed("a", never()), unnamed("a"):
            pass
    assert "a" not in {event.key for event in recorded.key_averages()}


def test_ranges_lie_within_one_another() -> None:
    with profile() as recorded, for_torch("step of requests", [3, 4]), for_torch("all_reduce"):
        pass
    spans = {event.name: event.time_range for event in recorded.events() or ()}
    outer, inner = spans["step of requests 3, 4"], spans["all_reduce"]
    assert outer.start <= inner.start <= inner.end <= outer.end
