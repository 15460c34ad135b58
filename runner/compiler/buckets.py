"""The numbers of rows that a model is compiled for."""

from collections.abc import Sequence

from parallel.errors import ConfigError


def buckets_of(
    given: Sequence[int] | None, largest: int, *, limit: str = "scheduler.max_num_batched_tokens"
) -> tuple[int, ...]:
    """Ascending; the last one is the largest step.

    Args:
        given: None: the powers of two below the largest step, and that.
        largest: rows of the largest step.
        limit: the key of the configuration that says so.

    Raises:
        ConfigError: the largest step would fit into none, or none would reach the last.
    """
    if given is None:
        powers = (1 << i for i in range(largest.bit_length()))
        return (*(p for p in powers if p < largest), largest)
    if given[-1] != largest:
        raise ConfigError(
            f"compile.buckets ends with {given[-1]}, but a step may have {limit}={largest} rows; "
            "make the two equal"
        )
    return tuple(given)
