"""What rank 0 tells the others before each step: requests that arrived, requests that ended, and
when to leave.

Everything that depends on text, on a clock or on a client is decided on rank 0 and travels here;
all else every rank works out by itself.
"""

import json
from dataclasses import dataclass, field

from runner.engine.request import Request


@dataclass(frozen=True)
class Control:
    """One step's message.

    Attributes:
        added: requests to queue.
        aborted: ids of requests to forget.
        leave: there is no further step.
    """

    added: list[Request] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    leave: bool = False

    def encode(self) -> bytes:
        """JSON; empty where there is nothing to say."""
        if not (self.added or self.aborted or self.leave):
            return b""
        added = [request.to_dict() for request in self.added]
        values = {"added": added, "aborted": self.aborted, "leave": self.leave}
        return json.dumps(values).encode()

    @classmethod
    def decode(cls, message: bytes) -> "Control":
        if not message:
            return cls()
        values = json.loads(message)
        added = [Request.from_dict(request) for request in values["added"]]
        return cls(added, values["aborted"], values["leave"])
