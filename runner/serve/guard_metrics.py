"""What the network guard saw, for Prometheus; read from its report when it is asked for."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from runner.observe.network_guard import count_events
from runner.serve.exposition import PREFIX


class GuardMetrics(Collector):
    """Connections to other hosts, of all processes of the job."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            f"{PREFIX}_network_guard_connections",
            "Connections to other hosts that the network guard refused or saw.",
            labels=["outcome"],
        )
        counts = count_events()
        family.add_metric(["refused"], counts.refused)
        family.add_metric(["seen"], counts.seen)
        yield family
