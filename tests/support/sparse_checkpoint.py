"""A checkpoint of any size that takes no disk: true headers over a file that is one hole.

For what reads headers alone; whoever reads the weights would read zeros, for a very long time.
"""

import json
import math
from pathlib import Path
from typing import Any

LLAMA_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


def make_sparse_llama(folder: Path, sizes: dict[str, Any]) -> Path:
    """Write a bfloat16 Llama of these config values."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in _shapes(sizes).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return folder


def _shapes(sizes: dict[str, Any]) -> dict[str, list[int]]:
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    kv = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [kv, hidden],
        "self_attn.v_proj": [kv, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    shapes = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(sizes["num_hidden_layers"])
        for name, shape in layer.items()
    }
    vocabulary = [sizes["vocab_size"], hidden]
    outer = {"model.embed_tokens": vocabulary, "model.norm": [hidden], "lm_head": vocabulary}
    return shapes | {f"{name}.weight": shape for name, shape in outer.items()}
