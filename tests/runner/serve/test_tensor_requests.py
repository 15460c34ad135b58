"""Requests of the Open Inference Protocol: every dtype there and back; random bytes are refused."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.items.spec import ArraySpec
from runner.serve.errors import ApiError
from runner.serve.tensors.decode import decode
from runner.serve.tensors.encode import encode
from runner.serve.tensors.signature import Signature, datatype_of

DTYPES = ["float32", "float16", "bfloat16", "float64", "int8", "int16", "int32", "int64"]
DTYPES += ["uint8", "bool"]
PAIR = Signature(
    (ArraySpec("a", "float16", (2,)), ArraySpec("b", "uint8", (None,))),
    (ArraySpec("c", "float32", ()),),
    is_batched=True,
)


def signature_of(dtype: str) -> Signature:
    return Signature((ArraySpec("x", dtype, (3,)),), (ArraySpec("y", dtype, (3,)),), True)


@pytest.mark.parametrize("is_binary", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_and_goes(dtype: str, is_binary: bool) -> None:
    values = torch.tensor([[0, 1, 3], [7, 0, 2]]).to(getattr(torch, dtype))
    raw = values.view(torch.uint8).numpy().tobytes()
    tensor: dict[str, Any] = {"name": "x", "datatype": datatype_of(dtype), "shape": [2, 3]}
    if is_binary:
        tensor["parameters"] = {"binary_data_size": len(raw)}
    else:
        tensor["data"] = values.tolist()
    parameters = {"binary_data_output": is_binary}
    head = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    body = head + raw if is_binary else head
    asked = decode(body, str(len(head)), signature_of(dtype))
    assert all(torch.equal(x, row) for (x,), row in zip(asked.samples, values, strict=True))
    answer, headers = encode(asked, asked.samples, signature_of(dtype), {})
    length = int(headers.get("Inference-Header-Content-Length", len(answer)))
    (output,) = json.loads(answer[:length])["outputs"]
    assert (output["datatype"], output["shape"]) == (datatype_of(dtype), [2, 3])
    assert answer[length:] == (raw if is_binary else b"")
    assert is_binary or output["data"] == values.flatten().tolist()


@given(
    sizes=st.tuples(st.integers(-1, 10), st.integers(-1, 10)),
    shapes=st.tuples(*[st.lists(st.integers(-1, 3), max_size=3)] * 2),
    tail=st.binary(max_size=20),
    shift=st.integers(-3, 3),
)
def test_sizes_that_do_not_fit_are_refused(
    sizes: tuple[int, int], shapes: tuple[list[int], list[int]], tail: bytes, shift: int
) -> None:
    """Accepted is a body whose sizes say exactly what is there, and nothing else."""
    inputs = [
        {"name": n, "datatype": t, "shape": s, "parameters": {"binary_data_size": size}}
        for n, t, s, size in zip("ab", ("FP16", "UINT8"), shapes, sizes, strict=True)
    ]
    head = json.dumps({"inputs": inputs}).encode()
    a, b = shapes
    fits = len(a) == len(b) == 2 and a[0] == b[0] > 0 and a[1] == 2 and b[1] > 0
    fits = fits and sizes == (4 * a[0], b[0] * b[1]) and len(tail) == sum(sizes) and not shift
    if fits:
        asked = decode(head + tail, str(len(head)), PAIR)
        assert b"".join(y.numpy().tobytes() for _, y in asked.samples) == tail[sizes[0] :]
        return
    with pytest.raises(ApiError) as caught:
        decode(head + tail, str(len(head) + shift), PAIR)
    assert caught.value.status == 400


@given(header=st.one_of(st.none(), st.text(max_size=25), st.integers().map(str)), body=st.binary())
def test_any_bytes_are_refused(header: str | None, body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        decode(body, header, PAIR)
    assert caught.value.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=4), below),
    max_leaves=12,
)


@given(
    changes=st.dictionaries(
        st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), JSON
    ),
    data=JSON,
)
def test_any_json_is_read_or_refused(changes: dict[str, Any], data: Any) -> None:
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": data} | changes
    body = json.dumps({"inputs": [tensor]}).encode()
    try:
        shapes = {x.shape for (x,) in decode(body, None, signature_of("float32")).samples}
    except ApiError as error:
        shapes = {400: {(3,)}}[error.status]
    assert shapes == {(3,)}
