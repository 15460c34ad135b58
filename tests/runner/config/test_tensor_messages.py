"""What a user of a tensor model reads: each mistake in a file, and the one line that it gives."""

from pathlib import Path

import pytest
from plan_file import plan

from parallel.errors import ConfigError
from runner.config.load import load

HEAD = "version: 1\nmodel: {path: m}\n"
IMAGE = "[{name: image, shape: [batch, 3, height]}]"
STYLES = (
    "colwise, colwise_gather_output, colwise_rep, rowwise, rowwise_split_input, rowwise_rep, "
    "embedding_rowwise, embedding_colwise, heads, replicate"
)


def mistake(text: str) -> str:
    """The message of a file beside which there are `m`, a folder, and `w.onnx` and `w.bin`."""
    for name in ("w.onnx", "w.bin"):
        Path(name).touch()
    with pytest.raises(ConfigError) as caught:
        load(plan(text))
    return str(caught.value)


def model(path: str, *, inputs: str | None = "[{name: x, shape: [1]}]", more: str = "") -> str:
    """A file whose line 3 holds the path, line 4 the inputs and line 5 one more key."""
    lines = ["version: 1", "model:", f"  path: {path}"]
    lines += [f"  inputs: {inputs}"] if inputs else []
    return "\n".join([*lines, f"  {more}" if more else "", ""])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            model("w.bin", more="format: factory"),
            "plan.yaml:2:1: model.factory: missing; "
            'format factory needs it: "package.module:function"',
        ),
        (
            model("w.onnx", more='format: onnx\n  factory: "a:b"'),
            "plan.yaml:6:12: model.factory: given, but format is onnx; "
            "drop the one or change the other",
        ),
        (
            model("m", inputs=None, more="format: tensorflow"),
            "plan.yaml:4:11: model.format: 'tensorflow' is not allowed; "
            "use auto, safetensors, factory, pt2 or onnx",
        ),
        (
            model("w.onnx", inputs=None),
            "plan.yaml:2:1: model.inputs: missing; "
            "a tensor model needs the name and shape of every input",
        ),
        (
            model("w.onnx", inputs="[]"),
            "plan.yaml:4:11: model.inputs: empty; give at least one",
        ),
        (
            model("m"),
            "plan.yaml:4:11: model.inputs: a language model has none; "
            "drop them, or give another format",
        ),
        (
            model("w.onnx", inputs="[image]"),
            "plan.yaml:4:12: model.inputs.0: 'image' is a string; use a mapping of keys",
        ),
        (
            model("w.onnx", inputs="[{name: x}]"),
            "plan.yaml:4:12: model.inputs.0.shape: missing; it is needed: sizes of its dims, or "
            'names: of the first dim "batch", of any other one in `model.dims`',
        ),
        (
            model("w.onnx", inputs="[{name: x, shape: [1], dtype: float}]"),
            "plan.yaml:4:41: model.inputs.0.dtype: 'float' is not allowed; use float32, float16, "
            "bfloat16, int64, int32, uint8 or bool; did you mean float32?",
        ),
        (
            model("w.onnx", inputs="[{name: x, shape: 3}]"),
            "plan.yaml:4:29: model.inputs.0.shape: 3 is a whole number; use a list",
        ),
        (
            model("w.onnx", inputs="[{name: x, shape: [3, batch]}]"),
            "plan.yaml:4:29: model.inputs.0.shape: [3, 'batch']: only the first dim may be batch",
        ),
        (
            model("w.onnx", inputs="[{name: x, shape: [batch, 0]}]"),
            "plan.yaml:4:29: model.inputs.0.shape: 0 is no size; "
            "use a whole number above 0, or a name",
        ),
        (
            model("w.onnx", inputs="[{name: x, shape: [batch, 1.5]}]"),
            "plan.yaml:4:29: model.inputs.0.shape: 1.5 is no size; "
            "use a whole number above 0, or a name",
        ),
        (
            model("w.onnx", inputs="[{name: x, shape: [batch, null]}]"),
            "plan.yaml:4:29: model.inputs.0.shape: null is no size; "
            "use a whole number above 0, or a name",
        ),
        (
            model("w.onnx", inputs="[{name: x, shape: [batch, '']}]"),
            "plan.yaml:4:29: model.inputs.0.shape: '' is no size; "
            "use a whole number above 0, or a name",
        ),
        (
            model("w.onnx", inputs=IMAGE),
            "plan.yaml:4:33: model.inputs.0.shape: 'height' has no sizes; "
            "give them as model.dims.height: [...]",
        ),
        (
            model("w.onnx", inputs=IMAGE, more="dims: {height: [640, 320]}"),
            "plan.yaml:5:10: model.dims.height: [640, 320] is not ascending; use [320, 640]",
        ),
        (
            model("w.onnx", inputs=IMAGE, more="dims: {height: [320], width: [320]}"),
            "plan.yaml:5:25: model.dims.width: stands in no input's shape; drop it",
        ),
        (
            model("w.onnx", inputs=IMAGE, more="dims: {height: 320}"),
            "plan.yaml:5:10: model.dims.height: 320 is a whole number; use a list",
        ),
        (
            model("w.onnx", inputs=IMAGE, more="dims: {height: []}"),
            "plan.yaml:5:10: model.dims.height: empty; give at least one",
        ),
        (
            model("w.onnx", inputs=IMAGE, more="dims: {height: [320, x]}"),
            "plan.yaml:5:24: model.dims.height.1: 'x' is a string; use a whole number",
        ),
        (
            model("w.onnx", more="dims: [320]"),
            "plan.yaml:5:9: model.dims: [320] is a list; use a mapping",
        ),
        (
            model("w.onnx", more="dims: null"),
            "plan.yaml:5:9: model.dims: null is not allowed; use a mapping",
        ),
        (
            model("w.onnx", more="factory_args: 3"),
            "plan.yaml:5:17: model.factory_args: 3 is a whole number; use a mapping",
        ),
    ],
)
def test_one_mistake_in_the_model_gives_one_line(text: str, line: str) -> None:
    assert mistake(text) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            model("absent.onnx"),
            "plan.yaml:3:9: model.path: 'absent.onnx' in HERE is not there; "
            "give the file that holds the model or its weights",
        ),
        (
            model("m", more='factory: "a:b"'),
            "plan.yaml:3:9: model.path: 'm' is not a file; "
            "give the file that holds the model or its weights",
        ),
        (
            model("m", more="format: pt2"),
            "plan.yaml:3:9: model.path: 'm' is not a file; "
            "give the file that holds the model or its weights",
        ),
        (
            model("w.bin", inputs=None, more="format: safetensors"),
            "plan.yaml:3:9: model.path: 'w.bin' is not a directory; "
            "give the directory that holds the model",
        ),
    ],
)
def test_a_path_of_the_wrong_kind(text: str, line: str) -> None:
    assert mistake(text) == line.replace("HERE", str(Path.cwd()))


