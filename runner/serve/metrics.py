"""What Prometheus is told, under the names that the field uses.

Written by the engine's thread, read by the server's; the client library locks by itself.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from runner.engine.scheduler import Load
from runner.serve.ticket import Ticket

_PREFIX = "shardline"
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._first_token = self._seconds("time_to_first_token", "From arrival to the first token.")
        self._inter_token = self._seconds("inter_token_latency", "From one token to the next.")
        self._end_to_end = self._seconds("e2e_request_latency", "From arrival to the last token.")
        self._running = self._gauge("num_requests_running", "Requests in the batch.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait for a place.")
        self._cache_usage = self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self._preempted = self._gauge("num_preemptions", "Sequences that gave way, so far.")
        self._prefix_tokens = self._gauge("prefix_cache_queries", "Prompt tokens looked up.")
        self._prefix_hits = self._gauge("prefix_cache_hits", "Prompt tokens that were known.")
        self._prompt = self._counter("prompt_tokens", "Tokens of finished requests' prompts.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._finished = Counter(
            f"{_PREFIX}_request_success",
            "Requests by why they ended.",
            ["finished_reason"],
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All of them, in Prometheus' format."""
        return generate_latest(self._registry)

    def show(self, load: Load) -> None:
        """How busy the engine is before a step."""
        self._running.set(load.num_running)
        self._waiting.set(load.num_waiting)
        self._cache_usage.set(load.cache_usage)
        self._preempted.set(load.num_preempted)
        self._prefix_tokens.set(load.prompt_tokens)
        self._prefix_hits.set(load.cached_tokens)

    def token(self, ticket: Ticket, now: float) -> None:
        """A request gets a token; its times are those before it."""
        self._generated.inc()
        if ticket.last is None:
            self._first_token.observe(now - ticket.arrived)
        else:
            self._inter_token.observe(now - ticket.last)

    def finished(self, reason: str, ticket: Ticket | None = None, now: float = 0.0) -> None:
        """A request has ended.

        Args:
            ticket: where it was answered.
        """
        self._finished.labels(finished_reason=reason).inc()
        if ticket:
            self._end_to_end.observe(now - ticket.arrived)
            self._prompt.inc(len(ticket.completion.request.prompt_ids))

    def _seconds(self, name: str, says: str) -> Histogram:
        full = f"{_PREFIX}_{name}_seconds"
        return Histogram(full, says, buckets=_SECONDS, registry=self._registry)

    def _gauge(self, name: str, says: str) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", says, registry=self._registry)

    def _counter(self, name: str, says: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", says, registry=self._registry)
