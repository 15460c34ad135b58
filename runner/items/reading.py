"""One item as the arrays that the model takes, whatever the file is.

Not here: batches; the arrays have no batch dimension.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from parallel.errors import ShardlineError
from runner.items.arrays import read_archive, read_array
from runner.items.images import read_image
from runner.items.item import Item
from runner.items.preprocess import Preprocess
from runner.items.spec import Array, ArraySpec, conform
from runner.items.volumes import read_volume


def read_item(item: Item, inputs: Sequence[ArraySpec], preprocess: Preprocess) -> dict[str, Array]:
    """The arrays of one sample.

    Args:
        inputs: what the model declares; several can be read from a .npz alone.

    Returns:
        {input: array of the declared dtype and shape, C-contiguous}.

    Raises:
        ItemError: the file cannot be read, or does not hold what the model takes.
        PreflightError: the library for this kind is not installed.
    """
    with _decoding(item):
        if item.kind == "archive":
            return read_archive(item, inputs)
        spec = _only(item, inputs)
        if item.kind == "array":
            return {spec.name: read_array(item, spec)}
        if item.kind == "image":
            return {spec.name: conform(item, spec, read_image(item, preprocess.image))}
        return {spec.name: conform(item, spec, read_volume(item, spec, preprocess.volume))}


def _only(item: Item, inputs: Sequence[ArraySpec]) -> ArraySpec:
    if len(inputs) != 1:
        names = ", ".join(spec.name for spec in inputs)
        raise item.error(
            f"{item.path.name} holds one array and the model takes {len(inputs)} inputs; "
            f"give a .npz with {names}"
        )
    return inputs[0]


@contextmanager
def _decoding(item: Item) -> Iterator[None]:
    """Turn what a decoder raises into an ItemError."""
    try:
        yield
    except ShardlineError:
        raise
    except OSError as error:
        raise item.error(f"{item.path} cannot be read ({error.strerror or error})") from error
    # A decoder of another library raises whatever a damaged file leads it to: struct.error,
    # SyntaxError, zlib.error, IndexError. None of it concerns the other items.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise item.error(f"{item.path} cannot be read ({reason})") from error
