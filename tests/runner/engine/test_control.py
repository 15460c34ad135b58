"""Rank 0's message before a step arrives as it was sent."""

from hypothesis import given, settings
from hypothesis import strategies as st

from runner.engine.control import Control
from runner.engine.request import Request, SamplingParams

IDS = st.integers(0, 2**40)

SAMPLING = st.builds(
    SamplingParams,
    temperature=st.just(0.0) | st.floats(1e-5, 1e5),
    top_k=st.integers(0, 1000),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(1e-9, 1e9),
    seed=st.integers(0, 2**64 - 1),
)
REQUESTS = st.builds(
    Request,
    request_id=IDS,
    prompt_ids=st.lists(IDS, min_size=1, max_size=5).map(tuple),
    max_tokens=st.integers(1, 10**6),
    sampling=SAMPLING,
    stop_token_ids=st.frozensets(IDS, max_size=3),
)


@settings(deadline=None)
@given(
    st.builds(
        Control,
        added=st.lists(REQUESTS, max_size=3),
        aborted=st.lists(IDS, max_size=3),
        leave=st.booleans(),
    )
)
def test_what_is_decoded_is_what_was_encoded(control: Control) -> None:
    assert Control.decode(control.encode()) == control


def test_nothing_to_say_takes_no_bytes() -> None:
    assert Control().encode() == b""
    assert Control.decode(b"") == Control()


def test_each_part_is_worth_a_message() -> None:
    for control in (Control([Request(0, (1,), 1)]), Control(aborted=[0]), Control(leave=True)):
        assert control.encode() != b""
