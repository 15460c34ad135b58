"""Each operator that we compute, and some of onnx2torch's, on small graphs against onnxruntime."""

import numpy as np
import pytest
import torch

from runner.sources.onnx_converters import _CONVERTERS
from runner.sources.onnx_graph import open_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

I64 = np.int64
IMAGE, ROW, BATCH = (2, 3, 7, 6), (2, 3, 11), (2, 4, 5)


def ints(*values):
    return np.array(values, I64)


def floats(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def case(operator, shape, *constants, opset=17, outputs=1, **attributes):
    """One node of x, of `shape`, and constants; None is an operand left out."""
    return operator, shape, constants, opset, outputs, attributes


def resizes():
    for mapping in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"):
        common = {"coordinate_transformation_mode": mapping}
        for sizes in (ints(2, 3, 14, 9), ints(2, 3, 4, 13), ints(2, 3, 21, 12), ints(2, 3, 1, 1)):
            yield case("Resize", IMAGE, None, None, sizes, mode="linear", **common)
            for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"):
                chosen = {"mode": "nearest", "nearest_mode": rounding, **common}
                yield case("Resize", IMAGE, None, None, sizes, **chosen)
        scales = np.array([1, 1, 2.3, 0.6], np.float32)
        yield case("Resize", IMAGE, None, scales, mode="linear", **common)
        yield case("Resize", IMAGE, None, scales, mode="nearest", nearest_mode="floor", **common)
    up = np.array([1, 1, 2, 3], np.float32)
    yield case("Resize", IMAGE, up, mode="nearest", opset=10)
    yield case("Upsample", IMAGE, up, mode="nearest", opset=9)
    yield case("Resize", IMAGE, None, None, ints(2, 3, 14, 12), mode="cubic")
    yield case("Resize", IMAGE, None, up[2:], mode="linear", axes=[2, 3], opset=18)
    yield case("Resize", ROW, None, None, ints(2, 3, 22), mode="linear")


def pools():
    for operator in ("MaxPool", "AveragePool"):
        yield case(operator, IMAGE, kernel_shape=[3, 2], strides=[2, 2])
        yield case(operator, IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        yield case(operator, IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 1, 0])
        yield case(operator, IMAGE, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
        yield case(operator, ROW, kernel_shape=[3])
        for auto in ("SAME_UPPER", "SAME_LOWER", "VALID"):
            yield case(operator, IMAGE, kernel_shape=[3, 2], strides=[2, 2], auto_pad=auto)
    padded = {"kernel_shape": [3, 3], "pads": [0, 1, 1, 0]}
    yield case("AveragePool", IMAGE, **padded, count_include_pad=1)
    yield case("MaxPool", IMAGE, kernel_shape=[2, 2], dilations=[2, 2])
    for operator in ("GlobalAveragePool", "GlobalMaxPool"):
        yield case(operator, IMAGE)


def convolutions():
    weight, bias = floats(4, 3, 3, 2), floats(4)
    yield case("Conv", IMAGE, weight, bias, pads=[1, 0, 1, 0], strides=[2, 1])
    yield case("Conv", IMAGE, weight, pads=[1, 0, 0, 2], dilations=[2, 1])
    for auto in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        yield case("Conv", IMAGE, weight, auto_pad=auto, strides=[2, 2])
    yield case("Conv", IMAGE, floats(6, 1, 3, 3), group=3)
    yield case("Conv", ROW, floats(4, 3, 3), pads=[1, 1])
    kernel = floats(3, 2, 3, 3)
    yield case("ConvTranspose", IMAGE, kernel, floats(2), strides=[2, 2], pads=[1, 1, 1, 1])
    yield case("ConvTranspose", IMAGE, kernel, strides=[2, 3], pads=[0, 1, 2, 1])
    yield case("ConvTranspose", IMAGE, kernel, strides=[2, 2], output_padding=[1, 1])


def shapes():
    yield case("Reshape", BATCH, ints(0, -1))
    yield case("Reshape", BATCH, ints(5, 8), allowzero=1)
    yield case("Squeeze", (2, 1, 3, 1), ints(-1, 1))
    yield case("Squeeze", (2, 1, 3, 1))
    yield case("Squeeze", (2, 1, 3, 1), axes=[1], opset=11)
    yield case("Unsqueeze", BATCH, ints(0, -1))
    yield case("Unsqueeze", BATCH, axes=[1, 3], opset=11)
    yield case("Slice", BATCH, ints(1, -2), ints(100, -1), ints(1, 2))
    yield case("Slice", BATCH, ints(-1), ints(-(2**40)), ints(1), ints(-2))
    yield case("Slice", BATCH, ints(3, 0), ints(0, 9), ints(1, -1), ints(-1, 3))
    yield case("Slice", BATCH, ints(3), ints(1), ints(1))
    yield case("Slice", BATCH, starts=[1], ends=[3], axes=[1], opset=9)
    yield case("Expand", (3, 1), ints(2, 1, 4))
    yield case("Tile", BATCH, ints(1, 3, 2))
    yield case("Split", BATCH, ints(1, 3), axis=1, outputs=2)
    yield case("Split", (2, 7), axis=1, num_outputs=3, outputs=3, opset=18)
    yield case("Split", BATCH, axis=1, split=[3, 1], outputs=2, opset=11)
    yield case("Pad", BATCH, ints(0, 1, 2, 1, 0, -1), np.float32(0.5))
    yield case("Pad", BATCH, ints(0, 1, 2, 0, 2, 1), mode="reflect")
    yield case("Pad", BATCH, ints(1, 1, 2, 0, 2, 1), mode="edge")
    yield case("Pad", BATCH, ints(1, 2), None, ints(2), opset=18)
    yield case("Pad", BATCH, pads=[0, 0, 1, 0, 0, 2], value=2.0, opset=2)
    yield case("Gather", BATCH, np.array([[0, -1], [2, 1]], I64), axis=1)
    yield case("Gather", BATCH, np.array(-1, I64), axis=-1)
    yield case("Transpose", BATCH, perm=[2, 0, 1], opset=21)
    yield case("Concat", BATCH, floats(2, 1, 5), axis=1)
    for axis in range(-len(BATCH), len(BATCH) + 1):
        yield case("Flatten", BATCH, axis=axis)
    yield case("Flatten", IMAGE)


def arithmetic():
    for operator in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"):
        by_operand = 13 if operator == "ReduceSum" else 18
        for axes in ((-1, 1), (-2, -1), (0, -1)):
            yield case(operator, BATCH, ints(*axes), keepdims=0, opset=by_operand)
        yield case(operator, BATCH, axes=[1], opset=11)
        yield case(operator, BATCH, opset=18)
        yield case(operator, BATCH, noop_with_empty_axes=1, opset=18)
    for reverse, exclusive in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for axis in (0, 1, -1):
            chosen = {"reverse": reverse, "exclusive": exclusive}
            yield case("CumSum", BATCH, np.array(axis, np.int32), opset=14, **chosen)
    yield case("CumSum", (0, 3), ints(0), exclusive=1)
    yield case("CumSum", BATCH, ints(1), opset=11)
    yield case("Clip", BATCH, np.float32(-0.5), np.float32(0.25))
    yield case("Clip", BATCH, None, np.float32(0.25))
    yield case("Clip", BATCH, min=-0.5, opset=6)
    yield case("Cast", BATCH, to=onnx.TensorProto.INT32)
    yield case("Softmax", BATCH)
    yield case("Softmax", BATCH, axis=1, opset=11)
    yield case("Softmax", BATCH, opset=11)
    yield case("LogSoftmax", BATCH, axis=1)
    yield case("HardSigmoid", BATCH, alpha=1 / 6)
    yield case("HardSigmoid", BATCH)
    yield case("HardSwish", BATCH)
    yield case("Gelu", BATCH, opset=20)
    yield case("Gelu", BATCH, approximate="tanh", opset=20)
    positive = np.abs(floats(3)) + 0.1
    for shape in (IMAGE, ROW, (4, 3)):
        yield case("BatchNormalization", shape, floats(3), floats(3), floats(3), positive)
    yield case("InstanceNormalization", IMAGE, floats(3), floats(3), epsilon=1e-3)
    yield case("LayerNormalization", BATCH, floats(5), floats(5))
    yield case("LayerNormalization", BATCH, floats(4, 5), axis=1, epsilon=1e-3)
    yield case("MatMul", BATCH, floats(5, 3))
    yield case("Gemm", (4, 5), floats(3, 5), floats(3), transB=1, alpha=0.5)
    yield case("Pow", BATCH, np.float32(2.0))
    yield case("Pow", BATCH, ints(2), opset=12)
    yield case("Pow", BATCH, np.float64(2.0), opset=15)
    yield case("Pow", BATCH, floats(5).round(), opset=7)
    yield case("DynamicQuantizeLinear", BATCH, outputs=3)
    for operator in ("Relu", "Sigmoid", "Erf", "Exp", "Tanh", "Floor", "Neg", "Softplus"):
        yield case(operator, BATCH)


CASES = [*resizes(), *pools(), *convolutions(), *shapes(), *arithmetic()]


def build(operator, shape, constants, opset, outputs, attributes):
    names = ["x", *("" if c is None else f"c{i}" for i, c in enumerate(constants))]
    made = [f"y{i}" for i in range(outputs)]
    node = onnx.helper.make_node(operator, names, made, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "graph",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.ValueInfoProto(name=name) for name in made],
        [
            onnx.numpy_helper.from_array(np.asarray(c), f"c{i}")
            for i, c in enumerate(constants)
            if c is not None
        ],
    )
    opsets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)


