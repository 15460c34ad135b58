"""What an operator of ONNX becomes: a function, and which of its operands are no tensors.

Not here: the operators.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Attributes = Mapping[str, Any]

Operand = Any
"""A torch tensor, a numpy array where the operator wants one, or None for what is left out."""


class UnsupportedError(ValueError):
    """A case of an operator that we do not compute; says which."""


def _nothing(_: Attributes) -> None:
    """Every attribute is supported."""


@dataclass(frozen=True)
class Converter:
    """How an operator is computed.

    Attributes:
        run: (attributes, *operands) -> a tensor, or a tuple of one for each output.
        host: positions of operands that are numpy arrays: a shape, axes, sizes, bounds.
        check: raises UnsupportedError for attributes that are not supported.
        num_outputs: how many it computes at most; None: as many as the node has.
    """

    run: Callable[..., Any]
    host: tuple[int, ...] = ()
    check: Callable[[Attributes], None] = _nothing
    num_outputs: int | None = 1


def integers(operand: Operand) -> list[int] | None:
    """The numbers of a shape or of axes; None stays None."""
    return None if operand is None else [int(value) for value in np.atleast_1d(operand)]


def axes_of(attributes: Attributes, operand: Operand) -> list[int] | None:
    """Axes were an attribute before they became an operand."""
    found = attributes.get("axes")
    return integers(operand if found is None else found)
