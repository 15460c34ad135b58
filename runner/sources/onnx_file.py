"""An ONNX file with its weights, which may lie in files beside it and nowhere else.

Not here: what the graph computes.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from parallel.errors import IntegrityError
from runner.sources.onnx_branches import subgraphs
from runner.sources.onnx_install import import_onnx

if TYPE_CHECKING:
    import onnx


def read_onnx(path: Path) -> "onnx.ModelProto":
    """The model, weights of other files included, its own functions inlined.

    Raises:
        IntegrityError: absent, truncated, or weights that are not in a file beside the model.
        PreflightError: no onnx package.
    """
    onnx = import_onnx()
    model = _read_header(path)
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(path, tensor)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
        return onnx.inliner.inline_local_functions(model) if model.functions else model
    except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        raise IntegrityError(f"{path}: its weights cannot be read ({error})") from None


def files_of(path: Path) -> tuple[Path, ...]:
    """The file, and those beside it that hold its weights."""
    locations = {
        entry.value
        for tensor in _tensors(_read_header(path).graph)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return (path, *(path.parent / location for location in sorted(locations)))


def input_names(path: Path) -> list[str]:
    """The graph's inputs, in its order, without those that have a value in the file."""
    graph = _read_header(path).graph
    stored = {tensor.name for tensor in graph.initializer}
    return [value.name for value in graph.input if value.name not in stored]


def output_names(path: Path) -> list[str]:
    """The graph's outputs, in its order."""
    return [value.name for value in _read_header(path).graph.output]


def _read_header(path: Path) -> "onnx.ModelProto":
    onnx = import_onnx()
    if not path.is_file():
        raise IntegrityError(f"{path}: no such file")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own, of a module that is named anew every few versions
        raise IntegrityError(f"{path}: no ONNX model, or a truncated one ({error})") from None
    if not model.graph.output:
        raise IntegrityError(f"{path}: no ONNX model: its graph has no output")
    return model  # type: ignore[no-any-return]


def _tensors(graph: "onnx.GraphProto") -> "Iterator[onnx.TensorProto]":
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for subgraph in subgraphs(node):
            yield from _tensors(subgraph)


def _check_external(path: Path, tensor: "onnx.TensorProto") -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    pure = PurePosixPath(location)
    file = path.parent / location
    if not location or pure.is_absolute() or ".." in pure.parts or "\0" in location:
        raise IntegrityError(
            f"{path}: tensor {tensor.name} lies in {location!r}, which is no plain path beside it"
        )
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise IntegrityError(f"{path}: {location} is a link that leads out of the model's folder")
    if not file.is_file():
        raise IntegrityError(f"{file}: absent, though {path.name} has tensor {tensor.name} there")
