"""What every front is to the server, whatever its clients ask for: its state, and how it ends."""

from typing import Literal, Protocol

from runner.serve.errors import ApiError

State = Literal["starting", "ready", "draining", "failed"]

RETRY_S = 5
"""When a client that found the server starting or draining may come again."""
_RETRY_FULL_S = 1
"""When a client that found the queue full may come again."""


class Front(Protocol):
    """Rank 0's side of the clients."""

    @property
    def state(self) -> State: ...

    def drain(self, timeout_s: float) -> None:
        """Take no more requests, and leave when those that are open are complete, or time is up."""
        ...

    def fail(self, message: str) -> None:
        """The ranks have ended: no open request will be answered."""
        ...


def check_ready(state: State) -> None:
    """Raises ApiError: 503, no request is taken in this state."""
    if state != "ready":
        raise ApiError(503, f"the server is {state}", headers={"Retry-After": str(RETRY_S)})


def queue_full(message: str) -> ApiError:
    """What a client is told that found the queue full."""
    return ApiError(429, message, headers={"Retry-After": str(_RETRY_FULL_S)})
