"""`Exposition`: metrics of one server in Prometheus' format. Which there are is its subclasses'."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector

PREFIX = "shardline"
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Exposition:
    """A registry, and makers of metrics in it; the client library locks by itself."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)

    def add(self, collector: Collector) -> None:
        """Tell what `collector` reads, too."""
        self._registry.register(collector)

    def _seconds(self, name: str, says: str) -> Histogram:
        full = f"{PREFIX}_{name}_seconds"
        return Histogram(full, says, buckets=_SECONDS, registry=self._registry)

    def _sizes(self, name: str, says: str) -> Histogram:
        sizes = [2**power for power in range(14)]
        return Histogram(f"{PREFIX}_{name}", says, buckets=sizes, registry=self._registry)

    def _gauge(self, name: str, says: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", says, registry=self._registry)

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", says, labels, registry=self._registry)
