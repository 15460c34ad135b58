"""The model families: what each calls its tensors, and what its config means.

All of it is data for one decoder (`runner.models.decoder`). To add a family, write how its config
is read, how its tensors are named, and one line in `FAMILIES`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from parallel.errors import ConfigError
from parallel.rules import Source
from runner.models.config import DecoderConfig, HFConfig


@dataclass(frozen=True)
class Names:
    """A family's names for the modules of a checkpoint, those of a layer relative to the layer.

    Attributes:
        prefix: of every name but the head's; checkpoints of the base model are saved without it.
        embeddings: token embedding, then learned positions where there are any.
        qkv, up: the sources of the merged projections and the sections that each holds.
        transposed: matrices are stored (in, out).
        ignored: glob patterns of tensors that hold nothing to load.
    """

    prefix: str = "model."
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    layer: str = "model.layers.*"
    norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str = "post_feedforward_layernorm"
    qkv: tuple[Source, ...] = (
        Source("self_attn.q_proj", ("query",)),
        Source("self_attn.k_proj", ("kv",)),
        Source("self_attn.v_proj", ("kv",)),
    )
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o_proj: str = "self_attn.o_proj"
    up: tuple[Source, ...] = (Source("mlp.gate_proj", ("mlp",)), Source("mlp.up_proj", ("mlp",)))
    down: str = "mlp.down_proj"
    transposed: bool = False
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Family:
    """How one architecture's checkpoints are read."""

    names: Names
    read: Callable[[HFConfig], DecoderConfig]


