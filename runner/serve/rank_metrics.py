"""The ranks for Prometheus: steps, the time in them, compilations, and the pipeline's bubble."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from parallel.progress import Progress
from parallel.topology import Topology
from runner.serve.exposition import PREFIX
from runner.serve.health import Health

_LABELS = ("rank", "stage")


class RankMetrics(Collector):
    """What the ranks' loops have written, at the moment that it is asked for."""

    def __init__(self, health: Health, topology: Topology) -> None:
        self._health = health
        stages = [topology.coordinate(rank).stage for rank in range(topology.world_size)]
        self._labels = [(str(rank), str(stage)) for rank, stage in enumerate(stages)]

    def describe(self) -> list[Metric]:
        """Nothing is read when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        ranks = self._health.ranks()
        if not ranks:
            return
        steps = SummaryMetricFamily(
            f"{PREFIX}_rank_step_seconds",
            "Time that a rank computes in a step, collectives of its stage included.",
            labels=_LABELS,
        )
        for labels, rank in zip(self._labels, ranks, strict=True):
            steps.add_metric(labels, count_value=rank.num_steps, sum_value=rank.busy_ns / 1e9)
        yield steps
        compilations = CounterMetricFamily(
            f"{PREFIX}_rank_compilations",
            "Compilations of a rank since it began; what grows while serving are recompilations.",
            labels=_LABELS,
        )
        self._add(compilations.add_metric, ranks, lambda rank: rank.num_compilations)
        yield compilations
        quiet = GaugeMetricFamily(
            f"{PREFIX}_rank_quiet_seconds",
            "Since a rank last went on to something else; 0 before it steps.",
            labels=_LABELS,
        )
        self._add(quiet.add_metric, ranks, lambda rank: rank.quiet_s() or 0.0)
        yield quiet
        yield GaugeMetricFamily(
            f"{PREFIX}_pipeline_bubble",
            "Share of the ranks' time in which they did not compute, while there was work.",
            bubble(ranks),
        )

    def _add(
        self,
        add: Callable[[tuple[str, str], float], None],
        ranks: Iterable[Progress],
        value_of: Callable[[Progress], float],
    ) -> None:
        for labels, rank in zip(self._labels, ranks, strict=True):
            add(labels, value_of(rank))


def bubble(ranks: list[Progress]) -> float:
    """Since the start; 0 where there has been no work.

    The share is of ranks x the time in which there was work, which all of them see alike.
    """
    active_ns = max(rank.active_ns for rank in ranks)
    if not active_ns:
        return 0.0
    return max(0.0, 1 - sum(rank.busy_ns for rank in ranks) / (len(ranks) * active_ns))
