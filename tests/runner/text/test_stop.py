import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import ConfigError
from runner.text.stop import StopStrings

# Two letters, so that stop strings overlap with the text, with each other and with themselves.
TEXTS = st.text(alphabet="ab", max_size=30)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: at the first character that completes a stop string, cut the longest."""
    for end in range(len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)], True
    return text, False


def may_become(tail: str, stops: list[str]) -> bool:
    return any(stop.startswith(tail) for stop in stops)


@settings(max_examples=300)
@given(text=TEXTS, stops=STOPS, data=st.data())
def test_any_chunking_gives_what_the_whole_text_gives(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    matcher = StopStrings(stops)
    shown, stopped = "", False
    for chunk in chunks:
        piece, stopped = matcher.push(chunk)
        shown += piece
    assert (shown + matcher.flush(), stopped) == naive(text, stops)
    assert matcher.stopped is stopped


@given(text=TEXTS, stops=STOPS)
def test_holds_back_no_more_than_may_become_a_stop_string(text, stops):
    matcher = StopStrings(stops)
    shown, stopped = matcher.push(text)
    if not stopped:
        held = text[len(shown) :]
        assert held == "" or may_become(held, stops)
        longer = [text[start:] for start in range(len(shown))]
        assert not any(may_become(tail, stops) for tail in longer)


def test_a_stop_string_over_several_pieces():
    matcher = StopStrings(["\n\nUser:"])
    assert [matcher.push(piece) for piece in ["Hello", "\n", "\nUs", "er: hi"]] == [
        ("Hello", False),
        ("", False),
        ("", False),
        ("", True),
    ]
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_what_only_began_like_a_stop_string_is_let_through():
    matcher = StopStrings(["</answer>"])
    assert matcher.push("a </ans") == ("a ", False)
    assert matcher.push("wer") == ("", False)
    assert matcher.push("?>") == ("</answer?>", False)


def test_without_stop_strings_all_text_passes_at_once():
    assert StopStrings([]).push("anything") == ("anything", False)


def test_flush_gives_what_is_held_once():
    matcher = StopStrings(["END"])
    assert matcher.push("the EN") == ("the ", False)
    assert [matcher.flush(), matcher.flush()] == ["EN", ""]


def test_of_two_that_end_together_the_longer_is_cut():
    assert StopStrings(["b", "ab", "zab"]).push("xab") == ("x", True)


def test_the_first_to_be_complete_wins():
    assert StopStrings(["abcd", "bc"]).push("abcd") == ("a", True)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="stop string is empty"):
        StopStrings(["a", ""])
