"""Tensor parallelism of any nn.Module: layers that a plan names are swapped for drop-ins.

`apply` makes a twin of the module for one rank; it neither changes nor copies the original's
tensors. The drop-ins are `parallel.drop_ins`; a language model of ours is divided by
`parallel.planner` instead.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from parallel.collectives import Group
from parallel.drop_ins import Blocks, DropIn, Place
from parallel.errors import ConfigError
from parallel.plan import LocalTensor, Piece
from parallel.styles import REPLICATE, STYLES, match_layers, named_modules


@dataclass(frozen=True)
class Applied:
    """One rank's twin of a module.

    Attributes:
        module: the twin, in inference mode. It shares the tensors that it holds whole with the
            original, and most slices are views of the original's; see `HeadwiseAttention` for the
            exception.
        atomic: names of the swapped layers; a tracer does well to look at each as one piece.
        tensors: every parameter and buffer of the twin by name, made of pieces of the original's.
            A tensor with several names is listed under each; its pieces name the first.
    """

    module: nn.Module
    atomic: frozenset[str]
    tensors: dict[str, LocalTensor]


def apply(module: nn.Module, plan: Mapping[str, str], group: Group) -> Applied:
    """Divide the layers that `plan` names over the ranks of a group, as seen from one of them.

    Nothing must divide evenly. A layer with two names in the module is one layer and is swapped
    under both, and layers that share a parameter may have different styles. The twin's inputs and
    outputs are those of the module, except for what a `colwise` layer leaves split.

    Args:
        plan: pattern of module names -> style. In a pattern `*` stands for one dotted segment,
            `{a..b}` for the numbers a to b, both included. An empty pattern is the module itself.
        group: may lack its process group; the twin can then be traced, not run.

    Raises:
        ConfigError: a pattern that matches nothing, a layer matched twice, a style that its layer
            does not take, more ranks than there are parts of a layer.
    """
    made: dict[tuple[int, Blocks], nn.Parameter] = {}
    swapped: dict[int, DropIn] = {}
    for match in match_layers(module, plan):
        if match.style != REPLICATE:
            make = STYLES[match.style].make
            swapped[id(match.layer)] = make(match.layer, Place(match.called, group, made))
    twin = _twin(module, swapped)
    _leave_fast_path(twin)
    taken = {id(drop_in) for drop_in in swapped.values()}
    atomic = frozenset(name for name, part in named_modules(twin) if id(part) in taken)
    return Applied(twin, atomic, _local_tensors(module, twin))


def _twin(module: nn.Module, swapped: Mapping[int, DropIn]) -> nn.Module:
    """The module's structure anew, over the same tensors, with layers swapped wherever it refers
    to them.
    """
    memo: dict[int, Any] = dict(swapped)
    for part in module.modules():
        held = chain(part._parameters.values(), part._buffers.values(), vars(part).values())
        memo |= {id(tensor): tensor for tensor in held if isinstance(tensor, torch.Tensor)}
    try:
        twin = copy.deepcopy(module, memo)
    except (TypeError, RuntimeError) as error:
        raise ConfigError(
            f"the model ({type(module).__name__}) cannot be copied, which parallel.tp_plan needs: "
            f"{error}; keep what cannot be copied out of its modules' attributes"
        ) from error
    # Not `eval()`: what a module does in it may change the tensors that both share.
    for part in twin.modules():
        part.training = False
    return twin


def _leave_fast_path(twin: nn.Module) -> None:
    """Torch's encoder layers can run as one kernel that reads their children's weights, and an
    encoder can nest its padded input for it; neither knows of other ranks.
    """
    for part in twin.modules():
        if not any(isinstance(inner, DropIn) for inner in part.modules()):
            continue
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False


def _local_tensors(module: nn.Module, twin: nn.Module) -> dict[str, LocalTensor]:
    first_names: dict[int, str] = {}
    sources: dict[str, str] = {}
    for name, tensor in _named_tensors(module):
        sources[name] = first_names.setdefault(id(tensor), name)
    blocks = {
        f"{path}.{name}".lstrip("."): blocks
        for path, part in named_modules(twin)
        if isinstance(part, DropIn)
        for name, blocks in part.blocks.items()
    }
    tensors = {}
    for name, tensor in _named_tensors(twin):
        pieces: tuple[Piece, ...] = (Piece(sources[name]),)
        dim = 0
        if name in blocks:
            dim = blocks[name].dim
            pieces = tuple(Piece(sources[name], dim, held) for held in blocks[name].ranges)
        tensors[name] = LocalTensor(name, tuple(tensor.shape), dim, pieces)
    return tensors


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, each under all of its names."""
    return chain(
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    )
