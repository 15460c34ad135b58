"""Finds stop strings in text that arrives in pieces.

Not here: stop token ids, which the engine compares on its own.
"""

from collections.abc import Sequence

from parallel.errors import ConfigError


class StopStrings:
    """Lets text through up to the first stop string, whatever pieces the text comes in.

    The stop string completed by the earliest character wins; of several that end there, the
    longest. Each is followed by its Knuth-Morris-Pratt automaton, so the work for a character does
    not grow with the text, and the state of an automaton is how much text must be held back.

    Attributes:
        stopped: a stop string was found; nothing more is let through.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for any of `stops`; with none, all text passes.

        Raises:
            ConfigError: a stop string is empty.
        """
        if "" in stops:
            raise ConfigError(
                "a stop string is empty; give at least one character, or leave it out"
            )
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns:
            what may be shown now, cut before a stop string, and whether one was found. A suffix
            that may still become a stop string is held back.
        """
        if self.stopped:
            return "", True
        if not self._automata:
            return text, False
        buffer = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            found = max((stop.advance(char) for stop in self._automata), default=0)
            if found:
                self._held, self.stopped = "", True
                return buffer[: end - found], True
        safe = len(buffer) - max((stop.matched for stop in self._automata), default=0)
        self._held = buffer[safe:]
        return buffer[:safe], False

    def flush(self) -> str:
        """What is still held back, when no more text will come."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """How many characters at the end of the text so far are the beginning of one string."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._fallback = _borders(pattern)
        self.matched = 0

    def advance(self, char: str) -> int:
        """Follow one character; returns the length of the string if it is now complete, else 0."""
        while self.matched and self._pattern[self.matched] != char:
            self.matched = self._fallback[self.matched - 1]
        if self._pattern[self.matched] == char:
            self.matched += 1
        return self.matched if self.matched == len(self._pattern) else 0


def _borders(pattern: str) -> list[int]:
    """For each prefix of `pattern`, how long its longest proper prefix is that also ends it.

    >>> _borders("ababc")
    [0, 0, 1, 2, 0]
    """
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders
