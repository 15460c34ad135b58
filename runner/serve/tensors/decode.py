"""From the bytes of an inference request to samples. Not here: who computes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

import numpy as np
import torch

from runner.items.spec import ArraySpec, shape_text
from runner.pipeline.pipeline import Sample
from runner.serve.bodies import parse_body
from runner.serve.errors import ApiError
from runner.serve.tensors.bodies import InferRequest, InputTensor, RequestParameters
from runner.serve.tensors.front import LAST, Haste
from runner.serve.tensors.signature import Signature, datatype_of

MAX_TIMEOUT_S = 1e6
"""What a longer timeout is taken for."""


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        outputs: index of each output to return, and whether as bytes.
    """

    id: str | None
    samples: list[Sample]
    outputs: list[tuple[int, bool]]
    haste: Haste


def decode(body: bytes, header_length: str | None, signature: Signature) -> Asked:
    """Read a request.

    Args:
        header_length: bytes of the JSON, if others follow: Inference-Header-Content-Length.

    Raises:
        ApiError: 400: it is malformed, or not what the model takes.
    """
    size = _header_size(body, header_length)
    try:
        request = parse_body(InferRequest, body[:size])
    except ApiError as error:
        if header_length is not None or b"binary_data_size" not in body:
            raise
        hint = "where bytes follow the JSON, Inference-Header-Content-Length must be its size"
        raise ApiError(error.status, f"{error.message}; {hint}", param=error.param) from None
    parts = _parts(request.inputs, memoryview(body)[size:])
    given = {
        tensor.name: (tensor, part) for tensor, part in zip(request.inputs, parts, strict=True)
    }
    names = [spec.name for spec in signature.inputs]
    if sorted(tensor.name for tensor in request.inputs) != sorted(names):
        told = ", ".join(tensor.name for tensor in request.inputs) or "none"
        raise ApiError(400, f"inputs are {told}; the model takes each of {', '.join(names)} once")
    tensors = [
        _tensor(spec, *given[spec.name], is_batched=signature.is_batched)
        for spec in signature.inputs
    ]
    haste = _haste(request.parameters)
    return Asked(request.id, _samples(tensors, signature), _outputs(request, signature), haste)


def _haste(given: RequestParameters) -> Haste:
    timeout_s = None if given.timeout is None else min(given.timeout / 1e6, MAX_TIMEOUT_S)
    return Haste(timeout_s, given.priority or LAST)


def _header_size(body: bytes, header_length: str | None) -> int:
    if header_length is None:
        return len(body)
    is_number = header_length.isascii() and header_length.isdigit() and len(header_length) < 20
    if not is_number or int(header_length) > len(body):
        raise ApiError(
            400,
            f"Inference-Header-Content-Length: {header_length[:40]!r} is no number from 0 to "
            f"{len(body)}, the size of the body",
        )
    return int(header_length)


def _parts(inputs: Sequence[InputTensor], tail: memoryview) -> list[memoryview | None]:
    """The bytes of each input that has its values there; None: it has data."""
    parts: list[memoryview | None] = []
    start = 0
    for tensor in inputs:
        size = tensor.parameters.binary_data_size
        if (size is None) == (tensor.data is None):
            raise ApiError(400, f"input {tensor.name}: give either data or binary_data_size")
        parts.append(None if size is None else tail[start : start + size])
        start += size or 0
    if start != len(tail):
        raise ApiError(
            400,
            f"{len(tail)} bytes follow the JSON, and the inputs' binary_data_size are {start} "
            "together; Inference-Header-Content-Length must be the size of the JSON",
        )
    return parts