def assert_equal_to_onnxruntime(path, feeds):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    expected = onnxruntime.InferenceSession(path, options).run(None, feeds)
    module = open_onnx(path)
    inputs = tuple(torch.from_numpy(array) for array in feeds.values())
    found = module(*inputs)
    for one, other in zip(found if len(expected) > 1 else (found,), expected, strict=True):
        assert str(one.dtype).removeprefix("torch.") == str(other.dtype)
        assert tuple(one.shape) == other.shape
        largest = np.abs(other.astype(np.float64)).max(initial=0)
        rtol, atol = (1e-5, 2e-6 * max(largest, 1)) if other.dtype.kind == "f" else (0, 0)
        np.testing.assert_allclose(one.numpy(), other, rtol=rtol, atol=atol)
    traced = torch.export.export(module, inputs, strict=False).module()(*inputs)
    torch.testing.assert_close(traced, found, rtol=0, atol=0)


@pytest.mark.parametrize("described", CASES, ids=lambda c: f"{c[0]}-{c[3]}")
def test_operator(described, tmp_path):
    onnx.save(build(*described), tmp_path / "m.onnx")
    assert_equal_to_onnxruntime(tmp_path / "m.onnx", {"x": floats(*described[1]) * 2})


def test_every_converter_has_a_case():
    apart = {"ConvInteger", "DynamicQuantizeLinear", "IsInf"}
    tested = {operator for operator, *_ in CASES} | apart
    assert set(_CONVERTERS) == tested & set(_CONVERTERS)


