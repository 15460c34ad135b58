"""When requests are sent: in an open loop at random times, whatever the server does; in a closed
loop as soon as one of a fixed number of clients is free.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class OpenLoop:
    """Arrivals at random, independent of the answers.

    Gaps are drawn from a gamma distribution of mean 1 / rate and shape `burstiness`: 1 is a Poisson
    process, less is burstier, more is more regular.
    """

    requests_per_s: float
    burstiness: float = 1.0

    def gaps_s(self, seed: int) -> Iterator[float]:
        """Between one request and the next, without end."""
        random = np.random.default_rng(seed)
        scale = 1 / (self.requests_per_s * self.burstiness)
        while True:
            yield float(random.gamma(self.burstiness, scale))


@dataclass(frozen=True)
class ClosedLoop:
    """So many clients, each of which sends its next request when it has its answer."""

    concurrency: int


Loop = OpenLoop | ClosedLoop
