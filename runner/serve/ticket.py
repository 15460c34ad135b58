"""`Ticket`: one request between the engine's thread, which adds to it, and the server's, which
reads it.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from runner.engine.completion import Completion, CompletionText
from runner.engine.scheduler import Output
from runner.serve.errors import ApiError


class Piece(NamedTuple):
    """What has been added to an answer.

    Attributes:
        tokens: places of the tokens that it came of, where their probabilities were asked for.
        finish_reason: of the last piece.
        error: why there is no more; the last piece.
    """

    text: str = ""
    tokens: range = range(0)
    finish_reason: str | None = None
    error: ApiError | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass
class Ticket:
    """A request on its way.

    Attributes:
        loop: the server's, of which there is one.
        deadline: on `time.monotonic`'s clock; None: it may take any time.
        arrived, last: when it came, and its latest token; on that clock.
    """

    text: CompletionText
    deadline: float | None
    loop: asyncio.AbstractEventLoop
    pieces: "asyncio.Queue[Piece]" = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.monotonic)
    last: float | None = None
    _num_told: int = 0

    @property
    def completion(self) -> Completion:
        return self.text.completion

    @property
    def request_id(self) -> int:
        return self.completion.request.request_id

    def take(self, output: Output) -> tuple[Piece | None, bool]:
        """Add a token.

        Returns:
            What it adds to the answer, to be put, if that is certain yet; and whether a stop string
            ended what the engine would go on with.
        """
        completion = self.text.completion
        text, stopped = self.text.take(output)
        if not text and completion.finish_reason is None:
            return None, stopped
        tokens = range(self._num_told, len(completion.logprobs))
        self._num_told = tokens.stop
        return Piece(text, tokens, completion.finish_reason), stopped

    def put(self, piece: Piece) -> None:
        """Hand a piece to the server's thread, whatever its reader does."""
        put_all([(self, piece)])


def put_all(pieces: Sequence[tuple[Ticket, Piece]]) -> None:
    """Hand the pieces of a step to the server's thread at once: each call wakes it, which costs a
    step of many sequences more than all else that the host does.
    """
    if pieces:
        with contextlib.suppress(RuntimeError):  # The server has ended.
            pieces[0][0].loop.call_soon_threadsafe(_put_here, pieces)


def _put_here(pieces: Sequence[tuple[Ticket, Piece]]) -> None:
    for ticket, piece in pieces:
        ticket.pieces.put_nowait(piece)
