"""Small random checkpoints that exercise what each family does differently, made by transformers.

Sizes are odd on purpose. Every parameter is random, norms and biases too, so that none can be
dropped unnoticed.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

_COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 97,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **values}


_LLAMA3_ROPE = _rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": _LLAMA3_ROPE},
    "llama_bias_tied_linear": {
        "rope_parameters": _rope("linear", factor=2.5),
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 6,
    },
    "llama_dynamic": {
        "rope_parameters": _rope("dynamic", factor=3.0),
        "max_position_embeddings": 16,
        "num_key_value_heads": 2,
    },
    "llama_yarn": {
        "rope_parameters": _rope("yarn", factor=4.0, original_max_position_embeddings=32),
        "num_key_value_heads": 1,
    },
    "mistral": {"sliding_window": 7, "head_dim": 10},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 12, "tie_word_embeddings": True},
    "gemma3": {
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 20,
        "query_pre_attn_scalar": 15,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "full_attention": _rope("linear", factor=8.0) | {"rope_theta": 1e6},
            "sliding_attention": _rope("default"),
        },
        "tie_word_embeddings": True,
    },
    "phi3": {
        "original_max_position_embeddings": 20,
        "rope_parameters": _rope(
            "longrope",
            partial_rotary_factor=0.75,
            short_factor=[1.0, 1.1, 1.2],
            long_factor=[1.5, 2.0, 4.0],
        ),
        "sliding_window": 30,
    },
    "gpt2": {},
}

_CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
}

_GPT2_SIZES = {"n_embd": 42, "n_layer": 3, "n_head": 6, "n_inner": 95, "n_positions": 110}


def make_checkpoint(name: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random float32 checkpoint of a variant in `FAMILIES`.

    Args:
        changes: config values that differ from the variant's.
    """
    family = name.split("_")[0]
    config_class, model_class = (getattr(transformers, c) for c in _CLASSES[family])
    sizes = _GPT2_SIZES | {"vocab_size": 131} if family == "gpt2" else _COMMON
    config = config_class(**sizes | FAMILIES[name] | changes)
    torch.manual_seed(seed)
    model = model_class(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3 if parameter.dim() == 1 else 0.12)
    model.save_pretrained(folder)
    return folder


def load_reference(folder: Path) -> Any:
    """The unsharded model in float32, as transformers runs it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def reference_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    """(len(prompt), vocab_size) float32."""
    return model(torch.tensor([prompt])).logits[0].float()


@torch.no_grad()
def reference_greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """The greedy continuation, every step computed from scratch so that no cache can be wrong."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def add_tokenizer(folder: Path) -> Path:
    """Give a checkpoint a byte-level tokenizer: id 0 to 2 are special, byte b has id 3 + its place.

    Needs a vocabulary of at least 259.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
