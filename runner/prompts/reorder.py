"""Results in the order of their prompts, though they come in another."""

from typing import Generic, TypeVar

T = TypeVar("T")


class Reorder(Generic[T]):
    """Holds back what has come too early; turns count up from 0, and each comes once."""

    def __init__(self) -> None:
        self._next = 0
        self._held: dict[int, T] = {}

    def put(self, turn: int, result: T) -> list[T]:
        """What can be let through now that the result of a turn is here, in order."""
        self._held[turn] = result
        ready = []
        while self._next in self._held:
            ready.append(self._held.pop(self._next))
            self._next += 1
        return ready