def family_of(config: HFConfig) -> Family:
    """The family of a checkpoint.

    Raises:
        ConfigError: the architecture is not known, or the weights are quantized.
    """
    config.refuse("quantization_config")
    if config.architecture not in FAMILIES:
        raise ConfigError(
            f"{config.file}: architecture {config.architecture} is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[config.architecture]


def _llama(config: HFConfig) -> DecoderConfig:
    """Llama 2 and 3; the base that other families differ from."""
    num_layers = config.count("num_hidden_layers")
    num_heads = config.count("num_attention_heads")
    hidden_size = config.count("hidden_size")
    head_dim = config.head_dim(hidden_size, num_heads)
    rope = config.rope(head_dim)
    return DecoderConfig(
        architecture=config.architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=config.count("intermediate_size"),
        vocab_size=config.count("vocab_size"),
        num_heads=num_heads,
        num_kv_heads=config.count("num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        max_positions=rope.max_length,
        norm="rms",
        norm_eps=config.positive("rms_norm_eps", default=1e-6),
        activation=config.activation,
        query_scale=head_dim**-0.5,
        windows=(None,) * num_layers,
        ropes=(rope,),
        rope_of_layer=(0,) * num_layers,
        tied=config.flag("tie_word_embeddings", default=False),
        dtype=config.dtype,
        qkv_bias=config.flag("attention_bias", default=False),
        o_bias=config.flag("attention_bias", default=False),
        mlp_bias=config.flag("mlp_bias", default=False),
    )


def _mistral(config: HFConfig) -> DecoderConfig:
    """Every layer sees a sliding window; a config without the key means 4096."""
    base = _llama(config)
    return replace(base, windows=(config.window(default=4096),) * base.num_layers)


def _qwen2(config: HFConfig) -> DecoderConfig:
    """Biases on Q, K and V alone; upper layers may have a window."""
    return replace(_llama(config), qkv_bias=True, windows=_qwen_windows(config))


def _qwen3(config: HFConfig) -> DecoderConfig:
    """Normalized query and key heads; head_dim does not follow from the hidden size."""
    with_head_dim = HFConfig(config.file, {"head_dim": 128, **config.values})
    return replace(_llama(with_head_dim), qk_norm=True, windows=_qwen_windows(config))


def _qwen_windows(config: HFConfig) -> tuple[int | None, ...]:
    num_layers = config.count("num_hidden_layers")
    if not config.flag("use_sliding_window", default=False):
        return (None,) * num_layers
    first = config.count("max_window_layers", default=28, least=0)
    upper = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    return _windows(config, config.layer_types(num_layers, upper))


def _gemma3(config: HFConfig) -> DecoderConfig:
    """Sliding and full layers with a rope base each, norms before and after, scaled embeddings."""
    config.refuse("attn_logit_softcapping")
    config.refuse("use_bidirectional_attention", False)
    num_layers = config.count("num_hidden_layers")
    pattern = config.count("sliding_window_pattern", "_sliding_window_pattern", default=6)
    default = [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(num_layers)
    ]
    types = config.layer_types(num_layers, default)
    complete = HFConfig(
        config.file,
        {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", **config.values},
    )
    base = _llama(complete)
    full = complete.rope(base.head_dim, layer_type="full_attention", theta=1e6)
    local_theta = config.positive("rope_local_base_freq", default=1e4, above=1)
    local_given = {
        **config.values,
        "rope_scaling": None,
        "rope_theta": local_theta,
    }
    sliding = HFConfig(config.file, local_given).rope(
        base.head_dim, layer_type="sliding_attention", theta=local_theta
    )
    softcap = "final_logit_softcapping"
    return replace(
        base,
        norm="rms_plus_one",
        qk_norm=True,
        post_norms=True,
        # Unlike other models' this length already counts the scaling of the frequencies.
        max_positions=full.max_positions,
        embedding_scale=math.sqrt(base.hidden_size),
        query_scale=config.positive("query_pre_attn_scalar", default=256) ** -0.5,
        logit_softcap=config.positive(softcap) if config.has(softcap) else None,
        windows=_windows(config, types),
        ropes=(full, sliding),
        rope_of_layer=tuple(int(kind == "sliding_attention") for kind in types),
        tied=config.flag("tie_word_embeddings", default=True),
    )


def _windows(config: HFConfig, layer_types: list[str]) -> tuple[int | None, ...]:
    window = config.window(default=4096)
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _phi3(config: HFConfig) -> DecoderConfig:
    """QKV and gate-up are fused in the checkpoint; a part of each head is rotated."""
    base = _llama(config)
    return replace(base, windows=(config.window(default=None),) * base.num_layers)


def _gpt2(config: HFConfig) -> DecoderConfig:
    """Learned positions, LayerNorm, a plain MLP, matrices stored (in, out)."""
    config.refuse("scale_attn_by_inverse_layer_idx", False)
    config.refuse("add_cross_attention", False)
    config.refuse("scale_attn_weights", True)
    num_layers = config.count("n_layer", "num_hidden_layers")
    num_heads = config.count("n_head", "num_attention_heads")
    hidden_size = config.count("n_embd", "hidden_size")
    head_dim = config.head_dim(hidden_size, num_heads)
    return DecoderConfig(
        architecture=config.architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=config.count("n_inner", default=4 * hidden_size),
        vocab_size=config.count("vocab_size"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        max_positions=config.count("n_positions", "max_position_embeddings"),
        norm="layer",
        norm_eps=config.positive("layer_norm_epsilon", default=1e-5),
        activation=config.activation,
        query_scale=head_dim**-0.5,
        windows=(None,) * num_layers,
        ropes=(),
        rope_of_layer=(0,) * num_layers,
        tied=config.flag("tie_word_embeddings", default=True),
        dtype=config.dtype,
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    )


_LLAMA_NAMES = Names()

_GEMMA3_NAMES = Names(mlp_norm="pre_feedforward_layernorm")

_PHI3_NAMES = Names(
    qkv=(Source("self_attn.qkv_proj", ("query", "kv", "kv")),),
    up=(Source("mlp.gate_up_proj", ("mlp", "mlp")),),
)

_GPT2_NAMES = Names(
    prefix="transformer.",
    embeddings=("transformer.wte", "transformer.wpe"),
    layer="transformer.h.*",
    norm="transformer.ln_f",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    qkv=(Source("attn.c_attn", ("query", "kv", "kv")),),
    o_proj="attn.c_proj",
    up=(Source("mlp.c_fc", ("mlp",)),),
    down="mlp.c_proj",
    transposed=True,
    ignored=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(_LLAMA_NAMES, _llama),
    "MistralForCausalLM": Family(_LLAMA_NAMES, _mistral),
    "Qwen2ForCausalLM": Family(_LLAMA_NAMES, _qwen2),
    "Qwen3ForCausalLM": Family(_LLAMA_NAMES, _qwen3),
    "Gemma3ForCausalLM": Family(_GEMMA3_NAMES, _gemma3),
    "Phi3ForCausalLM": Family(_PHI3_NAMES, _phi3),
    "GPT2LMHeadModel": Family(_GPT2_NAMES, _gpt2),
}
