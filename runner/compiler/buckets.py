"""The numbers of rows that a model is compiled for."""

from collections.abc import Sequence

from parallel.errors import ConfigError


def buckets_of(given: Sequence[int] | None, max_num_batched_tokens: int) -> tuple[int, ...]:
    """Ascending; the last one is the largest step.

    Args:
        given: None: the powers of two below the largest step, and that.

    Raises:
        ConfigError: the largest step would fit into none, or none would reach the last.
    """
    if given is None:
        powers = (1 << i for i in range(max_num_batched_tokens.bit_length()))
        return (*(p for p in powers if p < max_num_batched_tokens), max_num_batched_tokens)
    if given[-1] != max_num_batched_tokens:
        raise ConfigError(
            f"compile.buckets ends with {given[-1]}, but a step may have "
            f"scheduler.max_num_batched_tokens={max_num_batched_tokens} tokens; make the two equal"
        )
    return tuple(given)
