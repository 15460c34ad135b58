"""Where a tensor model comes from: a factory and its weights, an exported program, an ONNX graph.

Each opens as an `nn.Module` in eval mode on the CPU. Not here: tracing or dividing it.
"""

from runner.sources.factory import open_factory
from runner.sources.onnx_graph import open_onnx
from runner.sources.pt2 import open_pt2

__all__ = ["open_factory", "open_onnx", "open_pt2"]
