"""The metadata of a Llama GGUF as the contents of config.json and generation_config.json.

The keys are those transformers 5 writes. Not here: tensors and the tokenizer.
"""

from __future__ import annotations

from typing import Any

from parallel.errors import ConfigError, IntegrityError
from runner.importer.gguf_file import GgufFile
from runner.importer.gguf_rope import rope_parameters

ARCHITECTURE = "llama"

# Keys that change what the model computes in a way LlamaForCausalLM has no setting for, each with
# the value that means "not used".
_UNSUPPORTED: dict[str, object] = {
    "llama.expert_count": 0,
    "llama.attention.causal": True,
    "llama.attention.scale": 0.0,
    "llama.attention.clamp_kqv": 0.0,
    "llama.attention.sliding_window": 0,
    "llama.use_parallel_residual": False,
    "llama.embedding_scale": 0.0,
    "llama.residual_scale": 0.0,
    "llama.logit_scale": 0.0,
    "llama.final_logit_softcapping": 0.0,
}


def check_architecture(file: GgufFile) -> None:
    """Raise ConfigError unless the file holds a dense model of the Llama architecture."""
    architecture = file.require("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise ConfigError(
            f"{file.path} holds a model of architecture {architecture!r}; `import` takes "
            f"{ARCHITECTURE!r} only. Use the model's safetensors folder if it has one"
        )
    for key, unused in _UNSUPPORTED.items():
        value = file.get(key, object)
        if value is not None and value != unused:
            raise ConfigError(
                f"{file.path}: {key} is {value}, which LlamaForCausalLM cannot express; "
                "use the model's safetensors folder"
            )


def model_config(file: GgufFile, *, dtype: str) -> dict[str, Any]:
    """The contents of config.json, for LlamaForCausalLM.

    Raises:
        ConfigError: a Llama variant that config.json cannot express.
        IntegrityError: a key is missing, of the wrong type, or contradicts another one.
    """
    names = file.tensor_shapes
    num_layers = _positive(file, "llama.block_count")
    if num_layers > len(names):
        raise IntegrityError(f"{file.path}: {num_layers} layers, but {len(names)} tensors")
    num_heads = _positive(file, "llama.attention.head_count")
    num_kv_heads = num_heads
    if file.get("llama.attention.head_count_kv", object) is not None:
        num_kv_heads = _positive(file, "llama.attention.head_count_kv")
    hidden_size = _positive(file, "llama.embedding_length")
    if hidden_size % num_heads or num_heads % num_kv_heads:
        raise ConfigError(
            f"{file.path}: hidden size {hidden_size}, {num_heads} heads, {num_kv_heads} KV heads; "
            "LlamaForCausalLM needs each to be a multiple of the next"
        )
    head_dim = _head_dim(file, hidden_size // num_heads)
    layers = range(num_layers)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": _vocab_size(file),
        "hidden_size": hidden_size,
        "intermediate_size": _positive(file, "llama.feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": any(f"blk.{layer}.attn_q.bias" in names for layer in layers),
        "mlp_bias": any(f"blk.{layer}.ffn_up.bias" in names for layer in layers),
        "rms_norm_eps": file.require("llama.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": rope_parameters(file, head_dim=head_dim),
        "max_position_embeddings": _positive(file, "llama.context_length"),
        # llama.cpp writes the head only where it is not the embedding.
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": token_id(file, "bos"),
        "eos_token_id": token_id(file, "eos"),
        "pad_token_id": token_id(file, "padding"),
    }


def generation_config(file: GgufFile) -> dict[str, Any]:
    """The contents of generation_config.json; every id that ends a turn is an eos_token_id."""
    ends = [token_id(file, name) for name in ("eos", "eot", "eom")]
    eos_ids = list(dict.fromkeys(end for end in ends if end is not None))
    ids: dict[str, Any] = {
        "bos_token_id": token_id(file, "bos"),
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
        "pad_token_id": token_id(file, "padding"),
    }
    return {name: value for name, value in ids.items() if value is not None}


def token_id(file: GgufFile, name: str) -> int | None:
    """The id of the bos, eos, eot, eom, unknown or padding token; None where there is none."""
    value = file.get(f"tokenizer.ggml.{name}_token_id", int)
    # llama.cpp's "no token" is -1, which an unsigned field shows as 2^32 - 1.
    if value is None or value in (-1, 2**32 - 1):
        return None
    vocab_size = _vocab_size(file)
    if not 0 <= value < vocab_size:
        raise IntegrityError(
            f"{file.path}: {name}_token_id is {value}, outside the vocabulary of {vocab_size}"
        )
    return value


def _positive(file: GgufFile, key: str) -> int:
    value = file.require(key, object)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise ConfigError(
                f"{file.path}: {key} differs from layer to layer, which LlamaForCausalLM cannot "
                "express; use the model's safetensors folder"
            )
        value = value[0]
    if not isinstance(value, int) or value < 1:
        raise IntegrityError(f"{file.path}: {key} is {value!r}, not a positive number")
    return value


def _head_dim(file: GgufFile, default: int) -> int:
    head_dim = file.get("llama.attention.key_length", int) or default
    value_dim = file.get("llama.attention.value_length", int) or head_dim
    rotary_dim = file.get("llama.rope.dimension_count", int) or head_dim
    if not head_dim == value_dim == rotary_dim:
        raise ConfigError(
            f"{file.path}: heads of {head_dim} (K), {value_dim} (V) and {rotary_dim} (RoPE) "
            "channels; LlamaForCausalLM needs all three equal"
        )
    return head_dim


def _vocab_size(file: GgufFile) -> int:
    shape = file.tensor_shapes.get("token_embd.weight")
    if shape is None or len(shape) != 2:
        raise IntegrityError(f"{file.path}: token_embd.weight is absent or not a matrix")
    return shape[0]