def _tensor(
    spec: ArraySpec, given: InputTensor, part: memoryview | None, *, is_batched: bool
) -> torch.Tensor:
    datatype = datatype_of(spec.dtype)
    if given.datatype != datatype:
        raise ApiError(
            400, f"input {spec.name}: its datatype is {given.datatype}; the model takes {datatype}"
        )
    wanted = (None, *spec.shape) if is_batched else spec.shape
    fits = len(given.shape) == len(wanted) and all(
        size in (None, actual) for size, actual in zip(wanted, given.shape, strict=True)
    )
    if not fits:
        shown = shape_text(tuple(given.shape)) if len(given.shape) < 16 else "of too many dims"
        raise ApiError(
            400, f"input {spec.name}: its shape is {shown}; the model takes {shape_text(wanted)}"
        )
    return _of_list(spec, given) if part is None else _of_bytes(spec, given, part)


def _of_bytes(spec: ArraySpec, given: InputTensor, part: memoryview) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    needed = prod(given.shape) * dtype.itemsize
    if len(part) != needed:
        raise ApiError(
            400, f"input {spec.name}: its shape takes {needed} bytes, and it has {len(part)}"
        )
    # Copied, since torch must own what it may write to. By NumPy, whose operations do not give up
    # the interpreter as torch's do, for which the thread of the pipeline waits.
    stored = {torch.bool: "uint8", torch.bfloat16: "int16"}.get(dtype, spec.dtype)
    values = np.frombuffer(bytearray(part), stored).reshape(given.shape)
    if dtype == torch.bool:
        return torch.from_numpy(values != 0)
    tensor = torch.from_numpy(values)
    return tensor.view(dtype) if tensor.dtype != dtype else tensor


def _of_list(spec: ArraySpec, given: InputTensor) -> torch.Tensor:
    assert given.data is not None
    values = given.data
    if any(isinstance(value, list) for value in values):
        for size in given.shape[1:]:
            if not all(isinstance(row, list) and len(row) == size for row in values):
                raise ApiError(400, f"input {spec.name}: its data is not nested as its shape says")
            values = list(chain.from_iterable(values))
    if len(values) != prod(given.shape):
        raise ApiError(
            400,
            f"input {spec.name}: its shape takes {prod(given.shape)} values, and it has "
            f"{len(values)}",
        )
    if not set(map(type, values)) <= _kinds_of(spec):
        raise ApiError(400, f"input {spec.name}: its data holds what is no {given.datatype}")
    return _converted(spec, values).reshape(given.shape)


def _kinds_of(spec: ArraySpec) -> set[type]:
    """What JSON may hold for it."""
    if spec.dtype == "bool":
        return {bool}
    return {int, float} if "float" in spec.dtype else {int}


def _converted(spec: ArraySpec, values: list[int | float]) -> torch.Tensor:
    """Numbers in the model's dtype, none of them changed in size."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    error = ApiError(
        400, f"input {spec.name}: its data has values beyond {datatype_of(spec.dtype)}"
    )
    try:
        exact = np.array(values, np.float64 if dtype.is_floating_point else spec.dtype)
    except OverflowError:
        raise error from None
    wide = torch.from_numpy(exact)
    tensor = wide.to(dtype)
    if dtype.is_floating_point and not torch.equal(tensor.isinf(), wide.isinf()):
        raise error
    return tensor


def _samples(tensors: Sequence[torch.Tensor], signature: Signature) -> list[Sample]:
    if not signature.is_batched:
        return [tensors]
    if len({len(tensor) for tensor in tensors}) != 1:
        counts = ", ".join(str(len(tensor)) for tensor in tensors)
        raise ApiError(400, f"inputs have {counts} samples; give all the same number")
    return [list(sample) for sample in zip(*tensors, strict=True)]


def _outputs(request: InferRequest, signature: Signature) -> list[tuple[int, bool]]:
    names = [spec.name for spec in signature.outputs]
    default = request.parameters.binary_data_output
    if request.outputs is None:
        return [(index, default) for index in range(len(names))]
    wanted = [output.name for output in request.outputs]
    if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(names):
        told = ", ".join(wanted) or "none"
        raise ApiError(400, f"outputs are {told}; use any of {', '.join(names)}, each once")
    return [
        (
            names.index(o.name),
            default if o.parameters.binary_data is None else o.parameters.binary_data,
        )
        for o in request.outputs
    ]
