"""The forward-only pipeline of micro-batches: how long it will take.

Pure. The order is the same on every stage: micro-batch 0, 1, 2 and so on. Not here: running it, nor
measuring the times that it is predicted from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.errors import ConfigError


@dataclass(frozen=True)
class Prediction:
    """What the schedule makes of the times of its stages.

    Attributes:
        makespan: from the start of the first micro-batch on the first stage to the end of the last
            one on the last stage, in the unit of the stage times.
        bubble: idle share of the stages' time within the makespan, 0 to less than 1.
    """

    makespan: float
    bubble: float


def predict(
    stage_times: Sequence[float],
    num_microbatches: int,
    transfer_times: Sequence[float] | None = None,
) -> Prediction:
    """Play the schedule through.

    A stage starts a micro-batch when it has received it and has finished the one before. A send
    overlaps with compute; one boundary carries one micro-batch at a time, and the receiver has
    room for all that arrive. For p equal stages and m micro-batches the bubble is then
    (p - 1) / (m + p - 1) (Huang et al., GPipe, 2019).

    Args:
        stage_times: what each stage takes for one micro-batch.
        num_microbatches: of equal size.
        transfer_times: what each boundary takes for one micro-batch, one fewer than stages; None:
            nothing. Same unit as `stage_times`.

    Raises:
        ConfigError: no stage, no micro-batch, negative times, stages that take no time at all, or
            a number of transfer times that does not fit.
    """
    transfers = [0.0] * (len(stage_times) - 1) if transfer_times is None else transfer_times
    _check(stage_times, num_microbatches, transfers)
    compute_free = [0.0] * len(stage_times)
    link_free = [0.0] * len(transfers)
    for _ in range(num_microbatches):
        arrival = 0.0
        for stage, stage_time in enumerate(stage_times):
            compute_free[stage] = max(arrival, compute_free[stage]) + stage_time
            if stage < len(transfers):
                link_free[stage] = max(compute_free[stage], link_free[stage]) + transfers[stage]
                arrival = link_free[stage]
    makespan = compute_free[-1]
    busy = num_microbatches * sum(stage_times)
    # Rounding may make the busy time of a single stage exceed its makespan by a hair.
    return Prediction(makespan, max(0.0, 1 - busy / (len(stage_times) * makespan)))


def _check(
    stage_times: Sequence[float], num_microbatches: int, transfer_times: Sequence[float]
) -> None:
    if not stage_times or num_microbatches < 1:
        raise ConfigError(
            f"a pipeline of {len(stage_times)} stages and {num_microbatches} micro-batches; it "
            "takes at least one of each"
        )
    if len(transfer_times) != len(stage_times) - 1:
        raise ConfigError(
            f"{len(transfer_times)} transfer times for {len(stage_times)} stages; give one for "
            f"each of the {len(stage_times) - 1} boundaries"
        )
    if min((*stage_times, *transfer_times)) < 0 or sum(stage_times) <= 0:
        raise ConfigError(
            f"stage times {list(stage_times)} and transfer times {list(transfer_times)}; none may "
            "be negative, and one stage at least must take time"
        )
