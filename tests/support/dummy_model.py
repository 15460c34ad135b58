"""A model folder that holds a config.json alone, to be run with random weights."""

import json
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "dtype": "float32",
}


def make_dummy(folder: Path, **changes: Any) -> Path:
    """A Llama of two tiny layers; `changes` are values of its config."""
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder
