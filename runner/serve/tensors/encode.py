"""From the outputs of samples to the bytes of an answer."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from runner.serve.errors import ApiError
from runner.serve.tensors.decode import Asked
from runner.serve.tensors.signature import Signature, datatype_of


def encode(
    asked: Asked,
    results: Sequence[Sequence[torch.Tensor]],
    signature: Signature,
    about: Mapping[str, str],
) -> tuple[bytes, dict[str, str]]:
    """Make an answer.

    Args:
        results: of each sample its outputs.
        about: what an answer begins with.

    Returns:
        Its body, and its headers.

    Raises:
        ApiError: 400: JSON cannot hold the values.
    """
    outputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for index, is_binary in asked.outputs:
        tensors = [result[index] for result in results]
        spec = signature.outputs[index]
        told: dict[str, Any] = {
            "name": spec.name,
            "datatype": datatype_of(spec.dtype),
            "shape": [len(tensors)] * signature.is_batched + list(tensors[0].shape),
        }
        if is_binary:
            parts.append(b"".join(map(_bytes_of, tensors)))
            told["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            told["data"] = _listed(torch.stack(tensors), spec.name)
        outputs.append(told)
    values = {**about, **({} if asked.id is None else {"id": asked.id}), "outputs": outputs}
    head = json.dumps(values).encode()
    if not parts:
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *parts]), {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }


def _bytes_of(tensor: torch.Tensor) -> bytes:
    # NumPy has no bfloat16.
    stored = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return stored.numpy().tobytes()


def _listed(tensor: torch.Tensor, name: str) -> list[Any]:
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ApiError(
            400,
            f"output {name} holds NaN or infinity, which JSON cannot; ask for it with binary_data",
        )
    return tensor.flatten().tolist()
