"""The JSON of an inference request. Strict, as the bodies of a language model's requests are."""

from typing import Any

from pydantic import Field

from runner.config.section import Count, Section


class TensorParameters(Section):
    """Where an input's values are, if not in its data."""

    binary_data_size: int | None = Field(default=None, ge=0)
    """Bytes after the JSON."""


class InputTensor(Section):
    """One input, of all samples."""

    name: str
    """Name of the input."""
    datatype: str
    """Type of its elements, such as FP32."""
    shape: list[Count]
    """Sizes of its dims, the number of samples first."""
    parameters: TensorParameters = TensorParameters()
    data: list[Any] | None = None
    """Its values, row by row, nested or flat."""


class OutputParameters(Section):
    """How an output is returned."""

    binary_data: bool | None = None
    """Whether as bytes after the JSON; null means as binary_data_output says."""


class WantedOutput(Section):
    """One output that is to be returned."""

    name: str
    """Name of the output."""
    parameters: OutputParameters = OutputParameters()


class RequestParameters(Section):
    """What holds for the whole request."""

    binary_data_output: bool = False
    """Whether outputs are returned as bytes after the JSON."""
    timeout: Count | None = None
    """Microseconds that the answer may take."""
    priority: int = Field(default=0, ge=0)
    """Of those that wait 1 goes first, then 2 and so on; 0 goes after all that name one."""


class InferRequest(Section):
    """The JSON of POST /v2/models/NAME/infer."""

    id: str | None = None
    """What the answer is to repeat."""
    parameters: RequestParameters = RequestParameters()
    inputs: list[InputTensor]
    """Every input of the model."""
    outputs: list[WantedOutput] | None = None
    """Outputs to return, in this order; null means all."""