@pytest.mark.parametrize(
    ("operator", "constant", "attributes"),
    [
        ("CumSum", ints(1), {"exclusive": 1}),
        ("CumSum", ints(0), {"reverse": 1}),
        ("Pow", np.float32(8), {}),
        ("Pow", np.array([0, 0.5, 2, 3], np.float32), {}),
        ("Pow", ints(3), {}),
    ],
)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_integers_stay_integers(tmp_path, operator, constant, attributes, dtype):
    model = build(operator, (3, 4), (constant,), 17, 1, attributes)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model.graph.input[0].type.tensor_type.elem_type = kind
    onnx.save(model, tmp_path / "m.onnx")
    x = np.arange(12, dtype=dtype).reshape(3, 4)
    assert_equal_to_onnxruntime(tmp_path / "m.onnx", {"x": x})


@pytest.mark.parametrize("above", [0, 1])
@pytest.mark.parametrize("below", [0, 1])
def test_infinities_of_the_signs_that_are_asked_for(tmp_path, above, below):
    asked = {"detect_positive": above, "detect_negative": below}
    onnx.save(build("IsInf", (4,), (), 17, 1, asked), tmp_path / "m.onnx")
    x = np.array([-np.inf, np.inf, np.nan, 1], np.float32)
    assert_equal_to_onnxruntime(tmp_path / "m.onnx", {"x": x})


def test_integer_convolution(tmp_path):
    make = onnx.helper.make_node
    weight = np.random.default_rng(0).integers(-128, 127, (4, 3, 3, 3)).astype(np.int8)
    nodes = [
        make("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        make("ConvInteger", ["q", "w", "zero"], ["y"], pads=[1, 1, 1, 1]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, IMAGE)],
        [onnx.ValueInfoProto(name="y")],
        [onnx.numpy_helper.from_array(weight.astype(np.uint8), "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    assert_equal_to_onnxruntime(tmp_path / "m.onnx", {"x": floats(*IMAGE)})


def test_shapes_computed_from_shapes_stay_on_the_host(tmp_path):
    make = onnx.helper.make_node
    nodes = [
        make("Shape", ["x"], ["shape"]),
        make("Gather", ["shape", "one"], ["rows"]),
        make("Mul", ["rows", "two"], ["half"]),
        make("Concat", ["minus", "half"], ["wanted"], axis=0),
        make("Reshape", ["x", "wanted"], ["flat"]),
        make("Cast", ["half"], ["number"], to=onnx.TensorProto.FLOAT),
        make("Div", ["flat", "number"], ["scaled"]),
        make("ConstantOfShape", ["shape"], ["zeros"]),
        make("Add", ["zeros", "x"], ["same"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["a", "b", "c"])],
        [onnx.ValueInfoProto(name="scaled"), onnx.ValueInfoProto(name="same")],
        [
            onnx.numpy_helper.from_array(array, name)
            for name, array in {"one": ints(1), "two": ints(2), "minus": ints(-1)}.items()
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    for shape in ((2, 3, 4), (3, 2, 8)):
        assert_equal_to_onnxruntime(tmp_path / "m.onnx", {"x": floats(*shape)})
