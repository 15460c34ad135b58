"""The tensors of a Llama GGUF under the names, shapes and row order of transformers.

Not here: writing them to files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parallel.errors import ConfigError, IntegrityError
from runner.importer.gguf_file import GgufFile
from runner.importer.gguf_rope import ROPE_FACTORS

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class WeightSource:
    """Where one weight of the Hugging Face model comes from."""

    gguf_name: str
    shape: tuple[int, ...]
    rotary_heads: int = 0
    """Number of heads whose rows are in llama.cpp's RoPE order; 0 means the rows are in place."""


def weight_sources(config: dict[str, Any]) -> dict[str, WeightSource]:
    """Name in transformers -> source, in the order of the forward pass, for a config.json."""
    vocab_shape = (config["vocab_size"], config["hidden_size"])
    hidden_shape = (config["hidden_size"],)
    sources = {"model.embed_tokens.weight": WeightSource("token_embd.weight", vocab_shape)}
    for layer in range(config["num_hidden_layers"]):
        for name, source in _layer_sources(config, layer):
            sources[f"model.layers.{layer}.{name}"] = source
    sources["model.norm.weight"] = WeightSource("output_norm.weight", hidden_shape)
    if not config["tie_word_embeddings"]:
        sources["lm_head.weight"] = WeightSource("output.weight", vocab_shape)
    return sources


def check_tensors(file: GgufFile, sources: dict[str, WeightSource]) -> None:
    """Check that the file holds exactly the tensors that the model has, in the right shapes.

    Raises:
        ConfigError: a tensor that LlamaForCausalLM has no place for.
        IntegrityError: a tensor is missing or has the wrong shape.
    """
    left_over = set(file.tensor_shapes) - {s.gguf_name for s in sources.values()} - {ROPE_FACTORS}
    if left_over:
        raise ConfigError(
            f"{file.path}: LlamaForCausalLM has no place for tensor {min(left_over)}"
            + (f" and {len(left_over) - 1} more" if len(left_over) > 1 else "")
            + "; use the model's safetensors folder"
        )
    for source in sources.values():
        shape = file.tensor_shapes.get(source.gguf_name)
        if shape is None and source.gguf_name.endswith(".bias"):
            raise ConfigError(
                f"{file.path}: tensor {source.gguf_name} is missing; LlamaForCausalLM has a bias "
                "on all linears of the attention (or the MLP), or on none"
            )
        if shape is None:
            raise IntegrityError(f"{file.path}: tensor {source.gguf_name} is missing")
        if shape != source.shape:
            raise IntegrityError(
                f"{file.path}: tensor {source.gguf_name} has shape {shape}; the metadata says "
                f"{source.shape}"
            )


def read_weight(file: GgufFile, source: WeightSource, dtype: torch.dtype) -> torch.Tensor:
    """One weight, dequantised and in transformers' row order, as `dtype` on the host.

    Holds the tensor twice as float32, at most: while the gguf package joins the rows that it
    dequantised, and while rows are moved. Only the result stays.

    Raises:
        IntegrityError: the tensor holds a value that is not finite.
        ConfigError: a value is too large for `dtype`, or the tensor's type is unknown.
    """
    import torch

    values = file.dequantize(source.gguf_name)
    if source.rotary_heads:
        values = restore_rotary_order(values, source.rotary_heads)
    full = torch.from_numpy(values)
    weight = full.to(dtype)
    if not _is_finite(weight):
        if not _is_finite(full):
            raise IntegrityError(f"{file.path}: tensor {source.gguf_name} holds NaN or infinity")
        raise ConfigError(
            f"{file.path}: tensor {source.gguf_name} has values up to {full.abs().max():.3g}, "
            f"too large for {str(dtype).removeprefix('torch.')}; use --dtype bfloat16 or float32"
        )
    return weight


def restore_rotary_order(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo the row order that the GGUF of the llama architecture gives Q and K.

    llama.cpp rotates neighbouring channels (0,1), (2,3), ... of a head; transformers rotates
    channel i with i + head_dim / 2. So with head_dim 4 the rows 0 1 2 3 become 0 2 1 3.

    Args:
        values: (num_heads * head_dim, ...), a weight or a bias.
        num_heads: query heads for Q, KV heads for K.
    """
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _is_finite(values: torch.Tensor) -> bool:
    # torch.isfinite would hold copies of the tensor; a NaN anywhere is both least and largest here.
    return all(math.isfinite(extreme) for extreme in values.aminmax())


def _layer_sources(config: dict[str, Any], layer: int) -> Iterator[tuple[str, WeightSource]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q_rows, kv_rows = heads * config["head_dim"], kv_heads * config["head_dim"]
    linears = [
        ("self_attn.q_proj", "attn_q", (q_rows, hidden), heads),
        ("self_attn.k_proj", "attn_k", (kv_rows, hidden), kv_heads),
        ("self_attn.v_proj", "attn_v", (kv_rows, hidden), 0),
        ("self_attn.o_proj", "attn_output", (hidden, q_rows), 0),
        ("mlp.gate_proj", "ffn_gate", (inner, hidden), 0),
        ("mlp.up_proj", "ffn_up", (inner, hidden), 0),
        ("mlp.down_proj", "ffn_down", (hidden, inner), 0),
    ]
    prefix = f"blk.{layer}"
    yield "input_layernorm.weight", WeightSource(f"{prefix}.attn_norm.weight", (hidden,))
    yield "post_attention_layernorm.weight", WeightSource(f"{prefix}.ffn_norm.weight", (hidden,))
    for name, gguf_name, shape, rotary_heads in linears:
        source_name = f"{prefix}.{gguf_name}"
        yield f"{name}.weight", WeightSource(f"{source_name}.weight", shape, rotary_heads)
        if config["mlp_bias" if name.startswith("mlp.") else "attention_bias"]:
            yield f"{name}.bias", WeightSource(f"{source_name}.bias", shape[:1], rotary_heads)
