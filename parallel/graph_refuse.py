"""What an exported program must be, for its stages to be compiled and run on many ranks.

Refusals only; each is one line that names the operation or the value.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from parallel.errors import ConfigError

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_RANDOM = ("rand", "normal", "bernoulli", "multinomial", "poisson", "exponential", "dropout")


def refuse_state(program: ExportedProgram) -> None:
    """A model must not remember anything, and must be made of tensors.

    Inputs that it changes in place are all right: the caller's tensors stay as they are.

    Raises:
        ConfigError: it changes a buffer, or holds an object that is not a tensor.
    """
    for spec in program.graph_signature.output_specs:
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            raise ConfigError(
                f"the model changes its buffer {spec.target} when it runs; a model must not keep "
                "state: return the new value instead"
            )
    for given in program.graph_signature.input_specs:
        if given.kind != InputKind.USER_INPUT and given.kind not in _WEIGHTS:
            raise ConfigError(
                f"the model holds {given.target}, a {given.kind.name.lower()}; only tensors can be "
                "passed to its operations"
            )


def refuse_operations(nodes: Iterable[fx.Node]) -> None:
    """An operation must make tensors of fixed shapes, and the same ones every time.

    Raises:
        ConfigError: control flow, a number read from a tensor, a shape that depends on data, or
            random numbers.
    """
    for node in nodes:
        if node.op != "call_function":
            continue
        where = _where(node)
        parts = pytree.tree_leaves(node.meta.get("val"))
        is_getitem = getattr(node.target, "__name__", "") == "getitem"
        if any(isinstance(part, torch.SymInt | torch.SymFloat | torch.SymBool) for part in parts):
            raise ConfigError(
                f"the model reads a number out of a tensor ({where}); keep it a tensor"
            )
        if not is_getitem and not isinstance(node.target, torch._ops.OpOverload):
            raise ConfigError(
                f"the model uses {where}, which holds code of its own; only plain operations on "
                "tensors can be cut"
            )
        sizes = [size for part in parts if isinstance(part, torch.Tensor) for size in part.shape]
        if any(not isinstance(size, int) for size in sizes):
            raise ConfigError(
                f"the shape of what {where} returns depends on the values of its inputs; shapes "
                "must be fixed"
            )
        name = str(node.target).removeprefix("aten.").split(".")[0]
        if name.startswith(_RANDOM):
            raise ConfigError(f"the model draws random numbers ({where}); make them an input")


def user_outputs(program: ExportedProgram) -> tuple[fx.Node, ...]:
    """The nodes of what the model returns, flattened; may repeat a node.

    Raises:
        ConfigError: something returned is not a tensor.
    """
    specs = program.graph_signature.output_specs
    returned = [spec.arg for spec in specs if spec.kind == OutputKind.USER_OUTPUT]
    nodes = {node.name: node for node in program.graph.nodes}
    for name, arg in zip(output_names(program), returned, strict=True):
        if not isinstance(arg, TensorArgument):
            found = repr(getattr(arg, "value", arg))
            raise ConfigError(f"the model's {name} is {found}; return tensors only")
    return tuple(nodes[arg.name] for arg in returned)


def output_names(program: ExportedProgram) -> tuple[str, ...]:
    """A name for each output: its keys and places in what the model returns, joined by "_".

    "output" is the only one, "output_0" the first of a tuple, "boxes" a dict's entry.

    Raises:
        ConfigError: two outputs would have one name.
    """
    spec = program.call_spec.out_spec
    assert spec is not None
    structure = pytree.tree_unflatten(range(spec.num_leaves), spec)
    paths, _ = pytree.tree_flatten_with_path(structure)
    names = tuple(_joined(path) for path, _ in paths)
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"the model returns two outputs named {doubled[0]}; rename one")
    return names


def _joined(path: pytree.KeyPath) -> str:
    keys = [pytree.keystr((key,)).strip(".[]'\"") for key in path]
    return "_".join(keys if keys and not keys[0].isdigit() else ["output", *keys])


def _where(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    inside = f" in {stack[-1][0]}" if stack and stack[-1][0] else ""
    return f"{node.target}{inside}"
