"""`Exposition`: metrics of one server in Prometheus' format. Which there are, beside how requests
ended, is its subclasses'.
"""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.registry import Collector

from runner.serve.distribution import Distribution

PREFIX = "shardline"
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
_SIZES = tuple(2**power for power in range(14))


class Exposition:
    """A registry, and makers of metrics in it; the client library locks by itself."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._finished = self._counter(
            "request_success", "Requests by why they ended.", "finished_reason"
        )

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)

    def ended(self) -> dict[str, int]:
        """Requests so far by why they ended."""
        samples = [s for metric in self._finished.collect() for s in metric.samples]
        return {
            s.labels["finished_reason"]: int(s.value) for s in samples if s.name.endswith("_total")
        }

    def add(self, collector: Collector) -> None:
        """Tell what `collector` reads, too."""
        self._registry.register(collector)

    def _seconds(self, name: str, says: str) -> Distribution:
        return self._distribution(f"{name}_seconds", says, _SECONDS)

    def _sizes(self, name: str, says: str) -> Distribution:
        return self._distribution(name, says, _SIZES)

    def _distribution(self, name: str, says: str, bounds: Sequence[float]) -> Distribution:
        made = Distribution(f"{PREFIX}_{name}", says, bounds)
        self.add(made)
        return made

    def _gauge(self, name: str, says: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", says, registry=self._registry)

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", says, labels, registry=self._registry)
