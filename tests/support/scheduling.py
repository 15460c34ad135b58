"""Requests for a scheduler, and a stand-in for the model behind it, which says what comes next by
arithmetic.
"""

from runner.engine.kv_blocks import BlockPool
from runner.engine.request import Request
from runner.engine.scheduler import Output, Scheduled, Scheduler
from runner.engine.sequence import NOT_FINITE
from runner.engine.step_size import StepSizes

STOP, FAULT = 0, 16


def token(request_id: int, position: int) -> int:
    """What the stand-in puts at a place of a sequence; now and then STOP."""
    return (7919 * request_id + 31 * position) % 17


def request(
    request_id: int, prompt_len: int, max_tokens: int, *stops: int, family: int | None = None
) -> Request:
    """Requests of one family have one beginning; without, nobody else has this one's."""
    prompt = (100 + request_id if family is None else family,) * prompt_len
    return Request(request_id, prompt, max_tokens, stop_token_ids=frozenset(stops))


def scheduler_of(
    pool: BlockPool | None = None,
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 100,
    num_groups: int = 1,
    runs_ahead: bool = False,
    rope_switch_length: int | None = None,
    sizes: StepSizes | None = None,
) -> Scheduler:
    return Scheduler(
        pool or BlockPool(100, 4),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_groups=num_groups,
        runs_ahead=runs_ahead,
        rope_switch_length=rope_switch_length,
        sizes=sizes,
    )


def shape(scheduled: list[Scheduled]) -> list[tuple[int, int]]:
    """Who, and how many tokens."""
    return [(part.sequence.request.request_id, part.num_tokens) for part in scheduled]


def commit(
    scheduler: Scheduler, scheduled: list[Scheduled], *, failing: bool = False
) -> list[Output]:
    """Give each sequence that samples the stand-in's token; where some fail, no FAULT."""
    sequences = [part.sequence for part in scheduled if part.samples]
    ids = [token(s.request.request_id, len(s.token_ids)) for s in sequences]
    if failing:
        ids = [NOT_FINITE if id_ == FAULT else id_ for id_ in ids]
    return scheduler.commit(scheduled, ids)
