"""What TensorRT-RTX is slow at, written anew: of finite numbers it is the same up to rounding."""

import warnings

import torch

from runner.compiler.tensorrt_convolutions import CONVOLUTIONS, convolution, is_slow_convolution
from runner.compiler.tensorrt_install import Flavour
from runner.compiler.tensorrt_kernels import turn_kernels
from runner.compiler.tensorrt_products import is_slow_product, product

FORMS = "3"
"""Counts up with every change of a form; part of an artefact's key."""

_FORMS = {torch.ops.aten.linear.default: product, **dict.fromkeys(CONVOLUTIONS, convolution)}


def reform(program: torch.export.ExportedProgram, flavour: Flavour) -> torch.export.ExportedProgram:
    """The program in the forms that RTX is fast at; itself where it has them already.

    Its inputs are the same bytes, if not in the same shapes.
    """
    program = turn_kernels(program, flavour)
    nodes = program.graph.nodes
    if flavour != "rtx" or not any(is_slow_product(n) or is_slow_convolution(n) for n in nodes):
        return program
    with warnings.catch_warnings():
        # PyTorch's own code uses what it deprecates.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        reformed: torch.export.ExportedProgram = program.run_decompositions(_FORMS)
    return reformed