@pytest.mark.parametrize(
    ("section", "line"),
    [
        (
            "parallel: {tp_plan: {a.*.up: diagonal}}",
            f"plan.yaml:3:21: parallel.tp_plan: a.*.up: 'diagonal' is no style; use {STYLES}",
        ),
        (
            "parallel: {tp_plan: {up: 3}}",
            "plan.yaml:3:22: parallel.tp_plan.up: 3 is a whole number; use a string",
        ),
        (
            "parallel: {tp_plan: auto}",
            "plan.yaml:3:21: parallel.tp_plan: 'auto' is a string; use a mapping or null",
        ),
        (
            "parallel: {tp_plan: {}}",
            "plan.yaml:3:21: parallel.tp_plan: empty; give at least one",
        ),
        (
            "parallel: {split_points: [a], pipeline_parallel_size: 3}",
            "plan.yaml:3:26: parallel.split_points: 1 points make 2 stages, and "
            "pipeline_parallel_size is 3; make them agree",
        ),
        (
            "parallel: {split_points: [a], stages: [{}, {}, {}]}",
            "plan.yaml:3:26: parallel.split_points: 1 points make 2 stages, and "
            "pipeline_parallel_size is 3; make them agree",
        ),
        (
            "parallel: {split_points: [b], stages: [{modules: [a]}, {modules: [b]}]}",
            "plan.yaml:3:26: parallel.split_points: parallel.stages lists the modules already; "
            "drop one",
        ),
        (
            "scheduler: {preferred_batch_size: [4, 2]}",
            "plan.yaml:3:35: scheduler.preferred_batch_size: [4, 2] must ascend to at most "
            "max_batch_size=8",
        ),
        (
            "scheduler: {preferred_batch_size: [4, 8], max_batch_size: 4}",
            "plan.yaml:3:35: scheduler.preferred_batch_size: [4, 8] must ascend to at most "
            "max_batch_size=4",
        ),
        (
            "scheduler: {max_queue_delay_ms: -1}",
            "plan.yaml:3:33: scheduler.max_queue_delay_ms: -1 is too small; use 0 or more",
        ),
        (
            "tiling: {overlap: 0.5}",
            "plan.yaml:3:1: tiling.roi_size: missing; it is needed: size of a window; "
            "the spatial dims of the model's one input",
        ),
        (
            "tiling: {roi_size: [64]}",
            "plan.yaml:3:20: tiling.roi_size: [64] has the wrong length, 1; give at least 2",
        ),
        (
            "tiling: {roi_size: [1, 2, 3, 4]}",
            "plan.yaml:3:20: tiling.roi_size: [1, 2, 3, 4] has the wrong length, 4; give at most 3",
        ),
        (
            "tiling: {roi_size: []}",
            "plan.yaml:3:20: tiling.roi_size: empty; give at least 2",
        ),
        (
            "tiling: {roi_size: [64, 64], overlap: 1}",
            "plan.yaml:3:39: tiling.overlap: 1 is too large; use a number below 1",
        ),
        (
            "tiling: 3",
            "plan.yaml:3:9: tiling: 3 is a whole number; use a mapping of keys or null",
        ),
        (
            "security: {factories: [3]}",
            "plan.yaml:3:24: security.factories.0: 3 is a whole number; use a string",
        ),
    ],
)
def test_one_mistake_elsewhere_gives_one_line(section: str, line: str) -> None:
    assert mistake(f"{HEAD}{section}\n") == line
