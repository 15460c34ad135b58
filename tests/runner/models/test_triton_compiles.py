"""The Triton kernels of attention compile for GPUs, and fit into their shared memory; no GPU is
needed for that.
"""

import importlib.util
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""What one block of threads may take, by compute capability (CUDA C++ Programming Guide)."""

POINTERS = {
    **dict.fromkeys(["q", "k", "v", "keys", "values", "out"], "*bf16"),
    **dict.fromkeys(["partial_out", "partial_lse"], "*fp32"),
    **dict.fromkeys(["finished", "block_tables", "query_offsets", "kv_lengths", "groups"], "*i32"),
    "slots": "*i64",
}


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["decode", "decode-in-mixed", "chunk"])
def test_a_kernel_fits(name: str, head_dim: int, capability: int) -> None:
    import torch

    from parallel.slicing import split_heads
    from runner.models.chunk_kernel import chunk_kernel
    from runner.models.decode_kernel import decode_kernel
    from runner.models.triton_attention import TritonDecodeAttention, TritonMixedAttention

    heads = split_heads(32, 8, 1)[0]
    sizes: dict[str, Any] = {"dtype": torch.bfloat16, "block_size": 16, "head_dim": head_dim}
    decode = TritonDecodeAttention(heads, torch.device("cpu"), **sizes)
    if name == "chunk":
        mixed = TritonMixedAttention(decode, heads, **sizes)
        shared = compiled(chunk_kernel, {**mixed._constants}, capability)
    else:
        constants = {**decode._constants, "IS_MIXED": name == "decode-in-mixed"}
        shared = compiled(decode_kernel, constants, capability)
    assert shared <= SHARED_BYTES[capability]


def compiled(kernel: Any, constants: dict[str, int], capability: int) -> int:
    """Bytes of shared memory that a kernel takes, with rows and heads aligned to 16 numbers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        is_constant = name in constants
        scalar = "fp32" if name == "scale" else "i32"
        signature[name] = "constexpr" if is_constant else POINTERS.get(name, scalar)
        if POINTERS.get(name) in ("*bf16", "*fp32") or name.endswith(("_row", "_head")):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return int(made.metadata.shared)
