"""`ServeFront`: rank 0's side of the clients of a server.

The engine's thread calls `next` and `take`, the server's `submit` and `cancel`; what they share is
guarded by one lock. A client that reads slowly holds nobody up: its pieces wait in its ticket.
"""

import asyncio
import time
from collections.abc import Sequence
from threading import Condition

from runner.engine.completion import NOT_FINITE_LOGITS, Completion, CompletionText
from runner.engine.control import Control
from runner.engine.request import Request
from runner.engine.request_maker import RequestMaker
from runner.engine.scheduler import Output, Scheduler, StepSummary
from runner.serve.errors import ApiError
from runner.serve.lifecycle import State, check_ready, queue_full
from runner.serve.metrics import Metrics
from runner.serve.ticket import Piece, Ticket, put_all
from runner.text.generation_options import GenerationOptions

_REST_S = 1.0
"""An idle engine makes an empty round so often, by which the ranks know that all are there."""


class ServeFront:
    """Requests come and go while the engine steps."""

    def __init__(
        self,
        maker: RequestMaker,
        metrics: Metrics,
        *,
        max_queue_size: int,
        max_num_seqs: int,
        max_model_len: int,
        request_timeout_s: float | None,
    ) -> None:
        """
        Args:
            max_queue_size: requests that may wait beside the `max_num_seqs` that run.
            request_timeout_s: for requests that name none; None: any time.
        """
        self._maker = maker
        self._metrics = metrics
        self._max_open = max_queue_size + max_num_seqs
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._request_timeout_s = request_timeout_s
        self._scheduler: Scheduler | None = None
        self._changed = Condition()
        # The rest is guarded by it.
        self._state: State = "starting"
        self._open: dict[int, Ticket] = {}
        self._unsent: list[Request] = []
        self._aborted: list[int] = []
        self._num_requests = 0
        self._leave_at: float | None = None
        # Of the step that was made last.
        self._counted: StepSummary | None = None
        self._step_began = 0.0
        self._answered: dict[int, Ticket] = {}

    @property
    def state(self) -> State:
        return self._state

    def submit(
        self,
        prompt_ids: Sequence[int],
        options: GenerationOptions,
        timeout_s: float | None,
        *,
        num_logprobs: int | None = None,
    ) -> Ticket:
        """Queue a request; called on the server's event loop.

        Raises:
            ApiError: the server is not ready, the queue is full, or the model cannot run it.
            ConfigError: see `RequestMaker.make`.
        """
        with self._changed:
            self._check_open()
            request = self._maker.make(
                self._num_requests, prompt_ids, options, num_logprobs=num_logprobs
            )
            assert self._scheduler is not None, "a server that is ready has begun"
            if request.max_length > self._scheduler.max_length:
                raise ApiError(
                    400,
                    f"prompt and completion may take {request.max_length} tokens, but the KV "
                    f"cache holds {self._scheduler.max_length}; lower max_tokens",
                )
            timeout_s = timeout_s or self._request_timeout_s
            completion = Completion(str(request.request_id), request)
            ticket = Ticket(
                CompletionText(completion, self._maker.tokenizer, stops=options.stop or ()),
                None if timeout_s is None else time.monotonic() + timeout_s,
                asyncio.get_running_loop(),
            )
            self._num_requests += 1
            self._open[request.request_id] = ticket
            self._unsent.append(request)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request, wherever it is; one that is complete already is not an error."""
        with self._changed:
            if self._open.pop(ticket.request_id, None):
                self._metrics.finished("cancelled")
                self._drop(ticket.request_id)

    def drain(self, timeout_s: float) -> None:
        """Take no more requests, and leave when those that are open are complete, or time is up."""
        with self._changed:
            if self._state == "failed":
                return  # The launcher ends the rank that told it of a failure.
            self._state = "draining"
            self._leave_at = time.monotonic() + timeout_s
            self._changed.notify()

    def fail(self, message: str) -> None:
        """The engine has ended: no open request will be answered."""
        with self._changed:
            self._state = "failed"
            self._end_all(ApiError(500, message))

    def kv_blocks(self, block_size: int) -> int:
        """As many of the longest requests as can run at once."""
        return self._max_num_seqs * -(-self._max_model_len // block_size)

    def begin(self, scheduler: Scheduler) -> None:
        """From here on requests are taken."""
        self._scheduler = scheduler
        with self._changed:
            if self._state == "starting":
                self._state = "ready"

    def next(self) -> Control:
        """What has come and what has ended since the last step; waits a while if nothing runs."""
        if self._scheduler:
            self._metrics.show(self._scheduler.load())
        with self._changed:
            self._count_step()
            if not (self._open or self._aborted or self._leaves()):
                self._changed.wait(_REST_S)
            self._expire()
            if self._leaves():
                self._end_all(ApiError(503, "the server is shutting down"))
                return Control(leave=True)
            control = Control(self._unsent, self._aborted)
            self._unsent, self._aborted = [], []
            self._step_began = time.monotonic()
        return control

    def _count_step(self) -> None:
        """The step that was made since `next` returned, if one was."""
        step = self._scheduler.last_step if self._scheduler else None
        if step is None or step is self._counted:
            return
        self._counted = step
        self._metrics.step(step)
        for request_id in step.admitted:
            if ticket := self._open.get(request_id) or self._answered.pop(request_id, None):
                self._metrics.queued(max(0.0, self._step_began - ticket.arrived))
        self._answered.clear()

    def take(self, outputs: list[Output]) -> None:
        """Add a step's tokens to their requests."""
        now = time.monotonic()
        pieces: list[tuple[Ticket, Piece]] = []
        first_s: list[float] = []
        inter_s: list[float] = []
        with self._changed:
            for output in outputs:
                ticket = self._open.get(output.request_id)
                if ticket is None:
                    continue  # It was cancelled while this was under way.
                if output.failed:
                    del self._open[output.request_id]
                    self._metrics.finished("error")
                    pieces.append((ticket, Piece(error=ApiError(500, NOT_FINITE_LOGITS))))
                    continue
                if ticket.last is None:
                    first_s.append(now - ticket.arrived)
                else:
                    inter_s.append(now - ticket.last)
                ticket.last = now
                if piece := self._take(ticket, output, now):
                    pieces.append((ticket, piece))
            if first_s or inter_s:
                self._metrics.tokens(first_s, inter_s)
            put_all(pieces)

    def _take(self, ticket: Ticket, output: Output, now: float) -> Piece | None:
        piece, stopped = ticket.take(output)
        if stopped:
            self._aborted.append(ticket.request_id)
        if reason := ticket.completion.finish_reason:
            self._answered[ticket.request_id] = self._open.pop(ticket.request_id)
            self._metrics.finished(reason, ticket, now)
        return piece

    def check_open(self) -> None:
        """Find out, before there is any work on it, whether a request would be taken now.

        Raises:
            ApiError: 503 or 429, it would not.
        """
        with self._changed:
            self._check_open()

    def _check_open(self) -> None:
        check_ready(self._state)
        if len(self._open) >= self._max_open:
            self._metrics.finished("refused")
            raise queue_full(
                f"{len(self._open)} requests are open, which is the limit; come again later"
            )

    def _leaves(self) -> bool:
        if self._leave_at is None:
            return False
        return not self._open or time.monotonic() >= self._leave_at

    def _expire(self) -> None:
        """End the requests whose time is up."""
        now = time.monotonic()
        late = [t for t in self._open.values() if t.deadline is not None and now >= t.deadline]
        for ticket in late:
            del self._open[ticket.request_id]
            self._drop(ticket.request_id)
            self._metrics.finished("timeout")
            ticket.put(Piece(error=ApiError(408, "the request took longer than its timeout")))

    def _drop(self, request_id: int) -> None:
        """Let the engine forget a request, if it knows it."""
        unsent = [r for r in self._unsent if r.request_id != request_id]
        if len(unsent) == len(self._unsent):
            self._aborted.append(request_id)
            self._changed.notify()
        self._unsent = unsent

    def _end_all(self, error: ApiError) -> None:
        for ticket in self._open.values():
            self._metrics.finished("error")
            ticket.put(Piece(error=error))
        self._open.clear()
