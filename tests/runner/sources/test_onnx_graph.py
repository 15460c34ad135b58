"""ONNX graphs as modules: real models against onnxruntime, and what is refused."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from parallel.errors import ConfigError, IntegrityError, PreflightError
from runner.sources.onnx_file import files_of
from runner.sources.onnx_graph import input_names, open_onnx, output_names

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
BFLOAT16, BOOL = onnx.TensorProto.BFLOAT16, onnx.TensorProto.BOOL


def ocr_model(name):
    found = importlib.util.find_spec("rapidocr_onnxruntime")
    if found is None or found.origin is None:
        pytest.skip("rapidocr_onnxruntime is not installed")
    return Path(found.origin).parent / "models" / name


def text_image(batch, height, width):
    """Rendered text; on noise the detector answers all but 0, and rounding is all one sees."""
    pixels = []
    for number in range(batch):
        image = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(image).text((4, height // 4), f"shard line {number}", "black", font_size=20)
        pixels.append(np.asarray(image, dtype=np.float32) / 127.5 - 1)
    return np.stack(pixels).transpose(0, 3, 1, 2).copy()


@pytest.fixture(scope="module")
def opened():
    """Models by path, each converted once."""
    cache = {}

    def open_once(path):
        if path not in cache:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(path, options)
            cache[path] = (open_onnx(path), session)
        return cache[path]

    return open_once


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("ch_PP-OCRv4_det_infer.onnx", (1, 64, 160)),
        ("ch_PP-OCRv4_det_infer.onnx", (2, 96, 128)),
        ("ch_PP-OCRv4_rec_infer.onnx", (1, 48, 160)),
        ("ch_PP-OCRv4_rec_infer.onnx", (3, 48, 96)),
        ("ch_ppocr_mobile_v2.0_cls_infer.onnx", (1, 48, 192)),
        ("ch_ppocr_mobile_v2.0_cls_infer.onnx", (2, 48, 96)),
    ],
)
def test_a_real_model_computes_what_onnxruntime_does(opened, name, shape):
    module, session = opened(ocr_model(name))
    image = text_image(*shape)
    expected = session.run(None, {session.get_inputs()[0].name: image})[0]
    found = module(torch.from_numpy(image))
    assert found.shape == expected.shape
    assert np.abs(found.numpy() - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_trace_holds_no_shape_computation(opened):
    module, _ = opened(ocr_model("ch_PP-OCRv4_rec_infer.onnx"))
    image = torch.from_numpy(text_image(2, 48, 64))
    program = torch.export.export(module, (image,), strict=False)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in targets if "sym_" in name or "item" in name]
    assert all(n.meta["val"].is_floating_point() for n in program.graph.nodes if n.op != "output")
    assert not program.constants
    torch.testing.assert_close(program.module()(image), module(image), rtol=0, atol=0)
    stacks = [n.meta["nn_module_stack"] for n in program.graph.nodes if "convolution" in n.name]
    assert all(any(path.startswith("steps.") for path, _ in s.values()) for s in stacks)


def write(path, nodes, inputs, outputs, *, constants=(), opset=17, domains=()):
    def described(entries):
        return [onnx.helper.make_tensor_value_info(*entry) for entry in entries]

    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        described(inputs),
        described(outputs),
        [onnx.numpy_helper.from_array(array, name) for name, array in constants],
    )
    opsets = [
        onnx.helper.make_opsetid("", opset),
        *(onnx.helper.make_opsetid(d, 1) for d in domains),
    ]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def node(operator, inputs, outputs, **attributes):
    return onnx.helper.make_node(operator, inputs, outputs, **attributes)


def test_outputs_are_a_tuple_in_the_graph_s_order(tmp_path):
    nodes = [
        node("Split", ["x"], ["a", "b"], axis=1),
        node("Relu", ["a"], ["y"]),
        node("Shape", ["y"], ["shape"]),
    ]
    weight = np.arange(3, dtype=np.float32)
    path = write(
        tmp_path / "m.onnx",
        nodes,
        [("x", FLOAT, [2, 6]), ("w.1", FLOAT, [3])],
        [("b", FLOAT, [2, 3]), ("w.1", FLOAT, [3]), ("y", FLOAT, None), ("shape", INT64, [2])],
        constants=[("w.1", weight)],
        opset=13,
    )
    assert input_names(path) == ["x"]
    assert output_names(path) == ["b", "w.1", "y", "shape"]
    module = open_onnx(path)
    assert not module.training
    x = torch.randn(2, 6)
    b, w, y, shape = module(x)
    torch.testing.assert_close((b, y), (x[:, 3:], x[:, :3].relu()))
    assert (w.tolist(), shape.tolist()) == ([0, 1, 2], [2, 3])
    with pytest.raises(ConfigError, match=r"takes 1 inputs \(x\), 2 were given"):
        module(x, x)


def test_all_operators_without_a_converter_are_named(tmp_path):
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Det", ["a"], ["b"]),
        node("Det", ["a"], ["c"]),
        node("Fused", ["a"], ["d"], domain="com.example"),
        node("MaxPool", ["a"], ["e"], kernel_shape=[2, 2], storage_order=1),
        node("Cast", ["c"], ["s"], to=INT64),
        node("Reshape", ["x", "s"], ["f"]),
        node("RandomNormal", [], ["g"], shape=[2]),
    ]
    path = write(
        tmp_path / "m.onnx",
        nodes,
        [("x", FLOAT, [1, 2, 3, 3])],
        [(name, FLOAT, None) for name in "bdefg"],
        domains=["com.example"],
    )
    with pytest.raises(ConfigError, match="no converter for") as caught:
        open_onnx(path)
    for part in (
        "ai.onnx.Det (2)",
        "com.example.Fused (1)",
        "ai.onnx.MaxPool with storage_order=1 (1)",
        "ai.onnx.Reshape with operand 1 computed from data (1)",
        "ai.onnx.RandomNormal (1)",
    ):
        assert part in str(caught.value)
    assert "Relu" not in str(caught.value)


def test_bfloat16_weights_are_read(tmp_path):
    weight = np.linspace(-3, 3, 24, dtype=np.float32).reshape(6, 4)
    bfloat16 = onnx.helper.tensor_dtype_to_np_dtype(BFLOAT16)
    path = write(
        tmp_path / "m.onnx",
        [
            node("Gather", ["w", "i"], ["rows"]),
            node("Cast", ["rows"], ["y"], to=FLOAT),
            node("Cast", ["w"], ["folded"], to=FLOAT),
        ],
        [("i", INT64, [2])],
        [("y", FLOAT, [2, 4]), ("folded", FLOAT, [6, 4])],
        constants=[("w", weight.astype(bfloat16))],
    )
    index = np.array([5, 1])
    expected = onnxruntime.InferenceSession(path).run(None, {"i": index})
    found = open_onnx(path)(torch.from_numpy(index))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.numpy(), other)


def test_a_product_with_bfloat16_weights(tmp_path):
    x, weight, bias = (torch.randint(-4, 5, shape).float() for shape in ((2, 5), (3, 5), (3,)))
    bfloat16 = onnx.helper.tensor_dtype_to_np_dtype(BFLOAT16)
    path = write(
        tmp_path / "m.onnx",
        [node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
        [("x", BFLOAT16, [2, 5])],
        [("y", BFLOAT16, [2, 3])],
        constants=[(name, t.numpy().astype(bfloat16)) for name, t in (("w", weight), ("b", bias))],
    )
    expected = torch.nn.functional.linear(x, weight, bias).bfloat16()
    torch.testing.assert_close(open_onnx(path)(x.bfloat16()), expected, rtol=0, atol=0)


def test_weights_of_other_small_types_are_refused(tmp_path):
    for name in ("FLOAT8E4M3FN", "INT4", "FLOAT4E2M1"):
        kind = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, name))
        for operator in ("Gather", "Gemm"):
            path = write(
                tmp_path / "m.onnx",
                [node(operator, ["x", "scale.w"], ["y"])],
                [("x", FLOAT, [2, 6])],
                [("y", FLOAT, [2, 4])],
                constants=[("scale.w", np.ones((6, 4)).astype(kind))],
            )
            with pytest.raises(ConfigError, match=rf"tensor scale\.w is of type {kind.name},"):
                open_onnx(path)


def branch(nodes, outputs, **stored):
    return onnx.helper.make_graph(
        nodes,
        "branch",
        [],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [onnx.numpy_helper.from_array(np.array(a, np.float32), n) for n, a in stored.items()],
    )


def if_node(condition, output, then, otherwise):
    branches = {"then_branch": then, "else_branch": otherwise}
    return node("If", [condition], [output], name=f"choose {output}", **branches)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_an_if_of_a_constant_condition_is_the_branch_it_takes(tmp_path, first, second):
    """Branches read the outer graph and have names in common; one holds another If."""
    inner = if_node(
        "second",
        "chosen",
        branch([node("Add", ["t", "w"], ["u"])], ["u"]),
        branch([node("Mul", ["t", "y"], ["u"])], ["u"]),
    )
    nodes = [
        if_node(
            "first",
            "y",
            branch([node("Add", ["x", "t"], ["s"])], ["s"], t=[1, 2, 3]),
            branch([node("Sub", ["x", "t"], ["s"])], ["s"], t=2),
        ),
        if_node(
            "first",
            "z",
            branch([node("Relu", ["y"], ["t"]), inner], ["chosen"]),
            branch([node("Identity", ["w"], ["t"])], ["t"]),
        ),
    ]
    path = write(
        tmp_path / "m.onnx",
        nodes,
        [("x", FLOAT, [2, 3])],
        [("y", FLOAT, [2, 3]), ("z", FLOAT, None)],
        constants=[
            ("w", np.array([3, 4, 5], np.float32)),
            ("first", np.array(first)),
            ("second", np.array([second])),
        ],
    )
    x = np.array([[1, -2, 3], [-4, 5, -6]], np.float32)
    expected = onnxruntime.InferenceSession(path).run(None, {"x": x})
    for one, other in zip(open_onnx(path)(torch.from_numpy(x)), expected, strict=True):
        np.testing.assert_array_equal(one.numpy(), other)


def test_an_if_of_shapes_alone_is_computed_on_the_host(tmp_path):
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Size", ["x"], ["size"]),
        node("Less", ["size", "many"], ["few"]),
        if_node(
            "few",
            "wanted",
            branch([node("Identity", ["shape"], ["s"])], ["s"]),
            branch([node("Identity", ["flat"], ["s"])], ["s"]),
        ),
        node("Reshape", ["x", "wanted"], ["y"]),
    ]
    path = write(
        tmp_path / "m.onnx",
        nodes,
        [("x", FLOAT, ["a", "b"])],
        [("y", FLOAT, None)],
        constants=[("many", np.array(10)), ("flat", np.array([-1]))],
    )
    session, module = onnxruntime.InferenceSession(path), open_onnx(path)
    for shape in ((2, 3), (4, 5)):
        x = np.ones(shape, np.float32)
        assert module(torch.from_numpy(x)).shape == session.run(None, {"x": x})[0].shape


def test_an_if_that_is_decided_at_run_time_is_refused_with_a_way_out(tmp_path):
    chosen = if_node(
        "c",
        "y",
        branch([node("Relu", ["x"], ["s"])], ["s"]),
        branch([node("Neg", ["x"], ["s"])], ["s"]),
    )
    from_data = [node("ReduceMax", ["x"], ["m"], keepdims=0), node("Cast", ["m"], ["c"], to=BOOL)]
    from_shapes = [node("Size", ["x"], ["m"]), node("Equal", ["m", "m"], ["c"])]
    for nodes in (from_data, from_shapes):
        path = write(
            tmp_path / "m.onnx", [*nodes, chosen], [("x", FLOAT, [2])], [("y", FLOAT, None)]
        )
        with pytest.raises(ConfigError, match=r"not constant, node choose y .*onnxsim"):
            open_onnx(path)


def loop_body(step, output):
    """Of a Loop that goes on as long as it was told to, and carries what `step` makes of v."""
    body = branch([step, node("Identity", ["c"], ["d"])], ["d", output])
    body.input.extend(
        onnx.helper.make_tensor_value_info(*entry)
        for entry in (("i", INT64, []), ("c", BOOL, []), ("v", FLOAT, [2]))
    )
    return body


def loop(path, condition):
    """A file with a Loop of three rounds, each of which adds [1, 2] of the graph around it."""
    body = loop_body(node("Add", ["v", "w"], ["s"]), "s")
    inputs = ["three", condition, "start"]
    return write(
        path,
        [node("Loop", inputs, ["r"], body=body), node("Add", ["x", "r"], ["y"])],
        [("x", FLOAT, [2])],
        [("y", FLOAT, [2])],
        constants=[
            ("three", np.array(3)),
            ("go", np.array(True)),
            ("start", np.zeros(2, np.float32)),
            ("w", np.array([1, 2], np.float32)),
        ],
    )


def test_a_loop_reads_the_outer_graph_s_constants(tmp_path):
    path = loop(tmp_path / "m.onnx", "go")
    x = np.array([10, 20], np.float32)
    expected = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
    np.testing.assert_array_equal(open_onnx(path)(torch.from_numpy(x)).numpy(), expected)


def test_a_loop_without_a_condition_is_refused(tmp_path):
    path = loop(tmp_path / "m.onnx", "")
    refusal = r"with a condition that is left out"
    with pytest.raises(ConfigError, match=rf"ai\.onnx\.Loop {refusal}"):
        open_onnx(path)
    # Inside another one, too.
    inner = next(n for n in onnx.load(path).graph.node if n.op_type == "Loop")
    body = loop_body(inner, "r")
    nodes = [
        node("Loop", ["three", "go", "start"], ["q"], body=body),
        node("Add", ["x", "q"], ["y"]),
    ]
    model = onnx.load(path)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)
    with pytest.raises(ConfigError, match=refusal):
        open_onnx(path)


def test_operators_that_need_torchvision_are_named_where_it_is_missing(tmp_path):
    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is installed")
    path = write(
        tmp_path / "m.onnx",
        [node("NonMaxSuppression", ["boxes", "scores"], ["y"])],
        [("boxes", FLOAT, [1, 4, 4]), ("scores", FLOAT, [1, 1, 4])],
        [("y", INT64, None)],
    )
    with pytest.raises(ConfigError, match="NonMaxSuppression with torchvision, which is not"):
        open_onnx(path)
    assert importlib.util.find_spec("torchvision") is None


def external(path, location):
    """A model with its weight in another file, as large models have it."""
    data = np.arange(64, dtype=np.float32)
    write(
        path,
        [node("Add", ["x", "w"], ["y"])],
        [("x", FLOAT, [64])],
        [("y", FLOAT, [64])],
        constants=[("w", data)],
    )
    onnx.save_model(
        onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    onnx.save(model, path)
    return data


def test_weights_in_a_file_beside_the_model_are_read(tmp_path):
    data = external(tmp_path / "m.onnx", "w.bin")
    found = open_onnx(tmp_path / "m.onnx")(torch.ones(64))
    torch.testing.assert_close(found, torch.from_numpy(data) + 1)
    assert files_of(tmp_path / "m.onnx") == (tmp_path / "m.onnx", tmp_path / "w.bin")
    (tmp_path / "w.bin").write_bytes(b"short")
    with pytest.raises(IntegrityError, match="cannot be read"):
        open_onnx(tmp_path / "m.onnx")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(IntegrityError, match=r"w\.bin: absent"):
        open_onnx(tmp_path / "m.onnx")


def test_weights_outside_the_model_s_folder_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for location in ("../w.bin", str(tmp_path / "w.bin"), "a/../../w.bin"):
        external(folder / "m.onnx", location)
        (folder / "w.bin").rename(tmp_path / "w.bin")
        with pytest.raises(IntegrityError, match="no plain path beside it"):
            open_onnx(folder / "m.onnx")
    external(folder / "m.onnx", "w.bin")
    (folder / "w.bin").rename(tmp_path / "w.bin")
    (folder / "w.bin").symlink_to(tmp_path / "w.bin")
    with pytest.raises(IntegrityError, match="leads out of the model's folder"):
        open_onnx(folder / "m.onnx")


def test_files_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(IntegrityError, match="no such file"):
        open_onnx(tmp_path / "absent.onnx")
    content = ocr_model("ch_ppocr_mobile_v2.0_cls_infer.onnx").read_bytes()
    for number, data in enumerate((b"", b"hello", content[:1000], content[:-1])):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match="no ONNX model"):
            open_onnx(path)


def test_without_the_packages_the_extra_is_named(tmp_path, monkeypatch):
    path = write(
        tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], [("x", FLOAT, [2])], [("y", FLOAT, [2])]
    )
    for name in ("onnx2torch", "onnx"):
        with monkeypatch.context() as patched:
            patched.setitem(__import__("sys").modules, name, None)
            with pytest.raises(PreflightError, match=rf"{name}, .*pip install shardline\[onnx\]"):
                open_onnx(path)
