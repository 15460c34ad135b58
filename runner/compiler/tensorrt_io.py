"""`io.json`: what an engine file does not say of itself before it is loaded.

An artefact of the tensorrt backend is `engine.trt`, the serialized engine, and this beside it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from parallel.errors import IntegrityError
from runner.compiler.segment import TensorSpec
from runner.compiler.tensorrt_install import Flavour
from runner.config.json_file import read_json_object

ENGINE_FILE = "engine.trt"
IO_FILE = "io.json"


@dataclass(frozen=True)
class EngineIO:
    """An engine's inputs and outputs, and what it was built by and for.

    Attributes:
        target: compute capability, for example "sm90".
        takes: the segment's activations and weights.
        inputs: by name, in the same order and the same bytes, in the engine's shapes.
        outputs: by name, in the order in which the segment returns them.
    """

    flavour: Flavour
    tensorrt: str
    target: str
    takes: tuple[TensorSpec, ...]
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    def write(self, folder: Path) -> None:
        text = {
            "flavour": self.flavour,
            "tensorrt": self.tensorrt,
            "target": self.target,
            "takes": [_to_json(spec) for spec in self.takes],
            "inputs": [{"name": n, **_to_json(spec)} for n, spec in self.inputs.items()],
            "outputs": [{"name": n, **_to_json(spec)} for n, spec in self.outputs.items()],
        }
        (folder / IO_FILE).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "EngineIO":
        """
        Raises:
            IntegrityError: the file is absent, or is not what `write` wrote.
        """
        file = folder / IO_FILE
        values = read_json_object(file)
        try:
            if values["flavour"] not in get_args(Flavour):
                raise ValueError(f"flavour {values['flavour']!r} is not known")
            return cls(
                flavour=values["flavour"],
                tensorrt=str(values["tensorrt"]),
                target=str(values["target"]),
                # Before kernels were turned there was no difference.
                takes=tuple(map(_from_json, values.get("takes", values["inputs"]))),
                inputs={str(one["name"]): _from_json(one) for one in values["inputs"]},
                outputs={str(one["name"]): _from_json(one) for one in values["outputs"]},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(
                f"{file} does not describe an engine ({error!r}); copy the bundle again"
            ) from error


def specs_of(
    program: torch.export.ExportedProgram,
) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """A program's inputs and outputs, under the names that Torch-TensorRT gives them."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    signature = program.graph_signature
    inputs = {name: TensorSpec.of(values[name]) for name in signature.user_inputs}
    outputs = {
        f"output{i}": TensorSpec.of(values[name]) for i, name in enumerate(signature.user_outputs)
    }
    return inputs, outputs


def _to_json(spec: TensorSpec) -> dict[str, Any]:
    return {"shape": spec.shape, "dtype": str(spec.dtype).removeprefix("torch.")}


def _from_json(entry: dict[str, Any]) -> TensorSpec:
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {entry['dtype']!r} is not known")
    return TensorSpec(tuple(map(int, entry["shape"])), dtype)
