"""Whatever order results come in, they leave in that of their turns, as soon as they can."""

from hypothesis import given
from hypothesis import strategies as st

from runner.prompts.reorder import Reorder


@given(st.permutations(range(12)))
def test_any_order(turns: list[int]) -> None:
    reorder: Reorder[str] = Reorder()
    passed: list[str] = []
    for count, turn in enumerate(turns, start=1):
        passed += reorder.put(turn, str(turn))
        came = set(turns[:count])
        first_missing = next((t for t in range(12) if t not in came), 12)
        assert passed == [str(t) for t in range(first_missing)]
