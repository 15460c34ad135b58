"""What Prometheus is told, under the names that the field uses.

Written by the engine's thread, read by the server's.
"""

from collections.abc import Sequence
from typing import Any

from runner.engine.scheduler import Load, StepSummary
from runner.serve.exposition import Exposition
from runner.serve.history import TokenHistory
from runner.serve.ticket import Ticket


class Metrics(Exposition):
    """Of a server of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self._history = TokenHistory()
        self._first_token = self._seconds("time_to_first_token", "From arrival to the first token.")
        self._inter_token = self._seconds("inter_token_latency", "From one token to the next.")
        self._queued = self._seconds("request_queue_time", "From arrival to the first step.")
        self._sequences = self._sizes("step_sequences", "Sequences of a step: the batch.")
        self._tokens = self._sizes("step_tokens", "Tokens of a step, of prompts and generated.")
        self._steps = self._counter("steps", "Steps by why they took no more.", "cut")
        self._end_to_end = self._seconds("e2e_request_latency", "From arrival to the last token.")
        self._running = self._gauge("num_requests_running", "Requests in the batch.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait for a place.")
        self._cache_usage = self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self._preempted = self._counter("num_preemptions", "Sequences that gave way.")
        self._prefix_tokens = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens that were known.")
        self._shown = Load(0, 0, 0.0, 0, 0, 0)
        self._prompt = self._counter("prompt_tokens", "Tokens of finished requests' prompts.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")

    def recent(self) -> dict[str, Any]:
        """See `runner.serve.status_api.Told`."""
        return self._history.told()

    def show(self, load: Load) -> None:
        """How busy the engine is before a step."""
        self._running.set(load.num_running)
        self._waiting.set(load.num_waiting)
        self._cache_usage.set(load.cache_usage)
        before, self._shown = self._shown, load
        self._preempted.inc(load.num_preempted - before.num_preempted)
        self._prefix_tokens.inc(load.prompt_tokens - before.prompt_tokens)
        self._prefix_hits.inc(load.cached_tokens - before.cached_tokens)
        self._history.show(load)

    def step(self, step: StepSummary) -> None:
        """A step has been made."""
        self._sequences.observe(step.num_sequences)
        self._tokens.observe(step.num_tokens)
        self._steps.labels(cut=step.cut).inc()

    def queued(self, seconds: float) -> None:
        """A request has come out of the queue, so long after it came."""
        self._queued.observe(seconds)

    def tokens(self, first_s: Sequence[float], inter_s: Sequence[float]) -> None:
        """A step has given tokens to requests: first ones, and others.

        Args:
            first_s: since each of these requests came.
            inter_s: since the token before.
        """
        self._generated.inc(len(first_s) + len(inter_s))
        for seconds in first_s:
            self._first_token.observe(seconds)
        for seconds in inter_s:
            self._inter_token.observe(seconds)
        self._history.tokens(first_s, inter_s)

    def finished(self, reason: str, ticket: Ticket | None = None, now: float = 0.0) -> None:
        """A request has ended.

        Args:
            ticket: where it was answered.
        """
        self._finished.labels(finished_reason=reason).inc()
        if ticket:
            self._end_to_end.observe(now - ticket.arrived)
            self._history.finished(now - ticket.arrived)
            self._prompt.inc(len(ticket.completion.request.prompt_ids))
        elif reason != "cancelled":
            self._history.failed()
